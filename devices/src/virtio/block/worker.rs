//! The thread that serves a queue.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Scope};
use std::time::{Duration, Instant};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::engine::Source;
use super::poll::Poll;
use super::pool::{Completions, Pool};
use super::rate::Limiter;
use super::request::RequestError;
use super::slot::{Slot, Slots};
use super::stats::Stats;
use super::target::{Gather, Target};
use crate::GuestMemory;
use crate::virtio::Interrupt;
use crate::virtio::queue::{ActiveQueue, RingError};

/// Marks of the events.
const DOORBELL: u32 = 0;
const STOP: u32 = 1;
const DONE: u32 = 2;
const TIMER: u32 = 3;

/// So many requests are answered at the latest when they have been carried out, however many more
/// there are.
const MAX_UNANSWERED: usize = 16;

/// And so long after it has been answered, at the latest, a request can cause an interrupt. A driver
/// that sleeps is better woken once for all of them, and one that is awake looks for itself.
const MAX_UNTOLD: Duration = Duration::from_micros(100);

/// What all threads of an active device share.
pub(super) struct Context {
    pub mem: GuestMemory,
    pub interrupt: Arc<dyn Interrupt>,
    pub target: Target,
    pub stats: Arc<Stats>,
    pub limiter: Option<Arc<Limiter>>,
    /// How long a worker may look for requests before it waits for the doorbell.
    pub poll: Duration,
}

/// The request to end. The flag is looked at between requests, so that a driver which never lets
/// the queue run empty cannot hold the thread; the event ends the wait for the doorbell.
pub(super) struct Stop {
    flag: AtomicBool,
    event: EventFd,
}

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            flag: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        })
    }

    pub(super) fn request(&self) {
        self.flag.store(true, Ordering::Release);
        // Cannot fail: the counter is 0 before.
        let _ = self.event.write(1);
    }

    fn is_requested(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }
}

/// Why a queue cannot be served any more.
#[derive(Debug, thiserror::Error)]
enum WorkerError {
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A bug in the disk or the device. The request under way stays without an answer.
    #[error("internal error: the disk's thread panicked, and serves the guest only after a reset")]
    Panicked,
    #[error("events of a disk's queue: {0}")]
    Events(#[from] event_manager::Error),
    #[error("events of a disk's queue: {0}")]
    Host(#[from] io::Error),
}

/// How a worker reaches the other threads of its device.
#[derive(Clone, Copy)]
pub(super) struct Threads<'scope, 'env, 'm> {
    pub scope: &'scope Scope<'scope, 'env>,
    pub context: &'m Context,
    pub pool: &'scope Pool<'m>,
}

/// Serves a queue until it is to stop, and returns it with all requests completed that have been
/// taken from it. `None` if it cannot be served any more.
pub(super) fn run(threads: Threads<'_, '_, '_>, source: Source, stop: &Stop) -> Option<Source> {
    let Source {
        index,
        queue,
        doorbell,
    } = source;
    let mut queue = ActiveQueue::new(&threads.context.mem, queue);
    match serve(threads, index, &mut queue, &doorbell, stop) {
        Ok(Outcome::Stopped) => Some(Source {
            index,
            queue: queue.into_inner(),
            doorbell,
        }),
        Ok(Outcome::Failed) => None,
        Err(error) => {
            fail(threads.context, &error);
            None
        }
    }
}

/// How it ended.
enum Outcome {
    Stopped,
    /// The driver has been told before.
    Failed,
}

fn serve<'m>(
    threads: Threads<'_, '_, 'm>,
    index: u16,
    queue: &mut ActiveQueue<'m>,
    doorbell: &EventFd,
    stop: &Stop,
) -> Result<Outcome, WorkerError> {
    let done = Arc::new(Completions::new()?);
    // Dropped last, when nothing here touches the queue any more.
    let _guard = Guard {
        context: threads.context,
        done: &done,
    };
    let has_limit = threads.context.limiter.is_some();
    let timer = has_limit.then(TimerFd::new).transpose();
    let timer = timer.map_err(io::Error::from)?;
    let mut manager = EventManager::new_with_capacity(4)?;
    let timer_fd = timer.as_ref().map(AsRawFd::as_raw_fd);
    let id = manager.add_subscriber(Server {
        threads,
        index,
        queue,
        stop,
        done: Arc::clone(&done),
        timer,
        is_held_up: false,
        has_failed: false,
        poll: Poll::new(threads.context.poll),
        in_pool: 0,
        finished: Slots::new(),
        free: Slots::new(),
        told: Instant::now(),
        is_untold: false,
        gather: Gather::new(),
    });
    // An edge for each signal: the counters need not be read, which saves a system call each time.
    // What was signalled before also gives an edge here.
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    let mut events = manager.event_ops(id)?;
    events.add(Events::with_data(doorbell, DOORBELL, edge))?;
    events.add(Events::with_data(done.event(), DONE, edge))?;
    events.add(Events::with_data(&stop.event, STOP, EventSet::IN))?;
    if let Some(fd) = timer_fd {
        events.add(Events::with_data_raw(fd, TIMER, edge))?;
    }
    // The driver need not ring again for what it made available before.
    done.wake();
    while !stop.is_requested() {
        manager.run()?;
    }
    let mut server = manager.remove_subscriber(id)?;
    if server.has_failed {
        return Ok(Outcome::Failed);
    }
    server.finish()?;
    Ok(Outcome::Stopped)
}

