//! Random guest requests, and the images they run on.

use std::path::Path;

use tandem_block::Disk;
use tandem_block::qcow2::{
    BackingFormat, CreateOptions, DataFileLayout, OpenOptions, Qcow2, create,
};
use vm_memory::VolatileSlice;

use crate::storage::SECTOR;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
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

/// Name of the snapshot.
pub const SNAPSHOT: &[u8] = b"before";

/// An image to explore.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    pub kind: Kind,
    pub version: u32,
    pub cluster_size: u64,
    pub extended_l2: bool,
}

impl Setup {
    pub const fn new(kind: Kind, version: u32, cluster_size: u64) -> Self {
        Self {
            kind,
            version,
            cluster_size,
            extended_l2: false,
        }
    }

    pub const fn with_subclusters(self) -> Self {
        Self {
            extended_l2: true,
            ..self
        }
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

    /// A request to discard what will read as zero afterwards: whole clusters of the range on a
    /// disk of `sectors`, if there are any.
    fn discard(&self, sectors: u64, sector: u64, count: u64) -> Op {
        let per_cluster = self.cluster_size / SECTOR as u64;
        let first = sector - sector % per_cluster;
        let end = (sector + count).next_multiple_of(per_cluster).min(sectors);
        Op::Discard {
            sector: first,
            count: end - first,
        }
    }

    pub fn has_data_file(&self) -> bool {
        !matches!(self.kind, Kind::Internal | Kind::Overlay | Kind::Snapshot)
    }

    /// The files of a new image.
    pub fn files(&self) -> (Vec<u8>, Vec<u8>) {
        let dir = tempfile::tempdir().unwrap();
        let (image, data) = (dir.path().join("image"), dir.path().join("data"));
        let mut options = CreateOptions {
            size: self.size(),
            ..CreateOptions::default()
        };
        options.version = self.version;
        options.cluster_size = self.cluster_size;
        options.extended_l2 = self.extended_l2;
        if self.kind == Kind::Overlay {
            options.backing_file = Some("base".into());
            options.backing_format = Some(BackingFormat::Raw);
        }
        options.data_file = self.has_data_file().then(|| data.clone());
        options.data_file_raw = matches!(self.kind, Kind::Raw | Kind::RawIncomplete);
        if self.kind == Kind::Packed {
            options.data_file_layout = DataFileLayout::Packed;
        }
        create(&image, &options).unwrap();
        if self.kind == Kind::Snapshot {
            let disk = Qcow2::open(&image, &OpenOptions::default()).unwrap();
            let mut bytes = self.initial_bytes();
            disk.write_at(&[VolatileSlice::from(&mut bytes[..])], 0)
                .unwrap();
            disk.create_snapshot(SNAPSHOT).unwrap();
        }
        let read = |path: &Path| std::fs::read(path).unwrap_or_default();
        let mut image = read(&image);
        if self.kind == Kind::RawIncomplete {
            unmap_some(&mut image);
        }
        (image, read(&data))
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

/// A generator of random numbers that is the same everywhere (SplitMix64).
#[derive(Clone, Debug)]
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    /// A number below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

/// A guest request. Sectors are counted in units of 512 bytes.
#[derive(Clone, Debug)]
pub enum Op {
    /// Every sector gets `stamp`.
    Write {
        sector: u64,
        count: u64,
        stamp: u64,
    },
    /// As `Write`, of one cluster, compressed.
    Compress {
        sector: u64,
        count: u64,
        stamp: u64,
    },
    Zero {
        sector: u64,
        count: u64,
        unmap: bool,
    },
    Discard {
        sector: u64,
        count: u64,
    },
    /// The disk gets this many sectors.
    Resize {
        sectors: u64,
    },
    Flush,
}

/// `count` random requests for a disk of `setup` that has `sectors` at first; their stamps begin at
/// `stamp`. Whether there are some that change the size is told by `resizes`.
pub fn ops(
    setup: &Setup,
    mut sectors: u64,
    random: &mut Random,
    count: usize,
    stamp: u64,
    resizes: bool,
) -> Vec<Op> {
    let per_cluster = (setup.cluster_size / SECTOR as u64).max(1);
    (0..count)
        .map(|i| {
            let longest = if random.below(4) == 0 {
                3 * per_cluster + 2
            } else {
                per_cluster
            };
            let count = 1 + random.below(longest.min(sectors));
            let mut sector = random.below(sectors - count + 1);
            let mut count = count;
            if random.below(2) == 0 {
                // Whole clusters.
                sector -= sector % per_cluster;
                count = count.next_multiple_of(per_cluster).min(sectors - sector);
            }
            match random.below(12) {
                0..=5 => Op::Write {
                    sector,
                    count,
                    stamp: stamp + i as u64,
                },
                6 => Op::Zero {
                    sector,
                    count,
                    unmap: random.below(2) == 0,
                },
                7 => setup.discard(sectors, sector, count),
                8 if !setup.has_data_file() => {
                    let sector = sector - sector % per_cluster;
                    Op::Compress {
                        sector,
                        count: per_cluster.min(sectors - sector),
                        stamp: stamp + i as u64,
                    }
                }
                9 if resizes => {
                    sectors = 1 + random.below(setup.max_size() / SECTOR as u64);
                    Op::Resize { sectors }
                }
                _ => Op::Flush,
            }
        })
        .collect()
}

/// What a sector with `stamp` holds; stamp 0 is a sector of zeros.
pub fn sector_bytes(stamp: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    bytes.as_chunks_mut().0.fill(stamp.to_le_bytes());
    bytes
}

/// The stamp of a sector; an error says what is wrong if it is not one whole sector.
pub fn stamp_of(bytes: &[u8]) -> Result<u64, String> {
    let words = bytes.as_chunks::<8>().0;
    if words.iter().any(|w| *w != words[0]) {
        return Err(format!(
            "is mixed: {:x?} {:x?}",
            words[0],
            words[words.len() - 1]
        ));
    }
    Ok(u64::from_le_bytes(words[0]))
}

/// Carries out `op`.
pub fn perform(disk: &Qcow2, op: &Op) {
    match *op {
        Op::Write {
            sector,
            count,
            stamp,
        } => {
            let mut bytes = sector_bytes(stamp).repeat(count as usize);
            let bufs = [VolatileSlice::from(&mut bytes[..])];
            disk.write_at(&bufs, sector * SECTOR as u64).unwrap();
        }
        Op::Compress {
            sector,
            count,
            stamp,
        } => {
            let bytes = sector_bytes(stamp).repeat(count as usize);
            let cluster = disk.compress(bytes).unwrap();
            disk.write_compressed(cluster, sector * SECTOR as u64)
                .unwrap();
        }
        Op::Zero {
            sector,
            count,
            unmap,
        } => {
            disk.write_zeroes(sector * SECTOR as u64, count * SECTOR as u64, unmap)
                .unwrap();
        }
        Op::Discard { sector, count } => {
            disk.discard(sector * SECTOR as u64, count * SECTOR as u64)
                .unwrap();
        }
        Op::Resize { sectors } => disk.resize(sectors * SECTOR as u64).unwrap(),
        Op::Flush => disk.flush().unwrap(),
    }
}
