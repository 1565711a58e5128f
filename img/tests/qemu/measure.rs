//! `measure`: the same numbers.

use crate::run::{Both, Place, words};

fn images(place: &Place) {
    std::fs::write(place.path("odd"), [7; 70_000]).unwrap();
    place.make("create -q -f raw empty 3M");
    place.make("create -q -f raw sparse 100M");
    place.make("create -q -f raw zero 0");
    place.make("create -q -f qcow2 image 10M");
    place.make("create -q -f qcow2 -o compat=0.10 v2 10M");
    place.make("create -q -f qcow2 -o cluster_size=2M,extended_l2=on large 50M");
    place.make("create -q -f qcow2 -o preallocation=metadata mapped 20M");
    place.make("create -q -f qcow2 -o preallocation=falloc reserved 20M");
    place.make("create -q -f qcow2 -o data_file=d.raw external 10M");
    place.make("create -q -f qcow2 -o data_file=e.raw,data_file_raw=on raw-data 10M");
    place.qemu_io(
        "image",
        &["write 10k 100k", "write 3M 1M", "write -z 6M 1M"],
    );
    place.make("bitmap --add image a");
    place.make("bitmap --add -g 512 image another");
    place.make("snapshot -c first image");
    place.make("snapshot -c second image");
    place.qemu_io("image", &["write 5M 2M", "discard 3M 64k"]);
    place.make("bitmap --add -g 1M external a");
    for image in ["v2", "large", "mapped", "reserved", "external", "raw-data"] {
        let writes = [
            "write 100k 1k",
            "write 3M 1M",
            "write 9M 4k",
            "write -z 3M 128k",
        ];
        place.qemu_io(image, &writes);
    }
    place.qemu_io(
        "sparse",
        &["write 4k 4k", "write 1M 1M", "write 63k 2k", "write 99M 1M"],
    );
    place.make("create -q -f qcow2 -b sparse -F raw overlay");
    place.make("create -q -f qcow2 -b overlay -F qcow2 longer 120M");
    place.qemu_io("overlay", &["write 0 4k", "write -z 1M 64k"]);
    place.qemu_io("longer", &["write 110M 4k"]);
    place.make("convert -c -O qcow2 sparse compressed");
}

const IMAGES: [&str; 14] = [
    "odd",
    "empty",
    "sparse",
    "zero",
    "image",
    "v2",
    "large",
    "mapped",
    "reserved",
    "external",
    "raw-data",
    "overlay",
    "longer",
    "compressed",
];

#[test]
fn of_images() {
    // On the same files: which blocks of a cluster hold nothing is up to the host's file system.
    let place = Place::tandem();
    images(&place);
    let same = |line: &str| {
        let args = words(line);
        assert_eq!(place.run(&args), place.qemu_img(&args), "{line}");
    };
    for image in IMAGES {
        for line in [
            "",
            "--output=json -O raw",
            "-O qcow2",
            "--output=json -O qcow2",
            "-O qcow2 -o compat=0.10",
            "-O qcow2 -o cluster_size=512",
            "-O qcow2 -o cluster_size=4k,refcount_bits=64",
            "-O qcow2 -o cluster_size=2M,extended_l2=on",
            "-O qcow2 -o data_file=x,data_file_raw=on",
            "-O qcow2 -o preallocation=full",
            "-O qcow2 -o backing_file=x,backing_fmt=raw",
            "-O qcow2 -o size=1G -U",
        ] {
            same(&format!("measure {line} {image}"));
        }
    }
    for line in [
        "-l first",
        "-l 2 -O qcow2",
        "-l snapshot.id=1 -O qcow2",
        "-l snapshot.name=second,snapshot.id=2 -O qcow2 -o cluster_size=4k",
        "-l first -O qcow2 --output=json",
        "-O qcow2 --image-opts driver=raw,file.filename=sparse,read-only=on",
        "-l 1 -O qcow2 --image-opts driver=qcow2,file.filename=image",
    ] {
        let image = if line.contains("image-opts") {
            ""
        } else {
            "image"
        };
        same(&format!("measure {line} {image}"));
    }
}

