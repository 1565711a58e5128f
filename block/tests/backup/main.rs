//! Backups of a disk that goes on changing.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
#[path = "../common/mod.rs"]
mod common;
mod trouble;

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use common::{Memory, read, write};
use tandem_block::qcow2::{BitmapAction, CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{
    Backup, BackupId, BackupKind, BackupOptions, BackupState, Disk, Error, ImageFormat, LiveDisk,
    LiveImage, Raw,
};

const GRANULE: u64 = 64 << 10;
/// Ends in the middle of a granule.
const SIZE: u64 = 40 * GRANULE + 1536;

/// Numbers that look random.
struct Random(u64);

impl Random {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }

    /// A range within the disk, in sectors.
    fn range(&mut self, max: u64) -> (u64, u64) {
        let len = 512 * (1 + self.below(max / 512));
        (512 * self.below((SIZE - len) / 512 + 1), len)
    }

    /// Changes the disk somehow.
    fn change(&mut self, disk: &dyn Disk) {
        let (offset, len) = self.range(3 * GRANULE);
        match self.below(8) {
            0 => disk.write_zeroes(offset, len, self.below(2) == 0).unwrap(),
            1 => disk.discard(offset, len).unwrap(),
            _ => write(disk, offset, len, self.below(256) as u8).unwrap(),
        }
    }
}

/// Kinds of images, each with some content, in `dir`.
fn images(dir: &Path) -> Vec<LiveImage> {
    let options = |name: &str| CreateOptions {
        size: SIZE,
        data_file: (!name.is_empty()).then(|| dir.join(name)),
        ..CreateOptions::default()
    };
    let kinds = [
        options(""),
        options("external"),
        CreateOptions {
            data_file_raw: true,
            ..options("raw-data")
        },
        CreateOptions {
            extended_l2: true,
            ..options("")
        },
        CreateOptions {
            cluster_size: 4096,
            ..options("")
        },
    ];
    let mut random = Random(7);
    let mut fill = |image: LiveImage| {
        (0..12).for_each(|_| random.change(image.disk()));
        image
    };
    let raw = dir.join("raw");
    Raw::create(&raw, SIZE, tandem_block::Preallocation::Off).unwrap();
    let mut images = vec![fill(Raw::open(&raw, false).unwrap().into())];
    for (i, options) in kinds.into_iter().enumerate() {
        let path = dir.join(format!("{i}.qcow2"));
        create(&path, &options).unwrap();
        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        images.push(fill(disk.into()));
    }
    // What lies on top of another.
    let base = dir.join("base");
    fs::write(&base, vec![0x5a; (SIZE - 5 * GRANULE) as usize]).unwrap();
    let overlay = CreateOptions {
        backing_file: Some(base),
        backing_format: Some(ImageFormat::Raw),
        ..options("")
    };
    let path = dir.join("overlay");
    create(&path, &overlay).unwrap();
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    images.push(fill(disk.into()));
    images
}

fn live(image: impl Into<LiveImage>) -> Arc<LiveDisk> {
    Arc::new(LiveDisk::new(image))
}

