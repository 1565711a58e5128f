mod faults;

use super::*;
use crate::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::Mutex;
use std::thread;

fn raw(size: u64) -> LiveDisk {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(size).unwrap();
    LiveDisk::new(Raw::open(file.path(), false).unwrap())
}

#[derive(Default)]
struct Told {
    changes: Mutex<Vec<(u64, u64)>>,
    is_slow: AtomicBool,
    is_closed: AtomicBool,
}

impl Watcher for Told {
    fn before_change(&self, disk: &dyn Disk, offset: u64, len: u64) {
        let mut old = vec![1; len as usize];
        disk.read_at(&[VolatileSlice::from(&mut old[..])], offset)
            .unwrap();
        assert!(old.iter().all(|byte| *byte == 0), "it has changed already");
        self.changes.lock().unwrap().push((offset, len));
    }

    fn is_quick(&self, _offset: u64, _len: u64) -> bool {
        !self.is_slow.load(Ordering::Relaxed)
    }

    fn check_size(&self, _disk: &dyn Disk, size: u64) -> Result<()> {
        let reason = || Error::Option("not now".to_owned());
        (size == 8192).then_some(()).ok_or_else(reason)
    }

    fn close(&self, _image: &mut LiveImage, _history: &mut History) {
        self.is_closed.store(true, Ordering::Relaxed);
    }
}

#[test]
fn watchers_are_told_before_changes() {
    let disk = raw(4096);
    let told = Arc::new(Told::default());
    disk.exclusive(|state| state.watchers.push(told.clone()));
    let mut data = [7; 512];
    let bufs = [VolatileSlice::from(&mut data[..])];
    disk.write_at(&bufs, 0).unwrap();
    assert!(disk.write_at(&bufs, 4096).is_err());
    assert!(disk.write_at(&bufs, u64::MAX).is_err());
    told.is_slow.store(true, Ordering::Relaxed);
    assert!(!disk.try_write_at(&bufs, 512).unwrap());
    told.is_slow.store(false, Ordering::Relaxed);
    disk.try_write_at(&bufs, 512).unwrap();
    disk.write_zeroes(1024, 512, false).unwrap();
    disk.discard(1536, 1024).unwrap();
    let expected = [(0, 512), (512, 512), (1024, 512), (1536, 1024)];
    assert_eq!(*told.changes.lock().unwrap(), expected);
    assert!(disk.resize(16384).is_err());
    assert!(disk.follow_size().is_err());
    disk.resize(8192).unwrap();
    assert_eq!(disk.size(), 8192);
    disk.close().unwrap();
    assert!(told.is_closed.load(Ordering::Relaxed));
    assert!(disk.shared().watchers.is_empty());
}

/// What is written is neither held up nor taken down any more, and nobody begins where it has stopped.
#[test]
fn an_operation_that_panics_leaves_the_disk_to_the_guest() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("disk");
    let create = crate::qcow2::CreateOptions {
        size: 4096,
        ..Default::default()
    };
    crate::qcow2::create(&path, &create).unwrap();
    let disk = LiveDisk::new(Qcow2::open(&path, &Default::default()).unwrap());
    let rebase = RebaseOptions {
        open: Default::default(),
        backing: None,
        max_last: None,
    };
    let panics: Progress<'_> = &mut |_, _| panic!("as it is meant to");
    let attempt = std::panic::AssertUnwindSafe(|| disk.rebase(&rebase, panics));
    assert!(std::panic::catch_unwind(attempt).is_err());
    disk.exclusive(|state| assert!(state.watchers.is_empty()));
    let go_on: Progress<'_> = &mut |_, _| std::ops::ControlFlow::Continue(());
    let refused = disk.rebase(&rebase, go_on).unwrap_err().to_string();
    assert!(refused.contains("during rebase"), "{refused}");
    let mut data = [7; 512];
    disk.write_at(&[VolatileSlice::from(&mut data[..])], 0)
        .unwrap();
    disk.close().unwrap();
}

#[test]
fn operations_find_no_request_under_way() {
    let disk = raw(1 << 20);
    let (begun, ended, stop) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        for _ in 0..3 {
            scope.spawn(|| {
                while !stop.load(Ordering::Relaxed) {
                    disk.with_image(|_| {
                        begun.fetch_add(1, Ordering::SeqCst);
                        thread::yield_now();
                        ended.fetch_add(1, Ordering::SeqCst);
                    });
                }
            });
        }
        while begun.load(Ordering::SeqCst) == 0 {
            thread::yield_now();
        }
        for _ in 0..200 {
            disk.exclusive(|_| {
                let before = begun.load(Ordering::SeqCst);
                assert_eq!(ended.load(Ordering::SeqCst), before);
                thread::yield_now();
                assert_eq!(begun.load(Ordering::SeqCst), before);
                assert!(disk.try_shared().is_none());
                assert!(!disk.try_read_at(&[], 0).unwrap());
            });
        }
        stop.store(true, Ordering::Relaxed);
    });
}
