//! Shrinking a disk while slow requests are under way.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use common::gated::{Gate, Gated, during};
use common::{Memory, assert_clean, new_image, open, read, write};
use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2};
use tandem_block::{Disk, Raw, Storage, VolatileSlice};

/// How long a request gets to do what it must wait with.
const A_WHILE: Duration = Duration::from_millis(100);

fn open_gated(image: &Memory, data: Option<&Memory>) -> (Qcow2, Arc<Gate>) {
    let gate = Arc::new(Gate::default());
    let gated = |file: &Memory| Box::new(Gated::new(file.clone(), &gate)) as Box<dyn Storage>;
    let options = OpenOptions::default();
    let name = Path::new("image");
    let disk = Qcow2::with_storage(name, gated(image), data.map(gated), &options);
    (disk.unwrap(), gate)
}

/// The zeros behind the new end do not land in a cluster that has been discarded and used again.
#[test]
fn zeros_behind_the_end_land_in_no_other_data() {
    const CLUSTER: u64 = 65536;
    let image = new_image(&CreateOptions {
        size: 64 * CLUSTER,
        ..CreateOptions::default()
    });
    let (disk, gate) = open_gated(&image, None);
    write(&disk, 10 * CLUSTER, CLUSTER, 1).unwrap();
    disk.flush().unwrap();
    thread::scope(|scope| {
        let shrink = || disk.resize(10 * CLUSTER + 4096).unwrap();
        during(&gate, shrink, || {
            scope.spawn(|| {
                disk.discard(10 * CLUSTER, 4096).unwrap();
                for cluster in 0..5 {
                    disk.flush().unwrap();
                    write(&disk, cluster * CLUSTER, CLUSTER, 9).unwrap();
                }
            });
            thread::sleep(A_WHILE);
        });
    });
    for cluster in 0..5 {
        assert!(read(&disk, cluster * CLUSTER, CLUSTER) == [9; CLUSTER as usize]);
    }
    drop(disk);
    assert_clean(&image);
}

/// A write that was begun before the shrink, in the part that goes, does not make the file of a raw
/// disk longer again.
#[test]
fn a_late_write_behind_the_end_of_a_file() {
    type Request = fn(&dyn Disk);
    let requests: [Request; 3] = [
        |disk| write(disk, 4096, 512, 5).unwrap(),
        |disk| {
            let mut bytes = [5; 512];
            let bufs = [VolatileSlice::from(&mut bytes[..])];
            assert!(disk.try_write_at(&bufs, 4096).unwrap());
        },
        |disk| disk.write_zeroes(4096, 512, false).unwrap(),
    ];
    for request in requests {
        let gate = Arc::new(Gate::default());
        let file = Memory::new(vec![1; 8192]);
        let gated = Box::new(Gated::new(file.clone(), &gate));
        let disk = Raw::with_storage(Path::new("file"), gated, false).unwrap();
        thread::scope(|scope| {
            during(
                &gate,
                || request(&disk),
                || {
                    scope.spawn(|| disk.resize(2048).unwrap());
                    while disk.size() != 2048 {
                        thread::yield_now();
                    }
                    // Neither those wait for the late one that write before the new end, nor those
                    // that are refused.
                    write(&disk, 1024, 1024, 7).unwrap();
                    assert!(write(&disk, 2048, 512, 7).is_err());
                    thread::sleep(A_WHILE);
                },
            );
        });
        assert!(file.content() == [[1; 1024], [7; 1024]].concat());
    }
}

/// A write that was begun before the shrink, in the part that goes, does not make a raw disk take its
/// mapping for complete.
#[test]
fn a_late_write_behind_the_end_of_a_raw_disk() {
    const CLUSTER: u64 = 512;
    let image = new_image(&CreateOptions {
        size: 40 * CLUSTER,
        cluster_size: CLUSTER,
        data_file: Some("data".into()),
        data_file_raw: true,
        ..CreateOptions::default()
    });
    let l2_table = image.word(image.word(40)) & !(1 << 63);
    for cluster in [3, 35] {
        image.put_word(l2_table + cluster * 8, 0);
    }
    let data = Memory::new(vec![0; (40 * CLUSTER) as usize]);
    let (disk, gate) = open_gated(&image, Some(&data));
    thread::scope(|scope| {
        let late = || drop(write(&disk, 35 * CLUSTER, CLUSTER, 5));
        during(&gate, late, || {
            scope.spawn(|| {
                disk.resize(20 * CLUSTER).unwrap();
                // Looks at the table again.
                assert_eq!(read(&disk, 0, CLUSTER), [0; 512]);
            });
            thread::sleep(A_WHILE);
        });
    });
    write(&disk, 3 * CLUSTER, CLUSTER, 7).unwrap();
    disk.flush().unwrap();
    drop(disk);
    assert_clean(&image);
    let disk = open(&image, Some(&data)).unwrap();
    assert_eq!(read(&disk, 3 * CLUSTER, CLUSTER), [7; 512]);
}
