//! `amend`

use std::fs;

use crate::chains::{self, Random};
use crate::run::{Both, Place, words};

fn images(place: &Place) {
    place.make("create -q -f qcow2 internal 1M");
    place.make("create -q -f qcow2 -o compat=0.10 v2 1M");
    place.make("create -q -f qcow2 -o data_file=d.raw,data_file_raw=on t 1M");
    place.make("create -q -f qcow2 -o data_file=e.raw,cluster_size=512 small 1M");
    place.qemu_io("t", &["write -P 7 0 1M"]);
    for copy in [
        "y.raw",
        "a-name-that-is-much-longer-than-the-one-before.raw",
    ] {
        fs::copy(place.path("d.raw"), place.path(copy)).unwrap();
    }
}

#[test]
fn does_the_same() {
    let both = Both::new(images);
    for line in [
        "-o data_file_raw=on t",
        "-o data_file=y.raw t",
        "-o data_file=a-name-that-is-much-longer-than-the-one-before.raw t",
        "-p -o data_file=d.raw,data_file_raw=off t",
        "-f qcow2 -o lazy_refcounts=on t",
        "-o data_file= t",
        "-o data_file_raw=off internal",
        "-o lazy_refcounts=on internal",
        "-o lazy_refcounts=off internal",
        "-o data_file=d.raw small",
    ] {
        both.same(&format!("amend {line}"));
        // The image itself is the same, byte for byte, and so is what QEMU says of it.
        assert!(both.tandem.content() == both.qemu.content(), "{line}");
        let name = line.rsplit(' ').next().unwrap();
        let info = words("info --output=json")
            .into_iter()
            .chain([name])
            .collect::<Vec<_>>();
        assert_eq!(both.tandem.qemu_img(&info).status, Some(0), "{line}");
    }
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "amend",
        "amend internal",
        "amend -o data_file=x internal",
        "amend -o data_file= internal",
        "amend -o data_file_raw=on internal",
        "amend -o cluster_size=4k t",
        "amend -o foo=1 t",
        "amend -o lazy_refcounts=on v2",
        "amend -o data_file_raw=off t t",
        "amend -o , t",
        "amend -f raw -o size=1M d.raw",
        "amend -o data_file_raw=maybe t",
        "amend -o compat=0.10 t",
        "amend -o compat=0.11 internal",
        "amend -o compat= internal",
        "amend -o refcount_bits=0 internal",
        "amend -o refcount_bits=3 internal",
        "amend -o refcount_bits=128 internal",
        "amend -o refcount_bits=x internal",
        "amend -o refcount_bits=-1 internal",
        "amend -o refcount_bits=+3 internal",
        "amend -o refcount_bits=0x+8 internal",
        "amend -o refcount_bits=18446744073709551616 internal",
        "amend -o refcount_bits=8 v2",
        "amend -o refcount_bits=8,compat=0.10 internal",
        "amend -o lazy_refcounts=on,compat=0.10 internal",
        "amend -o size=1025 internal",
        "amend -o size=-1 internal",
        "amend -o size=99E internal",
        "amend -o size=foo internal",
        "amend -o backing_file=x internal",
        "amend -o backing_file= internal",
        "amend -o backing_fmt= internal",
        "amend -o encrypt.state=active internal",
        "amend -o encrypt.keyslot=1,compat=9 internal",
        "amend -o encrypt.iter-time=x internal",
        "amend -o encrypt.foo=1 internal",
        "amend -o encryption=off internal",
        "amend -o preallocation=off internal",
        "amend -t foo -o size=2M internal",
        "amend -o size=2M nope",
        "amend -o help",
        "amend -o help d.raw",
        "amend -f raw -o help",
        "amend -f foo -o help",
        "amend -f foo -o size=2M internal",
        "amend -o size=2M d.raw",
        "amend --foo internal",
        "amend -o",
    ] {
        both.same(line);
    }
    assert!(both.tandem.content() == before);
}

/// A part of a request is never carried out: QEMU drops the raw promise here, and then fails.
#[test]
fn all_or_nothing() {
    let place = Place::tandem();
    images(&place);
    let before = place.content();
    for line in [
        "amend -o data_file_raw=off,backing_file=b t",
        "amend -o data_file=y.raw,compat=0.10 t",
        "amend -o lazy_refcounts=on,data_file=y.raw internal",
    ] {
        assert_eq!(place.run(&words(line)).status, Some(1), "{line}");
        assert!(place.content() == before, "{line}");
    }
}

