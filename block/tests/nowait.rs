//! Reads and writes that wait for nothing: they make no call on a file that could wait, do what the
//! ordinary ones do, and say so when they could not.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use common::{Memory, assert_clean, new_image, read, write};
use proptest::prelude::*;
use tandem_block::qcow2::{BitmapEditor, CreateOptions, DataFileLayout, OpenOptions, Qcow2};
use tandem_block::{
    CacheMode, Disk, Error, ExtentKind, FileOptions, ImageFormat, Raw, Storage, VolatileSlice,
};

const CLUSTER: u64 = 16384;
const SIZE: u64 = 64 * CLUSTER;

/// A file in memory that counts the calls that could wait.
#[derive(Clone, Debug, Default)]
struct Watched {
    file: Memory,
    counts: Arc<Counts>,
}

#[derive(Debug, Default)]
struct Counts {
    waits: AtomicUsize,
    tries: AtomicUsize,
    /// Of so many transfers that are tried one would wait; none, if it is 0.
    cold_every: AtomicUsize,
    /// There is no room for what is written.
    is_full: AtomicBool,
}

impl Watched {
    fn new(file: Memory) -> Self {
        Self {
            file,
            ..Self::default()
        }
    }

    fn waits(&self) -> &Memory {
        self.counts.waits.fetch_add(1, Ordering::Relaxed);
        &self.file
    }

    /// How many of `bufs` are transferred: half of them, if they are cold.
    fn hot(&self, bufs: usize) -> usize {
        let number = self.counts.tries.fetch_add(1, Ordering::Relaxed);
        match self.counts.cold_every.load(Ordering::Relaxed) {
            0 => bufs,
            every if number.is_multiple_of(every) => bufs / 2,
            _ => bufs,
        }
    }

    fn set_cold_every(&self, every: usize) {
        self.counts.cold_every.store(every, Ordering::Relaxed);
    }
}

