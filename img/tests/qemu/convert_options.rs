//! `convert`, option by option, against QEMU.

use std::fs;

use crate::run::{Both, Place, words};

fn images(place: &Place) {
    place.make("create -q -f qcow2 src 8M");
    place.qemu_io(
        "src",
        &[
            "write -P 1 1M 2M",
            "write -P 0 4M 64k",
            "write -z 5M 64k",
            "write -P 2 8388096 512",
        ],
    );
    place.make("convert -O raw src raw");
    place.make("create -q -f raw small 1M");
    fs::write(place.path("odd"), [&b"abc"[..], &[0; 997]].concat()).unwrap();
    place.make("create -q -f qcow2 base 4M");
    place.qemu_io("base", &["write -P 5 0 2M"]);
    place.make("create -q -f qcow2 -b base -F qcow2 top 6M");
    let top = [
        "write -P 6 1M 64k",
        "write -z 128k 64k",
        "write -P 0 256k 64k",
    ];
    place.qemu_io("top", &top);
    place.make("create -q -f qcow2 -o data_file=e.raw ext 4M");
    place.qemu_io("ext", &["write -P 7 1M 1M"]);
    place.make("create -q -f qcow2 -o data_file=r.raw,data_file_raw=on rawext 4M");
    place.qemu_io("rawext", &["write -P 8 1M 1M"]);
    place.make("create -q -f qcow2 -o compat=0.10 v2 2M");
    place.qemu_io("v2", &["write -P 1 0 1M"]);
    targets(place);
}

/// What `-n` writes to.
fn targets(place: &Place) {
    place.make("create -q -f qcow2 tgt 8M");
    place.qemu_io("tgt", &["write -P 9 0 8M"]);
    fs::write(place.path("rtgt"), vec![9; 8 << 20]).unwrap();
}

/// Runs `line` with both programs; fails unless they answer the same, and have made disks of the
/// same content.
fn same(both: &Both, line: &str) {
    let line = format!("convert {line}");
    both.same(&line);
    let args = words(&line);
    let Some(target) = args
        .last()
        .filter(|target| ["out", "tgt", "rtgt"].contains(target))
    else {
        return;
    };
    let [expected, found] = [&both.qemu, &both.tandem].map(|place| place.path(target));
    // QEMU leaves what it has begun to make.
    if !found.exists() {
        return;
    }
    let format = match args.iter().position(|arg| *arg == "-O") {
        Some(at) => args[at + 1],
        None => "raw",
    };
    if format == "qcow2" {
        both.tandem.make(&format!("check -q -f qcow2 {target}"));
        // Data files are named relative to the directory of the program.
        both.each(|place| place.make("convert -f qcow2 -O raw out content"));
        both.same_bytes("content");
    } else {
        assert!(
            fs::read(found).unwrap() == fs::read(expected).unwrap(),
            "{line}"
        );
    }
}

fn all_same(prepare: impl Fn(&Place) + Sync, lines: &[&str]) {
    let both = Both::new(prepare);
    for line in lines {
        same(&both, line);
    }
}

