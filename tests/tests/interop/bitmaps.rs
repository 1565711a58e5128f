//! Persistent bitmaps, made by QEMU, kept up to date by us and by QEMU, and read by QEMU.

use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use std::{fs, io, thread};

use proptest::prelude::*;
use tandem_block::qcow2::{Info, OpenOptions, Qcow2};
use tandem_block::{Disk, Error, FileStorage, Storage};
use vm_memory::VolatileSlice;

use crate::qemu::{Image, Kind, at_once, command, write};

pub const KINDS: [Kind; 3] = [Kind::Internal, Kind::External, Kind::Raw];
pub const SIZE: u64 = (8 << 20) + 1536;

/// An image with bitmaps of two granularities that follow changes, and one that does not.
fn image(kind: Kind) -> Image {
    image_of(kind, SIZE)
}

/// As [`image`], of a disk of `size` bytes.
fn image_of(kind: Kind, size: u64) -> Image {
    let image = Image::create(kind, 65536, size);
    image.qemu_io(&["write -P 1 0 1M".to_owned()]);
    for args in [
        &["bitmap", "--add", "-g", "65536"][..],
        &["bitmap", "--add", "-g", "4096"],
        &["bitmap", "--add", "--disable"],
    ] {
        let name = args.last().map_or("", |last| match *last {
            "65536" => "coarse",
            "4096" => "fine",
            _ => "off",
        });
        image.qemu_img(args, &[name]);
    }
    image
}

/// The dirty parts of a bitmap as QEMU reads it: start and end in bytes.
pub fn dirty(image: &Image, name: &str) -> Vec<(u64, u64)> {
    let socket = image.path().with_file_name("nbd.sock");
    let path = image.path();
    let mut server = Server::start(&[
        "-r",
        "-f",
        "qcow2",
        "-B",
        name,
        "-k",
        socket.to_str().unwrap(),
        path.to_str().unwrap(),
    ]);
    let source = format!(
        "driver=nbd,server.type=unix,server.path={},x-dirty-bitmap=qemu:dirty-bitmap:{name}",
        socket.display()
    );
    // What asks too early has to be started again.
    while !socket.exists() {
        assert!(server.0.try_wait().unwrap().is_none());
        thread::sleep(Duration::from_millis(1));
    }
    let map = loop {
        let map = command(
            "qemu-img",
            &["map", "--output=json", "--image-opts", &source],
        );
        if map.status.success() {
            break map;
        }
        assert!(server.0.try_wait().unwrap().is_none(), "{map:?}");
    };
    drop(server);
    // It is left if the server was stopped before it had ended by itself.
    drop(fs::remove_file(&socket));
    let map: Vec<serde_json::Value> = serde_json::from_slice(&map.stdout).unwrap();
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    // What is dirty is shown as a hole.
    for extent in map.iter().filter(|extent| extent["data"] == false) {
        let start = extent["start"].as_u64().unwrap();
        let end = start + extent["length"].as_u64().unwrap();
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

/// A running `qemu-nbd`.
struct Server(Child);

impl Server {
    fn start(args: &[&str]) -> Self {
        let server = Command::new("qemu-nbd")
            .args(args)
            .stderr(Stdio::null())
            .spawn();
        Self(server.unwrap())
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

/// The dirty parts of a disk of `size` bytes after `changes`, at a granularity.
pub fn expected(size: u64, changes: &[(u64, u64)], granularity: u64) -> Vec<(u64, u64)> {
    let mut ranges: Vec<(u64, u64)> = Vec::new();
    for bit in 0..size.div_ceil(granularity) {
        let (start, end) = (bit * granularity, size.min((bit + 1) * granularity));
        if !changes
            .iter()
            .any(|(at, len)| at + len > start && *at < end)
        {
            continue;
        }
        match ranges.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => ranges.push((start, end)),
        }
    }
    ranges
}

fn expect(image: &Image, size: u64, changes: &[(u64, u64)]) {
    image.check();
    assert_eq!(
        dirty(image, "coarse"),
        expected(size, changes, 65536),
        "coarse"
    );
    assert_eq!(dirty(image, "fine"), expected(size, changes, 4096), "fine");
    assert_eq!(dirty(image, "off"), [], "off");
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    ByQemu(u64, u64),
    Flush,
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<Op>> {
    let sectors = SIZE / 512;
    let range =
        (0..sectors, 1..300u64).prop_map(move |(at, len)| (at * 512, len.min(sectors - at) * 512));
    let op = prop_oneof![
        4 => range.clone().prop_map(|(at, len)| Op::Write(at, len)),
        1 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero(at, len, unmap)),
        1 => range.clone().prop_map(|(at, len)| Op::Discard(at, len)),
        1 => range.prop_map(|(at, len)| Op::ByQemu(at, len)),
        1 => Just(Op::Flush),
        2 => Just(Op::Reopen),
    ];
    proptest::collection::vec(op, 1..12)
}

fn run(kind: Kind, ops: &[Op]) {
    let image = image(kind);
    let mut disk = None;
    let mut changes = Vec::new();
    for op in ops {
        let open = disk.get_or_insert_with(|| image.open().unwrap());
        match *op {
            Op::Write(at, len) => write(open, at, len as usize, 3),
            Op::Zero(at, len, unmap) => open.write_zeroes(at, len, unmap).unwrap(),
            Op::Discard(at, len) => open.discard(at, len).unwrap(),
            Op::ByQemu(at, len) => {
                disk = None;
                image.qemu_io(&[format!("write {at} {len}")]);
            }
            Op::Flush => open.flush().unwrap(),
            Op::Reopen => disk = None,
        }
        match *op {
            Op::Write(at, len)
            | Op::Zero(at, len, _)
            | Op::Discard(at, len)
            | Op::ByQemu(at, len) => changes.push((at, len)),
            Op::Flush | Op::Reopen => {}
        }
    }
    drop(disk);
    expect(&image, SIZE, &changes);
    let bytes = fs::read(image.path()).unwrap();
    let raw = if kind == Kind::Raw { 2 } else { 0 };
    assert_eq!(bytes[95], 1 | raw, "autoclear features");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 6, failure_persistence: None, ..Default::default() })]

    #[test]
    fn changes_are_followed(ops in ops()) {
        at_once(KINDS, |kind| run(kind, &ops));
    }
}

