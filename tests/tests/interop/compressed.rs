//! Clusters that the engine compresses, as QEMU sees them.

use std::fs;
use std::thread;

use tandem_block::qcow2::Qcow2;
use tandem_block::{Disk, ExtentKind};

use crate::qemu::{Image, Kind, assert_same, qemu_img, read, read_all, write};

/// Writes all of `model` to `disk`, compressed.
fn compress(disk: &Qcow2, model: &[u8]) {
    let cluster_size = disk.cluster_size();
    for (i, data) in model.chunks(cluster_size as usize).enumerate() {
        let cluster = disk.compress(data.to_vec()).unwrap();
        disk.write_compressed(cluster, i as u64 * cluster_size)
            .unwrap();
    }
}

/// Text-like data.
fn text(len: usize) -> Vec<u8> {
    (0..len).map(|i| (i * i / 4001 % 251) as u8).collect()
}

fn noise(len: usize) -> Vec<u8> {
    let mut state = 1u32;
    let next = |_| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    };
    (0..len).map(next).collect()
}

/// The first word of the L2 entry of guest cluster `cluster`, in an image with one L2 table.
fn entry(image: &Image, cluster: usize) -> u64 {
    let bytes = fs::read(image.path()).unwrap();
    let word = |at: usize| u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap());
    let table = word(word(40) as usize) & 0x00ff_ffff_ffff_fe00;
    word(table as usize + cluster * 8)
}

/// Noise that repeats at many distances, 4 KiB and those next to it among them, reads back in QEMU,
/// which inflates with a window of 4 KiB.
#[test]
fn distances_fit_into_qemus_window() {
    let distances = [3833, 3834, 3835, 4095, 4096, 4097, 8192, 20_000, 32_768];
    for cluster_size in [64 << 10, 2 << 20] {
        let mut model = Vec::new();
        for distance in distances {
            let block = noise(distance);
            model.extend(block.iter().cycle().take(cluster_size));
        }
        for more in ["", ",compression_type=zstd"] {
            let size = model.len() as u64;
            let image = Image::with_options(Kind::Internal, cluster_size as u64, size, more);
            let disk = image.open().unwrap();
            compress(&disk, &model);
            disk.flush().unwrap();
            let near = disk.extent(0, 512).unwrap().kind;
            assert_eq!(near, ExtentKind::Compressed);
            drop(disk);
            image.expect(&model);
        }
    }
}

/// Several share a cluster of the file, one reaches into the next, and the file is about as long as
/// the one that QEMU makes.
#[test]
fn clusters_are_packed_as_by_qemu() {
    let size = (4 << 20) + 1536;
    let mut model = text(size);
    model[1 << 20..2 << 20].fill(0);
    model[3 << 20..(3 << 20) + 70_000].copy_from_slice(&noise(70_000));
    for (cluster_size, kind, more) in [
        (512, Kind::Internal, ""),
        (4096, Kind::Internal, ",compression_type=zstd"),
        (65536, Kind::Internal, ""),
        (65536, Kind::Internal, ",extended_l2=on"),
        (65536, Kind::InternalV2, ""),
        (2 << 20, Kind::Internal, ",compression_type=zstd"),
    ] {
        let image = Image::with_options(kind, cluster_size, size as u64, more);
        let disk = image.open().unwrap();
        compress(&disk, &model);
        disk.flush().unwrap();
        // Whoever wants zeros to take no space leaves them out.
        let zero = disk.extent(1 << 20, 512).unwrap();
        assert_eq!(zero.kind, ExtentKind::Compressed);
        drop(disk);
        image.expect(&model);

        let (source, theirs) = (
            image.path().with_file_name("source"),
            image.path().with_file_name("theirs"),
        );
        fs::write(&source, &model).unwrap();
        let compat = if kind == Kind::InternalV2 {
            ",compat=0.10"
        } else {
            ""
        };
        let options = format!("cluster_size={cluster_size}{more}{compat}");
        let (source, theirs) = (source.to_str().unwrap(), theirs.to_str().unwrap());
        qemu_img(&[
            "convert", "-c", "-S", "0", "-f", "raw", "-O", "qcow2", "-o", &options, source, theirs,
        ]);
        let len = |path: &str| fs::metadata(path).unwrap().len();
        let (ours, theirs) = (len(image.path().to_str().unwrap()), len(theirs));
        assert!(
            ours < theirs + theirs / 20 + 2 * cluster_size,
            "{cluster_size}{more}: {ours} bytes, {theirs} by QEMU"
        );
    }
}

/// A refcount of one bit cannot count a second user: each compressed cluster has a host cluster of
/// its own.
#[test]
fn narrow_refcounts_share_nothing() {
    for (bits, apart) in [(1, 65536), (2, 0)] {
        let more = format!(",refcount_bits={bits}");
        let image = Image::with_options(Kind::Internal, 65536, 1 << 20, &more);
        let model = text(1 << 20);
        let disk = image.open().unwrap();
        compress(&disk, &model);
        drop(disk);
        image.expect(&model);
        let offset = |cluster| entry(&image, cluster) & ((1 << 54) - 1);
        let distance = offset(1) - offset(0);
        assert!(distance >= apart && (apart > 0 || distance < 65536));
        if apart > 0 {
            assert_eq!(offset(1) % apart, 0);
        }
    }
}

