//! Persistent bitmaps that are changed while the disk is in use.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;

use common::{Memory, assert_clean, new_image, open, open_with, write};
use tandem_block::qcow2::{
    BitmapAction, BitmapInfo, CreateOptions, DataFileLayout, DirtyBits, Info, OpenOptions, Qcow2,
};
use tandem_block::{Disk, Error, LiveDisk, Raw};

const CLUSTER: u64 = 4096;
const SIZE: u64 = (64 << 20) + 512;
const BIT: u64 = 64 << 10;

fn image() -> Memory {
    new_image(&CreateOptions {
        size: SIZE,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    })
}

fn name(name: &str) -> Vec<u8> {
    name.as_bytes().to_vec()
}

fn add(bitmap: &str) -> BitmapAction {
    BitmapAction::Add {
        name: name(bitmap),
        granularity: Some(BIT),
        enabled: true,
    }
}

fn remove(bitmap: &str) -> BitmapAction {
    BitmapAction::Remove { name: name(bitmap) }
}

fn clear(bitmap: &str) -> BitmapAction {
    BitmapAction::Clear { name: name(bitmap) }
}

fn enable(bitmap: &str, enabled: bool) -> BitmapAction {
    let name = name(bitmap);
    BitmapAction::SetEnabled { name, enabled }
}

fn merge(target: &str, source: &str) -> BitmapAction {
    let (target, source) = (name(target), name(source));
    BitmapAction::Merge { target, source }
}

/// The bits of `dirty` that are set.
fn bits(dirty: &DirtyBits) -> Vec<u64> {
    let granularity = dirty.granularity();
    let bits = dirty
        .ranges(0)
        .flat_map(|range| range.start / granularity..range.end.div_ceil(granularity));
    bits.collect()
}

fn set(disk: &Qcow2, bitmap: &str) -> Vec<u64> {
    bits(&disk.read_bitmap(bitmap.as_bytes()).unwrap())
}

/// Writes where bit `bit` stands for.
fn change(disk: &Qcow2, bit: u64) {
    write(disk, bit * BIT, 512, 1).unwrap();
}

/// Names of the bitmaps, and whether they are enabled and in use, as `disk` tells.
fn listed(disk: &Qcow2) -> Vec<(String, bool, bool)> {
    let bitmaps = disk.bitmaps().unwrap().unwrap();
    let listed = |bitmap: BitmapInfo| {
        let name = String::from_utf8(bitmap.name).unwrap();
        (name, bitmap.auto, bitmap.in_use)
    };
    bitmaps.into_iter().map(listed).collect()
}

/// Names of the bitmaps of the file, and whether they are in use.
fn stored(image: &Memory) -> Vec<(String, bool)> {
    let info = Info::read_storage("image".as_ref(), image).unwrap();
    let stored = |bitmap: BitmapInfo| (String::from_utf8(bitmap.name).unwrap(), bitmap.in_use);
    info.bitmaps.into_iter().map(stored).collect()
}

fn in_use(names: &[&str]) -> Vec<(String, bool)> {
    names
        .iter()
        .map(|name| ((*name).to_owned(), true))
        .collect()
}

fn reason(error: &Error) -> String {
    assert!(matches!(error, Error::Bitmap { .. }), "{error:?}");
    error.reason()
}

#[test]
fn what_changes_while_the_disk_is_written() {
    for (data_file, data_file_raw, data_file_layout) in [
        (None, false, DataFileLayout::Standard),
        (Some("data".into()), false, DataFileLayout::Standard),
        (Some("data".into()), true, DataFileLayout::Standard),
        (Some("data".into()), false, DataFileLayout::Packed),
    ] {
        let data = data_file
            .is_some()
            .then(|| Memory::new(vec![0; SIZE as usize]));
        let image = new_image(&CreateOptions {
            size: SIZE,
            cluster_size: CLUSTER,
            data_file,
            data_file_raw,
            data_file_layout,
            ..CreateOptions::default()
        });
        changes_while_written(&image, data.as_ref());
    }
}

