//! Operations on the images of a disk, while threads use it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

mod forks;
mod rebases;

use std::fs::File;
use std::ops::ControlFlow;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;

use tandem_block::qcow2::{
    Backing, BackingName, BitmapAction, CheckOptions, CreateOptions, OpenOptions, Qcow2, check,
    create,
};
use tandem_block::{
    BackupOptions, CacheMode, CommitOptions, Disk, Error, ExtentKind, FileOptions, ForkOptions,
    ImageFormat, LiveDisk, LiveReport, Locking, Raw, RebaseOptions, Result, VolatileSlice,
};
use tempfile::TempDir;

const SIZE: u64 = 4 << 20;
const WORKERS: u64 = 3;

/// Numbers that look random, from a seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % end
    }
}

/// Nothing here is about what survives a failure of power, and syncs take time.
fn unsynced() -> OpenOptions {
    OpenOptions {
        files: FileOptions {
            cache: CacheMode::Unsafe,
            ..FileOptions::default()
        },
        ..OpenOptions::default()
    }
}

fn read(disk: &dyn Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut data = vec![0xee; len as usize];
    disk.read_at(&[VolatileSlice::from(&mut data[..])], offset)
        .unwrap();
    data
}

fn write(disk: &dyn Disk, offset: u64, data: &[u8]) {
    let mut data = data.to_vec();
    disk.write_at(&[VolatileSlice::from(&mut data[..])], offset)
        .unwrap();
}

/// Does one thing at random to the part `start..start + model.len()` of a disk, which `model` is.
fn change(disk: &dyn Disk, start: u64, model: &mut [u8], numbers: &mut Numbers) {
    let sectors = model.len() as u64 / 512;
    let at = numbers.below(sectors);
    let max = if numbers.below(4) == 0 { 400 } else { 16 };
    let len = (1 + numbers.below(max)).min(sectors - at) * 512;
    let (offset, at) = (start + at * 512, at as usize * 512);
    let part = &mut model[at..at + len as usize];
    match numbers.below(8) {
        0 => {
            disk.write_zeroes(offset, len, numbers.below(2) == 0)
                .unwrap();
            part.fill(0);
        }
        1 => {
            disk.discard(offset, len).unwrap();
            let now = read(disk, offset, len);
            let is_fine = |(now, old): (&u8, &u8)| now == old || *now == 0;
            assert!(now.iter().zip(&*part).all(is_fine));
            part.copy_from_slice(&now);
        }
        2 => assert!(read(disk, offset, len) == part),
        _ => {
            part.fill(numbers.below(256) as u8);
            write(disk, offset, part);
        }
    }
}

fn fill(disk: &dyn Disk, model: &mut [u8], seed: u64) {
    let mut numbers = Numbers(seed);
    for _ in 0..20 {
        change(disk, 0, model, &mut numbers);
    }
}

/// Has threads stop, also when a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Images below one another, closed, and what the one on top reads.
struct Chain {
    dir: TempDir,
    names: Vec<&'static str>,
    model: Vec<u8>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Raw,
    Internal,
    Subclusters,
    Version2,
    External,
    RawData,
    Packed,
}

