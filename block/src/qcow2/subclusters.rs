//! Subclusters (qcow2 specification, "Extended L2 Entries").

use std::ops::Range;

/// Subclusters in a cluster, where L2 entries are extended.
pub(crate) const SUBCLUSTERS: u32 = 1 << SUBCLUSTER_BITS;
/// Binary logarithm of that.
pub(crate) const SUBCLUSTER_BITS: u32 = 5;

/// The second word of an extended L2 entry: a bit for each subcluster that has data in the lower
/// half, and one for each that reads as zero in the upper half.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Subclusters(pub u64);

/// What a subcluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Subcluster {
    /// Nothing is known of it; reads as the backing file, or zero without one.
    Unallocated,
    /// It has data in the place of its cluster.
    Allocated,
    /// Reads as zero.
    Zero,
}

impl Subclusters {
    /// Each has data.
    pub const ALL_ALLOCATED: Self = Self(ALL);
    /// Each reads as zero.
    pub const ALL_ZERO: Self = Self(ALL << SUBCLUSTERS);

    /// Whether a cluster with or without a place can have these.
    pub fn is_valid(self, has_place: bool) -> bool {
        let allocated = self.0 & ALL;
        allocated & self.0 >> SUBCLUSTERS == 0 && (has_place || allocated == 0)
    }

    /// What subcluster `index` is, and how many from it on are the same.
    pub fn run(self, index: u32) -> (Subcluster, u32) {
        let (allocated, zero) = (
            self.0 as u32 >> index,
            (self.0 >> SUBCLUSTERS) as u32 >> index,
        );
        let (state, same) = match (allocated & 1 != 0, zero & 1 != 0) {
            (true, _) => (Subcluster::Allocated, allocated.trailing_ones()),
            (false, true) => (Subcluster::Zero, zero.trailing_ones()),
            (false, false) => (Subcluster::Unallocated, (allocated | zero).trailing_zeros()),
        };
        (state, same.min(SUBCLUSTERS - index))
    }

    /// These, with data in those of `range`.
    pub fn allocated(self, range: Range<u32>) -> Self {
        let mask = mask(range);
        Self(self.0 & !(mask << SUBCLUSTERS) | mask)
    }

    /// These, with those of `range` reading as zero.
    pub fn zeroed(self, range: Range<u32>) -> Self {
        let mask = mask(range);
        Self(self.0 & !mask | mask << SUBCLUSTERS)
    }
}

/// The bits of all subclusters.
const ALL: u64 = (1 << SUBCLUSTERS) - 1;

/// The bits of the subclusters in `range`.
fn mask(range: Range<u32>) -> u64 {
    (1 << range.end) - (1 << range.start)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_and_runs() {
        let some = Subclusters::default().allocated(3..5).zeroed(31..32);
        assert_eq!(some, Subclusters(1 << 63 | 0b11 << 3));
        let runs = [0, 3, 4, 5, 31].map(|index| some.run(index));
        let (unallocated, allocated) = (Subcluster::Unallocated, Subcluster::Allocated);
        assert_eq!(
            runs,
            [
                (unallocated, 3),
                (allocated, 2),
                (allocated, 1),
                (unallocated, 26),
                (Subcluster::Zero, 1)
            ]
        );
        assert_eq!(Subclusters::default().run(0), (unallocated, 32));
        assert_eq!(Subclusters::ALL_ZERO.run(7), (Subcluster::Zero, 25));
        assert_eq!(Subclusters::ALL_ALLOCATED.run(31), (allocated, 1));
        assert_eq!(some.zeroed(0..32), Subclusters::ALL_ZERO);
        assert_eq!(some.allocated(0..32), Subclusters::ALL_ALLOCATED);
    }

    #[test]
    fn what_contradicts_itself_is_not_valid() {
        assert!(Subclusters(0).is_valid(false));
        assert!(Subclusters::ALL_ZERO.is_valid(false));
        assert!(!Subclusters(1).is_valid(false));
        assert!(Subclusters(1).is_valid(true));
        assert!(!Subclusters(1 | 1 << 32).is_valid(true));
        assert!(Subclusters(1 | 1 << 33).is_valid(true));
    }
}
