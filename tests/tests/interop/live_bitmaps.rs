//! Persistent bitmaps that are changed while the disk is written, next to a model, as QEMU reads them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use proptest::prelude::*;
use tandem_block::qcow2::{BitmapAction, OpenOptions, Qcow2};
use tandem_block::{Disk, Error, FileStorage, LiveDisk};

use crate::bitmaps::{KINDS, NoHeader, SIZE, dirty, expected};
use crate::qemu::{Image, Kind, at_once, qemu_img, write};

/// Names that bitmaps have, each with its granularity.
const NAMES: [(&str, u64); 4] = [("a", 4096), ("b", 65536), ("c", 512), ("d", 1 << 20)];

#[derive(Clone, Copy, Debug)]
enum Op {
    Write(u64, u64),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    /// Each of these is about bitmaps by their number.
    Add(usize, bool),
    Remove(usize),
    Clear(usize),
    Enable(usize, bool),
    Merge(usize, usize),
    /// Freezes one and starts another.
    Turn(usize, usize),
    /// Takes the bits of one and, after a write, puts them back.
    Take(usize, u64),
    Reopen,
    WriteByQemu(u64, u64),
    AddByQemu(usize),
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let sectors = SIZE / 512;
    let range =
        (0..sectors, 1..300u64).prop_map(move |(at, len)| (at * 512, len.min(sectors - at) * 512));
    let number = || 0..NAMES.len();
    let op = prop_oneof![
        4 => range.clone().prop_map(|(at, len)| Op::Write(at, len)),
        1 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero(at, len, unmap)),
        1 => range.clone().prop_map(|(at, len)| Op::Discard(at, len)),
        4 => (number(), any::<bool>()).prop_map(|(n, enabled)| Op::Add(n, enabled)),
        1 => number().prop_map(Op::Remove),
        1 => number().prop_map(Op::Clear),
        2 => (number(), any::<bool>()).prop_map(|(n, enabled)| Op::Enable(n, enabled)),
        2 => (number(), number()).prop_map(|(n, m)| Op::Merge(n, m)),
        2 => (number(), number()).prop_map(|(n, m)| Op::Turn(n, m)),
        1 => (number(), 0..sectors).prop_map(|(n, at)| Op::Take(n, at * 512)),
        1 => Just(Op::Reopen),
        1 => range.prop_map(|(at, len)| Op::WriteByQemu(at, len)),
        1 => number().prop_map(Op::AddByQemu),
    ];
    proptest::collection::vec(op, 8..30)
}

/// What a bitmap should be.
#[derive(Clone, Debug)]
struct Model {
    granularity: u64,
    enabled: bool,
    bits: BTreeSet<u64>,
}

type Models = BTreeMap<usize, Model>;

fn changed(models: &mut Models, at: u64, len: u64) {
    for model in models.values_mut().filter(|model| model.enabled) {
        let bits = at / model.granularity..=(at + len - 1) / model.granularity;
        model.bits.extend(bits);
    }
}

/// What `action` does, and whether it is possible.
fn apply(models: &mut Models, action: &BitmapAction) -> bool {
    let number = |name: &[u8]| {
        NAMES
            .iter()
            .position(|(n, _)| n.as_bytes() == name)
            .unwrap()
    };
    let present = |models: &Models, name| models.contains_key(&number(name));
    match action {
        BitmapAction::Add { name, enabled, .. } => {
            let model = Model {
                granularity: NAMES[number(name)].1,
                enabled: *enabled,
                bits: BTreeSet::new(),
            };
            !present(models, name) && models.insert(number(name), model).is_none()
        }
        BitmapAction::Remove { name } => models.remove(&number(name)).is_some(),
        BitmapAction::Clear { name } => {
            let model = models.get_mut(&number(name));
            model.map(|model| model.bits.clear()).is_some()
        }
        BitmapAction::SetEnabled { name, enabled } => {
            let model = models.get_mut(&number(name));
            model.map(|model| model.enabled = *enabled).is_some()
        }
        BitmapAction::Merge { target, source } => {
            let source = models.get(&number(source)).cloned();
            let (Some(source), Some(target)) = (source, models.get_mut(&number(target))) else {
                return false;
            };
            for bit in source.bits {
                let start = bit * source.granularity;
                let last = SIZE.min(start + source.granularity) - 1;
                target
                    .bits
                    .extend(start / target.granularity..=last / target.granularity);
            }
            true
        }
        other => panic!("{other:?}"),
    }
}

