//! Arithmetic of clusters and tables, in one place.

/// Size of an entry of an L1, L2 or refcount table in bytes.
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

    /// Entries in an L2 table.
    pub fn l2_entries(self) -> u64 {
        1 << self.l2_bits()
    }

    fn l2_bits(self) -> u32 {
        self.cluster_bits - ENTRY_BITS
    }

    fn slice_size_bits(self) -> u32 {
        self.cluster_bits.min(MAX_SLICE_BITS)
    }

    fn slice_entry_bits(self) -> u32 {
        self.slice_size_bits() - ENTRY_BITS
    }

    fn table_slice_bits(self) -> u32 {
        self.cluster_bits - self.slice_size_bits()
    }

    /// Bytes in a slice of a table.
    pub fn slice_size(self) -> u64 {
        1 << self.slice_size_bits()
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

    /// Index of a guest cluster's entry within its slice.
    pub fn slice_index(self, cluster: u64) -> usize {
        (cluster & (self.slice_entries() - 1)) as usize
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
