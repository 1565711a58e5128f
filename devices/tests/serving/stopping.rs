//! Ways to stop the device while requests wait: they are completed first, and nothing touches guest
//! memory afterwards.

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use tandem_block::Disk;
use tandem_devices::virtio::FEATURE_RING_RESET;
use vm_memory::{Bytes, GuestAddress};

use crate::Bench;
use crate::COLD;
use crate::common::REGION;
use crate::driver::{Driver, IN, NO_STATUS};
use crate::machine::within_deadline;
use crate::registers::{FEATURE_FLUSH, enable_queue, read, start_queues, write};

/// Lets requests that wait go on while `action` waits for them.
fn open_during<T: Send>(bench: &Bench, action: impl FnOnce(&Bench) -> T + Send) -> T {
    thread::scope(|scope| {
        let action = scope.spawn(|| action(bench));
        // One that does not wait would be over by then.
        thread::sleep(Duration::from_millis(20));
        let is_early = action.is_finished();
        bench.disk.open();
        let result = action.join().unwrap();
        assert!(!is_early, "it does not wait");
        result
    })
}

/// A bench with three requests that wait.
fn waiting() -> Bench {
    let mut bench = Bench::new(|_| {});
    bench.start(FEATURE_FLUSH | FEATURE_RING_RESET);
    bench.disk.close();
    for place in 0..3 {
        bench.drivers[0].put(place, IN, COLD + 2 * u64::from(place), 512);
    }
    bench.offer(0, &[0, 1, 2]);
    bench.disk.wait_for_waiting(3);
    bench
}

