//! Copying what is about to change to the scratch file.

use std::ops::Range;

use vm_memory::VolatileSlice;

use super::bitmap::{History, Taken};
use super::scratch::Scratch;
use crate::granules::Granules;
use crate::live::{LiveImage, Watcher};
use crate::ranges::RangeLocks;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};
use crate::{Disk, Error, ExtentKind, Result, sparse_extent_in_chain};

/// Most bytes that are copied at once, unless a granule has more.
const PIECE: u64 = 1 << 20;

/// What keeps a disk as it was at an instant, for one backup.
///
/// A granule in `protected` is on the disk as it was. Whoever is about to change it copies it to the
/// scratch file, or finds that it is zero, and takes it out of `protected`, with its range held; who
/// reads it for the backup holds the range as well. A granule that is not in the set is in the
/// scratch file or was zero, or the backup does not want it (any more).
pub(super) struct Protection {
    /// Of the disk at the instant, in bytes.
    pub size: u64,
    pub granule_bits: u32,
    pub protected: Granules,
    pub ranges: RangeLocks,
    pub scratch: Scratch,
    /// Nothing is protected any more.
    is_over: AtomicBool,
    /// Why, if the backup has not been ended by its owner.
    failure: Mutex<Option<String>>,
    /// What goes back to the bitmap unless the backup succeeds.
    taken: Mutex<Option<Taken>>,
}

impl Protection {
    /// Of nothing yet.
    pub fn new(size: u64, granule_bits: u32, scratch: Scratch, taken: Option<Taken>) -> Self {
        Self {
            size,
            granule_bits,
            protected: Granules::new(size.div_ceil(1 << granule_bits)),
            ranges: RangeLocks::default(),
            scratch,
            is_over: AtomicBool::new(false),
            failure: Mutex::default(),
            taken: Mutex::new(taken),
        }
    }

    /// Ends the protection for `reason`. The first one counts.
    pub fn fail(&self, reason: String) {
        lock(&self.failure).get_or_insert(reason);
        self.is_over.store(true, Ordering::Release);
        self.scratch.give_up();
    }

    /// What has been taken from a bitmap, if nobody has it yet.
    pub fn take_back(&self) -> Option<Taken> {
        lock(&self.taken).take()
    }

    /// Why the backup has failed, if it has.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    /// Fails once the backup has. What was read before is right if this succeeds: who does not protect
    /// a change sees the end before it.
    pub fn check(&self) -> Result<()> {
        if !self.is_over.load(Ordering::Acquire) {
            return Ok(());
        }
        let reason = self.failure();
        let reason = reason.unwrap_or_else(|| "the backup has ended".to_owned());
        Err(Error::Backup(reason))
    }

    /// The granules that `len` bytes at `offset` touch, as far as the disk was there at the instant.
    pub fn granules(&self, offset: u64, len: u64) -> Range<u64> {
        let end = offset.saturating_add(len).min(self.size);
        offset >> self.granule_bits..end.div_ceil(1 << self.granule_bits)
    }

    /// Offset and length in bytes of some granules.
    pub fn bytes(&self, granules: &Range<u64>) -> (u64, u64) {
        let start = granules.start << self.granule_bits;
        let end = (granules.end << self.granule_bits).min(self.size);
        (start, end - start)
    }

    /// How many granules, at least one, have `bytes`.
    pub fn granules_in(&self, bytes: u64) -> u64 {
        (bytes >> self.granule_bits).max(1)
    }

    /// Keeps what of `granules` is still protected.
    fn keep(&self, disk: &dyn Disk, granules: Range<u64>) -> Result<()> {
        let mut at = granules.start;
        while let Some(run) = self.protected.run(at..granules.end) {
            at = run.end.min(run.start + self.granules_in(PIECE));
            let run = run.start..at;
            let _held = self.ranges.lock(run.clone());
            if self.is_over.load(Ordering::Acquire) {
                return Ok(());
            }
            self.keep_held(disk, run)?;
        }
        Ok(())
    }

    /// As [`keep`](Self::keep), with the range held.
    fn keep_held(&self, disk: &dyn Disk, granules: Range<u64>) -> Result<()> {
        // Others may have kept a part while this one waited for the range.
        while let Some(run) = self.protected.run(granules.clone()) {
            let (offset, len) = self.bytes(&run);
            let (is_zero, found) = zero_or_data(disk, offset, len)?;
            let granules = run.start..match (found == len, is_zero) {
                (true, _) => run.end,
                (false, true) => run.start + self.granules_in(found),
                (false, false) => run.start + found.div_ceil(1 << self.granule_bits),
            };
            let (_, len) = self.bytes(&granules);
            // A granule that is zero only at its beginning is data.
            if !is_zero || found < len {
                let mut bytes = vec![0; len as usize];
                disk.read_at(&[VolatileSlice::from(&mut bytes[..])], offset)?;
                self.scratch.keep(granules.start, &bytes)?;
            }
            self.protected.remove(granules);
        }
        Ok(())
    }
}

/// Whether the bytes of `disk` from `offset` on are known to be zero, and how many of `len` are so or
/// not.
pub(super) fn zero_or_data(disk: &dyn Disk, offset: u64, len: u64) -> Result<(bool, u64)> {
    let (_, extent) = sparse_extent_in_chain(disk, offset, len)?;
    let is_zero = matches!(extent.kind, ExtentKind::Zero | ExtentKind::Unallocated);
    Ok((is_zero, extent.len))
}

impl Watcher for Protection {
    fn before_change(&self, disk: &dyn Disk, offset: u64, len: u64) {
        if self.is_quick(offset, len) {
            return;
        }
        if let Err(error) = self.keep(disk, self.granules(offset, len)) {
            self.fail(error.to_string());
        }
    }

    fn is_quick(&self, offset: u64, len: u64) -> bool {
        !self.protected.any(self.granules(offset, len)) || self.is_over.load(Ordering::Acquire)
    }

    fn check_size(&self, _disk: &dyn Disk, size: u64) -> Result<()> {
        if size >= self.size || self.is_over.load(Ordering::Acquire) {
            return Ok(());
        }
        let reason = format!(
            "a backup of the disk is under way, which needs all {} bytes that it had at its beginning",
            self.size
        );
        Err(Error::Option(reason))
    }

    fn close(&self, image: &mut LiveImage, history: &mut History) {
        self.fail("the disk has been closed".to_owned());
        if let Some(taken) = self.take_back() {
            // An image that cannot be written marks its bitmaps as useless.
            let _ = taken.give_back(image, history);
        }
    }
}
