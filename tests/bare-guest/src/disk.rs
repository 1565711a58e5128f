//! A disk: where it is, its driver, and requests that are in flight together.

use alloc::format;
use alloc::vec::Vec;
use core::ptr::NonNull;
use core::sync::atomic::{Ordering, fence};

use virtio_drivers::device::blk::{BlkReq, BlkResp, VirtIOBlk};
use virtio_drivers::transport::InterruptStatus;
use virtio_drivers::transport::mmio::{MmioTransport, VirtIOHeader};

use crate::cases::Outcome;
use crate::memory::Identity;
use crate::plan::DiskPlan;
use crate::processor::Line;

/// Where the machine has its disks: an interrupt line and a page of registers for each.
const REGISTERS: usize = 0xd000_0000;
const REGISTERS_SIZE: usize = 0x1000;
const FIRST_LINE: usize = 5;

/// Some of the registers of virtio-mmio (virtio 1.3, section 4.2.2).
const MAGIC: usize = 0x00;
pub const QUEUE_SEL: usize = 0x30;
const NOTIFY: usize = 0x50;
const STATUS: usize = 0x70;
pub const QUEUE_RESET: usize = 0xc0;

type Driver = VirtIOBlk<Identity, MmioTransport<'static>>;

/// A disk and its driver.
pub struct Disk {
    pub index: usize,
    pub plan: DiskPlan,
    line: Line,
    driver: Option<Driver>,
}

impl Disk {
    /// The disk number `index`, its driver started.
    pub fn new(index: usize, plan: DiskPlan) -> Self {
        let line = Line::enable(FIRST_LINE + index);
        let driver = Some(start(index));
        Self {
            index,
            plan,
            line,
            driver,
        }
    }

    /// Whether there is a device in the place of disk number `index`.
    pub fn is_present(index: usize) -> bool {
        read_register(index, MAGIC) == u32::from_le_bytes(*b"virt")
    }

    /// The driver.
    pub fn driver(&mut self) -> &mut Driver {
        self.driver.as_mut().expect("there always is a driver")
    }

    /// Hands the registers to `user` instead of the driver, and starts a new driver afterwards.
    pub fn without_driver<T>(&mut self, user: impl FnOnce(MmioTransport<'static>) -> T) -> T {
        self.driver = None;
        let result = user(transport(self.index));
        self.driver = Some(start(self.index));
        result
    }

    /// How many interrupts this disk has raised.
    pub fn interrupts(&self) -> u64 {
        self.line.count()
    }

    /// Its interrupt line.
    pub fn line(&self) -> Line {
        self.line
    }

    /// Writes the doorbell register.
    pub fn ring(&self) {
        write_register(self.index, NOTIFY, 0);
    }

    /// Reads the status register.
    pub fn status(&self) -> u32 {
        read_register(self.index, STATUS)
    }
}

fn register(index: usize, offset: usize) -> *mut u32 {
    (REGISTERS + index * REGISTERS_SIZE + offset) as *mut u32
}

/// Reads a register of disk number `index`.
pub fn read_register(index: usize, offset: usize) -> u32 {
    // SAFETY: reading any register, or nothing, in this part of memory has no effect.
    unsafe { register(index, offset).read_volatile() }
}

/// Writes the doorbell, selects a queue, or resets the selected one, of disk number `index`.
pub fn write_register(index: usize, offset: usize, value: u32) {
    assert!(matches!(offset, NOTIFY | QUEUE_SEL | QUEUE_RESET));
    // SAFETY: none of the three has the device use memory that it did not use before.
    unsafe { register(index, offset).write_volatile(value) };
}

fn transport(index: usize) -> MmioTransport<'static> {
    let header = NonNull::new(register(index, 0).cast::<VirtIOHeader>()).expect("not null");
    // SAFETY: the registers of the disk, which is the caller's; the driver that had them is gone.
    let transport = unsafe { MmioTransport::new(header, REGISTERS_SIZE) };
    transport.unwrap_or_else(|error| panic!("disk {index}: {error}"))
}

