//! `amend`

use std::fs;

use crate::run::{Both, Place, words};

fn images(place: &Place) {
    place.make("create -q -f qcow2 internal 1M");
    place.make("create -q -f qcow2 -o compat=0.10 v2 1M");
    place.make("create -q -f qcow2 -o data_file=d.raw,data_file_raw=on t 1M");
    place.make("create -q -f qcow2 -o data_file=e.raw,cluster_size=512 small 1M");
    place.qemu_io("t", &["write -P 7 0 1M"]);
    for copy in [
        "y.raw",
        "a-name-that-is-much-longer-than-the-one-before.raw",
    ] {
        fs::copy(place.path("d.raw"), place.path(copy)).unwrap();
    }
}

#[test]
fn does_the_same() {
    let both = Both::new(images);
    for line in [
        "-o data_file_raw=on t",
        "-o data_file=y.raw t",
        "-o data_file=a-name-that-is-much-longer-than-the-one-before.raw t",
        "-p -o data_file=d.raw,data_file_raw=off t",
        "-f qcow2 -o lazy_refcounts=on t",
        "-o data_file= t",
        "-o data_file_raw=off internal",
        "-o lazy_refcounts=on internal",
        "-o lazy_refcounts=off internal",
        "-o data_file=d.raw small",
    ] {
        both.same(&format!("amend {line}"));
        // The image itself is the same, byte for byte, and so is what QEMU says of it.
        assert!(both.tandem.content() == both.qemu.content(), "{line}");
        let name = line.rsplit(' ').next().unwrap();
        let info = words("info --output=json")
            .into_iter()
            .chain([name])
            .collect::<Vec<_>>();
        assert_eq!(both.tandem.qemu_img(&info).status, Some(0), "{line}");
    }
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "amend",
        "amend internal",
        "amend -o data_file=x internal",
        "amend -o data_file= internal",
        "amend -o data_file_raw=on internal",
        "amend -o cluster_size=4k t",
        "amend -o foo=1 t",
        "amend -o lazy_refcounts=on v2",
        "amend -o data_file_raw=off t t",
        "amend -o , t",
        "amend -f raw -o size=1M d.raw",
        "amend -o data_file_raw=maybe t",
    ] {
        both.same(line);
    }
    assert!(both.tandem.content() == before);
}

/// A part of a request is never carried out: QEMU drops the raw promise here, and then fails.
#[test]
fn all_or_nothing() {
    let place = Place::tandem();
    images(&place);
    let before = place.content();
    for line in [
        "amend -o data_file_raw=off,backing_file=b t",
        "amend -o data_file=y.raw,compat=0.10 t",
        "amend -o lazy_refcounts=on,data_file=y.raw internal",
    ] {
        assert_eq!(place.run(&words(line)).status, Some(1), "{line}");
        assert!(place.content() == before, "{line}");
    }
}
