//! A driver's use of the registers, without a driver.
#![allow(dead_code, reason = "no test uses all of it")]

use tandem_devices::GuestMemory;
use tandem_devices::bus::BusDevice;
use tandem_devices::virtio::{FEATURE_INDIRECT_DESC, FEATURE_VERSION_1};
use vm_memory::{Bytes, GuestAddress};

use crate::common::ring::Ring;
use crate::machine::Machine;

/// Feature bits of block devices (virtio 1.3, section 5.2.3).
pub const FEATURE_FLUSH: u64 = 1 << 9;
pub const FEATURE_CONFIG_WCE: u64 = 1 << 11;
pub const FEATURE_DISCARD: u64 = 1 << 13;
pub const FEATURE_WRITE_ZEROES: u64 = 1 << 14;
/// Device status of a device that serves.
pub const RUNNING: u32 = 0xf;
/// Bit of the device status.
pub const NEEDS_RESET: u32 = 0x40;

/// Reads a register as a vCPU does.
pub fn read(machine: &Machine, register: u64) -> u32 {
    let mut bytes = [0; 4];
    machine.device.read(register, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// Writes a register as a vCPU does.
pub fn write(machine: &Machine, register: u64, value: u32) {
    machine.device.write(register, &value.to_le_bytes());
}

pub fn ring_doorbell(machine: &Machine) {
    write(machine, 0x50, 0);
}

/// Initializes the device with `ring` as its queue.
pub fn start(machine: &Machine, ring: &Ring, features: u64) {
    start_queues(machine, &[ring], features | FEATURE_FLUSH);
}

/// Initializes the device with `rings` as its queues.
pub fn start_queues(machine: &Machine, rings: &[&Ring], features: u64) {
    write(machine, 0x70, 0);
    write(machine, 0x70, 3);
    let features = features | FEATURE_VERSION_1 | FEATURE_INDIRECT_DESC;
    for half in [0, 1] {
        write(machine, 0x24, half);
        write(machine, 0x20, (features >> (32 * half)) as u32);
    }
    write(machine, 0x70, 0xb);
    for (index, ring) in (0..).zip(rings) {
        enable_queue(machine, index, ring);
    }
    write(machine, 0x70, RUNNING);
    assert_eq!(read(machine, 0x70) & !NEEDS_RESET, RUNNING);
}

/// Sets up a queue.
pub fn enable_queue(machine: &Machine, index: u32, ring: &Ring) {
    write(machine, 0x30, index);
    write(machine, 0x38, ring.size.into());
    write(machine, 0x80, ring.table as u32);
    write(machine, 0x90, ring.avail as u32);
    write(machine, 0xa0, ring.used as u32);
    write(machine, 0x44, 1);
    assert_eq!(read(machine, 0x44), 1);
}

/// Puts the header of a request into guest memory.
pub fn header(mem: &GuestMemory, addr: u64, kind: u32, sector: u64) {
    mem.write_obj(kind, GuestAddress(addr)).unwrap();
    mem.write_obj(sector, GuestAddress(addr + 8)).unwrap();
}
