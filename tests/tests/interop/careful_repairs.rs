//! What a repair must not do: lose data, or write a table where something else is.

use std::fs;

use tandem_block::qcow2::{CheckOptions, CheckReport, FindingKind, Repair, check};

use crate::qemu::{Image, Kind, assert_same, read_all};

const COPIED: u64 = 1 << 63;

fn word(bytes: &[u8], at: u64) -> u64 {
    u64::from_be_bytes(bytes[at as usize..][..8].try_into().unwrap())
}

fn put(bytes: &mut [u8], at: u64, value: u64) {
    bytes[at as usize..][..8].copy_from_slice(&value.to_be_bytes());
}

fn offset(entry: u64) -> u64 {
    entry & 0x00ff_ffff_ffff_fe00
}

/// Where the first cluster of the disk lies.
fn first_data(bytes: &[u8]) -> u64 {
    offset(word(bytes, offset(word(bytes, word(bytes, 40)))))
}

/// Changes the bytes of an image.
fn damage(image: &Image, change: impl FnOnce(&mut Vec<u8>)) {
    let mut bytes = fs::read(image.path()).unwrap();
    change(&mut bytes);
    fs::write(image.path(), bytes).unwrap();
}

fn repair_all(image: &Image) -> (CheckReport, Vec<String>) {
    let options = CheckOptions {
        repair: Repair::All,
        ..CheckOptions::default()
    };
    let mut found = Vec::new();
    let mut add = |finding: tandem_block::qcow2::Finding| found.push(finding.text);
    let report = check(&image.path(), &options, &mut add).unwrap();
    (report, found)
}

/// Repairs an image, which leaves nothing to be found.
fn assert_repaired(image: &Image) {
    let (_, first) = repair_all(image);
    let (report, found) = repair_all(image);
    let left = (
        report.corruptions,
        report.corruptions_fixed,
        report.check_errors,
    );
    assert_eq!(left, (0, 0, 0), "{first:?}, then {found:?}");
}

/// A small image with clusters of 4 KiB, filled from the beginning.
fn image(more: &str, written: &str) -> Image {
    let image = Image::with_options(Kind::Internal, 4096, 8 << 20, more);
    image.qemu_io(&[format!("write -P 1 0 {written}")]);
    image
}

/// Whatever has become of the way to a cluster of a raw data file, its data stays.
#[test]
fn a_raw_data_file_outlives_damaged_tables() {
    type Change = fn(&mut Vec<u8>);
    let changes: [(&str, Change); 7] = [
        ("L1 entry lost", |b| {
            let l1 = word(b, 40);
            put(b, l1, 0);
        }),
        ("L1 entry past the end", |b| {
            let l1 = word(b, 40);
            put(b, l1, COPIED | 1 << 36);
        }),
        ("L1 entry unaligned", |b| {
            let l1 = word(b, 40);
            let entry = word(b, l1);
            put(b, l1, entry - 0xfe00);
        }),
        ("L1 entry with a reserved bit", |b| {
            let l1 = word(b, 40);
            let entry = word(b, l1);
            put(b, l1, entry + 0x10000 + 1);
        }),
        ("L1 entry to other metadata", |b| {
            let l1 = word(b, 40);
            put(b, l1, COPIED | l1);
        }),
        ("file cut off", |b| b.truncate(0x40000)),
        ("L2 entry unaligned", |b| {
            let l2 = offset(word(b, word(b, 40)));
            put(b, l2 + 24, COPIED | 0x30201);
        }),
    ];
    for (name, change) in changes {
        let image = Image::create(Kind::Raw, 65536, 8 << 20);
        image.qemu_io(&["write -P 7 0 8M".to_owned()]);
        damage(&image, change);
        let data = fs::read(image.data_file()).unwrap();
        for _ in 0..2 {
            let (report, found) = repair_all(&image);
            assert!(report.corruptions > 0, "{name}: {found:?}");
            assert_same(&fs::read(image.data_file()).unwrap(), &data, name);
        }
    }
}

/// A refcount of one bit cannot tell that the cluster of a block is a guest's, too.
#[test]
fn refcounts_are_not_written_over_data() {
    let image = image(",refcount_bits=1", "64k");
    let model = image.read_by_qemu();
    damage(&image, |b| {
        let (table, data) = (word(b, 48), first_data(b));
        put(b, table, data);
    });
    assert_repaired(&image);
    image.expect(&model);
}

