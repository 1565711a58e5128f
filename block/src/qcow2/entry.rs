//! Entries of the L1 and L2 tables (qcow2 specification, "Cluster mapping").

use super::DataFileLayout;
use super::geometry::Geometry;
use super::subclusters::Subclusters;
use crate::sync::atomic::{AtomicU64, Ordering};

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

    /// Whether there is a table that may be.
    pub fn owns_table(self) -> bool {
        self.offset() != 0 && self.is_copied()
    }

    /// Bits that must be zero.
    pub fn reserved(self) -> u64 {
        self.0 & !(OFFSET_MASK | COPIED)
    }
}

/// An entry of an L2 table, or the first word of an extended one: where a guest cluster is.
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
    /// The first word of an extended entry: there, the states of subclusters have taken the place of
    /// the zero flag.
    fn extended(word: u64) -> Self {
        if word & COMPRESSED != 0 {
            Self(word)
        } else {
            Self(word & !ZERO)
        }
    }

    /// An entry for data at `offset`, whose cluster belongs to this entry alone.
    pub fn normal(offset: u64) -> Self {
        Self(offset | COPIED)
    }

    /// Whether the cluster may be written in place.
    pub fn is_copied(self) -> bool {
        self.0 & COPIED != 0
    }

    /// Whether its cluster is compressed.
    pub fn is_compressed(self) -> bool {
        self.0 & COMPRESSED != 0
    }

    /// Offset of a compressed cluster in bytes, and its length up to the end of its last sector.
    pub fn compressed(self, cluster_bits: u32) -> (u64, u64) {
        let sector_bits = cluster_bits - 8;
        let offset_bits = 62 - sector_bits;
        let offset = self.0 & ((1 << offset_bits) - 1);
        let more_sectors = self.0 >> offset_bits & ((1 << sector_bits) - 1);
        (offset, (more_sectors + 1) * 512 - offset % 512)
    }

    /// An entry for compressed data of `len` bytes, at least one, at `offset`; `None` if one of them
    /// is too large for its field.
    pub fn new_compressed(offset: u64, len: u64, cluster_bits: u32) -> Option<Self> {
        let sector_bits = cluster_bits - 8;
        let offset_bits = 62 - sector_bits;
        let more_sectors = (offset + len - 1) / 512 - offset / 512;
        let fits = offset >> offset_bits == 0 && more_sectors >> sector_bits == 0;
        fits.then_some(Self(COMPRESSED | more_sectors << offset_bits | offset))
    }

    /// Bits that must be zero in an entry that is not compressed.
    pub fn reserved(self) -> u64 {
        self.0 & !(OFFSET_MASK | COPIED | COMPRESSED | ZERO)
    }

    /// What the entry says, in an image with an external data file of this layout, or without one.
    ///
    /// Offset 0 of a data file belongs to a guest cluster like any other, and the COPIED flag tells
    /// an entry that leads there from one that leads nowhere; in the standard layout only where the
    /// zero flag is not set.
    pub fn cluster(self, layout: Option<DataFileLayout>) -> Cluster {
        let offset = self.0 & OFFSET_MASK;
        let has_place = offset != 0 || layout.is_some() && self.is_copied();
        if self.0 & COMPRESSED != 0 {
            Cluster::Compressed
        } else if self.0 & ZERO != 0 {
            if has_place && (offset != 0 || layout == Some(DataFileLayout::Packed)) {
                Cluster::ZeroAlloc(offset)
            } else {
                Cluster::ZeroPlain
            }
        } else if has_place {
            Cluster::Normal(offset)
        } else {
            Cluster::Unallocated
        }
    }
}

/// An L2 entry of either size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Entry {
    pub word: L2Entry,
    /// Of no meaning in a standard entry.
    pub subclusters: Subclusters,
}

impl Entry {
    /// That of guest cluster `cluster` among the `words` of its slice.
    pub fn load(words: &[AtomicU64], geometry: Geometry, cluster: u64) -> Self {
        let index = geometry.slice_index(cluster);
        let load = |index: usize| words[index].load(Ordering::Acquire);
        if !geometry.extended_l2 {
            return Self {
                word: L2Entry(load(index)),
                subclusters: Subclusters::default(),
            };
        }
        Self {
            word: L2Entry::extended(load(index)),
            subclusters: Subclusters(load(index + 1)),
        }
    }

