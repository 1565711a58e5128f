//! The virtio-mmio transport, version 2 (virtio 1.3, section 4.2).

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use virtio_bindings::bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE as ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER as DRIVER,
    VIRTIO_CONFIG_S_DRIVER_OK as DRIVER_OK, VIRTIO_CONFIG_S_FAILED as FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK as FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET as NEEDS_RESET,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::interrupt::InterruptLine;
use super::queue_setup::QueueSetup;
use super::{
    Activation, FEATURE_EVENT_IDX, FEATURE_RING_RESET, FEATURE_VERSION_1, Interrupt, VirtioDevice,
};
use crate::GuestMemory;
use crate::bus::BusDevice;

/// Bytes of guest address space that a device occupies.
pub const REGION_SIZE: u64 = 0x1000;

/// Offset of the register that a driver writes a queue's index to when it rings the doorbell.
pub const QUEUE_NOTIFY: u64 = 0x50;

/// The other registers (virtio 1.3, section 4.2.2).
mod reg {
    pub const MAGIC: u64 = 0x00;
    pub const VERSION: u64 = 0x04;
    pub const DEVICE_ID: u64 = 0x08;
    pub const VENDOR_ID: u64 = 0x0c;
    pub const DEVICE_FEATURES: u64 = 0x10;
    pub const DEVICE_FEATURES_SEL: u64 = 0x14;
    pub const DRIVER_FEATURES: u64 = 0x20;
    pub const DRIVER_FEATURES_SEL: u64 = 0x24;
    pub const QUEUE_SEL: u64 = 0x30;
    pub const QUEUE_SIZE_MAX: u64 = 0x34;
    pub const QUEUE_SIZE: u64 = 0x38;
    pub const QUEUE_READY: u64 = 0x44;
    pub const INTERRUPT_STATUS: u64 = 0x60;
    pub const INTERRUPT_ACK: u64 = 0x64;
    pub const STATUS: u64 = 0x70;
    pub const QUEUE_DESC_LOW: u64 = 0x80;
    pub const QUEUE_DESC_HIGH: u64 = 0x84;
    pub const QUEUE_DRIVER_LOW: u64 = 0x90;
    pub const QUEUE_DRIVER_HIGH: u64 = 0x94;
    pub const QUEUE_DEVICE_LOW: u64 = 0xa0;
    pub const QUEUE_DEVICE_HIGH: u64 = 0xa4;
    pub const SHM_LEN_LOW: u64 = 0xb0;
    pub const SHM_BASE_HIGH: u64 = 0xbc;
    pub const QUEUE_RESET: u64 = 0xc0;
    pub const CONFIG_GENERATION: u64 = 0xfc;
    pub const CONFIG: u64 = 0x100;
}

/// "virt".
const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "TNDM".
const VENDOR_ID: u32 = 0x4d44_4e54;

/// A virtio device behind a block of registers.
///
/// [`BusDevice`] is its side towards vCPUs. Its side towards the virtual machine monitor is the
/// interrupt's eventfd given to [`new`](Self::new), and [`doorbells`](Self::doorbells).
///
/// Registers that a driver touches for every request (doorbell, interrupt status and acknowledge)
/// take no lock.
pub struct VirtioMmio {
    doorbells: Vec<EventFd>,
    interrupt: Arc<InterruptLine>,
    state: Mutex<State>,
}

impl fmt::Debug for VirtioMmio {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioMmio")
            .field("doorbells", &self.doorbells)
            .finish_non_exhaustive()
    }
}

/// What negotiation changes. Lock order: this lock is held while the device's threads are stopped,
/// and they never take it.
struct State {
    device: Box<dyn VirtioDevice>,
    mem: GuestMemory,
    status: u32,
    device_features_sel: u32,
    driver_features_sel: u32,
    driver_features: u64,
    queue_sel: u32,
    queues: Vec<QueueSetup>,
}