/// Images whose tables change with their options.
fn tables(place: &Place) {
    images(place);
    place.make("create -q -f raw base 2M");
    place.qemu_io_as("raw", "base", &["write -P 1 0 2M"]);
    place.make("create -q -f qcow2 -o data_file=e.data,cluster_size=4k plain-data 1M");
    for (image, options) in [
        ("overlay", "-b base -F raw -o cluster_size=4k"),
        ("small-overlay", "-b base -F raw -o cluster_size=512"),
        ("no-backing", "-o preallocation=metadata"),
        ("snapshots", "-b base -F raw -o cluster_size=4k"),
        ("many", "-o cluster_size=512"),
        ("old", "-o compat=0.10,cluster_size=512"),
        ("zstd", "-o compression_type=zstd"),
        ("extended", "-o extended_l2=on"),
        ("usual", ""),
        ("bits", "-o refcount_bits=1,cluster_size=512"),
    ] {
        place.make(&format!("create -q -f qcow2 {options} {image} 2M"));
        let zeros = match image {
            "old" => "read 0 512",
            // Space that is reserved and shared is too much for QEMU, see below.
            "snapshots" | "many" => "write -z -u 150k 300k",
            _ => "write -z 150k 300k",
        };
        place.qemu_io(image, &["write -P 7 100k 70k", zeros]);
    }
    for image in ["snapshots", "old", "many"] {
        for name in ["a", "b", "c"] {
            place.make(&format!("snapshot -c {name} {image}"));
            place.qemu_io(image, &["write -P 8 80k 70k"]);
            if image != "old" {
                place.qemu_io(image, &["write -z -u 400k 70k", "write -z -u 90k 5k"]);
            }
        }
    }
}

/// What QEMU tells of an image, but for what its length and the clock decide.
fn described(place: &Place, image: &str) -> Vec<String> {
    let info = place.qemu_img(&["info", "--output=json", image]);
    assert_eq!(info.status, Some(0), "{image}: {}", info.stderr);
    let varies = [
        "actual-size",
        "\"virtual-size\": ",
        "date-",
        "-nsec",
        "-sec",
    ];
    let size = format!("{}", chains::content(place, image).len());
    let lines = info
        .stdout
        .lines()
        .filter(|line| !varies.iter().any(|word| line.contains(word)));
    lines.map(str::to_owned).chain([size]).collect()
}

/// What a snapshot holds.
fn snapshot(place: &Place, image: &str, name: &str) -> Vec<u8> {
    place.make(&format!("convert -l {name} -O raw {image} copy"));
    fs::read(place.path("copy")).unwrap()
}

/// QEMU writes zeros where a snapshot has data, if space there was reserved for zeros later.
#[test]
fn snapshots_keep_what_they_have() {
    let place = Place::tandem();
    place.make("create -q -f raw base 1M");
    place.qemu_io_as("raw", "base", &["write -P 1 0 1M"]);
    for cluster_size in ["512", "64k"] {
        place.make(&format!(
            "create -q -f qcow2 -b base -F raw -o cluster_size={cluster_size} image 1M"
        ));
        place.qemu_io("image", &["write -P 7 100k 300k", "write -z 300k 200k"]);
        for name in ["a", "b"] {
            place.make(&format!("snapshot -c {name} image"));
            place.qemu_io("image", &["write -z 120k 100k", "write -P 9 200k 10k"]);
        }
        let hold = |place: &Place| {
            let snapshots = ["a", "b"].map(|name| snapshot(place, "image", name));
            (snapshots, chains::content(place, "image"))
        };
        let before = hold(&place);
        let run = place.run(&words("amend -o compat=0.10 image"));
        assert_eq!(run.status, Some(0), "{run:?}");
        assert!(hold(&place) == before);
        place.make("check -q image");
        for name in ["b", "a"] {
            place.make(&format!("snapshot -a {name} image"));
            place.make(&format!("snapshot -d {name} image"));
            place.make("check -q image");
        }
    }
}

