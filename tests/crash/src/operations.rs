//! Power failures during operations on images that no guest uses: snapshots and repairs.
//!
//! Whatever was on disk, the image can be opened afterwards, or repaired if that is what was going
//! on, and nothing but leaks is left then.

use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use tandem_block::qcow2::{
    BackingName, BitmapEditor, CreateOptions, Finding, NewBacking, OpenOptions, Qcow2, Repair,
    check_storage, create,
};
use tandem_block::{Disk, ImageFormat, Raw, Result};
use vm_memory::VolatileSlice;

use crate::bitmap::{self, Stored};
use crate::judge::check;
use crate::power::{Files, Run};
use crate::random::Random;
use crate::rewrites::expect_content;
use crate::setup::scratch;
use crate::storage::{Memory, Which};

const SIZE: usize = 60 << 10;

fn open(image: Memory) -> Result<Qcow2> {
    Qcow2::with_storage(
        Path::new("image"),
        Box::new(image),
        None,
        &OpenOptions::default(),
    )
}

fn plain(image: &[u8]) -> Memory {
    Memory::plain(Which::Image, &Arc::new(Mutex::new(image.to_vec())))
}

/// Runs `change` on `start`, and `judge` on what a power failure may leave at any point of it. Returns what
/// is on disk for certain at the end.
fn explore(
    run: &mut Run,
    start: &[u8],
    seed: u64,
    change: impl FnOnce(Memory),
    mut judge: impl FnMut(Vec<u8>, &str),
) -> Vec<u8> {
    let start = Files {
        image: start.to_vec(),
        data: Vec::new(),
    };
    let change = |image, _| change(image);
    let judge = |state: Files, what: &str| judge(state.image, what);
    run.explore(&start, seed, change, judge).image
}

pub fn content(disk: &Qcow2) -> Vec<u8> {
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 0)
        .unwrap();
    bytes
}

pub fn fill(disk: &Qcow2, at: u64, len: usize, byte: u8) {
    let mut bytes = vec![byte; len];
    disk.write_at(&[VolatileSlice::from(&mut bytes[..])], at)
        .unwrap();
}

/// What an image has besides snapshots.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum More {
    Nothing,
    /// Compressed clusters in all snapshots, several in one cluster of the file.
    Compressed,
    /// A persistent bitmap.
    Bitmap,
}

/// An image in which clusters of some snapshots are shared, and others not: it, what the disk holds,
/// and what each snapshot does.
pub fn image_with_snapshots(
    version: u32,
    cluster_size: u64,
    more: More,
) -> (Vec<u8>, Vec<u8>, Vec<Vec<u8>>) {
    let dir = scratch();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: SIZE as u64,
        version,
        cluster_size,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let open = || Qcow2::open(&path, &OpenOptions::default()).unwrap();
    let mut contents = Vec::new();
    for (i, (at, len)) in [(0, 40_000), (30_000, 20_000)].into_iter().enumerate() {
        let disk = open();
        fill(&disk, at, len, i as u8 + 1);
        if more == More::Compressed {
            for cluster in [2, 3 + i as u64, 6] {
                let data = vec![0x60 + i as u8; cluster_size as usize];
                let data = disk.compress(data).unwrap();
                disk.write_compressed(data, cluster * cluster_size).unwrap();
            }
        }
        contents.push(content(&disk));
        disk.create_snapshot(format!("s{i}").as_bytes()).unwrap();
    }
    let disk = open();
    fill(&disk, 10_000, 3000, 9);
    disk.flush().unwrap();
    let now = content(&disk);
    drop(disk);
    if more == More::Bitmap {
        add_bitmap(&path);
    }
    (std::fs::read(&path).unwrap(), now, contents)
}

