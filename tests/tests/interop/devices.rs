//! Data files, and raw disks, that are host block devices: loop devices over sparse files.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tandem_block::qcow2::{CreateOptions, DataFileLayout, OpenOptions, Qcow2, check, create};
use tandem_block::{CacheMode, Disk, Error, FileOptions, Raw};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

use crate::qemu::{assert_same, qemu_img, read, read_all, write};

const CLUSTER: u64 = 64 << 10;
const SIZE: u64 = 4 << 20;

/// A loop device that goes away with this.
struct LoopDevice {
    path: PathBuf,
    dir: TempDir,
}

impl LoopDevice {
    /// A device of `size` bytes, all of them 0xdd. `None`, with a line that says so, where there are
    /// no loop devices to be had; a failed test, if `TANDEM_REQUIRE_LOOP` is 1.
    fn new(size: u64) -> Option<Self> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("backing");
        fs::write(&file, vec![0xdd; size as usize]).unwrap();
        let output = Command::new("losetup")
            .args(["--find", "--show"])
            .arg(&file)
            .output();
        match output {
            Ok(output) if output.status.success() => {
                let path = String::from_utf8(output.stdout).unwrap();
                Some(Self {
                    path: path.trim().into(),
                    dir,
                })
            }
            other => {
                let is_required = std::env::var_os("TANDEM_REQUIRE_LOOP").is_some_and(|v| v == "1");
                assert!(
                    !is_required,
                    "TANDEM_REQUIRE_LOOP=1, but losetup: {other:?}"
                );
                eprintln!("skipped: no loop device: {other:?}");
                None
            }
        }
    }

    /// Makes the device `size` bytes long; what it gains is zero.
    fn resize(&self, size: u64) {
        let file = self.dir.path().join("backing");
        let file = fs::File::options().write(true).open(file).unwrap();
        file.set_len(size).unwrap();
        let status = Command::new("losetup").arg("-c").arg(&self.path).status();
        assert!(status.unwrap().success());
    }

    fn content(&self) -> Vec<u8> {
        fs::read(&self.path).unwrap()
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

/// Requests of all kinds, and the same on a vector of bytes.
fn work(disk: &dyn Disk, model: &mut [u8]) {
    for i in 0..40u64 {
        let at = i * 7919 * 512 % (SIZE - 300 * 512);
        let len = (1 + i * 37 % 290) * 512;
        let range = at as usize..(at + len) as usize;
        match i % 5 {
            0..=2 => {
                write(disk, at, len as usize, 1 + i as u8);
                model[range].fill(1 + i as u8);
            }
            3 => {
                disk.write_zeroes(at, len, i % 2 == 0).unwrap();
                model[range].fill(0);
            }
            _ => {
                let (start, end) = (at.next_multiple_of(CLUSTER), (at + len) / CLUSTER * CLUSTER);
                if start < end {
                    disk.discard(start, end - start).unwrap();
                    model[start as usize..end as usize].fill(0);
                }
            }
        }
    }
    disk.flush().unwrap();
}

/// What stands on the device must not show, where the device is not itself the disk; QEMU sees
/// what Tandem wrote, and Tandem what QEMU wrote.
#[test]
fn data_file() {
    for raw in ["on", "off"] {
        let Some(device) = LoopDevice::new(SIZE) else {
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let image = path.to_str().unwrap();
        let options = format!("data_file={},data_file_raw={raw}", device.path.display());
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &options, image, "4M"]);
        let mut model = match raw {
            "on" => device.content(),
            _ => vec![0; SIZE as usize],
        };
        // It lies outside the image's directory.
        let named = Qcow2::open(&path, &OpenOptions::default()).err().unwrap();
        assert!(matches!(named, Error::DataFile { .. }), "{named}");
        let options = OpenOptions {
            data_file: Some(device.path.clone()),
            ..OpenOptions::default()
        };
        let disk = Qcow2::open(&path, &options).unwrap();
        assert_same(&read_all(&disk), &model, "the new disk");
        work(&disk, &mut model);
        assert_same(&read_all(&disk), &model, "the disk");
        drop(disk);
        qemu_img(&["check", "-q", image]);
        let converted = dir.path().join("converted");
        qemu_img(&["convert", "-O", "raw", image, converted.to_str().unwrap()]);
        assert_same(&fs::read(converted).unwrap(), &model, "qemu-img convert");
        if raw == "on" {
            assert_same(&device.content(), &model, "the device");
        }

        let output = Command::new("qemu-io")
            .args(["-f", "qcow2", "-c", "write -P 99 1000k 200k", image])
            .output()
            .unwrap();
        assert!(output.status.success(), "{output:?}");
        model[1000 << 10..1200 << 10].fill(99);
        let disk = Qcow2::open(&path, &options).unwrap();
        assert_same(&read_all(&disk), &model, "the disk after QEMU");
    }
}

