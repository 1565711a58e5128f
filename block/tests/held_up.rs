//! A request that is held up by the storage of its data delays nobody but those to its own clusters.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::path::Path;
use std::sync::Arc;

use common::gated::{Gate, Gated, during};
use common::{Memory, assert_clean, new_image, read, write};
use tandem_block::qcow2::{CreateOptions, DataFileLayout, OpenOptions, Qcow2};
use tandem_block::{Disk, Storage, VolatileSlice};

const CLUSTER: u64 = 4096;
/// What an L2 table maps.
const TABLE: u64 = CLUSTER / 8 * CLUSTER;

/// Runs `test` on a disk with its data in the image, in an external data file, and in a packed one.
fn each_kind(test: fn(&Qcow2, &Gate)) {
    for layout in [
        None,
        Some(DataFileLayout::Standard),
        Some(DataFileLayout::Packed),
    ] {
        let image = new_image(&CreateOptions {
            size: 4 * TABLE,
            cluster_size: CLUSTER,
            data_file: layout.map(|_| "data".into()),
            data_file_layout: layout.unwrap_or_default(),
            ..CreateOptions::default()
        });
        let gate = Arc::new(Gate::default());
        let gated = |file: Memory| Box::new(Gated::new(file, &gate)) as Box<dyn Storage>;
        let data = layout.map(|_| gated(Memory::default()));
        let options = OpenOptions::default();
        let disk = Qcow2::with_storage(Path::new("image"), gated(image.clone()), data, &options);
        test(&disk.unwrap(), &gate);
        assert_clean(&image);
    }
}

/// What others can do all the same: in the same L2 table and in others, to clusters with data and
/// without.
fn everything_else(disk: &Qcow2) {
    for at in [2 * CLUSTER, TABLE, 3 * TABLE - CLUSTER] {
        assert_eq!(read(disk, at, 2 * CLUSTER), [0; 2 * CLUSTER as usize]);
        write(disk, at, 2 * CLUSTER, 2).unwrap();
        write(disk, at + 512, 512, 3).unwrap();
        assert_eq!(read(disk, at + 512, 512), [3; 512]);
        disk.flush().unwrap();
        disk.write_zeroes(at, CLUSTER, false).unwrap();
        disk.discard(at + CLUSTER, CLUSTER).unwrap();
        disk.flush().unwrap();
        assert_eq!(read(disk, at, 2 * CLUSTER), [0; 2 * CLUSTER as usize]);
    }
}

#[test]
fn a_write_to_a_new_cluster_delays_no_others() {
    each_kind(|disk, gate| {
        let writer = || write(disk, 512, 1024, 1).unwrap();
        during(gate, writer, || {
            everything_else(disk);
            assert_eq!(read(disk, 0, CLUSTER), [0; CLUSTER as usize]);
        });
        assert_eq!(read(disk, 512, 1024), [1; 1024]);
    });
}

#[test]
fn a_write_to_a_cluster_with_data_delays_nobody() {
    each_kind(|disk, gate| {
        write(disk, 0, CLUSTER, 1).unwrap();
        let writer = || write(disk, 0, 512, 4).unwrap();
        during(gate, writer, || {
            everything_else(disk);
            assert_eq!(read(disk, 0, CLUSTER), [1; CLUSTER as usize]);
            write(disk, 512, 512, 5).unwrap();
        });
        assert_eq!(read(disk, 0, 512), [4; 512]);
        assert_eq!(read(disk, 512, 512), [5; 512]);
    });
}

#[test]
fn a_read_delays_nobody() {
    each_kind(|disk, gate| {
        write(disk, 0, CLUSTER, 1).unwrap();
        let reader = || read(disk, 0, CLUSTER);
        let seen = during(gate, reader, || {
            everything_else(disk);
            write(disk, 0, CLUSTER, 6).unwrap();
        });
        assert_eq!(seen, [6; CLUSTER as usize]);
    });
}

/// A cluster that loses its mapping while a transfer that does not wait has found it is not used by
/// others before that has ended.
#[test]
fn what_is_tried_keeps_its_cluster() {
    each_kind(|disk, gate| {
        let reuse = || {
            disk.discard(0, CLUSTER).unwrap();
            for i in 10..20 {
                disk.flush().unwrap();
                write(disk, i * CLUSTER, CLUSTER, 9).unwrap();
            }
        };
        write(disk, 0, CLUSTER, 1).unwrap();
        let reader = || {
            let mut bytes = [0xee; CLUSTER as usize];
            let bufs = [VolatileSlice::from(&mut bytes[..])];
            assert!(disk.try_read_at(&bufs, 0).unwrap());
            bytes
        };
        let seen = during(gate, reader, reuse);
        // An external data file has released the space already.
        assert!([0, 1].map(|byte| [byte; CLUSTER as usize]).contains(&seen));

        write(disk, 0, CLUSTER, 1).unwrap();
        let writer = || {
            let mut bytes = [2; CLUSTER as usize];
            let bufs = [VolatileSlice::from(&mut bytes[..])];
            assert!(disk.try_write_at(&bufs, 0).unwrap());
        };
        during(gate, writer, reuse);
        for i in 10..20 {
            assert!(read(disk, i * CLUSTER, CLUSTER) == [9; CLUSTER as usize]);
        }
    });
}
