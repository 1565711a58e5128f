//! Random requests of a guest, and operations between them.

use std::ops::Range;
use std::sync::Arc;

use tandem_block::qcow2::{AmendOptions, BitmapAction, OpenOptions, Qcow2};
use tandem_block::{Backup, BackupKind, BackupOptions, Disk, Error, LiveDisk, Result};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

use crate::random::Random;
use crate::setup::{BITMAP, Kind, Operations, SNAPSHOT, Setup, scratch};
use crate::storage::{Memory, SECTOR, sector_bytes};

/// Name of a bitmap that comes and goes.
const OTHER_BITMAP: &[u8] = b"other";

/// A request of the guest, or an operation. Sectors are counted in units of 512 bytes.
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
    /// The image is closed and opened again.
    Reopen,
    /// A snapshot with this number is taken.
    Take {
        snapshot: u64,
    },
    Apply {
        snapshot: u64,
    },
    Delete {
        snapshot: u64,
    },
    Amend(Amendment),
    /// The bitmap that follows changes forgets what it has seen.
    ClearBitmap,
    /// Another bitmap is added or removed.
    AddBitmap,
    RemoveBitmap,
    /// A backup begins, or is read and ends: of what the bitmap tells, if there is one.
    Backup,
    /// A backup is given up, if there is one.
    Cancel,
}

/// What of the header is amended.
#[derive(Clone, Copy, Debug)]
pub enum Amendment {
    Version(u32),
    LazyRefcounts(bool),
    RefcountBits(u64),
}

impl Amendment {
    pub fn options(self) -> AmendOptions {
        let nothing = AmendOptions::default();
        match self {
            Self::Version(version) => AmendOptions {
                version: Some(version),
                ..nothing
            },
            Self::LazyRefcounts(lazy) => AmendOptions {
                lazy_refcounts: Some(lazy),
                ..nothing
            },
            Self::RefcountBits(bits) => AmendOptions {
                refcount_bits: Some(bits),
                ..nothing
            },
        }
    }
}

impl Op {
    /// The sectors that it writes, and the stamp that they get.
    pub fn written(&self) -> Option<(Range<usize>, u64)> {
        match *self {
            Self::Write {
                sector,
                count,
                stamp,
            }
            | Self::Compress {
                sector,
                count,
                stamp,
            } => Some((sector, count, stamp)),
            Self::Zero { sector, count, .. } | Self::Discard { sector, count } => {
                Some((sector, count, 0))
            }
            _ => None,
        }
        .map(|(sector, count, stamp)| (sector as usize..(sector + count) as usize, stamp))
    }

    /// Whether everything before it is durable when it has been carried out.
    pub fn is_durable(&self) -> bool {
        self.is_exclusive() || matches!(self, Self::Flush)
    }

    /// Whether a backup ends before it, which it would not allow.
    pub fn ends_backup(&self) -> bool {
        self.is_exclusive()
            || matches!(self, Self::Backup | Self::Resize { .. } | Self::ClearBitmap)
    }

    /// Whether nobody may use the disk meanwhile.
    fn is_exclusive(&self) -> bool {
        matches!(
            self,
            Self::Reopen
                | Self::Take { .. }
                | Self::Apply { .. }
                | Self::Delete { .. }
                | Self::Amend(_)
        )
    }
}

/// The name of the snapshot with a number.
pub fn snapshot_name(number: u64) -> Vec<u8> {
    match number {
        0 => SNAPSHOT.to_vec(),
        number => format!("s{number}").into_bytes(),
    }
}

/// Makes up operations that can be carried out one after the other.
pub struct Maker<'a> {
    pub setup: &'a Setup,
    /// Sectors of the disk.
    pub sectors: u64,
    /// Numbers of the snapshots, and sectors of the disk when they were taken.
    snapshots: Vec<(u64, u64)>,
    version: u32,
    /// There is another bitmap.
    has_other: bool,
    /// The stamp of the next write.
    pub stamp: u64,
    /// Whether the disk changes its size.
    pub resizes: bool,
    /// Whether there is more than what guests ask for.
    pub operates: bool,
}

