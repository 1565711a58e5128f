//! Guest memory as a queue uses it: each request has a dozen places in it, and nearly every one of
//! them lies within a region.

use std::sync::atomic::Ordering;

use vm_memory::{
    Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, GuestRegionMmap,
    MemoryRegionAddress, VolatileSlice,
};

use crate::GuestMemory;

/// The regions of a [`GuestMemory`], side by side, so that a place is found in a few steps.
pub(super) struct Regions<'m> {
    mem: &'m GuestMemory,
    /// In the order of their addresses.
    list: Vec<(u64, VolatileSlice<'m>)>,
}

impl<'m> Regions<'m> {
    pub(super) fn new(mem: &'m GuestMemory) -> Self {
        let whole = |region: &'m GuestRegionMmap<()>| {
            let len = usize::try_from(region.len()).ok()?;
            let slice = region.get_slice(MemoryRegionAddress(0), len).ok()?;
            Some((region.start_addr().0, slice))
        };
        Self {
            mem,
            list: mem.iter().filter_map(whole).collect(),
        }
    }

    /// The memory, for what lies across regions.
    pub(super) fn all(&self) -> &'m GuestMemory {
        self.mem
    }

    /// The `len` bytes at `addr`, if they lie within a region. There are few regions, and the first ones
    /// have nearly everything.
    #[inline]
    pub(super) fn within_one(&self, addr: u64, len: usize) -> Option<VolatileSlice<'m>> {
        self.list.iter().find_map(|(start, region)| {
            // Of what lies before the region this makes an offset far behind its end.
            let offset = addr.wrapping_sub(*start) as usize;
            region.subslice(offset, len).ok()
        })
    }

    /// Appends the `len` bytes at `addr` to `slices`, all of them or none: one slice for each region
    /// that they lie in. Returns whether they are there.
    #[inline]
    pub(super) fn push(
        &self,
        addr: GuestAddress,
        len: u32,
        slices: &mut Vec<VolatileSlice<'m>>,
    ) -> bool {
        if let Some(slice) = self.within_one(addr.0, len as usize) {
            slices.push(slice);
            return true;
        }
        let before = slices.len();
        for part in self.mem.get_slices(addr, len as usize) {
            match part {
                Ok(part) => slices.push(part),
                Err(_) => {
                    slices.truncate(before);
                    return false;
                }
            }
        }
        true
    }

    /// The little-endian number at `addr`, an even address.
    #[inline]
    pub(super) fn load_u16(&self, addr: u64, order: Ordering) -> Option<u16> {
        let value = match self.within_one(addr, size_of::<u16>()) {
            Some(slice) => slice.load(0, order).ok()?,
            None => self.mem.load(GuestAddress(addr), order).ok()?,
        };
        Some(u16::from_le(value))
    }
}
