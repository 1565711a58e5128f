//! What a kernel finds in memory when it is entered: command line, initrd, memory map, ACPI tables,
//! and for the processor a GDT and page tables.

use linux_loader::loader::bootparam::{boot_e820_entry, boot_params, setup_header};
use linux_loader::start_info::{hvm_memmap_table_entry, hvm_modlist_entry, hvm_start_info};
use tandem_devices::GuestMemory;
use tandem_devices::power::AcpiPower;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

use crate::acpi::{self, VirtioDevice};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernel::{self, Kernel, Protocol};
use crate::layout;
use crate::memory;
use crate::vcpu::{self, Entry};

/// Loader type of a boot loader without a number of its own.
const LOADER_UNDEFINED: u8 = 0xff;
/// `hvm_start_info.magic`.
const PVH_MAGIC: u32 = 0x336e_c578;

/// All of the BIOS that there is: `mov al, RESET_VALUE; mov dx, POWER_PORT; out dx, al; hlt`. Linux
/// takes it that a machine with hardware-reduced ACPI has EFI to restart it with; where there is no
/// EFI it does not try the ACPI reset register next, but jumps to the BIOS.
const BIOS: [u8; 7] = {
    let [port_low, port_high] = layout::POWER_PORT.to_le_bytes();
    [
        0xb0,
        AcpiPower::RESET_VALUE,
        0xba,
        port_low,
        port_high,
        0xee,
        0xf4,
    ]
};

/// Loads the kernel and the initrd of `config` and writes everything they need. Returns the state in
/// which the boot processor is to start.
pub fn prepare(mem: &GuestMemory, config: &Config, devices: &[VirtioDevice]) -> Result<Entry> {
    let kernel = Kernel::load(mem, &config.kernel)?;
    let initrd = match &config.initrd {
        Some(path) => Some(kernel::load_initrd(mem, &kernel, path)?),
        None => None,
    };
    let written = || -> std::result::Result<Entry, GuestMemoryError> {
        let tables = acpi::tables(layout::ACPI, config.cpus, &config.serial_ports(), devices);
        mem.write_slice(&tables, GuestAddress(layout::ACPI))?;
        mem.write_slice(&BIOS, GuestAddress(layout::RESET_VECTOR))?;
        let mut cmdline = config.full_cmdline().into_bytes();
        cmdline.push(0);
        mem.write_slice(&cmdline, GuestAddress(layout::CMDLINE))?;
        vcpu::write_tables(mem)?;
        match kernel.protocol {
            Protocol::Linux64 { entry, header } => {
                write_zero_page(mem, header, initrd)?;
                Ok(Entry::Long {
                    rip: entry,
                    rsi: layout::ZERO_PAGE,
                })
            }
            Protocol::Pvh { entry } => {
                write_pvh_info(mem, initrd)?;
                Ok(Entry::Protected {
                    rip: entry,
                    rbx: layout::PVH_INFO,
                })
            }
        }
    };
    // All of this lies below 1 MiB, which every guest has.
    written().map_err(|e| Error::Host {
        action: "write to the guest's memory",
        source: std::io::Error::other(e),
    })
}

/// Writes `boot_params` of the Linux boot protocol.
fn write_zero_page(
    mem: &GuestMemory,
    header: setup_header,
    initrd: Option<(u64, u64)>,
) -> std::result::Result<(), GuestMemoryError> {
    let mut params = boot_params {
        hdr: header,
        acpi_rsdp_addr: layout::ACPI,
        ..Default::default()
    };
    params.hdr.type_of_loader = LOADER_UNDEFINED;
    params.hdr.cmd_line_ptr = layout::CMDLINE as u32;
    if let Some((address, size)) = initrd {
        // Low RAM ends below 4 GiB, and so does an initrd.
        params.hdr.ramdisk_image = address as u32;
        params.hdr.ramdisk_size = size as u32;
    }
    for (index, (addr, size, usage)) in memory::map(mem).into_iter().enumerate() {
        params.e820_table[index] = boot_e820_entry {
            addr,
            size,
            r#type: usage as u32,
        };
        params.e820_entries = index as u8 + 1;
    }
    mem.write_obj(params, GuestAddress(layout::ZERO_PAGE))
}

