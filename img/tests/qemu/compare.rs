//! `compare`: the answers of QEMU.

use std::fs;

use crate::run::{Both, Place};

fn images(place: &Place) {
    place.make("create -q -f qcow2 src 8M");
    let writes = [
        "write -P 1 1M 2M",
        "write -P 0 4M 64k",
        "write -P 2 8388096 512",
    ];
    place.qemu_io("src", &writes);
    place.make("convert -O raw src raw");
    place.make("convert -O qcow2 src copy");
    place.make("convert -c -O qcow2 src packed");
    place.make("create -q -f raw small 1M");
    place.make("create -q -f qcow2 empty 8M");
    fs::write(place.path("odd"), [&b"abc"[..], &[0; 997]].concat()).unwrap();
    let mut other = fs::read(place.path("raw")).unwrap();
    other[2 << 20 | 777] = 9;
    fs::write(place.path("other"), &other).unwrap();
    fs::write(place.path("full"), vec![9; 8 << 20]).unwrap();
    place.make("create -q -f qcow2 base 4M");
    place.qemu_io("base", &["write -P 5 0 2M"]);
    place.make("create -q -f qcow2 -b base -F qcow2 top 6M");
    place.qemu_io("top", &["write -z 128k 64k", "write -P 0 256k 64k"]);
    place.make("create -q -f qcow2 -b base -F qcow2 same 6M");
    place.qemu_io("same", &["write -z 128k 64k", "write -P 0 256k 64k"]);
    place.make("create -q -f qcow2 -o data_file=e.raw ext 4M");
    place.make("create -q -f qcow2 -o data_file=r.raw,data_file_raw=on rawext 4M");
    place.qemu_io("ext", &["write -P 7 1M 1M"]);
    place.qemu_io("rawext", &["write -P 7 1M 1M"]);
    let mut bad = fs::read(place.path("copy")).unwrap();
    // The first mapped cluster lies askew.
    let entry = bad[0x40000..]
        .iter()
        .position(|byte| *byte == 0x80)
        .unwrap();
    bad[0x40000 + entry + 6] |= 2;
    fs::write(place.path("bad"), bad).unwrap();
}

#[test]
fn answers_the_same() {
    let both = Both::new(images);
    for line in [
        "",
        "src",
        "src raw other",
        "src raw",
        "raw src",
        "-f qcow2 -F raw src raw",
        "-f raw src raw",
        "-f raw src copy",
        "-f foo src raw",
        "-F foo src raw",
        "src copy",
        "src packed",
        "-s src copy",
        "-s src packed",
        "-s packed packed",
        "src src",
        "-s src src",
        "-s raw raw",
        "-s src raw",
        "raw other",
        "other src",
        "src full",
        "full src",
        "empty full",
        "full empty",
        "empty raw",
        "raw empty",
        "-q src full",
        "-q src raw",
        "-q small raw",
        "small raw",
        "raw small",
        "-s small raw",
        "small empty",
        "-s empty small",
        "small odd",
        "odd small",
        "-s odd odd",
        "top base",
        "base top",
        "-s top base",
        "-s top same",
        "top same",
        "ext rawext",
        "rawext ext",
        "-s ext rawext",
        "-s ext ext",
        "ext e.raw",
        "rawext r.raw",
        "-p src raw",
        "-p src missing",
        "-p missing src",
        "-p -f raw -F qcow2 raw raw",
        "-p -q missing src",
        "-p src",
        "-p -q src raw",
        "-p small small",
        "-p small raw",
        "-p raw small",
        "-p src full",
        "-p -s src raw",
        "-p raw other",
        "missing src",
        "src missing",
        "-T foo src raw",
        "-T none src raw",
        "-U src raw",
        "-x src raw",
        "--strict-as-can-be src raw",
        "-f",
        "--image-opts src raw",
        "--image-opts -f raw src raw",
        "--image-opts driver=qcow2,file.filename=src driver=raw,file.filename=raw",
        "--image-opts driver=qcow2,file.filename=src file.filename=raw",
        "'' src",
    ] {
        both.same(&format!("compare {line}"));
    }
}

/// QEMU does not tell what is wrong, but prints it by itself.
#[test]
fn what_cannot_be_read_is_no_difference() {
    let place = Place::tandem();
    images(&place);
    for args in [["compare", "bad", "src"], ["compare", "src", "bad"]] {
        let [ours, qemus] = [place.run(&args), place.qemu_img(&args)];
        assert_eq!(
            ours.status, qemus.status,
            "{} {}",
            ours.stderr, qemus.stderr
        );
        assert!(ours.status >= Some(2));
        let last = |text: &str| text.lines().last().map(str::to_owned);
        assert_eq!(last(&ours.stderr), last(&qemus.stderr));
    }
}

/// The first of many differences is told, whichever thread comes across one first.
#[test]
fn the_first_difference_counts() {
    let place = Place::tandem();
    let mut bytes = vec![3; 48 << 20];
    fs::write(place.path("a"), &bytes).unwrap();
    for at in [5, 11, 13, 40] {
        bytes[at << 20] = 4;
    }
    fs::write(place.path("b"), &bytes).unwrap();
    for _ in 0..5 {
        let run = place.run(&["compare", "-f", "raw", "-F", "raw", "a", "b"]);
        assert_eq!(run.status, Some(1));
        assert_eq!(run.stdout, "Content mismatch at offset 5242880!\n");
    }
}
