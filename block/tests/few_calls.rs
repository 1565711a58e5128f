//! How many calls on the files a request makes: what takes up from below, or from a shared cluster, is
//! written in one piece, and what lies in a row is read in one piece, whatever it is mapped by.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use common::{Memory, new_image, open, read, write};
use tandem_block::qcow2::{CompressionType, CreateOptions, DataFileLayout, OpenOptions, Qcow2};
use tandem_block::{Disk, Error, ImageFormat, Raw};

const CLUSTER: u64 = 65536;
const COPIED: u64 = 1 << 63;

/// An image over `base`.
fn over(base: &Memory, more: CreateOptions) -> (Memory, Qcow2) {
    let image = new_image(&CreateOptions {
        size: 4 << 20,
        backing_file: Some("base".into()),
        backing_format: Some(ImageFormat::Raw),
        ..more
    });
    let disk = open_over(&image, base);
    (image, disk)
}

fn open_over(image: &Memory, base: &Memory) -> Qcow2 {
    let base = Raw::with_storage(Path::new("base"), Box::new(base.clone()), true).unwrap();
    Qcow2::with_backing(
        Path::new("image"),
        Box::new(image.clone()),
        None,
        Some(Arc::new(base)),
        &OpenOptions::default(),
    )
    .unwrap()
}

fn base() -> Memory {
    Memory::new(vec![7; 4 << 20])
}

#[test]
fn copy_on_write_is_one_write() {
    let base = base();
    let (image, disk) = over(&base, CreateOptions::default());
    let (writes, reads) = (image.writes(), base.reads());
    // The beginning of the first cluster and the end of the last one come from below.
    write(&disk, 1000, 4 * CLUSTER, 5).unwrap();
    assert_eq!(image.writes() - writes, 1);
    assert_eq!(base.reads() - reads, 2, "one for each edge");
    assert_eq!(read(&disk, 0, 1000), [7; 1000]);

    // What a snapshot shares is copied in the same way.
    disk.create_snapshot(b"s").unwrap();
    let disk = open_over(&image, &base);
    let writes = image.writes();
    write(&disk, 500, 100, 6).unwrap();
    assert_eq!(image.writes() - writes, 1);
    assert_eq!(read(&disk, 600, 400), [7; 400]);
}

/// As by a commit while the disk is in use, which opens the base for writing.
#[test]
fn what_has_come_into_a_hole_below_is_seen() {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(4 << 20).unwrap();
    let base = Arc::new(Raw::open(file.path(), false).unwrap());
    let image = new_image(&CreateOptions {
        size: 4 << 20,
        backing_file: Some("base".into()),
        backing_format: Some(ImageFormat::Raw),
        ..CreateOptions::default()
    });
    let disk = Qcow2::with_backing(
        Path::new("image"),
        Box::new(image),
        None,
        Some(base.clone()),
        &OpenOptions::default(),
    )
    .unwrap();
    write(&disk, CLUSTER, 512, 5).unwrap();
    write(&*base, 2 * CLUSTER, CLUSTER, 7).unwrap();
    write(&disk, 2 * CLUSTER, 512, 5).unwrap();
    assert_eq!(read(&disk, 2 * CLUSTER + 512, 512), [7; 512]);
}

