//! Where the registers of devices appear to the guest: one [`Bus`] for port I/O, one for MMIO.

use std::collections::BTreeMap;
use std::sync::Arc;

/// Registers of a device as vCPUs see them.
///
/// Both methods are called from several vCPU threads at once. `offset` counts from the start of the
/// range that the device was given on its [`Bus`] and is always inside it. `data` is as long as the
/// guest's access and may reach past the end of the range; on a port I/O bus it may also hold the
/// elements of a string instruction, one after the other, all meant for the register at `offset`.
pub trait BusDevice: Send + Sync {
    /// Fills `data` with what the guest reads. It comes filled with 0xff: a device leaves what it
    /// does not implement as it is.
    fn read(&self, offset: u64, data: &mut [u8]);

    /// Takes what the guest writes.
    fn write(&self, offset: u64, data: &[u8]);
}

/// Why a device cannot be placed on a [`Bus`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The range is empty or ends beyond the address space.
    #[error("{len:#x} bytes at {base:#x} are no range of addresses")]
    Range {
        /// First address.
        base: u64,
        /// Number of addresses.
        len: u64,
    },
    /// Another device has some of these addresses.
    #[error("{len:#x} bytes at {base:#x} overlap the device at {other:#x}")]
    Overlap {
        /// First address.
        base: u64,
        /// Number of addresses.
        len: u64,
        /// First address of the device that is there.
        other: u64,
    },
}

struct Slot {
    last: u64,
    device: Arc<dyn BusDevice>,
}

/// A map from addresses to devices. It is filled while the machine is built and read-only while
/// it runs, so lookups need no lock.
///
/// Where no device is, reads give 0xff in every byte and writes go nowhere, as on a PC.
#[derive(Default)]
pub struct Bus {
    /// By first address; ranges do not overlap.
    slots: BTreeMap<u64, Slot>,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Places `device` at `base..base + len`.
    pub fn insert(&mut self, base: u64, len: u64, device: Arc<dyn BusDevice>) -> Result<(), Error> {
        let last = len
            .checked_sub(1)
            .and_then(|n| base.checked_add(n))
            .ok_or(Error::Range { base, len })?;
        if let Some((&other, slot)) = self.slots.range(..=last).next_back()
            && slot.last >= base
        {
            return Err(Error::Overlap { base, len, other });
        }
        self.slots.insert(base, Slot { last, device });
        Ok(())
    }

    /// The guest reads `data.len()` bytes at `address`.
    pub fn read(&self, address: u64, data: &mut [u8]) {
        data.fill(0xff);
        if let Some((offset, device)) = self.find(address) {
            device.read(offset, data);
        }
    }

    /// The guest writes `data` at `address`.
    pub fn write(&self, address: u64, data: &[u8]) {
        if let Some((offset, device)) = self.find(address) {
            device.write(offset, data);
        }
    }

    fn find(&self, address: u64) -> Option<(u64, &dyn BusDevice)> {
        let (base, slot) = self.slots.range(..=address).next_back()?;
        (address <= slot.last).then(|| (address - base, &*slot.device))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    #[derive(Default)]
    struct Probe(Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data[0] = offset as u8;
        }

        fn write(&self, offset: u64, data: &[u8]) {
            self.0.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn probe() -> Arc<Probe> {
        Arc::default()
    }

    #[test]
    fn routes_by_address() {
        let (a, b) = (probe(), probe());
        let mut bus = Bus::new();
        bus.insert(0x10, 8, a.clone()).unwrap();
        bus.insert(u64::MAX, 1, b.clone()).unwrap();
        bus.write(0xf, &[1]);
        bus.write(0x17, &[2, 3]);
        bus.write(0x18, &[4]);
        bus.write(u64::MAX, &[5]);
        assert_eq!(*a.0.lock().unwrap(), [(7, vec![2, 3])]);
        assert_eq!(*b.0.lock().unwrap(), [(0, vec![5])]);

        let mut data = [0; 2];
        bus.read(0x13, &mut data);
        assert_eq!(data, [3, 0xff]);
        bus.read(0x18, &mut data);
        assert_eq!(data, [0xff; 2]);
    }

    #[test]
    fn refuses_overlaps_and_impossible_ranges() {
        let mut bus = Bus::new();
        bus.insert(0x10, 8, probe()).unwrap();
        for (base, len) in [(0x10, 8), (0x0, 0x11), (0x17, 1), (0x0, u64::MAX)] {
            assert_eq!(
                bus.insert(base, len, probe()),
                Err(Error::Overlap {
                    base,
                    len,
                    other: 0x10
                })
            );
        }
        for (base, len) in [(0x100, 0), (u64::MAX, 2)] {
            assert_eq!(
                bus.insert(base, len, probe()),
                Err(Error::Range { base, len })
            );
        }
        bus.insert(0x8, 8, probe()).unwrap();
        bus.insert(0x18, 8, probe()).unwrap();
    }
}
