//! Interrupts, as eventfds of the front end.

use std::sync::Mutex;

use vmm_sys_util::eventfd::EventFd;

use super::lock;
use crate::virtio::Interrupt;

/// The front end can exchange an eventfd at any time, also while the device signals it.
pub(super) struct Calls {
    queues: Vec<QueueCalls>,
}

#[derive(Default)]
struct QueueCalls {
    used: Mutex<Option<EventFd>>,
    broken: Mutex<Option<EventFd>>,
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
            *lock(&queue.used) = event;
            true
        })
    }

    /// Sets what is signalled when queue `index` is broken. Returns whether there is such a queue.
    pub(super) fn set_broken(&self, index: usize, event: Option<EventFd>) -> bool {
        let queue = self.queues.get(index);
        queue.is_some_and(|queue| {
            *lock(&queue.broken) = event;
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

fn signal(event: &Mutex<Option<EventFd>>) {
    if let Some(event) = &*lock(event) {
        // Fails only if nobody has taken 2^64 - 2 earlier signals, which then still wait.
        let _ = event.write(1);
    }
}
