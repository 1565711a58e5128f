//! Exclusive access to ranges of guest clusters.

use std::ops::Range;
use std::sync::{Condvar, Mutex, PoisonError};

use crate::sync::lock;

/// Ranges of guest clusters whose mapping is being changed.
///
/// Whoever changes the mapping of a cluster holds its range from before looking at the mapping
/// until after the change, data I/O included. Requests to other clusters do not wait.
#[derive(Default)]
pub(crate) struct RangeLocks {
    held: Mutex<Vec<Range<u64>>>,
    released: Condvar,
}

/// A range held by the current thread until dropped.
pub(crate) struct RangeGuard<'a> {
    locks: &'a RangeLocks,
    range: Range<u64>,
}

impl RangeLocks {
    /// Waits until nobody holds a cluster of `range`, and takes it. A thread holds one range at a
    /// time.
    pub fn lock(&self, range: Range<u64>) -> RangeGuard<'_> {
        let mut held = lock(&self.held);
        while held
            .iter()
            .any(|r| r.start < range.end && range.start < r.end)
        {
            held = self
                .released
                .wait(held)
                .unwrap_or_else(PoisonError::into_inner);
        }
        held.push(range.clone());
        RangeGuard { locks: self, range }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut held = lock(&self.locks.held);
        if let Some(i) = held.iter().position(|r| *r == self.range) {
            held.swap_remove(i);
        }
        drop(held);
        self.locks.released.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Duration;

    #[test]
    fn overlapping_ranges_exclude_each_other() {
        let locks = RangeLocks::default();
        let second = AtomicBool::new(false);
        let first = locks.lock(3..6);
        let _elsewhere = locks.lock(6..9);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let _held = locks.lock(5..6);
                second.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(30));
            assert!(!second.load(Ordering::SeqCst));
            drop(first);
        });
        assert!(second.load(Ordering::SeqCst));
        assert_eq!(lock(&locks.held).len(), 1);
    }
}
