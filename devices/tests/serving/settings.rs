//! What driver and operator can change or see while the device serves.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Barrier};
use std::thread;
use std::time::Duration;

use tandem_block::{Disk, Error, Limits, Result};
use tandem_devices::bus::BusDevice;
use tandem_devices::virtio::block::{Block, LATENCY_BUCKETS, Options, Rate};
use tandem_devices::virtio::{Activation, Interrupt, VirtioDevice};
use vm_memory::VolatileSlice;

use crate::common::gate::Call;
use crate::common::{disk::MemoryDisk, guest_memory};
use crate::driver::{DISCARD, Driver, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES};
use crate::machine::{Machine, within_deadline};
use crate::registers::{
    FEATURE_CONFIG_WCE, FEATURE_DISCARD, FEATURE_FLUSH, FEATURE_WRITE_ZEROES, read, ring_doorbell,
    start_queues, write,
};
use crate::{Bench, COLD, SECTORS};

const CONFIG: u64 = 0x100;

fn writeback(machine: &Machine) -> u8 {
    let mut data = [0xee];
    machine.device.read(CONFIG + 32, &mut data);
    data[0]
}

fn set_writeback(machine: &Machine, value: u8) {
    machine.device.write(CONFIG + 32, &[value]);
}

/// Lets the driver write, to what need not be waited for and to what must, and returns the calls.
fn writes(bench: &mut Bench) -> Vec<Call> {
    bench.disk.take_calls();
    for (place, sector) in [(0, 0), (1, COLD)] {
        bench.drivers[0].put(place, OUT, sector, 512);
        bench.offer(0, &[place]);
        bench.drivers[0].wait_for_used(1);
    }
    bench.disk.take_calls()
}

const WRITES: [Call; 2] = [Call::Write(0, 512), Call::Write(512 * COLD, 512)];
const DURABLE_WRITES: [Call; 4] = [WRITES[0], Call::Flush, WRITES[1], Call::Flush];

#[test]
fn driver_switches_between_write_back_and_write_through() {
    within_deadline(|| {
        let mut bench = Bench::new(|_| {});
        bench.start(FEATURE_FLUSH | FEATURE_CONFIG_WCE);
        assert_eq!(writeback(&bench.machine), 1);
        assert_eq!(writes(&mut bench), WRITES);
        set_writeback(&bench.machine, 0);
        assert_eq!(
            bench.disk.take_calls(),
            [Call::Flush],
            "for what was written before"
        );
        set_writeback(&bench.machine, 0);
        assert_eq!(bench.disk.take_calls(), []);
        assert_eq!(writeback(&bench.machine), 0);
        assert_eq!(writes(&mut bench), DURABLE_WRITES);
        set_writeback(&bench.machine, 1);
        assert_eq!(writeback(&bench.machine), 1);
        assert_eq!(writes(&mut bench), WRITES);

        // A write of any other form changes nothing.
        for (offset, data) in [(32, &[0, 0][..]), (31, &[0, 0]), (33, &[0]), (0, &[0; 64])] {
            bench.machine.device.write(CONFIG + offset, data);
        }
        assert_eq!(writeback(&bench.machine), 1);
        // A reset goes back to write-back.
        set_writeback(&bench.machine, 0);
        write(&bench.machine, 0x70, 0);
        assert_eq!(writeback(&bench.machine), 1);
    });
}

/// A disk that writes without waiting when it is told to.
struct Told {
    disk: MemoryDisk,
    has_begun: Barrier,
    is_told: Barrier,
}

impl Disk for Told {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn limits(&self) -> Limits {
        self.disk.limits()
    }
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.disk.read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.disk.write_at(bufs, offset)
    }
    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        self.has_begun.wait();
        self.is_told.wait();
        self.disk.try_write_at(bufs, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard(offset, len)
    }
    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }
}