/// What is written, zeroed or discarded over compressed clusters gives back exactly their
/// references, and what is compressed over others theirs.
#[test]
fn replacing_leaks_nothing() {
    for more in ["", ",extended_l2=on"] {
        let size = 1 << 20;
        let image = Image::with_options(Kind::Internal, 65536, size as u64, more);
        let disk = image.open().unwrap();
        write(&disk, 0, size, 9);
        disk.flush().unwrap();
        let mut model = text(size);
        for _ in 0..3 {
            compress(&disk, &model);
            write(&disk, 65536 + 1000, 70_000, 1);
            model[65536 + 1000..][..70_000].fill(1);
            disk.write_zeroes(4 * 65536, 65536, true).unwrap();
            model[4 * 65536..][..65536].fill(0);
            disk.write_zeroes(6 * 65536 + 512, 512, false).unwrap();
            model[6 * 65536 + 512..][..512].fill(0);
            disk.discard(8 * 65536, 3 * 65536).unwrap();
            model[8 * 65536..][..3 * 65536].fill(0);
            disk.flush().unwrap();
        }
        assert_same(&read_all(&disk), &model, "the disk");
        disk.discard(0, size as u64).unwrap();
        disk.flush().unwrap();
        drop(disk);
        image.expect(&vec![0; size]);
        // Nothing is left that has a place.
        assert!(image.map().iter().all(|(.., has_place)| !has_place));
    }
}

/// A host cluster whose compressed clusters are all gone is not filled further: it may belong to
/// somebody else.
#[test]
fn a_host_cluster_that_was_freed_is_left_alone() {
    let image = Image::create(Kind::Internal, 65536, 4 << 20);
    let disk = image.open().unwrap();
    let mut model = vec![0; 4 << 20];
    for round in 0..20usize {
        let (a, b) = (round * 131_072, round * 131_072 + 65536);
        let data = text(65536);
        let cluster = disk.compress(data.clone()).unwrap();
        disk.write_compressed(cluster.clone(), a as u64).unwrap();
        disk.discard(a as u64, 65536).unwrap();
        // The cluster comes back, and becomes that of a normal one.
        disk.flush().unwrap();
        write(&disk, a as u64, 65536, 7);
        model[a..b].fill(7);
        disk.write_compressed(cluster, b as u64).unwrap();
        model[b..b + 65536].copy_from_slice(&data);
    }
    assert_same(&read_all(&disk), &model, "the disk");
    drop(disk);
    image.expect(&model);
}

/// Threads compress, overwrite and discard clusters that share host clusters with those of the
/// others.
#[test]
fn several_threads() {
    const THREADS: usize = 4;
    let cluster = 4096;
    let size = 400 * cluster;
    let image = Image::create(Kind::Internal, cluster as u64, size as u64);
    let disk = image.open_with_small_cache();
    let models: Vec<Vec<u8>> = thread::scope(|scope| {
        let disk = &disk;
        let work = move |thread: usize| {
            let mut model = vec![0; size];
            for step in 0..1500usize {
                let number = (step * 7919 + step / 13 * 31) % (400 / THREADS) * THREADS + thread;
                let range = number * cluster..(number + 1) * cluster;
                let (at, expected) = (range.start as u64, &mut model[range]);
                match step % 5 {
                    0..=2 => {
                        let mut data = vec![step as u8; cluster];
                        data[..step % cluster].copy_from_slice(&noise(cluster)[..step % cluster]);
                        expected.copy_from_slice(&data);
                        let data = disk.compress(data).unwrap();
                        disk.write_compressed(data, at).unwrap();
                    }
                    3 => {
                        disk.discard(at, cluster as u64).unwrap();
                        expected.fill(0);
                    }
                    _ => {
                        write(disk, at + 512, 1000, step as u8);
                        expected[512..1512].fill(step as u8);
                    }
                }
                assert!(read(disk, at, cluster) == *expected, "step {step}");
                if step % 97 == 0 {
                    disk.flush().unwrap();
                }
            }
            model
        };
        let threads: Vec<_> = (0..THREADS).map(|t| scope.spawn(move || work(t))).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    let whole: Vec<u8> = (0..size)
        .map(|i| models[i / cluster % THREADS][i])
        .collect();
    assert_same(&read_all(&disk), &whole, "the disk");
    drop(disk);
    image.expect(&whole);
}

/// Only whole clusters of the disk can be compressed, and not into a data file.
#[test]
fn what_is_refused() {
    let image = Image::create(Kind::Internal, 65536, (1 << 20) + 512);
    let disk = image.open().unwrap();
    let reason = |data: usize, at: u64| {
        let cluster = disk.compress(vec![1; data]).unwrap();
        disk.write_compressed(cluster, at).unwrap_err().to_string()
    };
    assert_eq!(
        reason(65536, 512),
        "65536 bytes at 0x200 are not a cluster of the disk"
    );
    assert_eq!(
        reason(512, 0),
        "512 bytes at 0x0 are not a cluster of the disk"
    );
    assert!(reason(65536, 1 << 20).contains("outside the disk"));
    assert!(disk.compress(vec![1; 65537]).is_err());
    for kind in [Kind::External, Kind::Raw] {
        let image = Image::create(kind, 65536, 1 << 20);
        let error = image.open().unwrap().compress(vec![1; 65536]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "Compression is not supported for images with an external data file"
        );
    }
}
