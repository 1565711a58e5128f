//! `convert`: between all kinds of images, with QEMU as the judge.

use std::fs;

use crate::run::{Both, Place, len, words};

/// Kinds of targets: format, options, the file that holds the data.
const TARGETS: [(&str, &str, &str); 6] = [
    ("raw", "", "out"),
    ("qcow2", "", "out"),
    ("qcow2", "-o cluster_size=512", "out"),
    ("qcow2", "-o data_file=o.raw", "o.raw"),
    ("qcow2", "-o data_file=o.raw,data_file_raw=on", "o.raw"),
    (
        "qcow2",
        "-o data_file=o.raw,data_file_layout=packed",
        "o.raw",
    ),
];

fn run(place: &Place, line: &str) {
    let run = place.run(&words(line));
    assert_eq!((run.status, &*run.stderr), (Some(0), ""), "{line}");
}

#[test]
fn between_all_kinds() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 source 20M");
    place.qemu_io(
        "source",
        &[
            "write -P 1 1M 3M",
            "write -P 2 10M 700k",
            "write -z 2M 64k",
            "write -P 3 20971008 512",
        ],
    );
    place.make("convert -O raw source expected");
    let expected = fs::read(place.path("expected")).unwrap();
    for (format, options, data) in TARGETS {
        run(
            &place,
            &format!("convert -f qcow2 -O {format} {options} source out"),
        );
        if options.contains("packed") {
            // As long as what is not zero, in whole clusters.
            let len = fs::metadata(place.path(data)).unwrap().len();
            assert_eq!(len, (3 << 20) + (704 << 10));
            let info = place.qemu_img(&words("info out"));
            assert!(info.stderr.contains("packed data file"), "{}", info.stderr);
            run(&place, "check -q out");
        } else {
            place.make(&format!("compare -f {format} -F raw out expected"));
            if format == "qcow2" {
                place.make("check -q -f qcow2 out");
            }
        }
        if options.contains("raw=on") {
            assert!(fs::read(place.path(data)).unwrap() == expected);
        }
        // And back, through Tandem.
        run(&place, &format!("convert -f {format} out back"));
        assert!(
            fs::read(place.path("back")).unwrap() == expected,
            "{options}"
        );
    }
}

#[test]
fn takes_no_space_for_zeros() {
    use std::os::unix::fs::MetadataExt;

    let place = Place::tandem();
    place.make("create -q -f qcow2 -o data_file=s.raw,data_file_raw=on source 1G");
    place.qemu_io("source", &["write -P 1 500M 64k", "write -P 0 600M 1M"]);
    run(&place, "convert -O qcow2 source out");
    run(&place, "convert source out.raw");
    for file in ["out", "out.raw"] {
        let used = fs::metadata(place.path(file)).unwrap().blocks() * 512;
        assert!(used < 1 << 20, "{file}: {used}");
    }
    place.make("compare -f qcow2 -F raw out out.raw");
}

#[test]
fn fails_with_a_reason() {
    let place = Place::tandem();
    for (line, reason) in [
        ("convert a", "Must specify image file name"),
        (
            "convert a b",
            "Could not open 'a': No such file or directory",
        ),
    ] {
        let run = place.run(&words(line));
        assert_eq!(run.status, Some(1), "{line}");
        assert!(run.stderr.contains(reason), "{line}: {}", run.stderr);
    }
}

/// Compressed images, of data that can be compressed and other data, as QEMU reads them; as small as
/// QEMU's, and the same when it is read back.
#[test]
fn compressed() {
    let place = Place::tandem();
    let mut random = 1u64;
    let mut noise = || {
        random = random
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (random >> 56) as u8
    };
    let mut disk: Vec<u8> = (0..9 << 20).map(|i| (i / 9001 % 251) as u8).collect();
    disk[1 << 20..2 << 20].fill(0);
    disk[4 << 20..5 << 20].fill_with(&mut noise);
    disk.extend([7; 1024]);
    fs::write(place.path("disk"), &disk).unwrap();
    for options in [
        "",
        "-o cluster_size=4k",
        "-o cluster_size=2M",
        "-o compression_type=zstd",
        "-o compat=0.10",
        "-o extended_l2=on",
        "-o refcount_bits=1",
    ] {
        run(
            &place,
            &format!("convert -c -f raw -O qcow2 {options} disk out"),
        );
        place.make("check -q -f qcow2 out");
        place.make("compare -f qcow2 -F raw out disk");
        run(&place, "convert -f qcow2 out back");
        assert!(fs::read(place.path("back")).unwrap() == disk, "{options}");
        place.make(&format!(
            "convert -c -f raw -O qcow2 {options} disk by-qemu"
        ));
        let [ours, qemus] = ["out", "by-qemu"].map(|name| len(&place, name));
        assert!(
            ours < qemus * 5 / 4,
            "{options}: {ours} bytes, QEMU {qemus}"
        );
    }
}

#[test]
fn what_cannot_be_compressed() {
    let both = Both::new(|place| place.make("create -q -f qcow2 source 1M"));
    for (line, reason) in [
        (
            "-O raw source out",
            "Compression not supported for this file format",
        ),
        (
            "-O qcow2 -o preallocation=metadata source out",
            "Compression and preallocation not supported at the same time",
        ),
        (
            "-O qcow2 -o data_file=d source out",
            "Compression is not supported for images with an external data file",
        ),
    ] {
        let args = format!("convert -c {line}");
        let [qemu, tandem] = both.each(|place| place.run(&words(&args)));
        assert_eq!((qemu.status, tandem.status), (Some(1), Some(1)), "{line}");
        assert!(tandem.stderr.contains(reason), "{}", tandem.stderr);
        assert!(!both.tandem.path("out").exists() && !both.tandem.path("d").exists());
    }
}
