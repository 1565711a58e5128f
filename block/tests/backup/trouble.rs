//! Backups that fail, and requests that have to wait for one another.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use super::common::gated::{Gate, Gated, during};
use super::common::{Memory, read, write};
use super::{GRANULE, Random, SIZE, begin, dirty, full, live, restore, since, with_bitmap};
use tandem_block::{
    Backup, BackupOptions, BackupState, Disk, Error, LiveDisk, Raw, Storage, VolatileSlice,
};
use tempfile::TempDir;

#[test]
fn a_full_scratch_file_fails_the_backup_alone() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_bitmap(dir.path());
    write(&*disk, 0, SIZE, 1).unwrap();
    for keeps in [0, 3] {
        let small = BackupOptions {
            scratch_size: keeps * GRANULE + GRANULE / 2,
            ..since(false)
        };
        let backup = begin(&disk, &small);
        let before = backup.read(0, &mut [0; 4096]).unwrap();
        assert_eq!(before.next, 4096);
        for i in 0..keeps {
            write(&*disk, 2 * i * GRANULE, 512, 2).unwrap();
        }
        let status = backup.status();
        assert_eq!(status.state, BackupState::Active);
        assert_eq!(
            (status.scratch_used, status.scratch_peak),
            (keeps * GRANULE, keeps * GRANULE)
        );
        write(&*disk, SIZE - 512, 512, 2).unwrap();
        write(&*disk, 10 * GRANULE, 512, 2).unwrap();
        assert_eq!(read(&*disk, SIZE - 512, 512), [2; 512]);
        let status = backup.status();
        assert_eq!(status.state, BackupState::Failed);
        assert!(status.failure.unwrap().contains("is full"));
        for result in [
            backup.read(0, &mut [0; 4096]).map(drop),
            backup.release(0),
            backup.finish(),
        ] {
            assert!(result.unwrap_err().to_string().contains("is full"));
        }
        // What the reader has released needs no scratch file.
        disk.resize(SIZE - 512).unwrap();
        disk.resize(SIZE).unwrap();
        drop(backup);
        assert_eq!(
            dirty(&disk),
            Some(SIZE.next_multiple_of(4096) - 4096 + 1536)
        );
    }
    let backup = begin(
        &disk,
        &BackupOptions {
            scratch_size: 0,
            ..full()
        },
    );
    let mut buffer = vec![0; SIZE as usize];
    let chunk = backup.read(0, &mut buffer).unwrap();
    backup.release(chunk.next).unwrap();
    write(&*disk, 0, SIZE, 3).unwrap();
    backup.finish().unwrap();
}

/// A file of which a part cannot be read.
#[derive(Debug)]
struct Unreadable(Memory);

impl Storage for Unreadable {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        match offset {
            0 => Err(io::ErrorKind::HostUnreachable.into()),
            _ => self.0.read_at(bufs, offset),
        }
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.0.write_at(bufs, offset)
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.0.read_bytes_at(buf, offset)
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.0.write_bytes_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.0.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.0.discard(offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.0.sync()
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.0.set_len(len)
    }

    fn capacity(&self) -> io::Result<Option<u64>> {
        self.0.capacity()
    }
}

fn unreadable(dir: &TempDir) -> (Arc<LiveDisk>, BackupOptions) {
    let storage = Unreadable(Memory::new(vec![1; 4 * GRANULE as usize]));
    let disk = Raw::with_storage(Path::new("disk"), Box::new(storage), false).unwrap();
    let options = BackupOptions {
        scratch_dir: Some(dir.path().to_owned()),
        ..full()
    };
    (live(disk), options)
}

#[test]
fn what_cannot_be_read_fails_the_backup_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (disk, options) = unreadable(&dir);
    let backup = begin(&disk, &options);
    let error = backup.read(0, &mut [0; 512]).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error}");
    // Who asks again may be luckier.
    assert_eq!(backup.status().state, BackupState::Active);
    assert_eq!(backup.read(GRANULE, &mut [0; 512]).unwrap().bytes, 512);
    write(&*disk, 512, 512, 2).unwrap();
    let failure = backup.status().failure.unwrap();
    assert!(
        failure.contains("could not read 'disk' at offset 0x0"),
        "{failure}"
    );
    assert!(backup.read(GRANULE, &mut [0; 512]).is_err());
}

/// A raw disk of four granules whose transfers can be held up, in a backup.
fn gated(dir: &TempDir) -> (Arc<Gate>, Arc<LiveDisk>, Backup) {
    let gate = Arc::new(Gate::default());
    let storage = Gated::new(Memory::new(vec![1; 4 * GRANULE as usize]), &gate);
    let disk = live(Raw::with_storage(Path::new("disk"), Box::new(storage), false).unwrap());
    let options = BackupOptions {
        scratch_dir: Some(dir.path().to_owned()),
        ..full()
    };
    let backup = begin(&disk, &options);
    (gate, disk, backup)
}

fn try_write(disk: &dyn Disk, offset: u64) -> bool {
    let mut bytes = [2; 512];
    disk.try_write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
        .unwrap()
}

/// What one writer is copying, no other one changes, and those elsewhere do not wait.
#[test]
fn writers_wait_for_the_copy() {
    let dir = tempfile::tempdir().unwrap();
    let (gate, disk, backup) = gated(&dir);
    write(&*disk, 2 * GRANULE, 512, 2).unwrap();
    let first = || write(&*disk, 0, 512, 2).unwrap();
    during(&gate, first, || {
        assert!(!try_write(&*disk, 4096));
        assert!(!try_write(&*disk, GRANULE), "it has still to be copied");
        assert!(try_write(&*disk, 3 * GRANULE - 512));
        write(&*disk, 3 * GRANULE, 512, 2).unwrap();
    });
    assert!(try_write(&*disk, 4096));
    let mut content = Vec::new();
    restore(&backup, &mut Random(1), &mut content);
    assert!(content.iter().all(|byte| *byte == 1));
}

/// What the reader is reading, nobody changes.
#[test]
fn writers_wait_for_the_reader() {
    let dir = tempfile::tempdir().unwrap();
    let (gate, disk, backup) = gated(&dir);
    let mut buffer = vec![0; GRANULE as usize];
    thread::scope(|scope| {
        let reader = || backup.read(0, &mut buffer).unwrap();
        during(&gate, reader, || {
            scope.spawn(|| write(&*disk, GRANULE / 2, 512, 2).unwrap());
            // As much as a writer needs that does not wait.
            thread::sleep(Duration::from_millis(50));
        });
    });
    assert!(buffer.iter().all(|byte| *byte == 1));
}
