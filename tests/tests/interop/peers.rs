//! What other implementations of qcow2 have got wrong, each fault with the test that keeps it out.
//!
//! | fault | kept out by |
//! | --- | --- |
//! | header extensions of version 2 are ignored, and the backing format is guessed | `random::backing_chains` |
//! | versions above 3 are opened | `damaged_headers_are_refused` of `tandem-img` |
//! | a malformed feature name table causes a panic | [`malformed_feature_names`] |
//! | an image is changed and then refused | [`a_refused_image_is_not_touched`], `refusals` |
//! | a change of the header drops extensions, unknown fields or bits | [`nothing_unknown_is_dropped`] |
//! | bitmaps, or the promise of a raw data file, end with the first writable open | `bitmaps::changes_are_followed` |
//! | bitmaps are left valid while the disk changes | `bitmaps::a_crash_leaves_marks` |
//! | a mapping of a data file that leads elsewhere is followed | `refusals::bad_l2_entries_fail_their_own_request` |
//! | a raw data file keeps what was zeroed | `random`: QEMU compares the file |
//! | a data file is opened for writing though the image is not | [`read_only_means_both_files`] |
//! | zero flags are ignored, or space under them leaks | `random` |
//! | a write through an image with a data file lands in the image | `random` |
//! | a repair takes compressed clusters for others, or forgets snapshots | [`a_dirty_image_with_everything_in_it`] |
//! | lazy refcounts are switched off by opening | the same |
//! | the corrupt bit is ignored | `refusals::features_that_are_not_implemented` |
//! | what a snapshot shares is overwritten, or lost by a write in part | `snapshots` |
//! | a discard releases clusters of a snapshot | `snapshots` |
//! | encrypted images are read and written as if they were not | [`encrypted_images`] |
//! | a discard releases no space of the host | `discards` |
//! | a cluster is used again before its hole is punched | `discard.rs` of `block` |
//! | discards and zeroes show the backing file again | `random::backing_chains` |
//! | reads past the end of a backing file leave the buffer as it is | [`behind_a_short_backing_file`] |
//! | what the file lacks of its last cluster cannot be read | [`a_file_that_ends_in_a_cluster`] |
//! | each write in part reads the backing file, whether the cluster has data or not | [`data_of_its_own_needs_no_backing_file`] |
//! | an entry past the end of the file lets it grow by petabytes | `refusals::bad_l2_entries_fail_their_own_request` |
//! | metadata is overwritten by way of a mapping | `repairs::a_mapping_onto_metadata_can_be_repaired`, `overlap.rs` of `block` |
//! | live tables are handed out as free clusters | `repairs::metadata_that_is_counted_as_free_is_never_handed_out` |
//! | new tables are on disk before they are counted | the crash explorer |
//! | tables lack the COPIED flag, and every check complains | `Image::check`, everywhere |
//! | an image that another program uses is repaired before it is locked | [`an_image_in_use_is_not_repaired`] |
//! | a raw disk is taken for what a guest wrote into it | [`a_raw_disk_stays_raw`] |
//! | creating over an old image leaves parts of it | `a_success_makes_the_data_file_anew` of `block` |
//! | requests of several queues corrupt an image | `threads` |

use std::fs;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use tandem_block::qcow2::{AmendOptions, Info, OpenOptions, Qcow2, amend};
use tandem_block::{Disk, Error, Extent, FileStorage, Limits, Raw, Result};
use vm_memory::VolatileSlice;

use crate::qemu::{Image, Kind, assert_same, command, read, read_all, run, write};

const KNOWN_LENGTH: usize = 112;

fn read_only() -> OpenOptions {
    OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    }
}

/// Puts `extension` in front of the others.
fn insert_extension(bytes: &mut [u8], kind: u32, data: &[u8]) {
    let mut extension = kind.to_be_bytes().to_vec();
    extension.extend((data.len() as u32).to_be_bytes());
    extension.extend(data);
    extension.resize(extension.len().next_multiple_of(8), 0);
    let end = 4096;
    bytes.copy_within(
        KNOWN_LENGTH..end - extension.len(),
        KNOWN_LENGTH + extension.len(),
    );
    bytes[KNOWN_LENGTH..KNOWN_LENGTH + extension.len()].copy_from_slice(&extension);
}

#[test]
fn malformed_feature_names() {
    let image = Image::create(Kind::Internal, 65536, 1 << 20);
    let sound = fs::read(image.path()).unwrap();
    for len in [0, 1, 2, 47, 48, 49, 95, 500] {
        for fill in [0, 0xff] {
            let mut bytes = sound.clone();
            insert_extension(&mut bytes, 0x6803_f857, &vec![fill; len]);
            fs::write(image.path(), &bytes).unwrap();
            drop(image.open().unwrap());
            // The names are looked up for the message.
            bytes[72] |= 0x20;
            fs::write(image.path(), &bytes).unwrap();
            let error = image.open().err().unwrap().to_string();
            assert!(error.contains("feature"), "{error}");
        }
    }
}

