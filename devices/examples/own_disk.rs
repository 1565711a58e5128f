//! Puts a disk of your own behind the device: `cargo run --example own_disk`.
//!
//! Whatever implements [`Disk`] can be served. This one has no storage: each of its sectors says which one
//! it is.

mod guest;

use std::io;
use std::sync::Arc;

use tandem_block::{Disk, Error, Limits, Result, VolatileSlice};
use tandem_devices::GuestMemory;
use tandem_devices::bus::BusDevice;
use tandem_devices::virtio::block::{Block, Options};
use tandem_devices::virtio::mmio::VirtioMmio;
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// 1 TiB that is made up as it is read.
struct Numbers;

impl Disk for Numbers {
    fn size(&self) -> u64 {
        1 << 40
    }

    // Read-only, so that a guest is not offered to write.
    fn limits(&self) -> Limits {
        Limits::new(512, true)
    }

    fn read_at(&self, bufs: &[VolatileSlice<'_>], mut offset: u64) -> Result<()> {
        // A guest may ask for anything: who knows the size looks.
        let len: u64 = bufs.iter().map(|buf| buf.len() as u64).sum();
        if offset.checked_add(len).is_none_or(|end| end > self.size()) {
            let size = self.size();
            return Err(Error::OutOfRange { offset, len, size });
        }
        for buf in bufs {
            let bytes: Vec<u8> = (offset..offset + buf.len() as u64)
                .map(|place| format!("{:<512}", place / 512).as_bytes()[(place % 512) as usize])
                .collect();
            buf.copy_from(&bytes);
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, _bufs: &[VolatileSlice<'_>], _offset: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn discard(&self, _offset: u64, _len: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// The device and its interrupt; `own_vmm` tells more of this side.
struct Machine(VirtioMmio, EventFd);

impl guest::Machine for Machine {
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.0.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u32) -> io::Result<()> {
        self.0.write(offset, &value.to_le_bytes());
        Ok(())
    }

    fn has_interrupt(&self) -> io::Result<bool> {
        Ok(self.1.read().is_ok())
    }
}

fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let irq = EventFd::new(EFD_NONBLOCK)?;
    let block = Block::new(Arc::new(Numbers), Options::default());
    let device = VirtioMmio::new(Box::new(block), memory.clone(), irq.try_clone()?)?;
    let machine = Machine(device, irq);

    let sector = guest::read_sector(&machine, &memory, 123_456_789)?;
    println!(
        "the sector says {:?}",
        String::from_utf8_lossy(&sector[..12])
    );
    machine.0.shutdown();
    Ok(())
}
