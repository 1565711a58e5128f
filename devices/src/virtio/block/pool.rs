//! The threads that carry out requests which have to wait for a device.

use std::collections::VecDeque;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{Builder, Scope};

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::request::RequestError;
use super::slot::{Slot, Slots};
use super::target::{Gather, Target};

/// Requests of one disk, and the threads that wait for them.
pub(super) struct Pool<'m> {
    target: &'m Target,
    max_threads: usize,
    state: Mutex<State<'m>>,
    /// There is work, or there will be none any more.
    changed: Condvar,
}

#[derive(Default)]
struct State<'m> {
    jobs: VecDeque<Job<'m>>,
    threads: usize,
    idle: usize,
    is_closed: bool,
}

struct Job<'m> {
    slot: Box<Slot<'m>>,
    done: Arc<Completions<'m>>,
}

/// Requests of one queue that the pool has carried out, on their way back to the queue's worker.
pub(super) struct Completions<'m> {
    state: Mutex<Returned<'m>>,
    /// Nothing is left in the pool.
    idle: Condvar,
    event: EventFd,
}

#[derive(Default)]
struct Returned<'m> {
    slots: Slots<'m>,
    in_pool: usize,
}

impl<'m> Pool<'m> {
    /// At most `max_threads` threads, which are started as they are needed.
    pub(super) fn new(target: &'m Target, max_threads: usize) -> Self {
        Self {
            target,
            max_threads,
            state: Mutex::default(),
            changed: Condvar::new(),
        }
    }

    /// Has `slot`, and what has joined it, carried out and returned to `done`. Where no thread can be
    /// had, this one does it.
    pub(super) fn submit<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        slot: Box<Slot<'m>>,
        done: &Arc<Completions<'m>>,
    ) {
        lock(&done.state).in_pool += 1;
        let done = Arc::clone(done);
        let mut state = lock(&self.state);
        state.jobs.push_back(Job { slot, done });
        if state.jobs.len() > state.idle && state.threads < self.max_threads {
            let name = "virtio-blk-pool".to_owned();
            let thread = Builder::new().name(name).spawn_scoped(scope, || self.run());
            state.threads += usize::from(thread.is_ok());
        }
        if state.threads == 0 {
            if let Some(job) = state.jobs.pop_back() {
                drop(state);
                self.carry_out(job, &mut Gather::new());
            }
            return;
        }
        drop(state);
        self.changed.notify_one();
    }

    /// Lets the threads end, as nothing will be submitted any more.
    pub(super) fn close(&self) {
        lock(&self.state).is_closed = true;
        self.changed.notify_all();
    }

    fn run(&self) {
        let mut gather = Gather::new();
        let mut state = lock(&self.state);
        loop {
            if let Some(job) = state.jobs.pop_front() {
                drop(state);
                self.carry_out(job, &mut gather);
                state = lock(&self.state);
            } else if state.is_closed {
                return;
            } else {
                state.idle += 1;
                state = self
                    .changed
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner);
                state.idle -= 1;
            }
        }
    }

    fn carry_out(&self, job: Job<'m>, gather: &mut Gather<'m>) {
        let Job { mut slot, done } = job;
        // The queue's worker waits for each request that it has handed in. After a panic it answers
        // none and has the device reset.
        let outcome = catch_unwind(AssertUnwindSafe(|| {
            self.target.carry_out(&mut slot, gather);
        }));
        if outcome.is_err() {
            slot.result = Err(RequestError::Panicked);
        }
        done.push(slot);
    }
}

impl<'m> Completions<'m> {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            state: Mutex::default(),
            idle: Condvar::new(),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    /// Signalled when there is something to [`collect`](Self::collect).
    pub(super) fn event(&self) -> &EventFd {
        &self.event
    }

    /// Signals the event.
    pub(super) fn wake(&self) {
        // Cannot fail: nobody has signalled it 2^64 - 2 times.
        let _ = self.event.write(1);
    }

    pub(super) fn has_any(&self) -> bool {
        !lock(&self.state).slots.is_empty()
    }

    /// Moves what has been carried out to `slots`, and returns how many that is.
    pub(super) fn collect(&self, slots: &mut Slots<'m>) -> usize {
        let mut state = lock(&self.state);
        let count = state.slots.len();
        slots.append(&mut state.slots);
        count
    }

    /// Waits until nothing of the queue is left in the pool.
    pub(super) fn wait_until_idle(&self) {
        let state = lock(&self.state);
        let idle = self.idle.wait_while(state, |state| state.in_pool > 0);
        drop(idle.unwrap_or_else(PoisonError::into_inner));
    }

    fn push(&self, slot: Box<Slot<'m>>) {
        let mut state = lock(&self.state);
        state.slots.push(slot);
        state.in_pool -= 1;
        let (is_first, is_last) = (state.slots.len() == 1, state.in_pool == 0);
        drop(state);
        if is_last {
            self.idle.notify_all();
        }
        if is_first {
            self.wake();
        }
    }
}

/// A panic elsewhere leaves no list half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
