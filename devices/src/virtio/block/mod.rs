//! The block device (virtio 1.3, section 5.2).
//!
//! It serves reads, writes, flushes, discards, requests to write zeroes and the question for its
//! serial number.
//!
//! # Features
//! | feature | offered |
//! | --- | --- |
//! | `VERSION_1`, `INDIRECT_DESC`, `EVENT_IDX`, `RING_RESET` | always |
//! | `SEG_MAX` | always: as many buffers as a queue has descriptors for, less header and status |
//! | `GEOMETRY` | always; the disk has none, so it is made up |
//! | `BLK_SIZE`, `TOPOLOGY` | always, from the disk's [`Limits`](tandem_block::Limits) |
//! | `MQ` | always, with as many queues as [`Options`] tells |
//! | `RO` | for a disk that is read-only |
//! | `FLUSH`, `CONFIG_WCE` | for a disk with a write cache |
//! | `DISCARD`, `WRITE_ZEROES` | for a disk that is not read-only |
//!
//! To a driver that declines `FLUSH`, and to one that has chosen write-through by `CONFIG_WCE`,
//! every write is durable when it completes. A switch to write-through makes durable what was
//! written before; if that fails, the driver reads back that it is still write-back.
//!
//! Not offered are
//! * `SIZE_MAX`: buffers may be of any size;
//! * `SECURE_ERASE`: neither files nor most devices can promise that nothing of the data is left;
//! * `LIFETIME`, `ZONED`: an image neither wears out nor has zones;
//! * `NOTIFICATION_DATA`: the hypervisor tells doorbells by the value that is written, which would
//!   then differ each time, so that each would need an exit to user space;
//! * `IN_ORDER`: requests that wait are overtaken by those that do not;
//! * `RING_PACKED`: `virtio-queue` has split queues only;
//! * `ACCESS_PLATFORM`: there is no IOMMU, addresses are those of guest memory.
//!
//! # Threads
//! Each queue has a thread. It takes what the driver has made available, and does at once what need
//! not wait for a device ([`Disk::try_read_at`], [`Disk::try_write_at`]). The rest goes to a pool of
//! threads that all queues share ([`Options::threads`]), so that cold data does not stall hot, and
//! a queue has many requests under way although each takes a system call that waits. Requests may so
//! be answered in any order.
//!
//! Reads that follow one another in the queue and on the disk are carried out in one call, up to
//! 1 MiB and 128 buffers, and so are writes. Each gets a status of its own: where the call fails,
//! each is tried alone. Answers are shown to the driver when 16 calls have been made or there is
//! nothing left to do. Whether it wants an interrupt is looked at when there is nothing left to do, and
//! with an answer that is shown 100 µs or more after the last look.
//!
//! When a queue is stopped, by a reset of it or of the device, a [pause](Handle::pause) or its end,
//! requests that were taken are completed first, wherever they are.
//!
//! # What a malformed request gets
//! A request is two streams of bytes, one readable and one writable, however the driver cut them
//! into descriptors. The last writable byte is the status. Checks are made in the order of this
//! table; the first that fails decides.
//!
//! | the request | the driver gets |
//! | --- | --- |
//! | has no writable byte, or the last one lies outside guest memory | used length 0 and no status |
//! | has any other buffer outside guest memory | `IOERR` |
//! | has less than 16 readable bytes | `IOERR` |
//! | is of a type that is unknown or belongs to a feature not negotiated | `UNSUPP` |
//! | writes to a read-only disk | `IOERR` |
//! | has data in a direction that its type does not use | `IOERR` |
//! | has data that is not whole sectors of 512 bytes | `IOERR` |
//! | has a sector number whose offset in bytes exceeds 64 bits | `IOERR` |
//! | discards or zeroes with a list that is not of 1 to 32 whole segments | `IOERR` |
//! | has a segment with a flag that is reserved, or with "unmap" in a discard | `UNSUPP` |
//! | has a segment of more sectors than the configuration space allows, or out of 64 bits | `IOERR` |
//! | asks for the serial number with a buffer of less than 20 bytes | `IOERR` |
//! | does not lie within the disk, or fails there | `IOERR` |
//!
//! All segments are looked at before anything is discarded or zeroed: of a request with a bad one,
//! none has an effect. A transfer of no sectors within the disk succeeds, and a buffer may span regions
//! of guest memory. The used length counts the bytes written from the start of the writable stream
//! without a gap.
//!
//! # What breaks the ring
//! Where it is not clear which buffers the driver meant, no status can be given. The device then
//! sets `DEVICE_NEEDS_RESET`, raises a configuration interrupt, and leaves the queue alone until
//! the driver resets it; other queues go on. That is so for
//! * an available index further ahead than the queue is long,
//! * a head index outside the descriptor table,
//! * a head index that has been offered before, and whose chain has not been answered,
//! * a chain that leads out of its table, loops, or adds up to more than 2³² - 1 bytes,
//! * a chain of more than 256 descriptors,
//! * a readable descriptor after a writable one,
//! * an indirect table that cannot be read, is empty, is not of whole descriptors, or lies in
//!   another indirect table.

