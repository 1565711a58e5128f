//! The state that workers and the transport share without a lock.

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use virtio_bindings::bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use vmm_sys_util::eventfd::EventFd;

use super::Interrupt;

/// Interrupt line of a virtio-mmio device, with the registers that workers change.
///
/// Workers reach it while a vCPU holds the transport's lock and waits for them to end, hence the
/// atomics.
pub(super) struct InterruptLine {
    status: AtomicU32,
    needs_reset: AtomicBool,
    config_generation: AtomicU32,
    irq: EventFd,
}

impl InterruptLine {
    pub(super) fn new(irq: EventFd) -> Self {
        Self {
            status: AtomicU32::new(0),
            needs_reset: AtomicBool::new(false),
            config_generation: AtomicU32::new(0),
            irq,
        }
    }

    /// The `InterruptStatus` register.
    pub(super) fn status(&self) -> u32 {
        self.status.load(Ordering::SeqCst)
    }

    /// A write to the `InterruptACK` register.
    pub(super) fn acknowledge(&self, bits: u32) {
        self.status.fetch_and(!bits, Ordering::SeqCst);
    }

    /// Whether the device status shows `DEVICE_NEEDS_RESET`.
    pub(super) fn is_reset_needed(&self) -> bool {
        self.needs_reset.load(Ordering::SeqCst)
    }

    /// The `ConfigGeneration` register.
    pub(super) fn config_generation(&self) -> u32 {
        self.config_generation.load(Ordering::SeqCst)
    }

    /// Back to the state after power-on. The device's workers have ended. The configuration
    /// generation goes on: a driver may compare across a reset.
    pub(super) fn reset(&self) {
        self.status.store(0, Ordering::SeqCst);
        self.needs_reset.store(false, Ordering::SeqCst);
    }

    /// The line is edge triggered: the driver must find the status bit when the edge arrives.
    fn raise(&self, bit: u32) {
        self.status.fetch_or(bit, Ordering::SeqCst);
        // The write fails only if nobody has taken 2^64 - 2 earlier edges, which then still wait.
        let _ = self.irq.write(1);
    }
}

impl Interrupt for InterruptLine {
    fn signal_queue(&self, _index: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn signal_config(&self) {
        self.config_generation.fetch_add(1, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn needs_reset(&self) {
        self.needs_reset.store(true, Ordering::SeqCst);
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }
}