#[test]
fn changes_tables_the_same() {
    let both = Both::new(tables);
    for line in [
        "-f qcow2 -o help",
        "-o help internal",
        "-o compat=1.1 internal",
        "-o compat=v3 v2",
        "-o compat=0.10 v2",
        "-o compat=1.1,lazy_refcounts=on v2",
        "-o compat=0.10 v2",
        "-o refcount_bits=16 v2",
        "-o size=1M v2",
        "-o size=0 v2",
        "--force -o size=2M v2",
        "-o compat=1.1,size=3M,lazy_refcounts=off v2",
        "-o compat=0.10,size=1M v2",
        "-o size=1536k v2",
        "--progress --quiet --cache none --format qcow2 --options size=2M v2",
        "-o compat=0.10 overlay",
        "-o compat=0.10 small-overlay",
        "-o compat=0.10 no-backing",
        "-o compat=0.10 snapshots",
        "-o compat=0.10,refcount_bits=16 many",
        "-o compat=1.1,refcount_bits=64 old",
        "-o compat=0.10,refcount_bits=16 old",
        "-o compat=1.1,size=3M old",
        "-o refcount_bits=8 overlay",
        "-o compat=1.1,refcount_bits=1 overlay",
        "-o refcount_bits=8,lazy_refcounts=on,size=3M overlay",
        "-o refcount_bits=2 bits",
        "-o refcount_bits=4,size=4M bits",
        "-o refcount_bits=8 bits",
        "-o refcount_bits=32 bits",
        "-o refcount_bits=64,backing_file=base,backing_fmt=raw small-overlay",
        "-o backing_file=base,backing_fmt=raw small-overlay",
        "-o refcount_bits=16,compat=0.10 bits",
        "-o compat=1.1,refcount_bits=64 bits",
        "-o refcount_bits=1 bits",
        "-o refcount_bits=8 usual",
        "-o lazy_refcounts=on --image-opts driver=qcow2,file.filename=usual",
        "-o refcount_bits=16 usual",
        "-o refcount_bits=4 snapshots",
        "-o compat=1.1 snapshots",
        "-o refcount_bits=4 snapshots",
        "-o refcount_bits=2 snapshots",
        "-o refcount_bits=1 plain-data",
        "-o size=2M plain-data",
        "-o size=512k,refcount_bits=64 plain-data",
        "-o compat=0.10 plain-data",
        "-o size=2M t",
        "-o size=3M,data_file_raw=off t",
        "-o compat=0.10 extended",
        "-o size=4M extended",
        "-o compat=0.10 zstd",
        "-o size=1M,backing_file=x zstd",
    ] {
        both.same(&format!("amend {line}"));
        let image = line.rsplit([' ', '=']).next().unwrap();
        if image == "help" {
            continue;
        }
        chains::same_content(&both, image);
        let [expected, found] = both.each(|place| described(place, image));
        assert_eq!(found, expected, "{line}");
        if ["snapshots", "old", "many"].contains(&image) {
            for name in ["a", "b", "c"] {
                let [expected, found] = both.each(|place| snapshot(place, image, name));
                assert!(found == expected, "{line}: {name}");
            }
        }
    }
}

/// What QEMU makes of it would not be an image of version 2, or have lost something.
#[test]
fn refuses_what_would_be_lost() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 bitmap 1M");
    place.make("bitmap --add bitmap b");
    place.make("create -q -f raw data 1M");
    place.qemu_io_as("raw", "data", &["write -P 3 0 1M"]);
    place.make("convert -c -O qcow2 -o compression_type=zstd data zstd");
    place.make("create -q -f qcow2 size 1M");
    place.make("snapshot -c s size");
    let before = place.content();
    for (line, reason) in [
        (
            "-o compat=0.10 bitmap",
            "Cannot downgrade an image with bitmaps",
        ),
        (
            "-o compat=0.10,size=2M bitmap",
            "Cannot downgrade an image with bitmaps",
        ),
        (
            "-o compat=0.10,size=2M zstd",
            "Cannot downgrade an image with zstd compression type and existing compressed clusters",
        ),
        (
            "-o compat=0.10,size=2M size",
            "Internal snapshots prevent downgrade of image",
        ),
        (
            "-o size=2M,lazy_refcounts=on,backing_fmt=raw size",
            "Cannot amend the backing file\nYou can use 'qemu-img rebase' instead.",
        ),
    ] {
        let mut args = vec!["amend"];
        args.extend(words(line));
        let run = place.run(&args);
        assert_eq!(run.stderr, format!("qemu-img: {reason}\n"), "{line}");
        assert_eq!(run.status, Some(1), "{line}");
        assert!(place.content() == before, "{line}");
    }
}

#[test]
fn random_changes_read_the_same() {
    for seed in 0..chains::seeds() {
        let mut random = Random::new(seed ^ 0xa3e);
        let both =
            Both::in_memory(|place| chains::make(place, &mut Random::new(seed + 500), "image", 1));
        for _ in 0..4 {
            // QEMU takes long for smaller ones.
            let bits = 8 << random.below(4);
            let size = 64 * (1 + random.below(40)) * 1024;
            let change = match random.below(5) {
                0 => "compat=0.10".to_owned(),
                1 => "compat=1.1".to_owned(),
                2 => format!("refcount_bits={bits},compat=1.1"),
                3 => "compat=0.10,refcount_bits=16".to_owned(),
                // QEMU cannot make every overlay of version 2 larger.
                _ => format!("compat=1.1,size={size}"),
            };
            both.same(&format!("amend -o {change} image1"));
            chains::same_content(&both, "image1");
            let [expected, found] = both.each(|place| described(place, "image1"));
            assert_eq!(found, expected, "{seed}: {change}");
        }
    }
}
