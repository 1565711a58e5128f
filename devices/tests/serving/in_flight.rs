//! Requests that wait for a device, and those that need not.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tandem_block::{Disk, Limits, Result};
use vm_memory::{Bytes, VolatileSlice};

use crate::common::disk::MemoryDisk;
use crate::common::gate::Call;
use crate::common::guest_memory;
use crate::driver::{Driver, FLUSH, GET_ID, IN, NO_STATUS, OUT};
use crate::machine::{Machine, within_deadline};
use crate::registers::{FEATURE_FLUSH, ring_doorbell, start_queues};
use crate::{Bench, COLD};

#[test]
fn cold_data_does_not_stall_hot() {
    within_deadline(|| {
        let mut bench = Bench::started();
        bench.disk.close();
        let driver = &bench.drivers[0];
        driver.put(0, IN, COLD, 512);
        driver.put(1, IN, 10, 512);
        driver.put(2, IN, COLD + 2, 512);
        driver.put(3, IN, 20, 512);
        bench.offer(0, &[0, 1, 2, 3]);
        assert_eq!(bench.drivers[0].wait_for_used(2), [(1, 513), (3, 513)]);
        bench.disk.wait_for_waiting(2);
        // And those that come later.
        bench.drivers[0].put(4, OUT, 30, 512);
        bench.drivers[0].put(5, GET_ID, 0, 20);
        bench.offer(0, &[4, 5]);
        assert_eq!(bench.drivers[0].wait_for_used(2), [(4, 1), (5, 21)]);

        let driver = &mut bench.drivers[0];
        assert_eq!((driver.status(0), driver.status(2)), (NO_STATUS, NO_STATUS));
        bench.disk.open();
        let mut cold = driver.wait_for_used(2);
        cold.sort_unstable();
        assert_eq!(cold, [(0, 513), (2, 513)]);
        for (place, fill) in [(0, COLD as u8), (1, 10), (2, COLD as u8 + 2), (3, 20)] {
            assert_eq!(driver.status(place), 0);
            assert_eq!(driver.data(place, 512), [fill; 512]);
        }
        let counters = bench.machine.stats.queues()[0];
        assert_eq!((counters.reads, counters.handed_on), (4, 2));
    });
}

#[test]
fn as_many_requests_wait_at_once_as_there_are_threads() {
    within_deadline(|| {
        let mut bench = Bench::new(|options| {
            options.queues = 2;
            options.threads = 5;
        });
        bench.start(FEATURE_FLUSH);
        bench.disk.close();
        for queue in [0, 1] {
            let driver = &bench.drivers[queue];
            for place in 0..8 {
                driver.put(place, IN, COLD + 2 * u64::from(place), 512);
            }
            driver.put(8, IN, 0, 512);
            bench.offer(queue, &[0, 1, 2, 3, 4, 5, 6, 7, 8]);
        }
        bench.disk.wait_for_waiting(5);
        for driver in &mut bench.drivers {
            assert_eq!(driver.wait_for_used(1), [(8, 513)]);
        }
        assert_eq!(bench.disk.waiting(), 5);
        bench.disk.open();
        for driver in &mut bench.drivers {
            driver.wait_for_used(8);
            for place in 0..8 {
                assert_eq!(driver.data(place, 512), [COLD as u8 + 2 * place as u8; 512]);
            }
        }
    });
}

#[test]
fn without_threads_of_its_own_for_it_the_queue_waits() {
    within_deadline(|| {
        let mut bench = Bench::new(|options| options.threads = 0);
        bench.start(FEATURE_FLUSH);
        bench.drivers[0].put(0, IN, COLD, 512);
        bench.drivers[0].put(1, FLUSH, 0, 0);
        bench.offer(0, &[0, 1]);
        bench.drivers[0].wait_for_used(2);
        let expected = [Call::Read(512 * COLD, 512), Call::Flush];
        assert_eq!(bench.disk.take_calls(), expected);
    });
}