fn start(index: usize) -> Driver {
    let driver = Driver::new(transport(index));
    driver.unwrap_or_else(|error| panic!("disk {index}: {error}"))
}

/// Whether a transfer reads or writes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    Read,
    Write,
}

/// A request of its own.
pub struct Transfer {
    direction: Direction,
    pub sector: u64,
    pub data: Vec<u8>,
    request: BlkReq,
    response: BlkResp,
    token: u16,
}

impl Transfer {
    pub fn new(direction: Direction, sector: u64, data: Vec<u8>) -> Self {
        Self {
            direction,
            sector,
            data,
            request: BlkReq::default(),
            response: BlkResp::default(),
            token: 0,
        }
    }

    /// # Safety
    /// The transfer stays where it is, untouched, until [`complete`](Self::complete).
    unsafe fn submit(&mut self, driver: &mut Driver) {
        let sector = self.sector as usize;
        let (request, data, response) = (&mut self.request, &mut self.data, &mut self.response);
        // SAFETY: the caller promises it.
        let token = unsafe {
            match self.direction {
                Direction::Read => driver.read_blocks_nb(sector, request, data, response),
                Direction::Write => driver.write_blocks_nb(sector, request, data, response),
            }
        };
        self.token = token.unwrap_or_else(|error| panic!("submitting: {error}"));
    }

    /// # Safety
    /// The transfer has been submitted to `driver`.
    unsafe fn complete(&mut self, driver: &mut Driver) -> Outcome {
        let (request, data, response) = (&self.request, &mut self.data, &mut self.response);
        // SAFETY: the caller promises it.
        let completed = unsafe {
            match self.direction {
                Direction::Read => driver.complete_read_blocks(self.token, request, data, response),
                Direction::Write => {
                    driver.complete_write_blocks(self.token, request, data, response)
                }
            }
        };
        completed.map_err(|error| format!("sector {}: {error}", self.sector))
    }
}

/// Has all transfers in flight at the same time, each list on the disk of the same number, and waits
/// for interrupts until they are done: no completion is looked for without one.
pub fn transfer(disks: &mut [Disk], lists: &mut [Vec<Transfer>]) -> Outcome {
    let seen: Vec<_> = disks.iter().map(Disk::interrupts).collect();
    let longest = lists.iter().map(Vec::len).max().unwrap_or(0);
    for number in 0..longest {
        for (disk, list) in disks.iter_mut().zip(lists.iter_mut()) {
            if let Some(transfer) = list.get_mut(number) {
                // SAFETY: `drain` completes each of them; on the way there a failure is a panic,
                // which does not return.
                unsafe { transfer.submit(disk.driver()) };
            }
        }
    }
    let drained = disks.iter_mut().zip(lists).zip(seen);
    let outcomes: Vec<_> = drained
        .map(|((disk, list), seen)| {
            drain(disk, list, seen).map_err(|error| format!("disk {}: {error}", disk.index))
        })
        .collect();
    outcomes.into_iter().collect()
}

/// Completes all of `list`, in the order in which the device does. `seen` is the number of
/// interrupts from before they were submitted.
fn drain(disk: &mut Disk, list: &mut [Transfer], mut seen: u64) -> Outcome {
    let line = disk.line;
    let driver = disk.driver();
    let mut outcome = Ok(());
    let mut status = InterruptStatus::empty();
    let mut left = list.len();
    while left > 0 {
        line.wait(seen);
        seen = line.count();
        status |= driver.ack_interrupt();
        // The driver has written up to where it wants no interrupt before it looks for more.
        while let Some(token) = {
            fence(Ordering::SeqCst);
            driver.peek_used()
        } {
            let transfer = list.iter_mut().find(|transfer| transfer.token == token);
            let transfer = transfer.unwrap_or_else(|| panic!("unknown token {token}"));
            // SAFETY: the token is that of a submitted transfer.
            outcome = outcome.and(unsafe { transfer.complete(driver) });
            left -= 1;
        }
    }
    if !list.is_empty() && status != InterruptStatus::QUEUE_INTERRUPT {
        return Err(format!("the interrupt status is {:#x}", status.bits()));
    }
    outcome
}