#[test]
fn options_that_are_wrong() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "",
        "a",
        "a b",
        "src",
        "-O foo src out",
        "-f foo src out",
        "-S 1000 src out",
        "-S 17M src out",
        "-S x src out",
        "-S -1 src out",
        "-S",
        "-m 0 src out",
        "-m 17 src out",
        "-m x src out",
        "-r x src out",
        "-r -5 src out",
        "-C -c -O qcow2 src out",
        "-C -S 4k src out",
        "-C --salvage src out",
        "--skip-broken-bitmaps src out",
        "--target-image-opts src out",
        "--target-is-zero src out",
        "-n -o size=1 src tgt",
        "-n src small",
        "-n src missing",
        "-n -O qcow2 src missing",
        "-n -O foo src tgt",
        "-n -O qcow2 src small",
        "-n -c src rtgt",
        "-c src out",
        "-c -O qcow2 -o preallocation=metadata src out",
        "-B base -F qcow2 top out",
        "-F qcow2 top out",
        "-F qcow2 -O qcow2 top out",
        "-B base -O qcow2 top out",
        "-o backing_file=base -O qcow2 top out",
        "-B base -F foo -O qcow2 top out",
        "-B base -F qcow2 -O qcow2 top src out",
        "-B base -O qcow2 top src out",
        "-B base -F qcow2 -o preallocation=metadata -O qcow2 top out",
        "-l none src out",
        "-l none raw out",
        "-l none ext out",
        "-l first missing src out",
        "-l snapshot.id=1,foo=2 src out",
        "-l snapshot.foo=2 src out",
        "-l snapshot.name=first raw out",
        "-l",
        "-o foo=1 src out",
        "-O qcow2 -o cluster_size=3000 src out",
        "-O qcow2 -o data_file_raw=on src out",
        "-O qcow2 -o ,x src out",
        "-O qcow2 -o '' src out",
        "-T foo src out",
        "src src",
        "-O qcow2 src src",
        "-n -O qcow2 src src",
        "src nodir/out",
        "-O qcow2 src nodir/out",
        "-x src out",
        "--foo src out",
        "--target-i src out",
        "--image-opts -f raw raw out",
        "--image-opts src out",
        "--image-opts driver=qcow2,file.filename=nope out",
        "-n --target-image-opts -O raw src driver=raw,file.filename=rtgt",
        "-U --image-opts driver=qcow2,file.filename=src,force-share=off out",
        "--bitmaps raw out",
        "--bitmaps -O qcow2 v2 out",
        "--bitmaps src raw out",
        "-O",
        "src ''",
        "'' out",
    ] {
        both.same(&format!("convert {line}"));
    }
    assert!(both.tandem.content() == before);
}

/// QEMU has created the target by then.
#[test]
fn nothing_is_created_for_what_cannot_be_done() {
    let both = Both::new(images);
    let before = both.tandem.content();
    for line in [
        "-t foo src out",
        "-B nope -F qcow2 -O qcow2 top out",
        "-o preallocation=metadata src out",
        "--bitmaps src out",
        "--bitmaps -O qcow2 -o compat=0.10 src out",
    ] {
        both.same(&format!("convert {line}"));
    }
    assert!(both.tandem.content() == before);
}

#[test]
fn formats_and_options_of_the_target() {
    all_same(
        images,
        &[
            "src out",
            "-f raw src out",
            "-- src out",
            "-q -U src out",
            "-O qcow2 src out",
            "-f raw -O qcow2 src out",
            "-O qcow2 v2 out",
            "ext out",
            "rawext out",
            "top out",
            "-O qcow2 top out",
            "-O qcow2 ext out",
            "-O qcow2 -o data_file=o.raw src out",
            "-O qcow2 -o data_file=o.raw ext out",
            "-O qcow2 -o data_file=o.raw,data_file_raw=on src out",
            "-O qcow2 -o data_file=o.raw,data_file_raw=on -S 0 src out",
            "-O qcow2 -o data_file=o.raw,data_file_raw=on,preallocation=falloc src out",
            "-O qcow2 -o preallocation=metadata src out",
            "-O qcow2 -o preallocation=full src out",
            "-o preallocation=full src out",
            "-o preallocation=falloc src out",
            "-O qcow2 -o cluster_size=512 src out",
            "-O qcow2 -o cluster_size=2M src out",
            "-O qcow2 -o extended_l2=on src out",
            "-O qcow2 -o compat=0.10 src out",
            "-O qcow2 -o lazy_refcounts=on src out",
            "-O qcow2 -o refcount_bits=1 src out",
            // The size is that of the source.
            "-O qcow2 -o size=1M src out",
            "-o size=100M src out",
            "--image-opts driver=qcow2,file.filename=src out",
            "--image-opts driver=raw,file.filename=raw -O qcow2 out",
        ],
    );
}

#[test]
fn ways_to_copy() {
    all_same(
        images,
        &[
            "-S 0 src out",
            "-S 0 -O qcow2 src out",
            "-S 512 -O qcow2 src out",
            "-S 64k -O qcow2 src out",
            "-S 12k -O qcow2 raw out",
            "-S 16M src out",
            "-m 0x4 src out",
            "-m 1 -O qcow2 src out",
            "-m 16 -W -O qcow2 src out",
            "-W src out",
            "-r 100M src out",
            "-r 0 -O qcow2 src out",
            "-C src out",
            "-C raw out",
            "-C top out",
            "-C -f raw -O qcow2 raw out",
            "-C -O qcow2 -o data_file=o.raw,data_file_raw=on src out",
            "--salvage src out",
            "-t writethrough src out",
            "-t none -O qcow2 src out",
            "-T none -t directsync src out",
            "-t unsafe src out",
            "-c -O qcow2 src out",
            "-c -O qcow2 -o cluster_size=4k src out",
            "-c -O qcow2 -o cluster_size=2M src out",
            "-c -O qcow2 -o compression_type=zstd src out",
            "-c -O qcow2 -o preallocation=off src out",
            "-c -S 0 -O qcow2 src out",
            "-c -m 1 -W -O qcow2 src out",
        ],
    );
}

