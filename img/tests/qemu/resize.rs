//! `resize`

use std::fs;

use crate::run::{Both, Place, words};

fn images(place: &Place) {
    place.make("create -q -f qcow2 internal 10M");
    place.make("create -q -f qcow2 -o compat=0.10,cluster_size=512 v2 1M");
    place.make("create -q -f qcow2 -o data_file=e.raw external 10M");
    place.make("create -q -f qcow2 -o data_file=r.raw,data_file_raw=on rawdata 1000k");
    place.make("create -q -f raw raw 4M");
    for name in ["internal", "v2", "external", "rawdata"] {
        place.qemu_io(name, &["write 100k 500k"]);
    }
}

#[test]
fn does_the_same() {
    let both = Both::new(images);
    for name in ["internal", "v2", "external", "rawdata", "raw"] {
        let format = if name == "raw" { "raw" } else { "qcow2" };
        for line in [
            "+1M",
            "20M",
            "1M",
            "--shrink 1M",
            "--shrink -512k",
            "--preallocation=off +512",
            "--shrink -- -512",
            "-q 3M",
            "--shrink 0",
            "--shrink -3M",
            "-- -5M",
        ] {
            let (options, size) = line.rsplit_once(' ').unwrap_or(("", line));
            both.same(&format!("resize -f {format} {options} {name} {size}"));
            if format == "qcow2" {
                let [expected, found] = [&both.qemu, &both.tandem].map(|place| {
                    let checked = place.qemu_img(&["check", "-q", name]);
                    assert_eq!(checked.status, Some(0), "{line}: {}", checked.stderr);
                    place.qemu_img(&words(&format!("convert -O raw {name} converted")));
                    fs::read(place.path("converted")).unwrap()
                });
                assert!(found == expected, "{name}: {line}");
            }
        }
    }
    for data_file in ["e.raw", "r.raw", "raw"] {
        let [expected, found] =
            [&both.qemu, &both.tandem].map(|place| fs::read(place.path(data_file)).unwrap());
        assert!(found == expected, "{data_file}");
    }
}

/// A raw disk is as long as its file is to be, in whole sectors for the guest.
#[test]
fn raw_disks_of_odd_lengths() {
    let both = Both::new(images);
    for size in ["--shrink raw 1000", "raw 5001", "raw +1", "--shrink raw 1"] {
        both.same(&format!("resize -f raw {size}"));
        both.same_bytes("raw");
    }
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "resize",
        "resize internal",
        "resize internal a 1M",
        "resize internal foo",
        "resize internal 1000",
        "resize internal +1",
        "resize missing 1M",
        "resize -f foo internal 20M",
        "resize -f qcow2 raw 20M",
        "resize --preallocation=foo internal 20M",
        "resize internal 1M",
    ] {
        both.same(line);
    }
    assert!(both.tandem.content() == before);
}

/// Where a raw data file is longer than its disk, the disk gains what it holds there, as in QEMU;
/// but it is said.
#[test]
fn a_longer_raw_data_file_becomes_part_of_the_disk() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 -o data_file=r.raw,data_file_raw=on t 1M");
    fs::write(place.path("r.raw"), vec![7; 8 << 20]).unwrap();
    let run = place.run(&["resize", "t", "4M"]);
    assert_eq!((run.status, &*run.stdout), (Some(0), "Image resized.\n"));
    assert!(
        run.stderr.contains("becomes part of the disk"),
        "{}",
        run.stderr
    );
    assert_eq!(
        place
            .qemu_img(&words("compare -f raw -F qcow2 r.raw t"))
            .status,
        Some(1)
    );
    place.qemu_img(&words("convert -O raw t converted"));
    assert_eq!(fs::read(place.path("converted")).unwrap(), vec![7; 4 << 20]);
}
