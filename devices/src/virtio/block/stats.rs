//! What a disk has done, and what has gone wrong on it, for whoever operates it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tandem_block::Error;

use super::request::{Operation, RequestError};
use super::slot::Slot;

/// Buckets of a histogram of latencies: the first is for less than a microsecond, each of the
/// others for less than twice as long as the one before, the last for all that is longer.
pub const LATENCY_BUCKETS: usize = 26;

/// Counters of a disk. Counting starts when the device is made and goes on across resets.
///
/// A guest can cause any number of failures, so they are counted, not logged.
#[derive(Debug)]
pub struct Stats {
    queues: Vec<QueueStats>,
    broken_rings: AtomicU64,
    last_error: Mutex<Option<String>>,
}

/// Counters of one queue. Only the thread that serves the queue changes them.
#[derive(Debug, Default)]
#[repr(align(128))]
struct QueueStats {
    counters: Counters<AtomicU64>,
}

/// What one queue has done since the device was made.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counters<T = u64> {
    /// Requests to read.
    pub reads: T,
    /// Requests to write.
    pub writes: T,
    /// Requests to flush.
    pub flushes: T,
    /// Requests to discard.
    pub discards: T,
    /// Requests to write zeroes.
    pub zeroes: T,
    /// Requests for the serial number.
    pub ids: T,
    /// Requests that make no sense, and fail; those without a byte for their status among them.
    pub invalid: T,
    /// Bytes read.
    pub read_bytes: T,
    /// Bytes written.
    pub written_bytes: T,
    /// Requests that were answered with an error status.
    pub failed: T,
    /// Requests that had no byte for a status.
    pub without_status: T,
    /// Requests that were carried out together with the one before, which they continue.
    pub merged: T,
    /// Requests that were handed to other threads, as they might have had to wait for a device.
    pub handed_on: T,
    /// How many requests took how long, from the queue to the answer: see [`LATENCY_BUCKETS`].
    pub latency: [T; LATENCY_BUCKETS],
}

impl Stats {
    pub(super) fn new(queues: u16) -> Self {
        Self {
            queues: (0..queues).map(|_| QueueStats::default()).collect(),
            broken_rings: AtomicU64::new(0),
            last_error: Mutex::default(),
        }
    }

    /// What each queue has done.
    pub fn queues(&self) -> Vec<Counters> {
        self.queues.iter().map(QueueStats::read).collect()
    }

    /// Requests that were answered with an error status.
    pub fn failed_requests(&self) -> u64 {
        self.queues().iter().map(|queue| queue.failed).sum()
    }

    /// Requests that had no byte for a status.
    pub fn requests_without_status(&self) -> u64 {
        self.queues().iter().map(|queue| queue.without_status).sum()
    }

    /// How often the driver broke a ring, so that the device needed a reset.
    pub fn broken_rings(&self) -> u64 {
        self.broken_rings.load(Ordering::Relaxed)
    }

    /// The last failure that is not simply a bad request: of the disk, of the host, of the device
    /// itself, or a broken ring.
    pub fn last_error(&self) -> Option<String> {
        self.lock().clone()
    }

    /// Counts a request of queue `index` that has been carried out, `latency` after it was taken.
    pub(super) fn count(&self, index: u16, slot: &Slot<'_>, latency: Duration) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            queue.count(slot, latency);
        }
    }

    /// Counts a request of queue `index` that goes with the one before.
    pub(super) fn count_merged(&self, index: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            add(&queue.counters.merged, 1);
        }
    }

    /// Counts requests of queue `index` that are handed to another thread.
    pub(super) fn count_handed_on(&self, index: u16, requests: u64) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            add(&queue.counters.handed_on, requests);
        }
    }

    pub(super) fn count_broken_ring(&self) {
        self.broken_rings.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_error(&self, error: &dyn std::error::Error) {
        *self.lock() = Some(error.to_string());
    }

    /// Notes why a request failed, unless it was simply bad.
    pub(super) fn note_failure(&self, error: &RequestError) {
        match error {
            RequestError::Disk(Error::OutOfRange { .. } | Error::ReadOnly) => {}
            RequestError::Disk(_) | RequestError::Panicked => self.note_error(error),
            _ => {}
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl QueueStats {
    fn count(&self, slot: &Slot<'_>, latency: Duration) {
        let counters = &self.counters;
        let kind = match slot.operation {
            Some(Operation::Read { .. }) => &counters.reads,
            Some(Operation::Write { .. }) => &counters.writes,
            Some(Operation::Flush) => &counters.flushes,
            Some(Operation::Discard) => &counters.discards,
            Some(Operation::WriteZeroes) => &counters.zeroes,
            Some(Operation::GetId) => &counters.ids,
            None => &counters.invalid,
        };
        add(kind, 1);
        match (&slot.result, slot.operation) {
            (Ok(_), Some(Operation::Read { len, .. })) => add(&counters.read_bytes, len),
            (Ok(_), Some(Operation::Write { len, .. })) => add(&counters.written_bytes, len),
            (Ok(_), _) => {}
            (Err(RequestError::NoStatusByte), _) => add(&counters.without_status, 1),
            (Err(_), _) => add(&counters.failed, 1),
        }
        if let Some(bucket) = counters.latency.get(bucket(latency)) {
            add(bucket, 1);
        }
    }

    fn read(&self) -> Counters {
        let counters = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let mut latency = [0; LATENCY_BUCKETS];
        for (to, from) in latency.iter_mut().zip(&counters.latency) {
            *to = get(from);
        }
        Counters {
            reads: get(&counters.reads),
            writes: get(&counters.writes),
            flushes: get(&counters.flushes),
            discards: get(&counters.discards),
            zeroes: get(&counters.zeroes),
            ids: get(&counters.ids),
            invalid: get(&counters.invalid),
            read_bytes: get(&counters.read_bytes),
            written_bytes: get(&counters.written_bytes),
            failed: get(&counters.failed),
            without_status: get(&counters.without_status),
            merged: get(&counters.merged),
            handed_on: get(&counters.handed_on),
            latency,
        }
    }
}

/// One thread at a time changes a counter, so it need not be locked on the bus.
fn add(counter: &AtomicU64, n: u64) {
    let value = counter.load(Ordering::Relaxed);
    counter.store(value.wrapping_add(n), Ordering::Relaxed);
}

fn bucket(latency: Duration) -> usize {
    let micros = u64::try_from(latency.as_micros()).unwrap_or(u64::MAX);
    let bits = u64::BITS - micros.leading_zeros();
    (bits as usize).min(LATENCY_BUCKETS - 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_double() {
        let bucket_of = |micros| bucket(Duration::from_micros(micros));
        assert_eq!(bucket(Duration::from_nanos(999)), 0);
        assert_eq!(
            [1, 2, 3, 4, 1023, 1024].map(bucket_of),
            [1, 2, 2, 3, 10, 11]
        );
        assert_eq!(bucket_of((1 << 24) - 1), 24);
        assert_eq!(bucket_of(1 << 24), LATENCY_BUCKETS - 1);
        assert_eq!(bucket_of(u64::MAX), LATENCY_BUCKETS - 1);
    }
}
