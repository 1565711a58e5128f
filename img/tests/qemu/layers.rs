//! Disks on top of others, parts of disks, and files that fail, where images are read.

use std::fs;

use crate::run::{Both, Place};

fn images(place: &Place) {
    place.make("create -q -f qcow2 inner 1M");
    place.qemu_io("inner", &["write -P 5 64k 64k"]);
    place.make("convert -f qcow2 -O raw inner raw");
    place.make("convert -f raw -O qcow2 inner disk");
    place.make("create -q -f qcow2 other 2M");
    place.qemu_io("other", &["write -P 5 64k 64k"]);
    let rules = "[inject-error]\nevent = \"read_aio\"\nerrno = \"5\"\n";
    fs::write(place.path("rules"), rules).unwrap();
    place.make("create -q -f qcow2 -b inner -F qcow2 top");
}

const NESTED: &str = "driver=qcow2,file.driver=qcow2,file.file.filename=disk";

#[test]
fn what_is_read_is_the_same() {
    let both = Both::new(images);
    for line in [
        &format!("convert --image-opts {NESTED} -O raw out"),
        &format!("compare --image-opts {NESTED} driver=raw,file.filename=raw"),
        &format!("measure --image-opts {NESTED} -O qcow2"),
        "convert --image-opts driver=raw,file.driver=qcow2,file.file.filename=inner -O raw bytes",
        "convert --image-opts driver=raw,offset=64k,size=128k,file.filename=raw -O raw part",
        "map --image-opts driver=blkdebug,image.driver=qcow2,image.file.filename=inner,align=4k",
        "compare blkdebug:rules:inner inner",
        "compare inner blkdebug:rules:other",
        "convert -O raw blkdebug:rules:inner failed",
        "compare blkdebug:missing:inner inner",
    ] {
        both.same(line);
    }
    for name in ["out", "bytes", "part"] {
        both.same_bytes(name);
    }
}

/// What looks at the file alone does not take it for the disk.
#[test]
fn what_is_not_read_so_is_refused() {
    let tandem = Place::tandem();
    images(&tandem);
    let before = tandem.content();
    for command in [
        "check -r all",
        "snapshot -c s",
        "info",
        "commit",
        "amend -o lazy_refcounts=on",
    ] {
        let line = format!("{command} --image-opts {NESTED}");
        let words: Vec<_> = line.split(' ').collect();
        let found = tandem.run(&words);
        assert_eq!(found.status, Some(1), "{line}");
        assert!(
            found.stderr.contains("are not supported here"),
            "{line}: {}",
            found.stderr
        );
    }
    assert!(tandem.content() == before);
}

/// The format of a backing file that the image does not tell, or tells wrong.
#[test]
fn the_format_of_a_backing_file() {
    let both = Both::new(|place| {
        images(place);
        // The name of the format, behind the header.
        let mut top = fs::read(place.path("top")).unwrap();
        let at = top.windows(5).position(|bytes| bytes == b"qcow2").unwrap();
        top[at..at + 5].copy_from_slice(b"other");
        fs::write(place.path("top"), top).unwrap();
    });
    both.same("info top");
    both.same("map top");
    both.same("map --image-opts driver=qcow2,file.filename=top,backing.driver=qcow2");
    both.same(
        "convert --image-opts -O raw driver=qcow2,file.filename=top,backing.driver=qcow2 out",
    );
    both.same_bytes("out");
}

/// A colon in a name is not a protocol's if `file:` stands before it.
#[test]
fn colons_in_names() {
    let both = Both::new(images);
    both.same("create -f qcow2 -b inner -F qcow2 file:a:b");
    let shown = |place: &Place| {
        let told = place.run(&["info", "file:a:b"]).stdout;
        // How many blocks a file has may differ.
        let lines = told.lines().filter(|line| !line.contains("disk size"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(shown(&both.tandem), shown(&both.qemu));
    both.same("info a:b");
}
