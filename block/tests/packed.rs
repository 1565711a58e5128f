//! Data files in the packed layout.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use common::{Memory, assert_clean, new_image, open, open_with, read, write};
use proptest::prelude::*;
use tandem_block::qcow2::{CreateOptions, DataFileLayout, Info, OpenOptions, Qcow2, check, create};
use tandem_block::{Disk, Error};

const CLUSTER: u64 = 64 << 10;
/// Offset of the L2 table of an image in which one cluster of `CLUSTER` has been written: header,
/// refcount table, refcount block and L1 table are before it.
const L2_TABLE: u64 = 4 * CLUSTER;
const COPIED: u64 = 1 << 63;

fn packed(size: u64, cluster_size: u64) -> Memory {
    new_image(&CreateOptions {
        size,
        cluster_size,
        data_file: Some("data".into()),
        data_file_layout: DataFileLayout::Packed,
        ..CreateOptions::default()
    })
}

fn is_full(result: Result<(), Error>) -> bool {
    match result {
        Ok(()) => false,
        Err(Error::Io { source, .. }) => {
            assert_eq!(source.kind(), std::io::ErrorKind::StorageFull);
            true
        }
        Err(other) => panic!("{other}"),
    }
}

/// What is free on a device is known again after it was closed: no more than it has.
#[test]
fn a_device_has_its_end_when_it_is_opened_again() {
    for capacity in [63, 64, 65, 70] {
        let image = packed(1 << 30, CLUSTER);
        let device = Memory::device(capacity * CLUSTER);
        let disk = open(&image, Some(&device)).unwrap();
        for i in 0..capacity {
            write(&disk, i * 2 * CLUSTER, CLUSTER, 1).unwrap();
        }
        for i in 0..4 {
            disk.discard(i * 4 * CLUSTER, CLUSTER).unwrap();
        }
        disk.flush().unwrap();
        drop(disk);
        let disk = open(&image, Some(&device)).unwrap();
        // The four that are free do not lie side by side.
        write(&disk, 500 * CLUSTER, 4 * CLUSTER, 9).unwrap();
        assert!(is_full(write(&disk, 600 * CLUSTER, 512, 9)));
        assert_eq!(device.len(), capacity * CLUSTER);
    }
}

/// 1 GiB of disk on a device of 16 clusters that holds other things.
#[test]
fn a_full_device_fails_one_request_and_keeps_the_rest() {
    let image = packed(1 << 30, CLUSTER);
    let device = Memory::device(16 * CLUSTER);
    let disk = open(&image, Some(&device)).unwrap();
    let at = |i: u64| i * 37 % 16 * 40 * CLUSTER;
    for i in 0..16 {
        write(&disk, at(i) + 512, 1000, 1 + i as u8).unwrap();
    }
    assert!(is_full(write(&disk, (1 << 30) - CLUSTER, 512, 99)));
    assert!(is_full(write(&disk, 5 * CLUSTER, 3 * CLUSTER, 99)));
    let verify = |disk: &dyn Disk| {
        for i in 0..16 {
            let mut expected = vec![0; CLUSTER as usize];
            expected[512..1512].fill(1 + i as u8);
            assert_eq!(read(disk, at(i), CLUSTER), expected, "cluster {i}");
        }
        assert_eq!(
            read(disk, (1 << 30) - CLUSTER, CLUSTER),
            [0; CLUSTER as usize]
        );
    };
    verify(&disk);
    disk.flush().unwrap();
    drop(disk);
    assert_clean(&image);

    let disk = open(&image, Some(&device)).unwrap();
    verify(&disk);
    assert!(is_full(write(&disk, 3 * CLUSTER, 512, 99)));
    write(&disk, at(5), CLUSTER, 77).unwrap();
    assert_eq!(device.len(), 16 * CLUSTER);
}

/// What is discarded can be used at once, without a flush by the guest.
#[test]
fn discarded_space_is_used_again() {
    let image = packed(1 << 30, CLUSTER);
    let device = Memory::device(4 * CLUSTER);
    let disk = open(&image, Some(&device)).unwrap();
    for i in 0..100 {
        let at = i * 7 % 50 * 4 * CLUSTER;
        write(&disk, at, 3 * CLUSTER, 1 + i as u8).unwrap();
        assert_eq!(
            read(&disk, at, 3 * CLUSTER),
            [1 + i as u8; 3 * CLUSTER as usize]
        );
        match i % 3 {
            0 => disk.discard(at, 3 * CLUSTER).unwrap(),
            _ => disk.write_zeroes(at, 3 * CLUSTER, true).unwrap(),
        }
        assert_eq!(read(&disk, at, 3 * CLUSTER), [0; 3 * CLUSTER as usize]);
    }
    disk.flush().unwrap();
    drop(disk);
    assert_clean(&image);
}