/// Tells the driver that its requests stay without an answer.
fn fail(context: &Context, error: &WorkerError) {
    if let WorkerError::Ring(_) = error {
        context.stats.count_broken_ring();
    }
    context.stats.note_error(error);
    context.interrupt.needs_reset();
}

/// What the pool has of the queue uses guest memory, so the thread ends after it, however it ends.
/// Tells the driver if that is in a panic: it would wait for its requests for ever.
struct Guard<'a, 'm> {
    context: &'m Context,
    done: &'a Completions<'m>,
}

impl Drop for Guard<'_, '_> {
    fn drop(&mut self) {
        self.done.wait_until_idle();
        if thread::panicking() {
            fail(self.context, &WorkerError::Panicked);
        }
    }
}

/// Serves a queue whenever its doorbell rings, the pool has carried out requests of it, or the limit
/// on its rate allows more.
struct Server<'w, 'scope, 'env, 'm> {
    threads: Threads<'scope, 'env, 'm>,
    index: u16,
    queue: &'w mut ActiveQueue<'m>,
    stop: &'w Stop,
    done: Arc<Completions<'m>>,
    /// There where there is a limit on the rate.
    timer: Option<TimerFd>,
    /// The timer is to tell when the next request may be taken.
    is_held_up: bool,
    has_failed: bool,
    poll: Poll,
    /// Requests that have been handed to the pool and not collected.
    in_pool: usize,
    /// Requests that have been carried out and not answered.
    finished: Slots<'m>,
    /// When it was last looked at whether the driver wants an interrupt, or there was nothing to tell.
    told: Instant,
    /// Requests have been answered since.
    is_untold: bool,
    /// Places for requests to come.
    free: Slots<'m>,
    gather: Gather<'m>,
}