#[test]
fn a_refused_image_is_not_touched() {
    for kind in [Kind::Internal, Kind::Raw] {
        let image = Image::create(kind, 65536, 1 << 20);
        let mut bytes = fs::read(image.path()).unwrap();
        bytes[72] |= 0x20;
        bytes[88] |= 0x80;
        fs::write(image.path(), &bytes).unwrap();
        assert!(matches!(image.open(), Err(Error::Unsupported { .. })));
        assert!(fs::read(image.path()).unwrap() == bytes);
    }
}

/// An extension, header fields and a compatible bit that nobody knows survive every operation.
#[test]
fn nothing_unknown_is_dropped() {
    const NOVEL: &[u8] = b"what this is nobody knows";
    let image = Image::create(Kind::Internal, 65536, 4 << 20);
    let mut bytes = fs::read(image.path()).unwrap();
    insert_extension(&mut bytes, 0x1234_5678, NOVEL);
    // Eight bytes more of header.
    bytes.copy_within(KNOWN_LENGTH..4088, KNOWN_LENGTH + 8);
    bytes[KNOWN_LENGTH..KNOWN_LENGTH + 8].copy_from_slice(b"newfield");
    bytes[103] = 120;
    bytes[80] |= 0x40;
    fs::write(image.path(), &bytes).unwrap();
    let keeps = |what: &str| {
        let bytes = fs::read(image.path()).unwrap();
        assert_eq!(
            &bytes[KNOWN_LENGTH..KNOWN_LENGTH + 8],
            b"newfield",
            "{what}"
        );
        assert_eq!((bytes[103], bytes[80] & 0x40), (120, 0x40), "{what}");
        let mut head = bytes[..4096].windows(NOVEL.len());
        assert!(head.any(|window| window == NOVEL), "{what}");
    };
    write(&image.open().unwrap(), 0, 1 << 20, 1);
    keeps("write");
    image.open().unwrap().resize(40 << 30).unwrap();
    keeps("resize");
    image.open().unwrap().create_snapshot(b"s").unwrap();
    keeps("create a snapshot");
    image.open().unwrap().apply_snapshot(b"s").unwrap();
    keeps("apply a snapshot");
    image.open().unwrap().delete_snapshot(b"s").unwrap();
    keeps("delete a snapshot");
    let options = AmendOptions {
        lazy_refcounts: Some(true),
        ..AmendOptions::default()
    };
    amend(&image.path(), &options, &mut |_, _| {}).unwrap();
    keeps("amend");
    image.check();
}

#[test]
fn read_only_means_both_files() {
    let image = Image::create(Kind::Raw, 65536, 1 << 20);
    let _disk = Qcow2::open(&image.path(), &read_only()).unwrap();
    let data_file = image.data_file().canonicalize().unwrap();
    let mut seen = 0;
    for entry in fs::read_dir("/proc/self/fd").unwrap() {
        let entry = entry.unwrap();
        if fs::read_link(entry.path()).is_ok_and(|file| file == data_file) {
            let name = entry.file_name().into_string().unwrap();
            let info = fs::read_to_string(format!("/proc/self/fdinfo/{name}")).unwrap();
            let flags = info.lines().find_map(|line| line.strip_prefix("flags:"));
            let flags = u32::from_str_radix(flags.unwrap().trim(), 8).unwrap();
            assert_eq!(flags & 3, 0, "{info}");
            seen += 1;
        }
    }
    assert!(seen > 0);
}

/// QEMU dies over an image with compressed clusters, snapshots and postponed refcounts.
#[test]
fn a_dirty_image_with_everything_in_it() {
    let image = Image::with_options(Kind::Internal, 65536, 8 << 20, ",lazy_refcounts=on");
    image.qemu_io(&[
        "write -c -P 1 0 2M".to_owned(),
        "write -P 2 3M 1M".to_owned(),
    ]);
    image.qemu_img(&["snapshot", "-c", "s"], &[]);
    let path = image.path();
    let mut args = vec!["-f", "qcow2", path.to_str().unwrap()];
    for line in ["write -P 3 1M 3M", "write -c -P 4 6M 1M", "flush", "abort"] {
        args.extend(["-c", line]);
    }
    assert!(!command("qemu-io", &args).status.success());
    assert_eq!(fs::read(&path).unwrap()[79] & 1, 1, "dirty");
    let mut model = vec![0; 8 << 20];
    for (start, end, byte) in [(0, 1, 1), (1, 4, 3), (6, 7, 4)] {
        model[start << 20..end << 20].fill(byte);
    }
    let disk = image.open().unwrap();
    assert_same(&read_all(&disk), &model, "the disk");
    write(&disk, 7 << 20, 1000, 5);
    model[7 << 20..][..1000].fill(5);
    disk.flush().unwrap();
    drop(disk);
    image.expect(&model);
    let mut taken = vec![0; 8 << 20];
    taken[..2 << 20].fill(1);
    taken[3 << 20..4 << 20].fill(2);
    assert_same(&image.snapshot_by_qemu("s"), &taken, "the snapshot");
    assert!(Info::read(&path).unwrap().lazy_refcounts);
}

