//! A disk that is operated on while it is used.
//!
//! Requests come from any thread, as to any [`Disk`]. What is done to the image as a whole, such as
//! freezing a bitmap or exchanging an image for an overlay of it, happens at one instant between
//! requests: each request holds the image shared, and the operation holds it alone. So it waits for
//! the requests that are under way, and the others wait for it.
//!
//! [`Watcher`]s are told of each change before it happens.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `bitmaps` | the persistent bitmaps of the disk |
//! | `chain` | the images below one another, and handing their locks over |
//! | `changes`, `passes` | going through a disk that changes meanwhile, until all of it has been seen |
//! | `commit`, `rebase`, `fork` | what is done so to the images of a disk |
//! | `view` | what others may see of the image |
//!
//! # Lock order
//! A thread that holds one of these takes only ones further down:
//!
//! 1. how far the reader of a backup has come (`Backup::reader`);
//! 2. the disk ([`LiveDisk`]), shared or alone; not twice, for a thread that waits to have it alone
//!    keeps out those that come to share it;
//! 3. a range of granules of a backup (`Protection::ranges`), of one backup at a time;
//! 4. the slots of a scratch file, why a backup has failed, or what it has taken from a bitmap; I/O
//!    goes on under none of them;
//! 5. those of the images, from the top down (`crate::qcow2`).

mod bitmaps;
mod chain;
mod changes;
mod commit;
mod fork;
mod passes;
mod rebase;
mod view;

use std::fmt;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::sync::{Arc, PoisonError, TryLockError};
use std::thread::panicking;
use std::time::Duration;

use crossbeam_utils::sync::{ShardedLock, ShardedLockReadGuard};
use vm_memory::VolatileSlice;

use crate::backup::History;
use crate::disk::total_len;
use crate::qcow2::Qcow2;
use crate::{Disk, Error, Extent, Limits, Preallocation, Raw, Result, Stamp};

pub use bitmaps::LiveBitmap;
use chain::Gone;
pub use chain::ImageRef;
use changes::Changes;
pub use commit::CommitOptions;
pub use fork::ForkOptions;
pub use passes::Progress;
pub use rebase::RebaseOptions;
pub use view::ImageView;

/// A [`Raw`] or [`Qcow2`] disk that can be operated on while it is used.
///
/// It has no [`backing`](Disk::backing) and no [`host_file`](Disk::host_file), for these could be
/// exchanged while the caller looks at them: see [`with_image`](LiveDisk::with_image).
pub struct LiveDisk(ShardedLock<State>);

impl fmt::Debug for LiveDisk {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Whoever looks does not wait for an operation.
        f.debug_struct("LiveDisk").finish_non_exhaustive()
    }
}

/// What requests and operations find behind the lock.
pub(crate) struct State {
    pub image: LiveImage,
    pub watchers: Vec<Arc<dyn Watcher>>,
    /// What is being done to the images, if anything is: one thing at a time.
    operation: Option<&'static str>,
    /// Nothing is done to the disk any more.
    is_closed: bool,
    pub history: History,
}

/// What a [`LiveDisk`] consists of. Operations on the disk fail while anybody else keeps it.
pub enum LiveImage {
    /// The file is the disk.
    Raw(Arc<Raw>),
    /// qcow2.
    Qcow2(Arc<Qcow2>),
    /// An image that could not be kept: every request fails.
    Gone(Arc<Gone>),
}

/// How an operation on the images of a disk has gone.
#[derive(Debug)]
#[non_exhaustive]
pub struct LiveReport {
    /// The longest time that requests had to wait for it at a stretch.
    pub stopped: Duration,
    /// What has gone wrong that is not needed for the disk as it is now.
    pub warning: Option<Error>,
}

