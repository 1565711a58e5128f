//! Interrupts, as eventfds of the front end.

use std::os::fd::AsRawFd;
use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use super::{lock, poll, pollfd};
use crate::virtio::Interrupt;

/// The front end can exchange an eventfd at any time, also while the device signals it.
pub(super) struct Calls {
    queues: Vec<QueueCalls>,
}

#[derive(Default)]
struct QueueCalls {
    used: Mutex<Option<Call>>,
    broken: Mutex<Option<Call>>,
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
            *lock(&queue.used) = event.map(Call::new);
            true
        })
    }

    /// Sets what is signalled when queue `index` is broken. Returns whether there is such a queue.
    pub(super) fn set_broken(&self, index: usize, event: Option<EventFd>) -> bool {
        let queue = self.queues.get(index);
        queue.is_some_and(|queue| {
            *lock(&queue.broken) = event.map(Call::new);
            true
        })
    }

    /// Forgets all of them.
    pub(super) fn clear(&self) {
        for queue in &self.queues {
            *lock(&queue.used) = None;
            *lock(&queue.broken) = None;
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

fn signal(call: &Mutex<Option<Call>>) {
    if let Some(call) = &*lock(call) {
        call.signal();
    }
}

struct Call {
    event: EventFd,
    /// A write waits while the counter is full.
    may_block: bool,
}

impl Call {
    fn new(event: EventFd) -> Self {
        // SAFETY: the descriptor is open, and the call takes no pointer.
        let flags = unsafe { libc::fcntl(event.as_raw_fd(), libc::F_GETFL) };
        Self {
            may_block: flags & libc::O_NONBLOCK == 0,
            event,
        }
    }

    fn signal(&self) {
        if self.may_block && !self.has_room() {
            // As if it did not block: so many earlier signals still wait.
            return;
        }
        // Fails only if nobody has taken 2^64 - 2 earlier signals, which then still wait.
        let _ = self.event.write(1);
    }

    fn has_room(&self) -> bool {
        let mut fds = [pollfd(&self.event, libc::POLLOUT)];
        poll(&mut fds, 0).is_ok() && fds[0].revents & libc::POLLOUT != 0
    }
}
