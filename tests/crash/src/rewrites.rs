//! Power failures while the header of an image is rewritten, and while a disk grows with space for what
//! it gains.
//!
//! Whatever was on disk, the header says what it said before the operation or what it says after it,
//! `check` finds leaks at most, the disk reads the same but for what was written and not flushed, and
//! the operation can be repeated.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;
use std::sync::{Arc, Mutex};

use tandem_block::qcow2::{
    AmendOptions, BackingName, CreateOptions, NewBacking, OpenOptions, Qcow2, create,
    set_backing_name,
};
use tandem_block::{Disk, FileOptions, ImageFormat, Preallocation, Raw, Result};

use crate::judge::check_with;
use crate::operations::{More, add_bitmap, content, fill, image_with_snapshots};
use crate::power::{Files, Run};
use crate::setup::{Kind, Setup, scratch};
use crate::storage::{Memory, SECTOR, Which};

pub(crate) const SIZE: usize = 60 << 10;

/// What a header says, but for the places of tables.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Said {
    version: u32,
    backing_file: Option<Vec<u8>>,
    features: [u64; 3],
    refcount_order: u32,
    /// Without feature names.
    extensions: Vec<(u32, Vec<u8>)>,
}

/// Reads a header as the specification describes it.
fn said(image: &[u8]) -> Said {
    let word = |at: usize| u32::from_be_bytes(image[at..at + 4].try_into().unwrap());
    let long = |at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap());
    assert_eq!(word(0), 0x5146_49fb);
    let version = word(4);
    let cluster_size = 1 << word(20);
    let (name, name_len) = (long(8) as usize, word(16) as usize);
    let end = if name == 0 { cluster_size } else { name };
    let v3 = version == 3;
    let mut at = if v3 { word(100) as usize } else { 72 };
    let mut extensions = Vec::new();
    while at < end && word(at) != 0 {
        let data = at + 8..at + 8 + word(at + 4) as usize;
        assert!(data.end <= end, "an extension that is too long");
        if word(at) != 0x6803_f857 {
            extensions.push((word(at), image[data.clone()].to_vec()));
        }
        at = data.end.next_multiple_of(8);
    }
    assert!(name + name_len <= cluster_size);
    Said {
        version,
        backing_file: (name != 0).then(|| image[name..name + name_len].to_vec()),
        features: [72, 80, 88].map(|at| if v3 { long(at) } else { 0 }),
        refcount_order: if v3 { word(96) } else { 4 },
        extensions,
    }
}

pub(crate) fn memory(which: Which, bytes: &[u8]) -> Memory {
    Memory::plain(which, &Arc::new(Mutex::new(bytes.to_vec())))
}

/// A raw disk of bytes that are `byte`.
pub(crate) fn raw(byte: u8) -> Box<dyn Disk> {
    let storage = Box::new(memory(Which::Data, &[byte; SIZE]));
    Box::new(Raw::with_storage(Path::new("base"), storage, true).unwrap())
}

/// Opens an image on what its header names: a name that ends in `base` is that of a disk of sevens.
fn open(image: Memory, data: Memory) -> Qcow2 {
    let mut cluster = vec![0; 1 << 16];
    tandem_block::Storage::read_bytes_at(&image, &mut cluster, 0).unwrap();
    let said = said(&cluster);
    let backing = said.backing_file.map(|name| match name.ends_with(b"base") {
        true => raw(7).into(),
        false => raw(5).into(),
    });
    let has_data_file = said.features[0] & 4 != 0;
    let data = has_data_file.then(|| Box::new(data) as _);
    let options = OpenOptions::default();
    Qcow2::with_backing(Path::new("image"), Box::new(image), data, backing, &options)
        .unwrap_or_else(|e| panic!("does not open: {e}"))
}

fn open_files(files: &Files) -> Qcow2 {
    let data = memory(Which::Data, &files.data);
    open(memory(Which::Image, &files.image), data)
}

pub(crate) fn check(files: &Files, what: &str) {
    let [image, data] = [
        memory(Which::Image, &files.image),
        memory(Which::Data, &files.data),
    ];
    let has_data_file = said(&files.image).features[0] & 4 != 0;
    let checked = check_with(&image, has_data_file.then_some(&data));
    checked.unwrap_or_else(|e| panic!("{what}: {e}"));
}

