//! Images that were not closed, or are damaged: what opening them does, and what a repair.

use std::fs;

use tandem_block::qcow2::{
    CheckOptions, CheckReport, Finding, FindingKind, OpenOptions, Qcow2, Repair, check,
};
use tandem_block::{Disk, Error};

use crate::qemu::{Image, Kind, assert_same, command, read_all, write};

const DIRTY: u8 = 1;
const CORRUPT: u8 = 2;

/// The lowest byte of the incompatible features.
fn features(image: &Image) -> u8 {
    fs::read(image.path()).unwrap()[79]
}

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
}

fn offset(entry: u64) -> u64 {
    entry & 0x00ff_ffff_ffff_fe00
}

fn repair(image: &Image, repair: Repair) -> (CheckReport, Vec<Finding>) {
    let options = CheckOptions {
        repair,
        ..CheckOptions::default()
    };
    let mut found = Vec::new();
    let report = check(&image.path(), &options, &mut |finding| found.push(finding)).unwrap();
    (report, found)
}

/// QEMU dies with refcounts that it has postponed.
fn killed_qemu(kind: Kind) -> (Image, Vec<u8>) {
    let image = Image::with_options(kind, 65536, 8 << 20, ",lazy_refcounts=on");
    let path = image.path();
    let commands = ["write -P 7 100k 3M", "write -z 200k 64k", "flush", "abort"];
    let mut args = vec!["-f", "qcow2", path.to_str().unwrap()];
    commands.iter().for_each(|line| args.extend(["-c", line]));
    let died = command("qemu-io", &args);
    assert!(!died.status.success(), "{died:?}");
    assert_eq!(features(&image) & DIRTY, DIRTY);
    let mut model = vec![0; 8 << 20];
    model[100 << 10..(100 << 10) + (3 << 20)].fill(7);
    model[200 << 10..264 << 10].fill(0);
    (image, model)
}

#[test]
fn an_image_that_was_not_closed_is_repaired_when_it_is_opened() {
    for kind in [Kind::Internal, Kind::External] {
        let (image, mut model) = killed_qemu(kind);
        let before = fs::read(image.path()).unwrap();
        let read_only = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let disk = Qcow2::open(&image.path(), &read_only).unwrap();
        assert_same(&read_all(&disk), &model, "read-only");
        drop(disk);
        assert!(before == fs::read(image.path()).unwrap());

        let disk = image.open().unwrap();
        assert_eq!(features(&image) & DIRTY, 0, "repaired");
        write(&disk, 5 << 20, 100_000, 9);
        model[5 << 20..(5 << 20) + 100_000].fill(9);
        disk.flush().unwrap();
        assert_same(&read_all(&disk), &model, "after the repair");
        drop(disk);
        image.expect(&model);
    }
}

/// An image that cannot be repaired without loss is not opened for writing, and stays dirty.
#[test]
fn what_cannot_be_repaired_stays_dirty() {
    let (image, _) = killed_qemu(Kind::Internal);
    let mut bytes = fs::read(image.path()).unwrap();
    let l2 = offset(word(&bytes, word(&bytes, 40)));
    let entry = word(&bytes, l2 + 8 * 10);
    put(&mut bytes, l2 + 8 * 10, entry | 0x200);
    fs::write(image.path(), bytes).unwrap();
    let error = image.open().err().unwrap().to_string();
    assert!(error.contains("cannot be repaired"), "{error}");
    assert!(error.contains("not properly aligned"), "{error}");
    assert_eq!(features(&image) & DIRTY, DIRTY);
}

/// An entry that leads to metadata is met, the image is marked, and after a repair the cluster is
/// written elsewhere.
#[test]
fn a_mapping_onto_metadata_can_be_repaired() {
    for target in ["L1 table", "L2 table", "refcount table", "refcount block"] {
        let image = Image::create(Kind::Internal, 65536, 8 << 20);
        image.qemu_io(&["write -P 5 0 1M".to_owned()]);
        let mut bytes = fs::read(image.path()).unwrap();
        let l1 = word(&bytes, 40);
        let l2 = offset(word(&bytes, l1));
        let refcount_table = word(&bytes, 48);
        let place = match target {
            "L1 table" => l1,
            "L2 table" => l2,
            "refcount table" => refcount_table,
            _ => word(&bytes, refcount_table),
        };
        put(&mut bytes, l2 + 8 * 3, place | 1 << 63);
        fs::write(image.path(), &bytes).unwrap();

        let disk = image.open().unwrap();
        let mut sector = [1; 512];
        let bufs = [vm_memory::VolatileSlice::from(&mut sector[..])];
        let error = disk.write_at(&bufs, 3 * 65536).unwrap_err();
        assert!(error.to_string().contains("Preventing invalid write"));
        drop(disk);
        assert_eq!(features(&image) & CORRUPT, CORRUPT);
        assert!(matches!(image.open(), Err(Error::Invalid { .. })));

        let (report, found) = repair(&image, Repair::All);
        assert_eq!(report.corruptions, 0, "{target}: {found:?}");
        assert!(found.iter().any(|f| f.kind == FindingKind::Repaired));
        assert_eq!(features(&image) & CORRUPT, 0);
        image.check();
        let mut model = image.read_by_qemu();
        let disk = image.open().unwrap();
        write(&disk, 3 * 65536, 512, 6);
        model[3 * 65536..][..512].fill(6);
        disk.flush().unwrap();
        drop(disk);
        image.expect(&model);
    }
}

