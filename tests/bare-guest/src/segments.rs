//! Requests whose data is in many pieces, which the driver never makes: with its queue alone.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::Error;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, Transport};

use crate::cases::{Outcome, compare, filled};
use crate::disk::Disk;
use crate::ensure;
use crate::memory::Identity;

const VERSION_1: u64 = 1 << 32;
const EVENT_IDX: u64 = 1 << 29;
const INDIRECT: u64 = 1 << 28;

const QUEUE: u16 = 0;
const QUEUE_SIZE: usize = 256;

/// Types of request, and the status of one that succeeded (virtio 1.3, section 5.2.6).
const IN: u64 = 0;
const OUT: u64 = 1;
const OK: u8 = 0;

/// Writes in pieces and reads back in others, under every combination of the ring's features.
pub fn run(disk: &mut Disk) -> Outcome {
    for (seed, features) in (200..).zip([0, INDIRECT, EVENT_IDX, INDIRECT | EVENT_IDX]) {
        let sector = 11;
        let data = filled(sector, 280, seed);
        let mut found = vec![0xee; data.len()];
        let outcome = disk.without_driver(|transport| {
            let mut queue = Queue::set_up(transport, features)?;
            // 253 and 254 pieces: the latter are as many as the queue takes.
            queue.write(sector, &data, 567)?;
            queue.read(sector, &mut found, 565)?;
            compare(sector, &found, &data)
        });
        outcome.map_err(|error| format!("ring features {features:#x}: {error}"))?;
    }
    Ok(())
}

struct Queue {
    transport: MmioTransport<'static>,
    queue: VirtQueue<Identity, QUEUE_SIZE>,
}

impl Queue {
    /// Initializes the device with these features of the ring (virtio 1.3, section 3.1.1).
    fn set_up(mut transport: MmioTransport<'static>, ring_features: u64) -> Result<Self, String> {
        let status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
        transport.set_status(DeviceStatus::empty());
        transport.set_status(status);
        let features = VERSION_1 | ring_features;
        let offered = transport.read_device_features();
        ensure!(offered & features == features, "offered is {offered:#x}");
        transport.write_driver_features(features);
        transport.set_status(status | DeviceStatus::FEATURES_OK);
        let queue = VirtQueue::new(
            &mut transport,
            QUEUE,
            ring_features & INDIRECT != 0,
            ring_features & EVENT_IDX != 0,
        );
        let queue = queue.map_err(|error| format!("setting the queue up: {error}"))?;
        transport.finish_init();
        Ok(Self { transport, queue })
    }

    /// Writes `data` in pieces of `size` bytes.
    fn write(&mut self, sector: u64, data: &[u8], size: usize) -> Outcome {
        let header = header(OUT, sector);
        let mut status = [0xff];
        let mut inputs = vec![&header[..]];
        inputs.extend(data.chunks(size));
        assert!(inputs.len() < QUEUE_SIZE);
        let mut outputs = [&mut status[..]];
        let transport = &mut self.transport;
        let used = self
            .queue
            .add_notify_wait_pop(&inputs, &mut outputs, transport);
        check("writing", used, 1, status)
    }

    /// Reads `data` in pieces of `size` bytes.
    fn read(&mut self, sector: u64, data: &mut [u8], size: usize) -> Outcome {
        let length = data.len() as u32;
        let header = header(IN, sector);
        let mut status = [0xff];
        let mut outputs: Vec<_> = data.chunks_mut(size).collect();
        outputs.push(&mut status);
        assert!(outputs.len() < QUEUE_SIZE);
        let transport = &mut self.transport;
        let used = self
            .queue
            .add_notify_wait_pop(&[&header], &mut outputs, transport);
        check("reading", used, length + 1, status)
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        // The device must not use the queue's memory any more.
        self.transport.queue_unset(QUEUE);
    }
}

fn header(kind: u64, sector: u64) -> Vec<u8> {
    [kind, sector].map(u64::to_le_bytes).as_flattened().to_vec()
}

/// `used` is the number of bytes that the device says it has written.
fn check(doing: &str, used: Result<u32, Error>, length: u32, status: [u8; 1]) -> Outcome {
    ensure!(
        used == Ok(length) && status == [OK],
        "{doing}: {used:?} bytes used, status {status:?}"
    );
    Ok(())
}
