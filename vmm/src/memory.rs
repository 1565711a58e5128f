//! The guest's RAM.

use kvm_bindings::kvm_userspace_memory_region;
use kvm_ioctls::VmFd;
use tandem_devices::GuestMemory;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::error::{Error, KvmContext, Result};
use crate::layout;

const PAGE_SIZE: u64 = 4096;

/// Maps `size` bytes of RAM: from address 0 up to the MMIO gap, and the rest from 4 GiB on.
///
/// Pages are taken from the host as the guest touches them, without a reservation of swap.
pub fn create(size: u64) -> Result<GuestMemory> {
    let low = size.min(layout::LOW_RAM_MAX);
    let mut ranges = vec![(GuestAddress(0), low as usize)];
    if size > low {
        ranges.push((GuestAddress(layout::HIGH_RAM), (size - low) as usize));
    }
    GuestMemory::from_ranges(&ranges).map_err(|source| Error::Memory { size, source })
}

/// Tells the host that all of the `len` bytes at `start` are about to be written, so that it gives them
/// memory in large pages, where it has them: with small ones, to read a file takes twice as long.
pub fn expect_writes(mem: &GuestMemory, start: u64, len: u64) {
    let first = start.next_multiple_of(PAGE_SIZE);
    let end = start.saturating_add(len) / PAGE_SIZE * PAGE_SIZE;
    let len = end.saturating_sub(first) as usize;
    if let Ok(slice) = mem.get_slice(GuestAddress(first), len) {
        let address = slice.ptr_guard_mut().as_ptr().cast();
        // A host without large pages refuses, and nothing is lost.
        // SAFETY: the range is mapped memory of `mem`, and no byte of it is changed by this.
        let _ = unsafe { libc::madvise(address, len, libc::MADV_HUGEPAGE) };
    }
}

/// End of the RAM below the MMIO gap.
pub fn low_end(mem: &GuestMemory) -> u64 {
    mem.iter()
        .find(|region| region.start_addr().0 == 0)
        .map_or(0, |region| region.len())
}

/// Last address of RAM.
pub fn last(mem: &GuestMemory) -> u64 {
    mem.last_addr().0
}

/// Hands all of `mem` to `vm` as its RAM.
///
/// # Safety
/// The mappings of `mem` must stay until `vm` and all of its vCPUs are closed. It is not enough that
/// no vCPU runs: KVM writes to memory that a guest has registered (its record of stolen time, say)
/// also when it puts a vCPU away.
pub unsafe fn attach(vm: &VmFd, mem: &GuestMemory) -> Result<()> {
    for (slot, region) in (0..).zip(mem.iter()) {
        let slot = kvm_userspace_memory_region {
            slot,
            flags: 0,
            guest_phys_addr: region.start_addr().0,
            memory_size: region.len(),
            userspace_addr: region.as_ptr() as u64,
        };
        // SAFETY: the range is one whole mapping of `mem`, the ranges of its regions do not overlap,
        // and the caller keeps them mapped until the VM is gone.
        unsafe { vm.set_user_memory_region(slot) }.context("give the guest its memory")?;
    }
    Ok(())
}

/// What a stretch of guest physical memory is for. The values are those of the e820 map and of the
/// PVH memory map alike.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Usage {
    /// For the guest to use.
    Ram = 1,
    /// ACPI tables.
    Reserved = 2,
}

/// First address, length and use of each stretch of memory, as the guest is told.
pub fn map(mem: &GuestMemory) -> Vec<(u64, u64, Usage)> {
    let low = low_end(mem);
    let mut map = vec![
        (0, layout::CONVENTIONAL_END, Usage::Ram),
        (
            layout::CONVENTIONAL_END,
            layout::KERNEL - layout::CONVENTIONAL_END,
            Usage::Reserved,
        ),
        (layout::KERNEL, low - layout::KERNEL, Usage::Ram),
    ];
    let high = mem.iter().filter(|region| region.start_addr().0 != 0);
    map.extend(high.map(|region| (region.start_addr().0, region.len(), Usage::Ram)));
    map
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn splits_around_the_gap() {
        let mem = create(512 << 20).unwrap();
        assert_eq!((low_end(&mem), last(&mem)), (512 << 20, (512 << 20) - 1));
        assert_eq!(
            map(&mem),
            [
                (0, 0x9_fc00, Usage::Ram),
                (0x9_fc00, 0x6_0400, Usage::Reserved),
                (0x10_0000, 511 << 20, Usage::Ram),
            ]
        );

        let mem = create(5 << 30).unwrap();
        assert_eq!((low_end(&mem), last(&mem)), (3 << 30, (6 << 30) - 1));
        assert_eq!(map(&mem)[3], (4 << 30, 2 << 30, Usage::Ram));
        let total: u64 = map(&mem).iter().map(|(_, size, _)| size).sum();
        assert_eq!(total, 5 << 30);

        assert_eq!(create(3 << 30).unwrap().num_regions(), 1);
    }

    #[test]
    fn impossible_sizes_are_errors() {
        assert!(matches!(create(1 << 60), Err(Error::Memory { .. })));
    }
}
