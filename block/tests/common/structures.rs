//! An image that has metadata of every kind.

use tandem_block::qcow2::CreateOptions;

use super::{Memory, new_image, open, write};

pub const CLUSTER: u64 = 4096;
/// What an L2 table maps.
pub const TABLE: u64 = CLUSTER / 8 * CLUSTER;
pub const COPIED: u64 = 1 << 63;
pub const COMPRESSED: u64 = 1 << 62;
/// Offset of `autoclear_features` in the header.
const AUTOCLEAR: u64 = 88;

/// An image with a snapshot, with data in its first and its third cluster: `1` and `3` in the disk,
/// `11` and `13` in the snapshot.
pub struct Structures {
    pub image: Memory,
    /// The L2 table of the disk, and that of the snapshot.
    pub l2_table: u64,
    pub snapshot_l2_table: u64,
    /// Where each structure is, by the name that errors have for it.
    pub places: Vec<(&'static str, u64)>,
}

impl Structures {
    pub fn new(version: u32) -> Self {
        let image = new_image(&CreateOptions {
            size: 8 * TABLE,
            cluster_size: CLUSTER,
            version,
            ..CreateOptions::default()
        });
        let fill = |first, third| {
            let disk = open(&image, None).unwrap();
            write(&disk, 0, CLUSTER, first).unwrap();
            write(&disk, 2 * CLUSTER, CLUSTER, third).unwrap();
            disk
        };
        fill(11, 13).create_snapshot(b"s").unwrap();
        drop(fill(1, 3));
        let l1_table = image.word(40);
        let refcount_table = image.word(48);
        let snapshots = image.word(64);
        let snapshot_l1_table = image.word(snapshots);
        let l2_table = image.word(l1_table) & !COPIED;
        let snapshot_l2_table = image.word(snapshot_l1_table) & !COPIED;
        assert_ne!(l2_table, snapshot_l2_table);
        let places = vec![
            ("qcow2_header", 0),
            ("refcount table", refcount_table),
            ("refcount block", image.word(refcount_table)),
            ("active L1 table", l1_table),
            ("active L2 table", l2_table),
            ("snapshot table", snapshots),
            ("inactive L1 table", snapshot_l1_table),
            ("inactive L2 table", snapshot_l2_table),
        ];
        Self {
            image,
            l2_table,
            snapshot_l2_table,
            places,
        }
    }

    /// As [`new`](Self::new) in version 3, with a bitmap that is marked as in use, so that it stays as
    /// it is.
    pub fn with_bitmap() -> Self {
        let mut structures = Self::new(3);
        let image = &structures.image;
        let directory = image.len().next_multiple_of(CLUSTER);
        let (table, data) = (directory + CLUSTER, directory + 2 * CLUSTER);
        image.extend(data + CLUSTER);
        for at in [directory, table, data] {
            set_count(image, at, 1);
        }
        image.put_word(directory, table);
        // One entry in the table; flags.
        image.put_word(directory + 8, 1 << 32 | 1);
        // The type, a granularity of 64 KiB, a name of one byte, and no extra data.
        image.put_word(directory + 16, 1 << 56 | 16 << 48 | 1 << 32);
        image.put_word(directory + 24, u64::from(b'b') << 56);
        image.put_word(table, data);
        image.put_word(data, 0x55);

        let mut at = image.word(96) & 0xffff_ffff;
        while image.word(at) != 0 {
            at += 8 + (image.word(at) & 0xffff_ffff).next_multiple_of(8);
        }
        let extension = [0x2385_2875 << 32 | 24, 1 << 32, 32, directory, 0];
        for (i, word) in (0..).zip(extension) {
            image.put_word(at + i * 8, word);
        }
        image.put_word(AUTOCLEAR, 1);
        structures.places.extend([
            ("bitmap directory", directory),
            ("bitmap table", table),
            ("bitmap", data),
        ]);
        structures
    }

    pub fn place(&self, structure: &str) -> u64 {
        let place = |(name, at): &(&str, u64)| (*name == structure).then_some(*at);
        self.places.iter().find_map(place).unwrap()
    }
}

/// Sets the refcount of the cluster at `offset`, in the first refcount block.
pub fn set_count(image: &Memory, offset: u64, count: u16) {
    let at = image.word(image.word(48)) + offset / CLUSTER * 2;
    let shift = 48 - at % 8 * 8;
    let word = image.word(at & !7) & !(0xffff << shift);
    image.put_word(at & !7, word | u64::from(count) << shift);
}

/// The content of `image` without the corrupt bit.
pub fn unmarked(image: &Memory) -> Vec<u8> {
    let mut content = image.content();
    content[79] &= !2;
    content
}
