//! Where the metadata of an image lies that the allocator must never hand out, and that guest data
//! must not land on.

use std::ops::Range;
use std::sync::Arc;

use super::overlap::Filter;
use crate::Result;
use crate::file::ImageFile;

/// Clusters of metadata, in order; 16 bytes for each L2 table and refcount block.
#[derive(Debug)]
pub(crate) struct Reserved {
    pieces: Vec<Piece>,
    /// How many of them are known to differ.
    distinct: usize,
    cluster_bits: u32,
    /// Of all pieces there have been, for those who must not wait.
    filter: Arc<Filter>,
}

/// Clusters in a row that one field leads to.
#[derive(Clone, Copy, Debug)]
struct Piece {
    first: u64,
    clusters: u32,
    field: Field,
}

/// What leads to a piece of metadata.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Field {
    Header,
    RefcountTable,
    RefcountBlock,
    L1Table,
    L2Table,
    SnapshotTable,
    SnapshotL1Table,
    SnapshotL2Table,
    BitmapDirectory,
    BitmapTable,
    BitmapData,
}

impl Field {
    fn name(self) -> &'static str {
        match self {
            Self::Header => "header",
            Self::RefcountTable => "refcount_table_offset",
            Self::RefcountBlock => "refcount_table entry",
            Self::L1Table => "l1_table_offset",
            Self::L2Table => "l1_table entry",
            Self::SnapshotTable => "snapshots_offset",
            Self::SnapshotL1Table => "l1_table_offset of a snapshot",
            Self::SnapshotL2Table => "l1_table entry of a snapshot",
            Self::BitmapDirectory => "bitmap_directory_offset",
            Self::BitmapTable => "bitmap_table_offset",
            Self::BitmapData => "bitmap_table entry",
        }
    }

    /// What it leads to, in QEMU's words.
    fn structure(self) -> &'static str {
        match self {
            Self::Header => "qcow2_header",
            Self::RefcountTable => "refcount table",
            Self::RefcountBlock => "refcount block",
            Self::L1Table => "active L1 table",
            Self::L2Table => "active L2 table",
            Self::SnapshotTable => "snapshot table",
            Self::SnapshotL1Table => "inactive L1 table",
            Self::SnapshotL2Table => "inactive L2 table",
            Self::BitmapDirectory => "bitmap directory",
            Self::BitmapTable => "bitmap table",
            Self::BitmapData => "bitmap",
        }
    }
}

impl Piece {
    /// Whether it is an L2 table that snapshots share with another of its kind.
    fn is_shared_table(&self, first: &Self) -> bool {
        let is_l2 = |piece: &Self| matches!(piece.field, Field::L2Table | Field::SnapshotL2Table);
        self.first == first.first && self.field == Field::SnapshotL2Table && is_l2(first)
    }

    fn end(&self) -> u64 {
        self.first + u64::from(self.clusters)
    }

    fn part(&self, range: Range<u64>) -> Self {
        Self {
            first: range.start,
            clusters: (range.end - range.start) as u32,
            field: self.field,
        }
    }
}

impl Reserved {
    /// None yet, in clusters of `1 << cluster_bits` bytes.
    pub fn new(cluster_bits: u32) -> Self {
        Self {
            pieces: Vec::new(),
            distinct: 0,
            cluster_bits,
            filter: Arc::new(Filter::new(0)),
        }
    }

    /// Adds `clusters` clusters, which the format limits to the size of an L1 table, from `first`
    /// on. [`sort`](Self::sort) follows.
    pub fn push(&mut self, field: Field, first: u64, clusters: u64) {
        if clusters > 0 {
            self.pieces.push(Piece {
                first,
                clusters: clusters as u32,
                field,
            });
        }
    }

    /// Forgets copies of L2 tables that snapshots share, when they have become many: a thousand
    /// snapshots need no more memory than one.
    pub fn merge_shared(&mut self) {
        const FEW: usize = 1024;
        if self.pieces.len() > FEW + 2 * self.distinct {
            self.sort_pieces();
        }
    }

    fn sort_pieces(&mut self) {
        self.pieces
            .sort_unstable_by_key(|piece| (piece.first, piece.field));
        self.pieces
            .dedup_by(|next, first| next.is_shared_table(first));
        self.distinct = self.pieces.len();
    }

