//! Images that must be refused: with a message that names file and field, and untouched.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use tandem_block::qcow2::{CreateOptions, Follow, OpenOptions, Qcow2, create};
use tandem_block::{Disk, ImageFormat, Result};
use vm_memory::VolatileSlice;

use crate::qemu::{Image, Kind, write};

/// Changes bytes of an image, opens it, and expects an error that has all of `words`.
fn refuse(kind: Kind, patch: impl FnOnce(&mut Vec<u8>), words: &[&str]) {
    let image = Image::create(kind, 65536, 8 << 20);
    let mut bytes = fs::read(image.path()).unwrap();
    patch(&mut bytes);
    fs::write(image.path(), &bytes).unwrap();
    expect_refusal(&image, &OpenOptions::default(), words);
}

/// Opens an image and expects an error that names it and has all of `words`, and equal files
/// before and after.
fn expect_refusal(image: &Image, options: &OpenOptions, words: &[&str]) {
    let before = (
        fs::read(image.path()).unwrap(),
        fs::read(image.data_file()).ok(),
    );
    let message = match Qcow2::open(&image.path(), options) {
        Ok(_) => panic!("opened; expected an error with {words:?}"),
        Err(e) => e.to_string(),
    };
    for word in words.iter().chain(&["disk.qcow2"]) {
        assert!(message.contains(word), "{message:?} lacks {word:?}");
    }
    let after = (
        fs::read(image.path()).unwrap(),
        fs::read(image.data_file()).ok(),
    );
    assert!(before == after, "changed by an open that failed: {message}");
}

fn put32(bytes: &mut [u8], at: usize, value: u32) {
    bytes[at..at + 4].copy_from_slice(&value.to_be_bytes());
}

fn put64(bytes: &mut [u8], at: usize, value: u64) {
    bytes[at..at + 8].copy_from_slice(&value.to_be_bytes());
}

fn get64(bytes: &[u8], at: usize) -> u64 {
    u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap())
}

#[test]
fn headers_that_are_not() {
    refuse(Kind::Internal, |b| b[0] = b'q', &["qcow2 format", "magic"]);
    refuse(Kind::Internal, |b| b.clear(), &["qcow2 format"]);
    refuse(Kind::Internal, |b| b.truncate(60), &["header"]);
    refuse(
        Kind::Internal,
        |b| put32(b, 4, 4),
        &["Unsupported qcow2 version 4"],
    );
    refuse(
        Kind::Internal,
        |b| put32(b, 20, 8),
        &["cluster_bits", "2^8"],
    );
    refuse(Kind::Internal, |b| put32(b, 20, 63), &["cluster_bits"]);
    refuse(Kind::Internal, |b| put32(b, 100, 96), &["header_length"]);
}

#[test]
fn sizes_that_overflow() {
    refuse(Kind::Internal, |b| put64(b, 24, u64::MAX), &["size"]);
    refuse(
        Kind::Internal,
        |b| put64(b, 24, 1 << 62),
        &["Image is too big"],
    );
    refuse(
        Kind::Internal,
        |b| put64(b, 24, 1 << 40),
        &["l1_size", "L1 table is too small"],
    );
    refuse(Kind::Internal, |b| put32(b, 36, u32::MAX), &["l1_size"]);
}

#[test]
fn offsets_out_of_bounds_or_unaligned() {
    refuse(
        Kind::Internal,
        |b| put64(b, 40, 0x1_2345),
        &["l1_table_offset"],
    );
    refuse(
        Kind::Internal,
        |b| put64(b, 40, u64::MAX << 16),
        &["l1_table_offset"],
    );
    refuse(
        Kind::Internal,
        |b| put64(b, 40, 1 << 50),
        &["l1_table_offset"],
    );
    refuse(
        Kind::Internal,
        |b| put64(b, 48, 0x1_2345),
        &["refcount_table_offset"],
    );
    refuse(
        Kind::Internal,
        |b| put64(b, 48, u64::MAX << 16),
        &["refcount_table_offset"],
    );
    refuse(
        Kind::Internal,
        |b| put64(b, 48, 1 << 50),
        &["refcount_table_offset"],
    );
    refuse(
        Kind::Internal,
        |b| put32(b, 56, u32::MAX),
        &["refcount_table_clusters"],
    );
    refuse(
        Kind::Internal,
        |b| put32(b, 56, 0),
        &["refcount_table_clusters"],
    );
    for entry in [0x8000_0000_0001_2200, 1 << 50, 0x40_0000] {
        refuse(
            Kind::Internal,
            |b| {
                let l1 = get64(b, 40) as usize;
                if b.len() < l1 + 8 {
                    b.resize(l1 + 8, 0);
                }
                put64(b, l1, entry);
            },
            &["l1_table entry"],
        );
        refuse(
            Kind::Internal,
            |b| {
                let table = get64(b, 48) as usize;
                put64(b, table, entry & !(1 << 63));
            },
            &["refcount_table entry"],
        );
    }
}