impl Storage for Watched {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.waits().read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.waits().write_at(bufs, offset)
    }
    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        let hot = self.hot(bufs.len());
        self.file.read_at(&bufs[..hot], offset)?;
        Ok(hot == bufs.len())
    }
    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        if self.counts.is_full.load(Ordering::Relaxed) {
            return Err(io::ErrorKind::StorageFull.into());
        }
        let hot = self.hot(bufs.len());
        self.file.write_at(&bufs[..hot], offset)?;
        Ok(hot == bufs.len())
    }
    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.waits().read_bytes_at(buf, offset)
    }
    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.waits().write_bytes_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.waits().write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.waits().discard(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.waits().next_data(offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.waits().sync()
    }
    fn size(&self) -> io::Result<u64> {
        self.waits().size()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.waits().set_len(len)
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Raw,
    Internal,
    Version2,
    Subclusters,
    /// With a bitmap that follows changes.
    Tracked,
    Packed,
    External,
    RawData,
    /// Over a raw disk that is half as large.
    Overlay,
}

const KINDS: [Kind; 9] = [
    Kind::Raw,
    Kind::Internal,
    Kind::Version2,
    Kind::Subclusters,
    Kind::Tracked,
    Kind::Packed,
    Kind::External,
    Kind::RawData,
    Kind::Overlay,
];

/// A disk, and the files below it.
struct Setup {
    disk: Box<dyn Disk>,
    files: Vec<Watched>,
    options: OpenOptions,
    kind: Kind,
}

fn raw(file: &Watched, read_only: bool) -> Box<dyn Disk> {
    let raw = Raw::with_storage(Path::new("raw"), Box::new(file.clone()), read_only);
    Box::new(raw.unwrap())
}

impl Setup {
    fn new(kind: Kind, options: OpenOptions) -> Self {
        let external = matches!(kind, Kind::Packed | Kind::External | Kind::RawData);
        let image = new_image(&CreateOptions {
            size: SIZE,
            cluster_size: CLUSTER,
            version: if kind == Kind::Version2 { 2 } else { 3 },
            extended_l2: kind == Kind::Subclusters,
            data_file: external.then(|| "data".into()),
            data_file_raw: kind == Kind::RawData,
            data_file_layout: match kind {
                Kind::Packed => DataFileLayout::Packed,
                _ => DataFileLayout::Standard,
            },
            backing_file: (kind == Kind::Overlay).then(|| "base".into()),
            backing_format: (kind == Kind::Overlay).then_some(ImageFormat::Raw),
            ..CreateOptions::default()
        });
        if kind == Kind::Tracked {
            let mut editor = BitmapEditor::new(common::open(&image, None).unwrap()).unwrap();
            editor.add(b"changes", Some(65536)).unwrap();
            editor.commit().unwrap();
        }
        let files = match kind {
            Kind::Raw => vec![Memory::new(vec![0; SIZE as usize])],
            Kind::Packed => vec![image, Memory::new(Vec::new())],
            Kind::Overlay => vec![image, Memory::new(vec![7; (SIZE / 2) as usize])],
            _ if external => vec![image, Memory::new(vec![0; SIZE as usize])],
            _ => vec![image],
        };
        let files: Vec<_> = files.into_iter().map(Watched::new).collect();
        Self {
            disk: Self::open(kind, &files, &options),
            files,
            options,
            kind,
        }
    }

    fn open(kind: Kind, files: &[Watched], options: &OpenOptions) -> Box<dyn Disk> {
        let boxed = |file: &Watched| Box::new(file.clone()) as Box<dyn Storage>;
        let name = Path::new("image");
        if kind == Kind::Raw {
            return raw(&files[0], false);
        }
        let (data, backing) = match files.get(1) {
            Some(base) if kind == Kind::Overlay => (None, Some(raw(base, true).into())),
            data => (data.map(boxed), None),
        };
        Box::new(Qcow2::with_backing(name, boxed(&files[0]), data, backing, options).unwrap())
    }

    /// Closes the disk and opens it again: nothing is cached.
    fn reopen(&mut self) {
        self.disk.close().unwrap();
        self.disk = Self::open(self.kind, &self.files, &self.options);
    }

    /// What `request` returns, once it has been seen not to wait.
    fn try_it(&self, request: impl FnOnce(&dyn Disk) -> bool) -> bool {
        let waits = || -> usize {
            let waits = |file: &Watched| file.counts.waits.load(Ordering::Relaxed);
            self.files.iter().map(waits).sum()
        };
        let before = waits();
        let done = request(&*self.disk);
        assert_eq!(waits(), before, "{:?}: it could have waited", self.kind);
        done
    }

    fn try_read(&self, offset: u64, len: u64) -> Option<Vec<u8>> {
        let mut bytes = vec![0xee; len as usize];
        let done = self.try_it(|disk| {
            let (front, back) = bytes.split_at_mut(len as usize / 2);
            let bufs = [VolatileSlice::from(front), VolatileSlice::from(back)];
            disk.try_read_at(&bufs, offset).unwrap()
        });
        done.then_some(bytes)
    }

    fn try_write(&self, offset: u64, len: u64, byte: u8) -> bool {
        let mut bytes = vec![byte; len as usize];
        let (front, back) = bytes.split_at_mut(len as usize / 2);
        let bufs = [VolatileSlice::from(front), VolatileSlice::from(back)];
        self.try_it(|disk| disk.try_write_at(&bufs, offset).unwrap())
    }

    fn set_cold_every(&self, every: usize) {
        self.files
            .iter()
            .for_each(|file| file.set_cold_every(every));
    }
}

/// In every kind of disk, what has been written and is at hand is read, and written again, without
/// waiting, and nothing is where the mapping is not in memory, or the data not in the page cache.
#[test]
fn what_is_at_hand_is_served() {
    for kind in KINDS {
        let mut setup = Setup::new(kind, OpenOptions::default());
        for at in [3 * CLUSTER, 10 * CLUSTER] {
            write(&*setup.disk, at, 3 * CLUSTER, 1).unwrap();
        }
        let (at, len) = (3 * CLUSTER + 1000, 2 * CLUSTER);
        let expect = |setup: &Setup, byte| {
            let found = setup.try_read(at, len);
            assert!(found == Some(vec![byte; len as usize]), "{kind:?}");
        };
        expect(&setup, 1);
        assert!(setup.try_write(at, len, 2), "{kind:?}");
        expect(&setup, 2);
        assert_eq!(read(&*setup.disk, at - 1, 2), [1, 2], "{kind:?}");

        setup.set_cold_every(1);
        assert!(setup.try_read(at, len).is_none(), "{kind:?}");
        assert!(!setup.try_write(at, len, 3), "{kind:?}");
        write(&*setup.disk, at, len, 2).unwrap();
        setup.set_cold_every(0);
        expect(&setup, 2);

        setup.reopen();
        let is_cached = kind == Kind::Raw;
        assert_eq!(setup.try_read(at, len).is_some(), is_cached, "{kind:?}");
        assert_eq!(setup.try_write(at, len, 2), is_cached, "{kind:?}");
        read(&*setup.disk, at, 512);
        expect(&setup, 2);
        // The bitmap is not in memory before the first change.
        assert_eq!(setup.try_write(at, len, 4), kind != Kind::Tracked);
        write(&*setup.disk, at, len, 4).unwrap();
        assert!(setup.try_write(at, len, 5), "{kind:?}");
        expect(&setup, 5);
    }
}

/// Clusters that have lost their mapping make room when they have come back, which the ordinary methods
/// wait for.
#[test]
fn a_write_without_room_is_left_to_those_who_wait_for_some() {
    for kind in KINDS.into_iter().filter(|kind| *kind != Kind::Raw) {
        let setup = Setup::new(kind, OpenOptions::default());
        write(&*setup.disk, 0, CLUSTER, 1).unwrap();
        let set_full = |is_full| {
            let counts = setup.files.iter().map(|file| &file.counts);
            counts.for_each(|counts| counts.is_full.store(is_full, Ordering::Relaxed));
        };
        set_full(true);
        assert!(!setup.try_write(0, CLUSTER, 2), "{kind:?}");
        set_full(false);
        assert!(setup.try_write(0, CLUSTER, 2), "{kind:?}");
    }
}

#[test]
fn what_has_no_data_is_read_and_not_written() {
    for kind in KINDS {
        let setup = Setup::new(kind, OpenOptions::default());
        write(&*setup.disk, 0, 512, 1).unwrap();
        setup.disk.write_zeroes(2 * CLUSTER, CLUSTER, true).unwrap();
        let is_raw = matches!(kind, Kind::Raw | Kind::RawData);
        for at in [2 * CLUSTER, 5 * CLUSTER, SIZE / 2 + CLUSTER] {
            let shows = kind == Kind::Overlay && at == 5 * CLUSTER;
            let expected = if shows { 7 } else { 0 };
            let found = setup.try_read(at, CLUSTER);
            assert!(
                found == Some(vec![expected; CLUSTER as usize]),
                "{kind:?} {at}"
            );
            assert_eq!(setup.try_write(at, CLUSTER, 3), is_raw, "{kind:?} {at}");
        }
        // Behind the end of what lies below there are zeros, which is not looked at twice.
        let across = setup.try_read(SIZE / 2 - 512, 1024);
        assert_eq!(across.is_some(), kind != Kind::Overlay, "{kind:?}");
        // Across all of them.
        let mixed = setup.try_read(0, 10 * CLUSTER);
        assert!(
            mixed == Some(read(&*setup.disk, 0, 10 * CLUSTER)),
            "{kind:?}"
        );
    }
}

/// What a snapshot has too is read, and not written in place.
#[test]
fn shared_and_compressed_clusters() {
    let image = new_image(&CreateOptions {
        size: SIZE,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    });
    let disk = common::open(&image, None).unwrap();
    write(&disk, 0, CLUSTER, 1).unwrap();
    let compressed = disk.compress(vec![5; CLUSTER as usize]).unwrap();
    disk.write_compressed(compressed, 2 * CLUSTER).unwrap();
    disk.create_snapshot(b"s").unwrap();
    let files = vec![Watched::new(image)];
    let options = OpenOptions::default();
    let setup = Setup {
        disk: Setup::open(Kind::Internal, &files, &options),
        files,
        options,
        kind: Kind::Internal,
    };
    let compressed = setup.disk.extent(2 * CLUSTER, CLUSTER).unwrap();
    assert_eq!(compressed.kind, ExtentKind::Compressed);
    read(&*setup.disk, 2 * CLUSTER, 512);
    assert_eq!(setup.try_read(0, CLUSTER), Some(vec![1; CLUSTER as usize]));
    assert!(!setup.try_write(0, CLUSTER, 2));
    assert_eq!(setup.try_read(2 * CLUSTER, 512), None);
    assert!(!setup.try_write(2 * CLUSTER, 512, 2));
    write(&*setup.disk, 0, 512, 2).unwrap();
    assert!(setup.try_write(0, CLUSTER, 3));
}

#[test]
fn without_a_write_cache_writes_wait() {
    for kind in KINDS.into_iter().filter(|kind| *kind != Kind::Raw) {
        let files = FileOptions {
            cache: CacheMode::Writethrough,
            ..FileOptions::default()
        };
        let options = OpenOptions {
            files,
            ..OpenOptions::default()
        };
        let setup = Setup::new(kind, options);
        write(&*setup.disk, 0, CLUSTER, 1).unwrap();
        assert!(!setup.try_write(0, CLUSTER, 2), "{kind:?}");
        assert!(setup.try_read(0, CLUSTER).is_some(), "{kind:?}");
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, [0; 4096]).unwrap();
    let files = FileOptions {
        cache: CacheMode::Writethrough,
        ..FileOptions::default()
    };
    let disk = Raw::open_with(&path, false, files).unwrap();
    let mut bytes = [1; 4096];
    let bufs = [VolatileSlice::from(&mut bytes[..])];
    assert!(!disk.try_write_at(&bufs, 0).unwrap());
}

/// Errors are those of the ordinary methods; what would have to be marked in the image is left to them.
#[test]
fn errors_are_told() {
    for kind in KINDS {
        let setup = Setup::new(kind, OpenOptions::default());
        let mut bytes = [1; 512];
        let bufs = [VolatileSlice::from(&mut bytes[..])];
        for at in [SIZE, SIZE - 511, u64::MAX] {
            let outcomes = [
                setup.disk.try_read_at(&bufs, at),
                setup.disk.try_write_at(&bufs, at),
            ];
            for outcome in outcomes {
                assert!(matches!(outcome, Err(Error::OutOfRange { .. })), "{kind:?}");
            }
        }
        setup.disk.close().unwrap();
        let is_closed = matches!(setup.disk.try_write_at(&bufs, 0), Err(Error::Closed { .. }));
        assert_eq!(is_closed, kind != Kind::Raw);
    }
    let base = raw(&Watched::default(), true);
    let mut bytes = [1; 512];
    let bufs = [VolatileSlice::from(&mut bytes[..])];
    assert!(matches!(base.try_write_at(&bufs, 0), Err(Error::ReadOnly)));

    let mut setup = Setup::new(Kind::Internal, OpenOptions::default());
    write(&*setup.disk, 0, 3 * CLUSTER, 1).unwrap();
    setup.disk.close().unwrap();
    let image = &setup.files[0].file;
    let l2_table = image.word(image.word(40)) & !(1 << 63);
    image.put_word(l2_table + 8, 1 << 63 | 0x200);
    setup.reopen();
    read(&*setup.disk, 0, 512);
    assert_eq!(setup.try_read(CLUSTER, 512), None);
    assert!(!setup.try_write(CLUSTER, 512, 2));
    let error = setup.disk.read_at(&bufs, CLUSTER).unwrap_err();
    assert!(matches!(error, Error::Invalid { .. }), "{error}");
}

/// An entry of a damaged image that leads to metadata.
#[test]
fn metadata_is_not_written() {
    let mut setup = Setup::new(Kind::Internal, OpenOptions::default());
    write(&*setup.disk, 0, 3 * CLUSTER, 1).unwrap();
    setup.disk.close().unwrap();
    let image = setup.files[0].file.clone();
    let l2_table = image.word(image.word(40)) & !(1 << 63);
    image.put_word(l2_table + 8, 1 << 63 | l2_table);
    setup.reopen();
    read(&*setup.disk, 0, 512);
    let before = image.content();
    assert!(!setup.try_write(CLUSTER, 512, 2));
    assert!(image.content() == before);
}

/// A write that does not wait sets the bits of the bitmap.
#[test]
fn writes_are_tracked() {
    let mut setup = Setup::new(Kind::Tracked, OpenOptions::default());
    write(&*setup.disk, 0, SIZE, 1).unwrap();
    setup.reopen();
    setup.disk.close().unwrap();
    let image = setup.files[0].file.clone();
    let mut editor = BitmapEditor::new(common::open(&image, None).unwrap()).unwrap();
    editor.clear(b"changes").unwrap();
    editor.commit().unwrap();
    let bits = |image: &Memory| {
        let copy = Memory::new(image.content());
        let mut at = 112;
        while copy.word(at) >> 32 != 0x2385_2875 {
            at += 8;
        }
        let table = copy.word(copy.word(at + 24));
        let data = copy.word(table) & !1;
        if data == 0 { 0 } else { copy.word(data) }
    };
    assert_eq!(bits(&image), 0);
    setup.disk = Setup::open(Kind::Tracked, &setup.files, &setup.options);
    write(&*setup.disk, 0, 512, 1).unwrap();
    read(&*setup.disk, SIZE / 2, 512);
    assert!(setup.try_write(5 * 65536, 65536 + 1, 2));
    setup.disk.close().unwrap();
    assert_eq!(
        bits(&image) >> 56,
        0b110_0001,
        "least significant bit first"
    );
}

#[derive(Clone, Debug)]
enum Op {
    Write,
    TryWrite,
    Read,
    TryRead,
    Zero(bool),
    Discard,
    Flush,
    Reopen,
}

fn ops() -> impl Strategy<Value = Vec<(Op, u64, u64)>> {
    let op = prop_oneof![
        2 => Just(Op::Write),
        6 => Just(Op::TryWrite),
        2 => Just(Op::Read),
        6 => Just(Op::TryRead),
        1 => any::<bool>().prop_map(Op::Zero),
        1 => Just(Op::Discard),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ];
    // In few places, so that they meet.
    let at = (0..16u64, 0..CLUSTER).prop_map(|(cluster, within)| 3 * cluster * CLUSTER + within);
    let len = prop_oneof![1..2000u64, CLUSTER..5 * CLUSTER];
    prop::collection::vec((op, at, len), 1..60)
}

fn run(kind: Kind, cold_every: usize, ops: &[(Op, u64, u64)]) {
    let options = OpenOptions {
        l2_cache_size: 0,
        ..OpenOptions::default()
    };
    let mut setup = Setup::new(kind, options);
    let mut model = read(&*setup.disk, 0, SIZE);
    setup.set_cold_every(cold_every);
    for (i, (op, at, len)) in ops.iter().enumerate() {
        let (at, byte) = (*at, 10 + i as u8);
        let len = (*len).min(SIZE - at);
        let range = at as usize..(at + len) as usize;
        match op {
            Op::Write => {
                write(&*setup.disk, at, len, byte).unwrap();
                model[range].fill(byte);
            }
            Op::TryWrite => {
                if !setup.try_write(at, len, byte) {
                    write(&*setup.disk, at, len, byte).unwrap();
                }
                model[range].fill(byte);
            }
            Op::Read => assert!(read(&*setup.disk, at, len) == model[range], "{op:?} {at}"),
            Op::TryRead => {
                if let Some(found) = setup.try_read(at, len) {
                    assert!(found == model[range], "{op:?} {at}");
                }
            }
            Op::Zero(unmap) => {
                setup.disk.write_zeroes(at, len, *unmap).unwrap();
                model[range].fill(0);
            }
            Op::Discard => {
                setup.disk.discard(at, len).unwrap();
                let found = read(&*setup.disk, at, len);
                let kept = found.iter().zip(&model[range.clone()]);
                assert!(kept.into_iter().all(|(now, old)| now == old || *now == 0));
                model[range].copy_from_slice(&found);
            }
            Op::Flush => setup.disk.flush().unwrap(),
            Op::Reopen => setup.reopen(),
        }
    }
    assert!(read(&*setup.disk, 0, SIZE) == model, "{kind:?}");
    setup.reopen();
    assert!(
        read(&*setup.disk, 0, SIZE) == model,
        "{kind:?}, opened again"
    );
    setup.disk.close().unwrap();
    if kind != Kind::Raw {
        assert_clean(&setup.files[0].file);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn mixed_with_ordinary_requests(kind in prop::sample::select(&KINDS[..]), cold_every in 0..4usize, ops in ops()) {
        run(kind, cold_every, &ops);
    }
}
