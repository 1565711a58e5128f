//! Where the metadata of an image lies that the allocator must never hand out, and that guest data
//! must not land on.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use super::geometry::ENTRY_SIZE;
use super::header::MAX_L1_SIZE;
use super::overlap::Filter;
use crate::Result;
use crate::file::ImageFile;

/// Most L2 tables that snapshots can have, each of them counted once: 256 MiB of memory for an open
/// image.
pub(crate) const MAX_SNAPSHOT_TABLES: usize = 1 << 24;

/// Clusters of metadata, in order; 16 bytes for each L2 table and refcount block, but for those that
/// lie one behind the other in an image without snapshots.
#[derive(Debug)]
pub(crate) struct Reserved {
    pieces: Vec<Piece>,
    /// How many of them are known to differ.
    distinct: usize,
    cluster_bits: u32,
    /// Snapshots may share L2 tables with the disk, each of which has a piece then.
    has_snapshots: bool,
    /// Of all pieces there have been since it was first asked for, for those who must not wait.
    filter: OnceLock<Arc<Filter>>,
}

/// Clusters in a row that one field leads to, or fields of the same name.
#[derive(Clone, Copy, Debug)]
struct Piece {
    first: u64,
    clusters: u32,
    /// How many L1 tables lead there, or as many as this can tell; 1 for what is no L2 table.
    users: u16,
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

    /// Whether both lead to structures of the same kind: snapshots share L2 tables with the disk.
    fn is_like(self, other: Self) -> bool {
        let is_l2 = |field| matches!(field, Self::L2Table | Self::SnapshotL2Table);
        self == other || is_l2(self) && is_l2(other)
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
        let is_shared = self.field == Field::SnapshotL2Table && self.field.is_like(first.field);
        is_shared && self.first == first.first
    }

    fn end(&self) -> u64 {
        self.first + u64::from(self.clusters)
    }

    /// The first cluster of the structure that `cluster`, one of these, is a part of.
    fn start_of(&self, cluster: u64) -> u64 {
        match self.field {
            Field::L2Table | Field::RefcountBlock => cluster,
            _ => self.first,
        }
    }

    fn part(&self, range: Range<u64>) -> Self {
        Self {
            first: range.start,
            clusters: (range.end - range.start) as u32,
            ..*self
        }
    }
}

impl Reserved {
    /// None yet, in clusters of `1 << cluster_bits` bytes, of an image with or without snapshots.
    pub fn new(cluster_bits: u32, has_snapshots: bool) -> Self {
        Self {
            pieces: Vec::new(),
            distinct: 0,
            cluster_bits,
            has_snapshots,
            filter: OnceLock::new(),
        }
    }

    /// Makes room for `count` more structures of a cluster each, at once: it is most of what an open image
    /// with many tables takes.
    pub fn make_room(&mut self, count: usize) {
        self.pieces.reserve_exact(count);
    }

    /// Adds `clusters` clusters, which the format limits to the size of an L1 table, from `first`
    /// on. [`sort`](Self::sort) follows.
    pub fn push(&mut self, field: Field, first: u64, clusters: u64) {
        let last = self.pieces.last_mut().filter(|last| {
            let is_alike = last.field == field && last.start_of(first) == first;
            is_alike && last.end() == first && !self.has_snapshots
        });
        if let Some(last) = last {
            last.clusters += clusters as u32;
        } else if clusters > 0 {
            self.pieces.push(Piece {
                first,
                clusters: clusters as u32,
                users: 1,
                field,
            });
        }
    }

    /// Forgets copies of L2 tables that snapshots share, when they have become many: a thousand
    /// snapshots need no more memory than one.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) if there are too many all the same.
    pub fn merge_shared(&mut self, image: &ImageFile) -> Result<()> {
        const FEW: usize = 1024;
        // Those of the disk, too.
        const MOST: usize = MAX_SNAPSHOT_TABLES + (MAX_L1_SIZE / ENTRY_SIZE) as usize;
        if self.pieces.len() > FEW + 2 * self.distinct {
            self.sort_pieces();
            self.check_l2_tables(image, MOST)?;
        }
        Ok(())
    }

    /// Checks that there are `most` L2 tables at most.
    fn check_l2_tables(&self, image: &ImageFile, most: usize) -> Result<()> {
        let count = self.l2_tables();
        if count > most {
            let reason =
                format!("there are more than {most} L2 tables, those of snapshots included");
            return Err(image.invalid("l1_table entries of snapshots", count as u64, reason));
        }
        Ok(())
    }

    fn sort_pieces(&mut self) {
        // What is pushed mostly is in order, table by table; the stable sort makes use of that.
        self.pieces.sort_by_key(|piece| (piece.first, piece.field));
        self.pieces.dedup_by(|next, first| {
            let is_shared = next.is_shared_table(first);
            if is_shared {
                first.users = first.users.saturating_add(next.users);
            }
            is_shared
        });
        self.distinct = self.pieces.len();
    }

    /// How many L2 tables there are.
    pub fn l2_tables(&self) -> usize {
        let is_l2 = |piece: &&Piece| piece.field.is_like(Field::L2Table);
        let tables = self.pieces.iter().filter(is_l2);
        tables.map(|piece| piece.clusters as usize).sum()
    }