/// Several threads on a device with room for one cluster each, and one more.
#[test]
fn threads_share_a_device_that_is_nearly_full() {
    let image = packed(1 << 30, 4096);
    let device = Memory::device(5 * 4096);
    let disk = open(&image, Some(&device)).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..4u64 {
            let disk = &disk;
            scope.spawn(move || {
                for i in 0..200 {
                    let at = (thread * 1000 + i) * 4096;
                    let byte = (1 + thread * 60 + i % 50) as u8;
                    write(disk, at + 100, 1000, byte).unwrap();
                    let mut expected = [0; 4096];
                    expected[100..1100].fill(byte);
                    assert_eq!(read(disk, at, 4096), expected);
                    disk.discard(at, 4096).unwrap();
                }
            });
        }
    });
    disk.flush().unwrap();
    drop(disk);
    assert_clean(&image);
}

#[test]
fn what_is_written_in_a_row_lies_in_a_row() {
    let image = packed(1 << 30, CLUSTER);
    let data = Memory::default();
    let disk = open(&image, Some(&data)).unwrap();
    for i in 0..32 {
        write(&disk, (100 + i) * CLUSTER, CLUSTER, 1).unwrap();
    }
    assert_eq!(data.len(), 32 * CLUSTER);
    let before = data.reads();
    read(&disk, 100 * CLUSTER, 32 * CLUSTER);
    assert_eq!(data.reads() - before, 1);

    // A hole that is long enough is taken before one that is not.
    disk.discard(103 * CLUSTER, CLUSTER).unwrap();
    disk.discard(110 * CLUSTER, 8 * CLUSTER).unwrap();
    disk.flush().unwrap();
    write(&disk, 500 * CLUSTER, 8 * CLUSTER, 2).unwrap();
    let before = data.reads();
    read(&disk, 500 * CLUSTER, 8 * CLUSTER);
    assert_eq!(data.reads() - before, 1);
    write(&disk, 600 * CLUSTER, CLUSTER, 3).unwrap();
    assert_eq!(data.len(), 32 * CLUSTER);
}

#[test]
fn opening_reads_no_guest_data() {
    let image = packed(64 << 20, CLUSTER);
    let data = Memory::default();
    let disk = open(&image, Some(&data)).unwrap();
    write(&disk, 5 << 20, 9 << 20, 7).unwrap();
    disk.discard(6 << 20, 1 << 20).unwrap();
    disk.flush().unwrap();
    drop(disk);
    let before = (data.reads(), data.metadata_reads());
    let disk = open(&image, Some(&data)).unwrap();
    assert_eq!((data.reads(), data.metadata_reads()), before);
    // What was free is known to be.
    write(&disk, 40 << 20, 1 << 20, 8).unwrap();
    assert_eq!(data.len(), 9 << 20);
}

/// What has come back takes no space on the host.
#[test]
fn discarded_space_is_released() {
    use std::os::unix::fs::MetadataExt;

    let dir = tempfile::tempdir().unwrap();
    let (path, data) = (dir.path().join("image"), dir.path().join("data"));
    let options = CreateOptions {
        size: 64 << 20,
        data_file: Some(data.clone()),
        data_file_layout: DataFileLayout::Packed,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    let used = || data.metadata().unwrap().blocks() * 512;
    write(&disk, 0, 8 << 20, 1).unwrap();
    disk.flush().unwrap();
    let before = used();
    disk.discard(1 << 20, 6 << 20).unwrap();
    disk.flush().unwrap();
    assert!(before - used() >= 6 << 20, "{before} bytes, now {}", used());
    assert_eq!(read(&disk, 7 << 20, 1 << 20), vec![1; 1 << 20]);
}

/// A cluster that is zeroed without unmap keeps its place, be it the first of the data file.
#[test]
fn zeroed_clusters_keep_their_place() {
    let image = packed(1 << 20, CLUSTER);
    let device = Memory::device(2 * CLUSTER);
    let disk = open(&image, Some(&device)).unwrap();
    write(&disk, 0, 2 * CLUSTER, 1).unwrap();
    disk.write_zeroes(0, 2 * CLUSTER, false).unwrap();
    assert!(is_full(write(&disk, 5 * CLUSTER, CLUSTER, 2)));
    disk.flush().unwrap();
    drop(disk);
    assert_eq!(image.word(L2_TABLE), COPIED | 1);
    let disk = open(&image, Some(&device)).unwrap();
    assert!(is_full(write(&disk, 5 * CLUSTER, CLUSTER, 2)));
    assert_eq!(read(&disk, 0, 2 * CLUSTER), [0; 2 * CLUSTER as usize]);
    write(&disk, 512, 512, 3).unwrap();
    assert_eq!(read(&disk, 0, 512), [0; 512]);
    disk.discard(0, 2 * CLUSTER).unwrap();
    write(&disk, 5 * CLUSTER, CLUSTER, 2).unwrap();
}

#[test]
fn places_that_cannot_be_are_refused() {
    for (entry, problem) in [
        (COPIED, "is that of another entry, too"),
        (COPIED | 1, "is that of another entry, too"),
        (COPIED | (7 * CLUSTER), "lies past the end of the data file"),
        (COPIED | 1 << 50, "lies past the end of the data file"),
        (COPIED | 512, "is not aligned to a cluster"),
    ] {
        let image = packed(1 << 20, CLUSTER);
        let data = Memory::default();
        let disk = open(&image, Some(&data)).unwrap();
        write(&disk, 0, CLUSTER, 1).unwrap();
        disk.flush().unwrap();
        drop(disk);
        image.put_word(L2_TABLE + 8, entry);
        let before = image.content();
        let error = open(&image, Some(&data)).err().unwrap().to_string();
        assert!(error.contains(problem), "{entry:#x}: {error}");
        assert!(error.contains("l2_table entry"), "{error}");
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        let disk = open_with(&image, Some(&data), &options).unwrap();
        assert_eq!(read(&disk, 0, CLUSTER), [1; CLUSTER as usize]);
        drop(disk);
        assert_eq!(image.content(), before);
        let mut found = 0;
        let report = tandem_block::qcow2::check_storage(
            "image".as_ref(),
            &image,
            None,
            tandem_block::qcow2::Repair::Nothing,
            &mut |_| found += 1,
        );
        // The check of storage has not seen the data file.
        let unseen = entry == COPIED | (7 * CLUSTER);
        assert_eq!(
            report.unwrap().corruptions,
            u64::from(!unseen),
            "{entry:#x}"
        );
    }
}

#[test]
fn options_that_do_not_go_together() {
    let dir = tempfile::tempdir().unwrap();
    let packed = CreateOptions {
        size: 1 << 20,
        data_file_layout: DataFileLayout::Packed,
        ..CreateOptions::default()
    };
    let raw = CreateOptions {
        data_file: Some(dir.path().join("data")),
        data_file_raw: true,
        ..packed.clone()
    };
    for options in [packed, raw] {
        let error = create(&dir.path().join("image"), &options).unwrap_err();
        assert!(error.to_string().contains("layout=packed"), "{error}");
    }
    assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 0);
}

