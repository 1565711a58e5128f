//! What is synced, and when, in each mode of the cache.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Barrier;

use common::{Memory, assert_clean, new_image, open_with, read, write};
use tandem_block::qcow2::{CreateOptions, DataFileLayout, OpenOptions, Qcow2, create};
use tandem_block::{CacheMode, Disk, FileOptions, ImageFormat, Preallocation, Raw};
use vm_memory::VolatileSlice;

const MODES: [CacheMode; 5] = [
    CacheMode::Writeback,
    CacheMode::None,
    CacheMode::Writethrough,
    CacheMode::Directsync,
    CacheMode::Unsafe,
];

const SIZE: u64 = 4 << 20;

fn files(cache: CacheMode) -> FileOptions {
    FileOptions {
        cache,
        ..FileOptions::default()
    }
}

fn options(cache: CacheMode, read_only: bool) -> OpenOptions {
    OpenOptions {
        read_only,
        files: files(cache),
        ..OpenOptions::default()
    }
}

/// An image of each kind, and its data file.
fn images() -> Vec<(Memory, Option<Memory>)> {
    let external = CreateOptions {
        size: SIZE,
        cluster_size: 4096,
        data_file: Some("data".into()),
        ..CreateOptions::default()
    };
    let kinds = [
        CreateOptions {
            data_file: None,
            ..external.clone()
        },
        CreateOptions {
            data_file_raw: true,
            ..external.clone()
        },
        CreateOptions {
            data_file_layout: DataFileLayout::Packed,
            ..external.clone()
        },
        external,
    ];
    let data = |kind: &CreateOptions| {
        let len = if kind.data_file_layout == DataFileLayout::Packed {
            0
        } else {
            SIZE
        };
        let named = kind.data_file.as_ref();
        named.map(|_| Memory::new(vec![0; len as usize]))
    };
    kinds.map(|kind| (new_image(&kind), data(&kind))).into()
}

/// Calls `after` behind each of some requests that change the disk.
fn work(disk: &dyn Disk, after: impl Fn(&str)) {
    for round in 0..3 {
        for i in 0..6 {
            write(disk, i * 300_000 + 1000, 20_000, 1 + i as u8).unwrap();
            after("write");
        }
        disk.write_zeroes(300_000, 12_000, round == 1).unwrap();
        after("write_zeroes");
        disk.discard(600_000, 100_000).unwrap();
        after("discard");
    }
}

#[test]
fn without_a_write_cache_each_change_is_durable() {
    for (image, data) in images() {
        for mode in [CacheMode::Writethrough, CacheMode::Directsync] {
            let disk = open_with(&image, data.as_ref(), &options(mode, false)).unwrap();
            assert!(!disk.limits().write_cache);
            work(&disk, |what| {
                let unsynced = |file: &Memory| file.is_unsynced();
                assert!(!unsynced(&image), "{mode:?} {what}: the image");
                assert!(
                    !data.as_ref().is_some_and(unsynced),
                    "{mode:?} {what}: the data file"
                );
                // The mapping is in the image, too.
                let copy = Memory::new(image.content());
                let again = open_with(&copy, data.as_ref(), &options(mode, true)).unwrap();
                assert!(
                    read(&again, 0, SIZE) == read(&disk, 0, SIZE),
                    "{mode:?} {what}"
                );
            });
            drop(disk);
            assert_clean(&image);
        }
    }
}

#[test]
fn with_a_write_cache_a_flush_makes_changes_durable() {
    for (image, data) in images() {
        for mode in [CacheMode::Writeback, CacheMode::None] {
            let disk = open_with(&image, data.as_ref(), &options(mode, false)).unwrap();
            assert!(disk.limits().write_cache);
            let held = data.as_ref().unwrap_or(&image);
            let syncs = held.syncs();
            work(&disk, |_| ());
            assert!(held.is_unsynced());
            assert_eq!(held.syncs(), syncs, "{mode:?}");
            disk.flush().unwrap();
            assert!(!held.is_unsynced() && !image.is_unsynced());
        }
    }
}

#[test]
fn unsafe_never_syncs() {
    for (image, data) in images() {
        let disk = open_with(&image, data.as_ref(), &options(CacheMode::Unsafe, false)).unwrap();
        assert!(disk.limits().write_cache);
        work(&disk, |_| ());
        disk.flush().unwrap();
        disk.resize(SIZE + 8192).unwrap();
        drop(disk);
        let syncs = image.syncs() + data.as_ref().map_or(0, Memory::syncs);
        assert_eq!(syncs, 0);
        assert_clean(&image);
        open_with(&image, data.as_ref(), &options(CacheMode::Unsafe, true)).unwrap();
    }
}