fn changes_while_written(image: &Memory, data: Option<&Memory>) {
    let open = || open(image, data).unwrap();
    let mut disk = open();
    assert_eq!(listed(&disk), []);
    change(&disk, 0);
    disk.change_bitmaps(&[add("a")]).unwrap();
    change(&disk, 1);
    // Freeze one, and start the next.
    disk.change_bitmaps(&[enable("a", false), add("b")])
        .unwrap();
    change(&disk, 2);
    disk.change_bitmaps(&[add("c"), merge("c", "a"), merge("c", "b"), clear("b")])
        .unwrap();
    change(&disk, SIZE / BIT);
    disk.change_bitmaps(&[enable("b", false)]).unwrap();
    change(&disk, 4);
    let listed_before = listed(&disk);
    assert_eq!(
        listed_before,
        [("a", false), ("b", false), ("c", true)].map(|(n, on)| (n.to_owned(), on, false))
    );
    let expected = |disk: &Qcow2| {
        assert_eq!(set(disk, "a"), [1]);
        assert_eq!(set(disk, "b"), [SIZE / BIT]);
        assert_eq!(set(disk, "c"), [1, 2, 4, SIZE / BIT]);
        assert_eq!(disk.dirty_bytes(b"c").unwrap(), 3 * BIT + 512);
    };
    expected(&disk);
    disk.close().unwrap();
    drop(disk);
    assert_clean(image);
    let disk = open();
    let before = image.content();
    expected(&disk);
    assert_eq!(listed(&disk), listed_before);
    drop(disk);
    assert!(image.content() == before, "reading a bitmap is no change");

    let mut disk = open();
    disk.change_bitmaps(&[remove("c"), remove("a"), remove("b")])
        .unwrap();
    drop(disk);
    assert_clean(image);
    assert_eq!(stored(image), []);
}

#[test]
fn a_list_of_changes_is_carried_out_or_not() {
    let image = image();
    let mut disk = open(&image, None).unwrap();
    disk.change_bitmaps(&[add("z")]).unwrap();
    change(&disk, 9);
    disk.change_bitmaps(&[enable("z", false), add("a")])
        .unwrap();
    change(&disk, 7);
    disk.close().unwrap();
    drop(disk);
    let before = image.content();
    let mut disk = open(&image, None).unwrap();
    for written in [false, true] {
        for (last, text) in [
            (remove("no"), "Dirty bitmap 'no' not found"),
            (add("a"), "Bitmap already exists: a"),
            (merge("b", "no"), "Dirty bitmap 'no' not found"),
            (add(""), "Bitmap name cannot be empty"),
        ] {
            let list = [
                add("b"),
                merge("b", "a"),
                merge("a", "z"),
                clear("a"),
                enable("a", false),
                last,
            ];
            assert_eq!(reason(&disk.change_bitmaps(&list).unwrap_err()), text);
        }
        let expected: &[u64] = if written { &[7, 8] } else { &[7] };
        assert_eq!(set(&disk, "a"), expected);
        assert_eq!(set(&disk, "z"), [9]);
        let names = [
            ("z".to_owned(), false, false),
            ("a".to_owned(), true, false),
        ];
        assert_eq!(listed(&disk), names);
        if !written {
            assert!(image.content() == before);
            change(&disk, 8);
        }
    }
    disk.close().unwrap();
    let closed = disk.change_bitmaps(&[add("b")]);
    assert!(matches!(closed, Err(Error::Closed { .. })), "{closed:?}");
    drop(disk);
    assert_clean(&image);
}

/// From each change on, a crash leaves every bitmap in use; it can be removed, and nothing else.
#[test]
fn a_crash_leaves_nothing_that_looks_complete() {
    let image = image();
    let mut disk = open(&image, None).unwrap();
    disk.change_bitmaps(&[add("a"), add("b")]).unwrap();
    assert_eq!(stored(&image), in_use(&["a", "b"]));
    drop(disk);
    assert!(stored(&image).iter().all(|(_, in_use)| !in_use));
    for (list, names) in [
        (&[clear("a")][..], &["a", "b"][..]),
        (&[merge("a", "b")], &["a", "b"]),
        (&[enable("a", false)], &["a", "b"]),
        (&[remove("a")], &["b"]),
        (&[add("c"), enable("b", false)], &["a", "b", "c"]),
    ] {
        let crashed = Memory::new(image.content());
        let mut disk = open(&crashed, None).unwrap();
        disk.change_bitmaps(list).unwrap();
        let left = Memory::new(crashed.content());
        drop(disk);
        assert_eq!(stored(&left), in_use(names), "{list:?}");
        assert_clean(&left);
        let mut disk = open(&left, None).unwrap();
        for list in [clear("b"), enable("b", true), merge("b", "b"), add("b")] {
            disk.change_bitmaps(&[list]).unwrap_err();
        }
        disk.read_bitmap(b"b").err().unwrap();
        change(&disk, 3);
        disk.change_bitmaps(&[remove("b"), add("b")]).unwrap();
        drop(disk);
        assert_clean(&left);
        let marked = |name: &&(String, bool)| name.1;
        assert_eq!(stored(&left).iter().filter(marked).count(), names.len() - 1);
    }
}

