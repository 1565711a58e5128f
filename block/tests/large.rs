//! Disks of 16 TiB: what opening and using them takes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

use std::alloc::{GlobalAlloc, Layout, System};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use tandem_block::qcow2::{CreateOptions, DataFileLayout, OpenOptions, Qcow2, create};
use tandem_block::{CacheMode, Disk, FileOptions};
use vm_memory::VolatileSlice;

/// The system's allocator, and how many bytes it has given out.
struct Counting;

static USED: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

// SAFETY: every call is passed on to the system's allocator as it is.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let used = USED.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(used, Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `alloc`.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        USED.fetch_sub(layout.size(), Ordering::Relaxed);
        // SAFETY: the caller keeps the contract of `dealloc`.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// One test at a time, for the sake of its figures.
static ALONE: Mutex<()> = Mutex::new(());

const TIB: u64 = 1 << 40;
/// A file of ext4 cannot be longer.
const SIZE: u64 = 16 * TIB - (1 << 20);
const LIMIT: usize = 1 << 20;
/// For everything but the L2 tables, and what a thread keeps to fill up a cluster with.
const MARGIN: usize = (1 << 20) + (64 << 10);

/// Writes and reads all over the disk, reopens it and does so again, and looks at the memory.
fn stays_within_its_limit(path: &Path, writes: u64) {
    let options = OpenOptions {
        l2_cache_size: LIMIT,
        // Memory is what this is about, and each table that has to go would wait for a sync.
        files: FileOptions {
            cache: CacheMode::Unsafe,
            ..FileOptions::default()
        },
        ..OpenOptions::default()
    };
    let mut buffer = [7; 512];
    let at = |i: u64| (i.wrapping_mul(0x9e37_79b9_7f4a_7c15) % SIZE) & !511;
    for round in 0..2 {
        let before = USED.load(Ordering::Relaxed);
        PEAK.store(before, Ordering::Relaxed);
        let disk = Qcow2::open(path, &options).unwrap();
        let opened = PEAK.load(Ordering::Relaxed) - before;
        for i in 0..writes {
            let slice = [VolatileSlice::from(&mut buffer[..])];
            disk.write_at(&slice, at(i)).unwrap();
        }
        for i in 0..writes {
            let mut found = [0; 512];
            disk.read_at(&[VolatileSlice::from(&mut found[..])], at(i))
                .unwrap();
            assert_eq!(found, [7; 512]);
        }
        disk.flush().unwrap();
        let peak = PEAK.load(Ordering::Relaxed) - before;
        println!("round {round}: {opened} bytes to open, {peak} at most");
        assert!(peak <= LIMIT + MARGIN, "{peak} bytes");
    }
}

fn image(dir: &Path, options: &CreateOptions) -> std::path::PathBuf {
    let path = dir.join("image");
    let options = CreateOptions {
        size: SIZE,
        ..options.clone()
    };
    create(&path, &options).unwrap();
    path
}

#[test]
fn internal() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let path = image(dir.path(), &CreateOptions::default());
    stays_within_its_limit(&path, 5000);
}

#[test]
fn external() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        data_file: Some(dir.path().join("data")),
        ..CreateOptions::default()
    };
    stays_within_its_limit(&image(dir.path(), &options), 5000);
}

#[test]
fn packed() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        data_file: Some(dir.path().join("data")),
        data_file_layout: DataFileLayout::Packed,
        ..CreateOptions::default()
    };
    stays_within_its_limit(&image(dir.path(), &options), 5000);
}

/// A raw one whose mapping is not complete, as QEMU made them before version 6.0: every table that
/// is looked at has to be remembered.
#[test]
fn raw() {
    let _alone = ALONE.lock();
    let dir = tempfile::tempdir().unwrap();
    let options = CreateOptions {
        data_file: Some(dir.path().join("data")),
        ..CreateOptions::default()
    };
    let path = image(dir.path(), &options);
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    let (autoclear_features, raw) = (88, 2u64);
    file.write_all_at(&raw.to_be_bytes(), autoclear_features)
        .unwrap();
    stays_within_its_limit(&path, 5000);
}
