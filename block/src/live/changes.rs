//! What of a disk has changed since somebody looked.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread::sleep;
use std::time::Duration;

use super::Watcher;
use crate::granules::Granules;
use crate::{Disk, Error, Result};

/// The smallest unit that is told apart, in bytes; a multiple of it is a multiple of any cluster, once
/// it is no less than that.
const MIN_GRANULE: u64 = 64 << 10;
/// Most units that are told apart: with a bit each, they take 128 KiB, whatever the size of the disk.
const MAX_GRANULES: u64 = 1 << 20;

/// How long changes are held up at first, and at most, in microseconds.
const MIN_BRAKE: u64 = 100;
const MAX_BRAKE: u64 = 100_000;

/// Takes down which parts of a disk change. The disk keeps its size meanwhile.
pub(super) struct Changes {
    size: u64,
    granule_bits: u32,
    /// The lock of the disk orders what is done to them.
    granules: Granules,
    /// Microseconds that a change waits which adds to what is to do.
    brake: AtomicU64,
}

impl Changes {
    /// Those of a disk of `size` bytes in granules of at least `cluster_size`.
    pub fn new(size: u64, cluster_size: u64) -> Self {
        let granule = MIN_GRANULE.max(cluster_size).max(size / MAX_GRANULES);
        let granule_bits = granule.next_power_of_two().trailing_zeros();
        Self {
            size,
            granule_bits,
            granules: Granules::new(size.div_ceil(1 << granule_bits)),
            brake: AtomicU64::new(0),
        }
    }

    /// How many bytes of the disk have changed, in whole granules.
    pub fn bytes(&self) -> u64 {
        self.granules.count(0..u64::MAX) << self.granule_bits
    }

    /// One of the same disk, of which nothing is known to have changed.
    pub fn empty(&self) -> Self {
        Self::new(self.size, 1 << self.granule_bits)
    }

    /// What has changed, and is forgotten here. No request is under way: what changed has changed.
    pub fn take(&self) -> Self {
        Self {
            size: self.size,
            granule_bits: self.granule_bits,
            granules: self.granules.take(),
            brake: AtomicU64::new(0),
        }
    }

    /// Has changes that add to what is to do wait, or wait twice as long, so that there is less of them.
    pub fn slow_down(&self) {
        let brake = self.brake.load(Ordering::Relaxed);
        let brake = (2 * brake).clamp(MIN_BRAKE, MAX_BRAKE);
        self.brake.store(brake, Ordering::Relaxed);
    }

    /// Has changes wait no more.
    pub fn speed_up(&self) {
        self.brake.store(0, Ordering::Relaxed);
    }

    /// The first range within `range` that has changed, if `changed`, or has not.
    pub fn next(&self, range: Range<u64>, changed: bool) -> Option<Range<u64>> {
        let end = range.end.min(self.size);
        if range.start >= end {
            // The disk may end within a granule, of which nothing is left then.
            return None;
        }
        let granules = self.granules_of(range.start, end);
        let found = match changed {
            true => self.granules.run(granules)?,
            false => self.granules.gap(granules)?,
        };
        let bytes = found.start << self.granule_bits..found.end << self.granule_bits;
        Some(bytes.start.max(range.start)..bytes.end.min(end))
    }

    fn granules_of(&self, start: u64, end: u64) -> Range<u64> {
        start >> self.granule_bits..end.div_ceil(1 << self.granule_bits)
    }
}

impl Watcher for Changes {
    fn before_change(&self, _: &dyn Disk, offset: u64, len: u64) {
        let granules = self.granules_of(offset, offset + len);
        let brake = self.brake.load(Ordering::Relaxed);
        let adds = brake > 0 && self.granules.gap(granules.clone()).is_some();
        self.granules.insert(granules);
        if adds {
            sleep(Duration::from_micros(brake));
        }
    }

    fn is_quick(&self, _: u64, _: u64) -> bool {
        self.brake.load(Ordering::Relaxed) == 0
    }

    fn check_size(&self, _: &dyn Disk, _: u64) -> Result<()> {
        let reason = "the size cannot change during an operation on the images of the disk";
        Err(Error::Option(reason.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Raw;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn tells_what_has_changed(
            size in 1u64..300,
            less in 0u64..128,
            changes in proptest::collection::vec((0u64..300, 1u64..100), 0..8),
        ) {
            const GRANULE: u64 = 64 << 10;
            let file = tempfile::tempfile().unwrap();
            let storage = Box::new(crate::FileStorage::new(file).unwrap());
            let disk = Raw::with_storage(std::path::Path::new("raw"), storage, false).unwrap();
            let record = Changes::new(size * GRANULE - less * 512, 512);
            let mut model = vec![false; size as usize];
            for (start, len) in changes {
                let (start, end) = (start.min(size - 1), (start + len).min(size));
                record.before_change(&disk, start * GRANULE + 1, (end - start).max(1) * GRANULE - 1);
                model[start as usize..end.max(start + 1) as usize].fill(true);
            }
            let count = model.iter().filter(|changed| **changed).count() as u64;
            prop_assert_eq!(record.bytes(), count * GRANULE);
            for changed in [false, true] {
                let mut found = vec![!changed; size as usize];
                let mut at = 0;
                while let Some(range) = record.next(at..u64::MAX, changed) {
                    prop_assert!(range.start >= at && range.start < range.end);
                    found[(range.start / GRANULE) as usize..range.end.div_ceil(GRANULE) as usize].fill(changed);
                    at = range.end;
                }
                prop_assert_eq!(&found, &model);
            }
            let taken = record.take();
            prop_assert_eq!((record.bytes(), taken.bytes()), (0, count * GRANULE));
        }
    }

    #[test]
    fn holds_up_more_and_more_until_it_is_over() {
        let record = Changes::new(1 << 20, 512);
        assert!(record.is_quick(0, 512));
        let mut brakes = vec![];
        for _ in 0..12 {
            record.slow_down();
            assert!(!record.is_quick(0, 512));
            brakes.push(record.brake.load(Ordering::Relaxed));
        }
        assert_eq!((brakes[0], brakes[11]), (MIN_BRAKE, MAX_BRAKE));
        assert!(brakes.is_sorted());
        record.speed_up();
        assert!(record.is_quick(0, 512));
    }

    #[test]
    fn takes_little_memory_for_a_large_disk() {
        for size in [0, 512, 64 << 30, 16 << 40, 1 << 60] {
            let record = Changes::new(size, 2 << 20);
            assert!(size >> record.granule_bits <= 2 * MAX_GRANULES);
            assert!(record.granule_bits >= 21);
        }
    }
}
