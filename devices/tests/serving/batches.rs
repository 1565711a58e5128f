//! Requests that are carried out or answered together.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use tandem_block::{Disk, FileStorage, Raw};
use tandem_devices::virtio::FEATURE_EVENT_IDX;

use crate::common::disk::MemoryDisk;
use crate::common::gate::{Call, Gate};
use crate::common::guest_memory;
use crate::common::ring::writable;
use crate::driver::{Driver, FLUSH, GET_ID, IN, OUT};
use crate::machine::{Machine, within_deadline};
use crate::registers::{FEATURE_FLUSH, ring_doorbell, start_queues};
use crate::{Bench, COLD, SECTORS};

const ALL: [u16; 8] = [0, 1, 2, 3, 4, 5, 6, 7];

/// Offers requests of the kinds, sectors and numbers of sectors, and returns the calls that the disk
/// got.
fn calls(bench: &mut Bench, requests: &[(u32, u64, u32)]) -> Vec<Call> {
    for (place, &(kind, sector, sectors)) in (0..).zip(requests) {
        let len = if kind == GET_ID { 20 } else { 512 * sectors };
        bench.drivers[0].put(place, kind, sector, len);
    }
    bench.offer(0, &ALL[..requests.len()]);
    bench.drivers[0].wait_for_used(requests.len());
    bench.disk.take_calls()
}

#[test]
fn adjacent_requests_take_one_call() {
    for first in [8, COLD] {
        within_deadline(move || {
            let mut bench = Bench::started();
            let reads: Vec<_> = (0..8).map(|n| (IN, first + 8 * n, 8)).collect();
            let expected = [Call::Read(512 * first, 64 * 512)];
            assert_eq!(calls(&mut bench, &reads), expected);
            for place in ALL {
                let first = first as u8 + 8 * place as u8;
                let data: Vec<u8> = (first..first + 8).flat_map(|n| [n; 512]).collect();
                assert_eq!(bench.drivers[0].data(place, 4096), data);
                assert_eq!(bench.drivers[0].status(place), 0);
                assert_eq!(bench.drivers[0].ring.used(place), (place.into(), 4097));
                bench.drivers[0].set_data(place, &[0xc0 + place as u8; 4096]);
            }
            let writes: Vec<_> = reads
                .iter()
                .map(|&(_, sector, len)| (OUT, sector, len))
                .collect();
            let expected = [Call::Write(512 * first, 64 * 512)];
            assert_eq!(calls(&mut bench, &writes), expected);
            let content = bench.disk.disk.content();
            for place in ALL {
                let at = 512 * (first as usize + 8 * usize::from(place));
                assert_eq!(content[at..at + 4096], [0xc0 + place as u8; 4096]);
                assert_eq!(bench.drivers[0].ring.used(8 + place), (place.into(), 1));
            }
            let counters = bench.machine.stats.queues()[0];
            assert_eq!(
                (counters.reads, counters.writes, counters.merged),
                (8, 8, 14)
            );
            assert_eq!(
                (counters.read_bytes, counters.written_bytes),
                (32768, 32768)
            );
            let handed_on = if first == COLD { 16 } else { 0 };
            assert_eq!(counters.handed_on, handed_on);
        });
    }
}

#[test]
fn what_does_not_continue_a_request_is_not_joined_to_it() {
    within_deadline(|| {
        let mut bench = Bench::started();
        let read = |sector: u64, sectors: u64| Call::Read(512 * sector, 512 * sectors);
        let write = |sector: u64, sectors: u64| Call::Write(512 * sector, 512 * sectors);
        for (requests, expected) in [
            // A gap, an overlap, and the other way round.
            (vec![(IN, 0, 1), (IN, 2, 1)], vec![read(0, 1), read(2, 1)]),
            (vec![(IN, 0, 2), (IN, 1, 2)], vec![read(0, 2), read(1, 2)]),
            (vec![(IN, 5, 1), (IN, 4, 1)], vec![read(5, 1), read(4, 1)]),
            // Another kind.
            (vec![(IN, 0, 1), (OUT, 1, 1)], vec![read(0, 1), write(1, 1)]),
            (vec![(OUT, 0, 1), (IN, 1, 1)], vec![write(0, 1), read(1, 1)]),
            // Something between.
            (
                vec![(IN, 0, 1), (GET_ID, 0, 0), (IN, 1, 1)],
                vec![read(0, 1), read(1, 1)],
            ),
            // Two that are two pairs.
            (
                vec![(IN, 0, 1), (IN, 1, 3), (IN, 8, 1), (IN, 9, 1)],
                vec![read(0, 4), read(8, 2)],
            ),
        ] {
            assert_eq!(calls(&mut bench, &requests), expected, "{requests:?}");
        }
        assert_eq!(bench.machine.stats.failed_requests(), 0);
    });
}

