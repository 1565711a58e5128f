//! Guest physical memory and the interrupt lines: what lies where.
//!
//! ```text
//! 0x0000_0500   GDT                               0x000e_0000   ACPI tables, RSDP first
//! 0x0000_6000   PVH start info, modules, map      0x000f_fff0   reset vector
//! 0x0000_7000   Linux zero page                   0x0010_0000   kernel, then free RAM;
//! 0x0000_8ff0   boot stack, growing down                        initrd at the top of low RAM
//! 0x0000_9000   page tables                       0xc000_0000   end of low RAM at the latest
//! 0x0002_0000   kernel command line               0xd000_0000   virtio-mmio, a page per disk
//! 0x0009_fc00   reserved, up to 1 MiB             0xfec0_0000   IOAPIC, LAPIC (in KVM)
//!                                                 1_0000_0000   high RAM
//! ```

/// Global descriptor table of the boot processor.
pub const GDT: u64 = 0x500;
/// `hvm_start_info` of the PVH boot protocol.
pub const PVH_INFO: u64 = 0x6000;
/// `hvm_modlist_entry` of the initrd.
pub const PVH_MODULES: u64 = 0x6040;
/// `hvm_memmap_table_entry` list.
pub const PVH_MEMORY_MAP: u64 = 0x6080;
/// `boot_params`, the Linux "zero page".
pub const ZERO_PAGE: u64 = 0x7000;
/// Initial stack pointer of a 64-bit entry.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page map level 4; the page directory pointer table and four page directories follow it.
pub const PAGE_TABLES: u64 = 0x9000;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;
/// Bytes for the command line with its terminating NUL: `COMMAND_LINE_SIZE` of Linux on x86.
pub const CMDLINE_SIZE: usize = 2048;
/// End of conventional memory: from here to 1 MiB everything is reserved.
pub const CONVENTIONAL_END: u64 = 0x9_fc00;
/// Root pointer of the ACPI tables, where systems look for it by themselves; the tables follow.
pub const ACPI: u64 = 0xe_0000;
/// Where a jump to the BIOS leads a CPU in real mode (`f000:fff0`).
pub const RESET_VECTOR: u64 = 0xf_fff0;
/// Where a kernel may begin.
pub const KERNEL: u64 = 0x10_0000;
/// Low RAM ends here at the latest; the rest continues at [`HIGH_RAM`].
pub const LOW_RAM_MAX: u64 = 0xc000_0000;
/// First virtio-mmio register block.
pub const VIRTIO_MMIO: u64 = 0xd000_0000;
/// I/O interrupt controller.
pub const IOAPIC: u32 = 0xfec0_0000;
/// Local interrupt controller of each CPU.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel processors takes for itself.
pub const KVM_TSS: usize = 0xfffb_d000;
/// Second region of RAM.
pub const HIGH_RAM: u64 = 0x1_0000_0000;

/// I/O ports of the serial ports of a PC.
pub const SERIAL_PORTS: [u16; 3] = [0x3f8, 0x2f8, 0x3e8];
/// I/O ports of the keyboard controller.
pub const KEYBOARD_PORT: u16 = 0x60;
/// I/O port of the ACPI sleep and reset register.
pub const POWER_PORT: u16 = 0x600;

/// Interrupt lines of the serial ports. That of the third one is the keyboard's in a PC, and free here;
/// it cannot have the first one's, as edges are not shared.
pub const SERIAL_GSIS: [u32; 3] = [4, 3, 1];
/// Which serial port is the console.
pub const CONSOLE: usize = 0;
/// Which serial port takes the guest's output.
pub const OUTPUT: usize = 1;
/// Which serial port takes its exit status.
pub const EXIT: usize = 2;
/// Interrupt line of the first disk; each further disk has the next.
pub const DISK_GSI: u32 = 5;
/// Interrupt lines of the IOAPIC.
pub const GSI_COUNT: u32 = 24;
/// Disks that have an interrupt line of their own.
pub const MAX_DISKS: usize = (GSI_COUNT - DISK_GSI) as usize;
