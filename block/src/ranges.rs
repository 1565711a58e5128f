//! Exclusive access to ranges of a disk's clusters.

use std::ops::Range;
use std::sync::PoisonError;

use crate::sync::{Condvar, Mutex, lock};

/// Ranges of clusters that somebody has to himself.
///
/// Whoever changes the mapping of a cluster of a qcow2 image holds its range from before looking at
/// the mapping until after the change, data I/O included; and so does who keeps the content of a
/// granule for a backup. Requests to other clusters do not wait.
#[derive(Default)]
pub(crate) struct RangeLocks {
    state: Mutex<State>,
    released: Condvar,
}

#[derive(Default)]
struct State {
    held: Vec<Range<u64>>,
    /// Threads that wait: to wake none is a system call, too.
    waiting: usize,
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
        let mut state = lock(&self.state);
        while state
            .held
            .iter()
            .any(|r| r.start < range.end && range.start < r.end)
        {
            state.waiting += 1;
            state = self
                .released
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
            state.waiting -= 1;
        }
        state.held.push(range.clone());
        RangeGuard { locks: self, range }
    }
}

impl Drop for RangeGuard<'_> {
    fn drop(&mut self) {
        let mut state = lock(&self.locks.state);
        if let Some(i) = state.held.iter().position(|r| *r == self.range) {
            state.held.swap_remove(i);
        }
        let is_awaited = state.waiting > 0;
        drop(state);
        if is_awaited {
            self.locks.released.notify_all();
        }
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
        assert_eq!(lock(&locks.state).held.len(), 1);
    }
}

/// The model checker runs this with every order of events that the memory model allows.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use crate::sync::atomic::{AtomicUsize, Ordering};
    use loom::sync::Arc;
    use loom::thread;

    /// Two writers and a discard on one cluster: the writers agree on a place unless the discard
    /// came between them, and no place is used twice or lost.
    #[test]
    fn loom_two_writers_and_a_discard() {
        loom::model(|| {
            #[derive(Default)]
            struct Disk {
                ranges: RangeLocks,
                mapping: AtomicUsize,
                allocated: AtomicUsize,
                retired: AtomicUsize,
            }
            let disk = Arc::new(Disk::default());
            let writers = [0, 1].map(|_| {
                let disk = disk.clone();
                thread::spawn(move || {
                    let _held = disk.ranges.lock(7..8);
                    if disk.mapping.load(Ordering::Relaxed) == 0 {
                        let place = disk.allocated.fetch_add(1, Ordering::Relaxed) + 1;
                        disk.mapping.store(place, Ordering::Relaxed);
                    }
                })
            });
            {
                let _held = disk.ranges.lock(6..8);
                if disk.mapping.swap(0, Ordering::Relaxed) != 0 {
                    disk.retired.fetch_add(1, Ordering::Relaxed);
                }
            }
            for writer in writers {
                writer.join().unwrap();
            }
            let mapped = usize::from(disk.mapping.load(Ordering::Relaxed) != 0);
            let allocated = disk.allocated.load(Ordering::Relaxed);
            assert_eq!(allocated, mapped + disk.retired.load(Ordering::Relaxed));
        });
    }
}