/// The changes of bitmaps that `op` asks for.
fn actions(op: Op) -> Vec<BitmapAction> {
    let name = |number: usize| NAMES[number].0.as_bytes().to_vec();
    let add = |number: usize, enabled| BitmapAction::Add {
        name: name(number),
        granularity: Some(NAMES[number].1),
        enabled,
    };
    let enable = |number, enabled| BitmapAction::SetEnabled {
        name: name(number),
        enabled,
    };
    match op {
        Op::Add(number, enabled) => vec![add(number, enabled)],
        Op::Remove(number) => vec![BitmapAction::Remove { name: name(number) }],
        Op::Clear(number) => vec![BitmapAction::Clear { name: name(number) }],
        Op::Enable(number, enabled) => vec![enable(number, enabled)],
        Op::Merge(target, source) => vec![BitmapAction::Merge {
            target: name(target),
            source: name(source),
        }],
        Op::Turn(frozen, started) => vec![enable(frozen, false), add(started, true)],
        _ => Vec::new(),
    }
}

fn run(kind: Kind, ops: &[Op]) {
    let image = Image::create(kind, 65536, SIZE);
    let mut models = Models::new();
    let mut open: Option<Qcow2> = None;
    for op in ops {
        if let Op::WriteByQemu(..) | Op::AddByQemu(_) | Op::Reopen = op {
            if let Some(disk) = open.take() {
                disk.close().unwrap();
            }
            by_qemu(&image, &mut models, *op);
        } else {
            let disk = open.get_or_insert_with(|| image.open().unwrap());
            carry_out(disk, &mut models, *op);
        }
    }
    drop(open);
    compare(&image, &models);
}

/// Has QEMU do what `op` asks of it.
fn by_qemu(image: &Image, models: &mut Models, op: Op) {
    match op {
        Op::WriteByQemu(at, len) => {
            image.qemu_io(&[format!("write {at} {len}")]);
            changed(models, at, len);
        }
        Op::AddByQemu(number) if apply(models, &actions(Op::Add(number, true))[0]) => {
            let (name, granularity) = NAMES[number];
            image.qemu_img(
                &["bitmap", "--add", "-g", &granularity.to_string()],
                &[name],
            );
        }
        _ => {}
    }
}

fn carry_out(disk: &mut Qcow2, models: &mut Models, op: Op) {
    match op {
        Op::Write(at, len) => write(disk, at, len as usize, 3),
        Op::Zero(at, len, unmap) => disk.write_zeroes(at, len, unmap).unwrap(),
        Op::Discard(at, len) => disk.discard(at, len).unwrap(),
        Op::Take(number, at) if models.contains_key(&number) => {
            let name = NAMES[number].0.as_bytes();
            let taken = disk.take_bitmap(name).unwrap();
            write(disk, at, 512, 3);
            changed(models, at, 512);
            disk.put_back_bitmap(name, &taken).unwrap();
        }
        _ => {
            let mut after = models.clone();
            let list = actions(op);
            let done = list.iter().all(|action| apply(&mut after, action));
            assert_eq!(disk.change_bitmaps(&list).is_ok(), done, "{op:?}");
            if done {
                *models = after;
            }
        }
    }
    if let Op::Write(at, len) | Op::Zero(at, len, _) | Op::Discard(at, len) = op {
        changed(models, at, len);
    }
}

/// Asserts that QEMU finds the bitmaps of `models` in `image`, and no others.
fn compare(image: &Image, models: &Models) {
    image.check();
    let found = bitmaps_by_qemu(image);
    let flags = |model: &Model| match model.enabled {
        true => vec!["auto".to_owned()],
        false => Vec::new(),
    };
    let wanted = models.iter().map(|(number, model)| {
        let (name, granularity) = NAMES[*number];
        (name.to_owned(), (granularity, flags(model)))
    });
    assert_eq!(found, wanted.collect());
    for (number, model) in models {
        let ranges = model.bits.iter().map(|bit| (bit * model.granularity, 1));
        let ranges = expected(SIZE, &Vec::from_iter(ranges), model.granularity);
        assert_eq!(dirty(image, NAMES[*number].0), ranges);
    }
}

