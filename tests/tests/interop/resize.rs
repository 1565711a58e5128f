//! Growing and shrinking, against a plain byte vector and against QEMU.

use proptest::prelude::*;
use tandem_block::Disk;

use crate::qemu::{Image, KINDS, Kind, assert_same, qemu_img, read_all, write};

#[derive(Clone, Debug)]
enum Op {
    /// In 1024ths of the disk.
    Write(u64, u64, u8),
    Discard(u64, u64),
    Zero(u64, u64, bool),
    /// To so many sectors.
    Resize(u64),
    ResizeByQemu(u64),
    Reopen,
}

fn ops(max_sectors: u64) -> impl Strategy<Value = Vec<Op>> {
    let range = (0..1024u64, 1..200u64);
    let op = prop_oneof![
        5 => (range.clone(), 1..255u8).prop_map(|((at, len), byte)| Op::Write(at, len, byte)),
        1 => range.clone().prop_map(|(at, len)| Op::Discard(at, len)),
        1 => (range, any::<bool>()).prop_map(|((at, len), unmap)| Op::Zero(at, len, unmap)),
        4 => (0..max_sectors).prop_map(Op::Resize),
        1 => (1..max_sectors).prop_map(Op::ResizeByQemu),
        1 => Just(Op::Reopen),
    ];
    proptest::collection::vec(op, 1..30)
}

/// Bytes of a range that is told in 1024ths, in whole sectors.
fn bytes(model: &[u8], at: u64, len: u64) -> (u64, u64) {
    let size = model.len() as u64;
    let start = size * at / 1024 / 512 * 512;
    let end = (start + size * len / 1024).next_multiple_of(512).min(size);
    (start, end - start)
}

fn run(kind: Kind, cluster: u64, size: u64, ops: &[Op]) {
    let image = Image::create(kind, cluster, size);
    run_on(&image, cluster, vec![0; size as usize], true, ops);
}

/// Runs `ops` on `image`, which shows `model`. Whole clusters that are discarded read as zero, or
/// stay, as `discards` says.
fn run_on(image: &Image, cluster: u64, mut model: Vec<u8>, discards: bool, ops: &[Op]) {
    let mut disk = image.open().unwrap();
    let mut cut_by_qemu = false;
    for op in ops {
        match *op {
            Op::Write(at, len, byte) => {
                let (at, len) = bytes(&model, at, len);
                write(&disk, at, len as usize, byte);
                model[at as usize..][..len as usize].fill(byte);
            }
            Op::Zero(at, len, unmap) => {
                let (at, len) = bytes(&model, at, len);
                disk.write_zeroes(at, len, unmap).unwrap();
                model[at as usize..][..len as usize].fill(0);
            }
            Op::Discard(at, len) => {
                let (at, len) = bytes(&model, at, len);
                disk.discard(at, len).unwrap();
                let start = at.next_multiple_of(cluster);
                let end = match at + len {
                    end if end == model.len() as u64 => end,
                    end => end / cluster * cluster,
                };
                if start < end && discards {
                    model[start as usize..end as usize].fill(0);
                }
            }
            Op::Resize(sectors) => {
                cut_by_qemu = false;
                disk.resize(sectors * 512).unwrap();
                assert_eq!(disk.size(), sectors * 512);
                model.resize(sectors as usize * 512, 0);
            }
            // QEMU cannot: version 2 has no flag for what must not show.
            Op::ResizeByQemu(_) if !discards => {}
            // What it has cut off within a cluster, QEMU shows again.
            Op::ResizeByQemu(sectors) if cut_by_qemu && sectors * 512 > model.len() as u64 => {}
            Op::ResizeByQemu(sectors) => {
                drop(disk);
                cut_by_qemu = sectors * 512 < model.len() as u64;
                let size = (sectors * 512).to_string();
                image.qemu_img(&["resize", "-q", "--shrink", "-f", "qcow2"], &[&size]);
                model.resize(sectors as usize * 512, 0);
                disk = image.open().unwrap();
            }
            Op::Reopen => {
                drop(disk);
                image.check();
                disk = image.open().unwrap();
            }
        }
        assert_eq!(disk.size(), model.len() as u64);
    }
    assert_same(&read_all(&disk), &model, "the disk");
    drop(disk);
    image.expect(&model);
    assert_same(&read_all(&image.open().unwrap()), &model, "the disk again");
}

fn cases(cluster: u64, max_sectors: u64, count: u32) {
    let config = ProptestConfig {
        cases: count,
        failure_persistence: None,
        ..Default::default()
    };
    let size = max_sectors / 3 * 512;
    proptest!(config, |(ops in ops(max_sectors))| {
        for kind in KINDS {
            run(kind, cluster, size, &ops);
        }
    });
}

