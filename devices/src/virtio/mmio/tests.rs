//! The registers, with a device that only records what reaches it.

use std::sync::atomic::{AtomicBool, Ordering};

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::test_common::{REGION, guest_memory};

const FEATURES: u64 = FEATURE_VERSION_1 | FEATURE_EVENT_IDX | FEATURE_RING_RESET | 1 << 5;
const READY: u32 = ACKNOWLEDGE | DRIVER | FEATURES_OK;

/// What the transport has done with the device.
#[derive(Default)]
struct Record {
    activation: Mutex<Option<Activation>>,
    started_queues: Mutex<Vec<(u16, Queue, EventFd)>>,
    stopped_queues: Mutex<Vec<u16>>,
    resets: Mutex<u32>,
    config: Mutex<Vec<u8>>,
    refuses: AtomicBool,
}

struct Recorder(Arc<Record>);

impl VirtioDevice for Recorder {
    fn device_type(&self) -> u32 {
        2
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &[256, 64]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let config = self.0.config.lock().unwrap();
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = config.get(offset as usize + i).copied().unwrap_or(0);
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.0.config.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        if self.0.refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        *self.0.activation.lock().unwrap() = Some(activation);
        Ok(())
    }

    fn start_queue(&mut self, index: u16, queue: Queue, doorbell: EventFd) -> io::Result<()> {
        if self.0.refuses.load(Ordering::SeqCst) {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        let mut started = self.0.started_queues.lock().unwrap();
        started.push((index, queue, doorbell));
        Ok(())
    }

    fn stop_queue(&mut self, index: u16) -> Option<u16> {
        self.0.stopped_queues.lock().unwrap().push(index);
        None
    }

    fn reset(&mut self) {
        *self.0.resets.lock().unwrap() += 1;
        *self.0.activation.lock().unwrap() = None;
        self.0.started_queues.lock().unwrap().clear();
    }
}

struct Bench {
    device: VirtioMmio,
    irq: EventFd,
    record: Arc<Record>,
}

impl Bench {
    fn new() -> Self {
        let record = Arc::new(Record::default());
        record.config.lock().unwrap().extend(1..=10);
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = Box::new(Recorder(Arc::clone(&record)));
        let device = VirtioMmio::new(device, guest_memory(), irq.try_clone().unwrap()).unwrap();
        Self {
            device,
            irq,
            record,
        }
    }