/// A new cluster is filled up only with what an image, or a raw disk, below has for it.
#[test]
fn what_is_empty_below_is_not_copied() {
    const SIZE: u64 = 2 << 20;
    // It ends within a cluster of the one above, and its own are smaller.
    const BASE: u64 = SIZE / 2 + 1536;
    for (extended_l2, is_raw) in [(false, false), (true, false), (false, true), (true, true)] {
        let base: Arc<dyn Disk> = if is_raw {
            let file = tempfile::NamedTempFile::new().unwrap();
            file.as_file().set_len(BASE).unwrap();
            let at = 3 * CLUSTER + 8192;
            file.as_file().write_all_at(&[7; 512], at).unwrap();
            Arc::new(Raw::open(file.path(), true).unwrap())
        } else {
            let image = new_image(&CreateOptions {
                size: BASE,
                cluster_size: 4096,
                ..CreateOptions::default()
            });
            let base = open(&image, None).unwrap();
            write(&base, 3 * CLUSTER + 8192, 512, 7).unwrap();
            Arc::new(base)
        };
        let image = new_image(&CreateOptions {
            size: SIZE,
            extended_l2,
            backing_file: Some("base".into()),
            backing_format: Some(ImageFormat::Qcow2),
            ..CreateOptions::default()
        });
        let disk = Qcow2::with_backing(
            Path::new("image"),
            Box::new(image.clone()),
            None,
            Some(base),
            &OpenOptions::default(),
        )
        .unwrap();
        let mut expected = vec![0; SIZE as usize];
        expected[3 * CLUSTER as usize + 8192..][..512].fill(7);
        let whole = if extended_l2 { 20100 } else { 0 };
        for (offset, end) in [
            (CLUSTER + 1000, 1100),
            (SIZE / 2 + 100, 200),
            (SIZE / 2 + CLUSTER + 5000, 5100),
            // Before it in the cluster there is something, and in the next one behind it.
            (3 * CLUSTER + 20000, whole),
            (3 * CLUSTER - 500, CLUSTER - 400),
        ] {
            write(&disk, offset, 100, 5).unwrap();
            // New clusters lie at the end of the file.
            assert_eq!(image.len() % CLUSTER, end, "{offset:#x}");
            expected[offset as usize..][..100].fill(5);
            assert!(read(&disk, 0, SIZE) == expected, "{offset:#x}");
        }
        // A cluster that has been in use holds what it held.
        write(&disk, 5 * CLUSTER, CLUSTER, 9).unwrap();
        disk.flush().unwrap();
        disk.write_zeroes(5 * CLUSTER, CLUSTER, true).unwrap();
        disk.flush().unwrap();
        let len = image.len();
        write(&disk, 6 * CLUSTER + 3000, 100, 5).unwrap();
        assert_eq!(image.len(), len);
        expected[6 * CLUSTER as usize + 3000..][..100].fill(5);
        assert!(read(&disk, 0, SIZE) == expected);
    }
}

#[test]
fn chains_are_read_in_extents() {
    let base = base();
    let (image, disk) = over(&base, CreateOptions::default());
    let reads = base.reads();
    assert_eq!(read(&disk, 0, 4 << 20), vec![7; 4 << 20]);
    assert_eq!(base.reads() - reads, 1, "nothing in the image");
    write(&disk, 10 * CLUSTER, 20 * CLUSTER, 5).unwrap();
    let (above, below) = (image.reads(), base.reads());
    read(&disk, 0, 4 << 20);
    assert_eq!((image.reads() - above, base.reads() - below), (1, 2));
}

/// A write to a part of a cluster takes from below what it shares a subcluster with, and the rest of
/// the cluster shows from below as before.
#[test]
fn subclusters_are_allocated_by_themselves() {
    let base = base();
    let (image, disk) = over(
        &base,
        CreateOptions {
            extended_l2: true,
            ..CreateOptions::default()
        },
    );
    let (writes, reads) = (image.writes(), base.reads());
    // Subclusters 1 and 2 of the second cluster, the second of them in part.
    write(&disk, CLUSTER + 2048, 3000, 5).unwrap();
    assert_eq!(image.writes() - writes, 1);
    assert_eq!(base.reads() - reads, 1, "the rest of one subcluster");
    disk.close().unwrap();
    drop(disk);
    let l2_table = image.word(image.word(40)) & !COPIED;
    assert_eq!(
        image.word(l2_table + 24),
        0b110,
        "subclusters that are there"
    );
    let disk = open_over(&image, &base);
    let mut expected = vec![7; CLUSTER as usize];
    expected[2048..5048].fill(5);
    assert_eq!(read(&disk, CLUSTER, CLUSTER), expected);
}