/// Eight disks of two exbibytes have as many bytes as do not fit into 64 bits.
#[test]
fn sources_that_are_too_large_together() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 -o cluster_size=2M huge 2E");
    for format in ["raw", "qcow2"] {
        let line = format!("convert -O {format} {} out", ["huge"; 8].join(" "));
        let run = place.run(&words(&line));
        let message = "qemu-img: The sources together are too large for a disk\n";
        assert_eq!((run.status, &*run.stderr), (Some(1), message), "{line}");
        assert!(!place.path("out").exists());
    }
}

#[test]
fn several_sources() {
    all_same(
        images,
        &[
            "odd out",
            "-O qcow2 odd out",
            "odd small out",
            "-O qcow2 odd odd out",
            "-f raw small small out",
            "-O qcow2 src small raw out",
            "-c -O qcow2 odd raw small out",
            "-c -O qcow2 -o cluster_size=512 odd raw odd out",
            "-C odd raw top out",
            "-p src raw small out",
        ],
    );
}

#[test]
fn progress() {
    all_same(
        images,
        &[
            "-p src out",
            "-p -q src out",
            "-p -S 0 src out",
            "-p -c -O qcow2 src out",
            "-p -W -m 2 src out",
            "-p -O qcow2 -B base -F qcow2 top out",
            "-p small out",
            "-p missing out",
        ],
    );
}

#[test]
fn onto_a_backing_file() {
    all_same(
        images,
        &[
            "-O qcow2 -B base -F qcow2 top out",
            "-O qcow2 -o backing_file=base,backing_fmt=qcow2 top out",
            "-O qcow2 -B base -F raw top out",
            "-O qcow2 -B base -F qcow2 src out",
            "-O qcow2 -B base -F qcow2 -S 0 top out",
            "-O qcow2 -B base -F qcow2 -c top out",
            "-O qcow2 -B small -F raw top out",
        ],
    );
}

/// Only what the top image has is copied, and the rest comes from the backing file.
#[test]
fn what_the_backing_file_has_is_not_copied() {
    let place = Place::tandem();
    images(&place);
    let made = place.run(&words("convert -O qcow2 -B base -F qcow2 top out"));
    assert_eq!(made.status, Some(0), "{}", made.stderr);
    for image in ["top", "out"] {
        let map = place.qemu_img(&words(&format!("map -f qcow2 --output=json {image}")));
        let own: Vec<&str> = map
            .stdout
            .lines()
            .filter(|line| line.contains("\"depth\": 0") && line.contains("\"data\": true"))
            .filter(|line| line.contains("\"start\": 1048576"))
            .collect();
        assert_eq!(own.len(), 1, "{image}: {}", map.stdout);
        assert!(map.stdout.contains("\"depth\": 1"), "{}", map.stdout);
    }
}

#[test]
fn onto_what_is_there() {
    let both = Both::new(images);
    let old = ["tgt", "rtgt"].map(|name| fs::read(both.qemu.path(name)).unwrap());
    for line in [
        "-n -O qcow2 src tgt",
        "-n -O qcow2 small tgt",
        "-n -O qcow2 odd tgt",
        "-n -O qcow2 --target-is-zero src tgt",
        "-n -O qcow2 -S 0 src tgt",
        "-n -O qcow2 -W -m 3 src tgt",
        "-n src rtgt",
        "-n odd rtgt",
        "-n -S 0 src rtgt",
        "-n --target-is-zero src rtgt",
        "-n -S 0 --target-is-zero src rtgt",
        "-n -C src rtgt",
        "-n -t none src rtgt",
        "-n --target-image-opts src driver=raw,file.filename=rtgt",
    ] {
        for place in [&both.qemu, &both.tandem] {
            fs::write(place.path("out"), &old[0]).unwrap();
            fs::write(place.path("rtgt"), &old[1]).unwrap();
        }
        same(&both, &line.replace(" tgt", " out"));
        both.same_bytes("rtgt");
    }
}

