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
                let [expected, found] = both.each(|place| {
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
        let [expected, found] = both.each(|place| fs::read(place.path(data_file)).unwrap());
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

/// The space that a disk gains in the cluster in which it ended is there, too.
#[test]
fn preallocates_the_rest_of_a_cluster() {
    use std::os::unix::fs::MetadataExt;

    for options in ["", "-o extended_l2=on", "-o data_file=d"] {
        for mode in ["falloc", "full"] {
            let place = Place::tandem();
            place.make(&format!("create -q -f qcow2 {options} t 96k"));
            // QEMU gives a table all of its space when it first writes it.
            place.qemu_io("t", &["write 0 4k"]);
            let resize = format!("resize -q --preallocation={mode} t 120k");
            assert_eq!(place.run(&words(&resize)).status, Some(0));
            let file = if options.contains("data_file") {
                "d"
            } else {
                "t"
            };
            let space = || {
                let found = fs::metadata(place.path(file)).unwrap();
                (found.len(), found.blocks())
            };
            place.make("check -q t");
            let before = space();
            place.qemu_io("t", &["read -P 0 64k 56k", "write -P 1 66k 54k"]);
            assert_eq!(space(), before, "{options} {mode}");
            place.make("check -q t");
        }
    }
}

/// What every kind of disk gains is preallocated, reads as zero, and has its space.
#[test]
fn preallocates_the_same() {
    use std::os::unix::fs::MetadataExt;

    for (kind, data) in [
        ("", "t"),
        ("-o cluster_size=512", "t"),
        ("-o compat=0.10", "t"),
        ("-o extended_l2=on", "t"),
        ("-o refcount_bits=1,cluster_size=4k", "t"),
        ("-o data_file=d", "d"),
        ("-o data_file=d,cluster_size=4k", "d"),
        ("-o data_file=d,extended_l2=on", "d"),
        ("-o data_file=d,data_file_raw=on", "d"),
        ("-b base -F raw", "t"),
        ("-b base -F raw -o data_file=d", "d"),
    ] {
        for mode in ["metadata", "falloc", "full"] {
            let both = Both::new(|place| {
                place.make("create -q -f raw base 3M");
                place.qemu_io("base", &["write -P 9 0 3M"]);
                place.make(&format!("create -q -f qcow2 {kind} t 1000k"));
                place.qemu_io("t", &["write -P 1 0 1000k", "discard 64k 512k"]);
            });
            for size in ["+1500k", "5M"] {
                let line = format!("resize --preallocation={mode} t {size}");
                both.same(&line);
                let [expected, found] = both.each(|place| {
                    let checked = place.qemu_img(&["check", "t"]);
                    assert_eq!(checked.status, Some(0), "{kind} {line}: {}", checked.stderr);
                    let own = place.run(&["check", "-q", "t"]);
                    assert_eq!(own.status, Some(0), "{kind} {line}: {}", own.stderr);
                    place.qemu_img(&words("convert -O raw t converted"));
                    fs::read(place.path("converted")).unwrap()
                });
                // In QEMU, preallocated clusters can show what freed ones of the image held.
                let old = 1000 << 10;
                assert!(found[..old] == expected[..old], "{kind}: {line}");
                assert_eq!(found.len(), expected.len(), "{kind}: {line}");
                assert!(found[old..].iter().all(|byte| *byte == 0), "{kind}: {line}");
            }
            let used = fs::metadata(both.tandem.path(data)).unwrap().blocks() * 512;
            if !kind.contains("base") {
                assert_eq!(used >= 4 << 20, mode != "metadata", "{kind} {mode}: {used}");
            }
            // All that was gained is mapped.
            let map = both
                .tandem
                .qemu_img(&words("map --output=json -s 3M t"))
                .stdout;
            assert!(
                map.lines().all(|line| line.contains("\"offset\": ")),
                "{map}"
            );
        }
    }
}

#[test]
fn preallocates_raw_disks_the_same() {
    for mode in ["falloc", "full", "off"] {
        let both = Both::new(|place| place.make("create -q -f raw t 1M"));
        for size in ["+1000", "+1", "3M", "+0", "2M"] {
            both.same(&format!("resize -f raw --preallocation={mode} t {size}"));
            both.same_bytes("t");
        }
        both.same("resize -f raw --shrink t 1001");
        both.same_bytes("t");
    }
}

#[test]
fn refuses_preallocation_the_same() {
    let both = Both::new(images);
    for name in ["internal", "v2", "external", "rawdata", "raw"] {
        let format = if name == "raw" { "raw" } else { "qcow2" };
        for mode in ["metadata", "falloc", "full", "foo", "off"] {
            for size in ["+0", "512k", "-512k"] {
                both.same(&format!(
                    "resize -f {format} --preallocation={mode} {name} {size}"
                ));
            }
            if mode != "off" {
                both.same(&format!(
                    "resize -f {format} --shrink --preallocation={mode} {name} 512"
                ));
            }
        }
    }
    both.same("resize -f raw --preallocation=metadata raw 8M");
    both.same("resize --preallocation internal 20M");
}

/// Preallocated packed data files have room for what is gained.
#[test]
fn preallocates_packed_data_files() {
    for mode in ["metadata", "falloc", "full"] {
        let place = Place::tandem();
        let line = "create -q -f qcow2 -o data_file=d,data_file_layout=packed t 1000k";
        assert_eq!(place.run(&words(line)).status, Some(0));
        let line = format!("resize --preallocation={mode} t 4M");
        assert_eq!(place.run(&words(&line)).stdout, "Image resized.\n");
        // The cluster in which the old disk ended is among them.
        let gained = (4 << 20) - (960 << 10);
        assert_eq!(fs::metadata(place.path("d")).unwrap().len(), gained);
        let checked = place.run(&["check", "t"]);
        assert_eq!(
            checked.status,
            Some(0),
            "{}{}",
            checked.stdout,
            checked.stderr
        );
        assert_eq!(place.run(&words("convert -O raw t out")).status, Some(0));
        assert!(fs::read(place.path("out")).unwrap() == vec![0; 4 << 20]);
    }
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

/// The size is what stands behind the name, wherever options are; a negative one must stand there at
/// once.
#[test]
fn the_size_may_stand_before_options() {
    let both = Both::new(images);
    for line in [
        "internal 12M -q",
        "internal +1M --preallocation=off -f qcow2",
        "internal -1M --shrink",
        "-f qcow2 internal -1M --shrink -q",
        "internal --shrink -1M",
        "internal -q -0",
        "-1M internal",
        "internal -x",
        "internal -",
        "internal --shrink",
        "internal",
        "internal 1M 2M",
        "internal -1M -1M --shrink",
        "internal -0",
        "internal --0",
        "internal +-0",
        "-q -- internal 13M",
        "-q -- internal -1M",
        "internal 14M --help=x",
    ] {
        both.same(&format!("resize {line}"));
    }
    both.same("info internal --output=human");
}

/// Where nothing is mapped, there is nothing to look at: this disk has 2^39 clusters, and no tables.
#[test]
fn an_enormous_disk() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 -o cluster_size=2M d 1M");
        place.qemu_io("d", &["write -P 1 0 1M"]);
    });
    both.same("resize d 1E");
    both.same("check d");
    // QEMU looks at every cluster.
    let run = both.tandem.run(&words("resize --shrink d 512k"));
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    both.tandem.make("check -q d");
}