/// Who is told of each change of a disk before it happens. A failure is its own affair: a change is
/// never refused for its sake.
pub(crate) trait Watcher: Send + Sync {
    /// The `len` bytes at `offset` of `disk`, a range within it, are about to change; they do so when
    /// this returns.
    fn before_change(&self, disk: &dyn Disk, offset: u64, len: u64);

    /// Whether [`before_change`](Self::before_change) would wait for nothing. Then it is called.
    fn is_quick(&self, offset: u64, len: u64) -> bool;

    /// Whether the disk may get a size of `size` bytes.
    ///
    /// # Errors
    /// [`Error::Option`] says why not.
    fn check_size(&self, disk: &dyn Disk, size: u64) -> Result<()>;

    /// The disk, which is `image`, is about to be closed. Nothing changes any more. `history` tells of
    /// its backups.
    fn close(&self, image: &mut LiveImage, history: &mut History) {
        let _ = (image, history);
    }
}

impl LiveImage {
    /// The disk that requests go to.
    pub fn disk(&self) -> &dyn Disk {
        match self {
            Self::Raw(disk) => &**disk,
            Self::Qcow2(disk) => &**disk,
            Self::Gone(disk) => &**disk,
        }
    }

    /// The same, for one that others are on top of.
    pub(crate) fn shared(&self) -> Arc<dyn Disk> {
        match self {
            Self::Raw(disk) => disk.clone(),
            Self::Qcow2(disk) => disk.clone(),
            Self::Gone(disk) => disk.clone(),
        }
    }

    /// Where the image is, as it was named when it was opened.
    pub fn path(&self) -> &Path {
        match self {
            Self::Raw(disk) => disk.path(),
            Self::Qcow2(disk) => disk.path(),
            Self::Gone(disk) => disk.path(),
        }
    }

    /// The image, if it is in qcow2 format.
    pub fn qcow2(&self) -> Option<&Qcow2> {
        match self {
            Self::Qcow2(disk) => Some(disk),
            Self::Raw(_) | Self::Gone(_) => None,
        }
    }

    /// The image to be changed as a whole, if it is in qcow2 format and nobody else holds it.
    pub(crate) fn qcow2_mut(&mut self) -> Option<&mut Qcow2> {
        match self {
            Self::Qcow2(disk) => Arc::get_mut(disk),
            Self::Raw(_) | Self::Gone(_) => None,
        }
    }
}

impl From<Raw> for LiveImage {
    fn from(disk: Raw) -> Self {
        Self::Raw(Arc::new(disk))
    }
}

impl From<Qcow2> for LiveImage {
    fn from(disk: Qcow2) -> Self {
        Self::Qcow2(Arc::new(disk))
    }
}

impl LiveDisk {
    /// Puts `image` to use.
    pub fn new(image: impl Into<LiveImage>) -> Self {
        Self(ShardedLock::new(State {
            image: image.into(),
            watchers: Vec::new(),
            operation: None,
            is_closed: false,
            history: History::default(),
        }))
    }

