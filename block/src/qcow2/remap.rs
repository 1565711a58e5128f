//! Changing where guest clusters are.

use std::ops::Range;

use super::Qcow2;
use super::allocator::Allocation;
use super::entry::{Cluster, Entry, L2Entry};
use super::geometry::ENTRY_SIZE;
use super::placement::Placement;
use super::reserved::Field;
#[cfg(doc)]
use crate::Error;
use crate::Result;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Zeros behind a table that are written with it rather than left to the file system.
const MAX_PADDING: u64 = 64 << 10;

impl Qcow2 {
    /// Finds room for up to `clusters` guest clusters from `first` on, behind the one before them
    /// where possible.
    pub(super) fn allocate(&self, first: u64, clusters: u64) -> Result<Allocation> {
        let offset = first << self.geometry.cluster_bits;
        match &self.placement {
            Placement::Internal => {
                // Before the lock: it may take others.
                let goal = self.goal(first);
                let mut refcounts = self.refcounts()?;
                let place = refcounts.allocate(&self.image, goal, clusters)?;
                let end = place.offset + (place.clusters << self.geometry.cluster_bits);
                self.data_end.fetch_max(end, Ordering::Relaxed);
                Ok(place)
            }
            Placement::Packed(packed) => {
                let goal = self.goal(first);
                let place = packed.clusters()?.allocate(&packed.file, goal, clusters)?;
                let end = place.offset + (place.clusters << self.geometry.cluster_bits);
                self.data_end.fetch_max(end, Ordering::Relaxed);
                Ok(place)
            }
            Placement::External(external) | Placement::Raw(external, _) => {
                let end = offset + (clusters << self.geometry.cluster_bits);
                // A request that found a mapping that is gone can still fill a hole.
                let zeroed = self.retired.is_empty() && external.reads_zero(offset..end)?;
                Ok(Allocation {
                    offset,
                    clusters,
                    zeroed,
                })
            }
        }
    }

    /// Where guest cluster `first` would continue the one before it, as far as that can be told
    /// without another L2 slice. It may be anywhere: the image is not trusted.
    fn goal(&self, first: u64) -> Option<u64> {
        let g = self.geometry;
        let index = g.slice_index(first).checked_sub(g.l2_entry_words())?;
        let before = L2Entry(self.l2.entry(g.slice(first), index)?);
        match before.cluster(self.placement.data_file_layout()) {
            Cluster::Normal(offset) => Some(offset + g.cluster_size()),
            _ => None,
        }
    }

    /// Gives back clusters that were allocated and not mapped. That can only leak them if it
    /// fails, and it follows an error that is reported.
    pub(super) fn release(&self, place: &Allocation) {
        match &self.placement {
            Placement::Internal => {
                let freed = self
                    .refcounts()
                    .and_then(|mut r| r.free(&self.image, place.offset, place.clusters));
                drop(freed);
            }
            Placement::External(external) | Placement::Raw(external, _) => external.forget_hole(),
            Placement::Packed(packed) => {
                if let Ok(mut all) = packed.clusters() {
                    all.free(place.offset, place.clusters);
                }
            }
        }
    }

    /// Gives the range of the L1 entry at `index` an L2 table that belongs to it alone, if it has
    /// none: an empty one, or a copy of the one that it shares with snapshots.
    #[inline]
    pub(super) fn own_table(&self, index: usize) -> Result<()> {
        match self.l1.get(index).owns_table() {
            true => Ok(()),
            false => self.make_table(index),
        }
    }

    #[cold]
    fn make_table(&self, index: usize) -> Result<()> {
        let shared = self.l1.own_table(index, |old| {
            let table = self
                .refcounts()?
                .allocate_metadata(&self.image, Field::L2Table, 1)?;
            let made = match old {
                0 => self.clear_table(&table),
                _ => self.copy_table(old, table.offset),
            };
            if let Err(e) = made {
                self.refcounts()?
                    .free_metadata(&self.image, Field::L2Table, table.offset, 1)?;
                return Err(e);
            }
            Ok(table.offset)
        })?;
        if let Some(old) = shared {
            // After the entry has changed: what is written back before leaves the old one in use.
            let size = self.geometry.cluster_size();
            self.retired.add_table(old..old + size);
        }
        Ok(())
    }

