//! The thread that serves a queue.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use tandem_block::Error;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::Stats;
use super::request::{RequestError, Target};
use crate::GuestMemory;
use crate::virtio::Interrupt;
use crate::virtio::buffers::Buffers;
use crate::virtio::queue::{ActiveQueue, RingError};

/// Index of the only queue.
const QUEUE: u16 = 0;

/// Marks of the two events.
const DOORBELL: u32 = 0;
const STOP: u32 = 1;

/// What a worker needs.
pub(super) struct Job {
    pub mem: GuestMemory,
    pub queue: Queue,
    pub doorbell: EventFd,
    pub interrupt: Arc<dyn Interrupt>,
    pub target: Target,
    pub stats: Arc<Stats>,
}

/// A running thread. Dropping it stops the thread and waits for the request under way.
pub(super) struct Worker {
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

/// The request to end. The flag is looked at between requests, so that a driver which never lets
/// the queue run empty cannot hold the thread; the event ends the wait for the doorbell.
struct Stop {
    flag: AtomicBool,
    event: EventFd,
}

impl Worker {
    pub(super) fn spawn(job: Job) -> io::Result<Self> {
        let stop = Arc::new(Stop {
            flag: AtomicBool::new(false),
            event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
        });
        let thread = thread::Builder::new()
            .name("virtio-blk".to_owned())
            .spawn({
                let stop = Arc::clone(&stop);
                move || run(job, &stop)
            })?;
        Ok(Self {
            stop,
            thread: Some(thread),
        })
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.stop.flag.store(true, Ordering::Release);
        // Cannot fail: the counter is 0 before.
        let _ = self.stop.event.write(1);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported on the thread itself; either way it is gone.
            let _ = thread.join();
        }
    }
}

impl Stop {
    fn is_requested(&self) -> bool {
        self.flag.load(Ordering::Acquire)
    }
}

fn run(job: Job, stop: &Stop) {
    let Job {
        mem,
        queue,
        doorbell,
        interrupt,
        target,
        stats,
    } = job;
    // Dropped last, when nothing touches the queue any more.
    let _guard = PanicGuard {
        interrupt: &*interrupt,
        stats: &stats,
    };
    let server = Server {
        queue: ActiveQueue::new(&mem, queue),
        buffers: Buffers::new(),
        interrupt: &*interrupt,
        target,
        stats: &stats,
        stop,
    };
    if let Err(error) = run_event_loop(server, &doorbell, stop) {
        stats.note_error(&error);
        interrupt.needs_reset();
    }
}

/// A bug in the disk or the device. The request under way stays without an answer.
#[derive(Debug, thiserror::Error)]
#[error("internal error: the disk's thread panicked, and serves the guest only after a reset")]
struct Panicked;

/// Tells the driver when the thread ends in a panic: it would wait for its requests for ever.
struct PanicGuard<'w> {
    interrupt: &'w dyn Interrupt,
    stats: &'w Stats,
}

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.stats.note_error(&Panicked);
            self.interrupt.needs_reset();
        }
    }
}

fn run_event_loop(
    server: Server<'_>,
    doorbell: &EventFd,
    stop: &Stop,
) -> event_manager::Result<()> {
    let mut manager = EventManager::new_with_capacity(2)?;
    let id = manager.add_subscriber(server);
    let mut events = manager.event_ops(id)?;
    // An edge for each signal: the counter need not be read, which saves a system call for each
    // doorbell. What was signalled before also gives an edge here.
    let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
    events.add(Events::with_data(doorbell, DOORBELL, edge))?;
    events.add(Events::with_data(&stop.event, STOP, EventSet::IN))?;
    while !stop.is_requested() {
        manager.run()?;
    }
    Ok(())
}

/// Serves a queue whenever its doorbell rings.
struct Server<'w> {
    queue: ActiveQueue<'w>,
    buffers: Buffers<'w>,
    interrupt: &'w dyn Interrupt,
    target: Target,
    stats: &'w Stats,
    stop: &'w Stop,
}

impl MutEventSubscriber for Server<'_> {
    /// The events are added by the event loop, which can report an error.
    fn init(&mut self, _ops: &mut EventOps) {}

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() != DOORBELL {
            return;
        }
        if let Err(error) = self.drain() {
            self.stats.count_broken_ring();
            self.stats.note_error(&error);
            // No doorbell counts any more. Should this fail, the next one finds the same error.
            let _ = ops.remove(events);
            self.interrupt.needs_reset();
        }
    }
}

