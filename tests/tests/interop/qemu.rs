//! QEMU's tools, and the images they make.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tandem_block::qcow2::{OpenOptions, Qcow2};
use tandem_block::{Disk, Result};
use tandem_tests::scratch;
use tempfile::TempDir;
use vm_memory::VolatileSlice;

/// Where an image keeps guest data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    Internal,
    InternalV2,
    External,
    Raw,
}

pub const KINDS: [Kind; 4] = [Kind::Internal, Kind::InternalV2, Kind::External, Kind::Raw];

/// An image in a directory of its own.
pub struct Image {
    dir: TempDir,
    pub kind: Kind,
}

impl Image {
    /// An image made by `qemu-img create`, in memory.
    pub fn create(kind: Kind, cluster_size: u64, size: u64) -> Self {
        Self::with_options(kind, cluster_size, size, "")
    }

    /// As [`create`](Self::create), with more options, each behind a comma.
    pub fn with_options(kind: Kind, cluster_size: u64, size: u64, more: &str) -> Self {
        Self::prepared(kind, cluster_size, size, |_| more.to_owned())
    }

    /// As [`create`](Self::create), on a disk: its file system may have what one in memory has not, such
    /// as ranges that are zeroed and keep their space.
    pub fn on_disk(kind: Kind, cluster_size: u64, size: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        Self::create_in(dir, kind, cluster_size, size, |_| String::new())
    }

    /// As [`with_options`](Self::with_options), with the options that `prepare` returns after it has
    /// made other files in the directory.
    pub fn prepared(
        kind: Kind,
        cluster_size: u64,
        size: u64,
        prepare: impl FnOnce(&Path) -> String,
    ) -> Self {
        Self::create_in(scratch::in_memory(), kind, cluster_size, size, prepare)
    }

    fn create_in(
        dir: TempDir,
        kind: Kind,
        cluster_size: u64,
        size: u64,
        prepare: impl FnOnce(&Path) -> String,
    ) -> Self {
        let more = prepare(dir.path());
        let data = dir.path().join("disk.raw");
        let mut options = format!("cluster_size={cluster_size}{more}");
        match kind {
            Kind::Internal => {}
            Kind::InternalV2 => options += ",compat=0.10",
            Kind::External => options += &format!(",data_file={}", data.display()),
            Kind::Raw => options += &format!(",data_file={},data_file_raw=on", data.display()),
        }
        let image = Self { dir, kind };
        let size = size.to_string();
        run(
            "qemu-img",
            &[
                "create",
                "-q",
                "-f",
                "qcow2",
                "-o",
                &options,
                image.path_str(),
                &size,
            ],
        );
        image
    }

    pub fn path(&self) -> PathBuf {
        self.dir.path().join("disk.qcow2")
    }

    fn path_str(&self) -> &str {
        // The directory's name is made of ASCII.
        Box::leak(
            self.path()
                .into_os_string()
                .into_string()
                .unwrap()
                .into_boxed_str(),
        )
    }

    pub fn data_file(&self) -> PathBuf {
        self.dir.path().join("disk.raw")
    }

    pub fn open(&self) -> Result<Qcow2> {
        Qcow2::open(&self.path(), &OpenOptions::default())
    }

    /// The image, with memory for a few L2 slices only.
    pub fn open_with_small_cache(&self) -> Qcow2 {
        let options = OpenOptions {
            l2_cache_size: 0,
            ..OpenOptions::default()
        };
        Qcow2::open(&self.path(), &options).unwrap()
    }

    /// Runs `qemu-img` with `before`, the image, and `after`.
    pub fn qemu_img(&self, before: &[&str], after: &[&str]) {
        let args = [before, &[self.path_str()], after].concat();
        run("qemu-img", &args);
    }

    /// Asserts that `qemu-img check` finds nothing, leaks included.
    pub fn check(&self) {
        let output = command("qemu-img", &["check", self.path_str()]);
        assert!(output.status.success(), "qemu-img check: {output:?}");
    }

    /// Asserts that `qemu-img check` finds nothing but leaked clusters.
    pub fn check_leaks_at_most(&self) {
        let output = command("qemu-img", &["check", self.path_str()]);
        assert!(
            matches!(output.status.code(), Some(0 | 3)),
            "qemu-img check: {output:?}"
        );
    }

    /// What QEMU reads from the image.
    pub fn read_by_qemu(&self) -> Vec<u8> {
        self.convert_by_qemu(&self.path())
    }

    /// What QEMU reads once it has applied the internal snapshot `name`, to a copy.
    pub fn snapshot_by_qemu(&self, name: &str) -> Vec<u8> {
        let copy = self.dir.path().join("copy.qcow2");
        std::fs::copy(self.path(), &copy).unwrap();
        run(
            "qemu-img",
            &["snapshot", "-a", name, copy.to_str().unwrap()],
        );
        self.convert_by_qemu(&copy)
    }

    fn convert_by_qemu(&self, image: &Path) -> Vec<u8> {
        let raw = self.dir.path().join("converted");
        let files = [image.to_str().unwrap(), raw.to_str().unwrap()];
        run(
            "qemu-img",
            &[
                &["convert", "-t", "unsafe", "-f", "qcow2", "-O", "raw"],
                &files[..],
            ]
            .concat(),
        );
        std::fs::read(raw).unwrap()
    }