/// Clusters of live metadata are counted as free: no allocator gets to hand them out.
#[test]
fn metadata_that_is_counted_as_free_is_never_handed_out() {
    let image = Image::create(Kind::Internal, 65536, 8 << 20);
    image.qemu_io(&["write -P 5 0 1M".to_owned()]);
    image.qemu_img(&["snapshot", "-c", "s"], &[]);
    image.qemu_io(&["write -P 6 0 100k".to_owned()]);
    let sound = fs::read(image.path()).unwrap();
    let model = image.read_by_qemu();
    let taken = image.snapshot_by_qemu("s");
    let l1 = word(&sound, 40);
    let refcount_table = word(&sound, 48);
    let snapshots = word(&sound, 64);
    let snapshot_l1 = word(&sound, snapshots);
    let block = word(&sound, refcount_table);
    let places = [
        0,
        l1,
        offset(word(&sound, l1)),
        refcount_table,
        block,
        snapshots,
        snapshot_l1,
        offset(word(&sound, snapshot_l1)),
    ];
    for place in places {
        let mut damaged = sound.clone();
        let count = (block + place / 65536 * 2) as usize;
        assert_ne!(damaged[count..count + 2], [0, 0]);
        damaged[count..count + 2].fill(0);
        fs::write(image.path(), &damaged).unwrap();
        let error = image.open().err().unwrap().to_string();
        assert!(error.contains("counted as free"), "{place:#x}: {error}");
        assert!(damaged == fs::read(image.path()).unwrap());
        let (report, found) = repair(&image, Repair::All);
        assert_eq!(report.corruptions, 0, "{place:#x}: {found:?}");
        image.expect(&model);
        assert_same(&image.snapshot_by_qemu("s"), &taken, "snapshot");
    }
}

/// What QEMU does not look at.
#[test]
fn data_files_are_checked_and_repaired() {
    let image = Image::create(Kind::External, 65536, 8 << 20);
    image.qemu_io(&["write -P 5 0 8M".to_owned()]);
    let cut = fs::OpenOptions::new()
        .write(true)
        .open(image.data_file())
        .unwrap();
    cut.set_len(5 << 20).unwrap();
    image.check();
    let (report, found) = repair(&image, Repair::Nothing);
    assert_eq!(report.corruptions, 1, "{found:?}");
    assert_eq!(
        found[0].text,
        "ERROR data file has 5242880 bytes, and the disk 8388608"
    );
    let (report, _) = repair(&image, Repair::All);
    assert_eq!((report.corruptions, report.corruptions_fixed), (0, 1));
    assert_eq!(fs::metadata(image.data_file()).unwrap().len(), 8 << 20);
    assert_eq!(repair(&image, Repair::Nothing).0.corruptions, 0);

    // Where the mapping says that there are zeros, they are written; where it says nothing, it may be the
    // mapping that is lost.
    for (more, is_zero) in [
        ("", false),
        ("", true),
        (",extended_l2=on", false),
        (",extended_l2=on", true),
    ] {
        let image = Image::with_options(Kind::Raw, 65536, 8 << 20, more);
        image.qemu_io(&["write -P 5 0 2M".to_owned()]);
        let mut bytes = fs::read(image.path()).unwrap();
        let l2 = offset(word(&bytes, word(&bytes, 40)));
        let entry_len = if more.is_empty() { 8 } else { 16 };
        let at = (l2 + 3 * entry_len) as usize;
        bytes[at..at + entry_len as usize].fill(0);
        if is_zero && entry_len == 8 {
            bytes[at + 7] = 1;
        } else if is_zero {
            bytes[at + 8..at + 12].fill(0xff);
        }
        fs::write(image.path(), &bytes).unwrap();
        let shown = image.read_by_qemu();
        assert_eq!(shown[3 * 65536], 0);
        let (report, found) = repair(&image, Repair::Nothing);
        assert_eq!(report.corruptions, 1, "{found:?}");
        assert_eq!(
            found[0].text,
            "ERROR offset=30000: Raw data file has data where the disk reads as zero"
        );
        let data = fs::read(image.data_file()).unwrap();
        let (report, _) = repair(&image, Repair::All);
        let expected = if is_zero { (0, 1) } else { (1, 0) };
        assert_eq!((report.corruptions, report.corruptions_fixed), expected);
        if is_zero {
            assert_eq!(repair(&image, Repair::Nothing).0.corruptions, 0);
            image.expect(&shown);
        } else {
            assert_same(
                &fs::read(image.data_file()).unwrap(),
                &data,
                "the data file",
            );
        }
    }
}
