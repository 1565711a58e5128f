//! Clusters that have lost their mapping, on their way back to the allocator.
//!
//! A cluster is used again only after three things have happened, in this order: its mapping is
//! gone from the disk, or a crash could bring back a mapping of what it holds then; requests that
//! found the old mapping have ended; and its space has been released, or the hole would be punched
//! in somebody else's data.

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::ops::Range;

use super::requests::{GracePeriod, Requests};
use crate::sync::lock;

/// Ranges that lost their mapping, before it is time to write the change back.
const MANY: usize = 1024;

/// Bytes in them.
const MUCH: u64 = 64 << 20;

/// Ranges of the file that holds guest data, in bytes.
pub(crate) type Batch = Vec<Freed>;

/// A range that lost its mapping.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Freed {
    /// Whole clusters.
    Clusters(Range<u64>),
    /// A compressed cluster: it shares the clusters of the image file that it lies in with others.
    Compressed(Range<u64>),
    /// An L2 table that snapshots have too.
    Table(Range<u64>),
}

/// Clusters that have lost their mapping.
#[derive(Default)]
pub(crate) struct Retired {
    lists: Mutex<Lists>,
    /// Ranges in all lists, and in the batch that is being written back.
    count: AtomicUsize,
    /// Ranges that have come back, ever.
    returned: AtomicUsize,
    /// Ranges in memory whose mapping is still on disk, and their bytes; a hint.
    unmapped: AtomicUsize,
    unmapped_bytes: AtomicU64,
}

#[derive(Default)]
struct Lists {
    /// The mapping is gone in memory.
    unmapped: Batch,
    /// It is gone from the disk.
    durable: Batch,
    /// Requests may still use it; no more are added.
    waiting: Option<(GracePeriod, Batch)>,
}

impl Retired {
    /// `range` has lost its mapping, in memory.
    pub fn add(&self, range: Range<u64>) {
        let mut lists = lock(&self.lists);
        let len = range.end - range.start;
        self.unmapped_bytes.fetch_add(len, Ordering::Relaxed);
        match lists.unmapped.last_mut() {
            Some(Freed::Clusters(last)) if last.end == range.start => last.end = range.end,
            _ => self.push(&mut lists, Freed::Clusters(range)),
        }
    }

    /// The compressed cluster in `range` of the image file has lost its mapping, in memory.
    pub fn add_compressed(&self, range: Range<u64>) {
        self.push(&mut lock(&self.lists), Freed::Compressed(range));
    }

    /// The disk does not use the L2 table in `range` of the image file any more, in memory.
    pub fn add_table(&self, range: Range<u64>) {
        self.push(&mut lock(&self.lists), Freed::Table(range));
    }

    fn push(&self, lists: &mut Lists, freed: Freed) {
        lists.unmapped.push(freed);
        self.count.fetch_add(1, Ordering::Release);
        self.unmapped.fetch_add(1, Ordering::Relaxed);
    }

    /// Whether there are none, in whatever state.
    pub fn is_empty(&self) -> bool {
        self.count.load(Ordering::Acquire) == 0
    }

    /// Whether there are so many that metadata should be written back soon.
    pub fn wants_write_back(&self) -> bool {
        self.unmapped.load(Ordering::Relaxed) >= MANY
            || self.unmapped_bytes.load(Ordering::Relaxed) >= MUCH
    }

    /// How many ranges have come back, modulo the size of a word.
    pub fn returned(&self) -> usize {
        self.returned.load(Ordering::Acquire)
    }

    /// Takes those whose mapping will be gone from the disk once everything that is dirty now has
    /// been written back.
    pub fn take_unmapped(&self) -> Batch {
        let mut lists = lock(&self.lists);
        self.unmapped.store(0, Ordering::Relaxed);
        self.unmapped_bytes.store(0, Ordering::Relaxed);
        std::mem::take(&mut lists.unmapped)
    }

    /// Writing back failed.
    pub fn put_back(&self, batch: Batch) {
        self.unmapped.fetch_add(batch.len(), Ordering::Relaxed);
        lock(&self.lists).unmapped.extend(batch);
    }

    /// The mappings of `batch` are gone from the disk.
    pub fn written(&self, batch: Batch) {
        lock(&self.lists).durable.extend(batch);
    }

    /// Takes clusters that can be used again once their space has been released, if there are
    /// such; [`finished`](Self::finished) must follow. One thread calls this at a time.
    pub fn take_settled(&self, requests: &Requests) -> Option<Batch> {
        let mut lists = lock(&self.lists);
        if lists.waiting.is_none() && !lists.durable.is_empty() {
            let batch = std::mem::take(&mut lists.durable);
            lists.waiting = Some((GracePeriod::default(), batch));
        }
        lists
            .waiting
            .take_if(|(period, _)| requests.is_over(period))
            .map(|(_, batch)| batch)
    }

    /// `batch` is in use again, or free.
    pub fn finished(&self, batch: &Batch) {
        // In this order: whoever finds that there are none left sees that they have come back.
        self.returned.fetch_add(batch.len(), Ordering::Release);
        self.count.fetch_sub(batch.len(), Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn clusters_come_back_after_write_back_and_the_last_request() {
        let (retired, requests) = (Retired::default(), Requests::default());
        let running = requests.begin();
        retired.add(0..512);
        retired.add(512..1024);
        retired.add(4096..4608);
        assert_eq!(
            retired.take_settled(&requests),
            None,
            "still mapped on disk"
        );

        let batch = retired.take_unmapped();
        let clusters = |range| Freed::Clusters(range);
        assert_eq!(batch, [clusters(0..1024), clusters(4096..4608)]);
        retired.put_back(batch);
        let batch = retired.take_unmapped();
        retired.add(8192..8704);
        retired.written(batch.clone());
        assert_eq!(retired.take_settled(&requests), None, "still in use");
        drop(running);
        assert_eq!(retired.take_settled(&requests).as_ref(), Some(&batch));
        retired.finished(&batch);
        assert!(!retired.is_empty());
        assert_eq!(retired.take_settled(&requests), None);
        assert!(retired.take_unmapped().contains(&clusters(8192..8704)));
    }
}
