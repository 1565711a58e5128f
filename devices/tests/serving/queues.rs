//! Several queues at once, on a file.

use std::fs;
use std::sync::Arc;
use std::thread;

use tandem_block::{Disk, Raw};
use tandem_devices::GuestMemory;
use tandem_devices::virtio::FEATURE_EVENT_IDX;
use tandem_devices::virtio::block::{Counters, Rate};
use vm_memory::GuestAddress;

use crate::common::gate::Gate;
use crate::driver::{Driver, IN, OUT};
use crate::machine::{Machine, within_deadline};
use crate::registers::{FEATURE_FLUSH, start_queues, write};

const QUEUES: u16 = 4;
const SIZE: u16 = 32;
/// Blocks of eight sectors that belong to one queue. Those of all queues lie in turn.
const BLOCKS: u64 = 64;
const BLOCK: usize = 4096;

/// Pseudo-random numbers.
struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// Reads and writes the blocks of queue `index`, many at once, and returns what they hold at last.
fn work(machine: &Machine, driver: &mut Driver, index: u64) -> Vec<u8> {
    let mut random = Random(0x9e37_79b9_7f4a_7c15 + index);
    let mut model = vec![0u8; BLOCKS as usize];
    for round in 0..60 {
        // Each block once, so that the order does not matter: runs of adjacent ones among them.
        let first = random.below(BLOCKS);
        let count = 1 + random.below(SIZE.into()) as u16;
        let mut expected = Vec::new();
        for place in 0..count {
            let block = (first + u64::from(place)) % BLOCKS;
            let sector = 8 * (QUEUES as u64 * block + index);
            if random.below(2) == 0 {
                let fill = 1 + random.below(255) as u8;
                driver.set_data(place, &[fill; BLOCK]);
                driver.put(place, OUT, sector, BLOCK as u32);
                model[block as usize] = fill;
            } else {
                driver.put(place, IN, sector, BLOCK as u32);
                expected.push((place, model[block as usize]));
            }
        }
        let mut places: Vec<u16> = (0..count).collect();
        if round % 3 == 0 {
            places.reverse();
        }
        driver.offer(&places);
        write(machine, 0x50, index as u32);
        driver.wait_for_used(count.into());
        for place in places {
            assert_eq!(driver.status(place), 0);
        }
        for (place, fill) in expected {
            assert_eq!(driver.data(place, BLOCK), [fill; BLOCK], "round {round}");
        }
    }
    model
}

fn check(open: impl Fn(Raw) -> Arc<dyn Disk>, threads: usize, rate: Option<Rate>) -> Vec<Counters> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk.raw");
    let blocks = u64::from(QUEUES) * BLOCKS;
    fs::write(&path, vec![0; blocks as usize * BLOCK]).unwrap();
    let disk = open(Raw::open(&path, false).unwrap());
    let len = Driver::memory_len(SIZE).next_multiple_of(0x1000);
    let memory = usize::from(QUEUES) * len as usize;
    let mem = GuestMemory::from_ranges(&[(GuestAddress(0), memory)]).unwrap();
    let machine = Machine::with_options(disk, &mem, |options| {
        options.queues = QUEUES;
        options.threads = threads;
        options.rate.requests = rate;
    });
    let mut drivers: Vec<_> = (0..u64::from(QUEUES))
        .map(|n| Driver::new(&mem, n * len, SIZE))
        .collect();
    let rings: Vec<_> = drivers.iter().map(|driver| &driver.ring).collect();
    start_queues(&machine, &rings, FEATURE_FLUSH | FEATURE_EVENT_IDX);
    let machine = &machine;
    let models: Vec<Vec<u8>> = thread::scope(|scope| {
        let threads: Vec<_> = (0..)
            .zip(&mut drivers)
            .map(|(index, driver)| scope.spawn(move || work(machine, driver, index)))
            .collect();
        threads
            .into_iter()
            .map(|thread| thread.join().unwrap())
            .collect()
    });
    machine.device.shutdown();
    let content = fs::read(&path).unwrap();
    for (n, block) in content.chunks(BLOCK).enumerate() {
        let fill = models[n % usize::from(QUEUES)][n / usize::from(QUEUES)];
        assert!(block.iter().all(|&byte| byte == fill), "block {n}");
    }
    let queues = machine.stats.queues();
    assert!(
        queues
            .iter()
            .all(|queue| queue.reads > 0 && queue.failed == 0)
    );
    assert_eq!(machine.stats.broken_rings(), 0);
    queues
}

#[test]
fn queues_serve_a_file_together() {
    within_deadline(|| {
        check(|raw| Arc::new(raw), 16, None);
    });
}

#[test]
fn queues_share_the_threads_for_what_waits() {
    within_deadline(|| {
        for threads in [1, 3] {
            let queues = check(|raw| Arc::new(Gate::new(raw, 0)), threads, None);
            assert!(queues.iter().all(|queue| queue.handed_on > 0));
        }
    });
}

#[test]
fn queues_share_a_limit() {
    within_deadline(|| {
        let half_cold = BLOCKS * BLOCK as u64 * 2;
        check(
            |raw| Arc::new(Gate::new(raw, half_cold)),
            2,
            Rate::new(100_000, 8),
        );
    });
}
