//! The images, and what is found on them.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use tandem_tests::scratch;
use tempfile::TempDir;

use crate::program;

/// Sectors of the disks, which are no whole number of clusters.
pub const SECTORS: u64 = (4 << 20) / 512 + 5;

/// A way to store a disk.
#[derive(Clone, Copy, Debug)]
pub struct Kind {
    pub name: &'static str,
    /// Lines of `tandem-img` that make the image `disk`.
    prepare: &'static [&'static str],
    /// Keys of `--disk`, behind the path.
    pub keys: &'static str,
}

impl Kind {
    /// Whether the guest is offered a cache that it can flush.
    pub fn has_cache(&self) -> bool {
        !self.keys.contains("writethrough")
    }
}

const fn kind(name: &'static str, prepare: &'static [&'static str]) -> Kind {
    let keys = "";
    Kind {
        name,
        prepare,
        keys,
    }
}

pub const KINDS: [Kind; 10] = [
    kind("internal", &["create -q -f qcow2 disk SIZE"]),
    kind(
        "small clusters",
        &["create -q -f qcow2 -o cluster_size=2k disk SIZE"],
    ),
    kind(
        "extended L2",
        &["create -q -f qcow2 -o extended_l2=on,cluster_size=32k disk SIZE"],
    ),
    kind(
        "external",
        &["create -q -f qcow2 -o data_file=data,data_file_raw=off disk SIZE"],
    ),
    kind(
        "external raw",
        &["create -q -f qcow2 -o data_file=data,data_file_raw=on disk SIZE"],
    ),
    kind(
        "packed",
        &["create -q -f qcow2 -o data_file=data,data_file_layout=packed disk SIZE"],
    ),
    kind(
        "overlay",
        &[
            "create -q -f raw base SIZE",
            "create -q -f qcow2 -o cluster_size=16k -b base -F raw disk",
        ],
    ),
    kind(
        "bitmap",
        &[
            "create -q -f qcow2 -o cluster_size=4k disk SIZE",
            "bitmap --add disk b",
        ],
    ),
    Kind {
        keys: ",cache=writethrough",
        ..kind(
            "write-through",
            &["create -q -f qcow2 -o cluster_size=8k disk SIZE"],
        )
    },
    Kind {
        keys: ",format=raw",
        ..kind("raw", &["create -q -f raw disk SIZE"])
    },
];

/// An image in a directory of its own, in memory: a process that is killed leaves to the system what it
/// has written, so that no disk needs to be waited for.
pub struct Image {
    pub directory: TempDir,
    pub kind: Kind,
}

impl Image {
    pub fn create(kind: Kind) -> Self {
        let directory = scratch::in_memory();
        let image = Self { directory, kind };
        let size = (SECTORS * 512).to_string();
        for line in kind.prepare {
            image.tool(program("tandem-img"), &line.replace("SIZE", &size));
        }
        image
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// What `--disk` is told.
    pub fn disk(&self) -> String {
        format!("{}{}", self.path("disk").display(), self.kind.keys)
    }

    /// Runs a command line, and returns its exit status.
    fn tool(&self, program: PathBuf, line: &str) -> i32 {
        let mut command = Command::new(program);
        command.args(line.split(' ')).current_dir(&self.directory);
        let output = command.output().unwrap();
        let status = output.status.code().unwrap();
        // 3: leaks, and nothing worse.
        let is_fine = status == 0 || status == 3 && line.starts_with("check");
        assert!(is_fine, "{}, {line}: {output:?}", self.kind.name);
        status
    }

    /// QEMU opens the image, finds leaks at most, and reads the disk. Sometimes the leaks are repaired.
    pub fn judge(&self, repair: bool) -> Vec<u8> {
        // QEMU does not know the one that is Tandem's own.
        let judge = match self.kind.name {
            "packed" => program("tandem-img"),
            _ => PathBuf::from("qemu-img"),
        };
        let format = match self.kind.name {
            "raw" => "raw",
            _ => "qcow2",
        };
        if format == "qcow2" {
            self.tool(judge.clone(), "check -f qcow2 disk");
            if repair {
                self.tool(program("tandem-img"), "check -q -r leaks disk");
                assert_eq!(self.tool(judge.clone(), "check -q -f qcow2 disk"), 0);
            }
        }
        self.tool(judge, &format!("convert -f {format} -O raw disk seen"));
        fs::read(self.path("seen")).unwrap()
    }
}