impl VirtioMmio {
    /// Puts `device` behind registers. Its queues may lie anywhere in `mem`; `irq` is signalled
    /// for each interrupt, which is edge triggered.
    ///
    /// # Errors
    /// No file descriptors are left for the doorbells.
    pub fn new(device: Box<dyn VirtioDevice>, mem: GuestMemory, irq: EventFd) -> io::Result<Self> {
        let sizes = device.queue_max_sizes();
        let doorbells = sizes
            .iter()
            .map(|_| EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC))
            .collect::<io::Result<_>>()?;
        let queues = sizes.iter().map(|&size| QueueSetup::new(size)).collect();
        Ok(Self {
            doorbells,
            interrupt: Arc::new(InterruptLine::new(irq)),
            state: Mutex::new(State {
                device,
                mem,
                status: 0,
                device_features_sel: 0,
                driver_features_sel: 0,
                driver_features: 0,
                queue_sel: 0,
                queues,
            }),
        })
    }

    /// One doorbell for each queue. To spare the exit to user space, have the hypervisor signal
    /// it when the guest writes the queue's index, 32 bits wide, to [`QUEUE_NOTIFY`]; without
    /// that, the write arrives at [`BusDevice::write`] and has the same effect.
    pub fn doorbells(&self) -> &[EventFd] {
        &self.doorbells
    }

    /// Resets the device: on return none of its threads is left and none touches guest memory.
    ///
    /// Stop the vCPUs first: a driver that is still running can start the device again.
    pub fn shutdown(&self) {
        self.reset(&mut self.lock());
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic elsewhere cannot leave a state that a hostile driver could not produce as well.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::MAGIC => MAGIC,
            reg::VERSION => VERSION,
            reg::VENDOR_ID => VENDOR_ID,
            reg::INTERRUPT_STATUS => self.interrupt.status(),
            reg::CONFIG_GENERATION => self.interrupt.config_generation(),
            // No shared memory regions: their length reads as all ones.
            reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH => u32::MAX,
            reg::STATUS if self.interrupt.is_reset_needed() => self.lock().status | NEEDS_RESET,
            _ => self.lock().read_register(offset),
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        match offset {
            QUEUE_NOTIFY => self.ring(value),
            reg::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::STATUS => self.write_status(value),
            reg::QUEUE_READY if value & 1 == 1 => self.enable_queue(),
            _ => self.lock().write_register(offset, value),
        }
    }

    /// A doorbell that is rung before the device listens stays signalled.
    fn ring(&self, queue: u32) {
        if let Some(doorbell) = self.doorbells.get(queue as usize) {
            // Fails only if 2^64 - 2 earlier signals have not been taken; the next one then tells.
            let _ = doorbell.write(1);
        }
    }

    fn write_status(&self, value: u32) {
        let mut state = self.lock();
        if value == 0 {
            return self.reset(&mut state);
        }
        let before = state.status;
        state.advance_status(value);
        let added = state.status & !before;
        if added & FEATURES_OK != 0 {
            let features = state.driver_features;
            state.device.set_features(features);
        }
        if added & DRIVER_OK != 0 {
            self.activate(&mut state);
        }
    }

    fn activate(&self, state: &mut State) {
        if self.try_activate(state).is_err() {
            self.interrupt.needs_reset();
        }
    }

    fn try_activate(&self, state: &mut State) -> io::Result<()> {
        state.device.activate(Activation {
            mem: state.mem.clone(),
            features: state.driver_features,
            interrupt: Arc::clone(&self.interrupt) as Arc<dyn Interrupt>,
        })?;
        for (index, doorbell) in (0..).zip(&self.doorbells) {
            state.start_queue(index, doorbell)?;
        }
        Ok(())
    }

    /// The driver has set up the selected queue: before it starts the device, or anew after it has
    /// reset the queue. Then it is served at once.
    fn enable_queue(&self) {
        let mut state = self.lock();
        if !state.queue_ready() || !state.is_active() {
            return;
        }
        let index = state.queue_sel;
        let Some(doorbell) = self.doorbells.get(index as usize) else {
            return;
        };
        if state.start_queue(index as u16, doorbell).is_err() {
            self.interrupt.needs_reset();
        }
    }

    fn reset(&self, state: &mut State) {
        state.device.reset();
        // After that no worker is left that could set a bit again.
        self.interrupt.reset();
        state.status = 0;
        state.device_features_sel = 0;
        state.driver_features_sel = 0;
        state.driver_features = 0;
        state.queue_sel = 0;
        for queue in &mut state.queues {
            *queue = QueueSetup::new(queue.max_size);
        }
    }
}

impl State {
    fn is_active(&self) -> bool {
        self.status & DRIVER_OK != 0
    }

    fn read_register(&self, offset: u64) -> u32 {
        match offset {
            reg::DEVICE_ID => self.device.device_type(),
            reg::DEVICE_FEATURES => match self.device_features_sel {
                0 => self.device.features() as u32,
                1 => (self.device.features() >> 32) as u32,
                _ => 0,
            },
            reg::QUEUE_SIZE_MAX => self.queue().map_or(0, |q| q.max_size.into()),
            reg::QUEUE_READY => self.queue().map_or(0, |q| q.ready.into()),
            reg::STATUS => self.status,
            // A reset of a queue is over when the write that asks for it returns, and accesses from
            // elsewhere wait for that: nobody sees a 1 in `QueueReset`.
            _ => 0,
        }
    }

