//! Discarding: what becomes of the space, and of requests that are under way.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::fs::{self, File};
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::gated::{Gate, Gated, during};
use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, check, create};
use tandem_block::{Disk, FileStorage, Storage};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

const CLUSTER: u64 = 64 << 10;

/// An image of 64 MiB, with its data in it or in the file `data` beside it.
fn image(external: bool) -> (TempDir, PathBuf) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: 64 << 20,
        data_file: external.then(|| dir.path().join("data")),
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    (dir, path)
}

fn open_gated(path: &Path) -> (Qcow2, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let storage = |path: &Path| -> Box<dyn Storage> {
        let file = FileStorage::open(path, false).unwrap();
        Box::new(Gated::new(file, &gate))
    };
    let data = path.with_file_name("data");
    let data = data.exists().then(|| storage(&data));
    let disk = Qcow2::with_storage(path, storage(path), data, &OpenOptions::default());
    (disk.unwrap(), gate)
}

fn write(disk: &dyn Disk, offset: u64, len: u64, byte: u8) {
    let mut bytes = vec![byte; len as usize];
    disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
        .unwrap();
}

fn read(disk: &dyn Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; len as usize];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], offset)
        .unwrap();
    bytes
}

fn assert_clean(path: &Path) {
    let report = check(
        path,
        &tandem_block::qcow2::CheckOptions::default(),
        &mut |finding| panic!("{}", finding.text),
    )
    .unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0));
}

/// Discards the first cluster, and writes others that could take its place.
fn discard_and_reuse(disk: &dyn Disk) {
    disk.discard(0, CLUSTER).unwrap();
    for cluster in 1..20 {
        disk.flush().unwrap();
        write(disk, cluster * CLUSTER, CLUSTER, 2);
    }
}

/// A read that has found a cluster, and is slow, does not see what the cluster is used for next.
#[test]
fn a_slow_read_sees_no_other_data() {
    let (_dir, path) = image(false);
    let (disk, gate) = open_gated(&path);
    write(&disk, 0, CLUSTER, 1);
    disk.flush().unwrap();
    let reader = || read(&disk, 0, CLUSTER);
    let bytes = during(&gate, reader, || discard_and_reuse(&disk));
    assert!(bytes.iter().all(|b| *b == 1) || bytes.iter().all(|b| *b == 0));
    drop(disk);
    assert_clean(&path);
}

/// A write that has found a cluster, and is slow, does not change what the cluster is used for
/// next.
#[test]
fn a_slow_write_changes_no_other_data() {
    let (_dir, path) = image(false);
    let (disk, gate) = open_gated(&path);
    write(&disk, 0, CLUSTER, 1);
    disk.flush().unwrap();
    let writer = || write(&disk, 0, CLUSTER, 3);
    during(&gate, writer, || discard_and_reuse(&disk));
    assert!(read(&disk, CLUSTER, 19 * CLUSTER).iter().all(|b| *b == 2));
    drop(disk);
    assert_clean(&path);
}

/// What a slow write leaves where nothing is mapped any more does not come to light when the
/// cluster is written in part.
#[test]
fn a_slow_write_leaves_no_stale_data() {
    // In a hole of the data file.
    const AT: u64 = 8 * CLUSTER;
    let (_dir, path) = image(true);
    let (disk, gate) = open_gated(&path);
    write(&disk, AT, CLUSTER, 1);
    disk.flush().unwrap();
    let writer = || write(&disk, AT, CLUSTER, 3);
    during(&gate, writer, || {
        disk.discard(AT, CLUSTER).unwrap();
        disk.flush().unwrap();
    });
    disk.flush().unwrap();
    write(&disk, AT + 512, 512, 2);
    let bytes = read(&disk, AT, CLUSTER);
    assert!(bytes[..512].iter().all(|b| *b == 0));
    assert!(bytes[1024..].iter().all(|b| *b == 0));
    drop(disk);
    assert_clean(&path);
}

/// Once the slow request has ended, the clusters come back after all.
#[test]
fn space_comes_back_after_a_slow_read() {
    let (_dir, path) = image(false);
    let (disk, gate) = open_gated(&path);
    write(&disk, 0, 64 * CLUSTER, 1);
    disk.flush().unwrap();
    let size = fs::metadata(&path).unwrap().len();
    let reader = || read(&disk, 0, CLUSTER);
    during(&gate, reader, || {
        disk.discard(0, 64 * CLUSTER).unwrap();
        disk.flush().unwrap();
    });
    disk.flush().unwrap();
    write(&disk, 128 * CLUSTER, 64 * CLUSTER, 2);
    disk.flush().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), size);
    drop(disk);
    assert_clean(&path);
}