/// A qcow2 disk with a bitmap `b` that has nothing yet.
fn with_bitmap(dir: &Path) -> Arc<LiveDisk> {
    let path = dir.join("with-bitmap");
    let options = CreateOptions {
        size: SIZE,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let mut disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    let add = BitmapAction::Add {
        name: b"b".to_vec(),
        granularity: Some(4096),
        enabled: true,
    };
    disk.change_bitmaps(&[add]).unwrap();
    live(disk)
}

fn options(kind: BackupKind) -> BackupOptions {
    BackupOptions {
        kind,
        ..BackupOptions::default()
    }
}

fn full() -> BackupOptions {
    options(BackupKind::Full { track: None })
}

fn since(keep: bool) -> BackupOptions {
    let bitmap = b"b".to_vec();
    options(BackupKind::Since { bitmap, keep })
}

fn begin(disk: &Arc<LiveDisk>, options: &BackupOptions) -> Backup {
    LiveDisk::begin_backup(disk, options).unwrap()
}

/// Bytes that the bitmap `b` has as dirty; `None` without one.
fn dirty(disk: &LiveDisk) -> Option<u64> {
    let bitmaps = disk.bitmaps().unwrap();
    let found = bitmaps.into_iter().find(|bitmap| bitmap.info.name == b"b");
    found.and_then(|bitmap| bitmap.dirty)
}

fn all(disk: &dyn Disk) -> Vec<u8> {
    read(disk, 0, disk.size())
}

/// Reads `backup` in pieces of any size over `content`, and now and then again from some earlier offset.
/// Returns what it has, as offsets and lengths.
fn restore(backup: &Backup, random: &mut Random, content: &mut Vec<u8>) -> Vec<(u64, u64)> {
    content.resize(backup.size() as usize, 0xee);
    let (mut at, mut released) = (0, 0);
    let mut had = Vec::new();
    while at < backup.size() {
        let mut buffer = vec![0; 1 + random.below(5 * GRANULE) as usize];
        let chunk = backup.read(at, &mut buffer).unwrap();
        let mut data = &buffer[..chunk.bytes];
        for extent in &chunk.extents {
            let place = &mut content[extent.offset as usize..][..extent.len as usize];
            if extent.is_zero {
                place.fill(0);
            } else {
                let (bytes, rest) = data.split_at(place.len());
                place.copy_from_slice(bytes);
                data = rest;
            }
            had.push((extent.offset, extent.len));
        }
        assert!(data.is_empty());
        at = chunk.next;
        match random.below(6) {
            // The connection broke.
            0 => at = released + random.below(at - released + 1),
            1 => {
                released += random.below(at - released + 1);
                backup.release(released).unwrap();
            }
            _ => {}
        }
    }
    had
}

/// There is no way to the image that its backups are not told of.
#[test]
fn compressed_writes_are_changes_as_well() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_bitmap(dir.path());
    write(&*disk, 0, SIZE, 1).unwrap();
    let backup = begin(&disk, &since(false));
    for n in [1, 3] {
        disk.write_compressed(vec![2; GRANULE as usize], n * GRANULE)
            .unwrap();
    }
    assert_eq!(dirty(&disk), Some(2 * GRANULE));
    let mut content = Vec::new();
    restore(&backup, &mut Random(5), &mut content);
    assert!(content.iter().all(|byte| *byte == 1));
    backup.finish().unwrap();
    assert_eq!(read(&*disk, 3 * GRANULE, 512), [2; 512]);
    let raw = Memory::new(vec![0; 512]);
    let raw = live(Raw::with_storage(Path::new("raw"), Box::new(raw), false).unwrap());
    assert!(raw.write_compressed(vec![2; 512], 0).is_err());
}

/// Threads change the disk at random while its backup is read.
#[test]
fn what_the_disk_was_is_read_while_it_changes() {
    let dir = tempfile::tempdir().unwrap();
    for (seed, image) in (1..).zip(images(dir.path())) {
        let disk = live(image);
        for round in 1..4 {
            let expected = all(&*disk);
            let backup = begin(&disk, &full());
            assert_eq!((backup.size(), backup.granularity()), (SIZE, GRANULE));
            let stop = AtomicBool::new(false);
            let mut content = Vec::new();
            thread::scope(|scope| {
                for thread in 1..3 {
                    let mut random = Random(seed * 1000 + round * 100 + thread);
                    let (disk, stop) = (&disk, &stop);
                    scope.spawn(move || {
                        for _ in 0..3 {
                            random.change(&**disk);
                        }
                        while !stop.load(Ordering::Relaxed) {
                            random.change(&**disk);
                        }
                    });
                }
                restore(&backup, &mut Random(seed + round), &mut content);
                stop.store(true, Ordering::Relaxed);
            });
            assert!(content == expected, "image {seed}, round {round}");
            let status = backup.status();
            assert_eq!((status.state, status.wanted), (BackupState::Active, SIZE));
            backup.release(SIZE).unwrap();
            let status = backup.status();
            assert_eq!((status.released, status.scratch_used), (SIZE, 0));
            backup.finish().unwrap();
        }
        disk.close().unwrap();
    }
}

/// Of two writes, one after the other, no backup has the second one alone.
#[test]
fn a_backup_is_of_one_instant() {
    let dir = tempfile::tempdir().unwrap();
    for image in images(dir.path()).into_iter().take(2) {
        let disk = live(image);
        let (first, second) = (0, SIZE - 512);
        let stop = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                for round in (0..=255).cycle() {
                    for offset in [second, first] {
                        write(&*disk, offset, 512, round).unwrap();
                    }
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let mut content = Vec::new();
            for seed in 1..60 {
                let backup = begin(&disk, &full());
                restore(&backup, &mut Random(seed), &mut content);
                let ahead = content[second as usize].wrapping_sub(content[first as usize]);
                assert!(ahead <= 1, "{ahead}");
                drop(backup);
            }
            stop.store(true, Ordering::Relaxed);
        });
    }
}

