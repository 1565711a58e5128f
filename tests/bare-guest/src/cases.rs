//! The cases. Those that write keep to the stripes that [`content`](crate::content) names; what they
//! leave there, `content` overwrites in the end.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;
use core::arch::x86_64::_rdtsc;
use core::slice;

use virtio_drivers::Error;
use virtio_drivers::transport::{DeviceStatus, Transport};

use crate::content::{self, SECTOR_SIZE, STRIPE};
use crate::disk::{Direction, Disk, Transfer, transfer};
use crate::{broken, features, println, segments, stamps};

/// What a case found wrong.
pub type Outcome = Result<(), String>;

/// Returns an error unless the condition holds.
#[macro_export]
macro_rules! ensure {
    ($condition:expr, $($message:tt)+) => {
        if !$condition {
            return Err(format!($($message)+));
        }
    };
}

/// Runs the case `name` on `disks`.
pub fn run(name: &str, disks: &mut [Disk]) -> Outcome {
    if let Some(start) = name.strip_prefix("stamps-") {
        return stamps::run(start, disks);
    }
    let case = match name {
        "identity" => identity,
        "blank" => blank,
        "sizes" => sizes,
        "segments" => segments::run,
        "flush" => flush,
        "beyond-the-end" => beyond_the_end,
        "interrupts" => interrupts,
        "in-flight" => in_flight,
        "restart" => restart,
        "speed" => speed,
        "fill" => fill,
        "content" => content,
        "read-only" => read_only,
        "discard" => features::discard,
        "write-zeroes" => features::write_zeroes,
        "writeback" => features::writeback,
        "queues" => features::queues,
        "grow" => features::grow,
        "broken-rings" => return broken::run(disks),
        "together" => return together(disks),
        "doorbells" => return doorbells(disks),
        _ => return Err(String::from("unknown case")),
    };
    for disk in disks {
        case(disk).map_err(|error| format!("disk {}: {error}", disk.index))?;
    }
    Ok(())
}

fn said(doing: &str) -> impl Fn(Error) -> String {
    move |error| format!("{doing}: {error}")
}

pub fn write(disk: &mut Disk, sector: u64, data: &[u8]) -> Outcome {
    let written = disk.driver().write_blocks(sector as usize, data);
    written.map_err(|error| format!("writing {} bytes to {sector}: {error}", data.len()))
}

pub fn read(disk: &mut Disk, sector: u64, size: usize) -> Result<Vec<u8>, String> {
    let mut data = vec![0xee; size];
    match disk.driver().read_blocks(sector as usize, &mut data) {
        Ok(()) => Ok(data),
        Err(error) => Err(format!("reading {size} bytes from {sector}: {error}")),
    }
}

/// Sectors with content that depends on their place and on `seed`.
pub fn filled(sector: u64, sectors: u64, seed: u64) -> Vec<u8> {
    let mut data = vec![0; sectors as usize * SECTOR_SIZE];
    content::fill(&mut data, sector, seed);
    data
}

/// Checks what was read from `sector` on.
pub fn compare(sector: u64, found: &[u8], expected: &[u8]) -> Outcome {
    let differs = found.iter().zip(expected).position(|(a, b)| a != b);
    match differs {
        None => Ok(()),
        Some(at) => Err(format!(
            "sector {}, byte {}: {:#04x} instead of {:#04x}",
            sector + (at / SECTOR_SIZE) as u64,
            at % SECTOR_SIZE,
            found[at],
            expected[at]
        )),
    }
}

/// Reads the whole disk and compares it with what `expect` makes of a piece and its first sector.
fn compare_all(disk: &mut Disk, expect: impl Fn(&mut [u8], u64)) -> Outcome {
    let mut expected = vec![0; 256 * SECTOR_SIZE];
    let mut sector = 0;
    while sector < disk.plan.sectors {
        let count = (disk.plan.sectors - sector).min(256);
        let expected = &mut expected[..count as usize * SECTOR_SIZE];
        expect(expected, sector);
        compare(sector, &read(disk, sector, expected.len())?, expected)?;
        sector += count;
    }
    Ok(())
}

