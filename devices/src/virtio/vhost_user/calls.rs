//! Interrupts, as eventfds of the front end.
//!
//! A write to an eventfd that is full waits, unless it has been opened not to, and that the front end
//! can change at any time. So a signal goes only where there is room; and where a front end has outwitted
//! that, the device's thread waits until this module makes room itself, which it does before anybody
//! waits for that thread.

use std::os::fd::AsRawFd;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::sync::{Arc, Mutex, TryLockError};
use std::thread;
use std::time::Duration;

use vmm_sys_util::eventfd::EventFd;

use super::{lock, poll, pollfd};
use crate::virtio::Interrupt;

/// How often is looked for signals that do not end.
const LOOK: Duration = Duration::from_millis(5);

/// The front end can exchange an eventfd at any time, also while the device signals it.
pub(super) struct Calls {
    queues: Vec<QueueCalls>,
}

#[derive(Default)]
struct QueueCalls {
    used: Mutex<Option<Arc<Call>>>,
    broken: Mutex<Option<Arc<Call>>>,
}

impl Calls {
    pub(super) fn new(queues: usize) -> Self {
        Self {
            queues: (0..queues).map(|_| QueueCalls::default()).collect(),
        }
    }

    /// Sets what is signalled when buffers of queue `index` have been used. Returns whether there is
    /// such a queue.
    pub(super) fn set_used(&self, index: usize, event: Option<EventFd>) -> bool {
        let queue = self.queues.get(index);
        queue.is_some_and(|queue| {
            exchange(&queue.used, event);
            true
        })
    }

    /// Sets what is signalled when queue `index` is broken. Returns whether there is such a queue.
    pub(super) fn set_broken(&self, index: usize, event: Option<EventFd>) -> bool {
        let queue = self.queues.get(index);
        queue.is_some_and(|queue| {
            exchange(&queue.broken, event);
            true
        })
    }

    /// Forgets all of them.
    pub(super) fn clear(&self) {
        for queue in &self.queues {
            exchange(&queue.used, None);
            exchange(&queue.broken, None);
        }
    }

    /// Lets `action` signal, or wait for threads that do: none of them waits for the front end
    /// meanwhile.
    pub(super) fn keep_going<T>(&self, action: impl FnOnce() -> T) -> T {
        thread::scope(|scope| {
            let (end, ended) = mpsc::channel::<()>();
            let helper = thread::Builder::new().spawn_scoped(scope, move || {
                while ended.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                    self.make_room();
                }
            });
            // Without it all is as it should be, but for a front end that means harm.
            drop(helper);
            let result = action();
            drop(end);
            result
        })
    }

    fn make_room(&self) {
        let calls = self.queues.iter().flat_map(|q| [&q.used, &q.broken]);
        for call in calls.filter_map(|call| lock(call).clone()) {
            call.make_room();
        }
    }
}

impl Interrupt for Calls {
    fn signal_queue(&self, index: u16) {
        if let Some(queue) = self.queues.get(usize::from(index)) {
            signal(&queue.used);
        }
    }

    /// There is no message for that.
    fn signal_config(&self) {}

    /// The front end tells the driver.
    fn needs_reset(&self) {
        for queue in &self.queues {
            signal(&queue.broken);
        }
    }
}

fn signal(call: &Mutex<Option<Arc<Call>>>) {
    let call = lock(call).clone();
    if let Some(call) = call {
        call.signal();
    }
}

/// On return the old one is signalled no more.
fn exchange(call: &Mutex<Option<Arc<Call>>>, event: Option<EventFd>) {
    let old = std::mem::replace(
        &mut *lock(call),
        event.map(|event| Arc::new(Call::new(event))),
    );
    if let Some(old) = old {
        old.retire();
    }
}

struct Call {
    event: EventFd,
    /// Held by whom signals it.
    is_retired: Mutex<bool>,
    /// A write waits while the counter is full.
    may_block: bool,
}

impl Call {
    fn new(event: EventFd) -> Self {
        // SAFETY: the descriptor is open, and the call takes no pointer.
        let flags = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_GETFL) };
        Self {
            may_block: flags & libc::O_NONBLOCK == 0,
            is_retired: Mutex::new(false),
            event,
        }
    }

    fn signal(&self) {
        let is_retired = lock(&self.is_retired);
        if *is_retired || self.may_block && !self.has_room() {
            // As if it did not block: so many earlier signals still wait.
            return;
        }
        // Fails only if nobody has taken 2^64 - 2 earlier signals, which then still wait.
        let _ = self.event.write(1);
    }

    /// On return nobody signals it, not even who has taken it before.
    fn retire(&self) {
        loop {
            match self.is_retired.try_lock() {
                Ok(mut is_retired) => {
                    *is_retired = true;
                    return;
                }
                // A panic elsewhere: nobody holds it.
                Err(TryLockError::Poisoned(_)) => return,
                Err(TryLockError::WouldBlock) => self.make_room(),
            }
            thread::yield_now();
        }
    }

    fn has_room(&self) -> bool {
        let mut fds = [pollfd(&self.event, libc::POLLOUT)];
        poll(&mut fds, 0).is_ok() && fds[0].revents & libc::POLLOUT != 0
    }

    /// Takes the signals of a counter that is full. Nobody who takes signals has one.
    fn make_room(&self) {
        if self.has_room() {
            return;
        }
        let mut count = 0u64;
        let to = libc::iovec {
            iov_base: (&raw mut count).cast(),
            iov_len: size_of::<u64>(),
        };
        // Without waiting: the front end may have been quicker. An error is that, or is met again.
        // SAFETY: one valid entry, which names a variable that outlives the call.
        let _ = unsafe { libc::preadv2(self.event.as_raw_fd(), &to, 1, -1, libc::RWF_NOWAIT) };
    }
}
