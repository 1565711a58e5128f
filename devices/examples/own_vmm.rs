//! Gives a qcow2 disk to a virtual machine monitor of your own:
//! `cargo run --example own_vmm disk.qcow2`.
//!
//! The device needs four things of it: guest memory, accesses of CPUs to its registers, doorbells, and an
//! interrupt. Here a few lines that do what a driver does are the guest, and no hypervisor is needed; the
//! comments tell what it would be with KVM.

mod guest;

use std::io;
use std::sync::Arc;

use tandem_block::qcow2::{OpenOptions, Qcow2};
use tandem_devices::GuestMemory;
use tandem_devices::bus::BusDevice;
use tandem_devices::virtio::block::{Block, Options};
use tandem_devices::virtio::mmio::{QUEUE_NOTIFY, VirtioMmio};
use vm_memory::GuestAddress;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

struct OwnVmm {
    device: VirtioMmio,
    irq: EventFd,
}

impl guest::Machine for OwnVmm {
    // With KVM: VcpuExit::MmioRead in the region of the device.
    fn read(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device.read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    // With KVM: VcpuExit::MmioWrite; and doorbells do not even leave it, if it has been told of them by
    // vm.register_ioevent(doorbell, &IoEventAddress::Mmio(base + QUEUE_NOTIFY), queue).
    fn write(&self, offset: u64, value: u32) -> io::Result<()> {
        if offset == QUEUE_NOTIFY {
            let doorbell = self.device.doorbells().get(value as usize);
            return doorbell.map_or(Ok(()), |doorbell| doorbell.write(1));
        }
        self.device.write(offset, &value.to_le_bytes());
        Ok(())
    }

    // With KVM: vm.register_irqfd(&irq, line) has the guest interrupted.
    fn has_interrupt(&self) -> io::Result<bool> {
        match self.irq.read() {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            other => other.map(|_| true),
        }
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let path = std::env::args_os().nth(1).ok_or("which image?")?;
    let disk = Arc::new(Qcow2::open(path.as_ref(), &OpenOptions::default())?);
    let mut options = Options::default();
    options.serial = Some("disk-0".parse()?);
    let block = Block::new(disk, options);
    // The handle stays with the monitor: statistics, resizing, pauses, the end.
    let handle = block.handle();
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 1 << 20)])?;
    let irq = EventFd::new(EFD_NONBLOCK)?;
    let device = VirtioMmio::new(Box::new(block), memory.clone(), irq.try_clone()?)?;
    let vmm = OwnVmm { device, irq };

    let sector = guest::read_sector(&vmm, &memory, 3)?;
    println!(
        "sector 3 begins with {:?}",
        String::from_utf8_lossy(&sector[..8])
    );

    // The CPUs have stopped: so do the threads of the device, and the disk is closed.
    vmm.device.shutdown();
    handle.disk().close()?;
    println!("last error: {:?}", handle.stats().last_error());
    Ok(())
}