fn memory(bench: &Bench) -> Vec<u8> {
    let mut bytes = vec![0; 2 * REGION as usize];
    bench.mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

#[test]
fn requests_that_wait_are_completed_first() {
    type Action = fn(&Bench);
    let actions: [(&str, Action); 5] = [
        ("reset", |bench| write(&bench.machine, 0x70, 0)),
        ("shutdown", |bench| bench.machine.device.shutdown()),
        ("pause", |bench| bench.machine.handle.pause()),
        ("stop of the queue", |bench| write(&bench.machine, 0x44, 0)),
        ("reset of the queue", |bench| write(&bench.machine, 0xc0, 1)),
    ];
    within_deadline(move || {
        for (name, action) in actions {
            let mut bench = waiting();
            let (used, after) = open_during(&bench, |bench| {
                action(bench);
                (bench.drivers[0].ring.used_idx(), memory(bench))
            });
            assert_eq!(used, 3, "{name}");
            let driver = &mut bench.drivers[0];
            driver.take_used();
            for place in 0..3 {
                assert_eq!(driver.status(place), 0, "{name}");
                assert_eq!(driver.data(place, 512), [COLD as u8 + 2 * place as u8; 512]);
            }
            // More is not even looked at.
            driver.put(3, IN, 0, 512);
            let put = memory(&bench);
            bench.machine.device.doorbells()[0].write(1).unwrap();
            thread::yield_now();
            assert!(memory(&bench) == put && put != after, "{name}");
            assert_eq!(bench.drivers[0].status(3), NO_STATUS);
        }
    });
}

#[test]
fn dropping_the_device_ends_its_threads_though_handles_live_on() {
    within_deadline(|| {
        let bench = waiting();
        let Bench {
            disk,
            machine,
            drivers,
            ..
        } = bench;
        let handle = machine.handle.clone();
        thread::scope(|scope| {
            let drop = scope.spawn(move || drop(machine));
            thread::sleep(Duration::from_millis(20));
            let is_early = drop.is_finished();
            disk.open();
            drop.join().unwrap();
            assert!(!is_early, "it does not wait");
        });
        assert_eq!(drivers[0].ring.used_idx(), 3);
        drop(handle);
        assert_eq!(Arc::strong_count(&disk), 1);
    });
}

#[test]
fn a_paused_device_goes_on_where_it_stopped() {
    within_deadline(|| {
        let mut bench = Bench::started();
        let handle = bench.machine.handle.clone();
        let mut place = 0;
        // Often enough for the ring to begin anew.
        for _ in 0..50 {
            let places: Vec<u16> = (place..place + 4).map(|n| n % 64).collect();
            for &place in &places {
                bench.drivers[0].put(place, IN, u64::from(place) * 3, 512);
            }
            bench.offer(0, &places[..1]);
            bench.drivers[0].wait_for_used(1);
            handle.pause();
            // Once with the doorbell, once without: it may not have been wanted.
            bench.offer(0, &places[1..2]);
            bench.drivers[0].offer(&places[2..]);
            assert!(bench.drivers[0].take_used().is_empty());
            handle.pause();
            assert!(bench.drivers[0].take_used().is_empty());
            handle.resume().unwrap();
            bench.drivers[0].wait_for_used(3);
            for place in places {
                assert_eq!(bench.drivers[0].status(place), 0);
                let fill = 3 * place as u8;
                assert_eq!(bench.drivers[0].data(place, 512), [fill; 512]);
            }
            handle.resume().unwrap();
            place += 4;
        }
        assert_eq!(bench.machine.stats.queues()[0].reads, 200);
    });
}

#[test]
fn pauses_and_starts_in_any_order() {
    within_deadline(|| {
        let mut bench = Bench::new(|options| options.queues = 2);
        let handle = bench.machine.handle.clone();
        handle.pause();
        bench.start(FEATURE_FLUSH);
        for queue in [0, 1] {
            bench.drivers[queue].put(0, IN, 7, 512);
            bench.offer(queue, &[0]);
        }
        assert_eq!(bench.drivers[0].ring.used_idx(), 0);
        // A reset does not end the pause, and the queues that wait for its end are gone.
        write(&bench.machine, 0x70, 0);
        bench
            .mem
            .write_slice(&[0; 0x3000], GuestAddress(0))
            .unwrap();
        bench.drivers[0] = Driver::new(&bench.mem, 0, 64);
        bench.drivers[0].put(0, IN, 7, 512);
        start_queues(&bench.machine, &[&bench.drivers[0].ring], FEATURE_FLUSH);
        bench.offer(0, &[0]);
        handle.resume().unwrap();
        assert_eq!(bench.drivers[0].wait_for_used(1), [(0, 513)]);
        // A queue that was stopped in a pause stays so.
        handle.pause();
        write(&bench.machine, 0x30, 0);
        write(&bench.machine, 0x44, 0);
        bench.offer(0, &[0]);
        handle.resume().unwrap();
        handle.pause();
        assert_eq!(bench.drivers[0].ring.used_idx(), 1);
        assert_eq!(bench.drivers[1].ring.used_idx(), 0);
        // Without a device that is started there is nothing to pause.
        bench.machine.device.shutdown();
        handle.resume().unwrap();
        handle.pause();
        handle.resume().unwrap();
    });
}

#[test]
fn a_queue_that_was_reset_serves_in_another_place() {
    within_deadline(|| {
        let mut bench = waiting();
        open_during(&bench, |bench| write(&bench.machine, 0xc0, 1));
        assert_eq!(
            (read(&bench.machine, 0xc0), read(&bench.machine, 0x44)),
            (0, 0)
        );
        // The memory is the driver's again.
        let len = Driver::memory_len(64);
        let fill = vec![0xab; len as usize];
        bench.mem.write_slice(&fill, GuestAddress(0)).unwrap();

        bench.drivers[0] = Driver::new(&bench.mem, REGION, 16);
        let driver = &mut bench.drivers[0];
        driver.put(0, IN, COLD, 512);
        driver.offer(&[0]);
        // No doorbell is needed for what is there.
        enable_queue(&bench.machine, 0, &driver.ring);
        assert_eq!(driver.wait_for_used(1), [(0, 513)]);
        for n in 0..40 {
            let place = n % 16;
            bench.drivers[0].put(place, IN, n.into(), 512);
            bench.offer(0, &[place]);
            bench.drivers[0].wait_for_used(1);
            assert_eq!(bench.drivers[0].data(place, 512), [n as u8; 512]);
        }
        let mut old = vec![0; len as usize];
        bench.mem.read_slice(&mut old, GuestAddress(0)).unwrap();
        assert!(old == fill);
        assert_eq!(bench.machine.stats.broken_rings(), 0);
        assert_eq!(bench.disk.size(), 512 * u64::from(crate::SECTORS));
    });
}
