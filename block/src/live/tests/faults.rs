//! Operations of which one call to a file fails, each in turn: the disk goes on, and no image is damaged.

use std::io;
use std::ops::ControlFlow;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::live::commit::{Commit, pivot};
use crate::live::*;
use crate::qcow2::{
    BackingName, BitmapAction, CheckOptions, CreateOptions, OpenOptions, check, create, stamp_base,
};
use crate::{CacheMode, FileOptions, FileStamp, FileStorage, ImageFormat, Storage};

const SIZE: u64 = 128 << 10;

/// How many calls may still be made before one fails; none fails if that is 0. And whether those behind
/// it fail, too.
#[derive(Debug, Default)]
struct Fuse(AtomicU64, AtomicBool);

impl Fuse {
    fn burn(&self) -> io::Result<()> {
        let left = self.0.load(Ordering::Relaxed);
        if left > 1 || left == 1 && !self.1.load(Ordering::Relaxed) {
            self.0.store(left - 1, Ordering::Relaxed);
        }
        match left {
            1 => Err(io::Error::from_raw_os_error(libc::ENOSPC)),
            _ => Ok(()),
        }
    }
}

/// A file that fails once.
#[derive(Debug)]
struct Faulty(FileStorage, Arc<Fuse>);

impl Faulty {
    fn open(path: &Path, fuse: &Arc<Fuse>) -> Box<dyn Storage> {
        Box::new(Self(FileStorage::open(path, false).unwrap(), fuse.clone()))
    }
}

impl Storage for Faulty {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.1.burn()?;
        self.0.read_at(bufs, offset)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.1.burn()?;
        self.0.write_at(bufs, offset)
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.1.burn()?;
        self.0.read_bytes_at(buf, offset)
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.1.burn()?;
        self.0.write_bytes_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.1.burn()?;
        self.0.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.1.burn()?;
        self.0.discard(offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.0.next_data(offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.1.burn()
    }

    fn size(&self) -> io::Result<u64> {
        self.0.size()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.1.burn()?;
        self.0.set_len(len)
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.0.fd()
    }

    fn stamp(&self) -> io::Result<Option<FileStamp>> {
        self.0.stamp()
    }
}

fn open_options() -> OpenOptions {
    OpenOptions {
        files: FileOptions {
            cache: CacheMode::Unsafe,
            ..FileOptions::default()
        },
        ..OpenOptions::default()
    }
}

fn put(disk: &dyn Disk, model: &mut [u8], sector: u64, byte: u8) {
    let mut data = [byte; 512];
    disk.write_at(&[VolatileSlice::from(&mut data[..])], sector * 512)
        .unwrap();
    model[sector as usize * 512..][..512].fill(byte);
}

fn shows(disk: &dyn Disk, model: &[u8], when: &str) {
    let mut data = vec![0xee; model.len()];
    disk.read_at(&[VolatileSlice::from(&mut data[..])], 0)
        .unwrap();
    assert!(data == model, "{when}");
}

/// A base, an overlay of it, and what that reads.
struct Pair {
    dir: tempfile::TempDir,
    model: Vec<u8>,
}

impl Pair {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut pair = Self {
            dir,
            model: vec![0; SIZE as usize],
        };
        let base = CreateOptions {
            size: SIZE,
            cluster_size: 4096,
            ..CreateOptions::default()
        };
        create(&pair.path("base"), &base).unwrap();
        let top = CreateOptions {
            backing_file: Some(PathBuf::from("base")),
            backing_format: Some(ImageFormat::Qcow2),
            ..base
        };
        create(&pair.path("top"), &top).unwrap();
        for (name, byte) in [("base", 1), ("top", 5)] {
            let disk = Qcow2::open(&pair.path(name), &open_options()).unwrap();
            for i in 0..5 {
                let sector = u64::from(i) * 37 + u64::from(byte) * 5;
                put(&disk, &mut pair.model, sector, byte + i);
            }
            disk.close().unwrap();
        }
        pair
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The disk, and its base, which is open for writing.
    fn on_faulty_base(&self, fuse: &Arc<Fuse>) -> (LiveDisk, LiveImage) {
        let (base, top) = (self.path("base"), self.path("top"));
        let storage = Faulty::open(&base, fuse);
        let base = Qcow2::with_storage(&base, storage, None, &open_options()).unwrap();
        let base = LiveImage::from(base);
        let storage = Box::new(FileStorage::open(&top, false).unwrap());
        let below = Some(base.shared());
        let top = Qcow2::with_backing(&top, storage, None, below, &open_options()).unwrap();
        (LiveDisk::new(top), base)
    }

