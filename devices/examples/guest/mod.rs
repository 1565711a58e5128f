//! A guest with one block device, as small as can be: what a driver does to read a sector (virtio 1.3).

use std::error::Error;
use std::io;
use std::time::{Duration, Instant};

use tandem_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

/// Where the guest has its ring, and the parts of a request.
const DESCRIPTORS: u64 = 0x1000;
const AVAILABLE: u64 = 0x2000;
const USED: u64 = 0x3000;
const HEADER: u64 = 0x4000;
const DATA: u64 = 0x5000;
const STATUS: u64 = 0x6000;

/// What the guest finds of its machine.
pub trait Machine {
    /// A CPU reads a register of the device.
    fn read(&self, offset: u64) -> u32;
    /// A CPU writes a register of the device.
    fn write(&self, offset: u64, value: u32) -> io::Result<()>;
    /// Whether the device has raised its interrupt since the last time.
    fn has_interrupt(&self) -> io::Result<bool>;
}

/// Finds the device, and reads the 512 bytes of `sector`.
pub fn read_sector(
    machine: &impl Machine,
    memory: &GuestMemory,
    sector: u64,
) -> Result<[u8; 512], Box<dyn Error>> {
    if (machine.read(0), machine.read(8)) != (u32::from_le_bytes(*b"virt"), 2) {
        return Err("there is no block device".into());
    }
    // Reset, ACKNOWLEDGE, DRIVER; of the features VERSION_1 alone; FEATURES_OK.
    for (register, value) in [
        (0x70, 0),
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, 11),
    ] {
        machine.write(register, value)?;
    }
    // Queue 0 of 8 descriptors, its three parts, ready; DRIVER_OK.
    for (register, value) in [(0x30, 0), (0x38, 8), (0x80, DESCRIPTORS), (0x90, AVAILABLE)] {
        machine.write(register, value as u32)?;
    }
    for (register, value) in [(0xa0, USED), (0x44, 1), (0x70, 15)] {
        machine.write(register, value as u32)?;
    }

    // Three descriptors: header, data, status. The last two are for the device to write to.
    for (index, (address, len, flags)) in [(HEADER, 16, 1), (DATA, 512, 3), (STATUS, 1, 2u16)]
        .into_iter()
        .enumerate()
    {
        let place = GuestAddress(DESCRIPTORS + 16 * index as u64);
        memory.write_obj(address, place)?;
        memory.write_obj(len as u32, GuestAddress(place.0 + 8))?;
        memory.write_obj(flags, GuestAddress(place.0 + 12))?;
        memory.write_obj(index as u16 + 1, GuestAddress(place.0 + 14))?;
    }
    // VIRTIO_BLK_T_IN; then the ring: descriptor 0 is the first of a chain.
    memory.write_obj(0u64, GuestAddress(HEADER))?;
    memory.write_obj(sector, GuestAddress(HEADER + 8))?;
    memory.write_obj(0xffu8, GuestAddress(STATUS))?;
    memory.write_obj(0u16, GuestAddress(AVAILABLE + 4))?;
    memory.write_obj(1u16, GuestAddress(AVAILABLE + 2))?;
    machine.write(0x50, 0)?;

    let begin = Instant::now();
    while !machine.has_interrupt()? {
        if begin.elapsed() > Duration::from_secs(30) {
            return Err("no interrupt came".into());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    // The interrupt is acknowledged, and the request complete.
    machine.write(0x64, machine.read(0x60))?;
    let used: u16 = memory.read_obj(GuestAddress(USED + 2))?;
    let status: u8 = memory.read_obj(GuestAddress(STATUS))?;
    if (used, status) != (1, 0) {
        return Err(format!("{used} requests are complete, with status {status}").into());
    }
    let mut data = [0; 512];
    memory.read_slice(&mut data, GuestAddress(DATA))?;
    Ok(data)
}
