//! `rebase`

use std::fs;

use crate::chains::{self, Random};
use crate::run::{Both, Place, words};

/// Two bases that differ, and overlays of several kinds on them.
fn images(place: &Place) {
    place.make("create -q -f raw base.raw 1M");
    place.qemu_io("base.raw", &["write -P 1 0 512k"]);
    place.make("create -q -f qcow2 base.qcow2 2M");
    place.qemu_io("base.qcow2", &["write -P 1 0 256k", "write -P 2 256k 512k"]);
    place.make("create -q -f qcow2 -b base.raw -F raw plain 1M");
    place.make("create -q -f qcow2 -b base.raw -F raw -o cluster_size=512 small 1M");
    place.make("create -q -f qcow2 -b base.raw -F raw -o compat=0.10 v2 1536k");
    place.make("create -q -f qcow2 -b base.raw -F raw -o extended_l2=on extended 1M");
    place.make("create -q -f qcow2 -b base.raw -F raw -o data_file=d external 1M");
    place.make("create -q -f qcow2 -o data_file=r,data_file_raw=on raw-data 1M");
    place.make("create -q -f qcow2 -b plain -F qcow2 deep 3M");
    place.make("create -q -f qcow2 -b base.raw -F raw full 1M");
    place.make("create -q -f qcow2 alone 1M");
    for image in ["plain", "small", "v2", "extended", "external", "deep"] {
        place.qemu_io(image, &["write -P 7 100k 60k", "write -z 200k 20k"]);
    }
    place.qemu_io("full", &["write -P 8 0 1M"]);
}

/// Fails unless `image` reads the same in both places, and is sound and names the same backing file.
fn same_image(both: &Both, image: &str) {
    chains::same_content(both, image);
    let named = |place: &Place| {
        let info = place.qemu_img(&["info", "-U", "--output=json", image]);
        assert_eq!(info.status, Some(0), "{}", info.stderr);
        let is_name = |line: &&str| line.contains("backing-filename");
        let names = info.stdout.lines().filter(is_name);
        names.map(str::to_owned).collect::<Vec<_>>()
    };
    let [expected, found] = both.each(named);
    assert_eq!(found, expected, "{image}");
}

#[test]
fn does_the_same() {
    let both = Both::new(images);
    for line in [
        "-b base.qcow2 -F qcow2 plain",
        "-b base.raw -F raw plain",
        "-f qcow2 -b base.qcow2 -F qcow2 small",
        "-b base.qcow2 -F qcow2 v2",
        "-b base.qcow2 -F qcow2 extended",
        "-b base.qcow2 -F qcow2 external",
        "-b '' external",
        "-b base.raw -F raw deep",
        "-b base.qcow2 -F qcow2 deep",
        "-b '' deep",
        "-b plain -F qcow2 deep",
        "-q -b base.qcow2 -F qcow2 alone",
        "-b '' -F raw alone",
        "-b '' alone",
        "-b '' raw-data",
        "-u -b '' raw-data",
        "-u raw-data",
        "-c -b '' plain",
        "-c -b base.qcow2 -F qcow2 small",
        "-t none -T none -b base.raw -F raw small",
        "-t writethrough -T unsafe -b base.qcow2 -F qcow2 full",
        "-U -b base.raw -F raw full",
        "-u -b base.qcow2 -F qcow2 full",
        "-u -b base.raw -F file full",
        "-u -F raw full",
        "-u full",
        "-u -b ./base.raw -F raw full",
        "--progress --quiet --backing base.qcow2 --backing-format qcow2 --format qcow2 full",
        "--backing-unsafe --cache none --backing-cache none full",
        "-p -q -b base.qcow2 -F qcow2 full",
        "-p -b base.raw -F raw full",
        "-p -u -b base.raw -F raw full",
        "-b base.qcow2 -F qcow2 --image-opts driver=qcow2,file.filename=full",
    ] {
        both.same(&format!("rebase {line}"));
        same_image(&both, line.rsplit([' ', '=']).next().unwrap());
    }
}