/// The disk has one of the two sizes, and each sector is as in one of the two contents. What a smaller
/// one does not have was, or is going to be, zero.
pub(crate) fn expect_content(shown: &[u8], before: &[u8], after: &[u8], what: &str) {
    let sizes = [before.len(), after.len()];
    assert!(
        sizes.contains(&shown.len()),
        "{what}: {} bytes",
        shown.len()
    );
    let zeros = [0; SECTOR];
    let sector = |content: &'_ [u8], i: usize| -> [u8; SECTOR] {
        let bytes = content.get(i * SECTOR..(i + 1) * SECTOR).unwrap_or(&zeros);
        bytes.try_into().unwrap()
    };
    for (i, bytes) in shown.chunks(SECTOR).enumerate() {
        let possible = [sector(before, i), sector(after, i)];
        assert!(
            possible.iter().any(|one| one == bytes),
            "{what}: sector {i}"
        );
    }
}

/// Power fails at any point of `change`, which first writes something that it does not flush.
fn rewriting(
    run: &mut Run,
    name: &str,
    seed: u64,
    start: &Files,
    change: impl Fn(Qcow2) -> Result<()>,
) {
    let perform = |image: Memory, data: Memory| {
        let disk = open(image, data);
        fill(&disk, 5000, 9000, 0xee);
        change(disk).unwrap_or_else(|e| panic!("{name}: {e}"));
    };
    let completed = |files: &Files| {
        let [image, data] =
            [&files.image, &files.data].map(|bytes| Arc::new(Mutex::new(bytes.clone())));
        perform(
            Memory::plain(Which::Image, &image),
            Memory::plain(Which::Data, &data),
        );
        let files = [image, data].map(|bytes| bytes.lock().unwrap().clone());
        let [image, data] = files;
        Files { image, data }
    };
    let whole = completed(start);
    check(&whole, name);
    let before = (said(&start.image), content(&open_files(start)));
    let after = (said(&whole.image), content(&open_files(&whole)));
    let mut seen = BTreeSet::new();
    let synced = run.explore(start, seed, perform, |state, what| {
        let what = &format!("{name}, {what}");
        check(&state, what);
        let said = said(&state.image);
        assert!(said == before.0 || said == after.0, "{what}: {said:?}");
        let shown = content(&open_files(&state));
        expect_content(&shown, &before.1, &after.1, what);
        if said.features[2] & 2 != 0 {
            assert!(state.data.starts_with(&shown), "{what}: the raw file");
        }
        if seen.insert(said) {
            // Once for each header is enough: opening and writing are tried elsewhere.
            let repeated = completed(&state);
            check(&repeated, what);
            assert_eq!(self::said(&repeated.image), after.0, "{what}: repeated");
            assert!(
                content(&open_files(&repeated)) == after.1,
                "{what}: repeated"
            );
        }
    });
    // What has returned is done.
    assert_eq!(said(&synced.image), after.0, "{name}");
    assert!(content(&open_files(&synced)) == after.1, "{name}");
}

/// A name of `len` bytes for the file that is called `end`.
pub(crate) fn name(len: usize, end: &str) -> Vec<u8> {
    let mut name = vec![b'/'; len - end.len() - 1];
    name.insert(0, b'.');
    name.extend(end.as_bytes());
    name
}