#[test]
fn taking_and_putting_back() {
    let image = image();
    let mut disk = open(&image, None).unwrap();
    disk.change_bitmaps(&[add("a")]).unwrap();
    change(&disk, 1);
    change(&disk, SIZE / BIT);
    disk.close().unwrap();
    drop(disk);

    let mut disk = open(&image, None).unwrap();
    let taken = disk.take_bitmap(b"a").unwrap();
    assert!(stored(&image)[0].1, "the loss of the bits is marked");
    change(&disk, 2);
    assert_eq!(bits(&taken), [1, SIZE / BIT]);
    assert_eq!((taken.count(), taken.size()), (BIT + 512, SIZE));
    assert_eq!(set(&disk, "a"), [2]);
    // The bitmap may be another one meanwhile, and the disk smaller.
    disk.resize(32 << 20).unwrap();
    let mut other = add("a");
    if let BitmapAction::Add { granularity, .. } = &mut other {
        *granularity = Some(2 * BIT);
    }
    disk.change_bitmaps(&[remove("a"), other]).unwrap();
    change(&disk, 5);
    disk.put_back_bitmap(b"a", &taken).unwrap();
    assert_eq!(set(&disk, "a"), [0, 2]);
    disk.put_back_bitmap(b"no", &taken).unwrap_err();
    disk.take_bitmap(b"no").err().unwrap();
    drop(disk);
    assert_eq!(set(&open(&image, None).unwrap(), "a"), [0, 2]);
    assert_clean(&image);
}

#[test]
fn handing_over_to_another_image() {
    let (from, to) = (image(), image());
    let mut old = open(&from, None).unwrap();
    old.change_bitmaps(&[add("a"), add("b"), add("off"), enable("off", false)])
        .unwrap();
    change(&old, 1);
    let mut new = open(&to, None).unwrap();
    new.change_bitmaps(&[add("b")]).unwrap();
    let error = old.hand_over_bitmaps(&mut new).unwrap_err();
    assert_eq!(reason(&error), "Bitmap already exists: b");
    assert_eq!((listed(&old).len(), listed(&new).len()), (3, 1));
    new.change_bitmaps(&[remove("b")]).unwrap();
    old.hand_over_bitmaps(&mut new).unwrap();
    assert_eq!(stored(&to), in_use(&["a", "b"]));
    change(&new, 2);
    old.close().unwrap();
    drop((old, new));
    assert_clean(&from);
    assert_clean(&to);
    assert_eq!(stored(&from), [("off".to_owned(), false)]);
    let new = open(&to, None).unwrap();
    assert_eq!(set(&new, "a"), [1, 2]);
    assert_eq!(set(&new, "b"), [1, 2]);

    let mut small = open(&image(), None).unwrap();
    small.resize(1 << 20).unwrap();
    let error = open(&to, None).unwrap().hand_over_bitmaps(&mut small);
    assert!(reason(&error.unwrap_err()).contains("different sizes"));
}

/// An image that has no room for the directory without them keeps its bitmaps, and the other one gets
/// none: each would miss what the other one sees.
#[test]
fn handing_over_all_or_none() {
    let (from, to) = (image(), image());
    let mut old = open(&from, None).unwrap();
    old.change_bitmaps(&[add("a"), add("off"), enable("off", false)])
        .unwrap();
    drop(old);
    let device = Memory::device(from.len());
    device.overwrite(&from.content());
    let (mut old, mut new) = (open(&device, None).unwrap(), open(&to, None).unwrap());
    change(&old, 0);
    let bytes = device.len();
    let mut at = 1;
    // Until all room is taken.
    while write(&old, at * BIT, BIT, 1).is_ok() {
        at += 1;
    }
    let result = old.hand_over_bitmaps(&mut new);
    assert!(matches!(result, Err(Error::Io { .. })), "{result:?}");
    assert_eq!(device.len(), bytes);
    assert_eq!(listed(&new), []);
    change(&old, 0);
    assert_eq!(set(&old, "a")[0], 0);
    drop(new);
    assert_eq!(stored(&to), []);
    assert_clean(&to);
}

#[test]
fn what_cannot_have_bitmaps() {
    let image = image();
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let mut disk = open_with(&image, None, &options).unwrap();
    let result = disk.change_bitmaps(&[add("a")]);
    assert!(matches!(result, Err(Error::ReadOnly)), "{result:?}");
    let old = new_image(&CreateOptions {
        size: SIZE,
        version: 2,
        ..CreateOptions::default()
    });
    let error = open(&old, None).unwrap().change_bitmaps(&[add("a")]);
    assert!(reason(&error.unwrap_err()).ends_with("Cannot store dirty bitmaps in qcow2 v2 files"));
}