#[test]
fn fails_the_same() {
    let both = Both::new(|place| {
        images(place);
        place.make("create -q -f qcow2 -u -b gone -F raw orphan 1M");
        place.make("create -q -f qcow2 -o cluster_size=512 tiny 1M");
        fs::write(place.path("junk"), [0; 1024]).unwrap();
    });
    let before = both.tandem.content();
    let long = "x".repeat(1024);
    let name = "x".repeat(500);
    for line in [
        "",
        "plain",
        "-b base.qcow2",
        "-u",
        "-u plain plain",
        "-b base.qcow2 plain",
        "-u -b base.qcow2 plain",
        "-b nope plain",
        "-b nope -F qcow2 plain",
        "-b nope -F raw plain",
        "-F foo -b base.qcow2 plain",
        "-u -F foo -b base.qcow2 plain",
        "-F foo plain",
        "-b junk -F qcow2 plain",
        "-b base.qcow2 -F qcow2 nope",
        "-u -b base.qcow2 -F qcow2 nope",
        "-b base.qcow2 -F qcow2 base.raw",
        "-u -b base.qcow2 -F qcow2 base.raw",
        "-f raw -u base.raw",
        "-f raw -u -b '' base.raw",
        "-f raw -b '' base.raw",
        "-f raw -c -b '' base.raw",
        "-f raw -b nope -F raw base.raw",
        "-f qcow2 -u base.raw",
        "-f foo -u base.raw",
        "-c -b base.qcow2 -F raw base.raw",
        "-t foo -b base.qcow2 plain",
        "-T foo -b base.qcow2 plain",
        "-t foo -T bar -b base.qcow2 plain",
        "-c -b base.qcow2 -F qcow2 external",
        "-b base.raw -F raw orphan",
        "-b '' orphan",
        "-b plain -F qcow2 plain",
        "-b orphan -F qcow2 plain",
        "-x",
        "-b",
        "--compress=1 plain",
        "--forc",
        &format!("-u -b {long} -F raw plain"),
        &format!("-u -b {name} -F raw tiny"),
    ] {
        both.same(&format!("rebase {line}"));
        assert!(both.tandem.content() == before, "{line}");
    }
}

/// What QEMU finds out after it has copied, if at all.
#[test]
fn refuses_before_it_copies() {
    let place = Place::tandem();
    images(&place);
    place.make("create -q -f qcow2 -b base.raw -F raw -o cluster_size=512 tiny 1M");
    let before = place.content();
    let name = format!("{}base.qcow2", "./".repeat(250));
    for (line, reason) in [
        (
            "rebase -b base.qcow2 -F qcow2 raw-data".to_owned(),
            "Could not change the backing file to 'base.qcow2': data-file-raw is incompatible with \
             backing files",
        ),
        (
            "rebase -u -b base.qcow2 -F qcow2 raw-data".to_owned(),
            "Could not change the backing file to 'base.qcow2': data-file-raw is incompatible with \
             backing files",
        ),
        (
            format!("rebase -b {name} -F qcow2 tiny"),
            "No space left in the file header",
        ),
        (
            "rebase -b base.qcow2 -F vmdk plain".to_owned(),
            "Invalid format name: 'vmdk'",
        ),
        (
            "rebase -b nbd:host -F raw plain".to_owned(),
            "Could not open new backing file 'nbd:host': Unknown protocol 'nbd'",
        ),
    ] {
        let run = place.run(&words(&line));
        assert_eq!(run.status, Some(1), "{line}");
        assert!(run.stderr.contains(reason), "{line}: {}", run.stderr);
        assert!(place.content() == before, "{line}");
    }
}

/// A backing file whose format the image does not tell is not guessed at.
#[test]
fn formats_are_not_guessed() {
    let place = Place::tandem();
    images(&place);
    chains::forget_format(&place.path("plain"));
    let run = place.run(&words("rebase -b base.qcow2 -F qcow2 plain"));
    assert!(run.stderr.contains("does not tell its format"), "{run:?}");
    place.make("rebase -u -b base.raw -F raw plain");
    let run = place.run(&words("rebase -b base.qcow2 -F qcow2 plain"));
    assert_eq!(run.status, Some(0), "{run:?}");
}

/// Chains of raw and qcow2 images of several sizes and cluster sizes.
#[test]
fn random_chains_read_the_same() {
    for seed in 0..chains::seeds() {
        let mut random = Random::new(seed);
        let both = Both::in_memory(|place| {
            let mut random = Random::new(seed);
            chains::make(place, &mut random, "old", 3);
            chains::make(place, &mut random, "new", 2);
        });
        let before = chains::content(&both.tandem, "old3");
        let compress = if random.below(4) == 0 { "-c " } else { "" };
        let new = match random.below(4) {
            0 => "-b ''".to_owned(),
            1 => format!("-b old1 -F {}", chains::format(&both.tandem, "old1")),
            _ => format!("-b new2 -F {}", chains::format(&both.tandem, "new2")),
        };
        let info = both.tandem.qemu_img(&["info", "-U", "old3"]).stdout;
        // QEMU refuses the former, and the latter ends with a failed assertion.
        let cannot = info.contains("data file:") || info.contains("extended l2: true");
        let compress = if cannot { "" } else { compress };
        let line = format!("rebase {compress}{new} old3");
        both.same(&line);
        assert!(
            chains::content(&both.tandem, "old3") == before,
            "{seed}: {line}"
        );
        same_image(&both, "old3");
    }
}