/// The same, when the refcounts have to be written anew.
#[test]
fn new_refcounts_count_what_is_used_twice() {
    let image = image(",refcount_bits=1", "64k");
    let model = image.read_by_qemu();
    damage(&image, |b| {
        let (table, data) = (word(b, 48), first_data(b));
        put(b, table + 8, data);
        put(b, table + 16, 0x200);
    });
    assert_repaired(&image);
    assert!(image.open().is_ok());
    image.expect(&model);
}

/// Flags belong into tables, and not where a damaged entry finds something else.
#[test]
fn flags_are_not_written_over_other_metadata() {
    // The L1 table where the header is.
    let image = Image::create(Kind::Internal, 512, 200 << 10);
    image.qemu_io(&["write -P 1 0 30k".to_owned()]);
    damage(&image, |b| put(b, 40, 0));
    let before = fs::read(image.path()).unwrap();
    let (report, _) = repair_all(&image);
    assert!(report.corruptions > 0);
    let after = fs::read(image.path()).unwrap();
    assert_same(&after[..512], &before[..512], "the header");
    repair_all(&image);

    let image = self::image(",refcount_bits=1", "64k");
    damage(&image, |b| {
        let l1 = word(b, 40);
        put(b, l1 + 8, l1);
    });
    let entries = |bytes: &[u8]| {
        (
            word(bytes, word(bytes, 40)),
            word(bytes, word(bytes, 40) + 8),
        )
    };
    let before = entries(&fs::read(image.path()).unwrap());
    repair_all(&image);
    assert_eq!(entries(&fs::read(image.path()).unwrap()), before);

    // The refcounts go elsewhere, and leave their table to whoever else uses it.
    let image = self::image(",refcount_bits=1", "64k");
    damage(&image, |b| {
        let (l1, table) = (word(b, 40), word(b, 48));
        put(b, l1 + 8, table);
    });
    assert_repaired(&image);
    image.check();
}

/// While the refcounts cannot be repaired, the flags do not follow them: a cluster of a snapshot would
/// be overwritten.
#[test]
fn flags_do_not_follow_refcounts_that_are_wrong() {
    let image = Image::create(Kind::Internal, 65536, 4 << 20);
    image.qemu_io(&["write -P 1 0 1M".to_owned()]);
    image.qemu_img(&["snapshot", "-c", "s"], &[]);
    let mut flags = (0, 0);
    damage(&image, |b| {
        let table = word(b, 48);
        let block = word(b, table);
        let l1 = word(b, 40);
        let l2 = offset(word(b, l1));
        flags = (l1, l2);
        for cluster in [l2, offset(word(b, l2))] {
            let at = (block + 2 * (cluster >> 16)) as usize;
            b[at..at + 2].copy_from_slice(&[0, 1]);
        }
        // The refcounts want to be written anew, and cannot be.
        b[table as usize + 15] = 1;
        put(b, l2 + 320, COPIED | 1 << 32);
    });
    let (report, found) = repair_all(&image);
    assert!(report.corruptions > 0, "{found:?}");
    let bytes = fs::read(image.path()).unwrap();
    assert_eq!(word(&bytes, flags.0) & COPIED, 0, "{found:?}");
    assert_eq!(word(&bytes, flags.1) & COPIED, 0, "{found:?}");
}

/// Nor do they follow a refcount that cannot tell how often a cluster is used.
#[test]
fn flags_do_not_follow_refcounts_that_overflow() {
    let image = image(",refcount_bits=1", "64k");
    let mut l2 = 0;
    damage(&image, |b| {
        l2 = offset(word(b, word(b, 40)));
        let entry = word(b, l2) & !COPIED;
        put(b, l2, entry);
        put(b, l2 + 8, entry);
    });
    repair_all(&image);
    let bytes = fs::read(image.path()).unwrap();
    assert_eq!((word(&bytes, l2) | word(&bytes, l2 + 8)) & COPIED, 0);
}

/// What is found before it is repaired keeps no image from being opened.
#[test]
fn a_dirty_image_that_could_be_repaired_is_opened() {
    let image = image(",refcount_bits=1", "64k");
    let model = image.read_by_qemu();
    damage(&image, |b| {
        let (table, data) = (word(b, 48), first_data(b));
        put(b, table, data);
        b[79] |= 1;
    });
    drop(image.open().unwrap());
    image.expect(&model);
}

