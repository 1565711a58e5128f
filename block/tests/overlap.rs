//! Mappings of a damaged image that lead to metadata: nothing is ever changed there.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use common::structures::{CLUSTER, COMPRESSED, COPIED, Structures, TABLE, set_count, unmarked};
use common::{Memory, new_image, open, open_with, read, write};
use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2};
use tandem_block::{Disk, Error, Result};

const ZERO: u64 = 1;

/// An image with data in its first and its third cluster, and the offset of its L2 table.
fn image() -> (Memory, u64) {
    let image = new_image(&CreateOptions {
        size: 8 * TABLE,
        cluster_size: CLUSTER,
        ..CreateOptions::default()
    });
    let disk = open(&image, None).unwrap();
    write(&disk, 0, CLUSTER, 1).unwrap();
    write(&disk, 2 * CLUSTER, CLUSTER, 3).unwrap();
    drop(disk);
    let l1_table = image.word(40);
    let l2_table = image.word(l1_table) & !COPIED;
    (image, l2_table)
}

type Request = fn(&Qcow2) -> Result<()>;

/// Each thing that a guest can do to change the second cluster.
const REQUESTS: [(&str, Request); 8] = [
    ("write", |disk| write(disk, CLUSTER, CLUSTER, 9)),
    ("write in part", |disk| write(disk, CLUSTER + 512, 512, 9)),
    ("write among others", |disk| write(disk, 0, 3 * CLUSTER, 9)),
    ("zero in part", |disk| {
        disk.write_zeroes(CLUSTER, 512, false)
    }),
    ("zero as a whole", |disk| {
        disk.write_zeroes(CLUSTER, CLUSTER, false)
    }),
    ("zero and unmap", |disk| {
        disk.write_zeroes(CLUSTER, CLUSTER, true)
    }),
    ("discard", |disk| disk.discard(CLUSTER, CLUSTER)),
    ("write compressed", |disk| {
        let cluster = disk.compress(vec![9; CLUSTER as usize])?;
        disk.write_compressed(cluster, CLUSTER)
    }),
];

/// Whether an entry with these flags can lead to `at`: only a compressed cluster can lie in the first
/// cluster of the file.
fn can_lead_to(at: u64, flags: u64) -> bool {
    at != 0 || flags == COMPRESSED
}

#[test]
fn no_request_changes_metadata() {
    for (version, flags) in [(3, 0), (3, ZERO), (3, COMPRESSED), (2, 0), (2, COMPRESSED)] {
        let structures = match version {
            3 => Structures::with_bitmap(),
            _ => Structures::new(version),
        };
        let (sound, l2_table) = (structures.image, structures.l2_table);
        for (structure, at) in structures.places {
            if !can_lead_to(at, flags) {
                continue;
            }
            for (name, request) in REQUESTS {
                if flags == ZERO && ["zero in part", "zero as a whole"].contains(&name) {
                    // Zeros need not be zeroed.
                    continue;
                }
                let image = Memory::new(sound.content());
                image.put_word(l2_table + 8, at | COPIED | flags);
                let before = image.content();
                let disk = open(&image, None).unwrap();
                let error = request(&disk).unwrap_err().to_string();
                let expected = format!("Preventing invalid write on {structure}");
                assert!(error.contains(&expected), "{name}: {error}");
                // The parts of the request before and after it may have been carried out.
                let last = write(&disk, 5 * CLUSTER, 512, 1).unwrap_err();
                assert!(matches!(last, Error::Corrupt { .. }), "{name}: {last}");
                assert_eq!(read(&disk, 2 * CLUSTER, 512)[0], 3, "{name}");
                drop(disk);
                let after = unmarked(&image);
                let data = image.word(l2_table) & !COPIED;
                for (i, (old, new)) in before.iter().zip(&after).enumerate() {
                    let in_first = (data..data + CLUSTER).contains(&(i as u64));
                    assert!(old == new || in_first, "{structure}, {name}: byte {i:#x}");
                }
                if version == 3 {
                    let error = open(&image, None).err().unwrap().to_string();
                    assert!(error.contains("Image is corrupt"), "{error}");
                    let options = OpenOptions {
                        read_only: true,
                        ..OpenOptions::default()
                    };
                    let disk = open_with(&image, None, &options).unwrap();
                    assert_eq!(read(&disk, 2 * CLUSTER, 512)[0], 3);
                }
            }
        }
    }
}