/// Without room for them, the bitmaps stay what they are, and the disk can be used and closed.
#[test]
fn without_room() {
    let start = image();
    let mut disk = open(&start, None).unwrap();
    disk.change_bitmaps(&[add("a")]).unwrap();
    change(&disk, 3);
    drop(disk);
    let (mut failed, mut done) = (0, 0);
    for more in 0..8 {
        let device = Memory::device(start.len() + more * CLUSTER);
        device.overwrite(&start.content());
        let mut disk = open(&device, None).unwrap();
        let names = match disk.change_bitmaps(&[enable("a", false), add("b")]) {
            Ok(()) => {
                done += 1;
                2
            }
            Err(error) => {
                assert!(matches!(error, Error::Io { .. }), "{error:?}");
                failed += 1;
                1
            }
        };
        assert_eq!(set(&disk, "a"), [3]);
        assert_eq!(listed(&disk).len(), names);
        assert_eq!(listed(&disk)[0].1, names == 1);
        drop(disk);
        assert_clean(&device);
        assert_eq!(stored(&device).len(), names);
    }
    assert!(failed > 0 && done > 0, "{failed} {done}");
}

/// While several threads write, each write is in the one bitmap that follows changes at the time: in
/// no other one, and none is lost.
#[test]
fn each_write_is_in_one_bitmap_when_they_take_turns() {
    const BLOCK: u64 = 4096;
    const PER_THREAD: u64 = 2000;
    let options = CreateOptions {
        size: SIZE,
        cluster_size: CLUSTER,
        data_file: Some("data".into()),
        data_file_raw: true,
        ..CreateOptions::default()
    };
    let (image, data) = (new_image(&options), Memory::new(vec![0; SIZE as usize]));
    let disk = LiveDisk::new(open(&image, Some(&data)).unwrap());
    let add = |turn: usize| BitmapAction::Add {
        name: name(&turn.to_string()),
        granularity: Some(BLOCK),
        enabled: true,
    };
    disk.change_bitmaps(&[add(0)]).unwrap();
    let (turns, begun) = (AtomicUsize::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let writers = (0..3).map(|number| {
            let (disk, turns, begun) = (&disk, &turns, &begun);
            scope.spawn(move || {
                for i in 0..PER_THREAD {
                    while i == PER_THREAD / 2 && turns.load(Ordering::Relaxed) == 0 {
                        thread::yield_now();
                    }
                    let at = (number * PER_THREAD + i) * BLOCK;
                    match i % 3 {
                        0 => disk.write_zeroes(at, 512, false).unwrap(),
                        1 => disk.discard(at, BLOCK).unwrap(),
                        _ => write(disk, at, 512, 1).unwrap(),
                    }
                    begun.store(true, Ordering::Relaxed);
                }
            })
        });
        let writers = Vec::from_iter(writers);
        while !begun.load(Ordering::Relaxed) {
            thread::yield_now();
        }
        for turn in 1..500 {
            let freeze = enable(&(turn - 1).to_string(), false);
            disk.change_bitmaps(&[freeze, add(turn)]).unwrap();
            turns.store(turn, Ordering::Relaxed);
            if writers.iter().all(|writer| writer.is_finished()) {
                break;
            }
        }
    });
    let mut found = vec![0; 3 * PER_THREAD as usize];
    let mut in_turns = 0;
    for turn in 0..=turns.into_inner() {
        let dirty = disk.read_bitmap(turn.to_string().as_bytes()).unwrap();
        let bits = bits(&dirty);
        in_turns += usize::from(!bits.is_empty());
        bits.into_iter().for_each(|bit| found[bit as usize] += 1);
    }
    assert!(in_turns > 1, "all was written in one turn");
    assert!(found.iter().all(|count| *count == 1), "{found:?}");
    disk.close().unwrap();
    drop(disk);
    assert_clean(&image);
}

#[test]
fn a_raw_disk_has_no_place_for_bitmaps() {
    let data = Memory::new(vec![0; 4096]);
    let raw = Raw::with_storage("disk.raw".as_ref(), Box::new(data), false).unwrap();
    let disk = LiveDisk::new(raw);
    for error in [
        disk.change_bitmaps(&[add("a")]).unwrap_err(),
        disk.bitmaps().unwrap_err(),
        disk.read_bitmap(b"a").err().unwrap(),
    ] {
        assert!(reason(&error).contains("data_file='disk.raw'"), "{error}");
    }
}