    fn read(&self, offset: u64) -> u32 {
        let mut data = [0xee; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn status(&self, value: u32) -> u32 {
        self.write(reg::STATUS, value);
        self.read(reg::STATUS)
    }

    fn accept(&self, features: u64) {
        self.write(reg::DRIVER_FEATURES_SEL, 1);
        self.write(reg::DRIVER_FEATURES, (features >> 32) as u32);
        self.write(reg::DRIVER_FEATURES_SEL, 0);
        self.write(reg::DRIVER_FEATURES, features as u32);
    }

    /// Up to the point where queues are set up.
    fn negotiate(&self) {
        assert_eq!(self.status(ACKNOWLEDGE | DRIVER), ACKNOWLEDGE | DRIVER);
        self.accept(FEATURES);
        assert_eq!(self.status(READY), READY);
    }

    /// Sets up `queue` and returns whether the device took it.
    fn set_up(&self, queue: u32, size: u32, addresses: [u64; 3]) -> bool {
        self.write(reg::QUEUE_SEL, queue);
        self.write(reg::QUEUE_SIZE, size);
        for (register, address) in [
            reg::QUEUE_DESC_LOW,
            reg::QUEUE_DRIVER_LOW,
            reg::QUEUE_DEVICE_LOW,
        ]
        .into_iter()
        .zip(addresses)
        {
            self.write(register, address as u32);
            self.write(register + 4, (address >> 32) as u32);
        }
        self.write(reg::QUEUE_READY, 1);
        self.read(reg::QUEUE_READY) == 1
    }

    fn start(&self) {
        self.negotiate();
        assert!(self.set_up(0, 16, GOOD));
        assert_eq!(self.status(READY | DRIVER_OK), READY | DRIVER_OK);
    }

    fn interrupt(&self) -> Arc<dyn Interrupt> {
        let activation = self.record.activation.lock().unwrap();
        Arc::clone(&activation.as_ref().unwrap().interrupt)
    }

    fn is_active(&self) -> bool {
        self.record.activation.lock().unwrap().is_some()
    }
}

const GOOD: [u64; 3] = [0x1000, 0x2000, 0x3000];

#[test]
fn identifies_itself() {
    let bench = Bench::new();
    assert_eq!(&bench.read(0x00).to_le_bytes(), b"virt");
    assert_eq!(bench.read(0x04), 2);
    assert_eq!(bench.read(0x08), 2);
    assert_eq!(&bench.read(0x0c).to_le_bytes(), b"TNDM");
    assert_eq!((bench.read(0xb0), bench.read(0xb4)), (u32::MAX, u32::MAX));
}

#[test]
fn registers_take_32_bits_only() {
    let bench = Bench::new();
    bench.status(ACKNOWLEDGE);
    for width in [1, 2, 3, 5, 8] {
        let mut data = [0xee; 8];
        bench.device.read(reg::STATUS, &mut data[..width]);
        assert_eq!(data[..width], [0; 8][..width]);
        bench
            .device
            .write(reg::STATUS, &[3, 0, 0, 0, 0, 0, 0, 0][..width]);
        assert_eq!(bench.read(reg::STATUS), ACKNOWLEDGE);
    }
    bench.device.read(reg::STATUS, &mut []);
    bench.device.write(reg::STATUS, &[]);
    for offset in [reg::MAGIC + 1, reg::STATUS - 2, 0x200 - 2, 0xd0] {
        assert_eq!(bench.read(offset), 0, "{offset:#x}");
    }
}

#[test]
fn configuration_space_takes_any_width() {
    let bench = Bench::new();
    for (offset, len) in [(0, 1), (1, 2), (3, 4), (0, 8), (8, 2)] {
        let mut data = [0xee; 8];
        bench.device.read(reg::CONFIG + offset, &mut data[..len]);
        let expected: Vec<_> = (offset as u8 + 1..).take(len).collect();
        assert_eq!(data[..len], expected);
    }
    let mut data = [0xee; 4];
    bench.device.read(reg::CONFIG + 8, &mut data);
    assert_eq!(data, [9, 10, 0, 0]);
    bench.device.write(reg::CONFIG + 2, &[77]);
    assert_eq!(bench.read(reg::CONFIG), u32::from_le_bytes([1, 2, 77, 4]));
}

#[test]
fn offers_features_in_two_halves() {
    let bench = Bench::new();
    for (select, expected) in [(0, FEATURES as u32), (1, 0x101), (2, 0), (u32::MAX, 0)] {
        bench.write(reg::DEVICE_FEATURES_SEL, select);
        assert_eq!(bench.read(reg::DEVICE_FEATURES), expected);
    }
}

#[test]
fn status_may_advance_in_any_legal_steps() {
    for steps in [
        // Linux, virtio-drivers, and all at once.
        &[1, 3, 0xb, 0xf][..],
        &[3, 0xb, 0xf],
        &[3, 0xf],
    ] {
        let bench = Bench::new();
        for &status in steps {
            if status & FEATURES_OK != 0 {
                bench.accept(FEATURES);
            }
            assert_eq!(bench.status(status), status);
        }
        assert!(bench.is_active());
    }
}

#[test]
fn illegal_status_bits_have_no_effect() {
    let bench = Bench::new();
    assert_eq!(bench.status(DRIVER), 0);
    assert_eq!(bench.status(ACKNOWLEDGE), ACKNOWLEDGE);
    assert_eq!(bench.status(ACKNOWLEDGE | DRIVER_OK), ACKNOWLEDGE);
    assert_eq!(bench.status(ACKNOWLEDGE | 0x10), ACKNOWLEDGE);
    assert_eq!(bench.status(ACKNOWLEDGE | 0x100), ACKNOWLEDGE);
    assert_eq!(bench.status(ACKNOWLEDGE | NEEDS_RESET), ACKNOWLEDGE);
    // Clears a bit.
    assert_eq!(bench.status(DRIVER), ACKNOWLEDGE);
    assert!(!bench.is_active());
}

#[test]
fn driver_that_gave_up_does_not_start_the_device() {
    let bench = Bench::new();
    bench.negotiate();
    assert_eq!(bench.status(READY | FAILED), READY | FAILED);
    assert_eq!(bench.status(READY | FAILED | DRIVER_OK), READY | FAILED);
    assert!(!bench.is_active());
}

#[test]
fn features_must_be_offered_and_modern() {
    for features in [
        0,
        FEATURES & !FEATURE_VERSION_1,
        FEATURES | 1,
        FEATURES | 1 << 41,
    ] {
        let bench = Bench::new();
        bench.status(ACKNOWLEDGE | DRIVER);
        bench.accept(features);
        assert_eq!(bench.status(READY), ACKNOWLEDGE | DRIVER, "{features:#x}");
        // The driver may try again with less.
        bench.accept(FEATURE_VERSION_1);
        assert_eq!(bench.status(READY), READY);
    }
}

#[test]
fn features_are_fixed_once_accepted() {
    let bench = Bench::new();
    // Too early.
    bench.accept(FEATURES);
    assert_eq!(bench.status(READY), ACKNOWLEDGE | DRIVER);
    bench.accept(FEATURE_VERSION_1);
    assert_eq!(bench.status(READY), READY);
    // Too late.
    bench.accept(FEATURES);
    bench.status(READY | DRIVER_OK);
    let activation = bench.record.activation.lock().unwrap();
    assert_eq!(activation.as_ref().unwrap().features, FEATURE_VERSION_1);
}

#[test]
fn hands_over_queues_as_set_up() {
    let bench = Bench::new();
    bench.negotiate();
    assert_eq!(bench.read(reg::QUEUE_SIZE_MAX), 256);
    assert!(bench.set_up(0, 16, GOOD));
    bench.status(READY | DRIVER_OK);
    let activation = bench.record.activation.lock().unwrap();
    let activation = activation.as_ref().unwrap();
    assert_eq!(activation.features, FEATURES);
    let started = bench.record.started_queues.lock().unwrap();
    let [(0, queue, doorbell)] = &started[..] else {
        panic!("{started:?}");
    };
    assert!(queue.ready() && queue.is_valid(&activation.mem) && queue.event_idx_enabled());
    assert_eq!(queue.size(), 16);
    let addresses = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
    assert_eq!(addresses, GOOD);
    // It is the guest's memory, and the queue's doorbell.
    activation.mem.write_obj(5u32, GuestAddress(0)).unwrap();
    bench.write(QUEUE_NOTIFY, 0);
    assert_eq!(doorbell.read().unwrap(), 1);
}

#[test]
fn queue_that_does_not_exist() {
    let bench = Bench::new();
    bench.negotiate();
    assert!(!bench.set_up(2, 16, GOOD));
    assert_eq!(bench.read(reg::QUEUE_SIZE_MAX), 0);
    bench.write(reg::QUEUE_READY, 0);
    bench.write(QUEUE_NOTIFY, 2);
    bench.write(QUEUE_NOTIFY, u32::MAX);
}

#[test]
fn queue_of_bad_size_or_place_does_not_become_ready() {
    let bench = Bench::new();
    bench.negotiate();
    for size in [0, 3, 257, 512, 0x1_0010, u32::MAX] {
        assert!(!bench.set_up(0, size, GOOD), "{size}");
    }
    assert!(!bench.set_up(1, 128, GOOD), "larger than this queue may be");
    let end = 2 * REGION;
    for (what, addresses) in [
        ("alignment", [0x1008, 0x2000, 0x3000]),
        ("alignment", [0x1000, 0x2001, 0x3000]),
        ("alignment", [0x1000, 0x2000, 0x3002]),
        ("place", [end, 0x2000, 0x3000]),
        ("place", [0x1000, end - 36, 0x3000]),
        ("place", [0x1000, 0x2000, end - 132]),
        ("place", [u64::MAX - 15, 0x2000, 0x3000]),
        ("place", [0x1000, 0x2000, 1 << 32 | 0x3000]),
    ] {
        assert!(!bench.set_up(0, 16, addresses), "{what} {addresses:x?}");
    }
    // The last ones that fit.
    assert!(bench.set_up(0, 16, [end - 256, end - 38, end - 136]));
}

#[test]
fn queue_is_fixed_once_ready() {
    let bench = Bench::new();
    // Too early: the features are open.
    assert!(!bench.set_up(0, 16, GOOD));
    bench.negotiate();
    assert!(bench.set_up(0, 16, GOOD));
    assert!(bench.set_up(0, 32, [0x4000, 0x5000, 0x6000]));
    bench.status(READY | DRIVER_OK);
    {
        let started = bench.record.started_queues.lock().unwrap();
        let (_, queue, _) = &started[0];
        assert_eq!((queue.size(), queue.desc_table()), (16, 0x1000));
    }
    // Too late.
    assert!(!bench.set_up(1, 16, GOOD));
}

#[test]
fn stopping_a_queue() {
    let bench = Bench::new();
    bench.negotiate();
    // Before the start it is just set up anew.
    assert!(bench.set_up(0, 16, GOOD));
    bench.write(reg::QUEUE_READY, 0);
    assert_eq!(bench.read(reg::QUEUE_READY), 0);
    assert!(bench.set_up(0, 32, GOOD));
    assert!(bench.record.stopped_queues.lock().unwrap().is_empty());
    bench.status(READY | DRIVER_OK);
    bench.write(reg::QUEUE_READY, 0);
    bench.write(reg::QUEUE_READY, 0);
    assert_eq!(bench.read(reg::QUEUE_READY), 0);
    assert_eq!(*bench.record.stopped_queues.lock().unwrap(), [0]);
    assert!(!bench.set_up(0, 16, GOOD), "only a reset brings it back");
}

#[test]
fn queue_that_is_reset_can_be_set_up_anew() {
    let bench = Bench::new();
    bench.start();
    let anew = [0x4000, 0x5000, 0x6000];
    assert!(bench.set_up(0, 32, anew), "ready, but not that");
    assert_eq!(bench.record.started_queues.lock().unwrap().len(), 1);
    bench.write(reg::QUEUE_RESET, 0);
    assert_eq!(bench.read(reg::QUEUE_READY), 1);

    bench.write(reg::QUEUE_RESET, 1);
    assert_eq!(bench.read(reg::QUEUE_RESET), 0);
    assert_eq!(bench.read(reg::QUEUE_READY), 0);
    assert_eq!(*bench.record.stopped_queues.lock().unwrap(), [0]);
    // All that the driver had written is forgotten.
    bench.write(reg::QUEUE_READY, 1);
    {
        let started = bench.record.started_queues.lock().unwrap();
        let (_, queue, _) = &started[1];
        assert_eq!((queue.size(), queue.desc_table()), (256, 0));
    }
    bench.write(reg::QUEUE_RESET, 1);
    assert!(!bench.set_up(0, 3, anew), "of a bad size");

    assert!(bench.set_up(0, 32, anew));
    let started = bench.record.started_queues.lock().unwrap();
    let (index, queue, _) = &started[2];
    assert_eq!((*index, queue.size(), started.len()), (0, 32, 3));
    let addresses = [queue.desc_table(), queue.avail_ring(), queue.used_ring()];
    assert_eq!(addresses, anew);
    assert!(queue.event_idx_enabled());
    assert_eq!((queue.next_avail(), queue.next_used()), (0, 0));
    drop(started);

    // Again, and a device reset ends it.
    bench.write(reg::QUEUE_RESET, 1);
    bench.status(0);
    bench.negotiate();
    assert_eq!(bench.status(READY | DRIVER_OK), READY | DRIVER_OK);
    assert!(!bench.set_up(0, 16, GOOD));
}

#[test]
fn queues_are_reset_only_by_drivers_that_have_accepted_it() {
    let bench = Bench::new();
    bench.status(ACKNOWLEDGE | DRIVER);
    bench.accept(FEATURES & !FEATURE_RING_RESET);
    bench.status(READY);
    assert!(bench.set_up(0, 16, GOOD));
    bench.status(READY | DRIVER_OK);
    bench.write(reg::QUEUE_RESET, 1);
    assert_eq!(bench.read(reg::QUEUE_READY), 1);
    assert!(bench.record.stopped_queues.lock().unwrap().is_empty());
}

#[test]
fn reset_of_a_queue_that_is_not_served() {
    let bench = Bench::new();
    bench.negotiate();
    // Too early: it stays as it has been set up.
    assert!(bench.set_up(0, 16, GOOD));
    bench.write(reg::QUEUE_RESET, 1);
    assert_eq!(bench.read(reg::QUEUE_READY), 1);
    bench.status(READY | DRIVER_OK);
    // One that does not exist, one that has not been set up, and one that has been stopped.
    bench.write(reg::QUEUE_SEL, 2);
    bench.write(reg::QUEUE_RESET, 1);
    bench.write(reg::QUEUE_SEL, 1);
    bench.write(reg::QUEUE_RESET, 1);
    bench.write(reg::QUEUE_SEL, 0);
    bench.write(reg::QUEUE_READY, 0);
    bench.write(reg::QUEUE_RESET, 1);
    assert_eq!(*bench.record.stopped_queues.lock().unwrap(), [0]);
    for queue in [0, 1] {
        assert!(bench.set_up(queue, 16, GOOD));
    }
}

#[test]
fn queue_that_cannot_be_started_anew_needs_a_reset() {
    let bench = Bench::new();
    bench.start();
    bench.write(reg::QUEUE_RESET, 1);
    bench.record.refuses.store(true, Ordering::SeqCst);
    bench.set_up(0, 16, GOOD);
    assert_eq!(bench.read(reg::STATUS), READY | DRIVER_OK | NEEDS_RESET);
}

#[test]
fn doorbell_by_register() {
    let bench = Bench::new();
    bench.write(QUEUE_NOTIFY, 1);
    assert!(bench.device.doorbells()[0].read().is_err());
    assert_eq!(bench.device.doorbells()[1].read().unwrap(), 1);
}

#[test]
fn interrupt_status_is_set_before_the_edge_and_stays_until_acknowledged() {
    let bench = Bench::new();
    bench.start();
    let interrupt = bench.interrupt();
    assert!(bench.irq.read().is_err());
    interrupt.signal_queue(0);
    assert_eq!(
        (bench.irq.read().unwrap(), bench.read(reg::INTERRUPT_STATUS)),
        (1, 1)
    );
    let generation = bench.read(reg::CONFIG_GENERATION);
    interrupt.signal_config();
    assert_eq!(
        (bench.irq.read().unwrap(), bench.read(reg::INTERRUPT_STATUS)),
        (1, 3)
    );
    assert_ne!(bench.read(reg::CONFIG_GENERATION), generation);
    bench.write(reg::INTERRUPT_ACK, 1);
    assert_eq!(bench.read(reg::INTERRUPT_STATUS), 2);
    bench.write(reg::INTERRUPT_ACK, u32::MAX);
    assert_eq!(bench.read(reg::INTERRUPT_STATUS), 0);
}

#[test]
fn device_that_needs_a_reset_says_so_and_gets_it() {
    let bench = Bench::new();
    bench.start();
    bench.interrupt().needs_reset();
    assert_eq!(bench.read(reg::STATUS), READY | DRIVER_OK | NEEDS_RESET);
    assert_eq!(
        (bench.irq.read().unwrap(), bench.read(reg::INTERRUPT_STATUS)),
        (1, 2)
    );
    // As Linux does: what it has read, with one bit more.
    assert_eq!(
        bench.status(READY | DRIVER_OK | NEEDS_RESET | FAILED),
        READY | DRIVER_OK | NEEDS_RESET | FAILED
    );
    assert_eq!(bench.status(0), 0);
    assert_eq!(bench.read(reg::INTERRUPT_STATUS), 0);
    assert_eq!(*bench.record.resets.lock().unwrap(), 1);
    bench.start();
    assert!(bench.is_active());
}

#[test]
fn device_that_cannot_start_needs_a_reset() {
    let bench = Bench::new();
    bench.record.refuses.store(true, Ordering::SeqCst);
    bench.negotiate();
    assert_eq!(
        bench.status(READY | DRIVER_OK),
        READY | DRIVER_OK | NEEDS_RESET
    );
    assert_eq!(
        (bench.irq.read().unwrap(), bench.read(reg::INTERRUPT_STATUS)),
        (1, 2)
    );
    bench.record.refuses.store(false, Ordering::SeqCst);
    bench.status(0);
    bench.start();
}

#[test]
fn reset_forgets_everything() {
    let bench = Bench::new();
    bench.start();
    assert_eq!(bench.status(0), 0);
    assert!(!bench.is_active());
    assert_eq!(bench.read(reg::QUEUE_READY), 0);
    // Neither features nor queues are left.
    bench.status(ACKNOWLEDGE | DRIVER);
    assert_eq!(bench.status(READY), ACKNOWLEDGE | DRIVER);
    bench.device.shutdown();
    assert_eq!(bench.read(reg::STATUS), 0);
    assert_eq!(*bench.record.resets.lock().unwrap(), 2);
}