/// The bitmaps as `qemu-img info` tells: granularity and flags by name.
fn bitmaps_by_qemu(image: &Image) -> BTreeMap<String, (u64, Vec<String>)> {
    let path = image.path();
    let info = qemu_img(&["info", "--output=json", path.to_str().unwrap()]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let bitmaps = info["format-specific"]["data"]["bitmaps"].as_array();
    let told = |bitmap: &serde_json::Value| {
        let flags = serde_json::from_value(bitmap["flags"].clone()).unwrap();
        let granularity = bitmap["granularity"].as_u64().unwrap();
        (
            bitmap["name"].as_str().unwrap().to_owned(),
            (granularity, flags),
        )
    };
    bitmaps.into_iter().flatten().map(told).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..Default::default() })]

    #[test]
    fn what_changes_while_the_disk_is_written(ops in ops()) {
        at_once(KINDS, |kind| run(kind, &ops));
    }
}

fn add(name: &str) -> BitmapAction {
    BitmapAction::Add {
        name: name.as_bytes().to_vec(),
        granularity: None,
        enabled: true,
    }
}

/// A machine that goes down leaves its bitmaps in use, those that are new as well; QEMU says so, and
/// can do nothing but remove them.
#[test]
fn a_crash_leaves_bitmaps_that_qemu_does_not_trust() {
    at_once(KINDS, |kind| {
        let image = Image::create(kind, 65536, SIZE);
        image.qemu_img(&["bitmap", "--add"], &["old"]);
        let disk = LiveDisk::new(image.open().unwrap());
        disk.change_bitmaps(&[add("new")]).unwrap();
        write(&disk, 0, 4096, 3);
        let merge = BitmapAction::Merge {
            target: b"old".to_vec(),
            source: b"new".to_vec(),
        };
        let remove = BitmapAction::Remove {
            name: b"new".to_vec(),
        };
        disk.change_bitmaps(&[merge, remove, add("next")]).unwrap();
        disk.flush().unwrap();
        let left = fs::read(image.path()).unwrap();
        drop(disk);
        fs::write(image.path(), left).unwrap();
        let found = bitmaps_by_qemu(&image);
        let marked = (65536, vec!["in-use".to_owned(), "auto".to_owned()]);
        assert_eq!(
            found,
            [("next", &marked), ("old", &marked)]
                .map(|(n, m)| (n.to_owned(), m.clone()))
                .into()
        );
        image.check();
        image.qemu_img(&["bitmap", "--remove"], &["next"]);
        image.qemu_img(&["bitmap", "--remove"], &["old"]);
    });
}

/// A header that cannot be written may be there or not: bitmaps are not stored from then on, stay in
/// use, and whoever closes the disk is told.
#[test]
fn a_header_that_cannot_be_written() {
    let image = Image::create(Kind::Internal, 65536, SIZE);
    image.qemu_img(&["bitmap", "--add"], &["a"]);
    let fails = Arc::new(AtomicBool::new(false));
    let storage = NoHeader {
        file: FileStorage::open(&image.path(), false).unwrap(),
        fails: fails.clone(),
    };
    let options = OpenOptions::default();
    let path = image.path();
    let mut disk = Qcow2::with_storage(&path, Box::new(storage), None, &options).unwrap();
    write(&disk, 0, 512, 3);
    fails.store(true, Ordering::Relaxed);
    let error = disk.change_bitmaps(&[add("b")]).unwrap_err();
    assert!(matches!(error, Error::Io { .. }), "{error:?}");
    fails.store(false, Ordering::Relaxed);
    write(&disk, 1 << 20, 512, 3);
    let remove = BitmapAction::Remove {
        name: b"a".to_vec(),
    };
    for error in [
        disk.change_bitmaps(&[remove]).unwrap_err(),
        disk.close().unwrap_err(),
    ] {
        assert!(error.to_string().contains("broken off"), "{error}");
    }
    drop(disk);
    let marked = (65536, vec!["in-use".to_owned(), "auto".to_owned()]);
    assert_eq!(bitmaps_by_qemu(&image), [("a".to_owned(), marked)].into());
    image.check_leaks_at_most();
}