    /// Writes that the driver may not do in the present state have no effect.
    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_sel = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_sel = value,
            reg::DRIVER_FEATURES => self.write_driver_features(value),
            reg::QUEUE_SEL => self.queue_sel = value,
            reg::QUEUE_READY => self.stop_queue(),
            reg::QUEUE_RESET if value & 1 == 1 => self.reset_queue(),
            _ => self.write_queue_register(offset, value),
        }
    }

    fn write_driver_features(&mut self, value: u32) {
        if self.status & (DRIVER | FEATURES_OK) != DRIVER {
            return;
        }
        let value = u64::from(value);
        match self.driver_features_sel {
            0 => self.driver_features = self.driver_features & !0xffff_ffff | value,
            1 => self.driver_features = self.driver_features & 0xffff_ffff | value << 32,
            _ => {}
        }
    }

    fn queue(&self) -> Option<&QueueSetup> {
        self.queues.get(self.queue_sel as usize)
    }

    /// The selected queue, while the driver may still set it up.
    fn queue_in_setup(&mut self) -> Option<&mut QueueSetup> {
        let (is_active, has_features) = (self.is_active(), self.status & FEATURES_OK != 0);
        let queue = self.queues.get_mut(self.queue_sel as usize)?;
        let is_setup = if is_active {
            queue.is_reset
        } else {
            has_features
        };
        (is_setup && !queue.ready).then_some(queue)
    }

    fn write_queue_register(&mut self, offset: u64, value: u32) {
        let Some(queue) = self.queue_in_setup() else {
            return;
        };
        match offset {
            reg::QUEUE_SIZE => queue.size = value,
            reg::QUEUE_DESC_LOW => set_low(&mut queue.desc_table, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut queue.desc_table, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut queue.avail_ring, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut queue.avail_ring, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut queue.used_ring, value),
            _ => {}
        }
    }

    /// A queue that cannot be used stays not ready, as the driver can read back. Returns whether the
    /// selected queue has become ready.
    fn queue_ready(&mut self) -> bool {
        let mem = self.mem.clone();
        let Some(queue) = self.queue_in_setup() else {
            return false;
        };
        queue.ready = true;
        queue.ready = queue.build(&mem, false).is_ok();
        queue.ready
    }

    /// Has the device serve a queue that the driver has set up.
    fn start_queue(&mut self, index: u16, doorbell: &EventFd) -> io::Result<()> {
        let event_idx = self.driver_features & FEATURE_EVENT_IDX != 0;
        let Some(setup) = self.queues.get(usize::from(index)).filter(|q| q.ready) else {
            return Ok(());
        };
        let queue = setup
            .build(&self.mem, event_idx)
            .map_err(io::Error::other)?;
        self.device.start_queue(index, queue, doorbell.try_clone()?)
    }

    /// Returns when the device has let go of the queue: the driver may then free its memory as
    /// soon as it reads 0 from `QueueReady` (virtio 1.3, section 4.2.2.2).
    fn stop_queue(&mut self) {
        let is_active = self.is_active();
        let Some(queue) = self.queues.get_mut(self.queue_sel as usize) else {
            return;
        };
        if queue.ready && is_active {
            self.device.stop_queue(self.queue_sel as u16);
        }
        queue.ready = false;
    }

    /// Forgets all about the selected queue, when its requests have been completed: the driver may set
    /// it up anew (virtio 1.3, section 2.6.1).
    fn reset_queue(&mut self) {
        if self.driver_features & FEATURE_RING_RESET == 0 || !self.is_active() {
            return;
        }
        self.stop_queue();
        if let Some(queue) = self.queues.get_mut(self.queue_sel as usize) {
            *queue = QueueSetup::new(queue.max_size);
            queue.is_reset = true;
        }
    }

    /// Adds the bits of `value` that are legal now. Drivers may set several at once. A driver never
    /// clears a bit but by a reset, so such a write has no effect.
    fn advance_status(&mut self, value: u32) {
        const BITS: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK | FAILED;
        let value = value & !NEEDS_RESET;
        if value & !BITS != 0 || value & self.status != self.status {
            return;
        }
        self.status |= value & FAILED;
        for (bit, needed) in [
            (ACKNOWLEDGE, 0),
            (DRIVER, ACKNOWLEDGE),
            (FEATURES_OK, DRIVER),
            (DRIVER_OK, FEATURES_OK),
        ] {
            let is_legal = self.status & needed == needed
                && (bit != FEATURES_OK || self.are_features_acceptable())
                && (bit != DRIVER_OK || self.status & FAILED == 0);
            if value & bit != 0 && is_legal {
                self.status |= bit;
            }
        }
    }

    fn are_features_acceptable(&self) -> bool {
        self.driver_features & FEATURE_VERSION_1 != 0
            && self.driver_features & !self.device.features() == 0
    }
}

impl BusDevice for VirtioMmio {
    /// Registers are 32 bits wide and are read as such; any other access to them reads zero. The
    /// configuration space can be read with any width.
    fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            self.lock().device.read_config(offset, data);
        } else if let Ok(data) = <&mut [u8; 4]>::try_from(data) {
            *data = self.read_register(offset).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(offset) = offset.checked_sub(reg::CONFIG) {
            self.lock().device.write_config(offset, data);
        } else if let Ok(data) = <[u8; 4]>::try_from(data) {
            self.write_register(offset, u32::from_le_bytes(data));
        }
    }
}

fn set_low(address: &mut u64, value: u32) {
    *address = *address & !0xffff_ffff | u64::from(value);
}

fn set_high(address: &mut u64, value: u32) {
    *address = *address & 0xffff_ffff | u64::from(value) << 32;
}

#[cfg(test)]
mod tests;
