//! Discards and zeroes: the same map of the disk as after the same requests through QEMU.

use tandem_block::Disk;

use crate::qemu::{Image, KINDS, Kind, write};

#[derive(Clone, Copy)]
enum Op {
    Write(u64, u64),
    Discard(u64, u64),
    Zero(u64, u64),
    ZeroUnmap(u64, u64),
}

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 80 * CLUSTER + 512;

/// Requests that touch whole clusters, parts of them, and the end of the disk.
const OPS: [Op; 12] = [
    Op::Write(0, 40 * CLUSTER),
    Op::Write(70 * CLUSTER, SIZE - 70 * CLUSTER),
    Op::Discard(0, CLUSTER),
    Op::Discard(3 * CLUSTER + 512, 3 * CLUSTER),
    Op::Zero(10 * CLUSTER, 2 * CLUSTER),
    Op::ZeroUnmap(14 * CLUSTER, 2 * CLUSTER),
    Op::ZeroUnmap(11 * CLUSTER, 4 * CLUSTER),
    Op::Discard(38 * CLUSTER, 20 * CLUSTER),
    Op::Zero(50 * CLUSTER, 512),
    Op::Write(5 * CLUSTER, CLUSTER),
    Op::Discard(79 * CLUSTER, SIZE - 79 * CLUSTER),
    Op::Write(20 * CLUSTER, 512),
];

fn by_qemu(image: &Image) {
    let commands = OPS.map(|op| match op {
        Op::Write(at, len) => format!("write -P 7 {at} {len}"),
        Op::Discard(at, len) => format!("discard {at} {len}"),
        Op::Zero(at, len) => format!("write -z {at} {len}"),
        Op::ZeroUnmap(at, len) => format!("write -z -u {at} {len}"),
    });
    image.qemu_io_with(&["-d", "unmap"], &commands);
}

fn by_tandem(image: &Image) {
    let disk = image.open().unwrap();
    for op in OPS {
        match op {
            Op::Write(at, len) => write(&disk, at, len as usize, 7),
            Op::Discard(at, len) => disk.discard(at, len).unwrap(),
            Op::Zero(at, len) => disk.write_zeroes(at, len, false).unwrap(),
            Op::ZeroUnmap(at, len) => disk.write_zeroes(at, len, true).unwrap(),
        }
    }
    disk.flush().unwrap();
}

/// Where raw data files are concerned, Tandem keeps the mapping: the contents are the same.
#[test]
fn the_disk_is_the_same_as_after_qemu() {
    for kind in KINDS {
        let images = [kind; 2].map(|kind| Image::on_disk(kind, CLUSTER, SIZE));
        by_qemu(&images[0]);
        by_tandem(&images[1]);
        let [expected, found] = [&images[0], &images[1]].map(Image::read_by_qemu);
        assert!(expected == found, "{kind:?}: contents differ");
        images[1].expect(&expected);
        if kind == Kind::External || kind == Kind::Internal {
            let [expected, found] = [&images[0], &images[1]].map(Image::map);
            assert_eq!(found, expected, "{kind:?}");
        }
    }
}
