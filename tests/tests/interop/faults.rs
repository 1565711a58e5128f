//! Files that fail: the one request fails, later ones work, and the image stays whole.

use std::fs::File;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tandem_block::qcow2::{CheckOptions, FindingKind, OpenOptions, Qcow2, check};
use tandem_block::{Disk, Error, FileStorage, Result, Storage};
use vm_memory::VolatileSlice;

use crate::qemu::{Image, Kind, at_once, read_all, write};

/// Calls that a file may still carry out before one fails.
#[derive(Debug, Default)]
struct Fuse {
    writes: AtomicU64,
    syncs: AtomicU64,
}

const NEVER: u64 = u64::MAX;

impl Fuse {
    fn new() -> Arc<Self> {
        let fuse = Self::default();
        fuse.writes.store(NEVER, Ordering::Relaxed);
        fuse.syncs.store(NEVER, Ordering::Relaxed);
        Arc::new(fuse)
    }

    /// Fails once, when `left` calls have been made.
    fn burn(left: &AtomicU64, errno: i32) -> io::Result<()> {
        let before = left.fetch_sub(
            u64::from(left.load(Ordering::Relaxed) != NEVER),
            Ordering::Relaxed,
        );
        if before == 0 {
            left.store(NEVER, Ordering::Relaxed);
            return Err(io::Error::from_raw_os_error(errno));
        }
        Ok(())
    }
}

#[derive(Debug)]
struct Faulty {
    file: FileStorage,
    fuse: Arc<Fuse>,
}

impl Storage for Faulty {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.file.read_at(bufs, offset)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        Fuse::burn(&self.fuse.writes, libc::ENOSPC)?;
        self.file.write_at(bufs, offset)
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_bytes_at(buf, offset)
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        Fuse::burn(&self.fuse.writes, libc::ENOSPC)?;
        self.file.write_bytes_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        Fuse::burn(&self.fuse.writes, libc::ENOSPC)?;
        self.file.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        Fuse::burn(&self.fuse.writes, libc::ENOSPC)?;
        self.file.discard(offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }

    fn sync(&self) -> io::Result<()> {
        Fuse::burn(&self.fuse.syncs, libc::EIO)?;
        self.file.sync()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        Fuse::burn(&self.fuse.writes, libc::ENOSPC)?;
        self.file.set_len(len)
    }
}

/// `image`, whose image file and data file burn `fuse`.
fn open(image: &Image, fuse: &Arc<Fuse>) -> Qcow2 {
    let storage = |path: &std::path::Path| -> Box<dyn Storage> {
        let file = File::options().read(true).write(true).open(path).unwrap();
        Box::new(Faulty {
            file: FileStorage::new(file).unwrap(),
            fuse: fuse.clone(),
        })
    };
    let data = image
        .data_file()
        .exists()
        .then(|| storage(&image.data_file()));
    Qcow2::with_storage(
        &image.path(),
        storage(&image.path()),
        data,
        &OpenOptions::default(),
    )
    .unwrap()
}

const KINDS: [Kind; 2] = [Kind::Internal, Kind::External];

/// Each write to a file fails in turn, be it of data, of metadata, or while a table grows. What
/// failed is told, what was told to be written is there, and nothing else has changed.
#[test]
fn every_write_may_fail() {
    at_once(KINDS, |kind| {
        // Each of the first ones, and ever fewer of the later ones, until there are no more.
        let mut failing = 0;
        loop {
            let image = Image::create(kind, 512, 12 << 20);
            let fuse = Fuse::new();
            let disk = open(&image, &fuse);
            let mut model = vec![0; 12 << 20];
            fuse.writes.store(failing, Ordering::Relaxed);
            // Steps of 1.5 MiB: a new refcount block each time, and a longer table at last.
            for (i, at) in (0..7u64).map(|i| (i, i * 1_572_864)) {
                let byte = i as u8 + 1;
                let mut bytes = vec![byte; 150_000];
                let range = at as usize..at as usize + bytes.len();
                let result = disk.write_at(&[VolatileSlice::from(&mut bytes[..])], at);
                match result.and_then(|()| disk.flush()) {
                    Ok(()) => model[range].fill(byte),
                    Err(Error::Io { .. }) => {
                        write(&disk, at, bytes.len(), byte);
                        disk.flush().unwrap();
                        model[range].fill(byte);
                    }
                    Err(e) => panic!("{kind:?}, write {failing}: {e}"),
                }
                // Half of it goes again; a discard that failed may be tried again.
                let discard = || disk.discard(at, 75_264);
                discard().or_else(|_| discard()).unwrap();
                model[at as usize..][..75_264].fill(0);
            }
            disk.flush().or_else(|_| disk.flush()).unwrap();
            assert!(
                read_all(&disk) == model,
                "{kind:?}, write {failing}: content"
            );
            drop(disk);
            image.check_leaks_at_most();
            assert!(
                image.read_by_qemu() == model,
                "{kind:?}, write {failing}: read by QEMU"
            );
            if fuse.writes.load(Ordering::Relaxed) != NEVER {
                // There were not that many writes.
                assert!(failing > 40);
                break;
            }
            failing += 1 + failing / 20;
        }
    });
}

