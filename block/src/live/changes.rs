//! What of a disk has changed since somebody looked.

use std::ops::Range;

use super::Watcher;
use crate::granules::Granules;
use crate::{Disk, Error, Result};

/// The smallest unit that is told apart, in bytes; a multiple of it is a multiple of any cluster, once
/// it is no less than that.
const MIN_GRANULE: u64 = 64 << 10;
/// Most units that are told apart: with a bit each, they take 128 KiB, whatever the size of the disk.
const MAX_GRANULES: u64 = 1 << 20;

/// Takes down which parts of a disk change. The disk keeps its size meanwhile.
pub(super) struct Changes {
    size: u64,
    granule_bits: u32,
    /// The lock of the disk orders what is done to them.
    granules: Granules,
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
        }
    }

    /// How many bytes of the disk have changed, in whole granules.
    pub fn bytes(&self) -> u64 {
        self.granules.count(0..u64::MAX) << self.granule_bits
    }

    /// What has changed, and is forgotten here. No request is under way: what changed has changed.
    pub fn take(&self) -> Self {
        Self {
            granules: self.granules.take(),
            ..*self
        }
    }

    /// The first range within `range` that has changed, if `changed`, or has not.
    pub fn next(&self, range: Range<u64>, changed: bool) -> Option<Range<u64>> {
        let end = range.end.min(self.size);
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
        self.granules.insert(self.granules_of(offset, offset + len));
    }

    fn is_quick(&self, _: u64, _: u64) -> bool {
        true
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
            changes in proptest::collection::vec((0u64..300, 1u64..100), 0..8),
        ) {
            const GRANULE: u64 = 64 << 10;
            let file = tempfile::tempfile().unwrap();
            let storage = Box::new(crate::FileStorage::new(file).unwrap());
            let disk = Raw::with_storage(std::path::Path::new("raw"), storage, false).unwrap();
            let record = Changes::new(size * GRANULE, 512);
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
                    found[(range.start / GRANULE) as usize..(range.end / GRANULE) as usize].fill(changed);
                    at = range.end;
                }
                prop_assert_eq!(&found, &model);
            }
            let taken = record.take();
            prop_assert_eq!((record.bytes(), taken.bytes()), (0, count * GRANULE));
        }
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
