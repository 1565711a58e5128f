//! What has gone wrong on a disk, for whoever operates it.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};

/// Counters of failures. A guest can cause any number of them, so they are counted, not logged.
///
/// Counting starts when the device is made and goes on across resets.
#[derive(Debug, Default)]
pub struct Stats {
    failed_requests: AtomicU64,
    requests_without_status: AtomicU64,
    broken_rings: AtomicU64,
    last_error: Mutex<Option<String>>,
}

impl Stats {
    /// Requests that were answered with an error status.
    pub fn failed_requests(&self) -> u64 {
        self.failed_requests.load(Ordering::Relaxed)
    }

    /// Requests that had no byte for a status.
    pub fn requests_without_status(&self) -> u64 {
        self.requests_without_status.load(Ordering::Relaxed)
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

    pub(super) fn count_failed_request(&self) {
        self.failed_requests.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_request_without_status(&self) {
        self.requests_without_status.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn count_broken_ring(&self) {
        self.broken_rings.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn note_error(&self, error: &dyn std::error::Error) {
        *self.lock() = Some(error.to_string());
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<String>> {
        self.last_error
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}
