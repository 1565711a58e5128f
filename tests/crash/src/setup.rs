//! The images that workloads run on.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tandem_block::qcow2::{
    BitmapEditor, CreateOptions, DataFileLayout, OpenOptions, Qcow2, create,
};
use tandem_block::{Disk, ImageFormat, Raw, Result};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

use crate::power::Files;
use crate::storage::{Memory, SECTOR, Which, sector_bytes};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    Internal,
    External,
    Raw,
    /// Raw, with a mapping that is not complete: QEMU made such images before version 6.0.
    RawIncomplete,
    Packed,
    /// Internal, on top of a backing file that ends within a cluster of the disk.
    Overlay,
    /// Internal, and all of it is shared with a snapshot.
    Snapshot,
}

/// Name of the snapshot that there is at first.
pub const SNAPSHOT: &[u8] = b"before";
/// Name of the bitmap.
pub const BITMAP: &[u8] = b"changes";

/// An image to explore.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Setup {
    pub kind: Kind,
    pub version: u32,
    pub cluster_size: u64,
    pub extended_l2: bool,
    /// A bitmap follows all changes.
    pub bitmap: bool,
    /// Which other operations there are between requests.
    pub operations: Operations,
}

/// Operations on the image as a whole.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Operations {
    /// It is closed and opened again.
    Reopening,
    /// Also, snapshots are taken, applied and deleted.
    Snapshots,
    /// Also, the header and the refcounts are amended.
    Amendments,
}

/// Kinds and cluster sizes that are explored.
pub const SETUPS: [Setup; 32] = [
    Setup::new(Kind::Overlay, 3, 1024),
    Setup::new(Kind::Overlay, 3, 4096),
    Setup::new(Kind::Internal, 3, 512),
    Setup::new(Kind::Internal, 2, 512),
    Setup::new(Kind::Internal, 3, 4096),
    Setup::new(Kind::Internal, 3, 65536),
    Setup::new(Kind::External, 3, 512),
    Setup::new(Kind::External, 3, 4096),
    Setup::new(Kind::External, 3, 65536),
    Setup::new(Kind::Packed, 3, 512),
    Setup::new(Kind::Packed, 3, 4096),
    Setup::new(Kind::Packed, 3, 65536),
    Setup::new(Kind::RawIncomplete, 3, 512),
    Setup::new(Kind::RawIncomplete, 3, 4096),
    Setup::new(Kind::Raw, 3, 512),
    Setup::new(Kind::Raw, 3, 65536),
    Setup::new(Kind::Snapshot, 3, 512).with(Operations::Snapshots),
    Setup::new(Kind::Snapshot, 3, 4096),
    Setup::new(Kind::Internal, 3, 16384).with_subclusters(),
    Setup::new(Kind::External, 3, 16384).with_subclusters(),
    Setup::new(Kind::Overlay, 3, 16384).with_subclusters(),
    Setup::new(Kind::Snapshot, 3, 16384)
        .with_subclusters()
        .with(Operations::Snapshots),
    Setup::new(Kind::Raw, 3, 16384).with_subclusters(),
    Setup::new(Kind::Internal, 3, 1024).with_bitmap(),
    Setup::new(Kind::Overlay, 3, 4096).with_bitmap(),
    Setup::new(Kind::External, 3, 1024).with_bitmap(),
    Setup::new(Kind::Raw, 3, 1024).with_bitmap(),
    Setup::new(Kind::Internal, 3, 2048).with(Operations::Snapshots),
    Setup::new(Kind::Internal, 2, 1024).with(Operations::Amendments),
    Setup::new(Kind::Internal, 3, 4096).with(Operations::Amendments),
    Setup::new(Kind::External, 3, 1024).with(Operations::Amendments),
    Setup::new(Kind::Packed, 3, 1024).with(Operations::Amendments),
];

impl Setup {
    pub const fn new(kind: Kind, version: u32, cluster_size: u64) -> Self {
        Self {
            kind,
            version,
            cluster_size,
            extended_l2: false,
            bitmap: false,
            operations: Operations::Reopening,
        }
    }

    pub const fn with_subclusters(self) -> Self {
        Self {
            extended_l2: true,
            ..self
        }
    }

    pub const fn with_bitmap(self) -> Self {
        Self {
            bitmap: true,
            ..self
        }
    }

    pub const fn with(self, operations: Operations) -> Self {
        Self { operations, ..self }
    }

    /// Size of the disk in bytes: enough clusters for several L2 tables of the smallest ones, and
    /// an end within a cluster.
    pub fn size(&self) -> u64 {
        (self.cluster_size * 24).max(160 * 512) + 512
    }

    /// The largest size that the disk ever gets.
    pub fn max_size(&self) -> u64 {
        self.size() * 2
    }

    /// What the first sectors hold at the beginning: those of the backing file, if there is one, and
    /// all of them if there is a snapshot. The others are zero.
    pub fn initial(&self) -> Vec<u64> {
        let sectors = self.size() / SECTOR as u64;
        let count = match self.kind {
            Kind::Overlay => sectors / 2 + 3,
            Kind::Snapshot => sectors,
            _ => 0,
        };
        (0..count).map(|i| 1 << 48 | i).collect()
    }

