//! Random operations, against a plain byte vector and against QEMU.

use std::fs;
use std::ops::Range;
use std::path::Path;

use proptest::prelude::*;
use tandem_block::Disk;

use crate::qemu::{self, Image, KINDS, Kind, assert_same, at_once, read, read_all, write};

/// Images with clusters of this size are on a disk.
const USUAL: u64 = 64 << 10;

#[derive(Clone, Debug)]
enum Op {
    Write {
        offset: u64,
        len: usize,
        byte: u8,
    },
    /// Whole clusters, compressed.
    Compress {
        cluster: u64,
        count: u64,
        seed: u8,
    },
    Zero {
        offset: u64,
        len: usize,
        unmap: bool,
    },
    Discard {
        offset: u64,
        len: usize,
    },
    Read {
        offset: u64,
        len: usize,
    },
    Flush,
    Reopen,
}

/// Operations on a disk of `size` bytes: mostly small, near the clusters' borders, sometimes huge.
fn ops(size: u64, cluster_size: u64) -> impl Strategy<Value = Vec<Op>> {
    let border = (0..=size / cluster_size, -1024i64..1024)
        .prop_map(move |(c, delta)| (c * cluster_size).saturating_add_signed(delta).min(size));
    let offset = prop_oneof![border, 0..=size];
    let len = prop_oneof![
        4 => 0..8192u64,
        2 => 0..3 * cluster_size,
        1 => 0..size / 4
    ];
    let range = (offset, len).prop_map(move |(o, l)| (o, l.min(size - o) as usize));
    let op = prop_oneof![
        6 => (range.clone(), 1..=255u8)
            .prop_map(|((offset, len), byte)| Op::Write { offset, len, byte }),
        2 => (0..=size / cluster_size, 1..8u64, any::<u8>())
            .prop_map(|(cluster, count, seed)| Op::Compress { cluster, count, seed }),
        2 => (range.clone(), any::<bool>())
            .prop_map(|((offset, len), unmap)| Op::Zero { offset, len, unmap }),
        2 => range.clone().prop_map(|(offset, len)| Op::Discard { offset, len }),
        2 => range.prop_map(|(offset, len)| Op::Read { offset, len }),
        1 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ];
    prop::collection::vec(op, 1..40)
}

/// Runs `ops` on an image of `kind`, which QEMU has filled in part where `prefilled`.
fn run(kind: Kind, cluster_size: u64, size: u64, prefilled: bool, ops: &[Op]) {
    let image = match cluster_size {
        USUAL => Image::on_disk(kind, cluster_size, size),
        _ => Image::create(kind, cluster_size, size),
    };
    run_prefilled(&image, cluster_size, size, prefilled, ops);
}

fn run_prefilled(image: &Image, cluster_size: u64, size: u64, prefilled: bool, ops: &[Op]) {
    let mut model = vec![0u8; size as usize];
    if prefilled {
        fill_by_qemu(image, &mut model);
    }
    run_on(image, cluster_size, model, true, ops);
}

/// Runs `ops` on `image`, which shows `model`. Whole clusters that are discarded read as zero, or
/// stay, as `discards` says.
fn run_on(image: &Image, cluster_size: u64, mut model: Vec<u8>, discards: bool, ops: &[Op]) {
    let mut disk = image.open().unwrap();
    for op in ops {
        match *op {
            Op::Write { offset, len, byte } => {
                write(&disk, offset, len, byte);
                model[offset as usize..][..len].fill(byte);
            }
            Op::Compress { .. } if matches!(image.kind, Kind::External | Kind::Raw) => {
                assert!(disk.compress(vec![1]).is_err());
            }
            Op::Compress {
                cluster,
                count,
                seed,
            } => {
                let starts = (cluster..cluster + count).map(|cluster| cluster * cluster_size);
                for start in starts.take_while(|start| *start < disk.size()) {
                    let end = (start + cluster_size).min(disk.size());
                    let data = compressible(seed, (end - start) as usize);
                    model[start as usize..end as usize].copy_from_slice(&data);
                    let cluster = disk.compress(data).unwrap();
                    disk.write_compressed(cluster, start).unwrap();
                }
            }
            Op::Zero { offset, len, unmap } => {
                disk.write_zeroes(offset, len as u64, unmap).unwrap();
                model[offset as usize..][..len].fill(0);
            }
            Op::Discard { offset, len } => {
                disk.discard(offset, len as u64).unwrap();
                if !discards {
                    continue;
                }
                let gone = whole_clusters(cluster_size as usize, offset as usize, len, model.len());
                model[gone].fill(0);
            }
            Op::Read { offset, len } => {
                let expected = &model[offset as usize..][..len];
                assert_same(&read(&disk, offset, len), expected, "read");
            }
            Op::Flush => disk.flush().unwrap(),
            Op::Reopen => {
                drop(disk);
                disk = image.open().unwrap();
            }
        }
    }
    assert_same(&read_all(&disk), &model, "the disk before it is closed");
    disk.flush().unwrap();
    drop(disk);
    image.expect(&model);
    assert_same(
        &read_all(&image.open().unwrap()),
        &model,
        "the disk opened again",
    );
}