#[test]
fn created_on_a_device() {
    let Some(device) = LoopDevice::new(SIZE) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = |size, raw| CreateOptions {
        size,
        data_file: Some(device.path.clone()),
        data_file_raw: raw,
        ..CreateOptions::default()
    };
    let error = create(&path, &options(SIZE + 512, true)).unwrap_err();
    assert!(
        error.to_string().contains("Cannot grow device files"),
        "{error}"
    );
    assert_same(&device.content(), &vec![0xdd; SIZE as usize], "the device");
    assert!(!path.exists());

    for raw in [false, true] {
        create(&path, &options(SIZE, raw)).unwrap();
        qemu_img(&["check", "-q", path.to_str().unwrap()]);
    }
    // As QEMU does: nobody takes the device for what it held before.
    let mut expected = vec![0xdd; SIZE as usize];
    expected[..512].fill(0);
    assert_same(&device.content(), &expected, "the device");
}

/// A disk of 1 TiB on a device of 4 MiB.
#[test]
fn packed() {
    let Some(device) = LoopDevice::new(SIZE) else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let create_options = CreateOptions {
        size: 1 << 40,
        data_file: Some(device.path.clone()),
        data_file_layout: DataFileLayout::Packed,
        ..CreateOptions::default()
    };
    create(&path, &create_options).unwrap();
    let options = OpenOptions {
        data_file: Some(device.path.clone()),
        ..OpenOptions::default()
    };
    let at = |i: u64| (i * 1_000_003 * CLUSTER) % (1 << 40);
    let expected = |i: u64| {
        let mut bytes = vec![0; CLUSTER as usize];
        bytes[1000..3000].fill(1 + i as u8);
        bytes
    };
    let disk = Qcow2::open(&path, &options).unwrap();
    for i in 0..SIZE / CLUSTER {
        write(&disk, at(i) + 1000, 2000, 1 + i as u8);
    }
    let mut sector = [0; 512];
    let full = disk.write_at(&[VolatileSlice::from(&mut sector[..])], at(100));
    let is_full = |error: &Error| {
        matches!(error, Error::Io { source, .. }
            if source.kind() == std::io::ErrorKind::StorageFull)
    };
    assert!(is_full(&full.unwrap_err()));
    drop(disk);
    check(
        &path,
        &tandem_block::qcow2::CheckOptions {
            follow: options.follow,
            data_file: options.data_file.clone(),
            ..Default::default()
        },
        &mut |finding| panic!("{}", finding.text),
    )
    .unwrap();

    let disk = Qcow2::open(&path, &options).unwrap();
    for i in 0..SIZE / CLUSTER {
        assert_same(
            &read(&disk, at(i), CLUSTER as usize),
            &expected(i),
            "a cluster",
        );
    }
    disk.discard(at(3), CLUSTER).unwrap();
    write(&disk, at(100) + 1000, 2000, 101);
    assert_same(
        &read(&disk, at(100), CLUSTER as usize),
        &expected(100),
        "a cluster",
    );
}

/// Parts of a device's blocks can be zeroed and discarded, too.
fn raw_disk(cache: CacheMode) {
    let Some(device) = LoopDevice::new(SIZE) else {
        return;
    };
    let mut model = device.content();
    let files = FileOptions {
        cache,
        ..FileOptions::default()
    };
    let disk = Raw::open_with(&device.path, false, files).unwrap();
    assert_eq!(disk.size(), SIZE);
    work(&disk, &mut model);
    disk.write_zeroes(1000, 100_000, true).unwrap();
    disk.write_zeroes(300_001, 70, false).unwrap();
    model[1000..101_000].fill(0);
    model[300_001..300_071].fill(0);
    disk.flush().unwrap();
    assert_same(&read_all(&disk), &model, "the disk");
    disk.discard(SIZE - 5001, 4999).unwrap();
    let after = read_all(&disk);
    let (cut, end) = (SIZE as usize - 5001, SIZE as usize - 2);
    assert_same(&after[..cut], &model[..cut], "what was not discarded");
    assert_same(&after[end..], &model[end..], "what was not discarded");
    assert_same(&device.content(), &after, "the device");
    drop(disk);
    let read_only = Raw::open_with(Path::new(&device.path), true, files).unwrap();
    assert_same(&read_all(&read_only), &after, "the disk, read-only");
}

