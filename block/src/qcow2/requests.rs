//! Which requests may still be using an old mapping.
//!
//! Reads of mapped clusters, and writes to them, take no lock. So when a cluster loses its mapping
//! another thread may be about to read or write it all the same, and it must not be used again
//! before that request has ended. Each request is counted while it runs; a [`GracePeriod`] tells
//! when every request that was running at its begin has ended, without waiting for later ones.

use crate::sync::atomic::{AtomicUsize, Ordering};
use std::cell::Cell;

/// Threads are spread over so many counters, lest they contend for one cache line. The model
/// checker has two readers.
const STRIPES: usize = if cfg!(loom) { 1 } else { 16 };

/// Counts running requests.
#[derive(Default)]
pub(crate) struct Requests {
    /// Its lowest bit says which of the two counters of a stripe new requests use.
    turn: AtomicUsize,
    stripes: [Stripe; STRIPES],
}

/// The running requests of some threads, by the turn they began in.
#[derive(Default)]
#[repr(align(128))]
struct Stripe([AtomicUsize; 2]);

/// A request that is running until this is dropped.
pub(crate) struct Running<'a>(&'a AtomicUsize);

/// Ends when all requests have that were running when it began.
#[derive(Default)]
pub(crate) struct GracePeriod {
    /// New requests use the other counter since this period turned them over.
    turned: bool,
}

thread_local! {
    static STRIPE: Cell<usize> = const { Cell::new(usize::MAX) };
}

/// The stripe of this thread.
fn stripe() -> usize {
    static NEXT: std::sync::atomic::AtomicUsize = std::sync::atomic::AtomicUsize::new(0);
    STRIPE.with(|stripe| {
        if stripe.get() == usize::MAX {
            stripe.set(NEXT.fetch_add(1, Ordering::Relaxed) % STRIPES);
        }
        stripe.get()
    })
}

impl Requests {
    /// A request begins. It must not look at a mapping earlier.
    pub fn begin(&self) -> Running<'_> {
        let turn = self.turn.load(Ordering::Relaxed) & 1;
        let counter = &self.stripes[stripe()].0[turn];
        // Acquires what `is_idle` released, if that came first and missed this request: then the
        // request sees every mapping as it was when the period began.
        counter.fetch_add(1, Ordering::AcqRel);
        Running(counter)
    }

    /// Whether `period` is over. One thread at a time asks, about one period at a time; the first
    /// question begins the period.
    pub fn is_over(&self, period: &mut GracePeriod) -> bool {
        let turn = self.turn.load(Ordering::Relaxed);
        if !period.turned {
            // Requests that took the idle counter's turn for the current one, before the last
            // period turned them over.
            if !self.is_idle(turn ^ 1) {
                return false;
            }
            self.turn.store(turn ^ 1, Ordering::Relaxed);
            period.turned = true;
        }
        self.is_idle(self.turn.load(Ordering::Relaxed) ^ 1)
    }

    fn is_idle(&self, turn: usize) -> bool {
        // Adding nothing orders this with every `begin` and end of the counter, either way round.
        self.stripes
            .iter()
            .all(|stripe| stripe.0[turn & 1].fetch_add(0, Ordering::AcqRel) == 0)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Release);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_period_waits_for_earlier_requests_only() {
        let requests = Requests::default();
        let earlier = requests.begin();
        let mut period = GracePeriod::default();
        assert!(!requests.is_over(&mut period));
        let _later = requests.begin();
        assert!(!requests.is_over(&mut period));
        drop(earlier);
        assert!(requests.is_over(&mut period));

        let mut next = GracePeriod::default();
        assert!(!requests.is_over(&mut next), "the later request is running");
    }

    #[test]
    fn periods_follow_each_other() {
        let requests = Requests::default();
        for _ in 0..5 {
            let running = requests.begin();
            let mut period = GracePeriod::default();
            assert!(!requests.is_over(&mut period));
            drop(running);
            assert!(requests.is_over(&mut period));
        }
        assert!(requests.is_over(&mut GracePeriod::default()));
    }

    /// A request that has read the turn and is counted only after it changed is waited for by the
    /// period after the next.
    #[test]
    fn a_late_count_is_not_lost() {
        let requests = Requests::default();
        assert!(requests.is_over(&mut GracePeriod::default()));
        let late = &requests.stripes[STRIPES - 1].0[0];
        late.fetch_add(1, Ordering::AcqRel);
        let mut period = GracePeriod::default();
        assert!(!requests.is_over(&mut period));
        late.fetch_sub(1, Ordering::AcqRel);
        assert!(requests.is_over(&mut period));
    }
}

/// The model checker runs these in the orders of events that the memory model allows, the first with
/// up to three preemptions. All threads use one stripe.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::cell::UnsafeCell;
    use loom::sync::Arc;
    use loom::thread;

    /// Clusters, each used by its mapping until that is gone, and then by somebody else.
    struct Disk {
        requests: Requests,
        unmapped: [AtomicUsize; 2],
        /// What the clusters hold; the model checker tells if it is written while it is read.
        clusters: [UnsafeCell<u8>; 2],
    }

    impl Default for Disk {
        fn default() -> Self {
            Self {
                requests: Requests::default(),
                unmapped: Default::default(),
                clusters: [UnsafeCell::new(0), UnsafeCell::new(0)],
            }
        }
    }

    impl Disk {
        /// A request to `cluster`, which looks the mapping up and uses what it found.
        fn access(&self, cluster: usize) {
            let _running = self.requests.begin();
            if self.unmapped[cluster].load(Ordering::Acquire) == 0 {
                // SAFETY: whoever writes waits for this request. That is what is examined.
                let seen = self.clusters[cluster].with(|cluster| unsafe { *cluster });
                assert_eq!(seen, 0);
            }
        }

        fn discard(&self, cluster: usize) {
            self.unmapped[cluster].store(1, Ordering::Release);
            let mut period = GracePeriod::default();
            while !self.requests.is_over(&mut period) {
                thread::yield_now();
            }
            // SAFETY: nobody who could read it is left. That is what is examined.
            self.clusters[cluster].with_mut(|cluster| unsafe { *cluster = 1 });
        }
    }

    #[test]
    fn loom_no_request_meets_a_reused_cluster() {
        let mut model = loom::model::Builder::new();
        model.preemption_bound = Some(3);
        model.check(|| {
            let disk = Arc::new(Disk::default());
            let readers = [0, 1].map(|_| {
                let disk = disk.clone();
                thread::spawn(move || disk.access(0))
            });
            disk.discard(0);
            for reader in readers {
                reader.join().unwrap();
            }
        });
    }

    /// The second period waits for those that the first need not wait for.
    #[test]
    fn loom_two_periods_in_a_row() {
        loom::model(|| {
            let disk = Arc::new(Disk::default());
            let reader = thread::spawn({
                let disk = disk.clone();
                move || {
                    disk.access(1);
                    disk.access(1);
                }
            });
            disk.discard(0);
            disk.discard(1);
            reader.join().unwrap();
        });
    }
}