#[test]
fn flush_under_way_does_not_hold_up_the_others() {
    within_deadline(|| {
        let mut bench = Bench::started();
        bench.disk.close();
        let driver = &bench.drivers[0];
        driver.put(0, FLUSH, 0, 0);
        driver.put(1, IN, 3, 512);
        driver.put(2, OUT, 4, 512);
        driver.put(3, IN, COLD, 512);
        bench.offer(0, &[0, 1, 2, 3]);
        assert_eq!(bench.drivers[0].wait_for_used(2), [(1, 513), (2, 1)]);
        bench.disk.wait_for_waiting(2);
        bench.disk.open();
        bench.drivers[0].wait_for_used(2);
    });
}

/// A disk that knows what a power failure would leave. Every second write has to be waited for.
struct Volatile {
    disk: MemoryDisk,
    durable: Mutex<Vec<u8>>,
    writes: AtomicU64,
}

impl Disk for Volatile {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn limits(&self) -> Limits {
        self.disk.limits()
    }
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.disk.read_at(bufs, offset)
    }
    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        if self.writes.fetch_add(1, Ordering::SeqCst).is_multiple_of(2) {
            return Ok(false);
        }
        self.disk.write_at(bufs, offset).map(|()| true)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        std::thread::yield_now();
        self.disk.write_at(bufs, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard(offset, len)
    }
    fn flush(&self) -> Result<()> {
        // Just what had been written when it began.
        let content = self.disk.content();
        std::thread::yield_now();
        *self.durable.lock().unwrap() = content;
        Ok(())
    }
}

/// With many writes in flight, a completed flush has made durable what had been completed when it
/// was offered.
#[test]
fn flush_covers_what_was_completed_before() {
    within_deadline(|| {
        let disk = Arc::new(Volatile {
            disk: MemoryDisk::new(64),
            durable: Mutex::new(vec![0; 64 * 512]),
            writes: AtomicU64::new(0),
        });
        let mem = guest_memory();
        let machine = Machine::new(disk.clone(), &mem);
        let mut driver = Driver::new(&mem, 0, 64);
        start_queues(&machine, &[&driver.ring], FEATURE_FLUSH);
        // Place 63 flushes, the others each write a sector of their own, which do not adjoin.
        let flush = 63;
        let sector_of = |place: u16| u64::from(place) * 5 % 64;
        let mut completed = HashMap::new();
        for round in 1..=100u8 {
            for place in 0..flush {
                driver.set_data(place, &[round; 512]);
                driver.put(place, OUT, sector_of(place), 512);
            }
            let places: Vec<u16> = (0..flush).collect();
            driver.offer(&places);
            ring_doorbell(&machine);
            let mut answered = driver.wait_for_used(0);
            while answered.len() < usize::from(round) % 60 {
                answered.extend(driver.take_used());
            }
            let done = answered.iter().map(|&(place, _)| (place, round));
            completed.extend(done);
            let expected = completed.clone();
            driver.put(flush, FLUSH, 0, 0);
            driver.offer(&[flush]);
            ring_doorbell(&machine);
            while !answered.iter().any(|&(place, _)| place == flush) {
                answered.extend(driver.take_used());
            }
            let durable = disk.durable.lock().unwrap().clone();
            for (place, at_least) in expected {
                let value = durable[512 * sector_of(place) as usize];
                assert!(value >= at_least, "{place} in round {round}");
            }
            while answered.len() < 64 {
                answered.extend(driver.take_used());
            }
            completed.extend((0..flush).map(|place| (place, round)));
        }
        assert_eq!(machine.stats.failed_requests(), 0);
    });
}

/// The bytes of a request come from where the driver said and go nowhere else.
#[test]
fn memory_that_no_request_names_stays_as_it_is() {
    within_deadline(|| {
        let mut bench = Bench::started();
        let addr = vm_memory::GuestAddress(bench.drivers[0].data_addr(0));
        bench.mem.write_slice(&[0x55; 2048], addr).unwrap();
        bench.drivers[0].put(0, IN, COLD, 512);
        bench.drivers[0].put(1, IN, 1, 512);
        bench.offer(0, &[0, 1]);
        bench.drivers[0].wait_for_used(2);
        let data = bench.drivers[0].data(0, 2048);
        assert_eq!(data[..512], [COLD as u8; 512]);
        assert_eq!(data[512..], [0x55; 1536]);
    });
}