impl<'a> Maker<'a> {
    /// For a new image.
    pub fn new(setup: &'a Setup) -> Self {
        let sectors = setup.size() / SECTOR as u64;
        let has_snapshot = setup.kind == Kind::Snapshot;
        Self {
            setup,
            sectors,
            snapshots: has_snapshot.then_some((0, sectors)).into_iter().collect(),
            version: setup.version,
            has_other: false,
            stamp: 1,
            resizes: true,
            operates: true,
        }
    }

    pub fn make(&mut self, random: &mut Random, count: usize) -> Vec<Op> {
        (0..count).map(|_| self.next(random)).collect()
    }

    fn next(&mut self, random: &mut Random) -> Op {
        let op = match random.below(13) {
            0 if self.operates => self.operation(random),
            _ => self.request(random),
        };
        self.stamp += 1;
        self.follow(&op);
        op
    }

    fn operation(&self, random: &mut Random) -> Op {
        let few = self.snapshots.len() < 3;
        let any = |random: &mut Random| {
            let i = random.below(self.snapshots.len() as u64);
            self.snapshots[i as usize].0
        };
        // Those with a bitmap go from one backup to the next.
        let kinds = if self.setup.bitmap { 9 } else { 5 };
        match (self.setup.operations, random.below(kinds)) {
            (_, 4..=7) => Op::Backup,
            (_, 8) => Op::Cancel,
            (Operations::Snapshots, 1) if few => Op::Take {
                snapshot: self.stamp,
            },
            (Operations::Snapshots, 2) if !self.snapshots.is_empty() => Op::Apply {
                snapshot: any(random),
            },
            (Operations::Snapshots, 3) if !self.snapshots.is_empty() => Op::Delete {
                snapshot: any(random),
            },
            (Operations::Amendments, 1) if self.version == 2 => Op::Amend(Amendment::Version(3)),
            (Operations::Amendments, 1) if self.setup.version == 2 => {
                Op::Amend(Amendment::Version(2))
            }
            (Operations::Amendments, 2) if self.version == 3 => {
                Op::Amend(Amendment::LazyRefcounts(random.below(2) == 0))
            }
            (Operations::Amendments, 3) if self.setup.version == 3 => {
                Op::Amend(Amendment::RefcountBits(1 << (3 + random.below(4))))
            }
            (_, 1) if self.setup.bitmap => Op::ClearBitmap,
            (_, 2) if self.setup.bitmap && !self.has_other => Op::AddBitmap,
            (_, 2) if self.setup.bitmap => Op::RemoveBitmap,
            _ => Op::Reopen,
        }
    }

    fn request(&self, random: &mut Random) -> Op {
        let (sectors, stamp) = (self.sectors, self.stamp);
        let per_cluster = (self.setup.cluster_size / SECTOR as u64).max(1);
        let longest = if random.below(4) == 0 {
            3 * per_cluster + 2
        } else {
            per_cluster
        };
        let mut count = 1 + random.below(longest.min(sectors));
        let mut sector = random.below(sectors - count + 1);
        if random.below(2) == 0 {
            // Whole clusters.
            sector -= sector % per_cluster;
            count = count.next_multiple_of(per_cluster).min(sectors - sector);
        }
        match random.below(12) {
            0..=5 => Op::Write {
                sector,
                count,
                stamp,
            },
            6 => Op::Zero {
                sector,
                count,
                unmap: random.below(2) == 0,
            },
            7 => self.discard(sector, count),
            8 if !self.setup.has_data_file() => {
                let sector = sector - sector % per_cluster;
                Op::Compress {
                    sector,
                    count: per_cluster.min(sectors - sector),
                    stamp,
                }
            }
            9 if self.resizes => Op::Resize {
                sectors: 1 + random.below(self.setup.max_size() / SECTOR as u64),
            },
            _ => Op::Flush,
        }
    }