/// A write that is under way during the switch, and comes after the flush, completes after the switch.
#[test]
fn a_write_during_the_switch_to_write_through_is_durable() {
    within_deadline(|| {
        let disk = Arc::new(Told {
            disk: MemoryDisk::new(16),
            has_begun: Barrier::new(2),
            is_told: Barrier::new(2),
        });
        let mem = guest_memory();
        let machine = Machine::new(disk.clone(), &mem);
        let mut driver = Driver::new(&mem, 0, 16);
        start_queues(
            &machine,
            &[&driver.ring],
            FEATURE_FLUSH | FEATURE_CONFIG_WCE,
        );
        driver.put(0, OUT, 3, 512);
        driver.offer(&[0]);
        ring_doorbell(&machine);
        disk.has_begun.wait();
        set_writeback(&machine, 0);
        assert_eq!(disk.disk.flushes.load(Ordering::SeqCst), 1);
        disk.is_told.wait();
        driver.wait_for_used(1);
        assert_eq!(driver.status(0), 0);
        assert_eq!(disk.disk.flushes.load(Ordering::SeqCst), 2);
        assert!(disk.disk.content()[512 * 3..][..512] == driver.data(0, 512));
    });
}

#[test]
fn write_through_that_cannot_be_reached_is_not_shown() {
    within_deadline(|| {
        let mut bench = Bench::new(|_| {});
        bench.start(FEATURE_FLUSH | FEATURE_CONFIG_WCE);
        bench.disk.disk.is_failing.store(true, Ordering::SeqCst);
        set_writeback(&bench.machine, 0);
        assert_eq!(writeback(&bench.machine), 1);
        assert!(bench.machine.stats.last_error().is_some());
        bench.disk.disk.is_failing.store(false, Ordering::SeqCst);
        assert_eq!(writes(&mut bench), WRITES);
    });
}

#[test]
fn drivers_that_cannot_flush_have_their_writes_made_durable() {
    within_deadline(|| {
        let mut bench = Bench::new(|_| {});
        bench.start(FEATURE_CONFIG_WCE);
        assert_eq!(writeback(&bench.machine), 0);
        assert_eq!(writes(&mut bench), DURABLE_WRITES);
        // It may choose what it likes.
        set_writeback(&bench.machine, 1);
        assert_eq!(writes(&mut bench), DURABLE_WRITES);
    });
    within_deadline(|| {
        // One that has not accepted the choice has none.
        let mut bench = Bench::started();
        set_writeback(&bench.machine, 0);
        assert_eq!(writes(&mut bench), WRITES);
    });
}

/// A driver looks at the write cache before it starts the device.
#[test]
fn drivers_that_cannot_flush_find_no_write_cache_from_the_negotiation_on() {
    let machine = Machine::new(Arc::new(MemoryDisk::new(16)), &guest_memory());
    for (features, expected) in [
        (FEATURE_CONFIG_WCE, 0),
        (FEATURE_CONFIG_WCE | FEATURE_FLUSH, 1),
    ] {
        write(&machine, 0x70, 0);
        write(&machine, 0x70, 3);
        for (half, word) in [(0, features as u32), (1, 1)] {
            write(&machine, 0x24, half);
            write(&machine, 0x20, word);
        }
        assert_eq!(writeback(&machine), 1, "not negotiated yet");
        write(&machine, 0x70, 0xb);
        assert_eq!(read(&machine, 0x70), 0xb);
        assert_eq!(writeback(&machine), expected);
    }
}

/// For a device whose driver is not asked.
struct NoInterrupt;

impl Interrupt for NoInterrupt {
    fn signal_queue(&self, _index: u16) {}
    fn signal_config(&self) {}
    fn needs_reset(&self) {}
}

