//! `dd`: the same disks, and no half-made ones.

use std::fs;

use crate::run::{Both, Place, words};

fn images(place: &Place) {
    std::fs::write(place.path("odd"), [7; 70_001]).unwrap();
    place.make("create -q -f qcow2 base 5M");
    place.qemu_io("base", &["write -P 1 0 5M"]);
    place.make("create -q -f qcow2 -b base -F qcow2 image 6M");
    place.qemu_io(
        "image",
        &["write -P 2 100k 300k", "write -z 1M 1M", "write -P 3 5M 4k"],
    );
    place.make("create -q -f qcow2 -o data_file=d.raw external 3M");
    place.make("create -q -f qcow2 -o data_file=e.raw,data_file_raw=on raw-data 3M");
    for image in ["external", "raw-data"] {
        place.qemu_io(
            image,
            &["write -P 4 0 1k", "write -P 5 1M 64k", "write -z 1M 4k"],
        );
    }
}

/// What the two programs have made of `line` is the same disk.
fn same_disk(both: &Both, line: &str, format: &str, output: &str) {
    both.same(line);
    if format == "raw" {
        both.same_bytes(output);
        return;
    }
    both.each(|place| {
        place.make(&format!("check -q -f qcow2 {output}"));
        place.make(&format!("convert -f qcow2 -O raw {output} flat"));
    });
    both.same_bytes("flat");
}

#[test]
fn the_same_disks() {
    let both = Both::new(images);
    for input in ["odd", "image", "external", "raw-data"] {
        for (i, operands) in [
            "",
            "bs=1M count=2",
            "bs=64k skip=3",
            "bs=1M skip=1 count=2",
            "bs=1000 skip=1 count=77",
            "bs=1 count=513",
            "bs=3k skip=0 count=1",
            "bs=512 count=0",
            "bs=1M skip=1 count=1",
            "bs=1M skip=2 count=1",
            "bs=1M skip=100",
            "skip=9223372036854775807",
            "count=9223372036854775807 bs=2147483647",
            "bs=4k count=0x10 skip=010 -U",
            "bs=1.5k count=2",
            "bs=8k bs=512 count=9 skip=1 skip=2",
        ]
        .into_iter()
        .enumerate()
        {
            let format = ["raw", "qcow2"][i % 2];
            let line = format!("dd -O {format} {operands} if={input} of=out");
            same_disk(&both, &line, format, "out");
        }
    }
    let line = "dd --image-opts bs=1k if=driver=qcow2,file.filename=external of=out";
    same_disk(&both, line, "raw", "out");
    same_disk(&both, "dd -f raw if=image of=copy of=file", "raw", "file");
    same_disk(&both, "dd -f qcow2 if=file:image of=file:out", "raw", "out");
    same_disk(
        &both,
        "dd --force --out qcow2 if=image of=out",
        "qcow2",
        "out",
    );
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "",
        "foo",
        "if=image",
        "of=out",
        "if=image of=out foo",
        "if=image of=out seek=3",
        "if=image of=out conv=notrunc",
        "if=image of=out bs",
        "if=image of=out =3",
        "if of=out",
        "bs=0 if=image of=out",
        "bs=x if=image of=out",
        "bs= if=image of=out",
        "bs=2G if=image of=out",
        "bs=-1 if=image of=out",
        "count=x if=image of=out",
        "count=1k if=image of=out",
        "count= if=image of=out",
        "count=08 if=image of=out",
        "count=-1 if=image of=out",
        "count=9223372036854775808 if=image of=out",
        "skip=x if=image of=out",
        "skip=1k if=image of=out",
        "skip=-1 if=image of=out",
        "if=missing of=out",
        "if= of=out",
        "if=image of=",
        "if=image of=image",
        "if=image of=base",
        "if=image of=foo:bar",
        "if=image of=nowhere/out",
        "if=image of=nowhere/out -O qcow2",
        "-O foo if=image of=out",
        "-O foo if=missing of=out",
        "-f foo if=image of=out",
        "-f qcow2 --image-opts if=driver=qcow2,file.filename=image of=out",
        "--image-opts if=driver=qcow2,file.filename=missing of=out",
        "-f qcow2 if=odd of=out",
        "-x",
        "-O",
        "--o qcow2",
        "--frobnicate",
    ] {
        let line = format!("dd {line}");
        both.same(&line);
        assert_eq!(both.tandem.run(&words(&line)).status, Some(1), "{line}");
    }
    assert!(both.tandem.content() == before);
}

/// QEMU has truncated the disk, and copies zeros, if it is raw.
#[test]
fn onto_itself() {
    let place = Place::tandem();
    images(&place);
    let before = place.content();
    for line in ["if=odd of=odd -f raw", "if=external of=d.raw"] {
        let refused = place.run(&words(&format!("dd {line}")));
        assert_eq!(refused.status, Some(1), "{line}");
        assert!(
            refused.stderr.contains(" lock\nIs another process"),
            "{}",
            refused.stderr
        );
        assert!(place.content() == before, "{line}");
    }
}

/// A source that cannot be read leaves what was there.
#[test]
fn complete_or_not_there() {
    let place = Place::tandem();
    images(&place);
    fs::write(place.path("out"), "precious").unwrap();
    // The mapping of the last cluster leads nowhere.
    let path = place.path("image");
    let mut bytes = fs::read(&path).unwrap();
    let word = |bytes: &[u8], at: usize| {
        u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize & 0x00ff_ffff_ffff_fe00
    };
    let l2 = word(&bytes, word(&bytes, 40));
    bytes[l2 + 80 * 8..][..8].copy_from_slice(&(0x8000_0000_7fff_0000_u64).to_be_bytes());
    fs::write(&path, bytes).unwrap();
    let before = place.content();
    for format in ["raw", "qcow2"] {
        for output in ["out", "new"] {
            let line = format!("dd -f qcow2 -O {format} if=image of={output}");
            let failed = place.run(&words(&line));
            assert_eq!(failed.status, Some(1), "{line}");
            let start = "qemu-img: error while reading from input image file: ";
            assert!(failed.stderr.starts_with(start), "{}", failed.stderr);
            assert!(place.content() == before, "{line}");
        }
    }
}

/// What is known to be zero takes no space.
#[test]
fn zeros_are_not_written() {
    use std::os::unix::fs::MetadataExt;

    let place = Place::tandem();
    place.make("create -q -f qcow2 image 200M");
    place.qemu_io("image", &["write 100M 64k"]);
    for format in ["raw", "qcow2"] {
        let line = format!("dd -O {format} bs=1M if=image of=out");
        assert_eq!(place.run(&words(&line)).status, Some(0));
        let used = fs::metadata(place.path("out")).unwrap().blocks() * 512;
        assert!(used < 1 << 20, "{format}: {used}");
    }
}
