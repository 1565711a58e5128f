//! `snapshot`, and snapshots in `info`

use crate::run::{Both, Place, words};

fn images(place: &Place) {
    place.make("create -q -f qcow2 image 4M");
    place.make("create -q -f qcow2 -o compat=0.10 v2 4M");
    place.make("create -q -f qcow2 -o data_file=d.raw external 1M");
    place.make("create -q -f raw raw 1M");
    place.qemu_io("image", &["write 100k 500k"]);
    place.qemu_io("v2", &["write 100k 500k"]);
}

/// The answers of both programs about one image.
fn same_answer(place: &Place, line: &str) {
    let args = words(line);
    assert_eq!(place.run(&args), place.qemu_img(&args), "{line}");
}

#[test]
fn lists_what_either_has_taken() {
    let place = Place::tandem();
    images(&place);
    for image in ["image", "v2"] {
        for (by_qemu, name) in [(true, "by-qemu"), (false, "by-tandem"), (false, "")] {
            let args = ["snapshot", "-c", name, image];
            let taken = if by_qemu {
                place.qemu_img(&args)
            } else {
                place.run(&args)
            };
            assert_eq!(
                (taken.status, &*taken.stdout, &*taken.stderr),
                (Some(0), "", "")
            );
            for line in [
                "snapshot -l",
                "snapshot",
                "snapshot -U -l",
                "info",
                "info --output=json",
            ] {
                same_answer(&place, &format!("{line} {image}"));
            }
        }
        let list = place.run(&["snapshot", image]).stdout;
        assert_eq!(list.lines().count(), 5, "{list}");
        for line in ["-a by-tandem", "-a 1", "-d by-qemu", "-d by-tandem"] {
            let done = place.run(&words(&format!("snapshot {line} {image}")));
            assert_eq!(
                (done.status, &*done.stdout, &*done.stderr),
                (Some(0), "", "")
            );
            same_answer(&place, &format!("snapshot -l {image}"));
            same_answer(&place, &format!("check {image}"));
        }
    }
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "",
        "image image",
        "-l -l image",
        "-l -c x image",
        "-c x -d x image",
        "-d none image",
        "-a none image",
        "-c x missing",
        "-U -c x image",
        "-d x external",
        "-c x -f raw raw",
        "-a x -f raw raw",
        "-d x -f raw raw",
        "-l -f raw raw",
        "-l external",
        "-c",
        "-x image",
    ] {
        both.same(&format!("snapshot {line}"));
    }
    assert!(both.tandem.content() == before);
    // QEMU tells only that it does not support this.
    let refused = both.tandem.run(&words("snapshot -c x external"));
    assert_eq!(refused.status, Some(1));
    assert_eq!(
        refused.stderr,
        "qemu-img: Could not create snapshot 'x': an image with an external data file cannot have \
         internal snapshots\n"
    );
    assert!(both.tandem.content() == before);
}

/// QEMU cuts the name off.
#[test]
fn a_name_can_be_too_long() {
    let place = Place::tandem();
    images(&place);
    let name = "x".repeat(256);
    let refused = place.run(&["snapshot", "-c", &name, "image"]);
    assert_eq!(refused.status, Some(1));
    assert!(
        refused
            .stderr
            .ends_with(": the name of a snapshot can have 255 bytes at most\n")
    );
    assert_eq!(
        place.run(&["snapshot", "-c", &name[1..], "image"]).status,
        Some(0)
    );
    same_answer(&place, "snapshot -l image");
}
