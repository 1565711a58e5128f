//! Guest data never lands on metadata, and damage that is met leaves a mark.
//!
//! The allocator hands out nothing that is in use (`reserved`), but what an L2 entry says of data
//! that is there already is the image's word. Before data is changed where an entry leads, in the
//! image file, a look at a small filter tells that no metadata lies there; only where the filter is
//! in doubt the exact list is asked, under the refcounts' lock.
//!
//! An image that turns out to be damaged while it is open for writing is marked as corrupt (qcow2
//! specification, `incompatible_features` bit 1). Requests change it no more: what those that have
//! completed before have changed is still written back, but no cluster is allocated or given back, and
//! the bitmaps stay marked as in use.

use std::ops::Range;
use std::sync::{Arc, OnceLock};

use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use super::Qcow2;
use super::header::incompatible;
use super::parse::offset;
use super::placement::Placement;
use crate::{Error, Result};

/// Bits of a filter for each cluster of metadata, so that it is seldom in doubt.
const BITS_PER_CLUSTER: usize = 64;
/// Bits in a word of a filter.
const WORD_BITS: u64 = u64::BITS as u64;
/// Fewest words of a level: 1 KiB.
const MIN_WORDS: usize = 128;
/// Most words of a level: 32 MiB, however much metadata an image claims to have. Clusters beyond that
/// share the bits of others, and are looked up in the exact list more often.
const MAX_WORDS: usize = 1 << 22;
/// How many times as large as the one before a level is.
const GROWTH: usize = 8;

/// A set of clusters that is read without locks, and contains more than was added.
///
/// It grows by levels: once as much has been added to one as it is made for, what follows goes to the
/// next.
#[derive(Debug)]
pub(crate) struct Filter {
    /// Each cluster has one bit, which it shares with others.
    words: Box<[AtomicU64]>,
    /// How many more clusters this level is made for.
    room: AtomicUsize,
    next: OnceLock<Box<Self>>,
}

impl Filter {
    /// For about `clusters` clusters, and those that come later.
    pub fn new(clusters: usize) -> Self {
        let words = clusters.saturating_mul(BITS_PER_CLUSTER) / u64::BITS as usize;
        Self::with_words(words.clamp(MIN_WORDS, MAX_WORDS).next_power_of_two())
    }

    fn with_words(words: usize) -> Self {
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
            room: AtomicUsize::new(words * u64::BITS as usize / BITS_PER_CLUSTER),
            next: OnceLock::new(),
        }
    }

    /// Adds `clusters`, those that share a word at once. One thread does so at a time.
    pub fn insert(&self, clusters: Range<u64>) {
        let mut first = clusters.start;
        while first < clusters.end {
            let end = clusters.end.min((first / WORD_BITS + 1) * WORD_BITS);
            self.insert_row(first, end - first);
            first = end;
        }
    }

    /// Adds `count` clusters from `first` on, which share a word.
    fn insert_row(&self, first: u64, count: u64) {
        let mut level = self;
        while level.room.load(Ordering::Relaxed) == 0 && level.words.len() < MAX_WORDS {
            let words = (level.words.len() * GROWTH).min(MAX_WORDS);
            level = level.next.get_or_init(|| Box::new(Self::with_words(words)));
        }
        let room = level.room.load(Ordering::Relaxed);
        let room = room.saturating_sub(count as usize);
        level.room.store(room, Ordering::Relaxed);
        let ones = u64::MAX >> (WORD_BITS - count);
        let (word, shift) = level.place(first);
        word.fetch_or(ones.rotate_left(shift), Ordering::Release);
    }

    /// Whether `cluster` may have been added.
    #[inline]
    pub fn may_contain(&self, cluster: u64) -> bool {
        let mut level = self;
        loop {
            let (word, bit) = level.place(cluster);
            if word.load(Ordering::Acquire) >> bit & 1 != 0 {
                return true;
            }
            match level.next.get() {
                Some(next) => level = next,
                None => return false,
            }
        }
    }

    /// The word of `cluster` in this level, and the bit of it there.
    #[inline]
    fn place(&self, cluster: u64) -> (&AtomicU64, u32) {
        // Neighbours share a word; tables that lie at regular distances do not share a bit.
        let hash = (cluster / WORD_BITS).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let word = &self.words[(hash >> 32) as usize & (self.words.len() - 1)];
        (word, (cluster.wrapping_add(hash >> 20) % WORD_BITS) as u32)
    }
}

impl Qcow2 {
    /// Refuses to change the `len` bytes at `offset` of the file that holds guest data, which an L2
    /// entry leads to, if there is metadata.
    ///
    /// Clusters become metadata only while they are free, and those that data is mapped to are not,
    /// unless the image is damaged.
    #[inline]
    pub(super) fn check_overlap(&self, offset: u64, len: u64) -> Result<()> {
        if !self.may_overlap(offset, len) {
            return Ok(());
        }
        self.check_clusters(offset, len, |_| Ok(false))
    }

