//! ACPI tables: how a stock kernel finds CPUs, interrupts, the serial port, the disks and the power
//! switch.
//!
//! The platform is hardware-reduced: no PIC, PIT, RTC, SCI or fixed power-management registers. The
//! set is RSDP, XSDT, FADT, MADT and DSDT.

use acpi_tables::aml::{
    AmlStr, Device, EISAName, IO, Interrupt, Memory32Fixed, Name, ONE, Package, Path,
    ResourceTemplate, Scope,
};
use acpi_tables::fadt::{FADTBuilder, Flags};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{
    EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic,
};
use acpi_tables::rsdp::Rsdp;
use acpi_tables::sdt::Sdt;
use acpi_tables::xsdt::XSDT;
use acpi_tables::{Aml, aml};
use tandem_devices::power::AcpiPower;
use tandem_devices::serial::SerialPort;

use crate::layout;

const OEM_ID: [u8; 6] = *b"TANDEM";
const OEM_TABLE_ID: [u8; 8] = *b"TANDEMVM";
const OEM_REVISION: u32 = 1;

/// IA-PC boot architecture flags of the FADT (ACPI 6.5, 5.2.9.3). The flags for "8042" and "legacy
/// devices" stay clear: drivers find neither.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// Without this Linux probes the clock of the PC with some ten thousand port accesses.
const BOOT_ARCH_NO_RTC: u16 = 1 << 5;

/// A virtio-mmio device as the guest is to find it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct VirtioDevice {
    /// Address of its registers.
    pub base: u32,
    /// Size of its registers in bytes.
    pub size: u32,
    /// Its interrupt line, edge-triggered.
    pub gsi: u32,
}

/// Builds all tables as one block to be placed at `base`; the RSDP comes first.
///
/// `base` must be a multiple of 16. `serial` are the numbers of the serial ports that there are, and
/// `devices` come in the order in which the guest numbers them.
pub fn tables(base: u64, cpus: u8, serial: &[usize], devices: &[VirtioDevice]) -> Vec<u8> {
    let mut block = Block {
        base,
        bytes: vec![0; Rsdp::len()],
    };
    let dsdt = block.append(&dsdt(serial, devices));
    let fadt = block.append(&fadt(dsdt));
    let madt = block.append(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    let xsdt = block.append(&xsdt);

    let mut rsdp = Vec::with_capacity(Rsdp::len());
    Rsdp::new(OEM_ID, xsdt).to_aml_bytes(&mut rsdp);
    block.bytes[..rsdp.len()].copy_from_slice(&rsdp);
    block.bytes
}

struct Block {
    base: u64,
    bytes: Vec<u8>,
}

impl Block {
    /// Appends a table and returns its address.
    fn append(&mut self, table: &dyn Aml) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(16), 0);
        let address = self.base + self.bytes.len() as u64;
        table.to_aml_bytes(&mut self.bytes);
        address
    }
}

fn fadt(dsdt: u64) -> impl Aml {
    let power = GAS::new(
        AddressSpace::SystemIo,
        8,
        0,
        AccessSize::ByteAccess,
        u64::from(layout::POWER_PORT),
    );
    let mut fadt = FADTBuilder::new(OEM_ID, OEM_TABLE_ID, OEM_REVISION)
        .dsdt_64(dsdt)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // Set means: there is no such button among the fixed hardware.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_RTC).into();
    fadt.reset_reg = power;
    fadt.reset_value = AcpiPower::RESET_VALUE;
    fadt.sleep_control_reg = power;
    fadt.sleep_status_reg = power;
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(OEM_TABLE_ID).into();
    fadt.finalize()
}

fn madt(cpus: u8) -> impl Aml {
    let mut madt = MADT::new(
        OEM_ID,
        OEM_TABLE_ID,
        OEM_REVISION,
        LocalInterruptController::Address(layout::LAPIC),
    );
    for cpu in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(cpu, cpu, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(0, layout::IOAPIC, 0));
    madt
}

fn dsdt(serial: &[usize], devices: &[VirtioDevice]) -> impl Aml {
    let sleep = AcpiPower::SLEEP_TYPE_S5;
    let zero = aml::ZERO;
    let s5 = Package::new(vec![&sleep, &sleep, &zero, &zero]);
    let mut body = Vec::new();
    Name::new(Path::new("_S5_"), &s5).to_aml_bytes(&mut body);

    let mut children: Vec<u8> = serial.iter().flat_map(|number| com(*number)).collect();
    for (index, device) in (0..).zip(devices) {
        children.extend(virtio(index, device));
    }
    body.extend(Scope::raw(Path::new("\\_SB_"), children));

    // Revision 2 makes integers 64 bits wide.
    let mut dsdt = Sdt::new(*b"DSDT", 36, 2, OEM_ID, OEM_TABLE_ID, OEM_REVISION);
    dsdt.append_slice(&body);
    dsdt
}