/// An image with data in some places, zeros in others and nothing elsewhere, on a disk of sevens whose
/// name has `backing` bytes if it is on any.
pub(crate) fn image(version: u32, cluster_size: u64, backing: Option<usize>) -> Files {
    let dir = scratch();
    let path = dir.path().join("image");
    std::fs::write(dir.path().join("base"), vec![7; SIZE]).unwrap();
    let options = CreateOptions {
        size: SIZE as u64,
        version,
        cluster_size,
        backing_file: backing.map(|_| "base".into()),
        backing_format: backing.map(|_| ImageFormat::Raw),
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    if let Some(len) = backing {
        let name = BackingName {
            file: name(len, "base"),
            format: b"raw".to_vec(),
        };
        set_backing_name(&path, Some(&name), FileOptions::default()).unwrap();
    }
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    fill(&disk, 10_000, 12_000, 9);
    disk.write_zeroes(16 << 10, 8 << 10, false).unwrap();
    disk.write_zeroes(40 << 10, 10_000, true).unwrap();
    drop(disk);
    Files {
        image: std::fs::read(&path).unwrap(),
        data: Vec::new(),
    }
}

/// An image of `setup` with something in it.
fn filled(setup: &Setup) -> Files {
    let [image, data] = setup.files().shared();
    let disk = open(
        Memory::plain(Which::Image, &image),
        Memory::plain(Which::Data, &data),
    );
    fill(&disk, 3000, 24_000, 9);
    drop(disk);
    let [image, data] = [image, data].map(|bytes| bytes.lock().unwrap().clone());
    Files { image, data }
}

/// Lengths of the names of backing files before and after, each with clusters that have room for both.
const NAMES: [(u64, usize, usize); 8] = [
    (512, 8, 12),
    (1024, 8, 700),
    (2048, 700, 300),
    (4096, 900, 901),
    (4096, 8, 1023),
    (8192, 1023, 8),
    (8192, 60, 600),
    (65536, 600, 600),
];

/// The disk reads the same on what the header names, whatever it is.
pub fn other_backing_files(run: &mut Run) {
    for (seed, (cluster_size, from, to)) in run.rounds(NAMES) {
        let start = image(3, cluster_size, Some(from));
        let other = BackingName {
            file: name(to, "other"),
            format: b"raw".to_vec(),
        };
        let change = |disk: Qcow2| {
            let new = raw(5);
            disk.rebase(
                Some(&other),
                NewBacking::Other(&*new),
                false,
                &mut |_, _| {},
            )
        };
        let what = format!("rebase {cluster_size} {from} {to}");
        rewriting(run, &what, seed, &start, change);
        let change = |disk: Qcow2| disk.rebase(None, NewBacking::Nothing, false, &mut |_, _| {});
        rewriting(run, &format!("{what} to nothing"), seed, &start, change);

        // The name alone, of what shows the same; the first one comes without a format, too.
        let other = BackingName {
            file: name(to, "base"),
            format: b"host_device".to_vec(),
        };
        let change = |disk: Qcow2| disk.set_backing_name(Some(&other));
        rewriting(run, &format!("{what} unsafe"), seed, &start, change);
        let start = image(2, cluster_size, Some(from));
        rewriting(run, &format!("{what} unsafe, 2"), seed, &start, change);
    }
}

/// Bitmaps and extensions that are not known stay with the header.
pub fn more_in_the_header(run: &mut Run) {
    for (seed, cluster_size) in run.rounds([4096, 8192]) {
        let dir = scratch();
        let path = dir.path().join("image");
        std::fs::write(&path, image(3, cluster_size, None).image).unwrap();
        add_bitmap(&path);
        let name = BackingName {
            file: name(700, "base"),
            format: b"raw".to_vec(),
        };
        set_backing_name(&path, Some(&name), FileOptions::default()).unwrap();
        let start = Files {
            image: std::fs::read(&path).unwrap(),
            data: Vec::new(),
        };
        assert_eq!(said(&start.image).extensions.len(), 2);
        let change = |disk: Qcow2| disk.set_backing_name(None);
        // What the bitmap says is tried elsewhere; here it is where it was.
        rewriting(run, "with a bitmap", seed, &start, change);
    }
}

fn amend(options: AmendOptions) -> impl Fn(Qcow2) -> Result<()> {
    move |disk| disk.amend(&options, &mut |_, _| {})
}

pub fn amending_a_data_file(run: &mut Run) {
    let lengths = [(512, 300), (4096, 900), (4096, 1800), (8192, 900)];
    for (seed, (cluster_size, len)) in run.rounds(lengths) {
        for kind in [Kind::External, Kind::Raw, Kind::Packed] {
            let start = filled(&Setup::new(kind, 3, cluster_size));
            let named = |len: usize| AmendOptions {
                data_file: Some(OsStr::from_bytes(&name(len, "data")).into()),
                ..AmendOptions::default()
            };
            let what = format!("data file, {kind:?} {cluster_size} {len}");
            rewriting(run, &what, seed, &start, amend(named(len)));
            let longer = filled_with_name(&start, named(len));
            let back = amend(AmendOptions {
                data_file: Some("".into()),
                lazy_refcounts: Some(true),
                ..AmendOptions::default()
            });
            rewriting(run, &format!("{what}, none"), seed, &longer, back);
            let all = amend(AmendOptions {
                data_file_raw: Some(false),
                refcount_bits: Some(32),
                size: Some(100 << 10),
                ..named(len - 10)
            });
            rewriting(run, &format!("{what}, more"), seed, &longer, all);
        }
    }
}

/// `start`, amended.
fn filled_with_name(start: &Files, options: AmendOptions) -> Files {
    let image = Arc::new(Mutex::new(start.image.clone()));
    let disk = open(
        Memory::plain(Which::Image, &image),
        memory(Which::Data, &start.data),
    );
    disk.amend(&options, &mut |_, _| {}).unwrap();
    let image = image.lock().unwrap().clone();
    Files {
        image,
        data: start.data.clone(),
    }
}

/// Removes from the entries of snapshots what version 3 asks for.
fn drop_extra_data(image: &mut [u8]) {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |n, byte| n << 8 | usize::from(*byte));
    let count = number(&image[60..64]);
    let table = number(&image[64..72]);
    let (mut from, mut to) = (table, table);
    for _ in 0..count {
        let [id, name] = [12, 14].map(|at| number(&image[from + at..from + at + 2]));
        let extra = number(&image[from + 36..from + 40]);
        let names = from + 40 + extra..from + 40 + extra + id + name;
        let next = names.end.next_multiple_of(8);
        image.copy_within(from..from + 36, to);
        image[to + 36..to + 40].fill(0);
        image.copy_within(names, to + 40);
        to = (to + 40 + id + name).next_multiple_of(8);
        from = next;
    }
}