    /// Whether [`check_overlap`](Self::check_overlap) would have to ask the exact list, or to wait for the
    /// refcounts to make the filter.
    #[inline]
    pub(super) fn may_overlap(&self, offset: u64, len: u64) -> bool {
        if !matches!(self.placement, Placement::Internal) {
            return false;
        }
        let g = self.geometry;
        let mut clusters = g.cluster(offset)..g.clusters(offset + len);
        let filter = self.metadata.get().or_else(|| self.try_make_filter());
        filter.is_none_or(|filter| clusters.any(|cluster| filter.may_contain(cluster)))
    }

    /// The filter, if nobody uses the refcounts now.
    #[cold]
    fn try_make_filter(&self) -> Option<&Arc<Filter>> {
        let filter = self.refcounts.as_ref()?.try_lock().ok()?.metadata();
        Some(self.metadata.get_or_init(|| filter))
    }

    /// As [`check_overlap`](Self::check_overlap), of a place that is about to lose its mapping, and
    /// is not written. Metadata may lie there if that has references of its own, as after a repair.
    pub(super) fn check_leaving(&self, offset: u64, len: u64) -> Result<()> {
        self.check_clusters(offset, len, |cluster| self.can_lose(cluster, 1))
    }

    /// Whether `lost` references to `cluster` can go, and the metadata there keeps its own.
    pub(super) fn can_lose(&self, cluster: u64, lost: u64) -> Result<bool> {
        let mut refcounts = self.refcounts()?;
        let needed = refcounts.metadata_users(cluster, None);
        Ok(refcounts.count(&self.image, cluster)? >= needed + lost)
    }

    /// Refuses the `len` bytes at `offset` of the file that holds guest data, which an L2 entry leads
    /// to, if there is metadata, in a cluster that is not allowed.
    #[inline(never)]
    pub(super) fn check_clusters(
        &self,
        offset: u64,
        len: u64,
        mut is_allowed: impl FnMut(u64) -> Result<bool>,
    ) -> Result<()> {
        if !matches!(self.placement, Placement::Internal) {
            return Ok(());
        }
        let filter = match self.metadata.get() {
            Some(filter) => filter,
            None => {
                let filter = self.refcounts()?.metadata();
                self.metadata.get_or_init(|| filter)
            }
        };
        let g = self.geometry;
        for cluster in g.cluster(offset)..g.clusters(offset + len) {
            if !filter.may_contain(cluster) {
                continue;
            }
            let structure = self.refcounts()?.metadata_at(cluster);
            if let Some(structure) = structure
                && !is_allowed(cluster)?
            {
                let reason = format!("Preventing invalid write on {structure}");
                let place = cluster << g.cluster_bits;
                return Err(self.damaged(self.image.invalid("l2_table entry", place, reason)));
            }
        }
        Ok(())
    }

    /// [`damaged`](Self::damaged) if `error` says that the image is not valid; returns it.
    pub(super) fn damaged_if_invalid(&self, error: Error) -> Error {
        match error {
            Error::Invalid { .. } => self.damaged(error),
            other => other,
        }
    }

    /// Marks the image as corrupt because of `error`, which it returns.
    pub(super) fn damaged(&self, error: Error) -> Error {
        let features = self.incompatible_features | incompatible::CORRUPT;
        if !self.read_only && !self.corrupt.swap(true, Ordering::Relaxed) && self.version >= 3 {
            // The error is told, whether the mark can be made or not.
            drop(
                self.image
                    .write_bytes_at(&features.to_be_bytes(), offset::INCOMPATIBLE_FEATURES)
                    .and_then(|()| self.image.sync()),
            );
        }
        error
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_contains_what_was_added_and_little_else() {
        // Made for what it gets, and grown from nothing.
        for (expected, added, stride) in [(1000, 1000, 8191), (0, 200_000, 512), (0, 200_000, 1)] {
            let filter = Filter::new(expected);
            let clusters = || (0..added).map(|i| i * stride);
            clusters().for_each(|cluster| filter.insert(cluster..cluster + 1));
            assert!(clusters().all(|cluster| filter.may_contain(cluster)));
            let others = (1 << 40)..(1 << 40) + 100_000;
            let wrong = others.filter(|cluster| filter.may_contain(*cluster));
            assert!(wrong.count() < 7000, "{added} every {stride}");
        }
    }

    /// An image of a few sparse MiB can name billions of clusters.
    #[test]
    fn a_filter_has_its_limit() {
        let filter = Filter::new(usize::MAX);
        assert_eq!(filter.words.len(), MAX_WORDS);
        filter.room.store(0, Ordering::Relaxed);
        filter.insert(5..7);
        assert!(filter.may_contain(6) && filter.next.get().is_none());
    }

    #[test]
    fn a_filter_takes_many_clusters_at_once() {
        for (first, end) in [(3, 3), (3, 4), (0, 64), (60, 200), (63, 65)] {
            let filter = Filter::new(1);
            filter.insert(first..end);
            assert!((first..end).all(|cluster| filter.may_contain(cluster)));
            assert!(!(1000..1064).any(|cluster| filter.may_contain(cluster)));
            assert!(!filter.may_contain(end));
        }
    }
}