/// The bytes of the files of an image.
fn files(image: &Image) -> (Vec<u8>, Option<Vec<u8>>) {
    (
        fs::read(image.path()).unwrap(),
        fs::read(image.data_file()).ok(),
    )
}

#[test]
fn an_image_that_is_not_written_stays_as_it_is() {
    for kind in KINDS {
        let image = image(kind);
        let before = files(&image);
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        drop(Qcow2::open(&image.path(), &read_only).unwrap());
        let disk = image.open().unwrap();
        disk.flush().unwrap();
        drop(disk);
        assert!(files(&image) == before, "{kind:?}");
    }
}

/// Names of the bitmaps that are marked as in use.
fn in_use(image: &Image) -> Vec<String> {
    let info = Info::read_with(&image.path(), tandem_block::Locking::Off).unwrap();
    let marked = info.bitmaps.into_iter().filter(|bitmap| bitmap.in_use);
    marked
        .map(|bitmap| String::from_utf8(bitmap.name).unwrap())
        .collect()
}

/// From the first change on, until the image is closed, the bitmaps are marked, and stay so after a
/// crash: later writers leave them alone.
#[test]
fn a_crash_leaves_marks() {
    for kind in KINDS {
        let image = image(kind);
        let disk = image.open().unwrap();
        assert!(in_use(&image).is_empty());
        write(&disk, 5 << 20, 512, 3);
        disk.flush().unwrap();
        assert_eq!(in_use(&image), ["coarse", "fine", "off"]);
        let crashed = files(&image);
        drop(disk);
        assert!(in_use(&image).is_empty());

        fs::write(image.path(), &crashed.0).unwrap();
        image.check();
        let disk = image.open().unwrap();
        write(&disk, 6 << 20, 512, 3);
        drop(disk);
        assert_eq!(in_use(&image), ["coarse", "fine", "off"]);
        image.check();
        let error = image.open().unwrap().resize(SIZE + (1 << 20)).unwrap_err();
        assert!(error.to_string().contains("inconsistent"), "{error}");
        image.qemu_img(&["bitmap", "--remove"], &["fine"]);
    }
}

#[test]
fn bitmaps_follow_the_size_of_the_disk() {
    for kind in KINDS {
        let image = image(kind);
        let disk = image.open().unwrap();
        write(&disk, 7 << 20, 1 << 20, 3);
        disk.resize(40 << 20).unwrap();
        write(&disk, 39 << 20, 4096, 3);
        drop(disk);
        // What a disk gains is marked: a copy from before a shrink has something else there.
        let mut changes = vec![(7 << 20, 1 << 20), (SIZE, (40 << 20) - SIZE)];
        expect(&image, 40 << 20, &changes);

        let disk = image.open().unwrap();
        disk.resize(5 << 20).unwrap();
        disk.resize(60 << 20).unwrap();
        drop(disk);
        changes = vec![(5 << 20, 55 << 20)];
        expect(&image, 60 << 20, &changes);
        image.qemu_img(&["resize", "-q"], &["70M"]);
        expect(&image, 70 << 20, &changes);
    }
}