impl<'m> Server<'_, '_, '_, 'm> {
    /// Answers what the pool has carried out, and serves requests until there are none, with the
    /// doorbell off meanwhile.
    fn serve(&mut self) -> Result<(), WorkerError> {
        loop {
            self.queue.disable_doorbell()?;
            self.collect();
            self.answer()?;
            let taken = self.take_available();
            // Before any error: what has been carried out by now is answered.
            self.answer()?;
            self.tell()?;
            taken?;
            if self.stop.is_requested() || self.is_held_up {
                return Ok(());
            }
            if self.finds_more_by_polling()? {
                continue;
            }
            if !self.queue.enable_doorbell()? {
                return Ok(());
            }
        }
    }

    /// Carries out what is available now, or hands it to the pool.
    fn take_available(&mut self) -> Result<(), WorkerError> {
        let available = self.queue.available()?;
        self.is_held_up = false;
        if available == 0 {
            return Ok(());
        }
        let mut open = None;
        let taken = self.take_each(available, &mut open);
        if let Some(slot) = open {
            self.carry_out(slot)?;
        }
        taken
    }

    /// Takes up to `available` requests. `open` is the last one, which others may still join.
    fn take_each(
        &mut self,
        available: u16,
        open: &mut Option<Box<Slot<'m>>>,
    ) -> Result<(), WorkerError> {
        let context = self.threads.context;
        let now = Instant::now();
        if !self.is_untold {
            self.told = now;
        }
        for _ in 0..available {
            if self.stop.is_requested() || self.is_held_up(now)? {
                break;
            }
            let free = self.free.pop();
            let mut slot = free.unwrap_or_else(|| Box::new(Slot::new(now)));
            let Some(head) = self.queue.take(&mut slot.buffers)? else {
                self.free.push(slot);
                break;
            };
            slot.parse(head, &context.target.rules, now);
            if let Some(limiter) = &context.limiter {
                limiter.charge(now, slot.charged_bytes());
            }
            let Some(last) = open else {
                *open = Some(slot);
                continue;
            };
            match last.join(slot) {
                None => context.stats.count_merged(self.index),
                Some(slot) => {
                    let last = std::mem::replace(last, slot);
                    self.carry_out(last)?;
                }
            }
        }
        Ok(())
    }

    /// Whether the limit on the rate forbids to take a request. The timer then tells when to go on.
    fn is_held_up(&mut self, now: Instant) -> Result<bool, WorkerError> {
        let delay = self.threads.context.limiter.as_ref();
        let delay = delay.and_then(|limiter| limiter.delay(now));
        if let (Some(delay), Some(timer)) = (delay, &mut self.timer) {
            timer.reset(delay, None).map_err(io::Error::from)?;
            self.is_held_up = true;
        }
        Ok(self.is_held_up)
    }

    fn carry_out(&mut self, mut slot: Box<Slot<'m>>) -> Result<(), WorkerError> {
        let Threads {
            scope,
            context,
            pool,
        } = self.threads;
        if !context.target.try_now(&mut slot, &mut self.gather) {
            let requests = 1 + slot.joined.len() as u64;
            context.stats.count_handed_on(self.index, requests);
            self.in_pool += 1;
            pool.submit(scope, slot, &self.done);
            return Ok(());
        }
        self.finished.push(slot);
        if self.finished.len() < MAX_UNANSWERED {
            return Ok(());
        }
        self.answer()
    }

    /// Answers what has been carried out.
    fn answer(&mut self) -> Result<(), WorkerError> {
        if self.finished.is_empty() {
            return Ok(());
        }
        let now = Instant::now();
        let mut finished = std::mem::take(&mut self.finished);
        let mut completed = Ok(());
        for mut slot in finished.drain(..) {
            // A panic costs the requests of its call their answers, and the others nothing.
            if let Err(RequestError::Panicked) = slot.result {
                completed = Err(WorkerError::Panicked);
                continue;
            }
            self.complete(&mut slot, now)?;
            if !slot.joined.is_empty() {
                let mut joined = std::mem::take(&mut slot.joined);
                for mut slot in joined.drain(..) {
                    self.complete(&mut slot, now)?;
                    self.free.push(slot);
                }
                slot.joined = joined;
            }
            self.free.push(slot);
        }
        self.finished = finished;
        self.is_untold |= self.queue.publish()?;
        if now.saturating_duration_since(self.told) >= MAX_UNTOLD {
            self.tell()?;
            self.told = now;
        }
        completed
    }

    /// Interrupts the driver, if it wants that for what has been answered since the last time.
    fn tell(&mut self) -> Result<(), RingError> {
        if std::mem::take(&mut self.is_untold) && self.queue.wants_interrupt()? {
            self.threads.context.interrupt.signal_queue(self.index);
        }
        Ok(())
    }

    fn complete(&mut self, slot: &mut Slot<'m>, now: Instant) -> Result<(), RingError> {
        let stats = &self.threads.context.stats;
        if let Err(error) = &slot.result {
            stats.note_failure(error);
        }
        let written = slot.answer();
        self.queue.complete(slot.head, written)?;
        stats.count(self.index, slot, now.saturating_duration_since(slot.taken));
        Ok(())
    }

    /// Looks for requests for a while. Returns whether there are any.
    fn finds_more_by_polling(&mut self) -> Result<bool, RingError> {
        let Self {
            poll,
            queue,
            done,
            stop,
            in_pool,
            ..
        } = self;
        let is_done = || *in_pool > 0 && done.has_any();
        poll.run(|| Ok(queue.available()? > 0 || is_done() || stop.is_requested()))
    }

    /// Completes what has been handed to the pool. Nothing more is taken.
    fn finish(&mut self) -> Result<(), WorkerError> {
        self.done.wait_until_idle();
        self.collect();
        let answered = self.answer();
        self.tell()?;
        answered
    }

    fn collect(&mut self) {
        if self.in_pool > 0 {
            self.in_pool -= self.done.collect(&mut self.finished);
        }
    }
}

impl MutEventSubscriber for Server<'_, '_, '_, '_> {
    /// The events are added by the event loop, which can report an error.
    fn init(&mut self, _ops: &mut EventOps) {}

    fn process(&mut self, events: Events, _ops: &mut EventOps) {
        // Once it has failed, the queue is left alone until the driver has reset it.
        if events.data() == STOP || self.has_failed {
            return;
        }
        if let Err(error) = self.serve() {
            // What was taken before is answered as far as that is possible.
            let _ = self.finish();
            self.has_failed = true;
            fail(self.threads.context, &error);
        }
    }
}

#[cfg(test)]
mod tests;