/// A 16550A: one of the serial ports of a PC, counted from 0.
fn com(number: usize) -> Vec<u8> {
    let (port, gsi) = (layout::SERIAL_PORTS[number], layout::SERIAL_GSIS[number]);
    let mut bytes = Vec::new();
    Device::new(
        Path::new(&format!("COM{}", number + 1)),
        vec![
            &Name::new(Path::new("_HID"), &EISAName::new("PNP0501")),
            &Name::new(Path::new("_UID"), &(number as u8)),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Interrupt::new(true, true, false, false, gsi),
                    &IO::new(port, port, 1, SerialPort::REGION_SIZE as u8),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

/// A virtio-mmio transport. `LNRO0005` is the name under which Linux knows it.
fn virtio(index: u32, device: &VirtioDevice) -> Vec<u8> {
    let hid: AmlStr = "LNRO0005";
    let mut bytes = Vec::new();
    Device::new(
        Path::new(&format!("V{index:03}")),
        vec![
            &Name::new(Path::new("_HID"), &hid),
            &Name::new(Path::new("_UID"), &index),
            &Name::new(Path::new("_CCA"), &ONE),
            &Name::new(
                Path::new("_CRS"),
                &ResourceTemplate::new(vec![
                    &Memory32Fixed::new(true, device.base, device.size),
                    &Interrupt::new(true, true, false, false, device.gsi),
                ]),
            ),
        ],
    )
    .to_aml_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xe_0000;

    fn devices(count: u32) -> Vec<VirtioDevice> {
        (0..count)
            .map(|i| VirtioDevice {
                base: 0xd000_0000 + i * 0x1000,
                size: 0x1000,
                gsi: 5 + i,
            })
            .collect()
    }

    fn u32_at(bytes: &[u8], at: usize) -> u32 {
        u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn sum(bytes: &[u8]) -> u8 {
        bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
    }

    /// The table at guest address `at`, its checksum and signature checked.
    fn table(block: &[u8], at: u64, signature: &[u8; 4]) -> Vec<u8> {
        let start = (at - BASE) as usize;
        let len = u32_at(block, start + 4) as usize;
        let table = block[start..start + len].to_vec();
        assert_eq!(&table[..4], signature);
        assert_eq!(sum(&table), 0, "checksum of {signature:?}");
        table
    }

    #[test]
    fn tables_lead_to_each_other() {
        for (cpus, disks) in [(1, 0), (8, 2), (32, 19)] {
            let serial = [0, 2, 1];
            let serial = &serial[..if disks > 2 { 3 } else { 1 }];
            let block = tables(BASE, cpus, serial, &devices(disks));
            assert!(block.len() as u64 <= layout::KERNEL - layout::ACPI);
            assert_eq!(&block[..8], b"RSD PTR ");
            assert_eq!(sum(&block[..20]), 0);
            assert_eq!(sum(&block[..36]), 0);

            let xsdt = table(&block, u64_at(&block, 24), b"XSDT");
            assert_eq!(xsdt.len(), 36 + 2 * 8);
            let fadt = table(&block, u64_at(&xsdt, 36), b"FACP");
            let madt = table(&block, u64_at(&xsdt, 44), b"APIC");
            let dsdt = table(&block, u64_at(&fadt, 140), b"DSDT");

            // Flags: HW_REDUCED_ACPI, RESET_REG_SUP, no fixed buttons.
            assert_eq!(u32_at(&fadt, 112), 1 << 20 | 1 << 10 | 1 << 5 | 1 << 4);
            let power = [1, 8, 0, 1, 0x00, 0x06, 0, 0, 0, 0, 0, 0];
            assert_eq!(fadt[116..128], power, "RESET_REG");
            assert_eq!(fadt[244..256], power, "SLEEP_CONTROL_REG");
            assert_eq!(fadt[256..268], power, "SLEEP_STATUS_REG");
            assert_eq!(fadt[128], 1, "RESET_VALUE");

            assert_eq!(u32_at(&madt, 36), 0xfee0_0000);
            assert_eq!(madt.len(), 44 + usize::from(cpus) * 8 + 12);
            for cpu in 0..cpus {
                let at = 44 + usize::from(cpu) * 8;
                assert_eq!(madt[at..at + 8], [0, 8, cpu, cpu, 1, 0, 0, 0]);
            }
            let found = dsdt.windows(8).filter(|w| w == b"LNRO0005").count();
            assert_eq!(found as u32, disks);
            let ports = dsdt.windows(3).filter(|w| w == b"COM").count();
            assert_eq!(ports, serial.len());
        }
    }

    #[test]
    fn dsdt_of_one_disk() {
        let mut dsdt = Vec::new();
        super::dsdt(&[0], &devices(1)).to_aml_bytes(&mut dsdt);
        // Name (_S5, Package (4) { 5, 5, Zero, Zero })
        assert_eq!(
            dsdt[36..50],
            *b"\x08_S5_\x12\x08\x04\x0a\x05\x0a\x05\x00\x00"
        );
        #[rustfmt::skip]
        let v000 = [
            b"\x5b\x82\x41\x04V000" as &[u8],                         // Device (V000)
            b"\x08_HID\x0dLNRO0005\0",                                // Name (_HID, "LNRO0005")
            b"\x08_UID\x00",                                          // Name (_UID, Zero)
            b"\x08_CCA\x01",                                          // Name (_CCA, One)
            b"\x08_CRS\x11\x1a\x0a\x17",                              // Name (_CRS, Buffer (0x17)
            b"\x86\x09\x00\x01\x00\x00\x00\xd0\x00\x10\x00\x00",      // Memory32Fixed
            b"\x89\x06\x00\x03\x01\x05\x00\x00\x00",                  // Interrupt: edge, high
            b"\x79\x00",                                              // end tag
        ]
        .concat();
        assert!(dsdt.ends_with(&v000), "{:02x?}", &dsdt[36..]);
    }
}
