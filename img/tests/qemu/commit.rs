//! `commit`

use std::fs;

use crate::chains::{self, Random};
use crate::run::{Both, Place, words};

fn images(place: &Place) {
    place.make("create -q -f raw base.raw 1M");
    place.qemu_io_as("raw", "base.raw", &["write -P 1 0 512k"]);
    place.make("create -q -f qcow2 base.qcow2 1M");
    place.qemu_io("base.qcow2", &["write -P 2 0 512k"]);
    place.make("create -q -f qcow2 -o data_file=b.data,data_file_raw=on base.ext 1M");
    place.qemu_io("base.ext", &["write -P 2 0 512k"]);
    for (image, below, options) in [
        ("plain", "base.raw", "-F raw"),
        ("large", "base.qcow2", "-F qcow2"),
        ("small", "base.qcow2", "-F qcow2 -o cluster_size=512"),
        ("v2", "base.qcow2", "-F qcow2 -o compat=0.10"),
        ("extended", "base.qcow2", "-F qcow2 -o extended_l2=on"),
        ("external", "base.ext", "-F qcow2 -o data_file=d"),
        ("snapshots", "base.raw", "-F raw"),
        ("deep", "plain", "-F qcow2"),
        ("deeper", "deep", "-F qcow2"),
        ("bitmap", "base.raw", "-F raw"),
        ("nothing", "base.raw", "-F raw"),
    ] {
        let size = if image == "large" { "3M" } else { "1M" };
        place.make(&format!(
            "create -q -f qcow2 -b {below} {options} {image} {size}"
        ));
        if image == "bitmap" {
            place.make("bitmap --add bitmap b");
        }
        if image != "nothing" {
            place.qemu_io(image, &["write -P 7 100k 60k", "write -z 200k 20k"]);
        }
    }
    place.qemu_io("deep", &["write -P 8 120k 60k"]);
    place.qemu_io("deeper", &["write -P 9 140k 60k"]);
    place.make("snapshot -c s snapshots");
    place.qemu_io("snapshots", &["write -P 6 300k 60k"]);
}

const IMAGES: &[&str] = &[
    "plain",
    "large",
    "small",
    "v2",
    "extended",
    "external",
    "snapshots",
    "deep",
    "deeper",
    "bitmap",
    "nothing",
    "base.raw",
    "base.qcow2",
    "base.ext",
];

/// What is stored in an image itself.
fn mapped(place: &Place, image: &str) -> String {
    let map = place
        .qemu_img(&["map", "-U", "--output=json", image])
        .stdout;
    let own = |line: &&str| line.contains("\"depth\": 0") && line.contains("\"present\": true");
    map.lines().filter(own).count().to_string()
}

#[test]
fn does_the_same() {
    let both = Both::new(images);
    for line in [
        "plain",
        "-q large",
        "-f qcow2 small",
        "v2",
        "-d extended",
        "extended",
        "external",
        "-r 100M snapshots",
        "-r0 -d deeper",
        "-b base.raw deeper",
        "-b ./plain deeper",
        "-b deep deeper",
        "deeper",
        "deep",
        "-t none plain",
        "-t unsafe -d plain",
        "-t writethrough plain",
        "bitmap",
        "nothing",
        "-d -b base.raw nothing",
        "--image-opts driver=qcow2,file.filename=small",
        "--progress --quiet --drop --base base.raw --rate 1G --cache none --format qcow2 nothing",
    ] {
        both.same(&format!("commit {line}"));
        chains::same_contents(&both, IMAGES);
        let image = line.rsplit([' ', '=']).next().unwrap();
        let [expected, found] = both.each(|place| mapped(place, image));
        assert_eq!(found, expected, "{line}");
    }
    both.same_bytes("base.raw");
    both.same_bytes("b.data");
    both.same_bytes("d");
}

/// How often QEMU says where it is depends on the clock.
#[test]
fn shows_progress() {
    let both = Both::new(images);
    for line in [
        "commit -p plain",
        "commit -p base.qcow2",
        "commit -p -b nope deep",
    ] {
        let shown = |place: &Place| {
            let run = place.run(&words(line));
            let mut lines: Vec<_> = run.stdout.split('\r').map(str::to_owned).collect();
            lines.dedup();
            (lines, run.stderr, run.status)
        };
        let [expected, found] = both.each(shown);
        assert_eq!(found, expected, "{line}");
    }
}

