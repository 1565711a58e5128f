//! The whole device while it serves: what waits and what does not, what goes together, how it is
//! stopped, and what its driver and its operator can change meanwhile.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

#[path = "../common/mod.rs"]
mod common;
#[path = "../common/driver.rs"]
mod driver;
#[path = "../common/machine.rs"]
mod machine;
#[path = "../common/registers.rs"]
mod registers;

mod batches;
mod in_flight;
mod queues;
mod random;
mod settings;
mod stopping;

use std::sync::Arc;

use common::disk::MemoryDisk;
use common::gate::Gate;
use common::guest_memory;
use driver::Driver;
use machine::Machine;
use registers::{FEATURE_FLUSH, start_queues};
use tandem_devices::GuestMemory;
use tandem_devices::virtio::block::Options;

const SECTORS: u8 = 200;
/// The first sector that has to be waited for.
const COLD: u64 = 100;

/// A device with one queue or more, each with its driver.
struct Bench {
    disk: Arc<Gate<MemoryDisk>>,
    mem: GuestMemory,
    machine: Machine,
    drivers: Vec<Driver>,
}

impl Bench {
    /// Not started.
    fn new(change: impl FnOnce(&mut Options)) -> Self {
        let disk = Arc::new(Gate::new(MemoryDisk::new(SECTORS), 512 * COLD));
        let mem = guest_memory();
        let machine = Machine::with_options(disk.clone(), &mem, change);
        let drivers = (0..machine.handle.queues()).map(|n| {
            let base = u64::from(n) * Driver::memory_len(64).next_multiple_of(0x1000);
            Driver::new(&mem, base, 64)
        });
        Self {
            drivers: drivers.collect(),
            disk,
            mem,
            machine,
        }
    }

    fn started() -> Self {
        let bench = Self::new(|_| {});
        bench.start(FEATURE_FLUSH);
        bench
    }

    fn start(&self, features: u64) {
        let rings: Vec<_> = self.drivers.iter().map(|driver| &driver.ring).collect();
        start_queues(&self.machine, &rings, features);
    }

    /// Offers what lies in `places` to queue `index`, and rings its doorbell.
    fn offer(&mut self, index: usize, places: &[u16]) {
        self.drivers[index].offer(places);
        registers::write(&self.machine, 0x50, index as u32);
    }
}
