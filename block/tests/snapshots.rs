//! Operations on the snapshots of damaged and unusual images.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::path::Path;

use common::structures::{CLUSTER, COMPRESSED, Structures, set_count, unmarked};
use common::{Memory, assert_clean, new_image, open, open_with, read, write};
use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, Repair, check_storage};
use tandem_block::{Error, Result};

type Operation = fn(Qcow2) -> Result<()>;

const CREATE: Operation = |disk| disk.create_snapshot(b"new");
const APPLY: Operation = |disk| disk.apply_snapshot(b"s");
const DELETE: Operation = |disk| disk.delete_snapshot(b"s");

/// An entry that an operation goes through leads to metadata: nothing changes.
#[test]
fn no_operation_takes_metadata_for_data() {
    for version in [2, 3] {
        let structures = match version {
            3 => Structures::with_bitmap(),
            _ => Structures::new(version),
        };
        let (active, snapshot) = (structures.l2_table, structures.snapshot_l2_table);
        for (structure, at) in &structures.places {
            for (name, operation, table) in [
                ("create", CREATE, active),
                ("apply, of the disk", APPLY, active),
                ("apply, of the snapshot", APPLY, snapshot),
                ("delete", DELETE, snapshot),
            ] {
                // A compressed cluster may begin anywhere.
                for entry in [*at, at | 1, COMPRESSED | at | 512] {
                    let is_unusable = entry & 1 != 0 && version == 2;
                    if entry & !1 == 0 || is_unusable {
                        continue;
                    }
                    let image = Memory::new(structures.image.content());
                    image.put_word(table + 8, entry);
                    let before = image.content();
                    let error = operation(open(&image, None).unwrap()).unwrap_err();
                    let error = error.to_string();
                    let expected = format!("Preventing invalid write on {structure}");
                    assert!(error.contains(&expected), "{name}: {error}");
                    assert!(unmarked(&image) == before, "{name}, {structure}");
                    let is_marked = image.content()[79] & 2 != 0;
                    assert_eq!(is_marked, version == 3, "{name}, {structure}");
                }
            }
        }
    }
}

/// After a repair, what an entry shares with metadata has a reference of each.
#[test]
fn metadata_with_references_of_its_own_stays() {
    let structures = Structures::new(3);
    for (structure, at) in &structures.places[1..] {
        for (entries, is_allowed) in [(1, true), (2, false)] {
            let image = Memory::new(structures.image.content());
            for entry in 0..entries {
                image.put_word(structures.snapshot_l2_table + 8 + entry * 16, *at);
            }
            set_count(&image, *at, 2);
            let before = image.content();
            let deleted = DELETE(open(&image, None).unwrap());
            if !is_allowed {
                deleted.unwrap_err();
                assert!(unmarked(&image) == before, "{structure}");
                continue;
            }
            deleted.unwrap();
            assert_clean(&image);
            let disk = open(&image, None).unwrap();
            assert_eq!(
                (read(&disk, 0, 1)[0], read(&disk, 2 * CLUSTER, 1)[0]),
                (1, 3)
            );
        }
    }
}

#[test]
fn entries_that_lead_nowhere() {
    let structures = Structures::new(3);
    let (active, snapshot) = (structures.l2_table, structures.snapshot_l2_table);
    for (operation, table) in [(CREATE, active), (APPLY, snapshot), (DELETE, snapshot)] {
        let image = Memory::new(structures.image.content());
        image.put_word(table + 8, 0x1200);
        let before = image.content();
        let error = operation(open(&image, None).unwrap()).unwrap_err();
        assert!(error.to_string().contains("not aligned"), "{error}");
        assert!(unmarked(&image) == before);
        assert_eq!(image.content()[79] & 2, 2);
    }
    // What is counted as free cannot get another user.
    for (operation, table) in [(CREATE, active), (APPLY, snapshot)] {
        let image = Memory::new(structures.image.content());
        image.put_word(table + 8, 1 << 30);
        let error = operation(open(&image, None).unwrap()).unwrap_err();
        assert!(error.to_string().contains("counted as free"), "{error}");
        let mut found = Vec::new();
        let mut note = |finding: tandem_block::qcow2::Finding| found.push(finding.text);
        check_storage(Path::new("image"), &image, None, Repair::Nothing, &mut note).unwrap();
        assert!(
            found.iter().all(|text| text.contains("end of the file")),
            "{found:?}"
        );
        assert_eq!(image.content()[79], 0, "neither dirty nor corrupt");
    }
}

