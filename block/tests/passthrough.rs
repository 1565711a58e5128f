//! Raw data files whose mapping is complete: every request is one call on the data file.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use common::{Memory, new_image, open_with, read, write};
use tandem_block::Disk;
use tandem_block::qcow2::{CreateOptions, OpenOptions};

#[test]
fn the_steady_state_has_no_metadata() {
    let (size, cluster) = (8 << 20, 512);
    let image = new_image(&CreateOptions {
        size,
        cluster_size: cluster,
        data_file: Some("data".into()),
        data_file_raw: true,
        ..CreateOptions::default()
    });
    let data = Memory::new(vec![0; size as usize]);
    // With room for few tables, a look at the mapping would be seen.
    let options = OpenOptions {
        l2_cache_size: 0,
        ..OpenOptions::default()
    };
    let disk = open_with(&image, Some(&data), &options).unwrap();
    // One L2 table maps 32 KiB.
    for table in 0..size / (32 << 10) {
        read(&disk, table * (32 << 10), 512);
    }
    let before = image.content();
    let (image_calls, data_calls) = (image.calls(), data.calls());
    let mut requests = 0;
    for i in 0..3000u64 {
        // Also across many tables.
        let len = if i % 10 == 0 { 1 << 20 } else { 1 + i % 5000 };
        let at = i * 7919 * 512 % (size - len);
        match i % 5 {
            0 | 1 => drop(read(&disk, at, len)),
            2 => write(&disk, at, len, i as u8).unwrap(),
            3 => disk.write_zeroes(at, len, i % 2 == 0).unwrap(),
            _ => disk.discard(at / cluster * cluster, 4096).unwrap(),
        }
        requests += 1;
    }
    assert_eq!(data.calls() - data_calls, requests);
    assert_eq!(image.calls(), image_calls, "the image file was looked at");
    let written = image.metadata_writes();
    disk.flush().unwrap();
    assert_eq!(image.metadata_writes(), written);
    drop(disk);
    assert_eq!(image.metadata_writes(), written);
    assert!(image.content() == before);
}