/// A transport may start the device anew without a reset, as vhost-user does when a guest's firmware
/// has handed over to its system.
#[test]
fn what_a_driver_could_not_do_does_not_hold_for_the_next_one() {
    const BOTH: u64 = FEATURE_FLUSH | FEATURE_CONFIG_WCE;
    let mut block = Block::new(Arc::new(MemoryDisk::new(16)), Options::default());
    let mut start = |features, choice: Option<u8>| {
        let activation = Activation {
            mem: guest_memory(),
            features,
            interrupt: Arc::new(NoInterrupt),
        };
        block.activate(activation).unwrap();
        if let Some(choice) = choice {
            block.write_config(32, &[choice]);
        }
        let mut shown = [0xee];
        block.read_config(32, &mut shown);
        shown[0]
    };
    assert_eq!(start(FEATURE_CONFIG_WCE, None), 0);
    assert_eq!(start(FEATURE_CONFIG_WCE, Some(1)), 0);
    assert_eq!(start(BOTH, None), 1);
    assert_eq!(start(BOTH, Some(0)), 0);
    assert_eq!(start(BOTH, None), 0, "the driver's choice stays");
}

#[test]
fn a_disk_without_a_cache_shows_none() {
    let disk = Arc::new(MemoryDisk::without_write_cache(16));
    let machine = Machine::new(disk, &guest_memory());
    assert_eq!(writeback(&machine), 0);
    set_writeback(&machine, 1);
    assert_eq!(writeback(&machine), 0);
}

fn capacity(machine: &Machine) -> u64 {
    u64::from(read(machine, CONFIG)) | u64::from(read(machine, CONFIG + 4)) << 32
}

#[test]
fn driver_is_told_of_another_size() {
    within_deadline(|| {
        let mut bench = Bench::started();
        let handle = bench.machine.handle.clone();
        let generation = |bench: &Bench| read(&bench.machine, 0xfc);
        let before = generation(&bench);
        bench.machine.take_interrupts();
        // To what it is already.
        handle.resize(512 * u64::from(SECTORS)).unwrap();
        assert_eq!(
            (bench.machine.take_interrupts(), generation(&bench)),
            (0, before)
        );

        handle.resize(512 * 300).unwrap();
        assert_eq!(bench.machine.take_interrupts(), 1);
        assert_eq!(read(&bench.machine, 0x60), 2);
        assert_ne!(generation(&bench), before);
        assert_eq!(capacity(&bench.machine), 300);
        bench.drivers[0].put(0, IN, 299, 512);
        bench.offer(0, &[0]);
        bench.drivers[0].wait_for_used(1);
        assert_eq!(bench.drivers[0].status(0), 0);

        // Where it fails, the driver hears nothing.
        bench.machine.take_interrupts();
        bench.disk.disk.is_failing.store(true, Ordering::SeqCst);
        assert!(handle.resize(0).is_err());
        assert_eq!(
            (bench.machine.take_interrupts(), capacity(&bench.machine)),
            (0, 300)
        );
        bench.disk.disk.is_failing.store(false, Ordering::SeqCst);
        handle.resize(512 * 100).unwrap();
        assert_eq!(capacity(&bench.machine), 100);
    });
}

#[test]
fn driver_that_is_still_looking_is_told_at_the_start() {
    within_deadline(|| {
        let bench = Bench::new(|_| {});
        let before = read(&bench.machine, 0xfc);
        bench.machine.handle.resize(512 * 300).unwrap();
        // It has no way yet to notice a change, so there is none.
        assert_eq!(capacity(&bench.machine), u64::from(SECTORS));
        assert_eq!(
            (read(&bench.machine, 0xfc), bench.machine.take_interrupts()),
            (before, 0)
        );
        // A driver begins with a reset.
        write(&bench.machine, 0x70, 0);
        assert_eq!(capacity(&bench.machine), 300);
        write(&bench.machine, 0x70, 3);
        bench.machine.handle.resize(512 * 320).unwrap();
        assert_eq!(capacity(&bench.machine), 300);
        for (register, value) in [(0x24, 1), (0x20, 1), (0x70, 0xb), (0x70, 0xf)] {
            write(&bench.machine, register, value);
        }
        assert_eq!(
            (bench.machine.take_interrupts(), read(&bench.machine, 0x60)),
            (1, 2)
        );
        assert_eq!(capacity(&bench.machine), 320);
        assert_ne!(read(&bench.machine, 0xfc), before);
    });
}

