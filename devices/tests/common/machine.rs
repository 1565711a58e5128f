//! A device with a disk, as a virtual machine monitor puts it together.
#![allow(dead_code, reason = "no test uses all of it")]

use std::os::fd::AsRawFd;
use std::sync::{Arc, mpsc};
use std::thread;
use std::time::Duration;

use tandem_block::Disk;
use tandem_devices::GuestMemory;
use tandem_devices::virtio::block::{Block, Handle, Options, Stats};
use tandem_devices::virtio::mmio::VirtioMmio;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

pub const SERIAL: &[u8; 20] = b"a-serial-of-20-bytes";

pub struct Machine {
    pub device: Arc<VirtioMmio>,
    /// The interrupt line.
    pub irq: EventFd,
    pub stats: Arc<Stats>,
    pub handle: Handle,
}

impl Machine {
    pub fn new(disk: Arc<dyn Disk>, mem: &GuestMemory) -> Self {
        Self::with_options(disk, mem, |_| {})
    }

    /// A machine whose disk is offered with other options.
    pub fn with_options(
        disk: Arc<dyn Disk>,
        mem: &GuestMemory,
        change: impl FnOnce(&mut Options),
    ) -> Self {
        let serial = std::str::from_utf8(SERIAL).unwrap().parse().unwrap();
        let mut options = Options::default();
        options.serial = Some(serial);
        change(&mut options);
        let block = Block::new(disk, options);
        let handle = block.handle();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = VirtioMmio::new(Box::new(block), mem.clone(), irq.try_clone().unwrap());
        Self {
            device: Arc::new(device.unwrap()),
            irq,
            stats: handle.stats(),
            handle,
        }
    }

    /// How many edges of the interrupt line there were since the last call.
    pub fn take_interrupts(&self) -> u64 {
        self.irq.read().unwrap_or(0)
    }

    /// Waits for an edge of the interrupt line.
    pub fn wait_for_interrupt(&self) {
        let mut poll = libc::pollfd {
            fd: self.irq.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: one valid entry.
        let n = unsafe { libc::poll(&mut poll, 1, 10_000) };
        assert_eq!(n, 1, "no interrupt");
        self.irq.read().unwrap();
    }
}

/// A driver waits without a limit, so a device that does not answer must fail the test here.
pub fn within_deadline(test: impl FnOnce() + Send + 'static) {
    let (done, wait) = mpsc::channel();
    let thread = thread::spawn(move || {
        test();
        let _ = done.send(());
    });
    match wait.recv_timeout(Duration::from_secs(60)) {
        Err(mpsc::RecvTimeoutError::Timeout) => panic!("the device does not answer"),
        _ => thread.join().unwrap(),
    }
}
