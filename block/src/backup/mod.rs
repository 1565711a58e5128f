//! A disk as it was at one instant, to be read while it goes on changing.
//!
//! [`LiveDisk::begin_backup`] waits until no request is under way, and that is the instant. From then
//! on, whoever is about to change a granule of the disk (64 KiB, or a cluster if that is larger) copies
//! it to a scratch file first, unless the reader of the backup has it already, or it is zero. So the
//! guest waits once for each granule, and never for the reader.
//!
//! The reader asks for what lies from an offset on, as often as it likes: after it has lost its own
//! target, or the connection to it, it goes on from where that ended. What it does not need any more it
//! releases, in the order of the disk, and the space in the scratch file is used again.
//!
//! When the scratch file is full, or cannot be written, or what is about to change cannot be read, the
//! backup fails; the guest does not notice.
//!
//! # Memory
//! Two bits for each granule that the backup wants: 4 MiB for 1 TiB in granules of 64 KiB. And some 50
//! bytes for each granule in the scratch file, 800 KiB for 1 GiB.

mod bitmap;
mod protect;
mod read;
mod scratch;
pub mod stream;

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;

use crate::granules::Granules;
use crate::live::{LiveImage, State};
use crate::new_file::directory_of;
use crate::sync::{Mutex, lock};
use crate::{Error, LiveDisk, Result};

pub(crate) use bitmap::History;
use bitmap::Selection;
use protect::Protection;
pub use read::{Chunk, ChunkExtent};
use scratch::Scratch;

/// Most backups of a disk at a time: each change is shown to all of them.
const MAX_BACKUPS: usize = 8;
/// A granule has at least `1 << MIN_GRANULE_BITS` bytes, and at most `1 << MAX_GRANULE_BITS`.
const MIN_GRANULE_BITS: u32 = 16;
const MAX_GRANULE_BITS: u32 = 21;
/// Most granules of a backup, which has up to two bits for each: 256 MiB.
const MAX_GRANULES: u64 = 1 << 30;

/// What a backup is to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackupOptions {
    /// What is copied.
    pub kind: BackupKind,
    /// Where the scratch file is made; `None`: in the directory of the image.
    pub scratch_dir: Option<PathBuf>,
    /// Most bytes that the scratch file may have.
    pub scratch_size: u64,
}

impl Default for BackupOptions {
    fn default() -> Self {
        Self {
            kind: BackupKind::Full { track: None },
            scratch_dir: None,
            scratch_size: 1 << 30,
        }
    }
}

/// What a backup copies.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BackupKind {
    /// All of the disk.
    Full {
        /// The bitmap that tells from the instant on what has changed, if there is to be one. It is made
        /// if it is not there. Unless the backup succeeds, it is as if that had not been.
        track: Option<Vec<u8>>,
    },
    /// What a bitmap has as dirty.
    Since {
        /// The bitmap.
        bitmap: Vec<u8>,
        /// The bitmap goes on as it is. Otherwise it tells, from the instant on, what has changed since;
        /// unless the backup succeeds, it is as if that had not been.
        keep: bool,
    },
}

/// The name of a backup, which no other one has.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct BackupId([u8; 16]);

/// How a backup stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackupState {
    /// It can be read.
    Active,
    /// It has failed, and is to be given up.
    Failed,
}

/// A backup as a whole.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct BackupStatus {
    /// How it stands.
    pub state: BackupState,
    /// Why it has failed.
    pub failure: Option<String>,
    /// Bytes that it has in all, zeros included.
    pub wanted: u64,
    /// Bytes of those that the reader has released.
    pub released: u64,
    /// Bytes in the scratch file now.
    pub scratch_used: u64,
    /// The most that there ever were.
    pub scratch_peak: u64,
    /// The most that there may be.
    pub scratch_size: u64,
}