/// Nobody knows what an applied snapshot changes: everything is marked.
#[test]
fn an_applied_snapshot_changes_everything() {
    let image = image(Kind::Internal);
    image.open().unwrap().create_snapshot(b"s").unwrap();
    expect(&image, SIZE, &[]);
    image.open().unwrap().apply_snapshot(b"s").unwrap();
    expect(&image, SIZE, &[(0, SIZE)]);
}

/// Where the header extension and the directory are.
fn places(image: &[u8]) -> (usize, usize) {
    let extension = (104..image.len())
        .step_by(8)
        .find(|at| image[*at..at + 8] == [0x23, 0x85, 0x28, 0x75, 0, 0, 0, 24])
        .unwrap();
    let directory = image[extension + 24..extension + 32].try_into().unwrap();
    (extension, u64::from_be_bytes(directory) as usize)
}

#[test]
fn damaged_directories_are_refused() {
    let image = image(Kind::Internal);
    let sound = fs::read(image.path()).unwrap();
    let (extension, directory) = places(&sound);
    let word = |at: usize| u64::from_be_bytes(sound[at..at + 8].try_into().unwrap());
    for (at, bytes, reason) in [
        (extension + 11, &[2][..], "More bitmaps found"),
        (extension + 11, &[4], "Less bitmaps found"),
        (extension + 16, &[0; 8], "directory size is zero"),
        (directory, &[0; 8], "satisfy the constraints"),
        (directory + 6, &[1], "satisfy the constraints"),
        (directory + 8, &[0xff], "satisfy the constraints"),
        (directory + 17, &[8], "satisfy the constraints"),
        (directory + 18, &[0xff], "Broken bitmap directory"),
        (word(directory) as usize + 7, &[2], "not valid"),
    ] {
        let mut damaged = sound.clone();
        damaged[at..at + bytes.len()].copy_from_slice(bytes);
        fs::write(image.path(), &damaged).unwrap();
        let error = image.open().err().unwrap();
        assert!(matches!(error, Error::Invalid { .. }));
        assert!(error.to_string().contains(reason), "{reason}: {error}");
        assert!(fs::read(image.path()).unwrap() == damaged);
    }
}

/// Three bitmaps of 512 MiB each: nothing keeps them in memory while a disk is written.
#[test]
fn bitmaps_cannot_ask_for_endless_memory() {
    let image = image_of(Kind::Internal, 2 << 40);
    let mut bytes = fs::read(image.path()).unwrap();
    let mut at = places(&bytes).1;
    for _ in 0..3 {
        bytes[at + 8..at + 12].copy_from_slice(&8192u32.to_be_bytes());
        bytes[at + 17] = 9;
        let name_len = usize::from(bytes[at + 19]);
        at += (24 + name_len).next_multiple_of(8);
    }
    fs::write(image.path(), &bytes).unwrap();
    let error = image.open().err().unwrap().to_string();
    assert!(error.contains("would keep in memory"), "{error}");
    assert!(fs::read(image.path()).unwrap() == bytes);
    assert_eq!(Info::read(&image.path()).unwrap().bitmaps.len(), 3);
    image.check();
}

#[test]
fn no_disk_grows_until_its_bitmaps_are_too_large() {
    let image = image(Kind::Internal);
    for name in ["a", "b", "c"] {
        image.qemu_img(&["bitmap", "--add", "-g", "512"], &[name]);
    }
    let disk = image.open().unwrap();
    let error = disk.resize(2 << 40).unwrap_err().to_string();
    assert!(error.contains("too large together"), "{error}");
    disk.resize(SIZE + 512).unwrap();
    // QEMU cannot read a bitmap of nothing.
    disk.resize(0).unwrap_err();
    drop(disk);
    image.open().unwrap();
}

/// Tables that would take more than the whole file are not walked.
#[test]
fn tables_of_bitmaps_that_overlap_are_refused() {
    let image = Image::create(Kind::Internal, 512, 1 << 20);
    image.qemu_img(&["bitmap", "--add", "-g", "65536"], &["b"]);
    let mut bytes = fs::read(image.path()).unwrap();
    let at = places(&bytes).1;
    bytes[at + 8..at + 12].copy_from_slice(&(1u32 << 20).to_be_bytes());
    fs::write(image.path(), &bytes).unwrap();
    let error = image.open().err().unwrap().to_string();
    assert!(error.contains("tables of the bitmaps"), "{error}");
}