mod config;
mod engine;
mod features;
#[cfg(fuzzing)]
pub mod fuzzing;
mod handle;
mod poll;
mod pool;
mod rate;
mod request;
mod serial;
mod slot;
mod stats;
mod target;
mod worker;

use std::fmt;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use tandem_block::Disk;
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::{Activation, VirtioDevice};
use engine::Source;
use handle::Shared;

pub use handle::Handle;
pub use rate::{Rate, RateLimits};
pub use serial::{InvalidSerial, Serial};
pub use stats::{Counters, LATENCY_BUCKETS, Stats};

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZE: u16 = 256;

/// How a disk is offered to a guest.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub struct Options {
    /// What the guest gets when it asks for the disk's identity; an empty string without it.
    pub serial: Option<Serial>,
    /// Number of queues, each with a thread of its own: 1 to 256, or the nearest of these; best as
    /// many as the guest has vCPUs.
    pub queues: u16,
    /// Number of descriptors in a queue: a power of two, 4 to 256. The driver is told that a request
    /// has as many buffers at the most as fit into one beside its header and status.
    pub queue_size: u16,
    /// Threads for requests that have to wait for the host's disk: so many of them are under way at
    /// once, in all queues together. They are started as they are needed.
    pub threads: usize,
    /// Limits on the rate.
    pub rate: RateLimits,
    /// How long a queue's thread may look for requests before it waits to be called. That spares the
    /// guest's call, and costs the host's processor as much time at the most.
    pub poll: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            serial: None,
            queues: 1,
            queue_size: QUEUE_SIZE,
            threads: 16,
            rate: RateLimits::default(),
            poll: Duration::ZERO,
        }
    }
}

/// A block device that serves a [`Disk`].
pub struct Block {
    shared: Arc<Shared>,
    queue_sizes: Vec<u16>,
}

impl fmt::Debug for Block {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Block")
            .field("queue_sizes", &self.queue_sizes)
            .finish_non_exhaustive()
    }
}

impl Block {
    /// A device for `disk`.
    pub fn new(disk: Arc<dyn Disk>, options: Options) -> Self {
        let queues = options.queues.clamp(1, 256);
        let queue_size = options.queue_size.clamp(4, QUEUE_SIZE).next_power_of_two();
        let options = Options {
            queues,
            queue_size,
            ..options
        };
        Self {
            queue_sizes: vec![queue_size; queues.into()],
            shared: Arc::new(Shared::new(disk, options)),
        }
    }

    /// The means to operate the device. It stays valid when the device has been given away.
    pub fn handle(&self) -> Handle {
        Handle(Arc::clone(&self.shared))
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        features::offered(&self.shared.disk.limits())
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.shared.config().read(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        if let (config::WRITEBACK, &[value]) = (offset, data) {
            self.shared.set_writeback(value != 0);
        }
    }

    fn set_features(&mut self, features: u64) {
        self.shared.set_features(features);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.shared.activate(activation)
    }

    fn start_queue(&mut self, index: u16, queue: Queue, doorbell: EventFd) -> io::Result<()> {
        self.shared.threads().start(Source {
            index,
            queue,
            doorbell,
        })
    }

    fn stop_queue(&mut self, index: u16) -> Option<u16> {
        self.shared.threads().stop(index)
    }

    fn reset(&mut self) {
        self.shared.reset();
    }
}

impl Drop for Block {
    /// Handles live on, threads do not.
    fn drop(&mut self) {
        self.shared.reset();
    }
}