    pub fn initial_bytes(&self) -> Vec<u8> {
        let stamps = self.initial();
        stamps
            .iter()
            .flat_map(|stamp| sector_bytes(*stamp))
            .collect()
    }

    pub fn has_data_file(&self) -> bool {
        !matches!(self.kind, Kind::Internal | Kind::Overlay | Kind::Snapshot)
    }

    /// Names of the backing file, which the image has, and of the data file.
    pub const BASE: &str = "base";
    pub const DATA: &str = "data";

    /// The files of a new image.
    pub fn files(&self) -> Files {
        static MADE: Mutex<BTreeMap<Setup, Files>> = Mutex::new(BTreeMap::new());
        let mut made = MADE.lock().unwrap();
        let make = || {
            let dir = scratch();
            self.create_in(dir.path());
            let read = |name: &str| std::fs::read(dir.path().join(name)).unwrap_or_default();
            Files {
                image: read("image"),
                data: read(Self::DATA),
            }
        };
        made.entry(*self).or_insert_with(make).clone()
    }

    /// Creates the image `image` in `dir`, with the other files.
    pub fn create_in(&self, dir: &Path) {
        let (image, data) = (dir.join("image"), dir.join(Self::DATA));
        let mut options = CreateOptions {
            size: self.size(),
            ..CreateOptions::default()
        };
        options.version = self.version;
        options.cluster_size = self.cluster_size;
        options.extended_l2 = self.extended_l2;
        if self.kind == Kind::Overlay {
            std::fs::write(dir.join(Self::BASE), self.initial_bytes()).unwrap();
            options.backing_file = Some(Self::BASE.into());
            options.backing_format = Some(ImageFormat::Raw);
        }
        options.data_file = self.has_data_file().then_some(data);
        options.data_file_raw = matches!(self.kind, Kind::Raw | Kind::RawIncomplete);
        if self.kind == Kind::Packed {
            options.data_file_layout = DataFileLayout::Packed;
        }
        create(&image, &options).unwrap();
        let open = || Qcow2::open(&image, &OpenOptions::default()).unwrap();
        if self.kind == Kind::Snapshot {
            let disk = open();
            let mut bytes = self.initial_bytes();
            disk.write_at(&[VolatileSlice::from(&mut bytes[..])], 0)
                .unwrap();
            disk.create_snapshot(SNAPSHOT).unwrap();
        }
        if self.kind == Kind::RawIncomplete {
            let mut bytes = std::fs::read(&image).unwrap();
            unmap_some(&mut bytes);
            std::fs::write(&image, bytes).unwrap();
        }
        if self.bitmap {
            let mut editor = BitmapEditor::new(open()).unwrap();
            editor.add(BITMAP, Some(SECTOR as u64)).unwrap();
            editor.commit().unwrap();
        }
    }

    /// Opens an image of this setup.
    pub fn open(&self, image: Memory, data: Memory, options: &OpenOptions) -> Result<Qcow2> {
        let name = Path::new("image");
        let data = self.has_data_file().then(|| Box::new(data) as _);
        let backing = if self.kind == Kind::Overlay {
            let base = Arc::new(Mutex::new(self.initial_bytes()));
            let base = Memory::plain(Which::Data, &base);
            let base = Raw::with_storage(Path::new(Self::BASE), Box::new(base), true)?;
            Some(Arc::new(base) as _)
        } else {
            None
        };
        Qcow2::with_backing(name, Box::new(image), data, backing, options)
    }
}

/// A directory in memory, where syncs take no time, if there is such a file system.
pub fn scratch() -> TempDir {
    let memory = Path::new("/dev/shm");
    let dir = match memory.is_dir() {
        true => tempfile::tempdir_in(memory),
        false => tempfile::tempdir(),
    };
    dir.unwrap()
}

/// As it is called in reports and on command lines.
impl fmt::Display for Setup {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = format!("{:?}", self.kind).to_lowercase();
        write!(f, "{kind}-v{}-{}", self.version, self.cluster_size)?;
        if self.extended_l2 {
            f.write_str("-subclusters")?;
        }
        if self.bitmap {
            f.write_str("-bitmap")?;
        }
        match self.operations {
            Operations::Reopening => Ok(()),
            Operations::Snapshots => f.write_str("-snapshots"),
            Operations::Amendments => f.write_str("-amendments"),
        }
    }
}

/// Empties every other entry of the first L2 table.
fn unmap_some(image: &mut [u8]) {
    let offset_at = |image: &[u8], at: usize| {
        let entry = u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        (entry & 0x00ff_ffff_ffff_fe00) as usize
    };
    let l1_table = offset_at(image, 40);
    let l2_table = offset_at(image, l1_table);
    for entry in (0..32).step_by(2) {
        image[l2_table + entry * 8..][..8].fill(0);
    }
}
