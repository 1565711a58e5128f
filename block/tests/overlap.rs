//! Mappings of a damaged image that lead to metadata: nothing is ever changed there.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use common::{Memory, new_image, open, open_with, read, write};
use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2};
use tandem_block::{Disk, Error, Result};

const CLUSTER: u64 = 4096;
/// What an L2 table maps.
const TABLE: u64 = CLUSTER / 8 * CLUSTER;
const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;
const ZERO: u64 = 1;

/// An image with data in its first and its third cluster, and the offset of its L2 table.
fn image(version: u32) -> (Memory, u64) {
    let image = new_image(&CreateOptions {
        size: 8 * TABLE,
        cluster_size: CLUSTER,
        version,
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

/// The content of `image` without the corrupt bit.
fn unmarked(image: &Memory) -> Vec<u8> {
    let mut content = image.content();
    content[79] &= !2;
    content
}

type Request = fn(&Qcow2) -> Result<()>;

/// Each thing that a guest can do to change the second cluster.
const REQUESTS: [(&str, Request); 5] = [
    ("write", |disk| write(disk, CLUSTER, CLUSTER, 9)),
    ("write in part", |disk| write(disk, CLUSTER + 512, 512, 9)),
    ("write among others", |disk| write(disk, 0, 3 * CLUSTER, 9)),
    ("zero in part", |disk| {
        disk.write_zeroes(CLUSTER, 512, false)
    }),
    ("discard", |disk| disk.discard(CLUSTER, CLUSTER)),
];

#[test]
fn no_request_changes_metadata() {
    for (version, flags) in [(3, 0), (3, ZERO), (3, COMPRESSED), (2, 0), (2, COMPRESSED)] {
        let (sound, l2_table) = image(version);
        let (refcount_table, l1_table) = (sound.word(48), sound.word(40));
        let refcount_block = sound.word(refcount_table);
        for (structure, at) in [
            ("refcount table", refcount_table),
            ("refcount block", refcount_block),
            ("active L1 table", l1_table),
            ("active L2 table", l2_table),
        ] {
            for (name, request) in REQUESTS {
                if flags == ZERO && name == "zero in part" {
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

/// An entry leads to a free cluster at first, and a new L2 table or refcount block gets it then.
#[test]
fn a_free_cluster_that_becomes_metadata_is_safe() {
    let (image, l2_table) = image(3);
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

/// Damage of any kind that a request meets leaves the mark.
#[test]
fn damage_leaves_a_mark() {
    let (sound, l2_table) = image(3);
    // Unaligned, behind the end, and no deflate stream.
    for entry in [0x1200 | COPIED, 1 << 40 | COPIED, COMPRESSED | CLUSTER] {
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
        assert_eq!(image.content()[79] & 2, 2);
        assert!(unmarked(&image) == before);
    }
}