    /// A request to discard what will read as zero afterwards: whole clusters of the range.
    fn discard(&self, sector: u64, count: u64) -> Op {
        let per_cluster = self.setup.cluster_size / SECTOR as u64;
        let first = sector - sector % per_cluster;
        let end = (sector + count)
            .next_multiple_of(per_cluster)
            .min(self.sectors);
        Op::Discard {
            sector: first,
            count: end - first,
        }
    }

    /// `op` is carried out.
    fn follow(&mut self, op: &Op) {
        match op {
            Op::Resize { sectors } => self.sectors = *sectors,
            Op::Take { snapshot } => self.snapshots.push((*snapshot, self.sectors)),
            Op::Apply { snapshot } => {
                let mut all = self.snapshots.iter();
                if let Some((_, sectors)) = all.find(|(number, _)| number == snapshot) {
                    self.sectors = *sectors;
                }
            }
            Op::Delete { snapshot } => self.snapshots.retain(|(number, _)| number != snapshot),
            Op::Amend(Amendment::Version(version)) => self.version = *version,
            Op::AddBitmap => self.has_other = true,
            Op::RemoveBitmap => self.has_other = false,
            _ => {}
        }
    }

    /// Whether `ops` can be carried out one after the other.
    pub fn is_possible(setup: &'a Setup, ops: &[Op]) -> bool {
        let mut maker = Self::new(setup);
        ops.iter().all(|op| {
            let within = op
                .written()
                .is_none_or(|(sectors, _)| sectors.end as u64 <= maker.sectors);
            let has = |number: &u64| maker.snapshots.iter().any(|(n, _)| n == number);
            let known = match op {
                Op::Apply { snapshot } | Op::Delete { snapshot } => has(snapshot),
                Op::Amend(Amendment::LazyRefcounts(_)) => maker.version == 3,
                Op::AddBitmap => !maker.has_other,
                Op::RemoveBitmap => maker.has_other,
                Op::Compress { sector, count, .. } => {
                    *count * SECTOR as u64 == setup.cluster_size || sector + count == maker.sectors
                }
                _ => true,
            };
            maker.follow(op);
            within && known
        })
    }
}

/// An image in use.
pub struct Session<'a> {
    setup: &'a Setup,
    options: &'a OpenOptions,
    image: Memory,
    data: Memory,
    disk: Option<Arc<LiveDisk>>,
    /// A backup, and what the disk held when it began.
    backup: Option<(Backup, Vec<u8>)>,
    /// What the backups since the bitmap began restore, one on top of the other.
    restored: Vec<u8>,
    scratch: TempDir,
}

impl<'a> Session<'a> {
    pub fn open(
        setup: &'a Setup,
        options: &'a OpenOptions,
        image: Memory,
        data: Memory,
    ) -> Result<Self> {
        let mut session = Self {
            setup,
            options,
            image,
            data,
            disk: None,
            backup: None,
            restored: Vec::new(),
            scratch: scratch(),
        };
        session.disk = Some(Arc::new(LiveDisk::new(session.qcow2()?)));
        session.restored = content(session.disk())?;
        Ok(session)
    }

    fn qcow2(&self) -> Result<Qcow2> {
        let (image, data) = (self.image.again(), self.data.again());
        self.setup.open(image, data, self.options)
    }

    pub fn disk(&self) -> &LiveDisk {
        self.disk.as_ref().unwrap()
    }

    /// Carries out `op`.
    pub fn perform(&mut self, op: &Op) -> Result<()> {
        if matches!(op, Op::Backup) && self.backup.is_none() {
            return self.begin_backup();
        }
        if op.ends_backup() {
            self.end_backup()?;
        }
        match op {
            Op::Backup => return Ok(()),
            Op::Cancel => {
                return self
                    .backup
                    .take()
                    .map_or(Ok(()), |(backup, _)| backup.cancel());
            }
            Op::ClearBitmap => self.restored = content(self.disk())?,
            _ => {}
        }
        if !op.is_exclusive() {
            return request(self.disk(), op);
        }
        self.disk().close()?;
        self.disk = None;
        match op {
            Op::Take { snapshot } => self.qcow2()?.create_snapshot(&snapshot_name(*snapshot))?,
            Op::Apply { snapshot } => self.qcow2()?.apply_snapshot(&snapshot_name(*snapshot))?,
            Op::Delete { snapshot } => self.qcow2()?.delete_snapshot(&snapshot_name(*snapshot))?,
            Op::Amend(amendment) => {
                let options = amendment.options();
                self.qcow2()?.amend(&options, &mut |_, _| {})?;
            }
            _ => {}
        }
        self.disk = Some(Arc::new(LiveDisk::new(self.qcow2()?)));
        Ok(())
    }