/// Two L1 entries for one L2 table, and tables on top of each other.
#[test]
fn metadata_that_overlaps() {
    let image = Image::create(Kind::Internal, 512, 1 << 20);
    let disk = image.open().unwrap();
    write(&disk, 0, 100_000, 9);
    disk.flush().unwrap();
    drop(disk);
    let good = fs::read(image.path()).unwrap();
    let l1 = get64(&good, 40) as usize;
    let refcount_table = get64(&good, 48);
    for entry in [
        get64(&good, l1),
        refcount_table | 1 << 63,
        l1 as u64 | 1 << 63,
    ] {
        let mut bytes = good.clone();
        put64(&mut bytes, l1 + 8, entry);
        fs::write(image.path(), &bytes).unwrap();
        expect_refusal(&image, &OpenOptions::default(), &["l1_table", "overlaps"]);
    }
}

/// Bits of features that other programs keep up and this one does not know are cleared before
/// anything is written (qcow2 specification, "autoclear_features"), and the known ones are kept.
#[test]
fn unknown_autoclear_bits_are_cleared_when_writing() {
    let image = Image::create(Kind::Raw, 65536, 8 << 20);
    let mut bytes = fs::read(image.path()).unwrap();
    put64(&mut bytes, 88, 2 | 1 << 40);
    fs::write(image.path(), &bytes).unwrap();

    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    drop(Qcow2::open(&image.path(), &read_only).unwrap());
    assert_eq!(fs::read(image.path()).unwrap(), bytes);

    drop(image.open().unwrap());
    put64(&mut bytes, 88, 2);
    assert_eq!(fs::read(image.path()).unwrap(), bytes);
    image.check();
}

#[test]
fn features_that_are_not_implemented() {
    let incompatible = |bits: u64| move |b: &mut Vec<u8>| put64(b, 72, bits);
    refuse(Kind::Internal, incompatible(1 << 1), &["corrupt"]);
    refuse(
        Kind::Internal,
        incompatible(1 << 20),
        &["Unknown incompatible feature: 100000"],
    );
    refuse(Kind::Internal, |b| put32(b, 32, 1), &["encryption"]);
    refuse(Kind::Internal, |b| put32(b, 96, 5), &["refcount"]);
    refuse(
        Kind::Internal,
        |b| {
            put64(b, 8, 1024);
            put32(b, 16, 4);
            b[1024..1028].copy_from_slice(b"base");
        },
        &["backing file", "does not tell its format", "backing-format"],
    );
    refuse(Kind::Internal, |b| put32(b, 60, 1), &["Snapshot L1 table"]);
    refuse(Kind::External, |b| put32(b, 60, 1), &["internal snapshots"]);
}

/// Backing files that are missing, below themselves, elsewhere, or no local files.
#[test]
fn backing_files_that_cannot_be_used() {
    let overlay = |name: &str, format: &str| {
        let image = Image::create(Kind::Internal, 65536, 1 << 20);
        let options = CreateOptions {
            size: 1 << 20,
            backing_file: Some(name.into()),
            backing_format: ImageFormat::from_header(format.as_bytes()),
            ..CreateOptions::default()
        };
        create(&image.path(), &options).unwrap();
        image
    };
    let refuse = |name, format, words: &[&str]| {
        expect_refusal(&overlay(name, format), &OpenOptions::default(), words);
    };
    refuse("gone", "raw", &["backing file", "gone", "No such file"]);
    refuse("disk.qcow2", "qcow2", &["below itself"]);
    refuse("/etc/hostname", "raw", &["outside", "follow=anywhere"]);
    refuse("../../etc/hostname", "raw", &["outside", "follow=anywhere"]);
    refuse("nbd:host", "raw", &["Unknown protocol 'nbd'"]);
    refuse("json:{}", "raw", &["Unknown protocol 'json'"]);
    refuse(".", "raw", &["regular file"]);
    refuse("gone", "", &["does not tell its format"]);
    let image = overlay("base", "raw");
    fs::write(image.path().with_file_name("base"), [7; 512]).unwrap();
    let options = OpenOptions {
        follow: Follow::Nothing,
        ..OpenOptions::default()
    };
    expect_refusal(&image, &options, &["base", "may not be followed"]);
    let disk = image.open().unwrap();
    let mut sector = [0; 512];
    disk.read_at(&[VolatileSlice::from(&mut sector[..])], 0)
        .unwrap();
    assert_eq!(sector, [7; 512]);
}