    /// The map of the disk, without the offsets that an internal image is free to choose: start,
    /// length, whether it has data, reads as zero, and has a place.
    pub fn map(&self) -> Vec<(u64, u64, bool, bool, bool)> {
        let output = command("qemu-img", &["map", "--output=json", self.path_str()]);
        let map: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout).unwrap();
        let flags = |extent: &serde_json::Value| {
            let is = |key: &str| extent[key].as_bool().unwrap();
            (is("data"), is("zero"), !extent["offset"].is_null())
        };
        // Extents are split where the place jumps, too.
        map.chunk_by(|a, b| flags(a) == flags(b))
            .map(|run| {
                let length = run.iter().map(|e| e["length"].as_u64().unwrap()).sum();
                let (data, zero, place) = flags(&run[0]);
                (run[0]["start"].as_u64().unwrap(), length, data, zero, place)
            })
            .collect()
    }

    /// Runs `qemu-io` commands on the image; any failure fails the test.
    pub fn qemu_io(&self, commands: &[String]) {
        self.qemu_io_with(&[], commands);
    }

    /// As [`qemu_io`](Self::qemu_io), with further options.
    pub fn qemu_io_with(&self, options: &[&str], commands: &[String]) {
        let mut args = options.to_vec();
        args.extend(["-t", "unsafe", "-f", "qcow2", self.path_str()]);
        for command in commands {
            args.extend(["-c", command]);
        }
        let output = command("qemu-io", &args);
        let text = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "qemu-io: {output:?}");
        assert!(
            !text.contains("verification failed"),
            "qemu-io {args:?}: {text}"
        );
    }

    /// Asserts that QEMU sees `expected`: by `qemu-img check`, by reading all of it, by `qemu-io`
    /// pattern by pattern, and in the raw data file.
    pub fn expect(&self, expected: &[u8]) {
        self.check();
        assert_same(&self.read_by_qemu(), expected, "qemu-img convert");
        let reads: Vec<String> = patterns(expected)
            .take(40)
            .map(|(at, len, byte)| format!("read -P {byte} {at} {len}"))
            .collect();
        self.qemu_io(&reads);
        if self.kind == Kind::Raw {
            let data = std::fs::read(self.data_file()).unwrap();
            assert_same(&data[..expected.len()], expected, "the raw data file");
        }
    }
}

/// Runs of equal bytes: offset, length, byte.
fn patterns(bytes: &[u8]) -> impl Iterator<Item = (usize, usize, u8)> + '_ {
    let mut at = 0;
    bytes.chunk_by(|a, b| a == b).map(move |run| {
        at += run.len();
        (at - run.len(), run.len(), run[0])
    })
}

pub fn assert_same(found: &[u8], expected: &[u8], what: &str) {
    assert_eq!(found.len(), expected.len(), "length of {what}");
    if found == expected {
        return;
    }
    if let Some(at) = found.iter().zip(expected).position(|(a, b)| a != b) {
        panic!(
            "{what}: byte {at:#x} is {:#x}, expected {:#x}",
            found[at], expected[at]
        );
    }
}

pub fn command(program: &str, args: &[&str]) -> Output {
    Command::new(program)
        .args(args)
        .output()
        .unwrap_or_else(|e| panic!("{program} (package qemu-utils) is needed: {e}"))
}

/// What `qemu-img` prints.
pub fn qemu_img(args: &[&str]) -> String {
    let output = command("qemu-img", args);
    assert!(output.status.success(), "qemu-img {args:?}: {output:?}");
    String::from_utf8(output.stdout).unwrap()
}

pub fn run(program: &str, args: &[&str]) {
    let output = command(program, args);
    assert!(output.status.success(), "{program} {args:?}: {output:?}");
}

/// Calls `f` on all `items` at the same time: most of the time goes by waiting for the disk.
pub fn at_once<T: Send>(items: impl IntoIterator<Item = T>, f: impl Fn(T) + Sync) {
    let f = &f;
    std::thread::scope(|scope| {
        for item in items {
            scope.spawn(move || f(item));
        }
    });
}

/// Writes `len` bytes of value `byte`, split over several buffers.
pub fn write(disk: &dyn Disk, offset: u64, len: usize, byte: u8) {
    let mut memory = vec![byte; len];
    let (a, b) = memory.split_at_mut(len / 3);
    disk.write_at(&[VolatileSlice::from(a), VolatileSlice::from(b)], offset)
        .unwrap();
}

pub fn read(disk: &dyn Disk, offset: u64, len: usize) -> Vec<u8> {
    let mut memory = vec![0xee; len];
    read_into(disk, offset, &mut memory);
    memory
}

fn read_into(disk: &dyn Disk, offset: u64, memory: &mut [u8]) {
    let (a, b) = memory.split_at_mut(memory.len() / 2);
    disk.read_at(&[VolatileSlice::from(a), VolatileSlice::from(b)], offset)
        .unwrap();
}

/// Reads the whole disk through the engine in pieces of an odd size.
pub fn read_all(disk: &dyn Disk) -> Vec<u8> {
    const PIECE: usize = 1_000_003;
    let mut memory = vec![0xee; disk.size() as usize];
    for (offset, piece) in (0..).step_by(PIECE).zip(memory.chunks_mut(PIECE)) {
        read_into(disk, offset, piece);
    }
    memory
}
