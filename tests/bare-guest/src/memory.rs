//! The heap, and memory as the disks' driver sees it: virtual addresses are physical ones.

use alloc::alloc::{alloc_zeroed, dealloc, handle_alloc_error};
use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};

use virtio_drivers::{BufferDirection, Hal, PAGE_SIZE, PhysAddr};

const HEAP_SIZE: usize = 32 << 20;

#[global_allocator]
static HEAP: Heap = Heap(UnsafeCell::new(Blocks {
    next: 0,
    free: [ptr::null_mut(); usize::BITS as usize],
    memory: [0; HEAP_SIZE],
}));

/// Blocks whose sizes are powers of two, each aligned to its size.
#[repr(C, align(4096))]
struct Blocks {
    memory: [u8; HEAP_SIZE],
    /// Where `memory` has not been given out yet.
    next: usize,
    /// For each power of two the freed blocks, each of which begins with the address of the next.
    free: [*mut u8; usize::BITS as usize],
}

struct Heap(UnsafeCell<Blocks>);

// SAFETY: one processor runs this program, and no interrupt handler allocates.
unsafe impl Sync for Heap {}

fn block_size(layout: Layout) -> usize {
    let size = layout.size().max(layout.align()).max(size_of::<*mut u8>());
    size.next_power_of_two()
}

// SAFETY: a block has the size and the alignment asked for, and belongs to one owner: it is either
// beyond `next`, or in the free list, or given out.
unsafe impl GlobalAlloc for Heap {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let size = block_size(layout);
        // SAFETY: nothing else refers to the blocks while this function runs; an address in the
        // free list is that of a block of this size which nobody uses.
        unsafe {
            let blocks = &mut *self.0.get();
            let free = &mut blocks.free[size.trailing_zeros() as usize];
            if !free.is_null() {
                let block = *free;
                *free = block.cast::<*mut u8>().read();
                return block;
            }
            let base = blocks.memory.as_mut_ptr();
            let start = (base as usize + blocks.next).next_multiple_of(size) - base as usize;
            if start + size > HEAP_SIZE {
                return ptr::null_mut();
            }
            blocks.next = start + size;
            base.add(start)
        }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: as in `alloc`; the caller gives the block back.
        unsafe {
            let blocks = &mut *self.0.get();
            let free = &mut blocks.free[block_size(layout).trailing_zeros() as usize];
            block.cast::<*mut u8>().write(*free);
            *free = block;
        }
    }
}

/// The driver's view of memory.
pub struct Identity;

fn pages_layout(pages: usize) -> Layout {
    Layout::from_size_align(pages * PAGE_SIZE, PAGE_SIZE).expect("a size that fits")
}

// SAFETY: `dma_alloc` returns zeroed pages of the heap; addresses are the same everywhere.
unsafe impl Hal for Identity {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let layout = pages_layout(pages);
        // SAFETY: the driver asks for at least one page.
        let start = NonNull::new(unsafe { alloc_zeroed(layout) });
        let start = start.unwrap_or_else(|| handle_alloc_error(layout));
        (start.as_ptr() as PhysAddr, start)
    }

    unsafe fn dma_dealloc(_paddr: PhysAddr, start: NonNull<u8>, pages: usize) -> i32 {
        // SAFETY: the caller got it from `dma_alloc` with the same number of pages.
        unsafe { dealloc(start.as_ptr(), pages_layout(pages)) };
        0
    }

    unsafe fn mmio_phys_to_virt(_paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("only for PCI")
    }

    unsafe fn share(buffer: NonNull<[u8]>, _direction: BufferDirection) -> PhysAddr {
        buffer.cast::<u8>().as_ptr() as PhysAddr
    }

    unsafe fn unshare(_paddr: PhysAddr, _buffer: NonNull<[u8]>, _direction: BufferDirection) {}
}
