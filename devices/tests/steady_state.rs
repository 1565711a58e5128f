//! Serving a request allocates nothing, once the first ones have been served.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;
#[path = "common/machine.rs"]
mod machine;
#[path = "common/registers.rs"]
mod registers;

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use common::guest_memory;
use common::ring::{Ring, indirect, readable, writable, write_table};
use machine::{Machine, within_deadline};
use registers::{header, ring_doorbell, start};
use tandem_block::{Disk, FileStorage, Limits, Raw, Result};
use tandem_devices::virtio::FEATURE_EVENT_IDX;
use vm_memory::VolatileSlice;

/// The system's allocator, counting what all threads ask for.
struct Counting;

static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

// SAFETY: every call is passed on unchanged to an allocator that keeps the contract.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, ptr: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`; `ptr` comes from `alloc` above.
        unsafe { System.dealloc(ptr, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A disk of which nothing can be had at once.
struct Cold(Raw);

impl Disk for Cold {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.0.read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.0.write_at(bufs, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.0.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard(offset, len)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
}

/// One test, because it counts for the whole process.
#[test]
fn requests_allocate_nothing() {
    check(|raw| Arc::new(raw));
    check(|raw| Arc::new(Cold(raw)));
}

fn check(disk: fn(Raw) -> Arc<dyn Disk>) {
    within_deadline(move || {
        let file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        let storage = Box::new(FileStorage::new(file).unwrap());
        let disk = disk(Raw::with_storage("disk".as_ref(), storage, false).unwrap());
        let mem = guest_memory();
        // A second thread would be started at any time, when the first happens to be slow.
        let machine = Machine::with_options(disk, &mem, |options| options.threads = 1);
        let mut ring = Ring::new(&mem, 0, 16);
        start(&machine, &ring, FEATURE_EVENT_IDX);

        // A read, a write, a flush, a bad one, one of as many segments as there may be, and two that
        // are made in one.
        let (table, headers, data, status) = (0x4000, 0x1_0000, 0x2_0000, 0x1_1000);
        let head = |n: u64, kind, sector| {
            header(&mem, headers + 16 * n, kind, sector);
            readable(headers + 16 * n, 16)
        };
        let status = writable(status, 1);
        let many = [
            vec![head(4, 1, 8)],
            vec![readable(data, 512); 254],
            vec![status],
        ];
        let requests = [
            vec![head(0, 0, 0), writable(data, 4096), status],
            vec![head(1, 1, 8), readable(data, 4096), status],
            vec![head(2, 4, 0), status],
            vec![head(3, 0, 1 << 40), writable(data, 512), status],
            many.concat(),
            vec![head(5, 0, 16), writable(data, 1024), status],
            vec![head(6, 0, 18), writable(data, 1024), status],
        ];
        for (n, request) in (0u16..).zip(&requests) {
            let table = table + 0x1000 * u64::from(n);
            write_table(&mem, table, 0, &common::ring::chain(0, request));
            let len = 16 * request.len() as u32;
            write_table(&mem, ring.table, n, &[indirect(table, len)]);
        }

        let mut serve = |rounds: u16| {
            for _ in 0..rounds {
                for places in [&[0][..], &[1], &[2], &[3], &[4], &[5, 6]] {
                    let done = ring.avail_idx().wrapping_add(places.len() as u16);
                    ring.offer_all(places);
                    ring_doorbell(&machine);
                    while ring.used_idx() != done {
                        thread::yield_now();
                    }
                }
            }
        };
        serve(2);
        let before = ALLOCATIONS.load(Ordering::SeqCst);
        serve(100);
        assert_eq!(ALLOCATIONS.load(Ordering::SeqCst) - before, 0);
        assert_eq!(machine.stats.failed_requests(), 102);
        assert_eq!(machine.stats.queues()[0].merged, 102);
    });
}