    /// Copies an L2 table that nobody changes: a shared one is never written, so what the cache
    /// has of it is on disk.
    fn copy_table(&self, old: u64, new: u64) -> Result<()> {
        let mut table = vec![0; self.geometry.cluster_size() as usize];
        self.image.read_bytes_at(&mut table, old)?;
        self.image.write_bytes_at(&table, new)
    }

    /// Writes `table`, of metadata, to clusters of its own, and returns its offset; 0 if it is empty.
    pub(super) fn add_table(&self, field: Field, table: &[u8]) -> Result<u64> {
        let g = self.geometry;
        let clusters = g.clusters(table.len() as u64);
        if clusters == 0 {
            return Ok(0);
        }
        let place = self
            .refcounts()?
            .allocate_metadata(&self.image, field, clusters)?;
        if let Err(e) = self.write_table(table, &place) {
            self.refcounts()?
                .free_metadata(&self.image, field, place.offset, clusters)?;
            return Err(e);
        }
        Ok(place.offset)
    }

    /// Writes `table` to the clusters of `place`, and zeros to the rest of them, which the file then has.
    fn write_table(&self, table: &[u8], place: &Allocation) -> Result<()> {
        let len = table.len() as u64;
        let size = place.clusters << self.geometry.cluster_bits;
        if size - len <= MAX_PADDING {
            let mut bytes = table.to_vec();
            bytes.resize(size as usize, 0);
            return self.image.write_bytes_at(&bytes, place.offset);
        }
        self.image.write_bytes_at(table, place.offset)?;
        if !place.zeroed {
            return self
                .image
                .write_zeroes(place.offset + len, size - len, false);
        }
        let last_entry = place.offset + size - ENTRY_SIZE;
        self.image
            .write_bytes_at(&[0; ENTRY_SIZE as usize], last_entry)
    }

    /// Makes a cluster an empty L2 table, and the file reach to its end: the L1 entry must not lead
    /// out of the file, whether anything will be mapped in the table or not.
    fn clear_table(&self, table: &Allocation) -> Result<()> {
        let size = self.geometry.cluster_size();
        if !table.zeroed {
            self.image.write_zeroes(table.offset, size, false)?;
        }
        let last_entry = table.offset + size - ENTRY_SIZE;
        self.image
            .write_bytes_at(&[0; ENTRY_SIZE as usize], last_entry)
    }

    /// Maps the guest bytes of `range`, which are whole clusters, or subclusters, of one slice, and
    /// have no data of their own yet. The data of the first of the clusters is at `offset`.
    pub(super) fn map_data(&self, range: Range<u64>, offset: u64) -> Result<()> {
        let g = self.geometry;
        let clusters = g.cluster(range.start)..g.clusters(range.end);
        let publish = || {
            self.change(clusters.clone(), |cluster, old| Entry {
                word: L2Entry::normal(offset + ((cluster - clusters.start) << g.cluster_bits)),
                subclusters: old.subclusters.allocated(g.subclusters(cluster, &range)),
            })
        };
        match &self.placement {
            Placement::Raw(_, tables) => {
                let grains = (range.end - range.start).div_ceil(g.grain_size());
                tables.add_mapped(g.l1_index(clusters.start), grains, publish)
            }
            _ => publish(),
        }
    }

