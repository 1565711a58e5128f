//! Entries of the L1 and L2 tables (qcow2 specification, "Cluster mapping").

/// Set in an L1 or L2 entry whose target has a refcount of exactly one and may be written in place.
pub(crate) const COPIED: u64 = 1 << 63;
/// Set in an L2 entry of a compressed cluster.
const COMPRESSED: u64 = 1 << 62;
/// Set in an L2 entry whose cluster reads as zero whatever its offset.
const ZERO: u64 = 1;
/// Bits 9 to 55: an offset in the image or data file.
const OFFSET_MASK: u64 = 0x00ff_ffff_ffff_fe00;

/// One entry of the L1 table: where an L2 table is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct L1Entry(pub u64);

impl L1Entry {
    /// An L2 table at `offset` with a refcount of one.
    pub fn new(offset: u64) -> Self {
        Self(offset | COPIED)
    }

    /// Offset of the L2 table in the image file in bytes; 0 if there is none.
    pub fn offset(self) -> u64 {
        self.0 & OFFSET_MASK
    }

    /// Whether the table may be updated in place.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Bits that must be zero.
    pub fn reserved(self) -> u64 {
        self.0 & !(OFFSET_MASK | COPIED)
    }
}

/// One standard entry of an L2 table: where a guest cluster is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct L2Entry(pub u64);

/// What an L2 entry says about its cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cluster {
    /// Nothing is stored; reads as the backing file, or zero without one.
    Unallocated,
    /// Data at this offset of the image or data file.
    Normal(u64),
    /// Reads as zero and occupies no space.
    ZeroPlain,
    /// Reads as zero; space is reserved at this offset.
    ZeroAlloc(u64),
    /// Compressed data.
    Compressed,
}

impl L2Entry {
    /// An entry of a cluster that nothing is known of.
    pub const UNALLOCATED: Self = Self(0);
    /// An entry of a cluster that reads as zero and has no place.
    pub const ZERO_PLAIN: Self = Self(ZERO);

    /// An entry for data at `offset`, whose cluster belongs to this entry alone.
    pub fn normal(offset: u64) -> Self {
        Self(offset | COPIED)
    }

    /// This entry, reading as zero from now on; the cluster stays reserved.
    pub fn zeroed(self) -> Self {
        Self(self.0 | ZERO)
    }

    /// Whether the cluster may be written in place.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Bits that must be zero in an entry that is not compressed.
    pub fn reserved(self) -> u64 {
        self.0 & !(OFFSET_MASK | COPIED | COMPRESSED | ZERO)
    }

    /// What the entry says. `external`: guest data lies in an external data file, where offset 0
    /// belongs to guest cluster 0 and the COPIED flag tells it from an unallocated entry.
    pub fn cluster(self, external: bool) -> Cluster {
        let offset = self.0 & OFFSET_MASK;
        if self.0 & COMPRESSED != 0 {
            Cluster::Compressed
        } else if self.0 & ZERO != 0 {
            if offset == 0 {
                Cluster::ZeroPlain
            } else {
                Cluster::ZeroAlloc(offset)
            }
        } else if offset == 0 && !(external && self.is_copied()) {
            Cluster::Unallocated
        } else {
            Cluster::Normal(offset)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offset_zero_depends_on_the_data_file() {
        assert_eq!(L2Entry(0).cluster(false), Cluster::Unallocated);
        assert_eq!(L2Entry(0).cluster(true), Cluster::Unallocated);
        assert_eq!(L2Entry(COPIED).cluster(false), Cluster::Unallocated);
        assert_eq!(L2Entry(COPIED).cluster(true), Cluster::Normal(0));
        // As in QEMU, the zero flag is looked at first.
        assert_eq!(L2Entry(COPIED | ZERO).cluster(true), Cluster::ZeroPlain);
    }

    #[test]
    fn kinds() {
        let normal = L2Entry::normal(0x5_0000);
        assert_eq!(normal.cluster(false), Cluster::Normal(0x5_0000));
        assert!(normal.is_copied());
        assert_eq!(normal.zeroed().cluster(false), Cluster::ZeroAlloc(0x5_0000));
        assert_eq!(L2Entry(ZERO).cluster(false), Cluster::ZeroPlain);
        assert_eq!(
            L2Entry(COMPRESSED | 0x5_0000).cluster(false),
            Cluster::Compressed
        );
        assert_eq!(L2Entry(1 << 56 | 2).reserved(), 1 << 56 | 2);
        assert_eq!(L1Entry::new(0x3_0000).reserved(), 0);
    }
}
