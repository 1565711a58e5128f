//! `info`

use std::fs;

use crate::run::{Both, Place, words};

fn images(place: &Place) {
    place.make("create -q -f qcow2 internal 10M");
    place.qemu_io("internal", &["write 1M 1M", "write 5M 64k"]);
    place.make("bitmap --add internal followed");
    place.make("bitmap --add --disable -g 4k internal off");
    place.make("create -q -f qcow2 -o compat=0.10 v2 1M");
    place.make("create -q -f qcow2 -o lazy_refcounts=on,refcount_bits=64 wide 1M");
    place.make("create -q -f qcow2 -o extended_l2=on,compression_type=zstd later 1M");
    place.make("create -q -f qcow2 -o data_file=e.raw external 10M");
    place.make("create -q -f qcow2 -o data_file=r.raw,data_file_raw=on rawdata 1000k");
    place.make("create -q -f qcow2 -u -b base -F raw overlay 1M");
    place.make("create -q -f qcow2 -u -b /else/base -F qcow2 absolute 1M");
    place.make("create -q -f qcow2 -u -b nbd:host -F raw remote 1M");
    place.make("create -q -f raw raw 1M");
    fs::create_dir(place.path("dir")).unwrap();
    place.make("create -q -f qcow2 -u -b ../base -F raw dir/overlay 1M");
    fs::write(place.path("empty"), "").unwrap();
    fs::write(place.path("odd"), [7; 1000]).unwrap();
    let mut dirty = fs::read(place.path("wide")).unwrap();
    dirty[79] |= 3;
    fs::write(place.path("dirty"), dirty).unwrap();
    // Without its data file, the image can be looked at nevertheless.
    fs::remove_file(place.path("e.raw")).unwrap();
}

#[test]
fn tells_the_same() {
    let both = Both::new(images);
    let names = [
        "internal",
        "v2",
        "wide",
        "later",
        "external",
        "rawdata",
        "overlay",
        "absolute",
        "remote",
        "dir/overlay",
        "raw",
        "empty",
        "odd",
        "dirty",
        "r.raw",
    ];
    for options in [
        "",
        "-U",
        "-f raw",
        "--output=json",
        "--output json -f raw",
        "--outp=human",
    ] {
        for name in names {
            both.same(&format!("info {options} {name}"));
        }
    }
    both.same("info file:external");
    both.same("info -f qcow2 ./external");
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    let lines = "
        info
        info internal v2
        info -x
        info missing
        info dir
        info ''
        info foo:internal
        info --output=foo internal
        info -f foo internal
        info -f foo missing
        info -f qcow2 raw
        info -f qcow2 empty
        info --o=json internal
    ";
    for line in lines.trim().lines() {
        both.same(line);
    }
}

/// A name in an image can send no control sequences to the terminal.
#[test]
fn names_cannot_control_the_terminal() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 -o data_file=xyz t 1M");
    let mut image = fs::read(place.path("t")).unwrap();
    let at = image.windows(3).position(|bytes| bytes == b"xyz").unwrap();
    image[at..at + 3].copy_from_slice(b"\x1b[J");
    fs::write(place.path("t"), image).unwrap();
    let found = place.run(&words("info t")).stdout;
    assert!(found.contains("    data file: \\u{1b}[J\n"), "{found}");
}