pub fn amending_an_image(run: &mut Run) {
    let options = AmendOptions::default;
    let raised = || AmendOptions {
        version: Some(3),
        ..options()
    };
    let lowered = || AmendOptions {
        version: Some(2),
        ..options()
    };
    let bits = |bits| AmendOptions {
        refcount_bits: Some(bits),
        ..options()
    };
    let size = |size| AmendOptions {
        size: Some(size),
        ..options()
    };
    let lazy = AmendOptions {
        lazy_refcounts: Some(true),
        ..options()
    };
    let all = AmendOptions {
        version: Some(3),
        lazy_refcounts: Some(true),
        refcount_bits: Some(64),
        size: Some(100 << 10),
        ..options()
    };
    let shrunk = AmendOptions {
        size: Some(20 << 10),
        ..lowered()
    };
    let cases = [
        (2, raised()),
        (3, lowered()),
        (3, bits(1)),
        (3, bits(64)),
        (3, lazy),
        (3, size(20 << 10)),
        (3, size(300 << 10)),
        (2, all),
        (3, shrunk),
    ];
    for (seed, (version, options)) in run.rounds(cases) {
        for (cluster_size, backing) in [
            (512, None),
            (512, Some(300)),
            (4096, None),
            (4096, Some(700)),
        ] {
            let start = image(version, cluster_size, backing);
            let what = format!("{cluster_size} {backing:?} {options:?}");
            rewriting(run, &what, seed, &start, amend(options.clone()));
        }
    }
    for (seed, cluster_size) in run.rounds([512, 4096]) {
        let (mut image, _, _) = image_with_snapshots(2, cluster_size, More::Nothing);
        drop_extra_data(&mut image);
        let start = Files {
            image,
            data: Vec::new(),
        };
        for options in [
            raised(),
            AmendOptions {
                refcount_bits: Some(8),
                ..raised()
            },
        ] {
            rewriting(run, "snapshots", seed, &start, amend(options));
        }
    }
    let start = shared_zeros();
    rewriting(run, "shared zeros", 0, &start, amend(lowered()));
}

