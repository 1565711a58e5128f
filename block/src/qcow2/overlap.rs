//! Guest data never lands on metadata, and damage that is met leaves a mark.
//!
//! The allocator hands out nothing that is in use (`reserved`), but what an L2 entry says of data
//! that is there already is the image's word. Before data is changed where an entry leads, in the
//! image file, a look at a small filter tells that no metadata lies there; only where the filter is
//! in doubt the exact list is asked, under the refcounts' lock.
//!
//! An image that turns out to be damaged while it is open for writing is marked as corrupt (qcow2
//! specification, `incompatible_features` bit 1), and written to no more.

use std::ops::Range;

use super::Qcow2;
use super::header::incompatible;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::{Error, Result};

/// Bits of a filter for each cluster of metadata, so that it is seldom in doubt.
const BITS_PER_CLUSTER: usize = 64;
/// Bits in a word of a filter.
const WORD_BITS: u64 = u64::BITS as u64;
/// Fewest and most words of a filter: 1 KiB to 1 MiB.
const WORDS: (usize, usize) = (128, 128 << 10);

/// A set of clusters that is read without locks, and contains more than was added.
#[derive(Debug)]
pub(crate) struct Filter {
    /// Each cluster has one bit, which it shares with others.
    words: Box<[AtomicU64]>,
}

impl Filter {
    /// For about `clusters` clusters.
    pub fn new(clusters: usize) -> Self {
        let words = clusters.saturating_mul(BITS_PER_CLUSTER) / u64::BITS as usize;
        let words = words.clamp(WORDS.0, WORDS.1).next_power_of_two();
        Self {
            words: (0..words).map(|_| AtomicU64::new(0)).collect(),
        }
    }

    /// Adds `clusters`, all that share a word at once.
    pub fn insert(&self, clusters: Range<u64>) {
        let mut first = clusters.start;
        while first < clusters.end {
            let end = clusters.end.min((first / WORD_BITS + 1) * WORD_BITS);
            let ones = u64::MAX >> (WORD_BITS - (end - first));
            let (word, bit) = self.place(first);
            word.fetch_or(ones * bit, Ordering::Release);
            first = end;
        }
    }

    /// Whether `cluster` may have been added.
    pub fn may_contain(&self, cluster: u64) -> bool {
        let (word, bit) = self.place(cluster);
        word.load(Ordering::Acquire) & bit != 0
    }

    fn place(&self, cluster: u64) -> (&AtomicU64, u64) {
        // Neighbours share a word.
        let hash = (cluster / WORD_BITS).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let word = &self.words[hash as usize & (self.words.len() - 1)];
        (word, 1 << (cluster % WORD_BITS))
    }
}

impl Qcow2 {
    /// Refuses to change the `len` bytes at `offset` of the file that holds guest data, which an L2
    /// entry leads to, if there is metadata.
    ///
    /// Clusters become metadata only while they are free, and those that data is mapped to are not,
    /// unless the image is damaged.
    pub(super) fn check_overlap(&self, offset: u64, len: u64) -> Result<()> {
        self.check_clusters(offset, len, |_| Ok(false))
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
    pub(super) fn check_clusters(
        &self,
        offset: u64,
        len: u64,
        mut is_allowed: impl FnMut(u64) -> Result<bool>,
    ) -> Result<()> {
        let Some(filter) = &self.metadata else {
            return Ok(());
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
                    .write_bytes_at(&features.to_be_bytes(), incompatible::OFFSET)
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
        let filter = Filter::new(1000);
        let clusters = || (0..1000u64).map(|i| i * 8191);
        clusters().for_each(|cluster| filter.insert(cluster..cluster + 1));
        assert!(clusters().all(|cluster| filter.may_contain(cluster)));
        let wrong = (10_000_000..10_100_000).filter(|c| filter.may_contain(*c));
        assert!(wrong.count() < 5000);
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