    /// Has `look` look at the image as it is now. Operations wait for its end.
    pub fn with_image<T>(&self, look: impl FnOnce(ImageView<'_>) -> T) -> T {
        look(ImageView(&self.shared().image))
    }

    /// As [`Qcow2::compress`] and [`Qcow2::write_compressed`].
    ///
    /// # Errors
    /// Those of both; [`Error::Option`] for a raw disk.
    pub fn write_compressed(&self, data: Vec<u8>, offset: u64) -> Result<()> {
        let (state, len) = (self.shared(), data.len() as u64);
        let image = match &state.image {
            LiveImage::Qcow2(image) => image,
            LiveImage::Gone(gone) => return Err(gone.error()),
            LiveImage::Raw(_) => {
                let reason = "a raw disk has no compressed clusters";
                return Err(Error::Option(reason.to_owned()));
            }
        };
        let packed = image.compress(data)?;
        state.announce(&**image, offset, len);
        image.write_compressed(packed, offset)
    }

    /// Carries out `operation` at an instant at which no request is under way.
    pub(crate) fn exclusive<T>(&self, operation: impl FnOnce(&mut State) -> T) -> T {
        // A request that panicked has left the image as valid as it would without this lock.
        let mut state = self.0.write().unwrap_or_else(PoisonError::into_inner);
        operation(&mut state)
    }

    /// Begins an operation on the qcow2 image of the disk, which keeps its size, and takes down its
    /// changes, until what is returned is dropped.
    fn begin_watched(&self, operation: &'static str) -> Result<Watched<'_>> {
        self.exclusive(|state| {
            let top = state.writable_qcow2()?;
            state.image.as_ref()?.check_named()?;
            let changes = Arc::new(Changes::new(top.size(), top.cluster_size()));
            state.begin(operation)?;
            state.watchers.push(changes.clone());
            Ok(Watched {
                disk: self,
                changes,
            })
        })
    }

    /// Has the qcow2 image of the disk keep the stamp of what is below it, which does not change any more.
    fn stamp_below(&self) -> Result<()> {
        let below = {
            let state = self.shared();
            state.writable_qcow2()?.lower().cloned()
        };
        let Some(below) = below else { return Ok(()) };
        // This may wait for the clock.
        let stamp = Stamp::of(&*below)?;
        drop(below);
        self.exclusive(|state| state.writable_qcow2()?.keep_stamp(stamp))
    }

    /// Keeps operations out while what is returned is held.
    pub(crate) fn shared(&self) -> ShardedLockReadGuard<'_, State> {
        self.0.read().unwrap_or_else(PoisonError::into_inner)
    }

    /// As [`shared`](Self::shared), if no operation is under way.
    fn try_shared(&self) -> Option<ShardedLockReadGuard<'_, State>> {
        match self.0.try_read() {
            Ok(state) => Some(state),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Carries out `change`, of `len` bytes at `offset`.
    fn change<T>(
        &self,
        offset: u64,
        len: u64,
        change: impl FnOnce(&dyn Disk) -> Result<T>,
    ) -> Result<T> {
        let state = self.shared();
        let disk = state.image.disk();
        state.announce(disk, offset, len);
        change(disk)
    }
}

/// An operation under way, and what changes meanwhile.
struct Watched<'a> {
    disk: &'a LiveDisk,
    changes: Arc<Changes>,
}

impl Drop for Watched<'_> {
    fn drop(&mut self) {
        self.disk.exclusive(|state| {
            state.unwatch(&self.changes);
            // Nobody knows how far one has come that panics: the guest goes on, and no other begins.
            if !panicking() {
                state.end();
            }
        });
    }
}

impl State {
    /// Keeps other operations on the images out until [`end`](Self::end).
    fn begin(&mut self, operation: &'static str) -> Result<()> {
        self.check_open()?;
        if let Some(other) = self.operation {
            let reason = format!("{operation} is not possible during {other} of the same disk");
            return Err(Error::Option(reason));
        }
        self.operation = Some(operation);
        Ok(())
    }

    fn end(&mut self) {
        self.operation = None;
    }

    /// Fails once the disk has been closed.
    pub(crate) fn check_open(&self) -> Result<()> {
        if self.is_closed {
            let file = self.image.path().to_owned();
            return Err(Error::Closed { file });
        }
        Ok(())
    }

    fn unwatch<W: Watcher>(&mut self, watcher: &Arc<W>) {
        let watcher = Arc::as_ptr(watcher).cast::<()>();
        let is_other = |other: &Arc<dyn Watcher>| Arc::as_ptr(other).cast() != watcher;
        self.watchers.retain(is_other);
    }

    /// The image, if it can have others below it and be written.
    fn writable_qcow2(&self) -> Result<&Qcow2> {
        let image = match &self.image {
            LiveImage::Qcow2(image) => image,
            LiveImage::Gone(gone) => return Err(gone.error()),
            LiveImage::Raw(_) => {
                let reason = "a raw disk is not on top of another image";
                return Err(Error::Option(reason.to_owned()));
            }
        };
        image.check_writable()?;
        Ok(image)
    }