#[derive(Clone, Debug)]
enum Op {
    Write(u64, u64, u8),
    Zero(u64, u64, bool),
    Discard(u64, u64),
    /// To so many sectors, or back to what it was.
    Resize(u64),
    Reopen,
}

fn op(clusters: u64) -> impl Strategy<Value = Op> {
    let range = (0..clusters * 128, 1..500u64)
        .prop_map(move |(at, len)| (at * 512, len.min(clusters * 128 - at) * 512));
    prop_oneof![
        5 => (range.clone(), 1..255u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        1 => (range.clone(), any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero(at, len, unmap)),
        2 => range.prop_map(|(at, len)| Op::Discard(at, len)),
        1 => (0..clusters * 128).prop_map(Op::Resize),
        1 => Just(Op::Reopen),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..Default::default() })]

    /// Against a vector of bytes, in real files; the data file never has more clusters than were
    /// in use at one time, and those on their way back.
    #[test]
    fn random_operations(
        ops in proptest::collection::vec(op(60), 1..50),
        cluster_bits in prop_oneof![Just(9u32), Just(12), Just(16)],
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (path, data) = (dir.path().join("image"), dir.path().join("data"));
        let size = 60 * CLUSTER;
        create(&path, &CreateOptions {
            size,
            cluster_size: 1 << cluster_bits,
            data_file: Some(data.clone()),
            data_file_layout: DataFileLayout::Packed,
            ..CreateOptions::default()
        }).unwrap();
        prop_assert_eq!(
            Info::read(&path).unwrap().data_file_layout,
            Some(DataFileLayout::Packed)
        );
        let open = || Qcow2::open(&path, &OpenOptions::default()).unwrap();
        let mut disk = open();
        let mut model = vec![0; size as usize];
        for op in &ops {
            match *op {
                Op::Write(at, len, byte) => {
                    write(&disk, at, len, byte).unwrap();
                    model[at as usize..][..len as usize].fill(byte);
                }
                Op::Zero(at, len, unmap) => {
                    disk.write_zeroes(at, len, unmap).unwrap();
                    model[at as usize..][..len as usize].fill(0);
                }
                Op::Discard(at, len) => {
                    disk.discard(at, len).unwrap();
                    let start = at.next_multiple_of(1 << cluster_bits);
                    let end = (at + len) >> cluster_bits << cluster_bits;
                    if start < end {
                        model[start as usize..end as usize].fill(0);
                    }
                }
                Op::Resize(sectors) => {
                    disk.resize(sectors * 512).unwrap();
                    disk.resize(size).unwrap();
                    model[sectors as usize * 512..].fill(0);
                }
                Op::Reopen => {
                    drop(disk);
                    disk = open();
                }
            }
            disk.flush().unwrap();
        }
        prop_assert!(read(&disk, 0, size) == model);
        drop(disk);
        check(&path, &tandem_block::qcow2::CheckOptions::default(), &mut |finding| panic!("{}", finding.text)).unwrap();
        prop_assert!(read(&open(), 0, size) == model);
        prop_assert!(std::fs::metadata(&data).unwrap().len() <= size);
    }
}
