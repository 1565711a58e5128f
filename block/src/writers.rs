//! Writers of whole blocks beside writers of parts of blocks.
//!
//! Who writes a part of a block reads the rest and writes it back, so nobody else may write to the
//! block meanwhile. Who writes whole blocks only needs to keep out of the way of those, who are rare:
//! while there are none, that takes two atomic operations and no lock.

use std::ops::Range;
use std::sync::PoisonError;

use crate::sync::atomic::{AtomicUsize, Ordering, fence};
use crate::sync::{Condvar, Mutex, MutexGuard, lock};

/// Who writes to a file at the moment.
///
/// A writer of whole blocks counts itself in `unlisted`, then looks at `excluding`; if somebody is there,
/// it takes the count back and goes by the list. A writer of parts counts itself in `excluding`, then
/// waits until `unlisted` is zero. A fence between the two steps of each: of two that come at once, at
/// least one sees the other.
#[derive(Debug, Default)]
pub(crate) struct Writers {
    /// Writers of whole blocks that are not in the list.
    unlisted: AtomicUsize,
    /// Writers of parts of blocks, those that wait included.
    excluding: AtomicUsize,
    list: Mutex<Vec<Listed>>,
    /// Somebody has left the list, or `unlisted` has changed.
    changed: Condvar,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Listed {
    range: Range<u64>,
    is_exclusive: bool,
}

/// A write that goes on until this is dropped.
pub(crate) struct Writing<'a> {
    writers: &'a Writers,
    /// `None` for an unlisted one.
    listed: Option<Listed>,
}

impl Writers {
    /// Begins to write the whole blocks of `range`, beside others that do so.
    pub fn share(&self, range: Range<u64>) -> Writing<'_> {
        self.unlisted.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        if self.excluding.load(Ordering::Acquire) == 0 {
            return Writing {
                writers: self,
                listed: None,
            };
        }
        self.leave_unlisted();
        self.enter(Listed {
            range,
            is_exclusive: false,
        })
    }

    /// Begins to write in `range`, alone in each block that it touches: those must be in it.
    pub fn exclude(&self, range: Range<u64>) -> Writing<'_> {
        self.excluding.fetch_add(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        self.enter(Listed {
            range,
            is_exclusive: true,
        })
    }

    fn enter(&self, new: Listed) -> Writing<'_> {
        let mut list = lock(&self.list);
        while (new.is_exclusive && self.unlisted.load(Ordering::Acquire) > 0)
            || list.iter().any(|other| other.excludes(&new))
        {
            list = self.wait(list);
        }
        list.push(new.clone());
        Writing {
            writers: self,
            listed: Some(new),
        }
    }

    fn wait<'a>(&self, list: MutexGuard<'a, Vec<Listed>>) -> MutexGuard<'a, Vec<Listed>> {
        let woken = self.changed.wait(list);
        woken.unwrap_or_else(PoisonError::into_inner)
    }

    fn leave_unlisted(&self) {
        self.unlisted.fetch_sub(1, Ordering::AcqRel);
        fence(Ordering::SeqCst);
        if self.excluding.load(Ordering::Acquire) > 0 {
            // Whoever has seen the old count is waiting once the list can be locked.
            drop(lock(&self.list));
            self.changed.notify_all();
        }
    }
}

impl Listed {
    fn excludes(&self, other: &Self) -> bool {
        (self.is_exclusive || other.is_exclusive)
            && self.range.start < other.range.end
            && other.range.start < self.range.end
    }
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        let Some(listed) = &self.listed else {
            return self.writers.leave_unlisted();
        };
        let mut list = lock(&self.writers.list);
        if let Some(i) = list.iter().position(|other| other == listed) {
            list.swap_remove(i);
        }
        drop(list);
        if listed.is_exclusive {
            self.writers.excluding.fetch_sub(1, Ordering::AcqRel);
        }
        self.writers.changed.notify_all();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use std::time::Duration;

    /// Whether `second` begins while `first` goes on.
    fn together(first: (Range<u64>, bool), second: (Range<u64>, bool)) -> bool {
        let writers = Writers::default();
        let begin = |(range, is_exclusive): (Range<u64>, bool)| {
            if is_exclusive {
                writers.exclude(range)
            } else {
                writers.share(range)
            }
        };
        let done = std::sync::atomic::AtomicBool::new(false);
        let writing = begin(first);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                drop(begin(second));
                done.store(true, Ordering::SeqCst);
            });
            std::thread::sleep(Duration::from_millis(100));
            let began = done.load(Ordering::SeqCst);
            drop(writing);
            began
        })
    }

    #[test]
    fn writers_of_parts_are_alone() {
        assert!(together((0..8, false), (0..8, false)));
        assert!(!together((0..8, true), (4..8, false)));
        assert!(!together((4..8, true), (0..8, true)));
        assert!(together((0..8, true), (8..16, false)));
        assert!(together((0..8, true), (8..16, true)));
        // Those who are not in the list are waited for wherever they write.
        assert!(!together((0..8, false), (8..16, true)));
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;

    /// A block of two sectors, one a bit: one thread writes both, another the lower one only, by
    /// reading both and writing them back. The upper one must not go back to what it was.
    #[test]
    fn loom_nothing_is_written_back_over_a_write() {
        loom::model(|| {
            let writers = Arc::new(Writers::default());
            let block = Arc::new(AtomicUsize::new(0));
            let whole = {
                let (writers, block) = (Arc::clone(&writers), Arc::clone(&block));
                thread::spawn(move || {
                    let _writing = writers.share(0..2);
                    block.store(0b10, Ordering::Relaxed);
                })
            };
            {
                let _writing = writers.exclude(0..2);
                let old = block.load(Ordering::Relaxed);
                block.store(old | 0b01, Ordering::Relaxed);
            }
            whole.join().unwrap();
            assert_ne!(block.load(Ordering::Relaxed) & 0b10, 0);
        });
    }
}