#[test]
fn each_request_of_a_call_that_fails_is_tried_alone() {
    within_deadline(|| {
        let mut bench = Bench::started();
        let last = u64::from(SECTORS) - 1;
        for kind in [IN, OUT] {
            for place in 0..4 {
                bench.drivers[0].set_data(place, &[0x77; 512]);
            }
            let requests: Vec<_> = (0..4).map(|n| (kind, last - 1 + n, 1)).collect();
            let calls = calls(&mut bench, &requests);
            assert_eq!(calls.len(), 5, "{calls:?}");
            let driver = &bench.drivers[0];
            assert_eq!([0, 1, 2, 3].map(|n| driver.status(n)), [0, 0, 1, 1]);
        }
        let driver = &bench.drivers[0];
        let lens = |first: u16| [0, 1, 2, 3].map(|n| driver.ring.used(first + n).1);
        let mut lens = [lens(0), lens(4)];
        lens.iter_mut().for_each(|lens| lens.sort_unstable());
        assert_eq!(lens, [[0, 0, 513, 513], [1, 1, 1, 1]]);
        let content = bench.disk.disk.content();
        assert_eq!(content[512 * (last as usize - 1)..], [0x77; 1024]);
        assert_eq!(bench.machine.stats.failed_requests(), 4);

        // All fail, one call and each alone, on the queue's thread and elsewhere.
        bench.disk.disk.is_failing.store(true, Ordering::SeqCst);
        for first in [0, COLD] {
            calls(&mut bench, &[(IN, first, 1), (IN, first + 1, 1)]);
            assert_eq!([0, 1].map(|n| bench.drivers[0].status(n)), [1, 1]);
        }
        bench.disk.disk.is_failing.store(false, Ordering::SeqCst);
    });
}

#[test]
fn calls_stay_within_bounds() {
    within_deadline(|| {
        for (count, buffers, sectors, expected) in [
            // At most 1 MiB.
            (256u16, 1, 16, vec![1 << 20, 1 << 20]),
            (3, 1, 1536, vec![768 << 10, 768 << 10, 768 << 10]),
            // More than that alone.
            (2, 2, 1536, vec![3 << 19, 3 << 19]),
            // At most 128 buffers.
            (16, 16, 1, vec![64 << 10, 64 << 10]),
        ] {
            let file = tempfile::tempfile().unwrap();
            file.set_len(4 << 20).unwrap();
            let storage = Box::new(FileStorage::new(file).unwrap());
            let raw = Raw::with_storage("disk".as_ref(), storage, false).unwrap();
            let disk = Arc::new(Gate::new(raw, u64::MAX));
            let mem = guest_memory();
            let machine = Machine::new(disk.clone() as Arc<dyn Disk>, &mem);
            let mut driver = Driver::new(&mem, 0, 256);
            start_queues(&machine, &[&driver.ring], FEATURE_FLUSH);
            // All requests have the same buffer, behind what the driver uses.
            let data = vec![writable(0x13_0000, 512 * sectors); buffers];
            for place in 0..count {
                let sector = u64::from(place) * u64::from(sectors) * buffers as u64;
                driver.put_buffers(place, IN, sector, &data);
            }
            let places: Vec<u16> = (0..count).collect();
            driver.offer(&places);
            ring_doorbell(&machine);
            driver.wait_for_used(count.into());
            let lens: Vec<_> = disk
                .take_calls()
                .into_iter()
                .map(|call| match call {
                    Call::Read(_, len) => len,
                    other => panic!("{other:?}"),
                })
                .collect();
            assert_eq!(lens, expected);
            assert_eq!(machine.stats.failed_requests(), 0);
        }
    });
}

