//! The block device (virtio 1.3, section 5.2).
//!
//! It serves reads, writes, flushes and the question for its serial number, with the features
//! `VERSION_1`, `INDIRECT_DESC`, `EVENT_IDX`, `SEG_MAX`, `BLK_SIZE`, `FLUSH`, and `RO` for a disk
//! that is read-only. A disk without a write cache is offered without `FLUSH`. To a driver that
//! declines `FLUSH` every write is durable when it completes.
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
//! | asks for the serial number with a buffer of less than 20 bytes | `IOERR` |
//! | does not lie within the disk, or fails there | `IOERR` |
//!
//! Transfers of no sectors succeed, and so does a buffer that spans regions of guest memory. The
//! used length counts the bytes written from the start of the writable stream without a gap.
//!
//! # What breaks the ring
//! Where it is not clear which buffers the driver meant, no status can be given. The device then
//! sets `DEVICE_NEEDS_RESET`, raises a configuration interrupt, and leaves the queue alone until
//! the driver resets it. That is so for
//! * an available index further ahead than the queue is long,
//! * a head index outside the descriptor table,
//! * a chain that leads out of its table, loops, or adds up to more than 2³² - 1 bytes,
//! * a chain of more than 256 descriptors,
//! * a readable descriptor after a writable one,
//! * an indirect table that cannot be read, is empty, is not of whole descriptors, or lies in
//!   another indirect table.

mod config;
mod request;
mod serial;
mod stats;
mod worker;

use std::io;
use std::sync::Arc;

use tandem_block::Disk;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO, VIRTIO_BLK_F_SEG_MAX,
};
use virtio_queue::QueueT;

use super::{
    Activation, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1, VirtioDevice,
};
use request::Target;
use worker::Worker;

pub use serial::{InvalidSerial, Serial};
pub use stats::Stats;

const DEVICE_TYPE: u32 = 2;
const QUEUE_SIZES: [u16; 1] = [256];
/// A chain of as many descriptors as the queue has, without the request's header and status.
const SEG_MAX: u32 = QUEUE_SIZES[0] as u32 - 2;

const FEATURE_SEG_MAX: u64 = 1 << VIRTIO_BLK_F_SEG_MAX;
const FEATURE_RO: u64 = 1 << VIRTIO_BLK_F_RO;
const FEATURE_BLK_SIZE: u64 = 1 << VIRTIO_BLK_F_BLK_SIZE;
const FEATURE_FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;

/// A block device that serves a [`Disk`], with one queue and one thread for it.
pub struct Block {
    disk: Arc<dyn Disk>,
    serial: Option<Serial>,
    stats: Arc<Stats>,
    worker: Option<Worker>,
}

impl Block {
    /// A device for `disk`. The guest can ask for `serial`; without one it gets an empty string.
    pub fn new(disk: Arc<dyn Disk>, serial: Option<Serial>) -> Self {
        Self {
            disk,
            serial,
            stats: Arc::default(),
            worker: None,
        }
    }

    /// Counters of what has gone wrong. They stay valid when the device has been given away.
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.stats)
    }
}

impl VirtioDevice for Block {
    fn device_type(&self) -> u32 {
        DEVICE_TYPE
    }

    fn features(&self) -> u64 {
        let limits = self.disk.limits();
        let only_if = |condition, feature| if condition { feature } else { 0 };
        FEATURE_VERSION_1
            | FEATURE_INDIRECT_DESC
            | FEATURE_EVENT_IDX
            | FEATURE_SEG_MAX
            | FEATURE_BLK_SIZE
            | only_if(limits.write_cache, FEATURE_FLUSH)
            | only_if(limits.read_only, FEATURE_RO)
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        config::read(&config::space(&*self.disk, SEG_MAX), offset, data);
    }

    /// No field that is offered can be written.
    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        self.worker = None;
        let Activation {
            mem,
            features,
            queues,
            doorbells,
            interrupt,
        } = activation;
        let Some((queue, doorbell)) = queues.into_iter().zip(doorbells).next() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        if !queue.ready() {
            return Ok(());
        }
        self.worker = Some(Worker::spawn(worker::Job {
            mem,
            queue,
            doorbell,
            interrupt,
            target: Target::new(Arc::clone(&self.disk), self.serial, features),
            stats: Arc::clone(&self.stats),
        })?);
        Ok(())
    }

    fn stop_queue(&mut self, _index: u16) {
        self.worker = None;
    }

    fn reset(&mut self) {
        self.worker = None;
    }
}