/// A disk of any size and no content.
struct Elastic(AtomicU64);

impl Disk for Elastic {
    fn size(&self) -> u64 {
        self.0.load(Ordering::SeqCst)
    }
    fn limits(&self) -> Limits {
        Limits::new(512, false)
    }
    fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }
    fn write_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(Error::ReadOnly)
    }
    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }
    fn flush(&self) -> Result<()> {
        Ok(())
    }
    fn resize(&self, size: u64) -> Result<()> {
        self.0.store(size, Ordering::SeqCst);
        Ok(())
    }
}

/// A driver that reads the capacity in halves, and the generation before and after (virtio 1.3,
/// section 4.2.2), never gets half of each.
#[test]
fn capacity_is_never_torn() {
    within_deadline(|| {
        // In sectors, halves that differ.
        let sizes = [0x1_0000_0000, 0xffff_ffff, 0x2_0000_0007];
        let mem = guest_memory();
        let machine = Machine::new(Arc::new(Elastic(AtomicU64::new(512 * sizes[0]))), &mem);
        start_queues(&machine, &[&Driver::new(&mem, 0, 64).ring], 0);
        let is_over = AtomicBool::new(false);
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for n in 0..3000 {
                        machine.handle.resize(512 * sizes[n % 3]).unwrap();
                        if n % 16 == 0 {
                            thread::yield_now();
                        }
                    }
                    is_over.store(true, Ordering::SeqCst);
                });
            }
            while !is_over.load(Ordering::SeqCst) {
                let before = read(&machine, 0xfc);
                let low = read(&machine, CONFIG);
                let high = read(&machine, CONFIG + 4);
                if read(&machine, 0xfc) == before {
                    let capacity = u64::from(low) | u64::from(high) << 32;
                    assert!(sizes.contains(&capacity), "{capacity:#x}");
                }
            }
        });
        // The last word is right.
        let size = machine.handle.disk().size();
        assert_eq!(512 * capacity(&machine), size);
    });
}

#[test]
fn limits_delay_and_never_fail() {
    within_deadline(|| {
        let mut bench = Bench::new(|options| {
            options.rate.requests = Rate::new(2000, 1);
            options.rate.bytes = Rate::new(1 << 20, 4096);
        });
        bench.start(FEATURE_FLUSH);
        let places: Vec<u16> = (0..60).collect();
        for &place in &places {
            let first = if place % 2 == 0 { 0 } else { COLD };
            bench.drivers[0].put(place, IN, first + u64::from(place), 512);
        }
        bench.offer(0, &places);
        bench.drivers[0].wait_for_used(60);
        for place in places {
            assert_eq!(bench.drivers[0].status(place), 0);
        }
        assert_eq!(bench.machine.stats.queues()[0].reads, 60);
    });
}

/// What is held up waits for its turn, on all queues, and can be stopped.
#[test]
fn queues_that_are_held_up_stop_and_go_on_being_held_up() {
    within_deadline(|| {
        let mut bench = Bench::new(|options| {
            options.queues = 2;
            // After the first request, an hour.
            options.rate.bytes = Rate::new(1, 1);
        });
        bench.start(FEATURE_FLUSH);
        for queue in [0, 1] {
            bench.drivers[queue].put(0, IN, 0, 4096);
            bench.drivers[queue].put(1, GET_ID, 0, 20);
        }
        bench.offer(0, &[0, 1]);
        assert_eq!(bench.drivers[0].wait_for_used(1), [(0, 4097)]);
        bench.offer(1, &[0, 1]);
        for _ in 0..3 {
            bench.machine.handle.pause();
            bench.machine.handle.resume().unwrap();
            thread::sleep(Duration::from_millis(2));
        }
        write(&bench.machine, 0x70, 0);
        let used = |n: usize| bench.drivers[n].ring.used_idx();
        assert_eq!((used(0), used(1)), (1, 0));
        let counters = bench.machine.stats.queues();
        assert_eq!((counters[0].reads, counters[1].reads), (1, 0));
        assert_eq!(bench.machine.stats.failed_requests(), 0);
    });
}