/// `len` bytes that become smaller or not, as `seed` says: noise, and one value behind it.
fn compressible(seed: u8, len: usize) -> Vec<u8> {
    let mut data = vec![seed; len];
    let mut state = u32::from(seed) + 1;
    for byte in &mut data[..len * usize::from(seed) / 255] {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        *byte = (state >> 24) as u8;
    }
    data
}

/// What reads as zero after a range of a disk of `size` bytes has been discarded.
fn whole_clusters(cluster_size: usize, offset: usize, len: usize, size: usize) -> Range<usize> {
    let end = offset + len;
    let start = offset.next_multiple_of(cluster_size);
    let end = if end == size {
        end
    } else {
        end - end % cluster_size
    };
    start.min(end)..end
}

/// Writes, zeroes and discards by `qemu-io`, in a fixed pattern over the whole disk.
fn fill_by_qemu(image: &Image, model: &mut [u8]) {
    let size = model.len();
    let mut commands = Vec::new();
    for i in 0..24usize {
        let offset = i * 7_654_321 % (size - 200_000) / 512 * 512;
        let len = (1 + i * 37 % 300) * 512;
        let (command, byte) = match i % 6 {
            4 => (format!("write -z {offset} {len}"), 0),
            5 => (format!("write -z -u {offset} {len}"), 0),
            _ => (format!("write -P {} {offset} {len}", i + 1), i as u8 + 1),
        };
        commands.push(command);
        model[offset..][..len].fill(byte);
    }
    image.qemu_io(&commands);
}

fn cases(cluster_size: u64, size: u64, count: u32) {
    let config = ProptestConfig {
        cases: count,
        failure_persistence: None,
        ..Default::default()
    };
    proptest!(config, |(ops in ops(size, cluster_size), prefilled in any::<bool>())| {
        at_once(KINDS, |kind| run(kind, cluster_size, size, prefilled, &ops));
    });
}

#[test]
fn clusters_of_512_bytes() {
    cases(512, (3 << 20) + 512, 10);
}

#[test]
fn clusters_of_64_kib() {
    cases(USUAL, (12 << 20) + 1536, 10);
}

#[test]
fn clusters_of_2_mib() {
    cases(2 << 20, (33 << 20) + 512, 4);
}

/// Extended L2 entries: QEMU writes parts of clusters, and we others.
#[test]
fn subclusters() {
    for (cluster_size, size, cases) in [
        (16 << 10, (3 << 20) + 512, 8),
        (64 << 10, (12 << 20) + 1536, 8),
        (2 << 20, (17 << 20) + 512, 3),
    ] {
        let config = ProptestConfig {
            cases,
            failure_persistence: None,
            ..Default::default()
        };
        proptest!(config, |(ops in ops(size, cluster_size), prefilled in any::<bool>())| {
            at_once([Kind::Internal, Kind::External, Kind::Raw], |kind| {
                let image = Image::with_options(kind, cluster_size, size, ",extended_l2=on");
                run_prefilled(&image, cluster_size, size, prefilled, &ops);
            });
        });
    }
}

