//! `map --plot`

use std::fs;
use std::process::Command;

use crate::run::{Place, words};

fn images(place: &Place) {
    for line in [
        "create -q -f qcow2 base 64M",
        "create -q -f qcow2 -b base -F qcow2 mid",
        "create -q -f qcow2 -b mid -F qcow2 top",
        "create -q -f qcow2 -o data_file=r.raw,data_file_raw=on rawdata 64M",
    ] {
        place.make(line);
    }
    place.qemu_io("base", &["write 0 4M"]);
    place.qemu_io("mid", &["write 8M 4M", "write -z 16M 4M"]);
    place.qemu_io("top", &["write 24M 4M", "write 32M 2M", "write -c 40M 64k"]);
    let line = "create -q -f qcow2 -o data_file=p.raw,data_file_layout=packed packed 64M";
    assert_eq!(place.run(&words(line)).status, Some(0));
}

fn plot(place: &Place, line: &str) -> String {
    let run = place.run(&words(line));
    assert_eq!((run.status, &*run.stderr), (Some(0), ""), "{line}");
    run.stdout
}

/// Every tag that is opened is closed in its order, and nothing stands outside of the root.
fn assert_well_formed(svg: &str) {
    let mut open = Vec::new();
    let mut rest = svg.trim_end();
    assert!(rest.starts_with("<svg xmlns=\"http://www.w3.org/2000/svg\""));
    while let Some(at) = rest.find('<') {
        let end = at + rest[at..].find('>').unwrap();
        let tag = &rest[at + 1..end];
        assert!(!rest[..at].contains('&') || rest[..at].contains(';'));
        rest = &rest[end + 1..];
        assert_eq!(tag.matches('"').count() % 2, 0, "{tag}");
        if let Some(name) = tag.strip_prefix('/') {
            assert_eq!(open.pop(), Some(name.to_owned()), "{tag}");
            assert_eq!(open.is_empty(), rest.is_empty(), "{tag}");
        } else if !tag.ends_with('/') {
            open.push(tag.split(' ').next().unwrap().to_owned());
        }
    }
    assert!(open.is_empty() && rest.is_empty(), "{open:?} {rest}");
}

#[test]
fn a_picture_tells_what_there_is() {
    let place = Place::tandem();
    images(&place);
    assert_eq!(plot(&place, "map --plot out.svg top"), "");
    let svg = fs::read_to_string(place.path("out.svg")).unwrap();
    assert_well_formed(&svg);
    for text in [
        "<title>top (qcow2, 64 MiB)</title>",
        "data 6 MiB (9.4 %)",
        "compressed 64 KiB (0.1 %)",
        "backing file 4 MiB (6.2 %)",
        "2 images below 4 MiB (6.2 %)",
        "zero 4 MiB (6.2 %)",
        "unallocated",
        ">32 MiB</text>",
        "offset in the disk",
        "Offset in the file that holds the data",
        "@media (prefers-color-scheme:dark)",
    ] {
        assert!(svg.contains(text), "{text}\n{svg}");
    }
    // Again, over the picture that is there: the same.
    plot(&place, "map --plot out.svg top");
    assert_eq!(fs::read_to_string(place.path("out.svg")).unwrap(), svg);
    for name in ["base", "mid", "rawdata", "packed", "r.raw"] {
        plot(&place, &format!("map --plot out.svg {name}"));
        let svg = fs::read_to_string(place.path("out.svg")).unwrap();
        assert_well_formed(&svg);
        assert!(svg.len() < 20_000, "{name}: {}", svg.len());
        // Where everything is at its own offset there is no second picture.
        let moved = svg.contains("Offset in the file");
        assert_eq!(moved, name == "base" || name == "mid", "{name}");
    }
    plot(&place, "map --plot out.svg -s 30M -l 4M top");
    let svg = fs::read_to_string(place.path("out.svg")).unwrap();
    assert!(
        svg.contains("data 2 MiB (50.0 %)") && svg.contains(">30 MiB</text>"),
        "{svg}"
    );
}

#[test]
fn a_strip_tells_it_too() {
    let place = Place::tandem();
    images(&place);
    let strip = plot(&place, "map --plot - top");
    let lines: Vec<_> = strip.lines().collect();
    assert_eq!(lines[0], "top (qcow2, 64 MiB)");
    assert_eq!(lines[1].chars().count(), 80);
    assert!(lines[1].starts_with("222222·") && lines[1].contains("██") && lines[1].contains('c'));
    assert!(lines[2].starts_with("0 B ") && lines[2].ends_with(" 64 MiB"));
    assert!(
        strip.contains("█ data                 6 MiB    9.4 %"),
        "{strip}"
    );
    // Not to a terminal: no colours.
    assert!(!strip.contains('\x1b'));
}

/// Nothing but a picture is replaced by one.
#[test]
fn what_is_refused() {
    let place = Place::tandem();
    images(&place);
    let before = place.content();
    for (line, message) in [
        (
            "map --plot base top",
            "'base' exists and is no SVG file; it is left as it is",
        ),
        (
            "map --plot r.raw rawdata",
            "'r.raw' exists and is no SVG file; it is left as it is",
        ),
        (
            "map --plot . top",
            "'.' exists and is no SVG file; it is left as it is",
        ),
        ("map --plot gone/x.svg top", "Could not write 'gone/x.svg'"),
        (
            "map --plot x.svg --output=json top",
            "--plot and --output cannot be used",
        ),
        ("map --plot x.svg gone", "Could not open 'gone'"),
    ] {
        let refused = place.run(&words(line));
        assert_eq!((refused.status, &*refused.stdout), (Some(1), ""), "{line}");
        assert!(
            refused.stderr.contains(message),
            "{line}: {}",
            refused.stderr
        );
    }
    assert!(place.content() == before);
}

/// A pipe that nobody writes to.
#[test]
fn nothing_waits_for_a_pipe() {
    let place = Place::tandem();
    images(&place);
    let made = Command::new("mkfifo").arg(place.path("pipe")).status();
    assert!(made.unwrap().success());
    let refused = place.run(&words("map --plot pipe top"));
    assert_eq!(refused.status, Some(1));
    let message = "'pipe' exists and is no SVG file";
    assert!(refused.stderr.contains(message), "{}", refused.stderr);
}