/// A guest that may write little may not have much zeroed instead. What is discarded costs no transfer.
#[test]
fn zeroes_use_up_the_rate_and_discards_do_not() {
    within_deadline(|| {
        for (kind, at_once) in [(WRITE_ZEROES, 1), (DISCARD, 2)] {
            let mut bench = Bench::new(|options| options.rate.bytes = Rate::new(1, 1));
            bench.start(FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES);
            let mut segment = [0; 16];
            segment[8] = 8;
            let driver = &mut bench.drivers[0];
            driver.set_data(0, &segment);
            driver.put(0, kind, 0, 16);
            driver.put(1, GET_ID, 0, 20);
            bench.offer(0, &[0, 1]);
            let used = bench.drivers[0].wait_for_used(at_once);
            assert!(used.contains(&(0, 1)), "{kind}: {used:?}");
            bench.machine.device.shutdown();
            assert_eq!(usize::from(bench.drivers[0].ring.used_idx()), at_once);
        }
    });
}

#[test]
fn counters_tell_what_was_done() {
    within_deadline(|| {
        let mut bench = Bench::new(|options| options.queues = 2);
        bench.start(FEATURE_FLUSH | FEATURE_DISCARD | FEATURE_WRITE_ZEROES);
        // One segment of 8 sectors at the start.
        let mut segment = [0; 16];
        segment[8] = 8;
        for (place, kind, sector, len) in [
            (0, IN, 0, 1024),
            (1, OUT, 4, 512),
            (2, FLUSH, 0, 0),
            (3, DISCARD, 0, 16),
            (4, WRITE_ZEROES, 0, 16),
            (5, GET_ID, 0, 20),
            (6, 99, 0, 0),
            (7, IN, 10_000, 512),
        ] {
            bench.drivers[1].set_data(place, &segment);
            bench.drivers[1].put(place, kind, sector, len);
            bench.offer(1, &[place]);
            bench.drivers[1].wait_for_used(1);
        }
        bench.machine.device.shutdown();
        let queues = bench.machine.stats.queues();
        assert_eq!(queues[0], Default::default());
        let counters = &queues[1];
        assert_eq!((counters.reads, counters.read_bytes), (2, 1024));
        assert_eq!((counters.writes, counters.written_bytes), (1, 512));
        let others = [counters.flushes, counters.discards, counters.zeroes];
        assert_eq!((others, counters.ids, counters.invalid), ([1, 1, 1], 1, 1));
        assert_eq!((counters.failed, counters.without_status), (2, 0));
        assert_eq!((counters.merged, counters.handed_on), (0, 4));
        assert_eq!(counters.latency.len(), LATENCY_BUCKETS);
        assert_eq!(counters.latency.iter().sum::<u64>(), 8);
    });
}

#[test]
fn polling_changes_nothing_but_the_time() {
    within_deadline(|| {
        let mut bench = Bench::new(|options| options.poll = Duration::from_millis(1));
        bench.start(FEATURE_FLUSH);
        for n in 0..200 {
            let place = n % 64;
            let sector = if n % 5 == 0 { COLD } else { u64::from(n) % 64 };
            bench.drivers[0].put(place, IN, sector, 512);
            bench.offer(0, &[place]);
            bench.drivers[0].wait_for_used(1);
            assert_eq!(bench.drivers[0].data(place, 512), [sector as u8; 512]);
        }
        bench.machine.handle.pause();
        bench.machine.handle.resume().unwrap();
        ring_doorbell(&bench.machine);
        bench.machine.device.shutdown();
        assert_eq!(bench.machine.stats.queues()[0].reads, 200);
    });
}