/// The same requests in each mode, on files, leave the same disk.
#[test]
fn all_modes_store_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let mut shown: Option<Vec<u8>> = None;
    for mode in MODES {
        for (kind, data_file) in [(0, false), (1, true), (2, true), (3, false)] {
            let path = dir.path().join(format!("{mode:?}{kind}"));
            let disk: Box<dyn Disk> = if kind == 3 {
                Raw::create(&path, SIZE, Preallocation::Off).unwrap();
                match Raw::open_with(&path, false, files(mode)) {
                    Err(e) if is_without_direct_io(&e) => continue,
                    disk => Box::new(disk.unwrap()),
                }
            } else {
                let create_options = CreateOptions {
                    size: SIZE,
                    cluster_size: 4096,
                    data_file: data_file.then(|| path.with_extension("data")),
                    data_file_raw: kind == 1,
                    ..CreateOptions::default()
                };
                create(&path, &create_options).unwrap();
                match Qcow2::open(&path, &options(mode, false)) {
                    Err(e) if is_without_direct_io(&e) => continue,
                    disk => Box::new(disk.unwrap()),
                }
            };
            in_parallel(&*disk);
            disk.flush().unwrap();
            let found = read(&*disk, 0, SIZE);
            drop(disk);
            let again: Box<dyn Disk> = if kind == 3 {
                assert_eq!(std::fs::metadata(&path).unwrap().len(), SIZE);
                Box::new(Raw::open(&path, true).unwrap())
            } else {
                Box::new(Qcow2::open(&path, &options(CacheMode::Writeback, true)).unwrap())
            };
            assert!(
                read(&*again, 0, SIZE) == found,
                "{mode:?} {kind}: opened again"
            );
            let expected = shown.get_or_insert_with(|| found.clone());
            assert!(found == *expected, "{mode:?} {kind}");
        }
    }
}

fn is_without_direct_io(error: &tandem_block::Error) -> bool {
    error.to_string().contains("does not support O_DIRECT")
}

/// Four threads write sectors that lie between those of the others, aligned to nothing but sectors.
fn in_parallel(disk: &dyn Disk) {
    let together = Barrier::new(4);
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let together = &together;
            scope.spawn(move || {
                together.wait();
                for i in 0..60 {
                    let mut bytes = [(thread * 60 + i) as u8 | 1; 3 * 512 + 8];
                    let slice = VolatileSlice::from(&mut bytes[8..]);
                    disk.write_at(&[slice], (i * 4 + thread) * 3 * 512).unwrap();
                    if i % 16 == 0 {
                        disk.flush().unwrap();
                    }
                }
            });
        }
    });
    disk.write_zeroes(10_000, 5000, true).unwrap();
}

/// How often each file below `dir` is open in this process, and how often past the page cache.
fn open_files(dir: &Path) -> BTreeMap<String, (usize, usize)> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        let Ok(path) = entry.path().read_link() else {
            continue;
        };
        let Ok(name) = path.strip_prefix(dir) else {
            continue;
        };
        let number = entry.file_name().into_string().unwrap();
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{number}")).unwrap();
        let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
        let flags = i32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
        let name = name.to_str().unwrap().to_owned();
        let counts: &mut (usize, usize) = found.entry(name).or_default();
        counts.0 += 1;
        counts.1 += usize::from(flags & libc::O_DIRECT != 0);
    }
    found
}

#[test]
fn direct_io_goes_for_all_files() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().canonicalize().unwrap();
    let path = |name: &str| root.join(name);
    Raw::create(&path("base"), SIZE, Preallocation::Off).unwrap();
    let on = |backing: &str, format, data: Option<&str>| CreateOptions {
        size: SIZE,
        backing_file: Some(backing.into()),
        backing_format: Some(format),
        data_file: data.map(path),
        ..CreateOptions::default()
    };
    let middle = on("base", ImageFormat::Raw, Some("data"));
    create(&path("middle"), &middle).unwrap();
    create(&path("top"), &on("middle", ImageFormat::Qcow2, None)).unwrap();
    for mode in MODES {
        let is_direct = matches!(mode, CacheMode::None | CacheMode::Directsync);
        let disk = match Qcow2::open(&path("top"), &options(mode, false)) {
            Err(e) if is_without_direct_io(&e) => continue,
            disk => disk.unwrap(),
        };
        write(&disk, 1000, 100_000, 1).unwrap();
        let expected = if is_direct { (2, 1) } else { (1, 0) };
        let names = ["base", "data", "middle", "top"];
        let expected = names.map(|name| (name.to_owned(), expected));
        assert_eq!(open_files(&root), expected.into(), "{mode:?}");
    }
}
