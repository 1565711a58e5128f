//! Damaged headers: refused in QEMU's words, and nothing is changed.

use std::fs;

use crate::run::{Place, words};

/// Bytes to write over the header at an offset, and the reason for the refusal.
const DAMAGE: &[(usize, &[u8], &str)] = &[
    (0, b"QFJ", "Image is not in qcow2 format"),
    (4, &[0, 0, 0, 4], "Unsupported qcow2 version 4"),
    (8, &[0xff; 8], "Invalid backing file offset"),
    (20, &[0, 0, 0, 8], "Unsupported cluster size: 2^8"),
    (20, &[0, 0, 0, 22], "Unsupported cluster size: 2^22"),
    (24, &[0x40], "Image is too big"),
    (24, &[0, 0, 1], "L1 table is too small"),
    (32, &[0, 0, 0, 3], "Unsupported encryption method 3"),
    (36, &[0, 0x40, 0, 1], "Active L1 table too large"),
    (
        40,
        &[0, 0, 0, 0, 0, 3, 0, 1],
        "Active L1 table offset invalid",
    ),
    (
        40,
        &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        "Active L1 table offset invalid",
    ),
    (
        48,
        &[0, 0, 0, 0, 0, 1, 2, 0],
        "Reference count table offset invalid",
    ),
    (
        48,
        &[0x7f, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0],
        "Reference count table offset invalid",
    ),
    (
        56,
        &[0, 0, 0, 0],
        "Image does not contain a reference count table",
    ),
    (56, &[0, 0, 0, 0xff], "Reference count table too large"),
    (60, &[0, 2, 0, 0], "Snapshot table too large"),
    (
        64,
        &[0, 0, 0, 0, 0, 0, 0, 1],
        "Snapshot table offset invalid",
    ),
    (
        72,
        &[0, 0, 1],
        "Unsupported qcow2 feature(s): Unknown incompatible feature: 10000000000",
    ),
    (
        79,
        &[0x20],
        "Unsupported qcow2 feature(s): Unknown incompatible feature: 20",
    ),
    (
        79,
        &[8],
        "qcow2: Compression type incompatible feature bit must not be set",
    ),
    (
        96,
        &[0, 0, 0, 7],
        "Reference count entry width too large; may not exceed 64 bits",
    ),
    (100, &[0, 0, 0, 103], "qcow2 header too short"),
    (100, &[0, 1, 0, 8], "qcow2 header exceeds cluster size"),
    (104, &[2], "qcow2: unknown compression type: 2"),
    (
        104,
        &[1],
        "qcow2: Compression type incompatible feature bit must be set",
    ),
    (116, &[0, 1], "Header extension too large"),
];

#[test]
fn damaged_headers_are_refused() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 -o data_file=d t 1M");
    let sound = fs::read(place.path("t")).unwrap();
    for (at, bytes, reason) in DAMAGE {
        let mut image = sound.clone();
        image[*at..at + bytes.len()].copy_from_slice(bytes);
        assert_refused(&place, &image, reason);
    }
    for len in [0, 3, 4, 24, 60, 71, 100] {
        let reason = match len {
            0..4 => "Image is not in qcow2 format",
            4 => "Unsupported qcow2 version 0",
            _ => "qcow2 header too short",
        };
        assert_refused(&place, &sound[..len], reason);
    }
}

/// Both programs give `reason`, and leave the files as they are.
fn assert_refused(place: &Place, image: &[u8], reason: &str) {
    fs::write(place.path("t"), image).unwrap();
    let before = place.content();
    let args = words("info -f qcow2 t");
    let (expected, found) = (place.qemu_img(&args), place.run(&args));
    assert_eq!(found, expected, "{reason}");
    assert_eq!(
        found.stderr,
        format!("qemu-img: Could not open 't': {reason}\n")
    );
    assert_eq!(found.status, Some(1));
    let check = place.run(&words("check -f qcow2 t"));
    // A check goes on without a refcount table, and reports every cluster.
    let status = if reason.contains("does not contain") {
        2
    } else {
        1
    };
    assert_eq!(check.status, Some(status), "{reason}: {}", check.stderr);
    assert_eq!(place.content(), before, "{reason}");
}