/// How many interrupts `count` requests for sectors that do not adjoin cause, offered at once.
fn interrupts(event_idx: bool, count: u16, prepare: impl FnOnce(&Driver)) -> u64 {
    let mut bench = Bench::new(|_| {});
    prepare(&bench.drivers[0]);
    let event_idx = if event_idx { FEATURE_EVENT_IDX } else { 0 };
    bench.start(FEATURE_FLUSH | event_idx);
    for place in 0..count {
        bench.drivers[0].put(place, IN, 2 * u64::from(place), 512);
    }
    let places: Vec<u16> = (0..count).collect();
    bench.offer(0, &places);
    bench.drivers[0].wait_for_used(count.into());
    bench.machine.device.shutdown();
    bench.machine.take_interrupts()
}

#[test]
fn answers_share_interrupts() {
    within_deadline(|| {
        // One for all; where the machine is slow, up to one for 16.
        for (count, most) in [(1, 1), (16, 1), (17, 2), (40, 3)] {
            let interrupts = interrupts(false, count, |_| {});
            assert!((1..=most).contains(&interrupts), "{interrupts} of {count}");
        }
    });
}

#[test]
fn interrupts_come_as_the_driver_wants_them() {
    within_deadline(|| {
        let no_interrupt = |driver: &Driver| driver.ring.set_avail_flags(1);
        assert_eq!(interrupts(false, 40, no_interrupt), 0);
        for (event, expected) in [(0, 1), (15, 1), (16, 1), (39, 1), (40, 0), (u16::MAX, 0)] {
            let set_event = |driver: &Driver| driver.ring.set_used_event(event);
            assert_eq!(interrupts(true, 40, set_event), expected, "{event}");
        }
    });
}

/// With requests that wait too, the last answer is never without an interrupt that is wanted.
#[test]
fn no_answer_stays_untold() {
    within_deadline(|| {
        let mut bench = Bench::new(|_| {});
        bench.start(FEATURE_FLUSH | FEATURE_EVENT_IDX);
        for round in 0..200u16 {
            for place in ALL {
                let first = if place % 3 == round % 3 { COLD } else { 0 };
                bench.drivers[0].put(place, IN, first + 2 * u64::from(place), 512);
            }
            bench.drivers[0].put(8, FLUSH, 0, 0);
            let last = 9 * (round + 1) - 1;
            bench.drivers[0].ring.set_used_event(last);
            bench.offer(0, &[0, 1, 8, 2, 3, 4, 5, 6, 7]);
            bench.machine.wait_for_interrupt();
            assert_eq!(bench.drivers[0].take_used().len(), 9);
        }
    });
}

/// Without a bench: the disk's own limits, not those of the device, are what a request may have.
#[test]
fn requests_of_no_sectors_join_and_succeed() {
    within_deadline(|| {
        let mem = guest_memory();
        let disk = Arc::new(Gate::new(MemoryDisk::new(16), u64::MAX));
        let machine = Machine::new(disk.clone() as Arc<dyn Disk>, &mem);
        let mut driver = Driver::new(&mem, 0, 64);
        start_queues(&machine, &[&driver.ring], FEATURE_FLUSH);
        for (place, sector, len) in [(0, 15, 512), (1, 16, 0), (2, 17, 0)] {
            driver.put(place, IN, sector, len);
        }
        driver.offer(&[0, 1, 2]);
        ring_doorbell(&machine);
        driver.wait_for_used(3);
        assert_eq!([0, 1, 2].map(|n| driver.status(n)), [0, 0, 1]);
        assert_eq!(
            disk.take_calls(),
            [Call::Read(15 * 512, 512), Call::Read(17 * 512, 0)]
        );
    });
}