/// Images of compressed clusters, made by QEMU: several of them in one host cluster, which are taken up
/// and given back one by one.
#[test]
fn compressed_clusters() {
    let config = ProptestConfig {
        cases: 4,
        failure_persistence: None,
        ..Default::default()
    };
    let images = [
        (
            4096,
            Kind::Internal,
            ",compression_type=zstd,refcount_bits=8",
        ),
        (64 << 10, Kind::Internal, ""),
        (64 << 10, Kind::Internal, ",compression_type=zstd"),
        (64 << 10, Kind::Internal, ",extended_l2=on"),
        (64 << 10, Kind::InternalV2, ""),
        (2 << 20, Kind::Internal, ""),
    ];
    at_once(images, |(cluster_size, kind, more)| {
        let size = (5 << 20) + 1536;
        proptest!(config.clone(), |(ops in ops(size, cluster_size))| {
            let image = Image::with_options(kind, cluster_size, size, more);
            let mut model: Vec<u8> = (0..size).map(|i| (i * i / 4001 % 251) as u8).collect();
            model[1 << 20..2 << 20].fill(0);
            let source = image.path().with_file_name("source");
            fs::write(&source, &model).unwrap();
            let (source, target) = (source.to_str().unwrap(), image.path());
            qemu::run("qemu-img", &["convert", "-n", "-c", "-f", "raw", "-O", "qcow2", source, target.to_str().unwrap()]);
            let before = image.open().unwrap();
            assert_eq!(before.extent(0, 512).unwrap().kind, tandem_block::ExtentKind::Compressed);
            assert_same(&read_all(&before), &model, "the compressed disk");
            drop(before);
            run_on(&image, cluster_size, model, true, &ops);
        });
    });
}

/// Makes the files of a backing chain in `dir`, and returns what it shows: 6 MiB of qcow2 in clusters
/// of 4 KiB over some 9 MB of raw file that does not end with a sector.
fn make_chain(dir: &Path) -> Vec<u8> {
    let mut shown: Vec<u8> = (0..9_000_100).map(|i| (i / 5000 % 251) as u8 + 1).collect();
    shown[2_000_000..4_000_000].fill(0);
    fs::write(dir.join("base"), &shown).unwrap();
    let middle = dir.join("middle");
    let middle = middle.to_str().unwrap();
    let options = "cluster_size=4k,backing_file=base,backing_fmt=raw";
    qemu::run(
        "qemu-img",
        &["create", "-q", "-f", "qcow2", "-o", options, middle, "6M"],
    );
    shown.truncate(6 << 20);
    let mut arguments = vec!["-f", "qcow2", middle];
    for (command, range, byte) in [
        ("write -P 77 1000000 300000", 1_000_000..1_300_000, 77),
        ("write -z 1200128 100000", 1_200_128..1_300_128, 0),
        ("write -P 78 5242880 1048576", 5_242_880..6_291_456, 78),
    ] {
        arguments.extend(["-c", command]);
        shown[range].fill(byte);
    }
    qemu::run("qemu-io", &arguments);
    shown
}

/// Images on top of two others, of other formats, sizes and cluster sizes.
#[test]
fn backing_chains() {
    let config = ProptestConfig {
        cases: 4,
        failure_persistence: None,
        ..Default::default()
    };
    for (cluster_size, size, more) in [
        (512, (7 << 20) + 512, ""),
        (64 << 10, (7 << 20) + 1536, ""),
        (2 << 20, 5 << 20, ""),
        (16 << 10, (7 << 20) + 1536, ",extended_l2=on"),
        (128 << 10, 7 << 20, ",extended_l2=on"),
        (128 << 10, 7 << 20, ",extended_l2=on,preallocation=metadata"),
    ] {
        proptest!(config.clone(), |(ops in ops(size, cluster_size))| {
            at_once([Kind::Internal, Kind::InternalV2, Kind::External], |kind| {
                if kind == Kind::InternalV2 && !more.is_empty() {
                    return;
                }
                let mut model = Vec::new();
                let image = Image::prepared(kind, cluster_size, size, |dir| {
                    model = make_chain(dir);
                    format!(",backing_file=middle,backing_fmt=qcow2{more}")
                });
                model.resize(size as usize, 0);
                let before = ["base", "middle"].map(|name| fs::read(image.path().with_file_name(name)).unwrap());
                run_on(&image, cluster_size, model, kind != Kind::InternalV2, &ops);
                let after = ["base", "middle"].map(|name| fs::read(image.path().with_file_name(name)).unwrap());
                assert!(before == after, "a backing file has changed");
            });
        });
    }
}
