//! `convert`: between all kinds of images, with QEMU as the judge.

use std::fs;

use crate::run::{Place, words};

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
        ("convert -O foo a b", "Unknown file format 'foo'"),
        ("convert -c a b", "invalid option -- 'c'"),
    ] {
        let run = place.run(&words(line));
        assert_eq!(run.status, Some(1), "{line}");
        assert!(run.stderr.contains(reason), "{line}: {}", run.stderr);
    }
}