/// A file that is written and discarded over and over does not grow, and holes are punched in it.
#[test]
fn space_is_reused_and_released() {
    let (_dir, path) = image(false);
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    let mut largest = 0;
    for round in 0..20 {
        let at = round % 8 * 64 * CLUSTER;
        write(&disk, at, 64 * CLUSTER, round as u8 + 1);
        disk.flush().unwrap();
        let size = fs::metadata(&path).unwrap().len();
        if round == 0 {
            largest = size;
        }
        assert_eq!(size, largest, "round {round}");
        disk.discard(at, 64 * CLUSTER).unwrap();
        disk.flush().unwrap();
        let used = fs::metadata(&path).unwrap().blocks() * 512;
        assert!(used < 16 * CLUSTER, "{used} bytes in use");
        assert!(read(&disk, at, 64 * CLUSTER).iter().all(|b| *b == 0));
    }
    drop(disk);
    assert_clean(&path);
}

/// Only whole clusters are discarded, and a range past the end is refused.
#[test]
fn parts_of_clusters_stay() {
    let (_dir, path) = image(false);
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    write(&disk, 0, 4 * CLUSTER, 1);
    disk.discard(512, 3 * CLUSTER).unwrap();
    let bytes = read(&disk, 0, 4 * CLUSTER);
    for (cluster, bytes) in bytes.chunks(CLUSTER as usize).enumerate() {
        let byte = u8::from(!(1..3).contains(&cluster));
        assert!(bytes.iter().all(|b| *b == byte), "cluster {cluster}");
    }
    disk.discard(CLUSTER + 512, 1024).unwrap();
    disk.discard(disk.size(), 0).unwrap();
    assert!(disk.discard(disk.size() - 512, 1024).is_err());
    assert!(disk.discard(u64::MAX, 512).is_err());
    drop(disk);
    assert_clean(&path);
}

/// Without a flush, too, space comes back before much of it has gathered.
#[test]
fn space_comes_back_without_a_flush() {
    let (_dir, path) = image(false);
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    for _ in 0..20 {
        write(&disk, 0, 32 << 20, 1);
        disk.discard(0, 32 << 20).unwrap();
    }
    let size = fs::metadata(&path).unwrap().len();
    assert!(size < 160 << 20, "{size}");
}

/// A discard of a fragmented disk as a whole gives everything back.
#[test]
fn fragmented_space_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: 8 << 20,
        cluster_size: 512,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    for cluster in (0..16 << 10).rev() {
        write(&disk, cluster * 512, 512, 1);
    }
    disk.flush().unwrap();
    let before = fs::metadata(&path).unwrap();
    disk.discard(0, 8 << 20).unwrap();
    disk.flush().unwrap();
    let used = fs::metadata(&path).unwrap().blocks() * 512;
    assert!(used < before.blocks() * 512 / 4, "{used} bytes in use");
    write(&disk, 0, 8 << 20, 2);
    disk.flush().unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), before.len());
    drop(disk);
    assert_clean(&path);
}

/// What a hostile image maps is not given to the allocator on its word.
#[test]
fn clusters_that_are_not_counted_stay() {
    // In a part of the file without a refcount block, and where there is no room for one.
    for target in [4 << 20, 16 << 20] {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = CreateOptions {
            size: 1 << 20,
            cluster_size: 512,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        write(&disk, 0, 512, 1);
        drop(disk);
        let file = File::options().read(true).write(true).open(&path).unwrap();
        file.set_len(32 << 20).unwrap();
        let field = |at| {
            let mut bytes = [0; 8];
            file.read_exact_at(&mut bytes, at).unwrap();
            u64::from_be_bytes(bytes)
        };
        // Header bytes 40 to 47 lead to the L1 table, and its first entry to the L2 table.
        let l2_table = field(field(40)) & 0x00ff_ffff_ffff_fe00;
        file.write_all_at(&(1 << 63 | target as u64).to_be_bytes(), l2_table)
            .unwrap();

        let header = || fs::read(&path).unwrap()[..512].to_vec();
        let before = header();
        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        disk.discard(0, 512).unwrap();
        disk.flush().unwrap();
        write(&disk, 512, 512, 2);
        drop(disk);
        assert!(header() == before, "target {target:#x}");
        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        assert!(read(&disk, 512, 512).iter().all(|b| *b == 2));
    }
}