    fn check(&self, name: &str) {
        let report = check(&self.path(name), &CheckOptions::default(), &mut |_| ()).unwrap();
        assert_eq!((report.corruptions, report.check_errors), (0, 0), "{name}");
    }
}

/// Has each call to the files of the image on top fail in turn during `operation`, until there are no
/// more of them.
fn every_call_fails(
    mode: CacheMode,
    operation: impl Fn(&LiveDisk, &Pair, &Arc<Fuse>) -> Result<LiveReport>,
) -> u64 {
    for n in 1.. {
        let mut pair = Pair::new();
        let fuse = Arc::new(Fuse::default());
        let mut options = open_options();
        options.files.cache = mode;
        let (path, storage) = (pair.path("top"), Faulty::open(&pair.path("top"), &fuse));
        let top = Qcow2::open_storage(&path, storage, None, &options).unwrap();
        let disk = LiveDisk::new(top);
        put(&disk, &mut pair.model, 33, 77);
        fuse.0.store(n, Ordering::Relaxed);
        let done = operation(&disk, &pair, &fuse);
        let is_over = fuse.0.swap(0, Ordering::Relaxed) > 0;
        shows(&disk, &pair.model, &format!("after call {n}"));
        assert!(done.is_ok() || !is_over, "{done:?}");
        let names = std::fs::read_dir(pair.dir.path()).unwrap().count();
        if done.is_err() {
            assert_eq!(names, 2, "no new files");
        }
        // It goes on, and can be operated on again.
        let flushed = disk.flush();
        if flushed.is_ok() {
            put(&disk, &mut pair.model, 200, 78);
            disk.flush().unwrap();
            if done.is_err() {
                operation(&disk, &pair, &fuse).unwrap();
            }
            shows(&disk, &pair.model, &format!("later, after call {n}"));
            disk.flush().unwrap();
        }
        let path = disk.with_image(|image| image.path().to_owned());
        let closed = disk.close();
        drop(disk);
        pair.check("base");
        pair.check("top");
        if flushed.is_ok() {
            closed.unwrap();
            let disk = Qcow2::open(&path, &open_options()).unwrap();
            shows(&disk, &pair.model, &format!("at last, after call {n}"));
        }
        if is_over {
            return n;
        }
    }
    0
}

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

#[test]
fn a_commit_that_fails() {
    for pivot in [false, true] {
        let options = CommitOptions {
            open: open_options(),
            between: 0,
            pivot,
            max_last: None,
        };
        let calls = every_call_fails(CacheMode::Writeback, |disk, _, _| {
            disk.commit(&options, &mut go_on)
        });
        assert!(calls > 10);
    }
}

/// As the others, and it is the base that fails, which may be committed to again then.
#[test]
fn a_commit_whose_base_fails() {
    for (lasts, again) in [(false, false), (true, false), (true, true)] {
        for n in 1.. {
            if commit_to_base_failing(n, lasts, again) {
                assert!(n > 3);
                break;
            }
        }
    }
}

/// Has call `n` to the base fail, and those behind it if that `lasts`. Whether there are fewer.
fn commit_to_base_failing(n: u64, lasts: bool, again: bool) -> bool {
    let options = CommitOptions {
        open: open_options(),
        between: 0,
        pivot: false,
        max_last: None,
    };
    let mut pair = Pair::new();
    stamp_base(&pair.path("top"), &open_options()).unwrap();
    let fuse = Arc::new(Fuse::default());
    let (disk, base) = pair.on_faulty_base(&fuse);
    put(&disk, &mut pair.model, 33, 77);
    let watched = disk.begin_watched("commit").unwrap();
    let mut commit = Commit::new(&disk, &options, &watched.changes, base);
    commit.stamped = disk.end_stamp().unwrap();
    fuse.1.store(lasts, Ordering::Relaxed);
    fuse.0.store(n, Ordering::Relaxed);
    let done = commit.run(&mut go_on);
    let done = commit.end(done);
    drop(watched);
    let left = fuse.0.swap(0, Ordering::Relaxed);
    assert!(done.is_ok() || left <= u64::from(lasts), "{done:?}");
    shows(&disk, &pair.model, &format!("after call {n}"));
    put(&disk, &mut pair.model, 200, 78);
    if again {
        disk.commit(&options, &mut go_on).unwrap();
        shows(&disk, &pair.model, &format!("again, after call {n}"));
    }
    disk.close().unwrap();
    drop(disk);
    pair.check("base");
    let disk = Qcow2::open(&pair.path("top"), &open_options()).unwrap();
    shows(&disk, &pair.model, &format!("at last, after call {n}"));
    left > 0 && done.is_ok()
}

/// While the image that was on top is being closed, others change the bitmaps of the disk, say.
#[test]
fn nobody_keeps_a_base_that_has_become_the_disk() {
    let mut pair = Pair::new();
    let (disk, mut base) = pair.on_faulty_base(&Arc::default());
    put(&disk, &mut pair.model, 33, 77);
    let name = b"bitmap".to_vec();
    let add = BitmapAction::Add {
        name: name.clone(),
        granularity: None,
        enabled: true,
    };
    disk.change_bitmaps(&[add]).unwrap();
    disk.exclusive(|state| pivot(state, &mut base)).unwrap();
    assert_eq!(
        disk.with_image(|image| image.path().to_owned()),
        pair.path("base")
    );
    disk.change_bitmaps(&[BitmapAction::Remove { name }])
        .unwrap();
    base.disk().close().unwrap();
}

#[test]
fn a_rebase_that_fails() {
    let options = RebaseOptions {
        open: open_options(),
        backing: None,
        max_last: None,
    };
    let calls = every_call_fails(CacheMode::Writeback, |disk, _, _| {
        disk.rebase(&options, &mut go_on)
    });
    assert!(calls > 10);
}

#[test]
fn a_fork_that_fails() {
    let calls = every_call_fails(CacheMode::Writeback, |disk, pair, _| {
        disk.fork(&ForkOptions {
            open: open_options(),
            overlay: pair.path("overlay"),
            fork: pair.path("fork"),
        })
    });
    assert!(calls > 4);
}

/// What the guest writes at any stage is there at the end.
#[test]
fn a_guest_that_writes_meanwhile() {
    for operation in ["commit", "pivot", "rebase"] {
        let mut pair = Pair::new();
        let disk = LiveDisk::new(Qcow2::open(&pair.path("top"), &open_options()).unwrap());
        let mut written = 0_u8;
        let mut write = |_: u64, _: u64| {
            written += 1;
            // In a part that is mapped by now, and has been dealt with.
            put(&disk, &mut pair.model, 33 + u64::from(written % 2), written);
            ControlFlow::Continue(())
        };
        let done = match operation {
            "rebase" => disk.rebase(
                &RebaseOptions {
                    open: open_options(),
                    backing: None,
                    max_last: None,
                },
                &mut write,
            ),
            _ => disk.commit(
                &CommitOptions {
                    open: open_options(),
                    between: 0,
                    pivot: operation == "pivot",
                    max_last: None,
                },
                &mut write,
            ),
        };
        done.unwrap();
        shows(&disk, &pair.model, operation);
        let path = disk.with_image(|image| image.path().to_owned());
        disk.close().unwrap();
        drop(disk);
        for name in [path, pair.path("top")] {
            let disk = Qcow2::open(&name, &open_options()).unwrap();
            shows(&disk, &pair.model, operation);
        }
        pair.check("top");
    }
}

/// What the guest discards reads as zero without a backing file, and would not on the new one.
#[test]
fn a_guest_that_discards_during_a_rebase() {
    let mut pair = Pair::new();
    let alone = CreateOptions {
        size: SIZE,
        cluster_size: 4096,
        // It has no marks for zeros: what is discarded loses its mapping.
        version: 2,
        ..CreateOptions::default()
    };
    create(&pair.path("top"), &alone).unwrap();
    pair.model.fill(0);
    std::fs::write(pair.path("other"), [9; SIZE as usize]).unwrap();
    let disk = LiveDisk::new(Qcow2::open(&pair.path("top"), &open_options()).unwrap());
    let at = SIZE / 2 + 16384;
    for sector in [at / 512, SIZE / 512 - 8] {
        put(&disk, &mut pair.model, sector, 7);
    }
    let options = RebaseOptions {
        open: open_options(),
        backing: Some(BackingName {
            file: b"other".to_vec(),
            format: b"raw".to_vec(),
        }),
        max_last: None,
    };
    let mut discarded = false;
    let done = disk.rebase(&options, &mut |done, _| {
        // It has been there already.
        if done > at && !std::mem::replace(&mut discarded, true) {
            disk.discard(at, 4096).unwrap();
        }
        ControlFlow::Continue(())
    });
    done.unwrap();
    assert!(discarded);
    pair.model[at as usize..][..4096].fill(0);
    shows(&disk, &pair.model, "on the new one");
    disk.close().unwrap();
    drop(disk);
    let disk = Qcow2::open(&pair.path("top"), &open_options()).unwrap();
    shows(&disk, &pair.model, "at last");
    drop(disk);
    pair.check("top");
}

/// What is below the disk is not what it was: nobody knows what it reads.
#[test]
fn a_disk_that_is_given_up() {
    let pair = Pair::new();
    let disk = LiveDisk::new(Qcow2::open(&pair.path("top"), &open_options()).unwrap());
    disk.exclusive(|state| state.give_up("somebody writes to its base".to_owned()));
    assert_eq!(disk.size(), SIZE);
    let mut data = [1; 512];
    let bufs = [VolatileSlice::from(&mut data[..])];
    for failed in [
        disk.read_at(&bufs, 0),
        disk.write_at(&bufs, 0),
        disk.write_zeroes(0, 512, true),
        disk.discard(0, 512),
        disk.flush(),
        disk.change_bitmaps(&[]),
        disk.bitmaps().map(drop),
        disk.rebase(
            &RebaseOptions {
                open: open_options(),
                backing: Some(BackingName {
                    file: b"base".to_vec(),
                    format: b"qcow2".to_vec(),
                }),
                max_last: None,
            },
            &mut go_on,
        )
        .map(drop),
    ] {
        let text = failed.unwrap_err().to_string();
        assert!(
            text.contains("top' cannot be used any more: somebody"),
            "{text}"
        );
    }
}

/// Whoever writes to the base while it is being handed over keeps it, and the disk goes on if it can.
#[test]
fn a_commit_to_a_base_that_others_use() {
    let mut pair = Pair::new();
    let disk = LiveDisk::new(Qcow2::open(&pair.path("top"), &open_options()).unwrap());
    let read_only = OpenOptions {
        read_only: true,
        ..open_options()
    };
    let other = Qcow2::open(&pair.path("base"), &read_only).unwrap();
    let options = CommitOptions {
        open: open_options(),
        between: 0,
        pivot: true,
        max_last: None,
    };
    let refused = disk.commit(&options, &mut go_on).unwrap_err();
    assert!(matches!(refused, Error::Locked { .. }), "{refused}");
    drop(other);
    // The locks are there again.
    let locked = Qcow2::open(&pair.path("base"), &open_options()).map(drop);
    assert!(matches!(locked, Err(Error::Locked { .. })));
    put(&disk, &mut pair.model, 9, 99);
    shows(&disk, &pair.model, "refused");
    let aside = pair.path("aside");
    std::fs::rename(pair.path("base"), &aside).unwrap();
    std::fs::copy(&aside, pair.path("base")).unwrap();
    let refused = disk.commit(&options, &mut go_on).unwrap_err().to_string();
    assert!(refused.contains("replaced by another file"), "{refused}");
    std::fs::rename(&aside, pair.path("base")).unwrap();
    let mut calls = 0;
    let cancelled = disk.commit(&options, &mut |_, _| {
        calls += 1;
        match calls {
            3 => ControlFlow::Break(()),
            _ => ControlFlow::Continue(()),
        }
    });
    assert!(matches!(cancelled, Err(Error::Cancelled)));
    shows(&disk, &pair.model, "cancelled");
    let too_much = CommitOptions {
        max_last: Some(0),
        ..options.clone()
    };
    let mut wrote = false;
    let faster = disk.commit(&too_much, &mut |_, _| {
        if !std::mem::replace(&mut wrote, true) {
            put(&disk, &mut pair.model, 9, 98);
        }
        ControlFlow::Continue(())
    });
    let faster = faster.unwrap_err().to_string();
    assert!(faster.contains("writes faster than"), "{faster}");
    disk.commit(&options, &mut go_on).unwrap();
    shows(&disk, &pair.model, "done");
    disk.close().unwrap();
    drop(disk);
    pair.check("base");
}
