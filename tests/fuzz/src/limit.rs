//! How much memory an input may make the code take.

use std::alloc::{GlobalAlloc, Layout, System};
use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Most bytes above what there were before.
const ALLOWED: usize = 256 << 20;

/// The system's allocator, with a count of what is in use.
struct Counting;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static LIMIT: AtomicUsize = AtomicUsize::new(usize::MAX);

#[global_allocator]
static ALLOCATOR: Counting = Counting;

fn take(len: usize) {
    let in_use = IN_USE.fetch_add(len, Ordering::Relaxed).saturating_add(len);
    if in_use > LIMIT.load(Ordering::Relaxed) {
        // To tell of it takes memory.
        LIMIT.store(usize::MAX, Ordering::Relaxed);
        let _ = writeln!(
            std::io::stderr(),
            "the input takes more than {ALLOWED} bytes of memory: {len} were asked for at last"
        );
        std::process::abort();
    }
}

fn give_back(len: usize) {
    IN_USE.fetch_sub(len, Ordering::Relaxed);
}

// SAFETY: all that is asked for is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as for this function.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        take(layout.size());
        // SAFETY: as for this function.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, memory: *mut u8, layout: Layout) {
        give_back(layout.size());
        // SAFETY: as for this function.
        unsafe { System.dealloc(memory, layout) }
    }

    unsafe fn realloc(&self, memory: *mut u8, layout: Layout, new_size: usize) -> *mut u8 {
        take(new_size);
        give_back(layout.size());
        // SAFETY: as for this function.
        unsafe { System.realloc(memory, layout, new_size) }
    }
}

/// Ends the process, as a finding, if `run` makes more memory be in use than it may.
pub fn limited(run: impl FnOnce()) {
    let limit = IN_USE.load(Ordering::Relaxed).saturating_add(ALLOWED);
    LIMIT.store(limit, Ordering::Relaxed);
    run();
    LIMIT.store(usize::MAX, Ordering::Relaxed);
}