/// After a sync has failed nobody can say what is on disk, so no later flush succeeds, and nothing
/// is mapped any more: what was durable before stays.
#[test]
fn a_failed_sync_is_final() {
    for kind in KINDS {
        for failing in 0..4 {
            let image = Image::create(kind, 65536, 4 << 20);
            let fuse = Fuse::new();
            let disk = open(&image, &fuse);
            let mut model = vec![0; 4 << 20];
            write(&disk, 0, 100_000, 1);
            model[..100_000].fill(1);
            disk.flush().unwrap();
            fuse.syncs.store(failing, Ordering::Relaxed);
            let mut failed = false;
            for i in 0..4 {
                write(&disk, 1_000_000 + i * 200_000, 512, 2);
                let result = disk.flush();
                assert!(
                    !failed || result.is_err(),
                    "{kind:?}, sync {failing}: succeeded later"
                );
                failed |= result.is_err();
            }
            assert!(failed, "{kind:?}: sync {failing} was not reached");
            drop(disk);
            image.check_leaks_at_most();
            assert!(image.read_by_qemu()[..100_000] == model[..100_000]);
        }
    }
}

/// Size of a disk with snapshots.
const SNAPSHOT_SIZE: u64 = 256 << 10;

/// What an image holds: the disk, and each snapshot by its name.
type Content = (Vec<u8>, Vec<(Vec<u8>, Vec<u8>)>);

/// An image with two snapshots, in each of which the disk has data of its own.
fn image_with_snapshots(kind: Kind) -> Image {
    let image = Image::create(kind, 4096, SNAPSHOT_SIZE);
    for (byte, name) in [(1, Some(b"s1")), (2, Some(b"s2")), (3, None)] {
        let disk = image.open().unwrap();
        write(&disk, u64::from(byte) * 20_480, 61_440, byte);
        let cluster = disk.compress(vec![byte; 4096]).unwrap();
        disk.write_compressed(cluster, u64::from(byte) * 4096)
            .unwrap();
        if let Some(name) = name {
            disk.create_snapshot(name).unwrap();
        }
    }
    image
}

/// What `image` holds, which is repaired if it is dirty.
fn content(image: &Image) -> Content {
    let disk = image.open().unwrap();
    let (now, listed) = (read_all(&disk), disk.snapshots().unwrap());
    drop(disk);
    let bytes = std::fs::read(image.path()).unwrap();
    let snapshots = listed.into_iter().map(|snapshot| {
        image.open().unwrap().apply_snapshot(&snapshot.id).unwrap();
        let then = read_all(&image.open().unwrap());
        std::fs::write(image.path(), &bytes).unwrap();
        (snapshot.name, then)
    });
    (now, snapshots.collect())
}

/// Asserts that a check finds nothing but leaks and, where those are `allowed`, wrong COPIED flags.
fn expect_leaks(image: &Image, allows_flags: bool, what: &str) {
    let mut found = |finding: tandem_block::qcow2::Finding| {
        let is_flag = allows_flags && finding.text.contains("OFLAG_COPIED");
        let is_leak = finding.kind == FindingKind::Leak;
        assert!(is_leak || is_flag, "{what}: {}", finding.text);
    };
    check(&image.path(), &CheckOptions::default(), &mut found).unwrap();
    if !allows_flags {
        image.check_leaks_at_most();
    }
}

/// Each write and each sync of a snapshot operation fails in turn: the image has the old state or the
/// new one.
#[test]
fn snapshot_operations_may_fail_at_every_call() {
    type Operation = fn(Qcow2) -> Result<()>;
    let operations: [Operation; 3] = [
        |disk| disk.create_snapshot(b"new"),
        |disk| disk.apply_snapshot(b"s1"),
        |disk| disk.delete_snapshot(b"s1"),
    ];
    for kind in [Kind::Internal, Kind::InternalV2] {
        let image = image_with_snapshots(kind);
        let start = std::fs::read(image.path()).unwrap();
        let before = content(&image);
        for (number, operation) in operations.into_iter().enumerate() {
            std::fs::write(image.path(), &start).unwrap();
            operation(image.open().unwrap()).unwrap();
            let after = content(&image);
            for fails_sync in [false, true] {
                for failing in 0.. {
                    std::fs::write(image.path(), &start).unwrap();
                    let fuse = Fuse::new();
                    let disk = open(&image, &fuse);
                    let calls = if fails_sync {
                        &fuse.syncs
                    } else {
                        &fuse.writes
                    };
                    calls.store(failing, Ordering::Relaxed);
                    let done = operation(disk);
                    if calls.load(Ordering::Relaxed) != NEVER {
                        done.unwrap();
                        assert!(failing > 5);
                        break;
                    }
                    let what = format!("{kind:?}, {number}, sync {fails_sync}, call {failing}");
                    // After a failed sync nothing is mended, and version 2 has no dirty bit.
                    let is_final = fails_sync && kind == Kind::InternalV2;
                    if kind == Kind::InternalV2 {
                        expect_leaks(&image, is_final, &what);
                    }
                    let now = content(&image);
                    assert!(now == before || now == after, "{what}: {done:?}");
                    assert!(done.is_err() || now == after, "{what}");
                    expect_leaks(&image, is_final, &what);
                }
            }
        }
    }
}
