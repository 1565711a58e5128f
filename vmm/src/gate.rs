//! The way into the guest, which is closed while the VM is paused.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use vmm_sys_util::signal;

use crate::exit::Exit;

/// How long a CPU that was told to leave the guest may take until it is told again.
pub(crate) const KICK_INTERVAL: Duration = Duration::from_millis(2);

/// Where the threads of CPUs go in and out: inside they run the guest, or serve what it asks of a
/// device in its memory.
pub(crate) struct Gate {
    exit: Arc<Exit>,
    /// Changes while `inside` is locked; CPUs look at it before each entry into the guest.
    is_closed: AtomicBool,
    /// The threads that are inside. Each one removes itself before it ends.
    inside: Mutex<Vec<libc::pthread_t>>,
    changed: Condvar,
}

impl Gate {
    /// An open gate, which lets everybody pass when `exit` has ended: nobody enters a guest then.
    pub(crate) fn new(exit: Arc<Exit>) -> Self {
        Self {
            exit,
            is_closed: AtomicBool::new(false),
            inside: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Carries out `body` on this thread, which is inside, but for what it does
    /// [`outside`](Self::outside).
    pub(crate) fn inside(&self, body: impl FnOnce()) {
        struct Leave<'a>(&'a Gate);
        impl Drop for Leave<'_> {
            fn drop(&mut self) {
                self.0.leave();
            }
        }
        self.enter();
        // Also in a panic.
        let _leave = Leave(self);
        body();
    }

    /// Carries out `body` outside, and waits there until the gate is open. Returns whether it was
    /// closed meanwhile.
    pub(crate) fn outside(&self, body: impl FnOnce()) -> bool {
        self.leave();
        body();
        self.enter()
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Closes the gate. On return no thread is inside, unless the VM has ended.
    ///
    /// A signal brings threads out of the guest. One that arrives just before they enter it has no
    /// effect; so it is repeated.
    pub(crate) fn close(&self) {
        let mut inside = self.lock();
        self.is_closed.store(true, Ordering::Release);
        while !inside.is_empty() && !self.exit.has_ended() {
            for thread in &*inside {
                // SAFETY: the thread has not ended, for it would first remove itself from the list,
                // which is locked; its signal has a handler, which was there before the CPUs.
                unsafe { libc::pthread_kill(*thread, signal::SIGRTMIN()) };
            }
            let waited = self.changed.wait_timeout(inside, KICK_INTERVAL);
            inside = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Opens the gate.
    pub(crate) fn open(&self) {
        let _inside = self.lock();
        self.is_closed.store(false, Ordering::Release);
        self.changed.notify_all();
    }

    /// Has those who wait look at the end of the VM.
    pub(crate) fn wake(&self) {
        let _inside = self.lock();
        self.changed.notify_all();
    }

    fn enter(&self) -> bool {
        let mut inside = self.lock();
        let is_closed = self.is_closed();
        while self.is_closed() && !self.exit.has_ended() {
            let waited = self.changed.wait(inside);
            inside = waited.unwrap_or_else(PoisonError::into_inner);
        }
        inside.push(this_thread());
        is_closed
    }

    fn leave(&self) {
        let thread = this_thread();
        self.lock().retain(|inside| *inside != thread);
        if self.is_closed() {
            self.changed.notify_all();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Vec<libc::pthread_t>> {
        self.inside.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn this_thread() -> libc::pthread_t {
    // SAFETY: there is nothing that could go wrong.
    unsafe { libc::pthread_self() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::ExitReason;
    use crate::vcpu::install_kick_handler;
    use std::sync::atomic::AtomicU64;
    use std::thread;

    /// Threads that count while they are inside, and how often they were held up.
    fn with_counting(body: impl FnOnce(&Gate, &AtomicU64)) -> u64 {
        install_kick_handler().unwrap();
        let exit = Arc::new(Exit::new().unwrap());
        let gate = Gate::new(exit.clone());
        let (count, pauses) = (AtomicU64::new(0), AtomicU64::new(0));
        thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    gate.inside(|| {
                        while !exit.has_ended() {
                            count.fetch_add(1, Ordering::SeqCst);
                            if gate.is_closed() && gate.outside(|| ()) {
                                pauses.fetch_add(1, Ordering::SeqCst);
                            }
                        }
                    });
                });
            }
            body(&gate, &count);
            exit.end(Ok(ExitReason::Stopped));
            gate.wake();
        });
        assert!(gate.lock().is_empty());
        pauses.into_inner()
    }

    fn wait_for_more(count: &AtomicU64) {
        let before = count.load(Ordering::SeqCst);
        while count.load(Ordering::SeqCst) == before {
            thread::yield_now();
        }
    }

    #[test]
    fn nobody_is_inside_while_it_is_closed() {
        let pauses = with_counting(|gate, count| {
            for _ in 0..50 {
                wait_for_more(count);
                gate.close();
                let before = count.load(Ordering::SeqCst);
                assert!(gate.lock().is_empty());
                thread::yield_now();
                assert_eq!(count.load(Ordering::SeqCst), before);
                gate.open();
            }
        });
        assert!(pauses > 0);
    }

    #[test]
    fn the_end_frees_those_who_wait() {
        with_counting(|gate, count| {
            wait_for_more(count);
            gate.close();
        });
    }

    #[test]
    fn a_thread_outside_holds_nobody_up() {
        let exit = Arc::new(Exit::new().unwrap());
        let gate = Gate::new(exit);
        gate.inside(|| {
            let was_closed = gate.outside(|| {
                gate.close();
                gate.open();
            });
            assert!(!was_closed, "it was open again");
        });
    }
}