impl Chain {
    /// From the lowest up, each of the kind and the size that is told.
    fn new(images: &[(Kind, u64)], seed: u64) -> Self {
        // In memory, if there is such a file system: what is tried here syncs a lot.
        let memory = tempfile::tempdir_in("/dev/shm");
        let dir = memory.or_else(|_| tempfile::tempdir()).unwrap();
        let mut chain = Self {
            dir,
            names: Vec::new(),
            model: Vec::new(),
        };
        let mut format = None;
        for (i, (kind, size)) in images.iter().enumerate() {
            let name = match i {
                0 => "base",
                _ if i + 1 == images.len() => "top",
                _ => "middle",
            };
            let path = chain.path(name);
            if *kind == Kind::Raw {
                File::create(&path).unwrap().set_len(*size).unwrap();
            } else {
                let options = CreateOptions {
                    size: *size,
                    cluster_size: if *kind == Kind::Subclusters {
                        16384
                    } else {
                        4096
                    },
                    extended_l2: *kind == Kind::Subclusters,
                    version: if *kind == Kind::Version2 { 2 } else { 3 },
                    backing_file: chain.names.last().map(PathBuf::from),
                    backing_format: format,
                    data_file: matches!(kind, Kind::External | Kind::RawData | Kind::Packed)
                        .then(|| chain.path(&format!("{name}.data"))),
                    data_file_raw: *kind == Kind::RawData,
                    data_file_layout: match kind {
                        Kind::Packed => tandem_block::qcow2::DataFileLayout::Packed,
                        _ => tandem_block::qcow2::DataFileLayout::Standard,
                    },
                    ..CreateOptions::default()
                };
                create(&path, &options).unwrap();
                if *kind == Kind::RawData {
                    // What lies behind the end of the disk is not its own.
                    let data = File::options().write(true).open(options.data_file.unwrap());
                    let rest = vec![0xaa; (SIZE - size) as usize];
                    data.unwrap().write_all_at(&rest, *size).unwrap();
                }
            }
            format = Some(match kind {
                Kind::Raw => ImageFormat::Raw,
                _ => ImageFormat::Qcow2,
            });
            chain.names.push(name);
            chain.model.resize(*size as usize, 0);
            let disk = chain.open();
            fill(&*disk, &mut chain.model, seed + i as u64 * 77 + 1);
            disk.close().unwrap();
        }
        chain
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn open(&self) -> Box<dyn Disk> {
        open(&self.path(self.names.last().unwrap()))
    }

    fn live(&self) -> LiveDisk {
        let top = self.path(self.names.last().unwrap());
        match is_qcow2(&top) {
            true => LiveDisk::new(Qcow2::open(&top, &unsynced()).unwrap()),
            false => LiveDisk::new(Raw::open_with(&top, false, unsynced().files).unwrap()),
        }
    }

    /// Runs `operation` while threads use `disk`, which ends up as the model says.
    fn during<T>(&mut self, disk: &LiveDisk, seed: u64, operation: impl FnOnce() -> T) -> T {
        let stop = AtomicBool::new(false);
        let begun = AtomicU64::new(0);
        let len = (self.model.len() / WORKERS as usize).next_multiple_of(512);
        let result = thread::scope(|scope| {
            for (i, part) in (0..).zip(self.model.chunks_mut(len)) {
                let (stop, begun) = (&stop, &begun);
                scope.spawn(move || {
                    let mut numbers = Numbers(seed * 31 + i + 1);
                    while !stop.load(Ordering::Relaxed) {
                        change(disk, i * len as u64, part, &mut numbers);
                        if numbers.below(20) == 0 {
                            disk.flush().unwrap();
                        }
                        begun.fetch_add(1, Ordering::Relaxed);
                    }
                });
            }
            let stop = Stop(&stop);
            while begun.load(Ordering::Relaxed) < 2 * WORKERS {
                thread::yield_now();
            }
            let result = operation();
            let now = begun.load(Ordering::Relaxed);
            while begun.load(Ordering::Relaxed) < now + 50 {
                thread::yield_now();
            }
            drop(stop);
            result
        });
        assert!(read(disk, 0, disk.size()) == self.model);
        result
    }

    /// No image is damaged or has leaks, and `name` reads as the model says.
    fn verify(&self, name: &str) {
        for image in std::fs::read_dir(self.dir.path()).unwrap() {
            let path = image.unwrap().path();
            if is_qcow2(&path) {
                verify(&path);
            }
        }
        let disk = open(&self.path(name));
        assert!(read(&*disk, 0, disk.size()) == self.model, "{name}");
    }
}

fn is_qcow2(path: &Path) -> bool {
    std::fs::read(path).unwrap().starts_with(b"QFI\xfb")
}

fn open(path: &Path) -> Box<dyn Disk> {
    match is_qcow2(path) {
        true => Box::new(Qcow2::open(path, &unsynced()).unwrap()),
        false => Box::new(Raw::open_with(path, false, unsynced().files).unwrap()),
    }
}

fn verify(path: &Path) {
    check(path, &CheckOptions::default(), &mut |finding| {
        panic!("{}: {}", path.display(), finding.text)
    })
    .unwrap();
}

fn commit(disk: &LiveDisk, between: usize, pivot: bool) -> Result<LiveReport> {
    let options = CommitOptions {
        open: unsynced(),
        between,
        pivot,
        max_last: None,
    };
    disk.commit(&options, &mut |done, total| {
        assert!(done <= total);
        ControlFlow::Continue(())
    })
}

fn commit_chains() -> Vec<Vec<(Kind, u64)>> {
    use Kind::*;
    let pair = |base, top| vec![(base, SIZE), (top, SIZE)];
    vec![
        pair(Raw, Internal),
        pair(Internal, Subclusters),
        pair(Packed, External),
        pair(RawData, Packed),
        pair(Version2, Version2),
        vec![(External, SIZE), (Internal, SIZE), (Internal, SIZE)],
        // Smaller and larger ones below.
        vec![(RawData, SIZE / 2 + 512), (Internal, SIZE)],
        vec![(Internal, SIZE), (Internal, SIZE / 2), (External, SIZE)],
        vec![(Internal, 2 * SIZE), (Internal, SIZE / 2), (Internal, SIZE)],
        vec![(Raw, 2 * SIZE), (Version2, SIZE)],
    ]
}

#[test]
fn a_commit_takes_the_disk_to_its_base() {
    for (seed, images) in (1..).zip(commit_chains()) {
        let mut chain = Chain::new(&images, seed);
        let disk = chain.live();
        let depth = images.len() - 2;
        if images[0].1 > SIZE {
            let larger = commit(&disk, depth, true).unwrap_err().to_string();
            assert!(larger.contains("would become larger"), "{larger}");
            disk.close().unwrap();
            drop(disk);
            chain.verify("top");
            continue;
        }
        chain.during(&disk, seed, || commit(&disk, depth, true).unwrap());
        let base = chain.path("base");
        disk.with_image(|image| assert_eq!(image.path(), base));
        disk.close().unwrap();
        drop(disk);
        chain.verify("base");
        // The overlay has nothing of its own any more.
        chain.verify("top");
        let top = Qcow2::open(&chain.path("top"), &unsynced()).unwrap();
        let extent = top.extent(0, SIZE).unwrap();
        assert_eq!((extent.kind, extent.len), (ExtentKind::Unallocated, SIZE));
    }
}

#[test]
fn a_commit_empties_the_disk_on_top() {
    for (seed, images) in (1..).zip(commit_chains()) {
        let mut chain = Chain::new(&images, seed);
        let disk = chain.live();
        let depth = images.len() - 2;
        // Twice: the base is opened for writing again.
        for round in 0..2 {
            chain.during(&disk, seed + round, || commit(&disk, depth, false).unwrap());
        }
        commit(&disk, depth, false).unwrap();
        if depth == 0 {
            let extent = disk.extent(0, disk.size()).unwrap();
            assert_eq!(extent.kind, ExtentKind::Unallocated, "{images:?}");
            assert_eq!(extent.len, disk.size());
        }
        let base = open_read_only(&chain.path("base")).size();
        assert_eq!(base, images[0].1.max(SIZE), "others can read the base");
        disk.close().unwrap();
        drop(disk);
        chain.verify("top");
    }
}

fn open_read_only(path: &Path) -> Box<dyn Disk> {
    let options = OpenOptions {
        read_only: true,
        ..unsynced()
    };
    match is_qcow2(path) {
        true => Box::new(Qcow2::open(path, &options).unwrap()),
        false => Box::new(Raw::open(path, true).unwrap()),
    }
}

#[test]
fn a_closed_disk_is_left_alone() {
    let chain = Chain::new(&[(Kind::Raw, SIZE), (Kind::Internal, SIZE)], 1);
    let disk = Arc::new(chain.live());
    disk.close().unwrap();
    let options = ForkOptions {
        open: unsynced(),
        overlay: chain.path("overlay"),
        fork: chain.path("fork"),
    };
    let rebase = RebaseOptions {
        open: unsynced(),
        backing: None,
        max_last: None,
    };
    let goes_on = &mut |_, _| ControlFlow::Continue(());
    let refused = [
        disk.fork(&options).err(),
        disk.rebase(&rebase, goes_on).err(),
        commit(&disk, 0, true).err(),
        LiveDisk::begin_backup(&disk, &BackupOptions::default()).err(),
    ];
    for refused in refused {
        assert!(matches!(refused, Some(Error::Closed { .. })), "{refused:?}");
    }
    assert!(!options.overlay.exists() && !options.fork.exists());
    drop(disk);
    chain.verify("top");
}

fn chain_path(disk: &LiveDisk, name: &str) -> PathBuf {
    disk.with_image(|image| image.path().with_file_name(name))
}

fn bitmap(name: &str) -> BitmapAction {
    BitmapAction::Add {
        name: name.into(),
        granularity: Some(4096),
        enabled: true,
    }
}

/// Bitmaps that follow a disk go on with it when it is forked, and when it becomes its base.
#[test]
fn bitmaps_follow_the_disk() {
    for kind in [Kind::Internal, Kind::RawData] {
        let mut chain = Chain::new(&[(kind, SIZE)], 3);
        let disk = chain.live();
        disk.change_bitmaps(&[bitmap("a"), bitmap("b")]).unwrap();
        let names = |disk: &LiveDisk| {
            let bitmaps = disk.bitmaps().unwrap().into_iter();
            Vec::from_iter(bitmaps.map(|bitmap| String::from_utf8(bitmap.info.name).unwrap()))
        };
        let before = chain.model.clone();
        chain.during(&disk, 1, || {
            for i in 0..3 {
                let fork = ForkOptions {
                    open: unsynced(),
                    overlay: chain_path(&disk, &format!("overlay{i}")),
                    fork: chain_path(&disk, &format!("fork{i}")),
                };
                disk.fork(&fork).unwrap();
                assert_eq!(names(&disk), ["a", "b"]);
                if i == 0 {
                    let busy = commit(&disk, 1, true).unwrap_err().to_string();
                    assert!(busy.contains("no image below"), "{busy}");
                    commit(&disk, 0, true).unwrap();
                    assert_eq!(names(&disk), ["a", "b"]);
                }
            }
        });
        // No change was missed on the way.
        let dirty = disk.read_bitmap(b"b").unwrap();
        for at in (0..SIZE).step_by(4096) {
            let range = at as usize..at as usize + 4096;
            if before[range.clone()] != chain.model[range] {
                assert!(dirty.is_dirty(at, 4096), "{at}");
            }
        }
        let refused = commit(&disk, 1, true).unwrap_err().to_string();
        assert!(refused.contains("keeps a stamp"), "{refused}");
        disk.close().unwrap();
        drop(disk);
        chain.verify("overlay2");
        let below = tandem_block::qcow2::Info::read(&chain.path("base")).unwrap();
        assert_eq!(below.bitmaps.len(), 0);
    }
}

/// The images above the base are opened again; one that is another by then is not used.
#[test]
fn a_commit_finds_the_images_that_the_disk_has() {
    let mut chain = Chain::new(&[(Kind::Internal, SIZE); 3], 8);
    let disk = chain.live();
    let (middle, aside) = (chain.path("middle"), chain.path("aside"));
    std::fs::rename(&middle, &aside).unwrap();
    std::fs::copy(&aside, &middle).unwrap();
    let refused = commit(&disk, 1, true).unwrap_err().to_string();
    assert!(refused.contains("replaced by another file"), "{refused}");
    std::fs::rename(&aside, &middle).unwrap();
    chain.during(&disk, 1, || commit(&disk, 1, true).unwrap());
    disk.close().unwrap();
    drop(disk);
    chain.verify("base");
}

/// The disk is closed while its images are operated on.
#[test]
fn a_disk_is_closed_during_an_operation() {
    let chain = Chain::new(&[(Kind::Internal, SIZE); 2], 9);
    let disk = chain.live();
    let close = |_, _| {
        disk.close().unwrap();
        ControlFlow::Continue(())
    };
    let rebase = RebaseOptions {
        open: unsynced(),
        backing: None,
        max_last: None,
    };
    let before = std::fs::read(chain.path("top")).unwrap();
    let closed = disk.rebase(&rebase, &mut { close }).unwrap_err();
    assert!(matches!(closed, Error::Closed { .. }), "{closed}");
    for pivot in [false, true] {
        let closed = commit(&disk, 0, pivot).unwrap_err();
        assert!(matches!(closed, Error::Closed { .. }), "{closed}");
    }
    let fork = ForkOptions {
        open: unsynced(),
        overlay: chain.path("overlay"),
        fork: chain.path("fork"),
    };
    let closed = disk.fork(&fork).unwrap_err();
    assert!(matches!(closed, Error::Closed { .. }), "{closed}");
    assert!(!fork.overlay.exists() && !fork.fork.exists());
    assert!(std::fs::read(chain.path("top")).unwrap() == before);
    drop(disk);
    chain.verify("top");
}
