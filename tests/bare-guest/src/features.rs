//! Features of the device that the driver does not know. What these cases write outside of the stripes
//! that [`content`](crate::content) names, they zero in the end.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::transport::{InterruptStatus, Transport};

use crate::cases::{Outcome, compare, filled};
use crate::content::SECTOR_SIZE;
use crate::device::{
    CONFIG_WCE, DISCARD, Device, FLUSH, IOERR, MQ, OK, OUT, RING_RESET, TYPE_DISCARD, TYPE_FLUSH,
    TYPE_WRITE_ZEROES, UNSUPP, WRITE_ZEROES,
};
use crate::disk::Disk;
use crate::ensure;

/// Fields of the configuration (virtio 1.3, section 5.2.4).
const WRITEBACK: usize = 32;
const NUM_QUEUES: usize = 34;
const MAX_DISCARD_SEG: usize = 40;
const DISCARD_ALIGNMENT: usize = 44;
const MAX_WRITE_ZEROES_SECTORS: usize = 48;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const UNMAP: u32 = 1;

/// A `struct virtio_blk_discard_write_zeroes`.
fn segment(sector: u64, sectors: u64, flags: u32) -> [u8; 16] {
    let mut bytes = [0; 16];
    bytes[..8].copy_from_slice(&sector.to_le_bytes());
    bytes[8..12].copy_from_slice(&(sectors as u32).to_le_bytes());
    bytes[12..].copy_from_slice(&flags.to_le_bytes());
    bytes
}

/// Whole aligned parts that are discarded read as zero, what lies around them stays, and a list that
/// makes no sense does nothing.
pub fn discard(disk: &mut Disk) -> Outcome {
    let end = disk.plan.sectors;
    disk.without_driver(|transport| {
        let mut device = Device::start(transport, DISCARD | WRITE_ZEROES, 1)?;
        let unit = u64::from(device.config_u32(DISCARD_ALIGNMENT));
        let (start, sectors) = (unit - 2, 3 * unit + 5);
        let data = filled(start, sectors, 1000);
        device.write(0, start, &data)?;

        let bad: [(&[u8], u8); 5] = [
            (&[], IOERR),
            (&segment(unit, unit, 0)[..15], IOERR),
            (&segment(unit, unit, UNMAP), UNSUPP),
            (&segment(end - 1, 2, 0), IOERR),
            (&segment(u64::MAX, 1, 0), IOERR),
        ];
        for (list, status) in bad {
            device.expect(TYPE_DISCARD, 0, &[list], status)?;
        }
        let most = device.config_u32(MAX_DISCARD_SEG) as usize;
        let list = segment(unit, unit, 0).repeat(most + 1);
        device.expect(TYPE_DISCARD, 0, &[&list], IOERR)?;
        compare(start, &device.read(0, start, sectors)?, &data)?;

        // Two segments, and a list that is cut in the middle of one.
        let list = [segment(unit, unit, 0), segment(3 * unit, unit, 0)];
        let (first, second) = list.as_flattened().split_at(11);
        device.expect(TYPE_DISCARD, 0, &[first, second], OK)?;
        let mut expected = data;
        for sector in [unit, 3 * unit] {
            let at = (sector - start) as usize * SECTOR_SIZE;
            expected[at..][..unit as usize * SECTOR_SIZE].fill(0);
        }
        compare(start, &device.read(0, start, sectors)?, &expected)?;
        device.expect(TYPE_WRITE_ZEROES, 0, &[&segment(start, sectors, UNMAP)], OK)
    })?;
    not_negotiated(disk, TYPE_DISCARD)
}

/// Zeroes are written to the sector, whether their space may be released or not.
pub fn write_zeroes(disk: &mut Disk) -> Outcome {
    let end = disk.plan.sectors;
    disk.without_driver(|transport| {
        let mut device = Device::start(transport, WRITE_ZEROES, 1)?;
        let most = u64::from(device.config_u32(MAX_WRITE_ZEROES_SECTORS));
        for (list, status) in [
            (segment(5, 1, 2), UNSUPP),
            (segment(5, 1, UNMAP | 1 << 31), UNSUPP),
            (segment(end - 1, 2, 0), IOERR),
            (segment(0, most + 1, 0), IOERR),
        ] {
            device.expect(TYPE_WRITE_ZEROES, 0, &[&list], status)?;
        }
        for flags in [0, UNMAP] {
            let sectors = 600;
            let mut expected = filled(0, sectors, 1100);
            device.write(0, 0, &expected)?;
            let ranges = [(3, 2), (100, 301), (599, 1)];
            let list: Vec<_> = ranges
                .iter()
                .flat_map(|(sector, count)| segment(*sector, *count, flags))
                .collect();
            device.expect(TYPE_WRITE_ZEROES, 0, &[&list], OK)?;
            for (sector, count) in ranges {
                let start = sector as usize * SECTOR_SIZE;
                expected[start..start + count as usize * SECTOR_SIZE].fill(0);
            }
            compare(0, &device.read(0, 0, sectors)?, &expected)?;
        }
        device.expect(TYPE_WRITE_ZEROES, 0, &[&segment(0, 600, 0)], OK)
    })?;
    not_negotiated(disk, TYPE_WRITE_ZEROES)
}