/// Only what has changed since the backup before is in the next one, and both together are the disk.
#[test]
fn increments_follow_a_full_backup() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_bitmap(dir.path());
    let mut random = Random(3);
    (0..30).for_each(|_| random.change(&*disk));
    let track = options(BackupKind::Full {
        track: Some(b"c".to_vec()),
    });
    let mut restored = Vec::new();
    let backup = begin(&disk, &track);
    restore(&backup, &mut random, &mut restored);
    backup.finish().unwrap();
    let mut base = backup.id();
    let name = b"c".to_vec();
    for round in 0..6 {
        if round == 5 {
            disk.resize(SIZE + 3 * GRANULE).unwrap();
        }
        write(&*disk, 3 * GRANULE - 512, 1024, round).unwrap();
        if round % 2 == 0 {
            (0..3).for_each(|_| random.change(&*disk));
        }
        let expected = all(&*disk);
        let bitmap = name.clone();
        let backup = begin(
            &disk,
            &options(BackupKind::Since {
                bitmap,
                keep: false,
            }),
        );
        assert_eq!(backup.base(), Some(base));
        base = backup.id();
        write(&*disk, 20 * GRANULE, 512, round).unwrap();
        let had = restore(&backup, &mut random, &mut restored);
        assert!(restored == expected, "round {round}");
        if round % 2 == 1 && round < 5 {
            // With what came behind the instant of the one before.
            let within = |(offset, len): &(u64, u64)| {
                let (first, last) = (offset / GRANULE, (offset + len - 1) / GRANULE);
                (first == 2 || first == 3 || first == 20) && last - first < 2
            };
            assert!(had.iter().all(within), "{had:?}");
            assert_eq!(backup.status().wanted, 3 * GRANULE);
        }
        backup.finish().unwrap();
    }
    // Who clears it knows what he is doing, but nothing goes on from the last backup.
    disk.change_bitmaps(&[BitmapAction::Clear { name: name.clone() }])
        .unwrap();
    let kind = BackupKind::Since {
        bitmap: name,
        keep: true,
    };
    assert_eq!(begin(&disk, &options(kind)).base(), None);
}

#[test]
fn what_does_not_succeed_gives_the_bitmap_back() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_bitmap(dir.path());
    let mut content = Vec::new();
    write(&*disk, GRANULE, 4096, 1).unwrap();
    for end in 0..3_u64 {
        let backup = begin(&disk, &since(false));
        assert_eq!(dirty(&disk), Some(0));
        assert_eq!(backup.status().wanted, GRANULE * (1 + end).min(2));
        write(&*disk, 5 * GRANULE, 4096, 1).unwrap();
        assert_eq!(dirty(&disk), Some(4096));
        let second = LiveDisk::begin_backup(&disk, &since(false)).err().unwrap();
        assert!(second.to_string().contains("under way"), "{second}");
        match end {
            0 => backup.cancel().unwrap(),
            1 => drop(backup),
            _ => {
                restore(&backup, &mut Random(1), &mut content);
                drop(backup);
            }
        }
        assert_eq!(dirty(&disk), Some(8192));
    }
    // One that keeps it takes nothing.
    let backup = begin(&disk, &since(true));
    assert_eq!(dirty(&disk), Some(8192));
    assert_eq!(backup.status().wanted, 2 * GRANULE);
    restore(&backup, &mut Random(1), &mut content);
    backup.finish().unwrap();
    assert_eq!(dirty(&disk), Some(8192));
    // The end of the disk is the end of its backups.
    let track = BackupKind::Full {
        track: Some(b"b".to_vec()),
    };
    let made = BackupKind::Full {
        track: Some(b"made".to_vec()),
    };
    let backups = [track, made].map(|kind| begin(&disk, &options(kind)));
    let clear = BitmapAction::Clear {
        name: b"b".to_vec(),
    };
    let merge = BitmapAction::Merge {
        target: b"made".to_vec(),
        source: b"b".to_vec(),
    };
    // What it tells now is not all that it may tell.
    let refused = [clear, merge].map(|action| disk.change_bitmaps(&[action]).unwrap_err());
    let kept = LiveDisk::begin_backup(&disk, &since(true)).err().unwrap();
    for refused in refused.into_iter().chain([kept]) {
        let refused = refused.to_string();
        assert!(refused.contains("'b' belongs to a backup"), "{refused}");
    }
    write(&*disk, 9 * GRANULE, 4096, 1).unwrap();
    disk.close().unwrap();
    for backup in &backups {
        assert!(
            backup
                .read(0, &mut [0; 512])
                .unwrap_err()
                .to_string()
                .contains("closed")
        );
        assert!(backup.finish().is_err());
    }
    drop((disk, backup, backups));
    let disk = Qcow2::open(&dir.path().join("with-bitmap"), &OpenOptions::default()).unwrap();
    let bitmaps = disk.bitmaps().unwrap().unwrap();
    let names = Vec::from_iter(
        bitmaps
            .iter()
            .map(|bitmap| (&bitmap.name[..], bitmap.in_use)),
    );
    assert_eq!(names, [(&b"b"[..], false)]);
    assert_eq!(disk.dirty_bytes(b"b").unwrap(), 3 * 4096);
}