/// A chain of more images than anybody needs.
#[test]
fn endless_chains() {
    let image = Image::create(Kind::Internal, 65536, 1 << 20);
    for i in 0..300 {
        let options = CreateOptions {
            size: 1 << 20,
            backing_file: Some(format!("image{}", i + 1).into()),
            backing_format: Some(ImageFormat::Qcow2),
            ..CreateOptions::default()
        };
        let path = image.path().with_file_name(format!("image{i}"));
        create(&path, &options).unwrap();
    }
    let first = image.path().with_file_name("image0");
    let error = Qcow2::open(&first, &OpenOptions::default()).err().unwrap();
    let error = error.to_string();
    assert!(error.contains("more than 256 images"), "{error}");

    // As many as there may be.
    let options = CreateOptions {
        size: 1 << 20,
        ..CreateOptions::default()
    };
    let bottom = image.path().with_file_name("image250");
    create(&bottom, &options).unwrap();
    let disk = Qcow2::open(&bottom, &OpenOptions::default()).unwrap();
    write(&disk, 65536, 65536, 5);
    drop(disk);
    let disk = Qcow2::open(&first, &OpenOptions::default()).unwrap();
    write(&disk, 65536, 512, 6);
    let mut bytes = [0; 1024];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 65536)
        .unwrap();
    assert_eq!((bytes[511], bytes[512]), (6, 5));
}

#[test]
fn data_files_that_cannot_be_used() {
    let image = Image::create(Kind::External, 65536, 8 << 20);
    fs::remove_file(image.data_file()).unwrap();
    expect_refusal(&image, &OpenOptions::default(), &["disk.raw", "data-file="]);

    fs::create_dir(image.data_file()).unwrap();
    let options = OpenOptions {
        data_file: Some(image.data_file()),
        ..OpenOptions::default()
    };
    let message = Qcow2::open(&image.path(), &options)
        .err()
        .unwrap()
        .to_string();
    assert!(message.contains("disk.raw"), "{message}");

    let itself = OpenOptions {
        data_file: Some(image.path()),
        ..OpenOptions::default()
    };
    expect_refusal(&image, &itself, &["is the image itself"]);

    let internal = Image::create(Kind::Internal, 65536, 8 << 20);
    expect_refusal(&internal, &options, &["'data-file' can only be set"]);
    // A data file without the bit that says so.
    refuse(
        Kind::Raw,
        |b| put64(b, 72, 0),
        &["data-file-raw requires a data file"],
    );
}

/// The data file belongs to somebody else. Root may read everything, so as root the test opens
/// the image with another user's file-system credentials.
#[test]
fn a_data_file_without_permission() {
    let image = Image::create(Kind::External, 65536, 8 << 20);
    fs::set_permissions(image.data_file(), fs::Permissions::from_mode(0o000)).unwrap();
    let parent = image.path().parent().unwrap().to_owned();
    fs::set_permissions(&parent, fs::Permissions::from_mode(0o755)).unwrap();
    fs::set_permissions(image.path(), fs::Permissions::from_mode(0o666)).unwrap();
    let path = image.path();
    let message = std::thread::spawn(move || {
        // SAFETY: changes the credentials of this thread alone; it only opens files and ends.
        unsafe { libc::setfsuid(65534) };
        Qcow2::open(&path, &OpenOptions::default())
            .err()
            .map(|e| e.to_string())
    })
    .join()
    .unwrap()
    .expect("refused");
    assert!(
        message.contains("disk.raw") && message.contains("ermission"),
        "{message}"
    );
}