impl Server<'_> {
    /// Serves requests until there are none, with the doorbell off meanwhile.
    fn drain(&mut self) -> Result<(), RingError> {
        loop {
            self.queue.disable_doorbell()?;
            let completed = self.serve_batch()?;
            if completed && self.queue.wants_interrupt()? {
                self.interrupt.signal_queue(QUEUE);
            }
            if self.stop.is_requested() || !self.queue.enable_doorbell()? {
                return Ok(());
            }
        }
    }

    /// Serves what is available now; what comes later gets an interrupt of its own. Returns
    /// whether that was anything.
    fn serve_batch(&mut self) -> Result<bool, RingError> {
        let mut completed = false;
        for _ in 0..self.queue.available()? {
            if self.stop.is_requested() {
                break;
            }
            let Some(head) = self.queue.take(&mut self.buffers)? else {
                break;
            };
            let outcome = self.target.serve(&mut self.buffers);
            self.queue.complete(head, outcome.used_len)?;
            completed = true;
            if let Some(error) = outcome.error {
                self.record(&error);
            }
        }
        Ok(completed)
    }

    #[cold]
    fn record(&self, error: &RequestError) {
        match error {
            RequestError::NoStatusByte => return self.stats.count_request_without_status(),
            RequestError::Disk(Error::OutOfRange { .. } | Error::ReadOnly) => {}
            RequestError::Disk(error) => self.stats.note_error(error),
            _ => {}
        }
        self.stats.count_failed_request();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::time::Duration;

    use tandem_block::{Disk, Limits, Result};
    use vm_memory::{Bytes, GuestAddress, VolatileSlice};

    use super::*;
    use crate::test_common::disk::MemoryDisk;
    use crate::test_common::guest_memory;
    use crate::test_common::ring::{Ring, readable, writable};

    struct PanickingDisk(MemoryDisk);

    impl Disk for PanickingDisk {
        fn size(&self) -> u64 {
            self.0.size()
        }

        fn limits(&self) -> Limits {
            self.0.limits()
        }

        fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
            panic!("a bug in the disk");
        }

        fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
            self.0.write_at(bufs, offset)
        }

        fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
            self.0.write_zeroes(offset, len, unmap)
        }

        fn discard(&self, offset: u64, len: u64) -> Result<()> {
            self.0.discard(offset, len)
        }

        fn flush(&self) -> Result<()> {
            self.0.flush()
        }
    }

    #[derive(Debug, PartialEq)]
    enum Signal {
        Queue,
        Config,
        NeedsReset,
    }

    impl Interrupt for mpsc::SyncSender<Signal> {
        fn signal_queue(&self, _index: u16) {
            self.send(Signal::Queue).unwrap();
        }

        fn signal_config(&self) {
            self.send(Signal::Config).unwrap();
        }

        fn needs_reset(&self) {
            self.send(Signal::NeedsReset).unwrap();
        }
    }

    #[test]
    fn panic_needs_a_reset() {
        let mem = guest_memory();
        let mut ring = Ring::new(&mem, 0, 16);
        // A header of zeroes: a read at the start of the disk.
        mem.write_slice(&[0; 16], GuestAddress(0x1_0000)).unwrap();
        ring.offer_chain(&[readable(0x1_0000, 16), writable(0x2_0000, 513)]);
        let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
        doorbell.write(1).unwrap();
        let (sender, signals) = mpsc::sync_channel(8);
        let stats = Arc::new(Stats::default());
        let disk = Arc::new(PanickingDisk(MemoryDisk::new(1)));
        let worker = Worker::spawn(Job {
            mem,
            queue: ring.queue(false),
            doorbell,
            interrupt: Arc::new(sender),
            target: Target::new(disk, None, 0),
            stats: Arc::clone(&stats),
        });
        let signal = signals.recv_timeout(Duration::from_secs(60));
        assert_eq!(signal, Ok(Signal::NeedsReset));
        drop(worker.unwrap());
        assert_eq!(signals.recv(), Err(mpsc::RecvError));
        assert_eq!(ring.used_idx(), 0);
        assert!(stats.last_error().unwrap().contains("panicked"));
    }
}