/// An image that has zeros by a flag in clusters of data that a snapshot has too, as QEMU leaves them.
fn shared_zeros() -> Files {
    let dir = scratch();
    let path = dir.path().join("image");
    let (image, _, _) = image_with_snapshots(3, 4096, More::Nothing);
    std::fs::write(&path, image).unwrap();
    let written = Command::new("qemu-io")
        .args(["-f", "qcow2", "-c", "write -z 0 16k"])
        .arg(&path)
        .output()
        .unwrap();
    assert!(written.status.success(), "{written:?}");
    Files {
        image: std::fs::read(&path).unwrap(),
        data: Vec::new(),
    }
}

/// The disk has the old size or the new one, and reads as zero where it has grown.
pub fn growing_with_space(run: &mut Run) {
    let kinds = [Kind::Internal, Kind::External, Kind::Packed, Kind::Raw];
    for (seed, (kind, cluster_size)) in run.rounds(
        [512, 4096]
            .into_iter()
            .flat_map(|size| kinds.map(|kind| (kind, size))),
    ) {
        let setup = Setup::new(kind, 3, cluster_size);
        let start = filled(&setup);
        for preallocation in [
            Preallocation::Metadata,
            Preallocation::Falloc,
            Preallocation::Full,
        ] {
            let change = |disk: Qcow2| {
                let size = setup.size() + setup.cluster_size * 9 + 512;
                disk.resize_preallocated(size, preallocation)?;
                disk.close()
            };
            let what = format!("{kind:?} {cluster_size} {preallocation:?}");
            rewriting(run, &what, seed, &start, change);
        }
    }
}

/// A shrink that power has interrupted leaves what was behind the end; a disk that grows afterwards does
/// not show it.
pub fn growing_after_an_interrupted_shrink(run: &mut Run) {
    const LESS: u64 = (20 << 10) + 512;
    let kinds = [Kind::Internal, Kind::External, Kind::Packed];
    let all = [512, 4096, 8192].into_iter();
    for (seed, (kind, cluster_size)) in
        run.rounds(all.flat_map(|size| kinds.map(|kind| (kind, size))))
    {
        let mut start = filled(&Setup::new(kind, 3, cluster_size));
        if kind == Kind::Internal && cluster_size == 4096 {
            compress_at(&mut start, LESS / cluster_size * cluster_size);
        }
        let size = start.image[24..32].to_vec();
        start.image[24..32].copy_from_slice(&LESS.to_be_bytes());
        let change = |disk: Qcow2| {
            disk.resize(u64::from_be_bytes(size[..].try_into().unwrap()))?;
            disk.close()
        };
        let what = format!("after a shrink, {kind:?} {cluster_size}");
        rewriting(run, &what, seed, &start, change);
    }
}

/// The cluster at `offset` is compressed.
fn compress_at(files: &mut Files, offset: u64) {
    let [image, data] = files.shared();
    let disk = open(
        Memory::plain(Which::Image, &image),
        Memory::plain(Which::Data, &data),
    );
    let cluster = disk
        .compress(vec![9; disk.cluster_size() as usize])
        .unwrap();
    disk.write_compressed(cluster, offset).unwrap();
    drop(disk);
    *files = Files::of(&image, &data);
}

/// A raw disk has one of its sizes, and the last one when that has been made; what it gains is zero.
pub fn resizing_a_raw_disk(run: &mut Run) {
    let start = Files {
        image: Vec::new(),
        data: vec![7; SIZE],
    };
    let sizes = [SIZE, SIZE + 5120, SIZE / 2];
    let resize = |_, data| {
        let disk = Raw::with_storage(Path::new("raw"), Box::new(data), false).unwrap();
        for size in sizes {
            disk.resize(size as u64).unwrap();
        }
    };
    let synced = run.explore(&start, 0, resize, |state, what| {
        let data = state.data;
        assert!(sizes.contains(&data.len()), "{what}: {}", data.len());
        let has = |(i, byte): (usize, &u8)| *byte == if i < SIZE { 7 } else { 0 };
        assert!(data.iter().enumerate().all(has), "{what}");
    });
    assert_eq!(synced.data.len(), SIZE / 2);
}