/// Writes `hvm_start_info` and its lists.
fn write_pvh_info(
    mem: &GuestMemory,
    initrd: Option<(u64, u64)>,
) -> std::result::Result<(), GuestMemoryError> {
    let map = memory::map(mem);
    let mut info = hvm_start_info {
        magic: PVH_MAGIC,
        version: 1,
        cmdline_paddr: layout::CMDLINE,
        rsdp_paddr: layout::ACPI,
        memmap_paddr: layout::PVH_MEMORY_MAP,
        memmap_entries: map.len() as u32,
        ..Default::default()
    };
    for (index, (addr, size, usage)) in (0..).zip(map) {
        let entry = hvm_memmap_table_entry {
            addr,
            size,
            type_: usage as u32,
            reserved: 0,
        };
        let at = layout::PVH_MEMORY_MAP + index * size_of::<hvm_memmap_table_entry>() as u64;
        mem.write_obj(entry, GuestAddress(at))?;
    }
    if let Some((paddr, size)) = initrd {
        let module = hvm_modlist_entry {
            paddr,
            size,
            ..Default::default()
        };
        mem.write_obj(module, GuestAddress(layout::PVH_MODULES))?;
        info.nr_modules = 1;
        info.modlist_paddr = layout::PVH_MODULES;
    }
    mem.write_obj(info, GuestAddress(layout::PVH_INFO))
}

#[cfg(test)]
mod tests {
    use super::*;
    use vm_memory::ByteValued;

    const INITRD: Option<(u64, u64)> = Some((0x7f_0000, 12345));

    fn read<T: ByteValued>(mem: &GuestMemory, address: u64) -> T {
        mem.read_obj(GuestAddress(address)).unwrap()
    }

    #[test]
    fn zero_page() {
        let mem = memory::create(5 << 30).unwrap();
        let header = setup_header {
            init_size: 77,
            ..Default::default()
        };
        write_zero_page(&mem, header, INITRD).unwrap();
        let params: boot_params = read(&mem, layout::ZERO_PAGE);
        let hdr = params.hdr;
        assert_eq!({ hdr.init_size }, 77);
        assert_eq!(hdr.type_of_loader, 0xff);
        assert_eq!(u64::from(hdr.cmd_line_ptr), layout::CMDLINE);
        assert_eq!({ params.acpi_rsdp_addr }, layout::ACPI);
        assert_eq!((hdr.ramdisk_image, hdr.ramdisk_size), (0x7f_0000, 12345));
        let map: Vec<_> = params.e820_table[..usize::from(params.e820_entries)]
            .iter()
            .map(|e| (e.addr, e.size, e.r#type))
            .collect();
        assert_eq!(
            map,
            [
                (0, 0x9_fc00, 1),
                (0x9_fc00, 0x6_0400, 2),
                (0x10_0000, (3 << 30) - 0x10_0000, 1),
                (4 << 30, 2 << 30, 1),
            ]
        );
    }

    #[test]
    fn pvh_start_info() {
        let mem = memory::create(5 << 30).unwrap();
        write_pvh_info(&mem, INITRD).unwrap();
        let info: hvm_start_info = read(&mem, layout::PVH_INFO);
        assert_eq!((info.magic, info.version), (0x336e_c578, 1));
        assert_eq!(info.cmdline_paddr, layout::CMDLINE);
        assert_eq!(info.rsdp_paddr, layout::ACPI);
        assert_eq!((info.nr_modules, info.memmap_entries), (1, 4));
        let module: hvm_modlist_entry = read(&mem, info.modlist_paddr);
        assert_eq!((module.paddr, module.size), (0x7f_0000, 12345));
        let last: hvm_memmap_table_entry = read(&mem, info.memmap_paddr + 3 * 24);
        assert_eq!((last.addr, last.size, last.type_), (4 << 30, 2 << 30, 1));
        // The lists touch neither each other nor the zero page.
        const { assert!(layout::PVH_INFO + size_of::<hvm_start_info>() as u64 <= layout::PVH_MODULES) };
        assert!(info.memmap_paddr + 4 * 24 <= layout::ZERO_PAGE);

        write_pvh_info(&mem, None).unwrap();
        let info: hvm_start_info = read(&mem, layout::PVH_INFO);
        assert_eq!((info.nr_modules, info.modlist_paddr), (0, 0));
    }
}