    /// Puts it among the `words` of its slice.
    pub fn store(self, words: &[AtomicU64], geometry: Geometry, cluster: u64) {
        let index = geometry.slice_index(cluster);
        if geometry.extended_l2 {
            words[index + 1].store(self.subclusters.0, Ordering::Relaxed);
        }
        // Whoever reads the new entry finds the data behind it.
        words[index].store(self.word.0, Ordering::Release);
    }

    /// Stores it in the words that an entry has on disk.
    pub fn write(self, words: &mut [u64]) {
        words[0] = self.word.0;
        if let Some(second) = words.get_mut(1) {
            *second = self.subclusters.0;
        }
    }

    /// The entries of a table, or a part of one, with these words.
    pub fn all(words: &[u64], geometry: Geometry) -> impl Iterator<Item = Self> + '_ {
        words.chunks(geometry.l2_entry_words()).map(Self::read)
    }

    /// The entry that has these words on disk.
    pub fn read(words: &[u64]) -> Self {
        match words {
            [word, subclusters] => Self {
                word: L2Entry::extended(*word),
                subclusters: Subclusters(*subclusters),
            },
            _ => Self {
                word: L2Entry(words[0]),
                subclusters: Subclusters::default(),
            },
        }
    }

    /// This entry, reading as zero from now on; the cluster stays reserved.
    pub fn zeroed(self, geometry: Geometry) -> Self {
        Self {
            word: if geometry.extended_l2 {
                self.word
            } else {
                L2Entry(self.word.0 | ZERO)
            },
            subclusters: Subclusters::ALL_ZERO,
        }
    }

    /// An entry of a cluster that reads as zero and has no place.
    pub fn zero_plain(geometry: Geometry) -> Self {
        Self {
            word: L2Entry(0),
            subclusters: Subclusters::default(),
        }
        .zeroed(geometry)
    }

    /// An entry of a cluster that nothing is known of.
    pub const UNALLOCATED: Self = Self {
        word: L2Entry(0),
        subclusters: Subclusters(0),
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    const STANDARD: Option<DataFileLayout> = Some(DataFileLayout::Standard);
    const PACKED: Option<DataFileLayout> = Some(DataFileLayout::Packed);

    #[test]
    fn offset_zero_depends_on_the_data_file() {
        assert_eq!(L2Entry(0).cluster(None), Cluster::Unallocated);
        assert_eq!(L2Entry(0).cluster(STANDARD), Cluster::Unallocated);
        assert_eq!(L2Entry(COPIED).cluster(None), Cluster::Unallocated);
        assert_eq!(L2Entry(COPIED).cluster(STANDARD), Cluster::Normal(0));
        // As in QEMU, the zero flag is looked at first.
        assert_eq!(L2Entry(COPIED | ZERO).cluster(STANDARD), Cluster::ZeroPlain);
        assert_eq!(
            L2Entry(COPIED | ZERO).cluster(PACKED),
            Cluster::ZeroAlloc(0)
        );
        assert_eq!(L2Entry(ZERO).cluster(PACKED), Cluster::ZeroPlain);
    }

    #[test]
    fn kinds() {
        let normal = L2Entry::normal(0x5_0000);
        assert_eq!(normal.cluster(None), Cluster::Normal(0x5_0000));
        assert!(normal.is_copied());
        let zeroed = L2Entry(normal.0 | ZERO);
        assert_eq!(zeroed.cluster(None), Cluster::ZeroAlloc(0x5_0000));
        assert_eq!(L2Entry(ZERO).cluster(None), Cluster::ZeroPlain);
        assert_eq!(
            L2Entry(COMPRESSED | 0x5_0000).cluster(None),
            Cluster::Compressed
        );
        for bits in [9, 12, 16, 21] {
            let last = L2Entry::new_compressed(0x1_2345, 1 << bits, bits).unwrap();
            assert_eq!(last.cluster(None), Cluster::Compressed);
            let (offset, len) = last.compressed(bits);
            let end = (0x1_2345u64 + (1 << bits)).next_multiple_of(512);
            assert_eq!((offset, offset + len), (0x1_2345, end));
            assert!(!last.is_copied());
            assert_eq!(L2Entry::new_compressed(1 << (70 - bits), 1, bits), None);
            assert!(L2Entry::new_compressed((1 << (70 - bits)) - 1, 1, bits).is_some());
        }
        assert_eq!(L2Entry(1 << 56 | 2).reserved(), 1 << 56 | 2);
        assert_eq!(L1Entry::new(0x3_0000).reserved(), 0);
    }
}
