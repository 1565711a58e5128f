//! Descriptor chains, as a driver has linked them (virtio 1.3, section 2.7.5).

use virtio_queue::desc::split::Descriptor;
use vm_memory::{Bytes, GuestAddress, VolatileMemory, VolatileSlice};

use super::queue::RingError;
use super::regions::Regions;

const DESCRIPTOR_SIZE: u32 = 16;

/// The descriptors of a chain, one after another, those of an indirect table in the place of the one
/// that names it. Each is read once. After an error there is nothing more to be had.
pub(super) struct Chain<'a, 'm> {
    regions: &'a Regions<'m>,
    table: u64,
    /// The table, if it lies within a region.
    whole: Option<VolatileSlice<'m>>,
    /// Descriptors in the table.
    size: u16,
    /// `None` behind the last one.
    next: Option<u16>,
    /// So many more can come before one must come twice.
    left: u16,
    /// Bytes of those that have come.
    len: u32,
    is_indirect: bool,
}

impl<'a, 'm> Chain<'a, 'm> {
    /// The chain that begins at index `head` of a table of `size` descriptors.
    pub(super) fn new(regions: &'a Regions<'m>, table: u64, size: u16, head: u16) -> Self {
        let mut chain = Self {
            regions,
            table: 0,
            whole: None,
            size: 0,
            next: Some(head),
            left: 0,
            len: 0,
            is_indirect: false,
        };
        chain.set_table(table, size);
        chain
    }

    fn set_table(&mut self, table: u64, size: u16) {
        let len = usize::from(size) * DESCRIPTOR_SIZE as usize;
        self.whole = self.regions.within_one(table, len);
        (self.table, self.size, self.left) = (table, size, size);
    }

    fn read(&self, index: u16) -> Option<Descriptor> {
        if self.left == 0 || index >= self.size {
            return None;
        }
        let offset = u64::from(index) * u64::from(DESCRIPTOR_SIZE);
        match &self.whole {
            Some(table) => Some(table.get_ref(offset as usize).ok()?.load()),
            None => {
                let addr = self.table.checked_add(offset)?;
                self.regions.all().read_obj(GuestAddress(addr)).ok()
            }
        }
    }

    /// Goes on at the beginning of the table that `desc` names.
    fn enter(&mut self, desc: Descriptor) -> Option<()> {
        if self.is_indirect || !desc.len().is_multiple_of(DESCRIPTOR_SIZE) {
            return None;
        }
        let size = u16::try_from(desc.len() / DESCRIPTOR_SIZE).ok()?;
        self.set_table(desc.addr().0, size);
        self.is_indirect = true;
        Some(())
    }

    fn step(&mut self, index: u16) -> Option<Descriptor> {
        let mut desc = self.read(index)?;
        if desc.refers_to_indirect_table() {
            self.enter(desc)?;
            desc = self.read(0)?;
            if desc.refers_to_indirect_table() {
                return None;
            }
        }
        self.left -= 1;
        self.len = self.len.checked_add(desc.len())?;
        self.next = desc.has_next().then(|| desc.next());
        Some(desc)
    }
}

impl Iterator for Chain<'_, '_> {
    type Item = Result<Descriptor, RingError>;

    fn next(&mut self) -> Option<Self::Item> {
        let index = self.next.take()?;
        Some(self.step(index).ok_or(RingError::BrokenChain))
    }
}