/// Zeros that are written are stored, or marked, as by QEMU.
#[test]
fn zeros_that_are_written() {
    let both = Both::new(|place| {
        images(place);
        place.make("create -q -f qcow2 empty 4M");
        place.make("create -q -f qcow2 -o compat=0.10 old 4M");
    });
    for (line, out) in [
        ("-c -S 0 -O qcow2 odd out", "out"),
        ("-c -S 0 -O qcow2 small out", "out"),
        ("-c -S 0 -O qcow2 top out", "out"),
        ("-n -O qcow2 small empty", "empty"),
        ("-n -O qcow2 small old", "old"),
    ] {
        let args = words(line);
        let args: Vec<_> = ["convert"].iter().chain(&args).copied().collect();
        let [expected, found] = [&both.qemu, &both.tandem].map(|place| {
            assert_eq!(place.run(&args).status, Some(0), "{line}");
            place.make(&format!("check -q {out}"));
            let map = place.qemu_img(&["map", "--output=json", out]).stdout;
            let pieces = map.lines().map(|line| line.split(", \"offset\"").next());
            pieces
                .map(|piece| piece.map(str::to_owned))
                .collect::<Vec<_>>()
        });
        assert_eq!(found, expected, "{line}");
    }
}

fn snapshots(place: &Place) {
    place.make("create -q -f qcow2 snap 4M");
    place.qemu_io("snap", &["write -P 1 0 1M"]);
    place.make("snapshot -c first snap");
    place.qemu_io("snap", &["write -P 2 512k 1M"]);
    place.make("snapshot -c 1 snap");
    place.qemu_io("snap", &["write -P 3 0 3M"]);
    place.make("create -q -f qcow2 src 1M");
}

#[test]
fn of_a_snapshot() {
    all_same(
        snapshots,
        &[
            "-l first snap out",
            "-l first -O qcow2 snap out",
            "-l first -c -O qcow2 snap out",
            // An ID comes before a name.
            "-l 1 snap out",
            "-l 2 snap out",
            "-l none snap out",
            "-l '' snap out",
            "-l snapshot.id=1 snap out",
            "-l snapshot.name=1 snap out",
            "-l snapshot.id=1,snapshot.name=first snap out",
            "-l snapshot.id=2,snapshot.name=first snap out",
            "-l snapshot.name=first snap src out",
            "-l first snap src out",
            "-l first --image-opts driver=qcow2,file.filename=snap out",
            "snap out",
        ],
    );
}

/// QEMU reads it with the size that the disk has now.
#[test]
fn a_snapshot_has_its_own_size() {
    let place = Place::tandem();
    snapshots(&place);
    place.make("convert -l first snap expected");
    place.make("resize -q snap 6M");
    let made = place.run(&words("convert -l first snap out"));
    assert_eq!(made.status, Some(0), "{}", made.stderr);
    assert!(fs::read(place.path("out")).unwrap() == fs::read(place.path("expected")).unwrap());
}

fn bitmaps(place: &Place) {
    place.make("create -q -f qcow2 bm 4M");
    place.make("bitmap --add -g 32k bm b0");
    place.make("bitmap --add bm b1");
    place.qemu_io("bm", &["write -P 1 1M 100k"]);
    place.make("bitmap --disable bm b1");
    place.make("create -q -f qcow2 larger 8M");
    place.make("create -q -f qcow2 has 4M");
    place.make("bitmap --add has b1");
    place.make("create -q -f qcow2 -o compat=0.10 v2 4M");
    place.make("create -q -f raw raw 4M");
}

#[test]
fn with_bitmaps() {
    let both = Both::new(bitmaps);
    for line in [
        "--bitmaps -O qcow2 bm out",
        "--bitmaps --skip-broken-bitmaps -O qcow2 bm out",
        "--bitmaps -O qcow2 -o data_file=o.raw bm out",
    ] {
        same(&both, line);
        both.same("bitmap --merge b0 -b out -F qcow2 out b1");
        let info = |place: &Place| {
            let info = place.qemu_img(&words("info out")).stdout;
            let lines = info.lines().filter(|line| !line.contains("disk size"));
            let lines = lines.filter(|line| !line.contains("file length"));
            lines.collect::<Vec<_>>().join("\n")
        };
        assert_eq!(info(&both.tandem), info(&both.qemu), "{line}");
        assert!(info(&both.tandem).contains("granularity: 32768"));
    }
    for line in [
        "--bitmaps -n -O qcow2 bm larger",
        "--bitmaps -n -O qcow2 bm has",
        "--bitmaps -n -O qcow2 bm v2",
        "--bitmaps -n bm raw",
    ] {
        both.same(&format!("convert {line}"));
    }
}

