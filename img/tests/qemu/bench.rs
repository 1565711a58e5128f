//! `bench`: the same lines but for the time, and the same writes.

use crate::run::{Both, Place, Run, words};

fn images(place: &Place) {
    place.make("create -q -f raw raw 2M");
    place.make("create -q -f qcow2 image 2M");
    place.make("create -q -f qcow2 -o data_file=d.raw external 2M");
    place.make("create -q -f qcow2 -o data_file=e.raw,data_file_raw=on raw-data 2M");
    for image in ["image", "external", "raw-data"] {
        place.qemu_io(image, &["write -P 9 0 2M"]);
    }
}

/// Without the time that a run took.
fn timeless(mut run: Run) -> Run {
    if let Some((start, rest)) = run.stdout.split_once("Run completed in ") {
        let (seconds, end) = rest.split_once(' ').unwrap();
        assert_eq!(seconds.split_once('.').unwrap().1.len(), 3, "{seconds}");
        seconds.parse::<f64>().unwrap();
        run.stdout = format!("{start}Run completed in X {end}");
    }
    run
}

fn same(both: &Both, line: &str) -> Run {
    let args = words(line);
    let [expected, found] = both.each(|place| timeless(place.run(&args)));
    assert_eq!(found, expected, "{line}");
    found
}

#[test]
fn the_same_lines() {
    let both = Both::new(images);
    for line in [
        "-c 100 image",
        "-f raw -c 100 raw",
        "-c 100 -d 1 external",
        "-c 100 -d 7 -s 512 -S 1k -o 3k raw-data",
        "-c 0x10 -d 010 -s 1b image",
        "-c 10 -s 1M -d 3 image",
        "-c 2 -d 1000 image",
        "-c 1 -S 0 -s 1.5k image",
        "-c 5 -t none image",
        "-c 5 -t unsafe image",
        "-c 5 -i threads image",
        "-c 5 -n -t none image",
        "-c 5 --native --cache directsync image",
        "-c 5 -q -U image",
        "-c 5 --no-drain image",
        "-c 5 --image-opts driver=qcow2,file.filename=image",
        "-c 5 -t none json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"raw\"}}",
        "-c 5 --pattern 3 image",
        "--count 5 --depth 2 --buffer-size 4k --step-size 8k --offset 1k --aio threads image",
    ] {
        assert_eq!(
            same(&both, &format!("bench {line}")).status,
            Some(0),
            "{line}"
        );
    }
    for image in ["image", "external", "raw-data"] {
        for line in [
            "-c 100",
            "-c 100 --pattern 0xff -s 512 -S 5000 -o 100 -d 3",
            "-c 129 --pattern 7 --flush-interval 64",
            "-c 200 --pattern 8 -d 4 --flush-interval 4 -t directsync -S 4k -s 1k",
            "-c 200 --pattern 9 -d 4 --flush-interval 50 --no-drain -S 8k",
            "-c 10 -t writethrough",
            "-c 3 --pattern 1 -t none -s 64k -S 100k",
        ] {
            let line = format!("bench -w -f qcow2 {line} {image}");
            assert_eq!(same(&both, &line).status, Some(0), "{line}");
            both.each(|place| {
                place.make(&format!("convert -O raw {image} flat"));
                place.make(&format!("check -q {image}"));
            });
            both.same_bytes("flat");
        }
    }
    assert_eq!(
        same(&both, "bench -w -c 10 --pattern 65 raw").status,
        Some(0)
    );
    both.same_bytes("raw");
}

#[test]
fn fails_the_same() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "",
        "a b",
        "missing",
        "-f foo image",
        "-f qcow2 --image-opts driver=qcow2,file.filename=image",
        "-w --image-opts driver=qcow2,file.filename=image,read-only=on",
        "--image-opts driver=qcow2",
        "-f qcow2 raw",
        "-c x image",
        "-c 1k image",
        "-c 0 image",
        "-c -1 image",
        "-c '' image",
        "-c 3000000000 image",
        "-d x image",
        "-d 0 image",
        "-d 3000000000 image",
        "-i foo image",
        "-n image",
        "-n -t writeback image",
        "-o x image",
        "-o -1 image",
        "-o 8E image",
        "-s x image",
        "-s 0 image",
        "-s 3G image",
        "-S x image",
        "-S 3G image",
        "-t foo image",
        "-w --pattern 256 image",
        "-w --pattern x image",
        "--pattern -1 image",
        "--flush-interval 3 image",
        "--flush-interval x image",
        "-w --flush-interval -1 image",
        "-w --flush-interval 3 image",
        "-U -w -c 10 image",
        "-c 10 -o 2M image",
        "-c 10 -o 20M image",
        "-w -c 1 -o 20M image",
        "-c 1 -o 7.9E image",
        "-c 1 -s 3000 -o 2097151 image",
        "-c 1000 -s 4000 image",
        "-c",
        "-x",
        "--frobnicate",
        "--n image",
        "--pattern",
    ] {
        let run = same(&both, &format!("bench {line}"));
        assert_eq!(run.status, Some(1), "{line}");
    }
    assert!(both.tandem.content() == before);
}

/// What QEMU does in another way, or not at all.
#[test]
fn what_there_is_only_of_threads() {
    let place = Place::tandem();
    images(&place);
    for (line, reason) in [
        (
            "-i native image",
            "aio option 'native' is not supported, only 'threads' is",
        ),
        (
            "-i io_uring image",
            "aio option 'io_uring' is not supported, only 'threads' is",
        ),
        (
            "-s 1G image",
            "The buffers of all requests would take more than 2 GiB",
        ),
    ] {
        let run = place.run(&words(&format!("bench {line}")));
        assert_eq!((run.status, &*run.stdout), (Some(1), ""));
        assert_eq!(run.stderr, format!("qemu-img: {reason}\n"));
    }
    // QEMU would allocate a buffer for each.
    let run = place.run(&words("bench -d 2147483647 -c 500 image"));
    assert_eq!((run.status, &*run.stderr), (Some(0), ""));
}