/// The file whose header cannot be written from some time on.
#[derive(Debug)]
pub struct NoHeader {
    pub file: FileStorage,
    pub fails: Arc<AtomicBool>,
}

impl Storage for NoHeader {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.file.read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.file.write_at(bufs, offset)
    }
    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_bytes_at(buf, offset)
    }
    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        if offset < 65536 && self.fails.load(Ordering::Relaxed) {
            return Err(io::Error::from_raw_os_error(libc::EIO));
        }
        self.file.write_bytes_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.file.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
}

#[test]
fn a_shrink_that_fails_forgets_no_change() {
    let image = image(Kind::Internal);
    let fails = Arc::new(AtomicBool::new(false));
    let storage = NoHeader {
        file: FileStorage::open(&image.path(), false).unwrap(),
        fails: fails.clone(),
    };
    let options = OpenOptions::default();
    let disk = Qcow2::with_storage(&image.path(), Box::new(storage), None, &options).unwrap();
    write(&disk, 7 << 20, 65536, 3);
    fails.store(true, Ordering::Relaxed);
    disk.resize(4 << 20).unwrap_err();
    assert_eq!(disk.size(), SIZE);
    fails.store(false, Ordering::Relaxed);
    disk.close().unwrap();
    expect(&image, SIZE, &[(7 << 20, 65536)]);
}

/// What an image cannot store at the end is told, and marked.
#[test]
fn closing_tells_what_could_not_be_stored() {
    let image = image(Kind::Internal);
    let disk = image.open().unwrap();
    write(&disk, 0, 512, 3);
    disk.close().unwrap();
    disk.close().unwrap();
    assert!(matches!(
        disk.write_zeroes(0, 512, false).unwrap_err(),
        Error::Closed { .. }
    ));
    drop(disk);
    expect(&image, SIZE, &[(0, 512)]);

    // An entry that leads into nowhere is met, and the image marked as corrupt.
    let mut bytes = fs::read(image.path()).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let l2_table = word(word(40) as usize) as usize & 0xffff_fe00;
    bytes[l2_table + 8..l2_table + 16].copy_from_slice(&(1 << 63 | 0x1200u64).to_be_bytes());
    fs::write(image.path(), &bytes).unwrap();
    let disk = image.open().unwrap();
    write(&disk, 5 << 20, 512, 3);
    disk.write_zeroes(65536, 512, false).unwrap_err();
    let marked = fs::metadata(image.path()).unwrap().len();
    assert!(matches!(disk.close().unwrap_err(), Error::Corrupt { .. }));
    drop(disk);
    assert_eq!(in_use(&image), ["coarse", "fine", "off"]);
    assert_eq!(fs::metadata(image.path()).unwrap().len(), marked);
}

/// What is found out last about an image that is refused comes before its first change.
#[test]
fn a_bitmap_that_is_too_small_is_refused_before_anything_changes() {
    let image = Image::create(Kind::Internal, 512, 8 << 20);
    image.qemu_img(&["bitmap", "--add", "-g", "65536"], &["b"]);
    let mut bytes = fs::read(image.path()).unwrap();
    let at = places(&bytes).1;
    bytes[at + 17] = 9;
    // An autoclear bit that nobody knows.
    bytes[88] |= 0x80;
    fs::write(image.path(), &bytes).unwrap();
    let error = image.open().err().unwrap().to_string();
    assert!(error.contains("satisfy the constraints"), "{error}");
    assert!(fs::read(image.path()).unwrap() == bytes);
}

/// The compressed clusters of a disk are changes, too.
#[test]
fn compressed_writes_are_followed() {
    let image = image(Kind::Internal);
    let disk = image.open().unwrap();
    let cluster = disk.compress(vec![7; 65536]).unwrap();
    disk.write_compressed(cluster, 2 << 20).unwrap();
    disk.close().unwrap();
    drop(disk);
    expect(&image, SIZE, &[(2 << 20, 65536)]);
}

/// A bitmap with flags that are not known is left alone; it cannot follow changes, so it is marked.
#[test]
fn unknown_flags() {
    let image = image(Kind::Internal);
    let mut bytes = fs::read(image.path()).unwrap();
    let (_, first) = places(&bytes);
    bytes[first + 13] = 0x80;
    fs::write(image.path(), &bytes).unwrap();
    let disk = image.open().unwrap();
    write(&disk, 0, 512, 3);
    drop(disk);
    assert_eq!(in_use(&image), ["coarse"]);
    let after = fs::read(image.path()).unwrap();
    assert_eq!(after[first..first + 12], bytes[first..first + 12]);
    assert_eq!(after[first + 13], 0x80);
}