/// A disk that gets another size loses what lies behind its end, or is zeroed there.
#[test]
fn no_new_size_changes_metadata() {
    let structures = Structures::new(3);
    for (structure, at) in &structures.places {
        for flags in [0, COMPRESSED] {
            // The second cluster is cut, or goes.
            for (old, new) in [
                (8 * TABLE, CLUSTER + 512),
                (8 * TABLE, 512),
                (CLUSTER + 512, 8 * TABLE),
            ] {
                if !can_lead_to(*at, flags) {
                    continue;
                }
                let image = Memory::new(structures.image.content());
                image.put_word(24, old);
                image.put_word(structures.l2_table + 8, at | COPIED | flags);
                let before = image.word(*at);
                let resized = open(&image, None).unwrap().resize(new);
                // The size of a disk that shrinks has changed before.
                assert_eq!(resized.is_err(), new > old, "{structure}, {old}");
                assert_eq!(image.word(*at), before, "{structure}, {old}");
                assert_eq!(image.content()[79] & 2, 2, "{structure}, {old}");
            }
        }
    }
}

/// Bitmaps that other programs have not counted are not written over.
#[test]
fn a_bitmap_that_is_counted_as_free_is_refused() {
    let structures = Structures::with_bitmap();
    drop(open(&structures.image, None).unwrap());
    for structure in ["bitmap directory", "bitmap table", "bitmap"] {
        let image = Memory::new(structures.image.content());
        set_count(&image, structures.place(structure), 0);
        let before = image.content();
        let error = open(&image, None).err().unwrap().to_string();
        assert!(error.contains("counted as free"), "{structure}: {error}");
        assert!(image.content() == before);
    }
}

/// An entry leads to a free cluster at first, and a new L2 table or refcount block gets it then.
#[test]
fn a_free_cluster_that_becomes_metadata_is_safe() {
    let (image, l2_table) = image();
    // The next one that the allocator will hand out.
    let free = image.len().next_multiple_of(CLUSTER);
    image.put_word(l2_table + 8, free | COPIED);
    image.extend(free + CLUSTER);
    let disk = open(&image, None).unwrap();
    write(&disk, CLUSTER, CLUSTER, 7).unwrap();
    write(&disk, TABLE, CLUSTER, 4).unwrap();
    let error = write(&disk, CLUSTER, CLUSTER, 8).unwrap_err().to_string();
    assert!(error.contains("active L2 table"), "{error}");
    drop(disk);
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = open_with(&image, None, &options).unwrap();
    assert_eq!(read(&disk, TABLE, CLUSTER), [4; CLUSTER as usize]);
}

/// As that, and the entry has gone by the time when the cluster gets metadata, but the cluster has not
/// come back yet: it is not released then.
#[test]
fn a_cluster_that_has_become_metadata_does_not_come_back() {
    let (image, l2_table) = image();
    let free = image.len().next_multiple_of(CLUSTER);
    image.put_word(l2_table + 8, free | COPIED);
    image.extend(free + CLUSTER);
    let disk = open(&image, None).unwrap();
    disk.discard(CLUSTER, CLUSTER).unwrap();
    write(&disk, TABLE, CLUSTER, 4).unwrap();
    drop(disk.flush());
    drop(disk);
    assert_eq!(image.content()[79] & 2, 2);
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    let disk = open_with(&image, None, &options).unwrap();
    assert_eq!(read(&disk, TABLE, CLUSTER), [4; CLUSTER as usize]);
}

/// A mapping that cannot be, and that a request meets, leaves the mark; data that cannot be decompressed
/// does not.
#[test]
fn damage_leaves_a_mark() {
    let (sound, l2_table) = image();
    // Unaligned, behind the end, and no deflate stream.
    for (entry, mark) in [
        (0x1200 | COPIED, 2),
        (1 << 40 | COPIED, 2),
        (COMPRESSED | CLUSTER, 0),
    ] {
        let image = Memory::new(sound.content());
        image.put_word(l2_table + 8, entry);
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let before = image.content();
        let mut bytes = [0; 512];
        let mut read_bad = |disk: &Qcow2| {
            let buf = vm_memory::VolatileSlice::from(&mut bytes[..]);
            disk.read_at(&[buf], CLUSTER).unwrap_err()
        };
        read_bad(&open_with(&image, None, &options).unwrap());
        assert!(image.content() == before, "a disk that is only read");
        read_bad(&open(&image, None).unwrap());
        assert_eq!(image.content()[79] & 2, mark);
        assert!(unmarked(&image) == before);
    }
}
