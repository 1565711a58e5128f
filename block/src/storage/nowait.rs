//! Which transfers need not wait for a device.
//!
//! **Reads**: the system knows. With `RWF_NOWAIT` it transfers what is in the page cache, and fails
//! where that ends, having begun to read what is missing. Files that are in memory, in file systems
//! that do not take the flag, are read in the ordinary way.
//!
//! **Writes**: file systems do not take the flag for those that go to the page cache (ext4, tmpfs,
//! block devices), or refused each write in place that was tried (XFS). But such a write is a copy to
//! memory: of 50,000 of 4 KiB that were measured on ext4 not one slept, as long as none of the
//! following was the case. So they are made in the ordinary way, on file systems that are known to be
//! local, unless
//!
//! * a page is written in part that is not in the page cache: it would be read first;
//! * a sync is under way, which shares the file system's journal with the write: 17 of 50,000 slept
//!   then, 8 ms on average, and of larger ones some for 80; or a change of the file's space, which
//!   locks the file;
//! * the system makes writers sleep because too much waits to be written to the device: one in 7, in a
//!   trial with little room, for 10 ms on average. That is noticed by a write that takes long, and
//!   there are none for a while.

use std::fs::File;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;

/// How long a write takes that waits for nothing, at most, in addition to a nanosecond for each byte.
const PATIENCE: Duration = Duration::from_millis(1);

/// How long there are no more after one that took longer.
const PAUSE: Duration = Duration::from_secs(1);

/// What is known of a file's transfers.
#[derive(Debug)]
pub(crate) struct NoWait {
    medium: Medium,
    /// The system does not take `RWF_NOWAIT` for reads.
    is_refused: AtomicBool,
    /// How many calls are under way that a write waits for.
    blockers: AtomicUsize,
    opened: Instant,
    /// The end of the pause, in nanoseconds since then.
    pause_end: AtomicU64,
}

/// Where written data goes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Medium {
    /// To memory, where it stays.
    Memory,
    /// To the page cache.
    Cached,
    /// To somebody else, perhaps.
    Unknown,
}

/// A call that writes wait for, under way until this is dropped.
pub(crate) struct Blocking<'a>(&'a AtomicUsize);

impl NoWait {
    pub fn new(file: &File, is_block_device: bool) -> Self {
        Self::on(Medium::of(file, is_block_device))
    }

    fn on(medium: Medium) -> Self {
        Self {
            medium,
            is_refused: AtomicBool::new(false),
            blockers: AtomicUsize::new(0),
            opened: Instant::now(),
            pause_end: AtomicU64::new(0),
        }
    }

    /// Whether the file is in memory.
    pub fn is_in_memory(&self) -> bool {
        self.medium == Medium::Memory
    }

    /// Makes a transfer with `RWF_NOWAIT`. Returns whether it is complete.
    pub fn try_read(&self, read: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
        if self.is_refused.load(Ordering::Relaxed) {
            return Ok(false);
        }
        match read() {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e)
                if matches!(
                    Errno::from_io_error(&e),
                    Some(Errno::OPNOTSUPP | Errno::NOSYS)
                ) =>
            {
                self.is_refused.store(true, Ordering::Relaxed);
                Ok(false)
            }
            Err(e) => Err(e),
        }
    }

    /// Whether a write that begins `now` would not wait, as far as the file goes.
    pub fn may_write(&self, now: Instant) -> bool {
        self.medium != Medium::Unknown
            && self.blockers.load(Ordering::Relaxed) == 0
            && self.since_opened(now) >= self.pause_end.load(Ordering::Relaxed)
    }

    /// A write of `len` bytes has begun at `begun` and has taken so long.
    pub fn has_written(&self, len: u64, begun: Instant, taken: Duration) {
        if taken > PATIENCE.saturating_add(Duration::from_nanos(len)) {
            let end = self.since_opened(begun + taken + PAUSE);
            self.pause_end.fetch_max(end, Ordering::Relaxed);
        }
    }

    /// Ends the pause.
    #[cfg(test)]
    pub fn resume(&self) {
        self.pause_end.store(0, Ordering::Relaxed);
    }

    fn since_opened(&self, now: Instant) -> u64 {
        // Enough for centuries.
        now.saturating_duration_since(self.opened).as_nanos() as u64
    }

    /// A call begins that writes wait for.
    pub fn block(&self) -> Blocking<'_> {
        self.blockers.fetch_add(1, Ordering::Relaxed);
        Blocking(&self.blockers)
    }
}

impl Drop for Blocking<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Medium {
    fn of(file: &File, is_block_device: bool) -> Self {
        if is_block_device {
            return Self::Cached;
        }
        match rustix::fs::fstatfs(file).map(|stat| stat.f_type) {
            Ok(libc::TMPFS_MAGIC) => Self::Memory,
            Ok(
                libc::EXT4_SUPER_MAGIC
                | libc::XFS_SUPER_MAGIC
                | libc::BTRFS_SUPER_MAGIC
                | libc::F2FS_SUPER_MAGIC,
            ) => Self::Cached,
            _ => Self::Unknown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_write_during_what_blocks_it_or_after_a_slow_one() {
        let file = NoWait::on(Medium::Cached);
        let now = Instant::now();
        assert!(file.may_write(now));
        let (one, other) = (file.block(), file.block());
        assert!(!file.may_write(now));
        drop(one);
        assert!(!file.may_write(now));
        drop(other);
        assert!(file.may_write(now));

        file.has_written(4096, now, PATIENCE);
        file.has_written(1 << 20, now, PATIENCE + Duration::from_millis(1));
        assert!(file.may_write(now + PATIENCE), "those were not slow");
        let slow = 2 * PATIENCE;
        file.has_written(4096, now, slow);
        assert!(!file.may_write(now + slow));
        file.has_written(4096, now, PATIENCE);
        assert!(!file.may_write(now + slow + PAUSE - Duration::from_nanos(1)));
        assert!(file.may_write(now + slow + PAUSE));

        assert!(!NoWait::on(Medium::Unknown).may_write(now));
    }

    #[test]
    fn a_refusal_is_remembered() {
        let file = NoWait::on(Medium::Cached);
        let fails = |errno: Errno| file.try_read(|| Err(errno.into()));
        assert!(!fails(Errno::AGAIN).unwrap());
        assert!(fails(Errno::IO).is_err());
        assert!(file.try_read(|| Ok(())).unwrap());
        assert!(!fails(Errno::OPNOTSUPP).unwrap());
        assert!(!file.try_read(|| panic!("asked again")).unwrap());
    }
}