    /// The `len` bytes at `offset` of the data have lost their mapping. The caller holds the range
    /// of their guest clusters.
    pub(super) fn retire(&self, offset: u64, len: u64) {
        #[cfg(mutate)]
        if crate::mutate::is(crate::mutate::REUSED_EARLY) {
            return drop(self.give_back(offset..offset + len));
        }
        self.retired.add(offset..offset + len);
        if let Placement::External(external) = &self.placement {
            // The place belongs to its guest clusters for good, so its space can be released at
            // once; a crash may bring the old mapping back, which finds the old data or zeros. An
            // error only leaves space in use.
            drop(external.file.discard(offset, len));
        }
    }

    /// Gives back a range of clusters that nothing can lead to any more. An error leaks them.
    pub(super) fn give_back(&self, range: Range<u64>) -> Result<()> {
        match &self.placement {
            Placement::Internal => self.release_clusters(None, range),
            Placement::External(external) | Placement::Raw(external, _) => {
                // A request that had found the old mapping may have written there since.
                external.forget_hole();
                Ok(())
            }
            Placement::Packed(packed) => {
                let len = range.end - range.start;
                packed.file.discard(range.start, len)?;
                let clusters = self.geometry.cluster(len);
                packed.clusters()?.free(range.start, clusters);
                Ok(())
            }
        }
    }

    /// Takes a reference from each of the clusters of the image file that `range` lies in, and
    /// releases the space of those that have no other, before anybody can get them. The reference is
    /// that of `field` or, without that, of data, and nothing on disk leads there by it any more.
    ///
    /// # Errors
    /// [`Error::Invalid`] for metadata that needs all the references that it has: the image is
    /// damaged.
    pub(super) fn release_clusters(&self, field: Option<Field>, range: Range<u64>) -> Result<()> {
        let g = self.geometry;
        let (mut cluster, end) = (g.cluster(range.start), g.clusters(range.end));
        while cluster < end {
            let offset = cluster << g.cluster_bits;
            let alike = self
                .refcounts()?
                .run_alike(&self.image, field, cluster..end);
            let alike = alike.map_err(|e| self.damaged_if_invalid(e))?;
            if alike.exclusive {
                self.image
                    .discard(offset, alike.clusters << g.cluster_bits)?;
            }
            self.refcounts()?
                .take_references(&self.image, field, offset, alike.clusters)?;
            cluster += alike.clusters;
        }
        Ok(())
    }

    /// The entries of `clusters`, which lie in one slice, as they are on disk or will be.
    pub(super) fn entries(&self, clusters: Range<u64>) -> Result<Vec<Entry>> {
        let g = self.geometry;
        let count = (clusters.end - clusters.start) as usize;
        if self.l1.get(g.l1_index(clusters.start)).offset() == 0 {
            return Ok(vec![Entry::UNALLOCATED; count]);
        }
        let slice = g.slice(clusters.start);
        let load = |words: &[AtomicU64]| {
            let entries = clusters.clone();
            entries.map(|c| Entry::load(words, g, c)).collect()
        };
        let fill = |words: &[AtomicU64]| self.fill_slice(slice, words);
        match self.l2.read(slice, load) {
            Some(entries) => Ok(entries),
            None => self.retry_when_full(|| self.l2.load(slice, fill, load)),
        }
    }

    /// Replaces the entries of `clusters`, which lie in one slice: each by what `entry` makes of its
    /// number and the old one. All of them are or, after an error, none.
    pub(super) fn change(
        &self,
        clusters: Range<u64>,
        entry: impl Fn(u64, Entry) -> Entry,
    ) -> Result<()> {
        let g = self.geometry;
        self.own_table(g.l1_index(clusters.start))?;
        let slice = g.slice(clusters.start);
        let words = g.l2_entry_words();
        let count = (clusters.end - clusters.start) as usize * words;
        let start = g.slice_index(clusters.start);
        self.retry_when_full(|| {
            self.l2.update(
                slice,
                start..start + count,
                |words| self.fill_slice(slice, words),
                |words| {
                    for cluster in clusters.clone() {
                        let old = Entry::load(words, g, cluster);
                        entry(cluster, old).store(words, g, cluster);
                    }
                },
            )
        })
    }
}