/// On top of a backing file that is longer than the disk at times: what the disk gains reads as zero
/// all the same.
#[test]
fn on_top_of_a_backing_file() {
    let config = ProptestConfig {
        cases: 5,
        failure_persistence: None,
        ..Default::default()
    };
    for (cluster, max_sectors) in [(512, 6000), (65536, 30_000)] {
        proptest!(config.clone(), |(ops in ops(max_sectors))| {
            for kind in [Kind::Internal, Kind::InternalV2, Kind::External] {
                let size = max_sectors / 3 * 512;
                let mut base: Vec<u8> = (0..size * 2 - 1000).map(|i| (i / 300 % 251) as u8 + 1).collect();
                let image = Image::prepared(kind, cluster, size, |dir| {
                    std::fs::write(dir.join("base"), &base).unwrap();
                    ",backing_file=base,backing_fmt=raw".to_owned()
                });
                base.truncate(size as usize);
                run_on(&image, cluster, base, kind != Kind::InternalV2, &ops);
            }
        });
    }
}

#[test]
fn clusters_of_512_bytes() {
    cases(512, 9000, 8);
}

#[test]
fn clusters_of_4_kib() {
    cases(4096, 30_000, 6);
}

#[test]
fn clusters_of_64_kib() {
    cases(64 << 10, 40_000, 6);
}

#[test]
fn clusters_of_2_mib() {
    cases(2 << 20, 70_000, 3);
}

/// From a table of one cluster to one of many, as the disk grows, with data written in between.
#[test]
fn the_l1_table_grows() {
    for kind in KINDS {
        let image = Image::create(kind, 512, 1 << 20);
        let disk = image.open().unwrap();
        write(&disk, 0, 1 << 20, 1);
        // 8 bytes of L1 table for 32 KiB of disk; a raw one has all L2 tables.
        let sizes: &[u64] = match kind {
            Kind::Raw => &[3 << 20, 20 << 20, 100 << 20],
            _ => &[3 << 20, 200 << 20, 3 << 30, 20 << 30],
        };
        for size in sizes {
            disk.resize(*size).unwrap();
            write(&disk, size - 5000, 5000, 2);
        }
        disk.flush().unwrap();
        drop(disk);
        image.check();
        for (at, byte) in sizes.iter().map(|size| (size - 5000, 2)).chain([(0, 1)]) {
            let disk = image.open().unwrap();
            assert_same(&crate::qemu::read(&disk, at, 5000), &[byte; 5000], "data");
            drop(disk);
            image.qemu_io(&[format!("read -P {byte} {at} 5000")]);
        }
    }
}

/// Also what lies between the old end and the end of its cluster, in a data file that is longer.
#[test]
fn what_a_disk_gains_is_zero() {
    for kind in [Kind::Internal, Kind::InternalV2, Kind::External] {
        let (cluster, size) = (65536, 10 * 65536 + 512);
        let image = Image::create(kind, cluster, size);
        if kind == Kind::External {
            std::fs::write(image.data_file(), vec![0xdd; 20 * 65536]).unwrap();
        }
        let disk = image.open().unwrap();
        let mut model = vec![0; size as usize];
        write(&disk, size - 512, 512, 7);
        model[size as usize - 512..].fill(7);
        disk.resize(size + 300 * 512).unwrap();
        model.resize(model.len() + 300 * 512, 0);
        assert_same(&read_all(&disk), &model, "the larger disk");
        write(&disk, 0, model.len(), 8);
        disk.resize(1024).unwrap();
        disk.resize(size).unwrap();
        model = vec![0; size as usize];
        model[..1024].fill(8);
        assert_same(&read_all(&disk), &model, "the disk that was small");
        drop(disk);
        image.expect(&model);
    }
}

/// A shrink that was cut off after the header: what it left behind the end does not come back.
#[test]
fn what_an_interrupted_shrink_left_behind_stays_away() {
    use std::os::unix::fs::FileExt;

    for kind in [Kind::Internal, Kind::External] {
        let (cluster, size, small) = (4096, 1 << 20, 100_864);
        let image = Image::create(kind, cluster, size);
        let disk = image.open().unwrap();
        write(&disk, 0, size as usize, 7);
        disk.flush().unwrap();
        drop(disk);
        let file = std::fs::File::options()
            .write(true)
            .open(image.path())
            .unwrap();
        let header_size = 24;
        file.write_all_at(&u64::to_be_bytes(small), header_size)
            .unwrap();

        let disk = image.open().unwrap();
        disk.resize(size).unwrap();
        let mut model = vec![0; size as usize];
        model[..small as usize].fill(7);
        assert_same(&read_all(&disk), &model, "the disk");
        drop(disk);
        image.expect(&model);
    }
}

