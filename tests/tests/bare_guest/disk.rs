//! The guest's disks.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use tandem_block::qcow2::{CreateOptions, create};
use tandem_tests::process::{command, run};
use tandem_vmm::DiskConfig;

use crate::content::{self, SECTOR_SIZE};

/// The size is no multiple of a cluster.
const SECTORS: u64 = (16 << 20) / SECTOR_SIZE as u64 + 3;

/// Where the guest's data is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// In the image.
    Internal,
    /// In a data file, `data_file_raw=off`.
    External,
    /// In a data file, `data_file_raw=on`.
    ExternalRaw,
    /// In a raw image.
    RawFormat,
}

/// A disk.
#[derive(Clone)]
pub struct Disk {
    kind: Kind,
    image: PathBuf,
    data_file: Option<PathBuf>,
    /// Whether it is attached read-only.
    pub read_only: bool,
    /// Its size.
    pub sectors: u64,
}

impl Disk {
    /// An empty disk whose files are in `dir`.
    pub fn create(dir: &Path, kind: Kind) -> Self {
        let image = dir.join(format!("{kind:?}.image"));
        let external = matches!(kind, Kind::External | Kind::ExternalRaw);
        let data_file = external.then(|| dir.join(format!("{kind:?}.data")));
        let size = SECTORS * SECTOR_SIZE as u64;
        if kind == Kind::RawFormat {
            File::create(&image).unwrap().set_len(size).unwrap();
        } else {
            let options = CreateOptions {
                size,
                data_file: data_file.clone(),
                data_file_raw: kind == Kind::ExternalRaw,
                ..CreateOptions::default()
            };
            create(&image, &options).unwrap();
        }
        Self {
            kind,
            image,
            data_file,
            read_only: false,
            sectors: SECTORS,
        }
    }

    /// How `tandem run` is told of it (`--disk`).
    pub fn config(&self) -> DiskConfig {
        let format = match self.kind {
            Kind::RawFormat => "raw",
            _ => "qcow2",
        };
        let read_only = if self.read_only { "on" } else { "off" };
        let image = self.image.display().to_string().replace(',', ",,");
        let serial = self.serial();
        format!("{image},format={format},readonly={read_only},serial={serial}")
            .parse()
            .unwrap()
    }

    /// How the guest is told what to find.
    pub fn cmdline(&self) -> String {
        let mode = if self.read_only { "ro" } else { "rw" };
        format!("disk={}:{mode}:{}", self.sectors, self.serial())
    }

    /// 20 bytes, as many as there may be.
    fn serial(&self) -> String {
        format!("{:-<20}", format!("{:?}", self.kind))
    }

    /// The bytes of its files.
    pub fn files(&self) -> Vec<Vec<u8>> {
        let paths = [Some(&self.image), self.data_file.as_ref()];
        let paths = paths.into_iter().flatten();
        paths.map(|path| fs::read(path).unwrap()).collect()
    }

    /// QEMU finds no fault with it, and on it what the guest's case `fill` leaves on disk number
    /// `index`.
    pub fn assert_content(&self, index: usize) {
        let mut expected = vec![0; self.sectors as usize * SECTOR_SIZE];
        content::expect(&mut expected, 0, index);
        let assert = |path: &Path| {
            let found = fs::read(path).unwrap();
            // A raw data file goes on to the end of the last cluster, with zeros.
            let (found, rest) = found.split_at(expected.len());
            assert!(
                found == expected && rest.iter().all(|byte| *byte == 0),
                "{} differs from what the guest has written",
                path.display()
            );
        };
        if self.kind == Kind::RawFormat {
            return assert(&self.image);
        }
        if self.kind == Kind::ExternalRaw {
            self.data_file.iter().for_each(|path| assert(path));
        }
        run(command("qemu-img")
            .args(["check", "-q", "-f", "qcow2"])
            .arg(&self.image))
        .unwrap();
        let converted = self.image.with_extension("converted");
        run(command("qemu-img")
            .args(["convert", "-f", "qcow2", "-O", "raw"])
            .args([&self.image, &converted]))
        .unwrap();
        assert(&converted);
    }
}