/// Whoever writes clusters need not look for the rest of one.
#[test]
fn a_backup_has_whole_granules() {
    let dir = tempfile::tempdir().unwrap();
    for image in images(dir.path()) {
        let disk = live(image);
        let backup = begin(&disk, &full());
        let mut random = Random(9);
        let mut at = 0;
        while at < SIZE {
            let room = GRANULE + random.below(4 * GRANULE);
            let chunk = backup.read(at, &mut vec![0; room as usize]).unwrap();
            for extent in &chunk.extents {
                let end = extent.offset + extent.len;
                assert_eq!(extent.offset % GRANULE, 0);
                assert!(end % GRANULE == 0 || end == SIZE, "{end}");
            }
            assert!(chunk.next > at);
            at = chunk.next;
            random.change(&*disk);
        }
    }
}

#[test]
fn a_disk_in_a_backup_may_grow_and_not_shrink() {
    let dir = tempfile::tempdir().unwrap();
    for image in images(dir.path()) {
        let disk = live(image);
        let expected = all(&*disk);
        let backup = begin(&disk, &full());
        let refused = disk.resize(SIZE - 512).unwrap_err().to_string();
        assert!(
            refused.contains("a backup of the disk is under way"),
            "{refused}"
        );
        disk.resize(SIZE + 2 * GRANULE).unwrap();
        write(&*disk, SIZE - 512, 2 * GRANULE, 9).unwrap();
        let mut content = Vec::new();
        restore(&backup, &mut Random(5), &mut content);
        assert!(content == expected);
        drop(backup);
        disk.resize(SIZE - 512).unwrap();
    }
}

#[test]
fn mistakes_are_told() {
    let dir = tempfile::tempdir().unwrap();
    let disk = with_bitmap(dir.path());
    let refused = |options: &BackupOptions| {
        let error = LiveDisk::begin_backup(&disk, options).err().unwrap();
        error.to_string()
    };
    let nowhere = dir.path().join("nowhere");
    let options = BackupOptions {
        scratch_dir: Some(nowhere.clone()),
        ..since(false)
    };
    let text = refused(&options);
    assert!(text.contains(nowhere.to_str().unwrap()), "{text}");
    let missing = BackupKind::Since {
        bitmap: b"x".to_vec(),
        keep: false,
    };
    assert!(refused(&self::options(missing)).contains("'x' not found"));
    let backups = Vec::from_iter((0..8).map(|_| begin(&disk, &full())));
    assert!(refused(&full()).contains("8 backups"));
    let backup = &backups[0];
    assert_eq!(
        backup.id().to_string().parse::<BackupId>().unwrap(),
        backup.id()
    );
    assert_ne!(backup.id(), backups[1].id());
    assert!(
        "+1234567812345678123456781234567"
            .parse::<BackupId>()
            .is_err()
    );
    let text = |result: Result<(), Error>| result.unwrap_err().to_string();
    assert!(text(backup.finish()).contains("up to offset 0 of"));
    assert!(text(backup.release(1)).contains("up to offset 0 only"));
    let mut content = Vec::new();
    restore(backup, &mut Random(1), &mut content);
    backup.release(GRANULE + 1).unwrap();
    assert_eq!(backup.status().released, GRANULE);
    backup.release(GRANULE).unwrap();
    for from in [GRANULE, SIZE + 1, u64::MAX] {
        let text = text(backup.read(from, &mut []).map(drop));
        assert!(
            text.contains(&format!("offset {from} is not one")),
            "{text}"
        );
    }
    for from in [GRANULE + 1, SIZE] {
        let text = text(backup.read(from, &mut []).map(drop));
        assert!(text.contains("a buffer of 0 bytes"), "{text}");
    }
    assert_eq!(backup.read(SIZE, &mut [0]).unwrap().next, SIZE);
    assert!(backup.read(GRANULE + 1, &mut [0]).unwrap().next > GRANULE + 1);
    let disk = live(
        Raw::with_storage(Path::new("raw"), Box::new(Memory::new(vec![0; 512])), false).unwrap(),
    );
    let error = LiveDisk::begin_backup(&disk, &since(true)).err().unwrap();
    assert!(
        error.to_string().contains("no place for bitmaps"),
        "{error}"
    );
}