    /// Puts the pieces in order, once all have been added.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) if two of them overlap: what two tables share
    /// could only be right for one of them.
    pub fn sort(&mut self, image: &ImageFile) -> Result<()> {
        self.sort_pieces();
        for pair in self.pieces.windows(2) {
            if pair[1].first < pair[0].end() {
                let reason = format!(
                    "what it leads to overlaps that of {} at {:#x}",
                    pair[0].field.name(),
                    pair[0].first << self.cluster_bits
                );
                let offset = pair[1].first << self.cluster_bits;
                return Err(image.invalid(pair[1].field.name(), offset, reason));
            }
        }
        let clusters = |piece: &Piece| piece.first..piece.end();
        self.filter = Arc::new(Filter::new(self.pieces.iter().flat_map(clusters).count()));
        for cluster in self.pieces.iter().flat_map(clusters) {
            self.filter.insert(cluster);
        }
        Ok(())
    }

    /// Adds `clusters` clusters from `first` on, which were free before.
    pub fn insert(&mut self, field: Field, first: u64, clusters: u64) {
        let index = self.index_of(first);
        let piece = Piece {
            first,
            clusters: clusters as u32,
            field,
        };
        self.pieces.insert(index, piece);
        (first..piece.end()).for_each(|cluster| self.filter.insert(cluster));
    }

    /// The structure that `cluster` is a part of.
    pub fn structure_at(&self, cluster: u64) -> Option<&'static str> {
        let piece = self.pieces.get(self.index_of(cluster))?;
        (piece.first <= cluster).then(|| piece.field.structure())
    }

    /// Contains all clusters of metadata, now and later.
    pub fn filter(&self) -> Arc<Filter> {
        self.filter.clone()
    }

    /// Checks that each cluster of metadata in `range` is counted as used: the allocator would hand
    /// it out, and what is there be overwritten.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid), naming the field that leads there.
    pub fn check(
        &self,
        image: &ImageFile,
        range: Range<u64>,
        is_used: impl Fn(u64) -> bool,
    ) -> Result<()> {
        for piece in &self.pieces[self.index_of(range.start)..] {
            let first = piece.first.max(range.start);
            let end = piece.end().min(range.end);
            if first >= range.end {
                break;
            }
            if let Some(cluster) = (first..end).find(|cluster| !is_used(*cluster)) {
                let reason = format!(
                    "cluster {cluster} holds metadata and is counted as free; repair the image \
                     first: tandem-img check -r all"
                );
                let offset = piece.first << self.cluster_bits;
                return Err(image.invalid(piece.field.name(), offset, reason));
            }
        }
        Ok(())
    }

    /// The first cluster of metadata that is not below `cluster`.
    pub fn first_from(&self, cluster: u64) -> Option<u64> {
        let piece = self.pieces.get(self.index_of(cluster))?;
        Some(piece.first.max(cluster))
    }

    /// `cluster` is not used for metadata any more.
    pub fn release(&mut self, cluster: u64) {
        let index = self.index_of(cluster);
        let Some(&piece) = self
            .pieces
            .get(index)
            .filter(|piece| piece.first <= cluster)
        else {
            return;
        };
        let rest = [piece.first..cluster, cluster + 1..piece.end()];
        let rest = rest.into_iter().filter(|range| !range.is_empty());
        self.pieces
            .splice(index..=index, rest.map(|range| piece.part(range)));
    }

    /// Index of the first piece that ends behind `cluster`.
    fn index_of(&self, cluster: u64) -> usize {
        self.pieces.partition_point(|piece| piece.end() <= cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn clusters(reserved: &Reserved) -> Vec<u64> {
        let next = |cluster: &u64| reserved.first_from(cluster + 1);
        std::iter::successors(reserved.first_from(0), next).collect()
    }

    #[test]
    fn pieces_can_be_released_cluster_by_cluster() {
        let mut reserved = Reserved::new(9);
        reserved.push(Field::L1Table, 5, 4);
        reserved.push(Field::L2Table, 12, 1);
        assert_eq!(clusters(&reserved), [5, 6, 7, 8, 12]);
        reserved.release(7);
        reserved.release(9);
        assert_eq!(clusters(&reserved), [5, 6, 8, 12]);
        for cluster in [12, 5, 6, 8, 8] {
            reserved.release(cluster);
        }
        assert!(clusters(&reserved).is_empty());
    }
}