/// What belongs to a feature that the driver has not accepted is not supported, and changes nothing.
fn not_negotiated(disk: &mut Disk, kind: u32) -> Outcome {
    disk.without_driver(|transport| {
        let mut device = Device::start(transport, 0, 1)?;
        let data = filled(0, 8, 1200);
        device.write(0, 0, &data)?;
        device.expect(kind, 0, &[&segment(0, 8, 0)], UNSUPP)?;
        device.expect(TYPE_FLUSH, 0, &[], UNSUPP)?;
        compare(0, &device.read(0, 0, 8)?, &data)
    })
}

/// The driver switches between write-back and write-through, and a reset ends its choice.
pub fn writeback(disk: &mut Disk) -> Outcome {
    let read = |device: &Device| device.transport.read_config_space::<u8>(WRITEBACK);
    for _ in 0..2 {
        disk.without_driver(|transport| {
            let mut device = Device::start(transport, FLUSH | CONFIG_WCE, 1)?;
            for value in [1, 0, 1, 0] {
                let written = device.transport.write_config_space(WRITEBACK, value);
                ensure!(written.is_ok(), "writing {value}: {written:?}");
                let found = read(&device);
                ensure!(found == Ok(value), "{found:?} after {value}");
                let data = filled(7, 5, 1300 + u64::from(value));
                device.write(0, 7, &data)?;
                device.expect(TYPE_FLUSH, 0, &[], OK)?;
                compare(7, &device.read(0, 7, 5)?, &data)?;
            }
            Ok(())
        })?;
        disk.without_driver(|transport| {
            // The driver in between has been told of a cache, and this one cannot flush it.
            let device = Device::start(transport, CONFIG_WCE, 1)?;
            let found = read(&device);
            ensure!(found == Ok(0), "{found:?} without flushes");
            Ok(())
        })?;
    }
    Ok(())
}

/// What one queue has written is read by the others.
pub fn queues(disk: &mut Disk) -> Outcome {
    let index = disk.index;
    disk.without_driver(|transport| {
        let count: u16 = match transport.read_config_space(NUM_QUEUES) {
            Ok(count) => count,
            Err(error) => return Err(format!("reading the number of queues: {error}")),
        };
        ensure!(count > 1, "{count} queues");
        let mut device = Device::start(transport, MQ | RING_RESET, count)?;
        let count = usize::from(count);
        for round in 0..40 {
            if round % 8 == 7 {
                // One begins anew, and the others go on.
                device.reset_queue(index, round as usize % count)?;
            }
            for writer in 0..count {
                let sector = 3 * writer as u64;
                let data = filled(sector, 3, 1400 + round);
                device.write(writer, sector, &data)?;
                let reader = (writer + 1 + round as usize) % count;
                compare(sector, &device.read(reader, sector, 3)?, &data)?;
            }
        }
        Ok(())
    })
}

/// The size of the disk in sectors, which is read in two halves.
fn capacity(device: &Device) -> Result<u64, String> {
    let halves = device.transport.read_consistent(|| {
        let half = |offset| device.transport.read_config_space::<u32>(offset);
        Ok([half(0)?, half(4)?])
    });
    let [low, high] = halves.map_err(|error| format!("reading the capacity: {error}"))?;
    Ok(u64::from(high) << 32 | u64::from(low))
}

/// Asks the test for a larger disk, sleeps until a configuration interrupt, and uses what it has
/// gained.
pub fn grow(disk: &mut Disk) -> Outcome {
    let sectors = disk.plan.sectors;
    let line = disk.line();
    let index = disk.index;
    disk.without_driver(|transport| {
        let mut device = Device::start(transport, FLUSH | WRITE_ZEROES, 1)?;
        let found = capacity(&device)?;
        ensure!(found == sectors, "{found} sectors");
        let generation = device.transport.read_config_generation();
        let beyond = filled(sectors, 8, 1500);
        let refused = device.request(0, OUT, sectors, &[&beyond], &mut []);
        ensure!(refused == Ok((IOERR, 1)), "beyond the end: {refused:?}");

        let mut seen = line.count();
        println!("grow {index}");
        while !device
            .transport
            .ack_interrupt()
            .contains(InterruptStatus::DEVICE_CONFIGURATION_INTERRUPT)
        {
            line.wait(seen);
            seen = line.count();
        }
        let found = capacity(&device)?;
        ensure!(found == 2 * sectors, "{found} sectors after the interrupt");
        let now = device.transport.read_config_generation();
        ensure!(now != generation, "the generation is still {now}");
        compare(
            sectors,
            &device.read(0, sectors, 8)?,
            &vec![0; beyond.len()],
        )?;
        for sector in [sectors, 2 * sectors - 8] {
            device.write(0, sector, &beyond)?;
            compare(sector, &device.read(0, sector, 8)?, &beyond)?;
            device.expect(TYPE_WRITE_ZEROES, 0, &[&segment(sector, 8, UNMAP)], OK)?;
        }
        device.expect(TYPE_FLUSH, 0, &[], OK)
    })?;
    disk.plan.sectors = 2 * sectors;
    Ok(())
}