/// Capacity, write protection and serial number are those asked for.
fn identity(disk: &mut Disk) -> Outcome {
    let capacity = disk.driver().capacity();
    ensure!(capacity == disk.plan.sectors, "{capacity} sectors");
    let read_only = disk.driver().readonly();
    ensure!(read_only == disk.plan.read_only, "read-only: {read_only}");
    let mut id = [0; 20];
    let length = disk.driver().device_id(&mut id);
    let length = length.map_err(said("asking for the serial number"))?;
    let serial = String::from_utf8_lossy(&id[..length]);
    ensure!(serial == disk.plan.serial, "serial number '{serial}'");
    Ok(())
}

/// A disk that nobody has written to reads as zeros.
fn blank(disk: &mut Disk) -> Outcome {
    compare_all(disk, |expected, _| expected.fill(0))
}

/// Requests of many sizes, at places that are aligned to nothing.
fn sizes(disk: &mut Disk) -> Outcome {
    for (seed, count) in [1, 2, 3, 7, 8, 9, 127, 128, 129, 255, 256]
        .into_iter()
        .enumerate()
    {
        for sector in [0, 1, 37] {
            let data = filled(sector, count, 100 + seed as u64);
            write(disk, sector, &data)?;
            compare(sector, &read(disk, sector, data.len())?, &data)?;
        }
    }
    Ok(())
}

/// Flushes, among writes.
fn flush(disk: &mut Disk) -> Outcome {
    for sector in 0..20 {
        if !disk.plan.read_only {
            write(disk, sector, &filled(sector, 1, 300))?;
        }
        disk.driver().flush().map_err(said("flushing"))?;
    }
    Ok(())
}

/// Requests that reach beyond the end fail, change nothing, and do no harm to the next.
fn beyond_the_end(disk: &mut Disk) -> Outcome {
    let end = disk.plan.sectors;
    let before = read(disk, end - 2, 2 * SECTOR_SIZE)?;
    for sector in [end - 1, end, end + 1, 1 << 32, 1 << 55, u64::MAX] {
        let mut data = filled(sector & 0xffff, 2, 400);
        let read = disk.driver().read_blocks(sector as usize, &mut data);
        ensure!(read == Err(Error::IoError), "reading {sector:#x}: {read:?}");
        let written = disk.driver().write_blocks(sector as usize, &data);
        ensure!(
            written == Err(Error::IoError),
            "writing {sector:#x}: {written:?}"
        );
    }
    compare(end - 2, &read(disk, end - 2, 2 * SECTOR_SIZE)?, &before)
}

/// One request at a time, each waited for in sleep.
fn interrupts(disk: &mut Disk) -> Outcome {
    // After a reset the device has nothing more to signal for earlier requests.
    disk.without_driver(|_| ());
    let before = disk.interrupts();
    let mut requests = 0;
    for number in 0..200 {
        let sector = number % 250;
        let mut expected = vec![0; 2 * SECTOR_SIZE];
        if disk.plan.read_only {
            content::expect(&mut expected, sector, disk.index);
        } else {
            content::fill(&mut expected, sector, 500 + number);
            one(disk, Direction::Write, sector, expected.clone())?;
            requests += 1;
        }
        let found = one(disk, Direction::Read, sector, vec![0xee; expected.len()])?;
        requests += 1;
        compare(sector, &found, &expected)?;
    }
    // Of earlier requests one interrupt may be on its way to the controller, and one wait in it.
    let count = disk.interrupts() - before;
    ensure!(
        count <= requests + 2,
        "{count} interrupts for {requests} requests"
    );
    Ok(())
}

fn one(
    disk: &mut Disk,
    direction: Direction,
    sector: u64,
    data: Vec<u8>,
) -> Result<Vec<u8>, String> {
    let mut list = [vec![Transfer::new(direction, sector, data)]];
    transfer(slice::from_mut(disk), &mut list)?;
    Ok(list[0].remove(0).data)
}

/// As many requests at a time as the queue takes.
fn in_flight(disk: &mut Disk) -> Outcome {
    full_queues(slice::from_mut(disk))
}

/// All disks at once, each with a full queue.
fn together(disks: &mut [Disk]) -> Outcome {
    ensure!(disks.len() > 1, "one disk only");
    full_queues(disks)
}

