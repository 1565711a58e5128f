//! Requests per second of one queue, with the driver and the device in this process.
//!
//! `cargo bench -p tandem-devices --bench queue` prints the best of some rounds for reads of 4 KiB of a
//! file in the page cache (in `TANDEM_BENCH_DIR`, default `/dev/shm`), at random and one behind the
//! other, with so many in flight at once. Where the machine has other things to do, the processor time
//! tells more. The driver does as Linux does: it rings the doorbell when
//! it is wanted, and sleeps until the interrupt when nothing has been answered.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a benchmark fails by panicking"
)]

#[path = "../tests/common/driver.rs"]
mod driver;
#[path = "../tests/common/ring.rs"]
pub mod ring;

/// Where the driver expects it.
mod common {
    pub use crate::ring;
}

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use driver::{Driver, IN};
use tandem_block::{Disk, Raw};
use tandem_devices::GuestMemory;
use tandem_devices::bus::BusDevice;
use tandem_devices::virtio::block::{Block, Options};
use tandem_devices::virtio::mmio::VirtioMmio;
use tandem_devices::virtio::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_VERSION_1};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

const FILE_SIZE: u64 = 64 << 20;
const BLOCK: u64 = 4096;
const QUEUE_SIZE: u16 = 256;
const ROUND: Duration = Duration::from_millis(500);
const ROUNDS: usize = 5;
const FEATURE_FLUSH: u64 = 1 << 9;

fn block(disk: Arc<dyn Disk>) -> Block {
    Block::new(disk, Options::default())
}

fn main() {
    let dir = std::env::var("TANDEM_BENCH_DIR").unwrap_or_else(|_| "/dev/shm".into());
    let dir = tempfile::tempdir_in(dir).unwrap();
    let path = dir.path().join("disk.raw");
    std::fs::write(&path, vec![1; FILE_SIZE as usize]).unwrap();
    let disk: Arc<dyn Disk> = Arc::new(Raw::open(&path, true).unwrap());
    println!(
        "{:<12} {:>6} {:>12} {:>10}",
        "4 KiB reads", "depth", "requests/s", "CPU µs"
    );
    for (name, is_random) in [("random", true), ("sequential", false)] {
        for depth in [1, 32, 128] {
            let (rate, cost) = measure(&disk, depth, is_random);
            println!("{name:<12} {depth:>6} {rate:>12.0} {cost:>10.2}");
        }
    }
}

/// The device and its driver.
struct Machine {
    device: VirtioMmio,
    irq: EventFd,
    mem: GuestMemory,
    driver: Driver,
    in_flight: u16,
    next_block: u64,
    is_random: bool,
}

/// Requests per second, and microseconds of processor time that each took on both sides.
fn measure(disk: &Arc<dyn Disk>, depth: u16, is_random: bool) -> (f64, f64) {
    let len = Driver::memory_len(QUEUE_SIZE) as usize;
    let mem = GuestMemory::from_ranges(&[(GuestAddress(0), len)]).unwrap();
    let irq = EventFd::new(EFD_NONBLOCK).unwrap();
    let block = Box::new(block(Arc::clone(disk)));
    let device = VirtioMmio::new(block, mem.clone(), irq.try_clone().unwrap()).unwrap();
    let mut machine = Machine {
        driver: Driver::new(&mem, 0, QUEUE_SIZE),
        device,
        irq,
        mem,
        in_flight: 0,
        next_block: 0x1234_5678,
        is_random,
    };
    machine.start();
    for place in 0..depth {
        machine.driver.put(place, IN, 0, BLOCK as u32);
    }
    let places: Vec<u16> = (0..depth).collect();
    machine.submit(&places);
    let rounds = (0..ROUNDS).map(|_| machine.round());
    rounds.fold((0.0, f64::INFINITY), |best, (rate, cost)| {
        (best.0.max(rate), best.1.min(cost))
    })
}

/// Processor time of the process.
fn processor_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: the structure is valid.
    let result = unsafe { libc::clock_gettime(libc::CLOCK_PROCESS_CPUTIME_ID, &mut time) };
    assert_eq!(result, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

impl Machine {
    fn write(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    fn start(&self) {
        let features =
            FEATURE_VERSION_1 | FEATURE_INDIRECT_DESC | FEATURE_EVENT_IDX | FEATURE_FLUSH;
        self.write(0x70, 3);
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        let ring = &self.driver.ring;
        for (register, value) in [
            (0x70, 0xb),
            (0x38, QUEUE_SIZE.into()),
            (0x80, ring.table as u32),
            (0x90, ring.avail as u32),
            (0xa0, ring.used as u32),
            (0x44, 1),
            (0x70, 0xf),
        ] {
            self.write(register, value);
        }
        let mut status = [0; 4];
        self.device.read(0x70, &mut status);
        assert_eq!(status, [0xf, 0, 0, 0]);
    }

    /// Keeps as many requests in flight for a while.
    fn round(&mut self) -> (f64, f64) {
        let (start, processor_start) = (Instant::now(), processor_time());
        let mut count = 0;
        while start.elapsed() < ROUND {
            let answered = self.wait();
            count += answered.len();
            self.submit(&answered);
        }
        let rate = count as f64 / start.elapsed().as_secs_f64();
        let used = processor_time() - processor_start;
        (rate, used.as_secs_f64() * 1e6 / count as f64)
    }

    fn submit(&mut self, places: &[u16]) {
        for &place in places {
            self.next_block = if self.is_random {
                self.next_block.wrapping_mul(6_364_136_223_846_793_005) + 1
            } else {
                self.next_block + 1
            };
            let block =
                (self.next_block >> if self.is_random { 33 } else { 0 }) % (FILE_SIZE / BLOCK);
            self.driver.set_sector(place, block * BLOCK / 512);
        }
        let old = self.driver.ring.avail_idx();
        self.driver.offer(places);
        self.in_flight += places.len() as u16;
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        let event: u16 = self
            .mem
            .read_obj(GuestAddress(
                self.driver.ring.used + 4 + 8 * u64::from(QUEUE_SIZE),
            ))
            .unwrap();
        let new = self.driver.ring.avail_idx();
        if new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old) {
            // As the hypervisor does it for the guest.
            self.device.doorbells()[0].write(1).unwrap();
        }
    }

    /// Waits until something has been answered.
    fn wait(&mut self) -> Vec<u16> {
        loop {
            let used = self.driver.take_used();
            if !used.is_empty() {
                self.in_flight -= used.len() as u16;
                return used.into_iter().map(|(place, _)| place).collect();
            }
            let ring = &self.driver.ring;
            let seen = ring.used_idx();
            ring.set_used_event(seen);
            std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
            if ring.used_idx() == seen && self.driver.has_seen(seen) {
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
    }
}