#[test]
fn encrypted_images() {
    let image = Image::create(Kind::Internal, 65536, 1 << 20);
    let path = image.path();
    let secret = "secret,id=s,data=abc";
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    run(
        "qemu-img",
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "--object",
            secret,
            "-o",
            options,
            path.to_str().unwrap(),
            "1M",
        ],
    );
    let before = fs::read(&path).unwrap();
    for options in [OpenOptions::default(), read_only()] {
        let error = Qcow2::open(&path, &options).err().unwrap().to_string();
        assert!(error.contains("encryption"), "{error}");
    }
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn behind_a_short_backing_file() {
    let image = Image::prepared(Kind::Internal, 65536, 1 << 20, |dir| {
        fs::write(dir.join("base"), vec![7; 100_000]).unwrap();
        ",backing_file=base,backing_fmt=raw".to_owned()
    });
    let disk = image.open().unwrap();
    let mut buffer = vec![0xee; 1 << 20];
    disk.read_at(&[VolatileSlice::from(&mut buffer[..])], 0)
        .unwrap();
    assert!(buffer[..100_000].iter().all(|byte| *byte == 7));
    assert!(buffer[100_000..].iter().all(|byte| *byte == 0));
    write(&disk, 98_304, 512, 1);
    assert_eq!(read(&disk, 99_999, 2), [7, 0]);
}

#[test]
fn a_file_that_ends_in_a_cluster() {
    let image = Image::create(Kind::Internal, 65536, 1 << 20);
    image.qemu_io(&["write -P 1 0 1k".to_owned()]);
    let file = fs::OpenOptions::new()
        .write(true)
        .open(image.path())
        .unwrap();
    let len = file.metadata().unwrap().len();
    file.set_len(len / 65536 * 65536 - 65536 + 512).unwrap();
    let disk = image.open().unwrap();
    let mut model = vec![0; 1 << 20];
    model[..512].fill(1);
    assert_same(&read_all(&disk), &model, "the disk");
    write(&disk, 2048, 512, 2);
    model[2048..2560].fill(2);
    disk.flush().unwrap();
    drop(disk);
    image.expect(&model);
}

/// A backing file that counts how often it is read.
struct Counting(Raw, Arc<AtomicUsize>);

impl Disk for Counting {
    fn size(&self) -> u64 {
        self.0.size()
    }
    fn limits(&self) -> Limits {
        self.0.limits()
    }
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.1.fetch_add(1, Ordering::Relaxed);
        self.0.read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.0.write_at(bufs, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.0.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.0.discard(offset, len)
    }
    fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        self.0.extent(offset, len)
    }
    fn resize(&self, size: u64) -> Result<()> {
        self.0.resize(size)
    }
    fn flush(&self) -> Result<()> {
        self.0.flush()
    }
}

#[test]
fn data_of_its_own_needs_no_backing_file() {
    let image = Image::prepared(Kind::Internal, 65536, 1 << 20, |dir| {
        fs::write(dir.join("base"), vec![7; 1 << 20]).unwrap();
        ",backing_file=base,backing_fmt=raw".to_owned()
    });
    let base = image.path().with_file_name("base");
    let reads = Arc::new(AtomicUsize::new(0));
    let backing = Counting(Raw::open(&base, true).unwrap(), reads.clone());
    let storage = FileStorage::open(&image.path(), false).unwrap();
    let (name, options) = (image.path(), OpenOptions::default());
    let disk = Qcow2::with_backing(
        &name,
        Box::new(storage),
        None,
        Some(Arc::new(backing)),
        &options,
    );
    let disk = disk.unwrap();
    write(&disk, 4096, 4096, 1);
    // What lies before and behind it in the cluster.
    assert_eq!(reads.load(Ordering::Relaxed), 2);
    for at in [0, 4096, 8192, 61_440] {
        write(&disk, at, 4096, 2);
        read(&disk, at, 4096);
    }
    assert_eq!(reads.load(Ordering::Relaxed), 2);
}

#[test]
fn an_image_in_use_is_not_repaired() {
    let image = Image::with_options(Kind::Internal, 65536, 1 << 20, ",lazy_refcounts=on");
    let user = image.open().unwrap();
    let file = fs::OpenOptions::new()
        .write(true)
        .open(image.path())
        .unwrap();
    file.write_all_at(&[1], 79).unwrap();
    let before = fs::read(image.path()).unwrap();
    assert!(matches!(image.open(), Err(Error::Locked { .. })));
    assert!(fs::read(image.path()).unwrap() == before);
    drop(user);
    drop(image.open().unwrap());
    assert_eq!(fs::read(image.path()).unwrap()[79], 0, "repaired");
}

#[test]
fn a_raw_disk_stays_raw() {
    let image = Image::create(Kind::Internal, 65536, 1 << 20);
    let bytes = fs::read(image.path()).unwrap();
    let disk = Raw::open(&image.path(), false).unwrap();
    assert_eq!(disk.size(), bytes.len().next_multiple_of(512) as u64);
    assert_eq!(read(&disk, 0, 4096), bytes[..4096]);
    write(&disk, 0, 512, 0);
    drop(disk);
    assert!(matches!(image.open(), Err(Error::NotQcow2 { .. })));
}