/// The disk that `image` has after it has been opened for writing and closed, which repairs it.
fn reopened(image: Vec<u8>, what: &str) -> (Vec<u8>, Arc<Mutex<Vec<u8>>>) {
    let image = Arc::new(Mutex::new(image));
    let disk = open(Memory::plain(Which::Image, &image));
    let disk = disk.unwrap_or_else(|e| panic!("{what}: {e}"));
    let shown = content(&disk);
    drop(disk);
    check(&Memory::plain(Which::Image, &image)).unwrap_or_else(|e| panic!("{what}: {e}"));
    (shown, image)
}

/// Each snapshot that there is in `image` holds what the disk had: `contents`, or `before` the operation.
fn expect_snapshots(image: &[u8], before: &[u8], contents: &[Vec<u8>], what: &str) {
    for snapshot in open(plain(image)).unwrap().snapshots().unwrap() {
        let image = Arc::new(Mutex::new(image.to_vec()));
        let disk = open(Memory::plain(Which::Image, &image)).unwrap();
        disk.apply_snapshot(&snapshot.name).unwrap();
        let shown = content(&open(Memory::plain(Which::Image, &image)).unwrap());
        let expected = match &snapshot.name[..] {
            b"s0" => &contents[0],
            b"s1" => &contents[1],
            _ => before,
        };
        assert!(shown == *expected, "{what}: a snapshot");
    }
}

/// Whatever a failure leaves of `change`, the disk holds `before` or `after` it, and each snapshot what
/// it should, if it is there.
fn snapshot_operation(
    run: &mut Run,
    change: impl Fn(Qcow2) -> Result<()>,
    after: impl Fn(&[u8], &[Vec<u8>]) -> Vec<u8>,
) {
    for (seed, cluster_size, more) in [
        (1, 512, More::Nothing),
        (2, 1024, More::Nothing),
        (3, 4096, More::Nothing),
        (4, 1024, More::Compressed),
        (5, 4096, More::Compressed),
        (6, 4096, More::Bitmap),
    ] {
        let (start, before, contents) = image_with_snapshots(3, cluster_size, more);
        let after = after(&before, &contents);
        explore(
            run,
            &start,
            seed,
            |image| change(open(image).unwrap()).unwrap(),
            |state, what| {
                let bits = (more == More::Bitmap).then(|| bits(&state)).flatten();
                let (shown, image) = reopened(state, what);
                assert!(shown == before || shown == after, "{what}: the disk");
                if let Some(bits) = bits {
                    expect_marked(&bits, &before, &shown, what);
                }
                let mut image = image.lock().unwrap().clone();
                // A bitmap that is marked as in use keeps snapshots from being applied.
                image[AUTOCLEAR] &= !1;
                expect_snapshots(&image, &before, &contents, what);
            },
        );
    }
}

/// Version 2 has no dirty bit, and nobody repairs the image: whatever a failure leaves, the snapshots
/// stay what they are while the disk changes.
pub fn operations_without_a_dirty_bit(run: &mut Run) {
    type Change = fn(Qcow2) -> Result<()>;
    let changes: [Change; 3] = [
        |disk| disk.create_snapshot(b"new"),
        |disk| disk.apply_snapshot(b"s0"),
        |disk| disk.delete_snapshot(b"s1"),
    ];
    for (seed, change) in (0..).zip(changes) {
        let (start, before, contents) = image_with_snapshots(2, 1024, More::Nothing);
        explore(
            run,
            &start,
            seed,
            |image| change(open(image).unwrap()).unwrap(),
            |state, what| {
                let image = Arc::new(Mutex::new(state));
                let disk = open(Memory::plain(Which::Image, &image));
                let disk = disk.unwrap_or_else(|e| panic!("{what}: {e}"));
                let shown = content(&disk);
                assert!(shown == before || shown == contents[0], "{what}: the disk");
                for round in 0..2 {
                    fill(&disk, 0, SIZE, 0xf0 + round);
                    disk.flush().unwrap();
                }
                drop(disk);
                let image = image.lock().unwrap().clone();
                expect_snapshots(&image, &before, &contents, what);
            },
        );
    }
}

