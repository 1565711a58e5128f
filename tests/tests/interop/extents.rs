//! Extents: what `qemu-img map` says of the same image.

use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{Disk, Error, ExtentKind, Raw};

use crate::qemu::{Image, KINDS, qemu_img, write};

/// Start, length, whether it has data, whether there is anything, and its place.
type Entry = (u64, u64, bool, bool, Option<u64>);

fn by_qemu(format: &str, path: &std::path::Path) -> Vec<Entry> {
    let map = qemu_img(&["map", "-f", format, "--output=json", path.to_str().unwrap()]);
    let map: Vec<serde_json::Value> = serde_json::from_str(&map).unwrap();
    let entries = map.iter().map(|extent| {
        let number = |key: &str| extent[key].as_u64();
        let is = |key: &str| extent[key].as_bool().unwrap();
        let range = (number("start").unwrap(), number("length").unwrap());
        (
            range.0,
            range.1,
            is("data"),
            is("present"),
            number("offset"),
        )
    });
    merged(entries)
}

/// Neighbours that continue each other in one. QEMU splits where the file below has holes, and
/// Tandem where it would take too long to look further.
fn merged(entries: impl Iterator<Item = Entry>) -> Vec<Entry> {
    let mut found: Vec<Entry> = Vec::new();
    for entry in entries.filter(|entry| entry.1 > 0) {
        let (_, len, data, present, offset) = entry;
        match found.last_mut() {
            Some(last)
                if (last.2, last.3) == (data, present)
                    && last.4.map(|offset| offset + last.1) == offset =>
            {
                last.1 += len;
            }
            _ => found.push(entry),
        }
    }
    found
}

fn by_tandem(disk: &dyn Disk) -> Vec<Entry> {
    let size = disk.size();
    let mut found = Vec::new();
    let mut at = 0;
    while at < size {
        let extent = disk.extent(at, size - at).unwrap();
        assert!(extent.len > 0 && extent.len <= size - at);
        let data = extent.kind == ExtentKind::Data;
        let present = extent.kind != ExtentKind::Unallocated;
        found.push((at, extent.len, data, present, extent.offset));
        at += extent.len;
    }
    merged(found.into_iter())
}

#[test]
fn of_images() {
    for kind in KINDS {
        for cluster in [512, 4096, 65536, 2 << 20] {
            let size = (40 << 20) + 512;
            let image = Image::on_disk(kind, cluster, size);
            image.qemu_io(&[
                "write 3M 5M".into(),
                "write 100k 300k".into(),
                "write -z 4M 1M".into(),
                "write -z -u 6M 1M".into(),
                "write 9M 512".into(),
                "write -z 0 64k".into(),
                "discard 7M 512k".into(),
                format!("write {} 512", 40 << 20),
            ]);
            let found = by_tandem(&image.open().unwrap());
            assert_eq!(found, by_qemu("qcow2", &image.path()), "{kind:?} {cluster}");
            let disk = image.open().unwrap();
            write(&disk, 20 << 20, 3 << 20, 7);
            disk.discard(21 << 20, 1 << 20).unwrap();
            disk.write_zeroes(3 << 20, 512 << 10, false).unwrap();
            disk.flush().unwrap();
            let found = by_tandem(&disk);
            drop(disk);
            assert_eq!(found, by_qemu("qcow2", &image.path()), "{kind:?} {cluster}");
        }
    }
}

#[test]
fn of_raw_disks() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("raw");
    for size in [0, 512, 10 << 20] {
        std::fs::File::create(&path).unwrap().set_len(size).unwrap();
        let disk = Raw::open(&path, false).unwrap();
        if size > 1 << 20 {
            write(&disk, 1 << 20, 2 << 20, 7);
            write(&disk, 9 << 20, 1 << 20, 7);
            disk.discard(2 << 20, 512 << 10).unwrap();
        }
        disk.flush().unwrap();
        assert_eq!(by_tandem(&disk), by_qemu("raw", &path));
    }
}

/// A call looks at a bounded part, also of a disk of which nothing is stored.
#[test]
fn of_parts_and_of_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = CreateOptions {
        size: 1 << 50,
        cluster_size: 2 << 20,
        ..CreateOptions::default()
    };
    create(&path, &options).unwrap();
    let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
    assert_eq!(by_tandem(&disk), [(0, 1 << 50, false, false, None)]);
    write(&disk, 5 << 20, 4 << 20, 7);
    let extent = disk.extent((5 << 20) + 1000, 3000).unwrap();
    assert_eq!((extent.len, extent.kind), (3000, ExtentKind::Data));
    assert_eq!(disk.extent(5, 0).unwrap().len, 0);
    for (offset, len) in [(1 << 50, 1), (u64::MAX, 1), (0, u64::MAX)] {
        assert!(matches!(
            disk.extent(offset, len),
            Err(Error::OutOfRange { .. })
        ));
    }
}
