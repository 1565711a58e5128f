//! Files that fail: what the disk promises then.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, check, create};
use tandem_block::{Disk, Error, FileStorage, Preallocation, Raw, Storage};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

/// What fails at the moment.
#[derive(Debug, Default)]
struct Faults {
    writes: AtomicBool,
    syncs: AtomicBool,
    zeroes: AtomicBool,
    /// Writes, until space is released.
    is_full: AtomicBool,
}

/// A file with faults.
#[derive(Debug)]
struct Faulty {
    file: FileStorage,
    faults: Arc<Faults>,
}

impl Faulty {
    fn open(path: &Path, faults: &Arc<Faults>) -> Box<dyn Storage> {
        Box::new(Self {
            file: FileStorage::open(path, false).unwrap(),
            faults: faults.clone(),
        })
    }
}

fn fail_if(fault: &AtomicBool) -> io::Result<()> {
    match fault.load(Ordering::Relaxed) {
        true => Err(io::ErrorKind::StorageFull.into()),
        false => Ok(()),
    }
}

impl Storage for Faulty {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.file.read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        fail_if(&self.faults.writes)?;
        fail_if(&self.faults.is_full)?;
        self.file.write_at(bufs, offset)
    }
    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_bytes_at(buf, offset)
    }
    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_bytes_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        fail_if(&self.faults.zeroes)?;
        self.file.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.faults.is_full.store(false, Ordering::Relaxed);
        self.file.discard(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }
    fn sync(&self) -> io::Result<()> {
        fail_if(&self.faults.syncs)?;
        self.file.sync()
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}

/// An image in a directory of its own, its data in it or in an external data file.
fn image(external: bool) -> (TempDir, PathBuf, Option<PathBuf>) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let data = external.then(|| dir.path().join("data"));
    let options = CreateOptions {
        size: 8 << 20,
        cluster_size: 4096,
        data_file: data.clone(),
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    (dir, path, data)
}

fn open(path: &Path, data: Option<&Path>, faults: &Arc<Faults>) -> Qcow2 {
    let image = Faulty::open(path, faults);
    let data = data.map(|data| Faulty::open(data, faults));
    Qcow2::with_storage(path, image, data, &OpenOptions::default()).unwrap()
}

fn write(disk: &dyn Disk, offset: u64) -> tandem_block::Result<()> {
    let mut sector = [7; 512];
    disk.write_at(&[VolatileSlice::from(&mut sector[..])], offset)
}

/// The first write to a part of the disk makes an L2 table for it. If the data cannot be written,
/// the table stays, empty; it must lie in the file all the same.
#[test]
fn an_image_can_be_opened_after_its_data_could_not_be_written() {
    for external in [false, true] {
        let (_dir, path, data) = image(external);
        let faults = Arc::new(Faults::default());
        let disk = open(&path, data.as_deref(), &faults);
        faults.writes.store(true, Ordering::Relaxed);
        assert!(matches!(write(&disk, 0), Err(Error::Io { .. })));
        disk.flush().unwrap();
        drop(disk);
        let report = check(
            &path,
            &tandem_block::qcow2::CheckOptions::default(),
            &mut |finding| panic!("{}", finding.text),
        )
        .unwrap();
        assert_eq!(report.allocated_clusters, 0);

        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        write(&disk, 0).unwrap();
        disk.flush().unwrap();
        drop(disk);
        let report = check(
            &path,
            &tandem_block::qcow2::CheckOptions::default(),
            &mut |finding| panic!("{}", finding.text),
        )
        .unwrap();
        assert_eq!(report.allocated_clusters, 1);
    }
}

/// The place of a cluster may be a hole of the file, for which there is no space before that of another
/// one has come back.
#[test]
fn a_write_in_place_waits_for_space_that_comes_back() {
    let (_dir, path, _) = image(false);
    let faults = Arc::new(Faults::default());
    let disk = open(&path, None, &faults);
    for offset in [0, 4096] {
        write(&disk, offset).unwrap();
    }
    disk.flush().unwrap();
    faults.is_full.store(true, Ordering::Relaxed);
    assert!(matches!(write(&disk, 0), Err(Error::Io { .. })));
    disk.discard(4096, 4096).unwrap();
    write(&disk, 0).unwrap();
    assert!(!faults.is_full.load(Ordering::Relaxed));
}

/// A disk that could not grow has a data file of its old length.
#[test]
fn a_data_file_shrinks_again_if_there_is_no_space() {
    let (_dir, path, data) = image(true);
    let data = data.unwrap();
    let faults = Arc::new(Faults::default());
    let disk = open(&path, Some(&data), &faults);
    faults.zeroes.store(true, Ordering::Relaxed);
    let grown = disk.resize_preallocated(64 << 20, Preallocation::Falloc);
    assert!(matches!(grown, Err(Error::Io { .. })));
    assert_eq!(disk.size(), 8 << 20);
    assert_eq!(fs::metadata(&data).unwrap().len(), 8 << 20);
}