    /// Fails every request from now on.
    fn give_up(&mut self, reason: String) {
        let gone = Gone::new(&self.image, reason);
        self.image = LiveImage::Gone(Arc::new(gone));
    }

    /// Tells the watchers of a change of `len` bytes at `offset`, if it can come to pass.
    fn announce(&self, disk: &dyn Disk, offset: u64, len: u64) {
        if self.watchers.is_empty() || !is_within(disk, offset, len) {
            return;
        }
        for watcher in &self.watchers {
            watcher.before_change(disk, offset, len);
        }
    }

    fn check_size(&self, size: u64) -> Result<()> {
        let disk = self.image.disk();
        let mut watchers = self.watchers.iter();
        watchers.try_for_each(|watcher| watcher.check_size(disk, size))
    }
}

fn in_use() -> Error {
    Error::Option("the image is in another operation".to_owned())
}

fn is_within(disk: &dyn Disk, offset: u64, len: u64) -> bool {
    len > 0
        && offset
            .checked_add(len)
            .is_some_and(|end| end <= disk.size())
}

impl Disk for LiveDisk {
    fn size(&self) -> u64 {
        self.shared().image.disk().size()
    }

    fn limits(&self) -> Limits {
        self.shared().image.disk().limits()
    }

    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.shared().image.disk().read_at(bufs, offset)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.change(offset, total_len(bufs), |disk| disk.write_at(bufs, offset))
    }

    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        match self.try_shared() {
            Some(state) => state.image.disk().try_read_at(bufs, offset),
            None => Ok(false),
        }
    }

    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        let Some(state) = self.try_shared() else {
            return Ok(false);
        };
        let disk = state.image.disk();
        if !state.watchers.is_empty() {
            let len = total_len(bufs);
            let mut watchers = state.watchers.iter();
            if !watchers.all(|watcher| watcher.is_quick(offset, len)) {
                return Ok(false);
            }
            state.announce(disk, offset, len);
        }
        disk.try_write_at(bufs, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.change(offset, len, |disk| disk.write_zeroes(offset, len, unmap))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.change(offset, len, |disk| disk.discard(offset, len))
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        self.shared().image.disk().extent(offset, len)
    }

    fn stamp(&self) -> Result<Option<Stamp>> {
        self.shared().image.disk().stamp()
    }

    fn sparse_extent(&self, offset: u64, len: u64) -> Result<Extent> {
        self.shared().image.disk().sparse_extent(offset, len)
    }

    fn copy_from(&self, source: BorrowedFd<'_>, from: u64, offset: u64, len: u64) -> Result<bool> {
        self.change(offset, len, |disk| {
            disk.copy_from(source, from, offset, len)
        })
    }

    fn resize(&self, size: u64) -> Result<()> {
        let state = self.shared();
        state.check_size(size)?;
        state.image.disk().resize(size)
    }

    fn resize_preallocated(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        let state = self.shared();
        state.check_size(size)?;
        state.image.disk().resize_preallocated(size, preallocation)
    }

    fn follow_size(&self) -> Result<bool> {
        let state = self.shared();
        if !state.watchers.is_empty() {
            let reason = "the size cannot change while the disk is being copied";
            return Err(Error::Option(reason.to_owned()));
        }
        state.image.disk().follow_size()
    }

    fn flush(&self) -> Result<()> {
        self.shared().image.disk().flush()
    }

    fn close(&self) -> Result<()> {
        self.exclusive(|state| {
            for watcher in state.watchers.drain(..) {
                watcher.close(&mut state.image, &mut state.history);
            }
            state.is_closed = true;
            state.image.disk().close()
        })
    }
}

#[cfg(test)]
mod tests;