/// Subclusters that are there and zero at once, or there without a place.
#[test]
fn subcluster_states_that_cannot_be() {
    for (word, bits) in [(None, 1 | 1 << 32), (Some(0), 1)] {
        let image = new_image(&CreateOptions {
            size: 1 << 20,
            extended_l2: true,
            ..CreateOptions::default()
        });
        let disk = open(&image, None).unwrap();
        write(&disk, 0, 3 * CLUSTER, 5).unwrap();
        drop(disk);
        let l2_table = image.word(image.word(40)) & !COPIED;
        if let Some(word) = word {
            image.put_word(l2_table + 16, word);
        }
        image.put_word(l2_table + 24, bits);
        let disk = open(&image, None).unwrap();
        assert_eq!(read(&disk, 0, 512), [5; 512], "another cluster");
        let error = write(&disk, CLUSTER, 512, 1).unwrap_err();
        assert!(
            error.to_string().contains("Invalid cluster entry"),
            "{error}"
        );
        assert_eq!(image.content()[79] & 2, 2, "marked as corrupt");
        let error = write(&disk, 0, 512, 1).unwrap_err();
        assert!(matches!(error, Error::Corrupt { .. }));
    }
}

/// A bad entry is no reason to refuse a request that does not meet it.
#[test]
fn a_bad_entry_harms_its_own_cluster() {
    for raw in [false, true] {
        let image = new_image(&CreateOptions {
            size: 8 << 20,
            data_file: raw.then(|| "data".into()),
            data_file_raw: raw,
            ..CreateOptions::default()
        });
        let data = Memory::new(vec![0; 8 << 20]);
        let data = raw.then_some(&data);
        let disk = open(&image, data).unwrap();
        write(&disk, 0, 1 << 20, 3).unwrap();
        drop(disk);
        let l2_table = image.word(image.word(40)) & !COPIED;
        image.put_word(l2_table + 80, 0x1200 | COPIED);
        let disk = open(&image, data).unwrap();
        write(&disk, 9 * CLUSTER, CLUSTER, 4).unwrap();
        assert_eq!(read(&disk, 11 * CLUSTER, 512), [3; 512]);
        assert_eq!(image.content()[79] & 2, 0, "raw: {raw}");
        write(&disk, 10 * CLUSTER, 512, 4).unwrap_err();
        assert_eq!(image.content()[79] & 2, 2, "raw: {raw}");
    }
}

#[test]
fn compressed_clusters_of_another_image_are_refused() {
    let new = |compression_type, cluster_size| {
        let image = new_image(&CreateOptions {
            size: 1 << 20,
            compression_type,
            cluster_size,
            ..CreateOptions::default()
        });
        open(&image, None).unwrap()
    };
    let disk = new(CompressionType::Deflate, CLUSTER);
    let mut others = vec![new(CompressionType::Deflate, 4096)];
    if cfg!(feature = "zstd") {
        others.push(new(CompressionType::Zstd, CLUSTER));
    }
    for other in others {
        let cluster = other.compress(vec![7; 4096]).unwrap();
        let refused = disk.write_compressed(cluster, 0).unwrap_err();
        assert!(matches!(refused, Error::Option(_)), "{refused}");
    }
    assert_eq!(read(&disk, 0, 512), [0; 512]);
}

/// Zeroes that need a cluster wait for one that is on its way back, as writes do.
#[test]
fn zeroes_on_a_full_disk_wait_for_space() {
    let image = new_image(&CreateOptions {
        size: 1 << 20,
        cluster_size: 4096,
        data_file: Some("d".into()),
        data_file_layout: DataFileLayout::Packed,
        backing_file: Some("base".into()),
        backing_format: Some(ImageFormat::Raw),
        ..CreateOptions::default()
    });
    let data = Memory::device(4096);
    let base = Raw::with_storage(Path::new("base"), Box::new(base()), true).unwrap();
    let disk = Qcow2::with_backing(
        Path::new("image"),
        Box::new(image),
        Some(Box::new(data)),
        Some(Arc::new(base)),
        &OpenOptions::default(),
    )
    .unwrap();
    write(&disk, 0, 4096, 1).unwrap();
    disk.discard(0, 4096).unwrap();
    disk.write_zeroes(8192, 512, false).unwrap();
    assert_eq!(read(&disk, 8192, 512), [0; 512]);
    assert_eq!(read(&disk, 8704, 512), [7; 512]);
}