/// A disk as it was at one instant.
///
/// ```
/// use std::sync::Arc;
/// use tandem_block::{BackupOptions, Disk, LiveDisk, Raw, VolatileSlice};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("disk.raw");
/// # std::fs::write(&path, vec![1; 4096]).unwrap();
/// let disk = Arc::new(LiveDisk::new(Raw::open(&path, false)?));
/// let backup = LiveDisk::begin_backup(&disk, &BackupOptions::default())?;
/// disk.write_at(&[VolatileSlice::from(&mut [2; 512][..])], 0)?;
///
/// let mut buffer = vec![0; 1 << 20];
/// let mut at = 0;
/// while at < backup.size() {
///     let chunk = backup.read(at, &mut buffer)?;
///     assert!(buffer[..chunk.bytes].iter().all(|byte| *byte == 1));
///     at = chunk.next;
///     backup.release(at)?;
/// }
/// backup.finish()?;
/// # Ok::<(), tandem_block::Error>(())
/// ```
pub struct Backup {
    id: BackupId,
    base: Option<BackupId>,
    kind: BackupKind,
    disk: Arc<LiveDisk>,
    protection: Arc<Protection>,
    reader: Mutex<Reader>,
}

/// How far the reader has come.
struct Reader {
    /// What the backup wants, and has not been released.
    wanted: Granules,
    /// Bytes that the backup has in all, and that have been released.
    total: u64,
    released: u64,
    /// What lies below has been released.
    start: u64,
    /// What lies below has been read.
    end: u64,
    is_over: bool,
}

impl LiveDisk {
    /// Begins a backup of the disk as it is at this instant.
    ///
    /// # Errors
    /// [`Error::Backup`] if there are too many already, the disk is too large, or the bitmap cannot be used
    /// for it; [`Error::Bitmap`] if there is no such bitmap; [`Error::Closed`]; [`Error::Io`].
    pub fn begin_backup(disk: &Arc<Self>, options: &BackupOptions) -> Result<Backup> {
        let id = BackupId::new()?;
        disk.exclusive(|state| {
            let (reader, base, protection) = begin(state, options)?;
            Ok(Backup {
                id,
                base,
                kind: options.kind.clone(),
                disk: disk.clone(),
                protection,
                reader: Mutex::new(reader),
            })
        })
    }
}

/// Begins a backup at the instant at which nobody uses `state`.
fn begin(
    state: &mut State,
    options: &BackupOptions,
) -> Result<(Reader, Option<BackupId>, Arc<Protection>)> {
    state.check_open()?;
    if state.watchers.len() >= MAX_BACKUPS {
        let reason =
            format!("there are {MAX_BACKUPS} backups and other copies of this disk already");
        return Err(Error::Backup(reason));
    }
    let size = state.image.disk().size();
    let granule_bits = granule_bits(&state.image, size)?;
    let dir = match &options.scratch_dir {
        Some(dir) => dir.clone(),
        None => directory_of(state.image.path()).to_owned(),
    };
    let scratch = Scratch::new(&dir, options.scratch_size, granule_bits)?;
    // The last that can fail.
    let selection = Selection::new(state, &options.kind)?;
    let protection = Protection::new(size, granule_bits, scratch, selection.taken);
    let wanted = Granules::new(size.div_ceil(1 << granule_bits));
    let want = |granules: Range<u64>| {
        wanted.insert(granules.clone());
        protection.protected.insert(granules);
    };
    match selection.dirty {
        None => want(protection.granules(0, size)),
        Some(dirty) => dirty.ranges(0).for_each(|range| {
            want(protection.granules(range.start, range.end - range.start));
        }),
    }
    let reader = Reader {
        total: protection.wanted_bytes(&wanted, 0..u64::MAX),
        released: 0,
        wanted,
        start: 0,
        end: 0,
        is_over: false,
    };
    let protection = Arc::new(protection);
    state.watchers.push(protection.clone());
    Ok((reader, selection.base, protection))
}