/// A process that was killed has left a bitmap that nobody may use.
#[test]
fn broken_bitmaps() {
    let both = Both::new(|place| {
        bitmaps(place);
        let mut image = fs::read(place.path("bm")).unwrap();
        let extension = 0x2385_2875u32.to_be_bytes();
        let at = image
            .windows(4)
            .position(|bytes| bytes == extension)
            .unwrap();
        let directory = u64::from_be_bytes(*image[at + 24..].first_chunk().unwrap()) as usize;
        let names = image[directory..].windows(2);
        let name = directory + names.clone().position(|name| name == b"b0").unwrap();
        // Behind the entry's fixed part of 24 bytes, in which the flags end at byte 16.
        image[name - 24 + 15] |= 1;
        fs::write(place.path("bm"), image).unwrap();
    });
    for line in [
        "--bitmaps -O qcow2 bm out",
        "--bitmaps --skip-broken-bitmaps -O qcow2 bm out",
    ] {
        both.same(&format!("convert {line}"));
    }
    let info = both.tandem.qemu_img(&words("info out")).stdout;
    assert!(
        info.contains("name: b1") && !info.contains("name: b0"),
        "{info}"
    );
}

/// What cannot be read is told, and left out with `--salvage`.
#[test]
fn salvage() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 damaged 1M");
    place.qemu_io("damaged", &["write -P 1 0 192k"]);
    let mut image = fs::read(place.path("damaged")).unwrap();
    // The entry of the second cluster leads far behind the end of the file.
    let table = 0x40000 + 8;
    image[table + 2] = 0x7f;
    fs::write(place.path("damaged"), image).unwrap();
    for (options, status) in [("", 1), ("--salvage", 0), ("--salvage -q", 0)] {
        let run = place.run(&words(&format!("convert {options} damaged out")));
        assert_eq!(run.status, Some(status), "{options}: {}", run.stderr);
        assert_eq!(
            run.stderr.is_empty(),
            options.ends_with("-q"),
            "{}",
            run.stderr
        );
        assert_eq!(place.path("out").exists(), status == 0);
    }
    let salvaged = fs::read(place.path("out")).unwrap();
    let cluster = |index: usize| &salvaged[index << 16..(index + 1) << 16];
    assert!(cluster(0).iter().all(|byte| *byte == 1));
    assert!(cluster(1).iter().all(|byte| *byte == 0));
    assert!(cluster(2).iter().all(|byte| *byte == 1));
}

/// Nothing is written to a target that is there before all of the source has been looked at.
#[test]
fn a_damaged_source_leaves_what_is_there() {
    let both = Both::new(|place| {
        place.make("create -q -f qcow2 damaged 8M");
        place.qemu_io("damaged", &["write -P 1 0 8M"]);
        let mut image = fs::read(place.path("damaged")).unwrap();
        // The entry of the last cluster leads into the middle of one.
        image[0x40000 + 127 * 8 + 6] |= 2;
        fs::write(place.path("damaged"), image).unwrap();
        targets(place);
    });
    for place in [&both.qemu, &both.tandem] {
        let run = place.run(&words("convert -n damaged rtgt"));
        assert_eq!(run.status, Some(1), "{}", run.stderr);
        let target = fs::read(place.path("rtgt")).unwrap();
        assert!(target.iter().all(|byte| *byte == 9));
    }
    // What is before it does not fail.
    for place in [&both.qemu, &both.tandem] {
        let run = place.run(&words("convert damaged new"));
        let place = "error while reading block status at offset 8323072: ";
        assert!(run.stderr.contains(place), "{}", run.stderr);
    }
}

/// A rate that makes the copy take a while.
#[test]
fn rate_limit() {
    let place = Place::tandem();
    fs::write(place.path("raw"), vec![1; 6 << 20]).unwrap();
    let start = std::time::Instant::now();
    let run = place.run(&words("convert -f raw -r 10M raw out"));
    assert_eq!(run.status, Some(0), "{}", run.stderr);
    // The last piece need not wait for itself.
    assert!(start.elapsed().as_millis() >= 350, "{:?}", start.elapsed());
}
