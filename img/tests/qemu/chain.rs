//! `info --backing-chain`

use crate::run::{Both, Place, words};

fn images(place: &Place) {
    std::fs::create_dir(place.path("sub")).unwrap();
    for line in [
        "create -q -f qcow2 a 1M",
        "create -q -f qcow2 -b a -F qcow2 b",
        "create -q -f qcow2 -b b -F qcow2 c",
        "create -q -f qcow2 -o data_file=d.raw d 1M",
        "create -q -f raw r 1M",
        "create -q -f qcow2 -b r -F raw over-raw",
        "create -q -f qcow2 -b d -F qcow2 over-data",
        "create -q -f qcow2 -u -b missing -F raw over-missing 1M",
        "create -q -f qcow2 -u -b a -F raw wrong-raw 1M",
        "create -q -f qcow2 -u -b r -F qcow2 wrong-qcow2 1M",
        "create -q -f qcow2 self 1M",
        "rebase -u -b self -F qcow2 self",
        "create -q -f qcow2 -u -b l2 -F qcow2 l1 1M",
        "create -q -f qcow2 -u -b l1 -F qcow2 l2 1M",
        "create -q -f qcow2 -u -b ./dot -F qcow2 dot 1M",
        "create -q -f qcow2 -u -b file:r -F raw over-file 1M",
        "create -q -f qcow2 -u -b ../a -F qcow2 sub/s 1M",
        "create -q -f qcow2 -u -b sub/s -F qcow2 over-sub 1M",
        "create -q -f qcow2 -u -b nbd:localhost:1 -F raw over-nbd 1M",
        "create -q -f qcow2 -b a -F qcow2 guess",
        "snapshot -c s b",
    ] {
        place.make(line);
    }
    // The extension that tells the format becomes one that nobody knows.
    let mut bytes = std::fs::read(place.path("guess")).unwrap();
    let at = bytes
        .windows(4)
        .position(|w| w == [0xe2, 0x79, 0x2a, 0xca])
        .unwrap();
    bytes[at..at + 4].copy_from_slice(&[0x12, 0x34, 0x56, 0x78]);
    std::fs::write(place.path("guess"), bytes).unwrap();
}

/// Lines of `info` that do not depend on when a snapshot was taken.
fn same_but_dates(both: &Both, line: &str) {
    let run = |place: &Place| {
        let mut run = place.run(&words(line));
        let is_date = |text: &&str| !text.contains("date-") && !text.contains(" s   ");
        run.stdout = run
            .stdout
            .lines()
            .filter(is_date)
            .collect::<Vec<_>>()
            .join("\n");
        run
    };
    let [expected, found] = both.each(run);
    assert_eq!(found, expected, "{line}");
}

#[test]
fn tells_the_same() {
    let both = Both::new(images);
    // The data file of an image in a chain is no concern of anybody.
    for place in [&both.qemu, &both.tandem] {
        std::fs::remove_file(place.path("d.raw")).unwrap();
    }
    for name in [
        "a",
        "b",
        "c",
        "d",
        "r",
        "over-raw",
        "over-data",
        "over-missing",
        "wrong-raw",
        "wrong-qcow2",
        "self",
        "./self",
        "l1",
        "l2",
        "over-file",
        "file:b",
        "missing",
    ] {
        for options in ["-b", "--backing-chain --output=json", "--backing-chain -U"] {
            same_but_dates(&both, &format!("info {options} {name}"));
        }
    }
    for line in [
        "info --backing-chain -f qcow2 c",
        "info --backing-chain -f raw c",
        "info --backing-chain --image-opts driver=qcow2,file.filename=c",
        "info --backing-chain --image-opts driver=qcow2,file.filename=self",
    ] {
        same_but_dates(&both, line);
    }
}

/// The names in a chain are followed as everywhere, and formats are not guessed.
#[test]
fn follows_what_may_be_followed() {
    let both = Both::new(images);
    let refused = |line: &str| {
        let run = both.tandem.run(&words(line));
        assert_eq!((run.status, &*run.stdout), (Some(1), ""), "{line}");
        run.stderr
    };
    let outside = refused("info -b over-sub");
    assert!(
        outside.contains("'sub/../a' lies outside the image's directory"),
        "{outside}"
    );
    let nothing = refused("info -b --follow=nothing c");
    assert!(nothing.contains("may not be followed"), "{nothing}");
    let guess = refused("info -b guess");
    assert!(guess.contains("does not tell its format"), "{guess}");
    assert_eq!(
        refused("info -b over-nbd"),
        "qemu-img: Could not open 'nbd:localhost:1': Unknown protocol 'nbd'\n"
    );
    // Names that become longer and longer, as QEMU makes them, are still the same file.
    assert_eq!(
        refused("info -b dot"),
        "qemu-img: Backing file './dot' creates an infinite loop.\n"
    );
    let expected = both.qemu.run(&words("info -b over-sub"));
    let found = both
        .tandem
        .run(&words("info -b --follow=anywhere over-sub"));
    assert_eq!(found, expected);
}
