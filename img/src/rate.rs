//! A limit to how fast an image is written.

use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

/// So many bytes per second.
pub struct Rate {
    bytes_per_second: u64,
    /// When what has been written so far is done, at that rate.
    done: Mutex<Instant>,
}

impl Rate {
    /// `bytes_per_second` is not 0.
    pub fn new(bytes_per_second: u64) -> Self {
        Self {
            bytes_per_second,
            done: Mutex::new(Instant::now()),
        }
    }

    /// Waits until `bytes` more may be written.
    pub fn wait(&self, bytes: u64) {
        // Waiting threads go on one after another.
        let mut done = self.done.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        std::thread::sleep(done.saturating_duration_since(now));
        let seconds = bytes as f64 / self.bytes_per_second as f64;
        let took = Duration::try_from_secs_f64(seconds).unwrap_or(Duration::MAX);
        *done = done.max(now).checked_add(took).unwrap_or(now);
    }
}