/// In a directory with the sticky bit, somebody else's file can be written but not replaced. The
/// data file, which can be, is not either.
#[test]
fn an_image_that_cannot_be_replaced() {
    const OTHER: u32 = 65534;
    let dir = tempfile::tempdir().unwrap();
    let (image, data) = (dir.path().join("disk.qcow2"), dir.path().join("disk.raw"));
    fs::set_permissions(dir.path(), fs::Permissions::from_mode(0o1777)).unwrap();
    for path in [&image, &data] {
        fs::write(path, "old").unwrap();
        fs::set_permissions(path, fs::Permissions::from_mode(0o666)).unwrap();
    }
    if std::os::unix::fs::chown(&data, Some(OTHER), Some(OTHER)).is_err() {
        eprintln!("skipped: only root can be two users");
        return;
    }
    let options = CreateOptions {
        size: 1 << 20,
        data_file: Some(data.clone()),
        ..CreateOptions::default()
    };
    let target = image.clone();
    let message = std::thread::spawn(move || {
        // SAFETY: changes the credentials of this thread alone; it only makes files and ends.
        unsafe { libc::setfsuid(OTHER) };
        create(&target, &options).err().map(|e| e.to_string())
    })
    .join()
    .unwrap()
    .expect("refused");
    assert!(
        message.contains("replace") && message.contains("disk.qcow2"),
        "{message}"
    );
    for path in [&image, &data] {
        assert_eq!(fs::read_to_string(path).unwrap(), "old");
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 2);
}

/// Bad L2 entries are found by the request that meets them, and the image is marked; reads elsewhere
/// go on.
#[test]
fn bad_l2_entries_fail_their_own_request() {
    for (kind, entry, word) in [
        (Kind::Internal, 0x8000_0000_0005_0200, "unaligned"),
        (Kind::Internal, 0x4000_ffff_ffff_0000, "past the end"),
        (Kind::Internal, 0x80ff_ffff_ffff_0000, "past the end"),
        (Kind::Internal, 0x8000_0000_4000_0001, "past the end"),
        (Kind::InternalV2, 1, "pre-v3"),
        (
            Kind::External,
            0x8000_0000_0005_0000,
            "does not match guest",
        ),
        (Kind::Raw, 0x8000_0000_0005_0000, "does not match guest"),
        (Kind::External, 0x4000_0000_0001_0000, "Compressed"),
    ] {
        let image = Image::create(kind, 65536, 8 << 20);
        let disk = image.open().unwrap();
        write(&disk, 0, 3 * 65536, 9);
        disk.flush().unwrap();
        drop(disk);
        let mut bytes = fs::read(image.path()).unwrap();
        let l1 = get64(&bytes, 40) as usize;
        let l2 = (get64(&bytes, l1) & 0x00ff_ffff_ffff_fe00) as usize;
        put64(&mut bytes, l2 + 8, entry);
        fs::write(image.path(), &bytes).unwrap();
        let data = fs::read(image.data_file()).ok();

        type Request = fn(&Qcow2, &[VolatileSlice<'_>]) -> Result<()>;
        let requests: [Request; 3] = [
            |disk, bufs| disk.read_at(bufs, 65536 + 512),
            |disk, bufs| disk.write_at(bufs, 65536 + 512),
            |disk, _| disk.write_zeroes(65536, 65536, true),
        ];
        for request in requests {
            fs::write(image.path(), &bytes).unwrap();
            let disk = image.open().unwrap();
            let mut sector = [0; 512];
            let bufs = [VolatileSlice::from(&mut sector[..])];
            let message = request(&disk, &bufs).unwrap_err().to_string();
            assert!(
                message.contains(word) && message.contains("disk.qcow2"),
                "{message}"
            );
            disk.read_at(&bufs, 512).unwrap();
            drop(disk);
            let mut left = fs::read(image.path()).unwrap();
            if kind != Kind::InternalV2 {
                assert_eq!(left[79] & 2, 2, "marked as corrupt");
                left[79] &= !2;
                let refusal = image.open().err().unwrap().to_string();
                assert!(refusal.contains("Image is corrupt"), "{refusal}");
            }
            assert!(left == bytes);
            assert!(fs::read(image.data_file()).ok() == data);
        }
    }
}
