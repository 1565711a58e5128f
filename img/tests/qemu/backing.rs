//! Backing files: made, told and followed as QEMU does.

use std::fs;

use crate::run::{Both, Place, words};

/// A chain of three: `top` over `mid` over the raw file `base`, which does not end with a sector.
fn chain(place: &Place) {
    let bytes: Vec<u8> = (0..1_000_300).map(|i| (i / 700 % 251) as u8).collect();
    fs::write(place.path("base"), bytes).unwrap();
    place.make("create -q -f qcow2 -b base -F raw mid 3M");
    place.qemu_io("mid", &["write -P 1 512k 64k", "write -z 2M 64k"]);
    place.make("create -q -f qcow2 -o data_file=t.raw -b mid -F qcow2 top 4M");
    place.qemu_io("top", &["write -P 1 128k 64k", "write -z 256k 64k"]);
    place.make("create -q -f qcow2 -o cluster_size=512 -b mid -F qcow2 small 2M");
    place.qemu_io("small", &["write -P 4 100k 3k", "discard 600k 10k"]);
}

#[test]
fn creates_overlays() {
    let lines = "
        create -f qcow2 -b base -F raw x
        create -f qcow2 -b base -F raw x 5M
        create -f qcow2 -b mid -F qcow2 x
        create -f qcow2 -b mid -F qcow2 -o cluster_size=4k,compat=0.10 x 2M
        create -f qcow2 -o backing_file=base,backing_fmt=raw x 3M
        create -f qcow2 -o backing_file=base,backing_fmt=raw,data_file=y x 3M
        create -f qcow2 -o backing_file=base,backing_fmt=raw -b mid -F qcow2 x
        create -f qcow2 -b ./base -F raw x
        create -f qcow2 -u -b nope -F raw x 1M
        create -f qcow2 -u -b nbd:nope -F raw x 1M
    ";
    for line in lines.trim().lines() {
        let both = Both::new(chain);
        both.same(line);
        both.same_bytes("x");
    }
}

#[test]
fn refuses_the_same_overlays() {
    let both = Both::new(chain);
    for arguments in [
        "-b base x",
        "-b mid x",
        "-b nope -F raw x",
        "-b nope -F raw x 1M",
        "-u -b nope -F raw x",
        "-u -b nope x 1M",
        "-b x -F raw x 1M",
        "-b base -F foo x 1M",
        "-F raw x 1M",
        "-b base -F qcow2 x",
        "-o backing_file= x 1M",
        "-o backing_file=base,backing_fmt=raw,preallocation=metadata x 3M",
        "-o backing_file=base,backing_fmt=raw,data_file=y,data_file_raw=on x 3M",
    ] {
        both.same(&format!("create -q -f qcow2 {arguments}"));
    }
    both.same("create -q -f raw -b base x 1M");
    both.same("create -q -f raw -F raw x 1M");
}

#[test]
fn follows_the_chain() {
    let both = Both::new(chain);
    for name in ["mid", "top", "small"] {
        for options in ["", "--output=json", "--output=json -s 1000000 -l 1M"] {
            both.same(&format!("map {options} {name}"));
        }
        both.same(&format!("info {name}"));
        both.same(&format!("check {name}"));
        both.same(&format!("convert -O raw {name} out"));
        both.same_bytes("out");
    }
    both.same("resize -q small 3M");
    both.same("convert -O raw small out");
    both.same_bytes("out");
}

/// QEMU follows every name; Tandem those in the directory of the image and below.
#[test]
fn names_that_lead_elsewhere_are_refused() {
    let place = Place::tandem();
    chain(&place);
    fs::create_dir(place.path("sub")).unwrap();
    std::os::unix::fs::symlink("../base", place.path("sub/link")).unwrap();
    place.make("create -q -f qcow2 -u -b ../base -F raw sub/up 1M");
    place.make("create -q -f qcow2 -u -b link -F raw sub/linked 1M");
    place.make("create -q -f qcow2 -u -b /etc/hostname -F raw sub/absolute 1M");
    for name in ["up", "linked", "absolute"] {
        let run = place.run(&words(&format!("map sub/{name}")));
        assert_eq!(run.status, Some(1));
        let expected = "lies outside the image's directory";
        assert!(run.stderr.contains(expected), "{}", run.stderr);
        let run = place.run(&words(&format!("map --follow=anywhere sub/{name}")));
        assert_eq!(run.status, Some(0), "{}", run.stderr);
    }
    // Inside, whatever way it takes.
    let inside = place.path("base").canonicalize().unwrap();
    place.make(&format!(
        "create -q -f qcow2 -u -b {} -F raw in1 1M",
        inside.display()
    ));
    place.make("create -q -f qcow2 -u -b sub/../base -F raw in2 1M");
    place.make("create -q -f qcow2 -u -b sub/link -F raw in3 1M");
    for name in ["in1", "in2", "in3"] {
        let run = place.run(&words(&format!("map {name}")));
        assert_eq!(run.status, Some(0), "{}", run.stderr);
    }
}