/// A raw disk loses what is behind its new end, though there is no space for zeros.
#[test]
fn what_a_raw_disk_has_lost_does_not_come_back() {
    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (dir.path().join("image"), dir.path().join("data"));
    let options = CreateOptions {
        size: 1 << 20,
        data_file: Some(data.clone()),
        data_file_raw: true,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let faults = Arc::new(Faults::default());
    let disk = open(&path, Some(&data), &faults);
    for offset in [512, 64 << 10] {
        write(&disk, offset).unwrap();
    }
    faults.zeroes.store(true, Ordering::Relaxed);
    disk.resize(512).unwrap();
    assert_eq!(fs::metadata(&data).unwrap().len(), 512);
    faults.zeroes.store(false, Ordering::Relaxed);
    disk.resize(1 << 20).unwrap();
    let mut bytes = vec![1; 1 << 20];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 0)
        .unwrap();
    assert!(bytes.iter().all(|byte| *byte == 0));
}

/// The system tells only once that it has lost writes.
#[test]
fn a_sync_that_fails_is_final() {
    let faults = Arc::new(Faults::default());
    let fails_for_good = |disk: &dyn Disk| {
        write(disk, 0).unwrap();
        faults.syncs.store(true, Ordering::Relaxed);
        assert!(matches!(disk.flush(), Err(Error::Io { .. })));
        faults.syncs.store(false, Ordering::Relaxed);
        assert!(matches!(disk.flush(), Err(Error::SyncFailed { .. })));
    };
    for external in [false, true] {
        let (_dir, path, data) = image(external);
        fails_for_good(&open(&path, data.as_deref(), &faults));
        let report = check(
            &path,
            &tandem_block::qcow2::CheckOptions::default(),
            &mut |_| (),
        )
        .unwrap();
        assert_eq!((report.corruptions, report.allocated_clusters), (0, 0));
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    fs::write(&path, [0; 4096]).unwrap();
    fails_for_good(&Raw::with_storage(&path, Faulty::open(&path, &faults), false).unwrap());
}

/// An image whose metadata is counted as free would be overwritten by its own allocator.
#[test]
fn metadata_that_is_counted_as_free_is_refused() {
    const REFCOUNT_BLOCK: u64 = 2 * 4096;
    let clusters = [
        (0, "header"),
        (1, "refcount_table_offset"),
        (2, "refcount_table entry"),
        (3, "l1_table_offset"),
        (4, "l1_table entry"),
    ];
    for (cluster, field) in clusters {
        let (_dir, path, _) = image(false);
        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        write(&disk, 0).unwrap();
        drop(disk);
        let file = File::options().write(true).open(&path).unwrap();
        let count_at = REFCOUNT_BLOCK + 2 * cluster;
        std::os::unix::fs::FileExt::write_all_at(&file, &[0, 0], count_at).unwrap();
        let before = fs::read(&path).unwrap();
        let error = Qcow2::open(&path, &OpenOptions::default()).err().unwrap();
        let text = error.to_string();
        assert!(text.contains(field) && text.contains("free"), "{text}");
        assert!(fs::read(&path).unwrap() == before);

        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        Qcow2::open(&path, &options).unwrap();
    }
}

/// A file of which the system reports a lost write to one sync only.
#[derive(Clone, Debug, Default)]
struct ReportedOnce {
    syncs: Arc<AtomicUsize>,
    begun: Arc<AtomicUsize>,
}

impl Storage for ReportedOnce {
    fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_at(&self, _: &[VolatileSlice<'_>], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn read_bytes_at(&self, _: &mut [u8], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_bytes_at(&self, _: &[u8], _: u64) -> io::Result<()> {
        Ok(())
    }
    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> io::Result<()> {
        Ok(())
    }
    fn discard(&self, _: u64, _: u64) -> io::Result<()> {
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok(Some(offset))
    }
    fn size(&self) -> io::Result<u64> {
        Ok(1 << 20)
    }
    /// The first gives the other time to come as far as it can, and fails.
    fn sync(&self) -> io::Result<()> {
        if self.syncs.fetch_add(1, Ordering::SeqCst) > 0 {
            return Ok(());
        }
        while self.begun.load(Ordering::SeqCst) < 2 {
            std::thread::yield_now();
        }
        std::thread::sleep(std::time::Duration::from_millis(50));
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}

/// The loss is that of both flushes.
#[test]
fn two_flushes_at_once() {
    let storage = ReportedOnce::default();
    let disk = Raw::with_storage(Path::new("raw"), Box::new(storage.clone()), false);
    let disk = disk.unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                storage.begun.fetch_add(1, Ordering::SeqCst);
                assert!(disk.flush().is_err());
            });
        }
    });
}

/// Nobody takes what a failed close has lost for stored because closing it again does nothing.
#[test]
fn a_close_that_failed_does_not_succeed_later() {
    let (_dir, path, _) = image(false);
    let faults = Arc::new(Faults::default());
    let disk = open(&path, None, &faults);
    write(&disk, 0).unwrap();
    faults.syncs.store(true, Ordering::Relaxed);
    assert!(disk.close().is_err());
    faults.syncs.store(false, Ordering::Relaxed);
    assert!(matches!(disk.close(), Err(Error::Closed { .. })));
    drop(disk);
    let disk = open(&path, None, &faults);
    disk.close().unwrap();
    disk.close().unwrap();
}
