//! What a bitmap tells at some moment.

use std::ops::Range;
use std::sync::Arc;

use super::bits::Bits;

/// Which parts of a disk a bitmap has as dirty, at the moment when this was taken from it.
#[derive(Clone)]
pub struct DirtyBits {
    pub(super) bits: Arc<Bits>,
    pub(super) granularity_bits: u8,
    /// Of the disk at that moment.
    pub(super) size: u64,
}

impl DirtyBits {
    /// Bytes that a bit stands for.
    pub fn granularity(&self) -> u64 {
        1 << self.granularity_bits
    }

    /// Size of the disk in bytes when this was taken. Nothing behind it is dirty.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// The ranges of bytes that are dirty, from `offset` on, in order, with gaps between them. The first
    /// one may begin at `offset` in the middle of what a bit stands for, and the last one ends with the disk.
    pub fn ranges(&self, offset: u64) -> impl Iterator<Item = Range<u64>> + '_ {
        let shift = self.granularity_bits;
        let mut runs = self.bits.runs(offset >> shift).peekable();
        std::iter::from_fn(move || {
            let mut run = runs.next()?;
            while let Some(next) = runs.next_if(|next| next.start == run.end) {
                run.end = next.end;
            }
            let range = offset.max(run.start << shift)..self.size.min(run.end << shift);
            (range.start < range.end).then_some(range)
        })
    }

    /// Whether any of the `len` bytes at `offset` is dirty.
    pub fn is_dirty(&self, offset: u64, len: u64) -> bool {
        let next = self.ranges(offset).next();
        next.is_some_and(|range| range.start - offset < len)
    }

    /// How many bytes are dirty.
    pub fn count(&self) -> u64 {
        self.ranges(0).map(|range| range.end - range.start).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn dirty(bits: &[(u64, u64)], size: u64) -> DirtyBits {
        let dirty = DirtyBits {
            bits: Arc::default(),
            granularity_bits: 12,
            size,
        };
        for (first, last) in bits {
            dirty.bits.set_range(*first, *last);
        }
        dirty
    }

    #[test]
    fn ranges_are_joined_and_cut() {
        let bits = dirty(
            &[(60, 70), (72, 72), (1 << 30, (1 << 30) + 9)],
            (1 << 42) + 5000,
        );
        let ranges = |from| Vec::from_iter(bits.ranges(from).map(|r| (r.start, r.end)));
        let last = (1 << 42, (1 << 42) + 5000);
        let all = [(60 << 12, 71 << 12), (72 << 12, 73 << 12), last];
        assert_eq!(ranges(0), all);
        assert_eq!(ranges(60 << 12), all);
        assert_eq!(ranges((71 << 12) - 1)[0], ((71 << 12) - 1, 71 << 12));
        assert_eq!(ranges(71 << 12)[0], all[1]);
        assert_eq!(ranges(73 << 12), [last]);
        assert_eq!(ranges((1 << 42) + 5000), []);
        assert_eq!(ranges(u64::MAX), []);
        assert_eq!(bits.count(), (12 << 12) + 5000);
        assert_eq!(dirty(&[(0, 3)], 0).count(), 0);
    }

    #[test]
    fn a_range_is_dirty_in_part() {
        let bits = dirty(&[(1, 1)], 1 << 20);
        assert!(!bits.is_dirty(0, 4096));
        assert!(bits.is_dirty(0, 4097));
        assert!(bits.is_dirty(8191, 1));
        assert!(!bits.is_dirty(8192, u64::MAX));
        assert!(!bits.is_dirty(5000, 0));
        assert_eq!((bits.granularity(), bits.size()), (4096, 1 << 20));
    }
}