/// Opens `image`, which cannot be written, and can be read all the same.
fn refused(image: &Memory, expected: &str) {
    let before = image.content();
    let error = open(image, None).err().unwrap().to_string();
    assert!(error.contains(expected), "{error}");
    assert!(image.content() == before);
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    assert_eq!(read(&open_with(image, None, &options).unwrap(), 0, 1)[0], 1);
}

#[test]
fn an_l2_table_that_is_named_twice() {
    let structures = Structures::new(3);
    let (image, l1) = (&structures.image, structures.place("inactive L1 table"));
    image.put_word(l1 + 8, image.word(l1));
    set_count(image, structures.snapshot_l2_table, 2);
    refused(image, "two entries lead to the same L2 table");
}

#[test]
fn an_l2_table_that_is_shared_and_counted_once() {
    let structures = Structures::new(3);
    let (image, l1) = (&structures.image, structures.place("inactive L1 table"));
    image.put_word(l1 + 8, structures.l2_table);
    refused(image, "is used 2 times and counted 1 times");
    set_count(image, structures.l2_table, 2);
    image.put_word(structures.place("active L1 table"), structures.l2_table);
    drop(open(image, None).unwrap());
}

#[test]
fn snapshots_that_share_an_l1_table() {
    let structures = Structures::new(3);
    drop(open(&structures.image, None).unwrap());
    let image = &structures.image;
    open(image, None).unwrap().create_snapshot(b"t").unwrap();
    let table = image.word(64);
    // Fields, extra data, ID and name.
    let entry = table + (40 + 24 + 1 + 1u64).next_multiple_of(8);
    image.put_word(entry, image.word(table));
    refused(image, "overlaps that of l1_table_offset of a snapshot");
}

/// No room for the tables of a snapshot: the image is what it was, in version 2 as well.
#[test]
fn a_device_that_is_full() {
    for version in [2, 3] {
        let image = new_image(&CreateOptions {
            size: 1 << 20,
            cluster_size: CLUSTER,
            version,
            ..CreateOptions::default()
        });
        let disk = open(&image, None).unwrap();
        write(&disk, 0, 30 * CLUSTER, 1).unwrap();
        drop(disk);
        let used = image.len().next_multiple_of(CLUSTER);
        // Room for nothing, for the L1 table, and for all.
        for (room, fits) in [(0, false), (1, false), (2, true)] {
            let device = Memory::device(used + room * CLUSTER);
            device.put_bytes(0, &image.content());
            let before = device.content();
            let taken = open(&device, None).unwrap().create_snapshot(b"s");
            assert_clean(&device);
            if fits {
                taken.unwrap();
            } else {
                assert!(matches!(taken, Err(Error::Io { .. })), "{taken:?}");
                let used = used as usize;
                assert!(device.content()[..used] == before[..used]);
            }
        }
    }
}

#[test]
fn names_that_cannot_be() {
    let image = Structures::new(3).image;
    let before = image.content();
    let refusals: [Operation; 3] = [
        |disk| disk.create_snapshot(&[b'n'; 256]),
        |disk| disk.apply_snapshot(b"other"),
        |disk| disk.delete_snapshot(b"other"),
    ];
    for refuse in refusals {
        let writes = image.metadata_writes();
        refuse(open(&image, None).unwrap()).unwrap_err();
        assert_eq!(image.metadata_writes(), writes);
        assert!(image.content() == before);
    }
}

/// The L1 table of a large disk in small clusters has 32 MiB: as many snapshots as are taken can be
/// opened, listed and checked.
#[test]
fn snapshots_with_large_l1_tables() {
    let image = new_image(&CreateOptions {
        size: 128 << 30,
        cluster_size: 512,
        ..CreateOptions::default()
    });
    const COUNT: usize = 9;
    for i in 0..COUNT {
        let disk = open(&image, None).unwrap();
        write(&disk, (i as u64) << 33, 512, 7).unwrap();
        disk.create_snapshot(b"s").unwrap();
    }
    let disk = open(&image, None).unwrap();
    assert_eq!(disk.snapshots().unwrap().len(), COUNT);
    drop(disk);
    assert_clean(&image);
}
