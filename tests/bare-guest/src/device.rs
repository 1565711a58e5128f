//! A disk without its driver: what the driver never asks for, by the transport and the queues alone.

use alloc::format;
use alloc::string::String;
use alloc::vec;
use alloc::vec::Vec;

use virtio_drivers::Error;
use virtio_drivers::queue::VirtQueue;
use virtio_drivers::transport::mmio::MmioTransport;
use virtio_drivers::transport::{DeviceStatus, Transport};

use crate::cases::Outcome;
use crate::content::SECTOR_SIZE;
use crate::memory::Identity;
use crate::{disk, ensure};

/// Features of the ring and of any device (virtio 1.3, section 6).
pub const INDIRECT: u64 = 1 << 28;
pub const EVENT_IDX: u64 = 1 << 29;
pub const VERSION_1: u64 = 1 << 32;
pub const RING_RESET: u64 = 1 << 40;

/// Features of block devices (virtio 1.3, section 5.2.3).
pub const FLUSH: u64 = 1 << 9;
pub const CONFIG_WCE: u64 = 1 << 11;
pub const MQ: u64 = 1 << 12;
pub const DISCARD: u64 = 1 << 13;
pub const WRITE_ZEROES: u64 = 1 << 14;

/// Types of request, and what becomes of them (virtio 1.3, section 5.2.6).
pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const TYPE_FLUSH: u32 = 4;
pub const TYPE_DISCARD: u32 = 11;
pub const TYPE_WRITE_ZEROES: u32 = 13;
pub const OK: u8 = 0;
pub const IOERR: u8 = 1;
pub const UNSUPP: u8 = 2;

/// Descriptors of a queue.
pub const QUEUE_SIZE: usize = 256;

/// A started device.
pub struct Device {
    pub transport: MmioTransport<'static>,
    features: u64,
    queues: Vec<VirtQueue<Identity, QUEUE_SIZE>>,
}

impl Device {
    /// Starts the device with `features`, all of which it must offer, and so many queues (virtio 1.3,
    /// section 3.1.1).
    pub fn start(
        mut transport: MmioTransport<'static>,
        features: u64,
        queues: u16,
    ) -> Result<Self, String> {
        negotiate(&mut transport, features)?;
        let mut device = Self {
            transport,
            features,
            queues: Vec::new(),
        };
        for index in 0..queues {
            let queue = device.set_up_queue(index)?;
            device.queues.push(queue);
        }
        device.transport.finish_init();
        Ok(device)
    }

    fn set_up_queue(&mut self, index: u16) -> Result<VirtQueue<Identity, QUEUE_SIZE>, String> {
        let has = |feature| self.features & feature != 0;
        let (indirect, event_idx) = (has(INDIRECT), has(EVENT_IDX));
        let queue = VirtQueue::new(&mut self.transport, index, indirect, event_idx);
        queue.map_err(|error| format!("setting queue {index} up: {error}"))
    }

    /// Resets queue number `queue` of disk number `disk` while the device runs, and sets it up anew
    /// (virtio 1.3, section 2.6.1).
    pub fn reset_queue(&mut self, disk: usize, queue: usize) -> Outcome {
        disk::write_register(disk, disk::QUEUE_SEL, queue as u32);
        disk::write_register(disk, disk::QUEUE_RESET, 1);
        while disk::read_register(disk, disk::QUEUE_RESET) != 0 {}
        self.queues[queue] = self.set_up_queue(queue as u16)?;
        Ok(())
    }

    /// Reads a field of the configuration.
    pub fn config_u32(&self, offset: usize) -> u32 {
        let value = self.transport.read_config_space(offset);
        value.unwrap_or_else(|error| panic!("reading the configuration at {offset}: {error}"))
    }

    /// Has queue number `queue` carry out a request, and returns its status and how many bytes the
    /// device says it has written, the status included.
    pub fn request(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        input: &[&[u8]],
        output: &mut [&mut [u8]],
    ) -> Result<(u8, u32), Error> {
        let header = header(kind, sector);
        let mut status = [0xff];
        let mut inputs = vec![&header[..]];
        inputs.extend(input.iter().filter(|piece| !piece.is_empty()));
        let mut outputs: Vec<&mut [u8]> = output.iter_mut().map(|piece| &mut **piece).collect();
        outputs.push(&mut status);
        assert!(inputs.len() + outputs.len() <= QUEUE_SIZE);
        let queue = &mut self.queues[queue];
        let used = queue.add_notify_wait_pop(&inputs, &mut outputs, &mut self.transport)?;
        Ok((status[0], used))
    }

    /// A request without data, which is to have this status.
    pub fn expect(&mut self, kind: u32, sector: u64, input: &[&[u8]], expected: u8) -> Outcome {
        let answer = self.request(0, kind, sector, input, &mut []);
        ensure!(
            answer == Ok((expected, 1)),
            "request of type {kind}: {answer:?} instead of status {expected}"
        );
        Ok(())
    }

    /// Writes whole sectors by queue number `queue`.
    pub fn write(&mut self, queue: usize, sector: u64, data: &[u8]) -> Outcome {
        let answer = self.request(queue, OUT, sector, &[data], &mut []);
        ensure!(answer == Ok((OK, 1)), "writing to {sector}: {answer:?}");
        Ok(())
    }

    /// Reads whole sectors by queue number `queue`.
    pub fn read(&mut self, queue: usize, sector: u64, sectors: u64) -> Result<Vec<u8>, String> {
        let mut data = vec![0xee; sectors as usize * SECTOR_SIZE];
        let answer = self.request(queue, IN, sector, &[], &mut [&mut data]);
        let used = data.len() as u32 + 1;
        ensure!(
            answer == Ok((OK, used)),
            "reading from {sector}: {answer:?}"
        );
        Ok(data)
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        // The device must not use the queues' memory any more.
        for index in 0..self.queues.len() {
            self.transport.queue_unset(index as u16);
        }
    }
}

/// Resets the device and has it accept `features`.
pub fn negotiate(transport: &mut MmioTransport<'static>, features: u64) -> Outcome {
    let status = DeviceStatus::ACKNOWLEDGE | DeviceStatus::DRIVER;
    transport.set_status(DeviceStatus::empty());
    transport.set_status(status);
    let features = VERSION_1 | features;
    let offered = transport.read_device_features();
    ensure!(offered & features == features, "offered is {offered:#x}");
    transport.write_driver_features(features);
    transport.set_status(status | DeviceStatus::FEATURES_OK);
    let status = transport.get_status();
    ensure!(
        status.contains(DeviceStatus::FEATURES_OK),
        "the features {features:#x} are not accepted"
    );
    Ok(())
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [kind.into(), sector]
        .map(u64::to_le_bytes)
        .as_flattened()
        .to_vec()
}