#[test]
fn of_sizes() {
    let both = Both::empty();
    for size in ["0", "1", "513", "64k", "1M", "1000000001", "3T", "7.5E"] {
        for line in [
            "",
            "-O qcow2",
            "-O qcow2 -o cluster_size=512",
            "-O qcow2 -o cluster_size=2M",
            "-O qcow2 -o cluster_size=16k,extended_l2=on",
            "-O qcow2 -o refcount_bits=1",
            "-O qcow2 -o refcount_bits=64,cluster_size=1k",
            "-O qcow2 -o preallocation=metadata",
            "-O qcow2 -o preallocation=falloc",
            "-O qcow2 -o data_file=x",
            "-O qcow2 -o data_file_raw=on",
            "-O raw -o preallocation=full",
            "-O qcow2 --output json",
        ] {
            both.same(&format!("measure {line} --size {size}"));
        }
    }
    // A disk of 8 EiB has an image that is larger than can be told.
    both.same("measure -O qcow2 -o cluster_size=2M --size 2E");
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "",
        "a b",
        "-f raw",
        "-l x",
        "--image-opts",
        "--size 1M image",
        "--size x",
        "--size -1",
        "--size 8E",
        "--size",
        "--s 1M",
        "--o json",
        "-s 1M",
        "-O foo --size 1M",
        "-O foo missing",
        "-O qcow2 missing",
        "-f foo image",
        "-f qcow2 --image-opts driver=qcow2,file.filename=image",
        "--image-opts driver=qcow2,file.filename=missing",
        "--image-opts image x",
        "-f qcow2 empty",
        "-l none image",
        "-l none external",
        "-l none empty",
        "-l snapshot.id=9 image",
        "-l snapshot.name=first,snapshot.id=2 image",
        "-l snapshot.foo=1 image",
        "-l snapshot.foo=1 missing",
        "--output foo --size 1M",
        "-O qcow2 -o foo=1 --size 1M",
        "-O qcow2 -o help --size 1M",
        "-O raw -o cluster_size=4k --size 1M",
        "-O qcow2 -o , --size 1M",
        "-O qcow2 -o '' --size 1M",
        "-O qcow2 -o cluster_size=3 --size 1M",
        "-O qcow2 -o cluster_size=x --size 1M",
        "-O qcow2 -o cluster_size=4M --size 1M",
        "-O qcow2 -o cluster_size=0 --size 1M",
        "-O qcow2 -o cluster_size=4k,extended_l2=on --size 1M",
        "-O qcow2 -o compat=0.11 --size 1M",
        "-O qcow2 -o compat=v3 --size 1M",
        "-O qcow2 -o compat=0.10,refcount_bits=1 --size 1M",
        "-O qcow2 -o refcount_bits=3 --size 1M",
        "-O qcow2 -o refcount_bits=0 --size 1M",
        "-O qcow2 -o refcount_bits=x --size 1M",
        "-O qcow2 -o preallocation=foo --size 1M",
        "-O qcow2 -o data_file_raw=x --size 1M",
        "-O qcow2 -o cluster_size=512 --size 1T",
        "-O qcow2 -o cluster_size=512,preallocation=foo --size 1T",
        "-x",
        "--frobnicate",
    ] {
        let line = format!("measure {line}");
        both.same(&line);
        assert_eq!(both.tandem.run(&words(&line)).status, Some(1), "{line}");
    }
    assert!(both.tandem.content() == before);
}

/// A file whose length is out of all proportion to what is in it.
#[test]
fn a_long_file_with_little_in_it() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 -o cluster_size=512 image 1M");
    place.qemu_io("image", &["write 0 100k"]);
    let expected = place.qemu_img(&words("measure -O qcow2 image"));
    let file = std::fs::File::options()
        .write(true)
        .open(place.path("image"));
    file.unwrap().set_len(1 << 43).unwrap();
    assert_eq!(place.run(&words("measure -O qcow2 image")), expected);
}
