//! Arithmetic of clusters and tables, in one place.

use std::ops::Range;

use super::subclusters::SUBCLUSTER_BITS;

/// Size of an entry of an L1 or refcount table, and of a word of an L2 entry, in bytes.
pub(crate) const ENTRY_SIZE: u64 = 1 << ENTRY_BITS;
const ENTRY_BITS: u32 = 3;

/// Metadata is cached and written back in slices of at most 4 KiB, however large the clusters
/// are: a small write to a 2 MiB table costs one slice.
const MAX_SLICE_BITS: u32 = 12;

/// Sizes that follow from the cluster size.
///
/// All of them are powers of two, and requests go through here: shifts, no
/// divisions.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Geometry {
    /// Binary logarithm of the cluster size, 9 to 21.
    pub cluster_bits: u32,
    /// Whether L2 entries have two words, the second one for subclusters.
    pub extended_l2: bool,
}

impl Geometry {
    /// Bytes in a cluster.
    pub fn cluster_size(self) -> u64 {
        1 << self.cluster_bits
    }

    /// `offset` without its whole clusters.
    pub fn in_cluster(self, offset: u64) -> u64 {
        offset & (self.cluster_size() - 1)
    }

    /// Number of the cluster that holds `offset`.
    pub fn cluster(self, offset: u64) -> u64 {
        offset >> self.cluster_bits
    }

    /// Clusters of a disk of `size` bytes, the last one possibly in part.
    pub fn clusters(self, size: u64) -> u64 {
        size.div_ceil(self.cluster_size())
    }

    /// Words in an L2 table.
    pub fn l2_words(self) -> u64 {
        1 << (self.cluster_bits - ENTRY_BITS)
    }

    /// Entries in an L2 table.
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    fn l2_bits(self) -> u32 {
        self.cluster_bits - self.l2_entry_bits()
    }

    fn l2_entry_bits(self) -> u32 {
        ENTRY_BITS + u32::from(self.extended_l2)
    }

    /// Words of an L2 entry: one, or two if it is extended.
    pub fn l2_entry_words(self) -> usize {
        1 << (self.l2_entry_bits() - ENTRY_BITS)
    }

    /// Bytes in the smallest part of a cluster that can have data of its own: a subcluster, or the
    /// cluster where there are none.
    pub fn grain_size(self) -> u64 {
        1 << self.grain_bits()
    }

    fn grain_bits(self) -> u32 {
        if self.extended_l2 {
            self.cluster_bits - SUBCLUSTER_BITS
        } else {
            self.cluster_bits
        }
    }

    /// `offset` without its whole grains.
    pub fn in_grain(self, offset: u64) -> u64 {
        offset & (self.grain_size() - 1)
    }

    /// Index within its cluster of the subcluster that holds `offset`.
    pub fn subcluster(self, offset: u64) -> u32 {
        (self.in_cluster(offset) >> self.grain_bits()) as u32
    }

    /// Indices of the subclusters of `cluster` that the guest bytes of `range` lie in, some of
    /// which are in that cluster.
    pub fn subclusters(self, cluster: u64, range: &Range<u64>) -> Range<u32> {
        let start = range.start.max(cluster << self.cluster_bits);
        let last = (range.end - 1).min(((cluster + 1) << self.cluster_bits) - 1);
        self.subcluster(start)..self.subcluster(last) + 1
    }

    pub fn slice_size_bits(self) -> u32 {
        self.cluster_bits.min(MAX_SLICE_BITS)
    }

    fn slice_entry_bits(self) -> u32 {
        self.slice_size_bits() - self.l2_entry_bits()
    }

    fn table_slice_bits(self) -> u32 {
        self.cluster_bits - self.slice_size_bits()
    }

    /// Bytes in a slice of a table.
    pub fn slice_size(self) -> u64 {
        1 << self.slice_size_bits()
    }

    /// Words in a slice.
    pub fn slice_words(self) -> usize {
        1 << (self.slice_size_bits() - ENTRY_BITS)
    }

    /// L2 entries in a slice.
    pub fn slice_entries(self) -> u64 {
        1 << self.slice_entry_bits()
    }

    /// Slices in an L2 table.
    pub fn slices_per_table(self) -> u64 {
        1 << self.table_slice_bits()
    }

    /// Index in the L1 table of the entry for a guest cluster.
    pub fn l1_index(self, cluster: u64) -> usize {
        (cluster >> self.l2_bits()) as usize
    }

    /// Number of the slice, counted over all L2 tables, that maps a guest cluster.
    pub fn slice(self, cluster: u64) -> u64 {
        cluster >> self.slice_entry_bits()
    }

    /// Guest offset at which the slice that maps `offset` ends.
    pub fn slice_end(self, offset: u64) -> u64 {
        (self.slice(self.cluster(offset)) + 1) << (self.slice_entry_bits() + self.cluster_bits)
    }

    /// Index of the first word of a guest cluster's entry within its slice.
    pub fn slice_index(self, cluster: u64) -> usize {
        (cluster & (self.slice_entries() - 1)) as usize * self.l2_entry_words()
    }

    /// Index in the L1 table of the entry for a slice.
    pub fn slice_l1_index(self, slice: u64) -> usize {
        (slice >> self.table_slice_bits()) as usize
    }

    /// Offset of a slice within its L2 table in bytes.
    pub fn slice_offset(self, slice: u64) -> u64 {
        (slice & (self.slices_per_table() - 1)) << self.slice_size_bits()
    }

    /// L1 entries that a disk of `size` bytes needs.
    pub fn l1_entries(self, size: u64) -> u64 {
        self.clusters(size).div_ceil(self.l2_entries())
    }
}