#[test]
fn raw_disks() {
    raw_disk(CacheMode::Writeback);
}

/// Past the page cache, by requests that are aligned to nothing.
#[test]
fn raw_disks_with_direct_io() {
    raw_disk(CacheMode::None);
}

/// A device that grows while it is in use, and gets smaller again.
#[test]
fn raw_disks_follow_their_device() {
    for cache in [CacheMode::Writeback, CacheMode::None] {
        let Some(device) = LoopDevice::new(SIZE) else {
            return;
        };
        let files = FileOptions {
            cache,
            ..FileOptions::default()
        };
        let disk = Raw::open_with(&device.path, false, files).unwrap();
        let refused = |size| {
            let error = disk.resize(size).unwrap_err().to_string();
            assert!(error.contains("Cannot resize device files"), "{error}");
        };
        refused(2 * SIZE);
        device.resize(2 * SIZE);
        assert_eq!(disk.size(), SIZE);
        refused(2 * SIZE - 512);
        disk.resize(2 * SIZE).unwrap();
        assert_eq!(disk.size(), 2 * SIZE);
        assert_same(
            &read(&disk, SIZE, 4096),
            &[0; 4096],
            "what the disk has gained",
        );
        write(&disk, 2 * SIZE - 4096, 4096, 7);
        disk.flush().unwrap();
        assert_same(
            &device.content()[2 * SIZE as usize - 4096..],
            &[7; 4096],
            "the end",
        );
        device.resize(SIZE / 2);
        refused(SIZE);
        disk.resize(SIZE / 2).unwrap();
        assert_same(&read_all(&disk), &vec![0xdd; SIZE as usize / 2], "the disk");
    }
}

#[test]
fn images_grow_on_a_device_that_has_grown() {
    for raw in [false, true] {
        let Some(device) = LoopDevice::new(SIZE) else {
            return;
        };
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let create_options = CreateOptions {
            size: SIZE,
            data_file: Some(device.path.clone()),
            data_file_raw: raw,
            ..CreateOptions::default()
        };
        create(&path, &create_options).unwrap();
        let options = OpenOptions {
            data_file: Some(device.path.clone()),
            ..OpenOptions::default()
        };
        let disk = Qcow2::open(&path, &options).unwrap();
        write(&disk, SIZE - CLUSTER, CLUSTER as usize, 5);
        let error = disk.resize(2 * SIZE).unwrap_err().to_string();
        assert!(error.contains("Cannot grow device files"), "{error}");
        device.resize(2 * SIZE);
        disk.resize(2 * SIZE).unwrap();
        write(&disk, 2 * SIZE - 4096, 4096, 7);
        let model = read_all(&disk);
        assert_eq!(model.len() as u64, 2 * SIZE);
        assert_same(
            &model[SIZE as usize..][..4096],
            &[0; 4096],
            "what the disk has gained",
        );
        disk.close().unwrap();
        drop(disk);
        qemu_img(&["check", "-q", path.to_str().unwrap()]);
        let converted = dir.path().join("converted");
        let converted = converted.to_str().unwrap();
        qemu_img(&["convert", "-O", "raw", path.to_str().unwrap(), converted]);
        assert_same(&fs::read(converted).unwrap(), &model, "qemu-img convert");
    }
}

/// What the system tells of the device.
#[test]
fn limits() {
    let Some(device) = LoopDevice::new(SIZE) else {
        return;
    };
    let name = device.path.file_name().unwrap().to_str().unwrap();
    let queue = |limit: &str| -> u64 {
        let text = fs::read_to_string(format!("/sys/block/{name}/queue/{limit}"));
        text.unwrap().trim().parse().unwrap()
    };
    let limits = Raw::open(&device.path, false).unwrap().limits();
    let told = [
        limits.physical_block_size,
        limits.optimal_io_size,
        limits.discard_granularity,
    ];
    let expected = [
        queue("physical_block_size"),
        queue("optimal_io_size"),
        queue("discard_granularity").max(512),
    ];
    assert_eq!(told.map(u64::from), expected);
    assert_eq!(limits.can_unmap, queue("write_zeroes_max_bytes") > 0);
    let direct = FileOptions {
        cache: CacheMode::None,
        ..FileOptions::default()
    };
    let direct = Raw::open_with(&device.path, false, direct)
        .unwrap()
        .limits();
    assert!(direct.physical_block_size >= limits.physical_block_size);
}
