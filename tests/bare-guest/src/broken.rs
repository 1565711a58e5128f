//! A driver that breaks its ring.

use alloc::format;

use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE};

use crate::cases::{Outcome, compare, filled, read, write};
use crate::content::SECTOR_SIZE;
use crate::device::{QUEUE_SIZE, negotiate};
use crate::disk::Disk;
use crate::ensure;
use crate::memory::Identity;
use crate::processor::Line;

/// `VIRTQ_DESC_F_NEXT`.
const NEXT: u16 = 1;

/// Ways to break a ring.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// More chains are available than fit.
    Index,
    /// A chain begins behind the table.
    Head,
    /// A chain leads to its own beginning.
    Loop,
}

/// The disk of a broken ring stops and says so, until it is reset; all others go on.
pub fn run(disks: &mut [Disk]) -> Outcome {
    ensure!(disks.len() > 1, "one disk only");
    for broken in 0..disks.len() {
        for way in [Way::Index, Way::Head, Way::Loop] {
            let (left, right) = disks.split_at_mut(broken);
            let [disk, right @ ..] = right else {
                return Ok(());
            };
            let line = disk.line();
            disk.without_driver(|transport| {
                break_ring(transport, line, way, || {
                    let mut others = left.iter_mut().chain(right);
                    others.try_for_each(|disk| works(disk, 1600))
                })
            })
            .and_then(|()| works(disk, 1700))
            .map_err(|error| format!("disk {broken}, {way:?}: {error}"))?;
        }
    }
    Ok(())
}

/// Breaks the ring, calls `meanwhile`, and resets the device.
fn break_ring(
    mut transport: MmioTransport<'static>,
    line: Line,
    way: Way,
    meanwhile: impl FnOnce() -> Outcome,
) -> Outcome {
    negotiate(&mut transport, 0)?;
    // The table of descriptors fills the first page, and each ring has one of its own.
    let (table, memory) = Identity::dma_alloc(3, BufferDirection::Both);
    let available = table + PAGE_SIZE as u64;
    let size = QUEUE_SIZE as u32;
    transport.queue_set(0, size, table, available, available + PAGE_SIZE as u64);
    transport.finish_init();
    let put = |address: u64, value: u16| {
        // SAFETY: all callers name fields within the three pages.
        unsafe { (address as *mut u16).write_volatile(value) };
    };
    match way {
        Way::Index => put(available + 2, QUEUE_SIZE as u16 + 1),
        Way::Head => {
            put(available + 4, QUEUE_SIZE as u16);
            put(available + 2, 1);
        }
        Way::Loop => {
            // Its address and length are 0: it is the way on that is wrong.
            put(table + 12, NEXT);
            put(available + 2, 1);
        }
    }
    let mut seen = line.count();
    transport.notify(0);
    while !transport
        .ack_interrupt()
        .contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT)
    {
        line.wait(seen);
        seen = line.count();
    }
    let status = transport.get_status();
    ensure!(
        status.contains(DeviceStatus::DEVICE_NEEDS_RESET | DeviceStatus::DRIVER_OK),
        "the status is {status:?}"
    );
    meanwhile()?;
    transport.set_status(DeviceStatus::empty());
    let status = transport.get_status();
    ensure!(status.is_empty(), "status {status:?} after a reset");
    // SAFETY: the device has been reset and does not use the pages any more.
    unsafe { Identity::dma_dealloc(table, memory, 3) };
    Ok(())
}

fn works(disk: &mut Disk, seed: u64) -> Outcome {
    let data = filled(3, 9, seed + disk.index as u64);
    write(disk, 3, &data)?;
    compare(3, &read(disk, 3, 9 * SECTOR_SIZE)?, &data)
}