pub fn taking_a_snapshot(run: &mut Run) {
    snapshot_operation(
        run,
        |disk| disk.create_snapshot(b"new"),
        |before, _| before.to_vec(),
    );
}

pub fn applying_a_snapshot(run: &mut Run) {
    snapshot_operation(
        run,
        |disk| disk.apply_snapshot(b"s0"),
        |_, contents| contents[0].clone(),
    );
}

pub fn deleting_a_snapshot(run: &mut Run) {
    for name in [b"s0", b"s1"] {
        snapshot_operation(
            run,
            |disk| disk.delete_snapshot(name),
            |before, _| before.to_vec(),
        );
    }
}

/// An overlay that has something of its own in some places.
fn overlay(cluster_size: u64) -> Vec<u8> {
    let dir = scratch();
    let (base, path) = (dir.path().join("base"), dir.path().join("image"));
    std::fs::write(&base, vec![7; SIZE]).unwrap();
    let options = CreateOptions {
        size: SIZE as u64,
        cluster_size,
        backing_file: Some("base".into()),
        backing_format: Some(ImageFormat::Raw),
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    fill(&disk, 10_000, 12_000, 9);
    disk.close().unwrap();
    std::fs::read(&path).unwrap()
}

/// A raw disk of bytes that are `byte`.
fn raw(byte: u8) -> Box<dyn Disk> {
    let bytes = Arc::new(Mutex::new(vec![byte; SIZE]));
    let storage = Box::new(Memory::plain(Which::Data, &bytes));
    Box::new(Raw::with_storage(Path::new("base"), storage, true).unwrap())
}

fn open_on(image: Memory, backing: Option<Box<dyn Disk>>) -> Qcow2 {
    let options = OpenOptions::default();
    let (name, backing) = (Path::new("image"), backing.map(Into::into));
    Qcow2::with_backing(name, Box::new(image), None, backing, &options).unwrap()
}

/// The disk reads the same on whatever the header names, at any time.
pub fn rebasing(run: &mut Run) {
    for (seed, cluster_size) in (0..).zip([512, 1024, 4096]) {
        let start = overlay(cluster_size);
        let before = content(&open_on(plain(&start), Some(raw(7))));
        let name = BackingName {
            file: b"other".to_vec(),
            format: b"raw".to_vec(),
        };
        for onto in [Some(&name), None] {
            let other = raw(5);
            let new = match onto {
                Some(_) => NewBacking::Other(&*other),
                None => NewBacking::Nothing,
            };
            let change = |image| {
                let disk = open_on(image, Some(raw(7)));
                disk.rebase(onto, new, false, &mut |_, _| {}).unwrap();
            };
            explore(run, &start, seed, change, |state, what| {
                check(&plain(&state)).unwrap_or_else(|e| panic!("{what}: {e}"));
                let has = |name: &[u8]| state[..512].windows(name.len()).any(|part| part == name);
                let backing = if has(b"other") {
                    Some(raw(5))
                } else {
                    has(b"base").then(|| raw(7))
                };
                let disk = open_on(plain(&state), backing);
                assert!(content(&disk) == before, "{what}: the disk");
            });
        }
    }
}

fn repair(image: &Memory) -> u64 {
    let found = &mut |_: Finding| ();
    let report = check_storage(Path::new("image"), image, None, Repair::All, found);
    let report = report.unwrap();
    report.corruptions + report.check_errors
}

/// A repair that was cut off can be repeated, and the disk holds what it held.
pub fn repairing(run: &mut Run) {
    for seed in 0..24 {
        let cluster_size = [512, 4096][seed as usize % 2];
        let (mut start, before, _) = image_with_snapshots(3, cluster_size, More::Nothing);
        damage(&mut start, cluster_size as usize, &mut Random(seed));
        let repaired = explore(
            run,
            &start,
            seed,
            |image| assert_eq!(repair(&image), 0),
            |state, what| {
                let image = Arc::new(Mutex::new(state));
                assert_eq!(repair(&Memory::plain(Which::Image, &image)), 0, "{what}");
                let image = image.lock().unwrap().clone();
                let (shown, _) = reopened(image, what);
                assert!(shown == before, "{what}: the disk");
            },
        );
        // What has returned is done.
        check(&plain(&repaired)).unwrap();
        assert_eq!(repaired[DIRTY] & 1, 0);
    }
}

/// Offset of the byte with the bit that says that refcounts may be wrong.
const DIRTY: usize = 79;

/// Makes some refcounts and flags wrong, or loses the refcount table.
fn damage(image: &mut [u8], cluster_size: usize, random: &mut Random) {
    let word = |image: &[u8], at: usize| {
        let entry = u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
        (entry & 0x00ff_ffff_ffff_fe00) as usize
    };
    let (l1, refcount_table) = (word(image, 40), word(image, 48));
    let block = word(image, refcount_table);
    let clusters = (image.len() / cluster_size) as u64;
    for _ in 0..8 {
        let count = block + 2 * random.below(clusters) as usize;
        image[count..count + 2].copy_from_slice(&(random.below(4) as u16).to_be_bytes());
    }
    image[l1] ^= 0x80;
    if random.below(3) == 0 {
        image[refcount_table..refcount_table + 8].fill(0);
    }
    image[DIRTY] |= random.below(2) as u8;
}

/// Offset of the byte with the autoclear bit that says that bitmaps are valid.
const AUTOCLEAR: usize = 95;
/// Bytes of the disk that a bit of the bitmap stands for.
const GRANULARITY: usize = 512;

/// Adds a persistent bitmap, which follows changes, to the image at `path`.
pub fn add_bitmap(path: &Path) {
    let add = Command::new("qemu-img")
        .args(["bitmap", "--add", "-g", "512"])
        .arg(path)
        .arg("changes")
        .output()
        .unwrap();
    assert!(add.status.success(), "{add:?}");
}

/// An image with a persistent bitmap.
fn image_with_bitmap() -> Vec<u8> {
    let dir = scratch();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: SIZE as u64,
        cluster_size: 4096,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    // What has its place is changed there, as soon as it is written.
    fill(
        &Qcow2::open(&path, &OpenOptions::default()).unwrap(),
        0,
        SIZE,
        7,
    );
    add_bitmap(&path);
    std::fs::read(&path).unwrap()
}

/// The bits of the only bitmap, unless it is marked as in use.
fn bits(image: &[u8]) -> Option<Stored> {
    let [stored] = &bitmap::stored(image)[..] else {
        panic!("there is one bitmap");
    };
    stored.bits.is_some().then(|| stored.clone())
}

/// There is a bit for everything that is not as it was `before`.
fn expect_marked(bits: &Stored, before: &[u8], now: &[u8], what: &str) {
    let sectors = now.chunks(GRANULARITY).zip(before.chunks(GRANULARITY));
    for (i, (now, before)) in sectors.enumerate() {
        let is_marked = bits.has((i * GRANULARITY) as u64).unwrap();
        assert!(is_marked || now == before, "{what}: sector {i}");
    }
}

/// A bitmap that is not marked has a bit for everything that is not as it was.
pub fn following_changes_in_a_bitmap(run: &mut Run) {
    for seed in 0..6 {
        let start = image_with_bitmap();
        let before = content(&open(plain(&start)).unwrap());
        let mut clean = 0;
        let writes = |image| {
            let disk = open(image).unwrap();
            fill(&disk, 5000, 9000, 1);
            disk.flush().unwrap();
            fill(&disk, 40_000, 3000, 2);
            drop(disk);
        };
        explore(run, &start, seed, writes, |state, what| {
            check(&plain(&state)).unwrap_or_else(|e| panic!("{what}: {e}"));
            let Some(bits) = bits(&state) else {
                return;
            };
            clean += 1;
            let disk = open(plain(&state)).unwrap_or_else(|e| panic!("{what}: {e}"));
            expect_marked(&bits, &before, &content(&disk), what);
        });
        assert!(clean > 0);
    }
}

/// The bitmaps of `image`, none of which is marked as in use.
fn stored(image: &[u8]) -> Vec<Stored> {
    let stored = bitmap::stored(image);
    assert!(stored.iter().all(|one| one.bits.is_some()));
    stored
}

/// Whatever a failure leaves, there are the bitmaps of before or after, or none for a moment.
pub fn changing_bitmaps(run: &mut Run) {
    type Change = fn(&mut BitmapEditor);
    let changes: [Change; 5] = [
        |editor| editor.add(b"new", Some(512)).unwrap(),
        |editor| {
            editor.add(b"other", None).unwrap();
            editor.add(b"all", Some(512)).unwrap();
            editor.merge(b"all", b"new").unwrap();
            editor.clear(b"new").unwrap();
            editor.set_enabled(b"all", false).unwrap();
        },
        |editor| editor.remove(b"new").unwrap(),
        |editor| editor.set_enabled(b"all", true).unwrap(),
        |editor| {
            editor.remove(b"other").unwrap();
            editor.remove(b"all").unwrap();
        },
    ];
    for (seed, cluster_size) in [(1, 512), (2, 8192)] {
        let dir = scratch();
        let path = dir.path().join("image");
        let options = CreateOptions {
            size: SIZE as u64,
            cluster_size,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        let mut image = std::fs::read(&path).unwrap();
        for (i, change) in changes.iter().enumerate() {
            let edit = |image| {
                let disk = open(image).unwrap();
                if i == 1 {
                    fill(&disk, 5000, 9000, 1);
                }
                let mut editor = BitmapEditor::new(disk).unwrap();
                change(&mut editor);
                editor.commit().unwrap();
            };
            let whole = Arc::new(Mutex::new(image.clone()));
            edit(Memory::plain(Which::Image, &whole));
            let whole = whole.lock().unwrap().clone();
            if i != 1 {
                let possible = [stored(&image), stored(&whole), Vec::new()];
                explore(run, &image, seed, edit, |state, what| {
                    check(&plain(&state)).unwrap_or_else(|e| panic!("{what}: {e}"));
                    assert!(possible.contains(&stored(&state)), "{what}");
                });
            }
            check(&plain(&whole)).unwrap();
            image = whole;
            match i {
                1 => assert!(
                    stored(&image)
                        .iter()
                        .any(|one| !one.auto && one.has(5000) == Some(true))
                ),
                4 => assert_eq!(stored(&image), []),
                _ => assert!(!stored(&image).is_empty()),
            }
        }
    }
}

/// A write that needs another block of refcounts, which is linked before the mapping is written.
pub fn linking_refcount_blocks(run: &mut Run) {
    let dir = scratch();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: 160 << 10,
        cluster_size: 512,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    // The first block counts 256 clusters.
    fill(&disk, 0, 110 << 10, 7);
    disk.close().unwrap();
    drop(disk);
    let start = std::fs::read(&path).unwrap();
    let before = content(&open(plain(&start)).unwrap());
    let mut after = before.clone();
    after[110 << 10..150 << 10].fill(9);
    for (seed, ()) in run.rounds([()]) {
        let write = |image| {
            let disk = open(image).unwrap();
            fill(&disk, 110 << 10, 40 << 10, 9);
            disk.close().unwrap();
        };
        explore(run, &start, seed, write, |state, what| {
            check(&plain(&state)).unwrap_or_else(|e| panic!("{what}: {e}"));
            let shown = content(&open(plain(&state)).unwrap_or_else(|e| panic!("{what}: {e}")));
            expect_content(&shown, &before, &after, what);
        });
    }
}
