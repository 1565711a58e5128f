//! virtio devices and the transport that shows them to a guest (virtio 1.3).
//!
//! A device implements [`VirtioDevice`] and knows nothing of registers; a transport negotiates with the
//! driver and hands the device its queues: [`VirtioMmio`](mmio::VirtioMmio), or, with the cargo feature
//! `vhost-user`, a front end in another process.

pub mod block;
mod buffers;
mod chain;
mod interrupt;
pub mod mmio;
mod queue;
mod queue_setup;
mod regions;
#[cfg(feature = "vhost-user")]
pub mod vhost_user;

use std::io;
use std::sync::Arc;

use virtio_bindings::bindings::virtio_config::{VIRTIO_F_RING_RESET, VIRTIO_F_VERSION_1};
use virtio_bindings::bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC,
};
use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use crate::GuestMemory;

/// The device follows virtio 1.0 or later (`VIRTIO_F_VERSION_1`). Drivers must accept it.
pub const FEATURE_VERSION_1: u64 = 1 << VIRTIO_F_VERSION_1;
/// Descriptor chains may lie in tables of their own (`VIRTIO_F_INDIRECT_DESC`).
pub const FEATURE_INDIRECT_DESC: u64 = 1 << VIRTIO_RING_F_INDIRECT_DESC;
/// Notifications are suppressed by ring index instead of by flag (`VIRTIO_F_EVENT_IDX`).
pub const FEATURE_EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// The driver can reset a single queue, and set it up anew (`VIRTIO_F_RING_RESET`). A device that
/// offers it has its queues started and stopped at any time.
pub const FEATURE_RING_RESET: u64 = 1 << VIRTIO_F_RING_RESET;

/// A virtio device as a transport sees it (virtio 1.3, section 2).
///
/// # Life
/// Between [`activate`](Self::activate) and the next [`reset`](Self::reset) the device owns its
/// queues and serves them on threads of its own. All methods are called with the transport's lock
/// held, so a worker thread must not wait for the transport: what it has to say goes through
/// [`Interrupt`], which never blocks.
pub trait VirtioDevice: Send {
    /// Device type (virtio 1.3, section 5).
    fn device_type(&self) -> u32;

    /// All feature bits that the device offers, ring features included.
    fn features(&self) -> u64;

    /// Largest size of each queue, in descriptors: powers of two up to 32768.
    fn queue_max_sizes(&self) -> &[u16];

    /// Reads the device configuration space. What lies past its end reads as zero.
    fn read_config(&self, offset: u64, data: &mut [u8]);

    /// Writes the device configuration space. Writes to read-only fields have no effect.
    fn write_config(&mut self, offset: u64, data: &[u8]);

    /// The driver has set `FEATURES_OK`, with these features: a subset of those that the device offers.
    /// From now on the configuration space shows what goes with them.
    fn set_features(&mut self, features: u64) {
        let _ = features;
    }

    /// Prepares to serve queues. The driver has set `DRIVER_OK`.
    ///
    /// # Errors
    /// The device could not start; the transport then tells the driver that it needs a reset.
    fn activate(&mut self, activation: Activation) -> io::Result<()>;

    /// Starts serving queue `index`, of a device that has been activated. `queue` is
    /// [`ready`](virtio_queue::QueueT::ready) and has been checked to lie in the device's memory;
    /// `doorbell` is signalled when the driver has made buffers available, but perhaps not for those that
    /// are available already.
    ///
    /// # Errors
    /// As [`activate`](Self::activate).
    fn start_queue(&mut self, index: u16, queue: Queue, doorbell: EventFd) -> io::Result<()>;

    /// Stops serving queue `index`, whose requests are completed first. On return no thread accesses
    /// the queue or buffers that it named. Returns the index in the available ring that comes next;
    /// `None` if the queue was not served, or its thread has failed.
    fn stop_queue(&mut self, index: u16) -> Option<u16>;

    /// Stops serving all queues and forgets what the driver has set. On return no thread of the
    /// device accesses guest memory. May be called at any time, also twice.
    fn reset(&mut self);
}

/// What a device gets when its driver is ready.
pub struct Activation {
    /// Memory that the queues and their buffers lie in.
    pub mem: GuestMemory,
    /// Features that the driver has accepted: a subset of those that the device offers.
    pub features: u64,
    /// How to notify the driver.
    pub interrupt: Arc<dyn Interrupt>,
}

/// Notifications from a device to its driver. No method blocks.
pub trait Interrupt: Send + Sync {
    /// Buffers of queue `index` have been used.
    fn signal_queue(&self, index: u16);

    /// The device configuration space has changed. A reader that finds the same configuration
    /// generation before and after this has seen none of the change.
    fn signal_config(&self);

    /// The device cannot go on: sets `DEVICE_NEEDS_RESET` and notifies the driver (virtio 1.3,
    /// section 2.1.2).
    fn needs_reset(&self);
}
