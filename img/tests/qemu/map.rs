//! `map`

use crate::run::{Both, Place};

fn images(place: &Place) {
    for (name, options) in [
        ("internal", "cluster_size=64k"),
        ("small", "cluster_size=512"),
        ("v2", "compat=0.10"),
        ("external", "data_file=e.raw"),
        ("rawdata", "data_file=r.raw,data_file_raw=on"),
    ] {
        place.make(&format!("create -q -f qcow2 -o {options} {name} 10M"));
        place.qemu_io(
            name,
            &[
                "write 1M 2M",
                "write 0 64k",
                "write -z 2M 512k",
                "write -z -u 1M 512k",
                "write 5M 64k",
                "write 7M 1M",
                "discard 7M 512k",
                "write 10485248 512",
            ],
        );
    }
    place.make("create -q -f qcow2 empty 1M");
    place.make("create -q -f raw raw 4M");
    place.qemu_io("raw", &["write 1M 512k", "write 3M 64k"]);
}

#[test]
fn shows_the_same() {
    let both = Both::new(images);
    let names = [
        "internal", "small", "v2", "external", "rawdata", "empty", "raw",
    ];
    for options in [
        "",
        "-U",
        "--output=json",
        "--output=json -s 64k",
        "--output json -s 1000000 -l 3M",
        "-s 2M -l 3500000",
        "--start-offset=20M --output=json",
        "--max-length=0",
        "--max-length=0 --output=json -s 64k",
    ] {
        for name in names {
            both.same(&format!("map {options} {name}"));
        }
    }
    both.same("map -f raw --output=json rawdata");
    both.same("map -f qcow2 internal");
}

/// Holes of the file below clusters that were allocated beforehand.
#[test]
fn holes_below_images() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 -o preallocation=metadata pre 4M");
        place.qemu_io(
            "pre",
            &["write 1M 100k", "write -z 2M 64k", "discard 3M 64k"],
        );
        place.make("create -q -f qcow2 -b pre -F qcow2 top 5M");
        place.qemu_io("top", &["write 1088k 64k"]);
        place.make("create -q -f qcow2 plain 4M");
        place.qemu_io("plain", &["write -P 0 1M 1M"]);
        place.make("create -q -f qcow2 -o data_file=d.raw,preallocation=metadata ext 4M");
        place.qemu_io("ext", &["write 1M 100k"]);
    });
    for name in ["pre", "top", "plain", "ext"] {
        both.same(&format!("map {name}"));
        both.same(&format!("map --output=json {name}"));
        both.same(&format!("map --output=json -s 1000k -l 200k {name}"));
    }
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    for line in [
        "map",
        "map a b",
        "map missing",
        "map -f qcow2 raw",
        "map -f foo internal",
        "map --output=xml internal",
        "map -s -1 internal",
        "map -s 1x internal",
        "map -l 9E internal",
        "map --foo internal",
    ] {
        both.same(line);
    }
}
