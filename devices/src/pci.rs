//! PCI of a machine that has none of its devices.

use std::sync::atomic::{AtomicU32, Ordering};

use crate::bus::BusDevice;

/// The address register of PCI configuration mechanism #1 (PCI Local Bus 3.0, 3.2.2.3.2).
///
/// It keeps what is written, which is how systems find out that there is the mechanism; a kernel that
/// finds none reports an error. There is no device at any address: where those that exist would answer, at
/// [`DATA_PORT`](ConfigAddress::DATA_PORT), a [`Bus`](crate::bus::Bus) is to have nothing, so that reads
/// give 0xff in every byte.
#[derive(Default)]
pub struct ConfigAddress {
    value: AtomicU32,
}

impl ConfigAddress {
    /// Where a PC has the register.
    pub const PORT: u16 = 0xcf8;
    /// Where a PC has the register that the address selects.
    pub const DATA_PORT: u16 = 0xcfc;
    /// Number of ports that the register takes.
    pub const REGION_SIZE: u64 = 4;
}

/// Accesses of less than the whole register are no matter of PCI.
impl BusDevice for ConfigAddress {
    fn read(&self, offset: u64, data: &mut [u8]) {
        if let (0, Ok(data)) = (offset, <&mut [u8; 4]>::try_from(data)) {
            *data = self.value.load(Ordering::Relaxed).to_le_bytes();
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let (0, Ok(data)) = (offset, data.try_into()) {
            self.value
                .store(u32::from_le_bytes(data), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What Linux does to find out whether there is the mechanism (`pci_check_type1`).
    #[test]
    fn the_mechanism_is_found() {
        let register = ConfigAddress::default();
        let read = |offset, length| {
            let mut data = vec![0xff; length];
            register.read(offset, &mut data);
            data
        };
        register.write(3, &[1]);
        assert_eq!(read(0, 4), [0; 4]);
        register.write(0, &0x8000_0000_u32.to_le_bytes());
        assert_eq!(read(0, 4), [0, 0, 0, 0x80]);
        for (offset, data) in [(3, &[1][..]), (0, &[1, 2]), (0, &[1; 8]), (1, &[1; 4])] {
            register.write(offset, data);
            assert_eq!(read(offset, data.len()), vec![0xff; data.len()]);
            assert_eq!(read(0, 4), [0, 0, 0, 0x80]);
        }
    }
}