    /// A backup begins.
    fn begin_backup(&mut self) -> Result<()> {
        let kind = match self.setup.bitmap {
            true => BackupKind::Since {
                bitmap: BITMAP.to_vec(),
                keep: false,
            },
            false => BackupKind::Full { track: None },
        };
        let options = BackupOptions {
            kind,
            scratch_dir: Some(self.scratch.path().to_owned()),
            ..BackupOptions::default()
        };
        let content = content(self.disk())?;
        let disk = self.disk.as_ref().unwrap();
        self.backup = Some((LiveDisk::begin_backup(disk, &options)?, content));
        Ok(())
    }

    /// The backup ends, if there is one, after it has been read: on top of those before it, it restores
    /// what the disk held.
    fn end_backup(&mut self) -> Result<()> {
        let Some((backup, expected)) = self.backup.take() else {
            return Ok(());
        };
        restore(&backup, &mut self.restored)?;
        if self.restored != expected {
            return Err(Error::Option("the backup is wrong".to_owned()));
        }
        backup.finish()
    }
}

/// Reads `backup` into what the ones before it have restored.
///
/// # Errors
/// As [`Backup::read`].
pub fn restore(backup: &Backup, restored: &mut Vec<u8>) -> Result<()> {
    restored.resize(backup.size() as usize, 0);
    let mut buffer = vec![0; 1 << 20];
    let mut at = 0;
    while at < backup.size() {
        let chunk = backup.read(at, &mut buffer)?;
        let mut bytes = &buffer[..chunk.bytes];
        for extent in &chunk.extents {
            let to = &mut restored[extent.offset as usize..][..extent.len as usize];
            if extent.is_zero {
                to.fill(0);
                continue;
            }
            let (data, rest) = bytes.split_at(to.len());
            to.copy_from_slice(data);
            bytes = rest;
        }
        at = chunk.next;
        backup.release(at)?;
    }
    Ok(())
}

fn content(disk: &dyn Disk) -> Result<Vec<u8>> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 0)?;
    Ok(bytes)
}

/// Carries out `op`, which a guest asks for.
pub fn request(disk: &LiveDisk, op: &Op) -> Result<()> {
    const LEN: u64 = SECTOR as u64;
    match *op {
        Op::Write {
            sector,
            count,
            stamp,
        } => {
            let mut bytes = sector_bytes(stamp).repeat(count as usize);
            let bufs = [VolatileSlice::from(&mut bytes[..])];
            disk.write_at(&bufs, sector * LEN)
        }
        Op::Compress {
            sector,
            count,
            stamp,
        } => {
            let bytes = sector_bytes(stamp).repeat(count as usize);
            disk.write_compressed(bytes, sector * LEN)
        }
        Op::Zero {
            sector,
            count,
            unmap,
        } => disk.write_zeroes(sector * LEN, count * LEN, unmap),
        Op::Discard { sector, count } => disk.discard(sector * LEN, count * LEN),
        Op::Resize { sectors } => disk.resize(sectors * LEN),
        Op::ClearBitmap => disk.change_bitmaps(&[BitmapAction::Clear {
            name: BITMAP.to_vec(),
        }]),
        Op::AddBitmap => disk.change_bitmaps(&[BitmapAction::Add {
            name: OTHER_BITMAP.to_vec(),
            granularity: None,
            enabled: true,
        }]),
        Op::RemoveBitmap => disk.change_bitmaps(&[BitmapAction::Remove {
            name: OTHER_BITMAP.to_vec(),
        }]),
        _ => disk.flush(),
    }
}