    /// Puts the pieces in order.
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
                    pair[0].start_of(pair[1].first) << self.cluster_bits
                );
                let offset = pair[1].first << self.cluster_bits;
                return Err(image.invalid(pair[1].field.name(), offset, reason));
            }
        }
        Ok(())
    }

    /// Adds `clusters` clusters from `first` on, which were free before.
    pub fn insert(&mut self, field: Field, first: u64, clusters: u64) {
        let index = self.index_of(first);
        let piece = Piece {
            first,
            clusters: clusters as u32,
            users: 1,
            field,
        };
        self.pieces.insert(index, piece);
        if let Some(filter) = self.filter.get() {
            filter.insert(first..piece.end());
        }
    }

    /// The structure that `cluster` is a part of.
    pub fn structure_at(&self, cluster: u64) -> Option<&'static str> {
        Some(self.piece_at(cluster)?.field.structure())
    }

    /// How many references `cluster` has that `but` is no part of, or more: those of the metadata
    /// there.
    pub fn users(&self, cluster: u64, but: Option<Field>) -> u64 {
        let Some(piece) = self.piece_at(cluster) else {
            return 0;
        };
        let is_part = but.is_some_and(|field| field.is_like(piece.field));
        u64::from(piece.users) - u64::from(is_part)
    }

    fn piece_at(&self, cluster: u64) -> Option<&Piece> {
        let piece = self.pieces.get(self.index_of(cluster))?;
        (piece.first <= cluster).then_some(piece)
    }

    /// Contains all clusters of metadata, now and later. It has 8 to 16 bytes for each, up to a limit.
    pub fn filter(&self) -> Arc<Filter> {
        let make = || {
            let clusters = self.pieces.iter().map(|piece| piece.clusters as usize);
            let filter = Filter::new(clusters.sum());
            for piece in &self.pieces {
                filter.insert(piece.first..piece.end());
            }
            Arc::new(filter)
        };
        self.filter.get_or_init(make).clone()
    }

    /// Checks that each cluster of metadata in `range` is used as often as `count` tells, or less:
    /// the allocator would hand it out, and what is there be overwritten.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid), naming the field that leads there.
    pub fn check(
        &self,
        image: &ImageFile,
        range: Range<u64>,
        count: impl Fn(u64) -> u64,
    ) -> Result<()> {
        for piece in &self.pieces[self.index_of(range.start)..] {
            let first = piece.first.max(range.start);
            let end = piece.end().min(range.end);
            if first >= range.end {
                break;
            }
            let is_bad = |cluster: &u64| count(*cluster) < piece.users.into();
            if let Some(cluster) = (first..end).find(is_bad) {
                let counted = match count(cluster) {
                    0 => "is counted as free".to_owned(),
                    count => format!("is used {} times and counted {count} times", piece.users),
                };
                let reason = format!(
                    "cluster {cluster} holds metadata and {counted}; repair the image first: \
                     tandem-img check -r all"
                );
                let offset = piece.start_of(cluster) << self.cluster_bits;
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

    /// `field` does not lead to `cluster` any more, if it did.
    pub fn release(&mut self, field: Field, cluster: u64) {
        let index = self.index_of(cluster);
        let Some(piece) = self.pieces.get_mut(index) else {
            return;
        };
        if piece.first > cluster || !field.is_like(piece.field) {
            return;
        }
        if piece.users > 1 {
            piece.users -= 1;
            return;
        }
        let piece = *piece;
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
    use crate::{CacheMode, FileStorage};

    fn clusters(reserved: &Reserved) -> Vec<u64> {
        let next = |cluster: &u64| reserved.first_from(cluster + 1);
        std::iter::successors(reserved.first_from(0), next).collect()
    }

    #[test]
    fn pieces_can_be_released_cluster_by_cluster() {
        let mut reserved = Reserved::new(9, true);
        reserved.push(Field::L1Table, 5, 4);
        reserved.push(Field::L2Table, 12, 1);
        assert_eq!(clusters(&reserved), [5, 6, 7, 8, 12]);
        let release = |reserved: &mut Reserved, cluster| {
            reserved.release(Field::L1Table, cluster);
            reserved.release(Field::SnapshotL2Table, cluster);
        };
        release(&mut reserved, 7);
        release(&mut reserved, 9);
        assert_eq!(clusters(&reserved), [5, 6, 8, 12]);
        reserved.release(Field::BitmapData, 5);
        assert_eq!(clusters(&reserved), [5, 6, 8, 12]);
        for cluster in [12, 5, 6, 8, 8] {
            release(&mut reserved, cluster);
        }
        assert!(clusters(&reserved).is_empty());
    }

    #[test]
    fn a_shared_table_is_metadata_until_its_last_user_is_gone() {
        let mut reserved = Reserved::new(9, true);
        for field in [
            Field::SnapshotL2Table,
            Field::L2Table,
            Field::SnapshotL2Table,
        ] {
            reserved.push(field, 7, 1);
        }
        reserved.push(Field::L1Table, 9, 1);
        reserved.sort_pieces();
        assert_eq!(reserved.l2_tables(), 1);
        for left in [3, 2, 1] {
            assert_eq!(reserved.users(7, None), left);
            assert_eq!(reserved.users(7, Some(Field::L2Table)), left - 1);
            assert_eq!(reserved.users(7, Some(Field::L1Table)), left);
            reserved.release(Field::SnapshotL2Table, 7);
        }
        assert_eq!(reserved.users(7, None), 0);
        assert_eq!(clusters(&reserved), [9]);
    }

    #[test]
    fn l2_tables_are_counted_once() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let storage = Box::new(FileStorage::open(file.path(), true).unwrap());
        let image = ImageFile::new(storage, file.path(), CacheMode::default());
        let mut reserved = Reserved::new(9, true);
        for cluster in [20, 21, 20, 22, 21] {
            reserved.push(Field::SnapshotL2Table, cluster, 1);
        }
        reserved.push(Field::L2Table, 22, 1);
        reserved.push(Field::L1Table, 30, 5);
        reserved.sort(&image).unwrap();
        reserved.check_l2_tables(&image, 3).unwrap();
        let error = reserved.check_l2_tables(&image, 2).unwrap_err().to_string();
        assert!(error.contains("more than 2 L2 tables"), "{error}");
    }
}