/// The granules of a backup of `image`, which has `size` bytes.
fn granule_bits(image: &LiveImage, size: u64) -> Result<u32> {
    let cluster_size = image.qcow2().map_or(0, crate::qcow2::Qcow2::cluster_size);
    let least = MIN_GRANULE_BITS.max(cluster_size.checked_ilog2().unwrap_or(0));
    let few = |bits: &u32| size.div_ceil(1 << bits) <= MAX_GRANULES;
    (least..=MAX_GRANULE_BITS).find(few).ok_or_else(|| {
        let most = MAX_GRANULES << MAX_GRANULE_BITS;
        Error::Backup(format!(
            "the disk has {size} bytes, which is more than the {most} that a backup can have"
        ))
    })
}

impl Backup {
    /// Its name.
    pub fn id(&self) -> BackupId {
        self.id
    }

    /// The backup that this one goes on from, as far as this process has seen it.
    pub fn base(&self) -> Option<BackupId> {
        self.base
    }

    /// What it copies.
    pub fn kind(&self) -> &BackupKind {
        &self.kind
    }

    /// The size of the disk at the instant, in bytes.
    pub fn size(&self) -> u64 {
        self.protection.size
    }

    /// The unit in which the disk is copied, in bytes: what the backup has are such units, but for the
    /// end of the disk.
    pub fn granularity(&self) -> u64 {
        1 << self.protection.granule_bits
    }

    /// How it stands.
    pub fn status(&self) -> BackupStatus {
        let (scratch_used, scratch_peak) = self.protection.scratch.used();
        let failure = self.protection.failure();
        let reader = lock(&self.reader);
        BackupStatus {
            state: match failure {
                None => BackupState::Active,
                Some(_) => BackupState::Failed,
            },
            failure,
            wanted: reader.total,
            released: reader.released,
            scratch_used,
            scratch_peak,
            scratch_size: self.protection.scratch.size(),
        }
    }

    /// Ends the backup: the reader has all of it.
    ///
    /// # Errors
    /// [`Error::Backup`] if it has failed, or has not been read to its end; it goes on then.
    pub fn finish(&self) -> Result<()> {
        let mut reader = lock(&self.reader);
        self.protection.check()?;
        if reader.end < self.size() {
            let (end, size) = (reader.end, self.size());
            return Err(Error::Backup(format!(
                "the backup has been read up to offset {end} of {size} only"
            )));
        }
        self.end(&mut reader, true)
    }

    /// Gives the backup up. Its bitmap tells again what it told before.
    ///
    /// # Errors
    /// The bitmap could not get that back, and is of no use any more. The backup has ended anyway.
    pub fn cancel(&self) -> Result<()> {
        self.end(&mut lock(&self.reader), false)
    }

    fn end(&self, reader: &mut Reader, is_success: bool) -> Result<()> {
        if std::mem::replace(&mut reader.is_over, true) {
            return Ok(());
        }
        let protection = &self.protection;
        protection.fail("the backup has ended".to_owned());
        self.disk.exclusive(|state| {
            let own = Arc::as_ptr(protection);
            state
                .watchers
                .retain(|watcher| !std::ptr::addr_eq(Arc::as_ptr(watcher), own));
            match protection.take_back() {
                Some(taken) if is_success => state.history.succeed(taken, self.id),
                Some(taken) => taken.give_back(&mut state.image, &mut state.history)?,
                // The disk has been closed.
                None => {}
            }
            Ok(())
        })
    }
}

impl Drop for Backup {
    /// Gives it up, if it has not been ended.
    fn drop(&mut self) {
        let _ = self.cancel();
    }
}

impl BackupId {
    fn new() -> Result<Self> {
        let mut bytes = [0; 16];
        let got = rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty());
        got.map_err(|e| Error::Backup(format!("could not get a random name: {e}")))?;
        Ok(Self(bytes))
    }

    /// As it is stored.
    pub fn to_bytes(self) -> [u8; 16] {
        self.0
    }
}

impl From<[u8; 16]> for BackupId {
    fn from(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for BackupId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for BackupId {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self> {
        let wrong = || {
            Error::Backup(format!(
                "'{text}' is no name of a backup: 32 hexadecimal digits"
            ))
        };
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(wrong());
        }
        let number = u128::from_str_radix(text, 16).map_err(|_| wrong())?;
        Ok(Self(number.to_be_bytes()))
    }
}