fn full_queues(disks: &mut [Disk]) -> Outcome {
    const SECTORS: u64 = 15;
    let indices: Vec<_> = disks.iter().map(|disk| disk.index).collect();
    let requests = u64::from(disks[0].driver().virt_queue_size());
    // A list for each disk, of requests whose data `data` makes of the sector and the disk.
    let lists = |direction, data: &dyn Fn(u64, usize) -> Vec<u8>| -> Vec<Vec<_>> {
        let list = |disk| {
            let sectors = (0..requests).map(|number| number * SECTORS);
            sectors
                .map(|sector| Transfer::new(direction, sector, data(sector, disk)))
                .collect()
        };
        indices.iter().copied().map(list).collect()
    };
    for round in 0..20 {
        let written = |sector, disk| filled(sector, SECTORS, 600 + round * 32 + disk as u64);
        transfer(disks, &mut lists(Direction::Write, &written))?;
        let mut reads = lists(Direction::Read, &|_, _| {
            vec![0xee; SECTORS as usize * SECTOR_SIZE]
        });
        transfer(disks, &mut reads)?;
        for (disk, list) in indices.iter().zip(reads) {
            for read in list {
                compare(read.sector, &read.data, &written(read.sector, *disk))
                    .map_err(|error| format!("round {round}, disk {disk}: {error}"))?;
            }
        }
    }
    Ok(())
}

/// The driver gives the device up, resets it and sets it up anew, again and again.
fn restart(disk: &mut Disk) -> Outcome {
    for round in 0..20 {
        let data = filled(round, 3, 700 + round);
        write(disk, round, &data)?;
        disk.without_driver(|mut transport| {
            transport.set_status(DeviceStatus::empty());
            let status = transport.get_status();
            ensure!(status.is_empty(), "status {status:?} after a reset");
            Ok(())
        })?;
        compare(round, &read(disk, round, data.len())?, &data)?;
    }
    Ok(())
}

/// Tells how long requests take, for information.
fn speed(disk: &mut Disk) -> Outcome {
    const COUNT: u64 = 64;
    for (name, size) in [("4 KiB", 4 << 10), ("128 KiB", 128 << 10)] {
        let data = filled(0, (size / SECTOR_SIZE) as u64, 800);
        let mut writing = 0;
        let mut reading = 0;
        for _ in 0..COUNT {
            // SAFETY: every processor here has the counter.
            let now = || unsafe { _rdtsc() };
            let start = now();
            write(disk, 0, &data)?;
            let middle = now();
            read(disk, 0, size)?;
            writing += middle - start;
            reading += now() - middle;
        }
        println!(
            "speed disk {}, {name}: writing takes {} cycles, reading {}",
            disk.index,
            writing / COUNT,
            reading / COUNT
        );
    }
    Ok(())
}

/// Writes every other stripe, in requests of all sizes.
fn fill(disk: &mut Disk) -> Outcome {
    let end = disk.plan.sectors;
    let mut size = 0;
    for stripe in (0..end).step_by(2 * STRIPE as usize) {
        let mut sector = stripe;
        while sector < end.min(stripe + STRIPE) {
            size = size % 64 + 1;
            let count = size.min(end.min(stripe + STRIPE) - sector);
            let data = filled(sector, count, disk.index as u64);
            write(disk, sector, &data)?;
            sector += count;
        }
    }
    disk.driver().flush().map_err(said("flushing"))
}

/// The whole disk is as [`fill`] leaves it.
fn content(disk: &mut Disk) -> Outcome {
    let index = disk.index;
    compare_all(disk, |expected, sector| {
        content::expect(expected, sector, index)
    })
}

/// A disk that is read-only says so and takes no writes.
fn read_only(disk: &mut Disk) -> Outcome {
    ensure!(disk.driver().readonly(), "it is not read-only");
    for sector in [0, STRIPE] {
        let written = disk
            .driver()
            .write_blocks(sector as usize, &[0xaa; 2 * SECTOR_SIZE]);
        ensure!(
            written == Err(Error::IoError),
            "writing {sector}: {written:?}"
        );
    }
    Ok(())
}

/// Rings doorbells ten times as often as it reads a register, so that the host can tell which of
/// them it has had to handle; the device has to take them as they are, without requests.
fn doorbells(disks: &mut [Disk]) -> Outcome {
    /// ACKNOWLEDGE, DRIVER, FEATURES_OK and DRIVER_OK.
    const RUNNING: u32 = 0xf;
    for disk in disks {
        for number in 0..1000 {
            (0..10).for_each(|_| disk.ring());
            let status = disk.status();
            ensure!(
                status == RUNNING,
                "status {status:#x} after {number} rounds"
            );
        }
        let data = filled(0, 1, 900);
        write(disk, 0, &data)?;
        compare(0, &read(disk, 0, SECTOR_SIZE)?, &data)?;
    }
    Ok(())
}
