//! What disks tell of the files that they lie in, and disks on devices whose length changes.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::path::Path;
use std::sync::Arc;

use common::{Memory, assert_clean, new_image, open, open_with, read, write};
use tandem_block::qcow2::{CreateOptions, DataFileLayout, OpenOptions, Qcow2};
use tandem_block::{CacheMode, Disk, Error, FileOptions, ImageFormat, Limits, Preallocation, Raw};

const CLUSTER: u64 = 65536;
const SIZE: u64 = 4 << 20;

fn raw(file: &Memory) -> Raw {
    Raw::with_storage(Path::new("raw"), Box::new(file.clone()), false).unwrap()
}

#[test]
fn a_raw_disk_follows_its_device() {
    let device = Memory::device(SIZE);
    let disk = raw(&device);
    let refused = |size| {
        let error = disk.resize(size).unwrap_err();
        assert!(matches!(&error, Error::Option(text) if text == "Cannot resize device files"));
    };
    refused(2 * SIZE);
    refused(SIZE / 2);
    disk.resize(SIZE).unwrap();
    device.extend(2 * SIZE);
    assert_eq!(disk.size(), SIZE, "nobody has said so yet");
    refused(2 * SIZE - 512);
    refused(2 * SIZE + 512);
    let reserved = disk.resize_preallocated(2 * SIZE, Preallocation::Falloc);
    assert!(reserved.is_err());
    assert_eq!(disk.size(), SIZE);
    disk.resize(2 * SIZE).unwrap();
    assert_eq!(disk.size(), 2 * SIZE);
    write(&disk, 2 * SIZE - 512, 512, 1).unwrap();
    assert_eq!(device.content()[2 * SIZE as usize - 512..], [1; 512]);

    device.extend(SIZE / 2);
    refused(SIZE);
    disk.resize(SIZE / 2).unwrap();
    assert_eq!(disk.size(), SIZE / 2);
}

#[test]
fn an_image_grows_as_its_device_has() {
    for raw in [false, true] {
        let image = new_image(&CreateOptions {
            size: SIZE,
            data_file: Some("data".into()),
            data_file_raw: raw,
            ..CreateOptions::default()
        });
        let device = Memory::device(SIZE);
        let disk = open(&image, Some(&device)).unwrap();
        write(&disk, SIZE - CLUSTER, CLUSTER, 1).unwrap();
        let refused = disk.resize(SIZE + CLUSTER).unwrap_err();
        assert!(refused.to_string().contains("Cannot grow device files"));
        device.extend(2 * SIZE);
        disk.resize(2 * SIZE).unwrap();
        assert_eq!(disk.size(), 2 * SIZE);
        write(&disk, 2 * SIZE - 512, 512, 2).unwrap();
        disk.close().unwrap();
        drop(disk);
        assert_clean(&image);
        let disk = open(&image, Some(&device)).unwrap();
        assert_eq!(read(&disk, SIZE - 512, 1024), [[1; 512], [0; 512]].concat());
        assert_eq!(read(&disk, 2 * SIZE - 512, 512), [2; 512]);
    }
}

fn create(more: CreateOptions) -> CreateOptions {
    CreateOptions { size: SIZE, ..more }
}

fn limits(options: CreateOptions, open_options: &OpenOptions) -> Limits {
    let image = new_image(&create(options.clone()));
    let data = options.data_file.map(|_| Memory::new(Vec::new()));
    open_with(&image, data.as_ref(), open_options)
        .unwrap()
        .limits()
}

#[test]
fn discards_release_clusters_where_the_image_allocates_them() {
    let default = OpenOptions::default();
    let external = CreateOptions {
        data_file: Some("data".into()),
        ..CreateOptions::default()
    };
    for options in [
        CreateOptions::default(),
        CreateOptions {
            cluster_size: 2 << 20,
            ..CreateOptions::default()
        },
        CreateOptions {
            extended_l2: true,
            ..CreateOptions::default()
        },
        CreateOptions {
            data_file_layout: DataFileLayout::Packed,
            ..external.clone()
        },
        external.clone(),
    ] {
        let cluster = options.cluster_size as u32;
        let limits = limits(options, &default);
        assert_eq!(limits.discard_granularity, cluster);
        assert_eq!(limits.optimal_io_size, cluster);
        assert_eq!((limits.block_size, limits.physical_block_size), (512, 4096));
        assert!(limits.can_unmap && !limits.read_only && limits.write_cache);
    }
    let raw_data = CreateOptions {
        data_file_raw: true,
        ..external
    };
    let limits_of_raw = limits(raw_data, &default);
    // Parts of clusters are not discarded there either.
    assert_eq!(limits_of_raw.discard_granularity, CLUSTER as u32);
    assert_eq!(limits_of_raw.optimal_io_size, CLUSTER as u32);
    assert!(limits_of_raw.can_unmap);

    let read_only = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    assert!(!limits(CreateOptions::default(), &read_only).can_unmap);
}

/// Version 2 has no way to say that a cluster reads as zero and not as what lies below.
#[test]
fn version_2_unmaps_where_nothing_is_below() {
    let version_2 = CreateOptions {
        version: 2,
        ..create(CreateOptions::default())
    };
    assert!(limits(version_2.clone(), &OpenOptions::default()).can_unmap);
    let image = new_image(&CreateOptions {
        backing_file: Some("base".into()),
        backing_format: Some(ImageFormat::Raw),
        ..version_2
    });
    let base = raw(&Memory::new(vec![7; SIZE as usize]));
    let disk = Qcow2::with_backing(
        Path::new("image"),
        Box::new(image),
        None,
        Some(Arc::new(base)),
        &OpenOptions::default(),
    );
    assert!(!disk.unwrap().limits().can_unmap);
}

#[test]
fn a_raw_file_has_the_units_of_its_file_system() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    std::fs::write(&path, vec![0; 8192]).unwrap();
    let block = rustix::fs::statfs(dir.path()).unwrap().f_bsize as u32;
    let disk = Raw::open(&path, false).unwrap();
    let mut expected = Limits::new(512, false);
    expected.physical_block_size = 4096;
    expected.discard_granularity = block;
    assert_eq!(disk.limits(), expected);
    drop(disk);
    let read_only = Raw::open(&path, true).unwrap().limits();
    assert!(read_only.read_only && !read_only.can_unmap);

    let files = FileOptions {
        cache: CacheMode::None,
        ..FileOptions::default()
    };
    // Not every file system has direct I/O.
    if let Ok(disk) = Raw::open_with(&path, false, files) {
        assert!(disk.limits().physical_block_size >= 4096);
    }
}