#[test]
fn fails_the_same() {
    let both = Both::new(|place| {
        images(place);
        place.make("create -q -f qcow2 -u -b gone -F raw orphan 1M");
    });
    let before = both.tandem.content();
    for line in [
        "",
        "plain plain",
        "base.raw",
        "-f raw base.raw",
        "-q -f raw base.raw",
        "base.qcow2",
        "base.ext",
        "nope",
        "-f foo plain",
        "-f qcow2 base.raw",
        "orphan",
        "-b gone orphan",
        "-t foo plain",
        "-r x plain",
        "-rfoo plain",
        "-r -1 plain",
        "-r 16E plain",
        "-b nope plain",
        "-b plain plain",
        "-b base.qcow2 plain",
        "-b deeper deep",
        "-b base.raw base.raw",
        "-x",
        "-b",
        "-T none plain",
        "--foo plain",
        "-U plain",
    ] {
        both.same(&format!("commit {line}"));
        assert!(both.tandem.content() == before, "{line}");
    }
}

#[test]
fn formats_are_not_guessed() {
    let place = Place::tandem();
    images(&place);
    chains::forget_format(&place.path("plain"));
    let before = place.content();
    let run = place.run(&words("commit plain"));
    assert!(run.stderr.contains("does not tell its format"), "{run:?}");
    assert!(place.content() == before);
}

/// What is emptied gives back its space.
#[test]
fn an_empty_image_takes_no_space() {
    let place = Place::tandem();
    place.make("create -q -f raw base 8M");
    for options in [
        "",
        "-o data_file=data",
        "-o compat=0.10",
        "-o extended_l2=on",
    ] {
        place.make(&format!(
            "create -q -f qcow2 -b base -F raw {options} top 8M"
        ));
        place.qemu_io("top", &["write -P 5 0 8M"]);
        let run = place.run(&words("commit -q top"));
        assert_eq!(run.status, Some(0), "{run:?}");
        let holder = if options.contains("data") {
            "data"
        } else {
            "top"
        };
        let blocks =
            std::os::unix::fs::MetadataExt::blocks(&fs::metadata(place.path(holder)).unwrap());
        assert!(blocks * 512 < 1 << 20, "{options}: {blocks}");
        place.make("check -q top");
    }
}

/// Chains of raw and qcow2 images of several sizes and cluster sizes.
#[test]
fn random_chains_end_up_the_same() {
    for seed in 0..chains::seeds() {
        let mut random = Random::new(seed ^ 0x5eed);
        let top = 1 + random.below(3);
        let both = Both::in_memory(|place| {
            chains::make(place, &mut Random::new(seed), "image", top as u32);
        });
        let image = format!("image{top}");
        let before = chains::content(&both.tandem, &image);
        let base = random.below(top);
        let options = match random.below(3) {
            0 => "-d".to_owned(),
            1 => format!("-b image{base}"),
            _ => String::new(),
        };
        let line = format!("commit {options} {image}");
        both.same(&line);
        let after = chains::content(&both.tandem, &image);
        assert!(after == before || options.contains("-b"), "{seed}: {line}");
        for number in 0..=top {
            chains::same_content(&both, &format!("image{number}"));
        }
    }
}

/// What a raw data file holds behind the end of the base is nothing of the disk that takes its place.
#[test]
fn a_longer_data_file_does_not_show() {
    let place = Place::tandem();
    fs::write(place.path("old.raw"), vec![9; 2 << 20]).unwrap();
    let made = place.run(&words(
        "create -q -f qcow2 -o data_file=old.raw,data_file_raw=on,data_file_reuse=keep base 1M",
    ));
    assert_eq!(made.status, Some(0), "{}", made.stderr);
    place.make("create -q -f qcow2 -b base -F qcow2 top 2M");
    place.qemu_io("top", &["write -P 7 1536k 64k"]);
    let before = chains::content(&place, "top");
    let done = place.run(&words("commit top"));
    assert_eq!(done.status, Some(0), "{}", done.stderr);
    assert!(chains::content(&place, "top") == before);
    assert!(chains::content(&place, "base") == before);
    place.make("check -q base");
}