/// A refcount table past the end of the file is one that is written anew.
#[test]
fn a_refcount_table_past_the_end_is_replaced() {
    let image = Image::create(Kind::Internal, 65536, 4 << 20);
    image.qemu_io(&["write -P 1 0 1M".to_owned()]);
    let model = image.read_by_qemu();
    damage(&image, |b| b[52] = 0x10);
    assert_repaired(&image);
    image.expect(&model);
}

/// What is not allocated below a misplaced cluster shows from below before and after.
#[test]
fn a_repair_hides_no_backing_file() {
    let image = Image::prepared(Kind::Internal, 65536, 1 << 20, |dir| {
        let base = dir.join("base");
        fs::write(&base, vec![7; 1 << 20]).unwrap();
        format!(
            ",extended_l2=on,backing_file={},backing_fmt=raw",
            base.display()
        )
    });
    image.qemu_io(&["write -P 1 0 128k".to_owned()]);
    let mut model = vec![7; 1 << 20];
    model[..65536].fill(1);
    model[65536 + 2048..65536 + 4096].fill(0);
    damage(&image, |b| {
        let l2 = offset(word(b, word(b, 40)));
        let entry = word(b, l2 + 16);
        put(b, l2 + 16, entry + 512);
        // The second subcluster reads as zero.
        put(b, l2 + 24, 1 << 33);
    });
    let (report, found) = repair_all(&image);
    assert_eq!(
        (report.corruptions, report.corruptions_fixed),
        (0, 1),
        "{found:?}"
    );
    assert_same(&read_all(&image.open().unwrap()), &model, "the disk");
    image.expect(&model);
}

/// Autoclear bits that nobody knows do not outlive a repair, and those that are known do.
#[test]
fn a_repair_keeps_no_promises_that_it_does_not_know() {
    let image = Image::create(Kind::Raw, 65536, 1 << 20);
    damage(&image, |b| b[88] |= 0x80);
    image.check();
    assert_eq!(fs::read(image.path()).unwrap()[88], 0x80, "only looked at");
    repair_all(&image);
    let bytes = fs::read(image.path()).unwrap();
    assert_eq!((bytes[88], bytes[95]), (0, 2));
}

/// A name that is shorter than its place in the table of names is one.
#[test]
fn unknown_features_have_the_names_that_the_image_gives_them() {
    let image = Image::create(Kind::Internal, 65536, 1 << 20);
    damage(&image, |b| {
        b[72] |= 0x80;
        let name = b"\x00\x3fTest feature";
        b[112..116].copy_from_slice(&0x6803_f857u32.to_be_bytes());
        b[116..120].copy_from_slice(&(name.len() as u32).to_be_bytes());
        b[120..600].fill(0);
        b[120..120 + name.len()].copy_from_slice(name);
    });
    let error = image.open().err().unwrap().to_string();
    assert!(error.ends_with("feature(s): Test feature"), "{error}");
    let output = crate::qemu::command("qemu-img", &["check", image.path().to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.ends_with("feature(s): Test feature\n"), "{text}");
}

/// Snapshots that share a bad L2 table with each other do not make a check endless, and all their
/// references are counted.
#[test]
fn shared_tables_are_looked_at_a_few_times() {
    const SNAPSHOTS: u64 = 100;
    let image = Image::create(Kind::Internal, 4096, 1 << 20);
    image.qemu_io(&["write -P 1 0 64k".to_owned()]);
    for i in 0..SNAPSHOTS {
        image
            .open()
            .unwrap()
            .create_snapshot(format!("{i}").as_bytes())
            .unwrap();
    }
    image.check();
    let (report, found) = repair_all(&image);
    assert_eq!(
        (report.corruptions_fixed, report.leaks_fixed),
        (0, 0),
        "{found:?}"
    );
    damage(&image, |b| {
        let l2 = offset(word(b, word(b, 40)));
        let entry = word(b, l2);
        put(b, l2, entry | 0x100);
    });
    let mut count = 0;
    let mut add = |finding: tandem_block::qcow2::Finding| {
        assert_eq!(finding.kind, FindingKind::Corruption, "{}", finding.text);
        count += 1;
    };
    check(&image.path(), &CheckOptions::default(), &mut add).unwrap();
    assert!((1..=20).contains(&count), "{count}");
}