#[test]
fn sizes_that_cannot_be_are_refused() {
    for kind in KINDS {
        let image = Image::create(kind, 512, 1 << 20);
        let before = std::fs::read(image.path()).unwrap();
        let disk = image.open().unwrap();
        for size in [1000, (1 << 20) + 1, 1 << 40, !511] {
            let error = disk.resize(size).unwrap_err();
            assert!(matches!(error, tandem_block::Error::Option(_)), "{error}");
            assert_eq!(disk.size(), 1 << 20);
        }
        drop(disk);
        assert!(std::fs::read(image.path()).unwrap() == before);
    }
}

/// Space is given back when a disk shrinks.
#[test]
fn a_smaller_disk_takes_less_space() {
    use std::os::unix::fs::MetadataExt;

    for kind in KINDS {
        let image = Image::create(kind, 65536, 16 << 20);
        let disk = image.open().unwrap();
        write(&disk, 0, 16 << 20, 7);
        disk.flush().unwrap();
        let used = || {
            let blocks = |path: &std::path::Path| path.metadata().map_or(0, |m| m.blocks() * 512);
            blocks(&image.path()) + blocks(&image.data_file())
        };
        let before = used();
        disk.resize(2 << 20).unwrap();
        let after = used();
        assert!(
            before - after >= 13 << 20,
            "{kind:?}: {before}, then {after}"
        );
        drop(disk);
        image.check();
    }
}

/// Requests go on while the size changes; what lies below the smallest size is not disturbed.
#[test]
fn requests_go_on_meanwhile() {
    for kind in KINDS {
        let image = Image::create(kind, 4096, 8 << 20);
        let disk = image.open_with_small_cache();
        let low = 4 << 20;
        let done = std::sync::atomic::AtomicBool::new(false);
        let mut expected = vec![0; low as usize];
        std::thread::scope(|scope| {
            for (thread, expected) in (0..2u64).zip(expected.chunks_mut(low as usize / 2)) {
                let (disk, done) = (&disk, &done);
                scope.spawn(move || {
                    let mut round = 0u64;
                    while !done.load(std::sync::atomic::Ordering::Relaxed) {
                        round += 1;
                        // Of its own, below the smallest size.
                        let within = round * 37 % 500 * 4096 + 100;
                        let at = thread * low / 2 + within;
                        write(disk, at, 3000, round as u8);
                        expected[within as usize..][..3000].fill(round as u8);
                        assert_eq!(crate::qemu::read(disk, at, 3000), [round as u8; 3000]);
                        // Anywhere: it may fail, if the disk ends there.
                        let mut bytes = [1; 5000];
                        let slice = vm_memory::VolatileSlice::from(&mut bytes[..]);
                        drop(disk.write_at(&[slice], low + round * 12_345 % (12 << 20)));
                        if round.is_multiple_of(7) {
                            drop(disk.discard(low + round * 4096 % (8 << 20), 1 << 20));
                        }
                    }
                });
            }
            for i in 0..60u64 {
                disk.resize(low + i * 7_777_777 % (12 << 20) / 512 * 512)
                    .unwrap();
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
        disk.flush().unwrap();
        drop(disk);
        image.check();
        let disk = image.open().unwrap();
        let content = read_all(&disk);
        assert_same(
            &content[..low as usize],
            &expected,
            "below the smallest size",
        );
        drop(disk);
        image.expect(&content);
    }
}

/// QEMU agrees that what Tandem has grown or shrunk has the size.
#[test]
fn qemu_sees_the_size() {
    for kind in KINDS {
        let image = Image::create(kind, 65536, 1 << 20);
        for size in [5 << 20, 100 << 10, 0, 3 << 30] {
            image.open().unwrap().resize(size).unwrap();
            let info = qemu_img(&["info", "--output=json", image.path().to_str().unwrap()]);
            let info: serde_json::Value = serde_json::from_str(&info).unwrap();
            assert_eq!(info["virtual-size"], size, "{kind:?}");
            image.check();
        }
    }
}

/// QEMU leaves the subclusters behind the end of a raw disk alone: they are not there when it has grown,
/// whatever has been seen of the others before.
#[test]
fn subclusters_of_a_raw_disk_that_grows() {
    for size in [8 << 10, 100 << 10] {
        let image = Image::with_options(Kind::Raw, 65536, size, ",extended_l2=on");
        image.qemu_io(&[format!("write -P 1 0 {size}")]);
        let mut model = vec![0; 1 << 20];
        model[..size as usize].fill(1);
        let disk = image.open().unwrap();
        assert_same(&read_all(&disk), &model[..size as usize], "before");
        disk.resize(size + 16384).unwrap();
        write(&disk, size + 8192, 4096, 8);
        model[size as usize + 8192..][..4096].fill(8);
        disk.resize(1 << 20).unwrap();
        let at = size.next_multiple_of(65536) - 4096;
        write(&disk, at, 4096, 9);
        model[at as usize..][..4096].fill(9);
        disk.close().unwrap();
        drop(disk);
        image.expect(&model);
        let disk = image.open().unwrap();
        assert_same(&read_all(&disk), &model, "opened again");
    }
}
