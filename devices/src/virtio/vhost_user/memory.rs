//! Guest memory, as files of the front end.

use std::fs::File;
use std::sync::Arc;

use vhost::vhost_user::message::VhostUserMemoryRegion;
use vhost::vhost_user::{Error, Result};
use vm_memory::{FileOffset, GuestAddress, GuestRegionMmap, MmapRegion};

use crate::GuestMemory;

/// Regions that there may be.
pub(super) const MAX_REGIONS: usize = 64;

/// The memory table: where the front end has its regions, and our mappings of them.
#[derive(Clone, Default)]
pub(super) struct MemoryTable {
    regions: Vec<Region>,
}

#[derive(Clone)]
struct Region {
    /// Address in the front end's process, which is how it tells the places of rings.
    user: u64,
    guest: u64,
    len: u64,
    mapping: Arc<MmapRegion<()>>,
}

impl MemoryTable {
    /// Maps all regions of a table.
    pub(super) fn new(regions: &[VhostUserMemoryRegion], files: Vec<File>) -> Result<Self> {
        let mut table = Self::default();
        for (region, file) in regions.iter().zip(files) {
            table.add(region, file)?;
        }
        Ok(table)
    }

    /// Adds a region, which must not overlap another.
    pub(super) fn add(&mut self, region: &VhostUserMemoryRegion, file: File) -> Result<()> {
        let new = Region::map(region, file)?;
        if self.regions.len() >= MAX_REGIONS || self.regions.iter().any(|old| old.overlaps(&new)) {
            return Err(Error::InvalidParam);
        }
        self.regions.push(new);
        Ok(())
    }

    /// Takes away the region that has these addresses and this length.
    pub(super) fn remove(&mut self, region: &VhostUserMemoryRegion) -> Result<()> {
        let (guest, user, len) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let place = self
            .regions
            .iter()
            .position(|r| (r.guest, r.user, r.len) == (guest, user, len))
            .ok_or(Error::InvalidParam)?;
        self.regions.remove(place);
        Ok(())
    }

    /// All regions, as devices use them. `None` without any.
    pub(super) fn guest_memory(&self) -> Result<Option<GuestMemory>> {
        if self.regions.is_empty() {
            return Ok(None);
        }
        let mut regions = self.regions.clone();
        regions.sort_by_key(|region| region.guest);
        let regions = regions.into_iter().map(|region| {
            GuestRegionMmap::with_arc(region.mapping, GuestAddress(region.guest))
                .ok_or(Error::InvalidParam)
        });
        let memory = GuestMemory::from_regions(regions.collect::<Result<_>>()?);
        Ok(Some(memory.map_err(|_| Error::InvalidParam)?))
    }

    /// The guest's address of what the front end has at `user`.
    pub(super) fn guest_address(&self, user: u64) -> Option<u64> {
        self.regions.iter().find_map(|region| {
            let offset = user.checked_sub(region.user)?;
            // No overflow: both ends of the region have been checked.
            (offset < region.len).then(|| region.guest + offset)
        })
    }
}

impl Region {
    fn map(region: &VhostUserMemoryRegion, file: File) -> Result<Self> {
        let (guest, user, len) = (region.guest_phys_addr, region.user_addr, region.memory_size);
        let ends = [guest, user, region.mmap_offset].map(|start| start.checked_add(len));
        let [Some(_), Some(_), Some(end)] = ends else {
            return Err(Error::InvalidParam);
        };
        // What lies behind the end of a file cannot be accessed, though it can be mapped.
        let file_len = file.metadata().map_err(Error::ReqHandlerError)?.len();
        let size = usize::try_from(len).map_err(|_| Error::InvalidParam)?;
        if len == 0 || end > file_len {
            return Err(Error::InvalidParam);
        }
        let mapping = MmapRegion::from_file(FileOffset::new(file, region.mmap_offset), size);
        let mapping = mapping.map_err(|e| Error::ReqHandlerError(std::io::Error::other(e)))?;
        Ok(Self {
            user,
            guest,
            len,
            mapping: mapping.into(),
        })
    }

    fn overlaps(&self, other: &Self) -> bool {
        let overlap = |a: u64, b: u64| a < b + other.len && b < a + self.len;
        overlap(self.guest, other.guest) || overlap(self.user, other.user)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn region(guest: u64, user: u64, len: u64, offset: u64) -> VhostUserMemoryRegion {
        VhostUserMemoryRegion::new(guest, len, user, offset)
    }

    fn file() -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(0x4000).unwrap();
        file
    }

    #[test]
    fn addresses_are_translated() {
        let regions = [
            region(0, 0x7000_0000, 0x1000, 0),
            region(0x10_0000, 0x5000_0000, 0x2000, 0x2000),
        ];
        let table = MemoryTable::new(&regions, vec![file(), file()]).unwrap();
        assert_eq!(table.guest_address(0x7000_0fff), Some(0xfff));
        assert_eq!(table.guest_address(0x7000_1000), None);
        assert_eq!(table.guest_address(0x5000_1008), Some(0x10_1008));
        assert_eq!(table.guest_address(0x4fff_ffff), None);
        assert!(table.guest_memory().unwrap().is_some());
    }

    #[test]
    fn regions_that_cannot_be() {
        let bad = [
            region(0, 0, 0, 0),
            region(0, 0, 0x5000, 0),
            region(0, 0, 0x1000, 0x4000),
            region(0, 0, 0x1000, u64::MAX - 0x800),
            region(u64::MAX - 0x800, 0, 0x1000, 0),
            region(0, u64::MAX - 0x800, 0x1000, 0),
            region(0, 0, 0x1000, 0x800),
            region(0, 0, u64::MAX, 0),
        ];
        for (n, bad) in bad.into_iter().enumerate() {
            let table = MemoryTable::new(&[bad], vec![file()]);
            assert!(table.is_err(), "region {n}");
        }
        // Of one guest address, or of one address of the front end, there cannot be two.
        let first = region(0x1000, 0x9000, 0x1000, 0);
        let second = [
            region(0x1800, 0x20_0000, 0x1000, 0),
            region(0x20_0000, 0x9000, 0x1000, 0),
        ];
        for (n, second) in second.into_iter().enumerate() {
            let table = MemoryTable::new(&[first, second], vec![file(), file()]);
            assert!(table.is_err(), "region {n}");
        }
    }

    #[test]
    fn regions_come_and_go() {
        let mut table = MemoryTable::default();
        assert!(table.guest_memory().unwrap().is_none());
        for n in 0..MAX_REGIONS as u64 {
            let new = region(n * 0x1000, n * 0x1000, 0x1000, 0);
            table.add(&new, file()).unwrap();
        }
        let more = region(1 << 40, 1 << 40, 0x1000, 0);
        assert!(table.add(&more, file()).is_err());
        assert!(table.remove(&more).is_err());
        table.remove(&region(0, 0, 0x1000, 0)).unwrap();
        assert_eq!(table.guest_address(0), None);
        table.add(&more, file()).unwrap();
    }
}
