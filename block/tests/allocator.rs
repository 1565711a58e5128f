//! The cluster allocator of the image file.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use common::{Memory, assert_clean, new_image, open, read, write};
use tandem_block::qcow2::{CreateOptions, DataFileLayout};
use tandem_block::{Disk, Error};

fn internal(size: u64, cluster_size: u64) -> Memory {
    new_image(&CreateOptions {
        size,
        cluster_size,
        ..CreateOptions::default()
    })
}

/// Every other cluster is discarded, and as much is written elsewhere, in pieces of several
/// clusters: it goes into the holes.
#[test]
fn the_file_does_not_grow_while_there_are_free_clusters() {
    for cluster in [512, 4096, 65536] {
        let image = internal(4000 * cluster, cluster);
        let disk = open(&image, None).unwrap();
        write(&disk, 0, 1000 * cluster, 1).unwrap();
        // The tables that the second half needs.
        for i in 1000..1510 {
            write(&disk, i * cluster, cluster, 1).unwrap();
            disk.discard(i * cluster, cluster).unwrap();
        }
        for i in 0..500 {
            disk.discard(2 * i * cluster, cluster).unwrap();
        }
        disk.flush().unwrap();
        let len = image.len();
        for i in 0..50 {
            write(&disk, (1000 + i * 10) * cluster, 10 * cluster, 2).unwrap();
        }
        assert_eq!(image.len(), len, "clusters of {cluster} bytes");
        assert_eq!(
            read(&disk, 1000 * cluster, 500 * cluster),
            vec![2; 500 * cluster as usize]
        );
        assert_eq!(read(&disk, cluster, cluster), vec![1; cluster as usize]);
        disk.flush().unwrap();
        drop(disk);
        assert_clean(&image);
    }
}

/// Though there is a free cluster before.
#[test]
fn a_cluster_goes_behind_that_before_it_on_the_disk() {
    for is_packed in [false, true] {
        let mut options = CreateOptions {
            size: 64 * 4096,
            cluster_size: 4096,
            ..CreateOptions::default()
        };
        if is_packed {
            options.data_file = Some("data".into());
            options.data_file_layout = DataFileLayout::Packed;
        }
        let data = is_packed.then(Memory::default);
        let disk = open(&new_image(&options), data.as_ref()).unwrap();
        let place = |cluster: u64| disk.extent(cluster * 4096, 4096).unwrap().offset.unwrap();
        write(&disk, 0, 8 * 4096, 1).unwrap();
        let places: Vec<_> = (0..8).map(place).collect();
        for cluster in [1, 5] {
            disk.discard(cluster * 4096, 4096).unwrap();
        }
        // Twice: what has lost its mapping comes back once that is durable.
        disk.flush().unwrap();
        disk.flush().unwrap();
        write(&disk, 5 * 4096, 512, 2).unwrap();
        assert_eq!(place(5), places[5]);
        write(&disk, 40 * 4096, 512, 2).unwrap();
        assert_eq!(place(40), places[1], "the lowest, with nothing before it");
    }
}

/// In a full image with few holes, taking one and giving one back reads nothing again.
#[test]
fn an_allocation_does_not_scan() {
    let cluster = 512;
    let clusters = 40_000;
    let image = internal(clusters * cluster * 2, cluster);
    let disk = open(&image, None).unwrap();
    write(&disk, 0, clusters * cluster, 1).unwrap();
    for round in 0..500u64 {
        // One hole near the begin of the file, which two writes want.
        let low = 100 + round % 50;
        disk.discard(low * cluster, cluster).unwrap();
        disk.flush().unwrap();
        let before = image.metadata_reads();
        write(&disk, (clusters + 2 * round) * cluster, cluster, 2).unwrap();
        write(&disk, (clusters + 2 * round + 1) * cluster, cluster, 3).unwrap();
        write(&disk, low * cluster, cluster, 4).unwrap();
        // A slice of refcounts or of a table for each of them, and for the hole.
        let reads = image.metadata_reads() - before;
        assert!(reads <= 8, "{reads} reads in round {round}");
    }
    disk.flush().unwrap();
    drop(disk);
    assert_clean(&image);
}

/// An L2 table whose refcount is zero, too far into the file for the look at open: the allocator
/// comes to its slice of refcounts, and stops there.
#[test]
fn metadata_that_is_counted_as_free_is_never_handed_out() {
    let cluster = 512;
    let size = 16 << 20;
    let image = internal(2 * size, cluster);
    let disk = open(&image, None).unwrap();
    write(&disk, 0, size, 1).unwrap();
    disk.flush().unwrap();
    drop(disk);

    let l1 = image.word(40);
    let table = image.word(l1 + (size / 32768 - 1) * 8) & !(1 << 63);
    let number = table / cluster;
    let block = image.word(image.word(48) + number / 256 * 8);
    let word = image.word(block + number % 256 * 2 / 8 * 8);
    image.put_word(
        block + number % 256 * 2 / 8 * 8,
        word & !(0xffff << (48 - number % 4 * 16)),
    );
    let table_content = image.content()[table as usize..][..512].to_vec();

    let disk = open(&image, None).unwrap();
    let error = (0..size / cluster)
        .find_map(|i| write(&disk, size + i * cluster, cluster, 2).err())
        .unwrap();
    assert!(
        matches!(&error, Error::Invalid { field: "l1_table entry", value, .. } if *value == table),
        "{error}"
    );
    assert!(error.to_string().contains("counted as free"), "{error}");
    assert_eq!(read(&disk, 0, size), vec![1; size as usize]);
    drop(disk);
    assert_eq!(image.content()[table as usize..][..512], table_content);
}

/// An image on a device that it fills: requests that need more fail, all else goes on.
#[test]
fn a_device_for_the_image_has_an_end() {
    let cluster = 4096;
    for tail in [0, 512, 2048] {
        let new = internal(1 << 20, cluster).content();
        let device = Memory::device(32 * cluster + tail);
        tandem_block::Storage::write_bytes_at(&device, &new, 0).unwrap();
        let disk = open(&device, None).unwrap();
        let mut written = 0;
        while write(&disk, written * cluster, cluster, 1 + written as u8).is_ok() {
            written += 1;
        }
        // Header, refcount table and block, L1 and L2 table.
        assert_eq!(written, 32 - 5);
        let writes = device.writes();
        assert!(write(&disk, written * cluster + 512, 512, 1).is_err());
        assert_eq!(device.writes(), writes, "nothing is tried behind the end");
        disk.flush().unwrap();
        disk.discard(3 * cluster, cluster).unwrap();
        write(&disk, 200 * cluster, cluster, 99).unwrap();
        disk.flush().unwrap();
        drop(disk);
        assert_clean(&device);
        let disk = open(&device, None).unwrap();
        for i in (0..written).filter(|i| *i != 3) {
            assert_eq!(read(&disk, i * cluster, cluster), [1 + i as u8; 4096]);
        }
        assert_eq!(read(&disk, 200 * cluster, cluster), [99; 4096]);
    }
}
