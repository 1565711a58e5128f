//! `bitmap`: the same answers, bitmaps that QEMU reads as its own, and nothing half-made.

use std::fs;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::run::{Both, Place, Run, words};

/// Kinds of images that have bitmaps: name, options.
const KINDS: [(&str, &str); 6] = [
    ("plain", ""),
    ("small", "-o cluster_size=512"),
    ("large", "-o cluster_size=2M,extended_l2=on"),
    ("external", "-o data_file=external.d"),
    ("raw-data", "-o data_file=raw-data.d,data_file_raw=on"),
    ("overlay", "-b base -F raw"),
];

fn images(place: &Place) {
    place.make("create -q -f raw base 8M");
    for (name, options) in KINDS {
        place.make(&format!("create -q -f qcow2 {options} {name} 8M"));
    }
    place.make("create -q -f qcow2 -o compat=0.10 v2 8M");
    place.make("create -q -f qcow2 other 8M");
    place.make("create -q -f qcow2 short 7M");
    place.make("bitmap --add -g 64k other full");
    place.make("bitmap --add -g 1M other coarse");
    place.make("bitmap --add short full");
    place.qemu_io(
        "other",
        &["write 0 64k", "write 3M 700k", "write 8380416 8k"],
    );
    place.qemu_io("short", &["write 0 1M"]);
}

/// Runs `line` with both programs, whose answers must be the same but for QEMU's name of the image.
fn same(both: &Both, line: &str) -> Run {
    let args = words(line);
    let [expected, found] = both.each(|place| place.run(&args));
    let file = args.get(args.len().saturating_sub(2)).unwrap_or(&"");
    let node = expected.stderr.split("#block").nth(1);
    let digits = node.map_or("", |node| &node[..node.find(['\'', ':']).unwrap()]);
    let expected = Run {
        stderr: expected.stderr.replace(&format!("#block{digits}"), file),
        ..expected
    };
    assert_eq!(found, expected, "{line}");
    found
}

/// What QEMU tells of the bitmaps of `image`.
fn listed(place: &Place, image: &str) -> serde_json::Value {
    let info = place.qemu_img(&["info", "--output=json", image]);
    assert_eq!((info.status, &*info.stderr), (Some(0), ""), "{image}");
    let info: serde_json::Value = serde_json::from_str(&info.stdout).unwrap();
    info["format-specific"]["data"]["bitmaps"].clone()
}

/// Stops when it is dropped.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Serves `image` at `socket`.
fn serve(place: &Place, args: &[&str], image: &str) -> Server {
    let socket = place.path("socket");
    let _ = fs::remove_file(&socket);
    let server = Command::new("qemu-nbd")
        .args(args)
        .args(["-t", "-k"])
        .args([&socket, &place.path(image)])
        .current_dir(place.path(""))
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    let server = Server(server);
    let start = Instant::now();
    while !socket.exists() {
        assert!(
            start.elapsed() < Duration::from_secs(20),
            "{image} {args:?}"
        );
        std::thread::sleep(Duration::from_millis(2));
    }
    server
}

/// What QEMU reads from a bitmap, which does not follow changes: its map of where bits are set.
fn bits(place: &Place, image: &str, bitmap: &str) -> String {
    let _server = serve(place, &["-r", "-f", "qcow2", "-B", bitmap], image);
    let source = format!(
        "driver=nbd,server.type=unix,server.path=socket,x-dirty-bitmap=qemu:dirty-bitmap:{bitmap}"
    );
    let map = place.qemu_img(&["map", "--output=json", "--image-opts", &source]);
    assert_eq!((map.status, &*map.stderr), (Some(0), ""));
    map.stdout
}

/// The image is what both programs call sound.
fn sound(place: &Place, image: &str) {
    place.make(&format!("check -q -f qcow2 {image}"));
    let checked = place.run(&["check", "-q", "-f", "qcow2", image]);
    assert_eq!((checked.status, &*checked.stderr), (Some(0), ""), "{image}");
}

#[test]
fn what_qemu_reads() {
    let both = Both::in_memory(images);
    for (image, _) in KINDS {
        for line in [
            format!("--add -f qcow2 {image} a"),
            format!("--add -g 4k {image} b"),
            format!("--add -g 2M --disable {image} c"),
        ] {
            assert_eq!(same(&both, &format!("bitmap {line}")).status, Some(0));
        }
        let writes = ["write 100k 300k", "write -z 5M 64k", "write 7M 5k"];
        both.each(|place| place.qemu_io(image, &writes));
        for line in [
            format!("--add --merge a --merge b --disable {image} d"),
            format!("--merge coarse -b other -F qcow2 {image} b"),
            format!("--merge full --merge coarse -b other --disable {image} c"),
            format!("--disable {image} a"),
            format!("--enable --disable {image} b"),
            format!("--merge a {image} a"),
            format!("--add --image-opts driver=qcow2,file.filename={image} e"),
            format!("--remove {image} e"),
            format!("--enable {image} d"),
            format!("--clear --merge c --disable {image} d"),
        ] {
            assert_eq!(same(&both, &format!("bitmap {line}")).status, Some(0));
            let [expected, found] = both.each(|place| listed(place, image));
            assert_eq!(found, expected, "{line}");
            both.tandem.make(&format!("check -q -f qcow2 {image}"));
        }
        sound(&both.tandem, image);
        for bitmap in ["a", "b", "c", "d"] {
            let [expected, found] = both.each(|place| bits(place, image, bitmap));
            assert!(expected.contains("\"present\": true"));
            assert_eq!(found, expected, "{image} {bitmap}");
        }
        for bitmap in ["b", "a", "d", "c"] {
            same(&both, &format!("bitmap --clear {image} {bitmap}"));
            same(&both, &format!("bitmap --remove {image} {bitmap}"));
        }
        assert!(listed(&both.tandem, image).is_null());
        sound(&both.tandem, image);
        both.tandem
            .make(&format!("compare -f qcow2 -F qcow2 {image} {image}"));
    }
}

/// Tables and bits are shorter than their clusters, which have held other things.
#[test]
fn large_clusters_that_are_used_again() {
    let both = Both::in_memory(|place| {
        place.make("create -q -f qcow2 -o cluster_size=2M image 16M");
        place.qemu_io_as("qcow2", "image", &["write 0 16M", "discard 0 16M"]);
        // What lies behind the header and the tables is free, and holds anything.
        let path = place.path("image");
        let mut bytes = fs::read(&path).unwrap();
        bytes.resize(26 << 20, 0);
        bytes[10 << 20..].fill(0xee);
        fs::write(&path, bytes).unwrap();
        place.make("check -q image");
    });
    same(&both, "bitmap --add -g 4k image a");
    for place in [&both.qemu, &both.tandem] {
        place.qemu_io("image", &["write 3M 100k", "write 15M 64k"]);
    }
    same(&both, "bitmap --add --merge a image b");
    same(&both, "bitmap --add -g 64k --merge a --merge b image c");
    sound(&both.tandem, "image");
    for bitmap in ["a", "b", "c"] {
        let [expected, found] = [&both.qemu, &both.tandem].map(|p| bits(p, "image", bitmap));
        assert!(expected.contains("\"present\": true"));
        assert_eq!(found, expected, "{bitmap}");
    }
}

/// QEMU keeps up what Tandem has added, and the other way round.
#[test]
fn both_follow_changes() {
    let both = Both::in_memory(images);
    for (image, _) in KINDS {
        both.tandem
            .run(&["bitmap", "--add", "-g", "4k", image, "a"]);
        both.tandem
            .qemu_io(image, &["write 64k 4k", "write 1M 64k"]);
        both.tandem.make(&format!("bitmap --add -g 4k {image} b"));
        both.tandem
            .run(&["resize", "-q", "-f", "qcow2", image, "9M"]);
        both.tandem.qemu_io(image, &["write 8M 4k"]);
        for bitmap in ["a", "b"] {
            both.tandem.run(&["bitmap", "--disable", image, bitmap]);
        }
        let [a, b] = ["a", "b"].map(|bitmap| bits(&both.tandem, image, bitmap));
        let count = |map: &str| map.matches("\"data\": false").count();
        assert_eq!((count(&a), count(&b)), (3, 1), "{image}: {a} {b}");
        sound(&both.tandem, image);
    }
}

#[test]
fn fails_the_same() {
    let both = Both::new(|place| {
        images(place);
        place.make("bitmap --add plain a");
        // QEMU opens it again for this.
        mark_in_use(place, "other");
    });
    let before = both.tandem.content();
    let long = "x".repeat(1024);
    for line in [
        "",
        "plain a",
        "--add",
        "--add plain",
        "--add plain b c",
        "--add plain ''",
        "--add missing b",
        "--add v2 b",
        "--add plain a",
        "--add -f foo plain b",
        "--add -f qcow2 --image-opts driver=qcow2,file.filename=plain b",
        "--add --image-opts driver=qcow2,file.filename=missing b",
        "--merge a --image-opts driver=raw,file.filename=base b",
        "--merge a --image-opts driver=qcow2,file.filename=plain b",
        "--add -f raw base b",
        "--add base b",
        "--add -f raw base ''",
        "--add -g 3k -f raw base b",
        "--remove base b",
        "--clear -f raw base b",
        "--enable -f raw base b",
        "--disable -f raw base b",
        "--merge a -f raw base b",
        "--add -g 3k plain b",
        "--add -g 256 plain b",
        "--add -g 1 plain b",
        "--add -g 4G plain b",
        "--add -g -1 plain b",
        "--add -g x plain b",
        "--add -g 8E plain b",
        "--add -g '' plain b",
        "--add -g",
        "--add --granularity",
        "--add=x plain b",
        "--clear -g 64k plain a",
        "--clear -F raw plain a",
        "--clear -b plain plain a",
        "--clear -b other -F qcow2 plain a",
        "--remove plain b",
        "--clear plain b",
        "--enable plain b",
        "--disable plain b",
        "--merge a plain b",
        "--merge b plain a",
        "--merge",
        "--merge a -b missing plain a",
        "--merge a -b base plain a",
        "--merge a -b base -F raw plain a",
        "--merge a -b plain plain a",
        "--merge a -b other plain a",
        "--merge a -b other plain b",
        "--merge full -b short plain a",
        "--merge full -b other -F foo plain a",
        // Those of `other` are inconsistent.
        "--merge full -b other plain a",
        "--merge full -b other plain b",
        "--clear other full",
        "--enable other full",
        "--disable other full",
        "--merge coarse other full",
        "--merge full other full",
        "--add other full",
        "--frobnicate plain a",
        "--e plain b",
        "--m plain a",
        "-x plain a",
        "-q --add plain b",
        "-U --add plain b",
    ] {
        let run = same(&both, &format!("bitmap {line}"));
        assert_eq!(run.status, Some(1), "{line}");
    }
    same(&both, &format!("bitmap --add plain {long}"));
    assert!(both.tandem.content() == before);
    for line in [
        format!("--add plain {}", &long[1..]),
        "--remove other full".to_owned(),
        "--add -g 0 other full".to_owned(),
        "--rem other full".to_owned(),
        "--dis plain a".to_owned(),
        "--add -g 2G plain huge".to_owned(),
    ] {
        assert_eq!(same(&both, &format!("bitmap {line}")).status, Some(0));
    }
    for image in ["plain", "other"] {
        assert_eq!(listed(&both.tandem, image), listed(&both.qemu, image));
        sound(&both.tandem, image);
    }
}

/// Marks the bitmaps of an image as in use, as a crash does.
fn mark_in_use(place: &Place, image: &str) {
    let path = place.path(image);
    let mut bytes = fs::read(&path).unwrap();
    for name in [&b"full"[..], b"coarse"] {
        // The name follows the fixed fields of the entry, whose length is among them. There are old
        // directories, too.
        for at in 24..bytes.len() - name.len() {
            if bytes[at..].starts_with(name) && bytes[at - 5] == name.len() as u8 {
                bytes[at - 24 + 15] |= 1;
            }
        }
    }
    fs::write(path, bytes).unwrap();
}

/// QEMU does what comes before the mistake.
#[test]
fn all_or_nothing() {
    let place = Place::tandem();
    images(&place);
    place.make("bitmap --add plain a");
    for line in [
        "--clear --disable --add plain a",
        "--add --merge a --merge b plain c",
        "--add --merge a --merge full -b short plain a",
    ] {
        let before = place.content();
        let failed = place.run(&words(&format!("bitmap {line}")));
        assert_eq!(failed.status, Some(1), "{line}");
        assert!(place.content() == before, "{line}");
    }
}

/// Bitmaps of which together there would be too much, or too many.
#[test]
fn limits() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 huge 2T");
    let run = |line: &str| place.run(&words(&format!("bitmap {line}")));
    for name in ["a", "b"] {
        assert_eq!(run(&format!("--add -g 512 huge {name}")).status, Some(0));
    }
    assert_eq!(
        run("--add -g 512 huge c").stderr,
        "qemu-img: Operation add on bitmap c failed: Can't make bitmap 'c' persistent in 'huge': \
         The bitmaps are too large together. Use larger granularity\n"
    );
    place.make("check -q huge");
    let both = Both::new(|place| place.make("create -q -f qcow2 huge 4T"));
    same(&both, "bitmap --add -g 512 huge a");
    same(&both, "bitmap --add -g 1k huge a");
}

/// An image whose bitmaps a program without support for them has left behind.
fn stale(place: &Place) {
    place.make("create -q -f qcow2 image 1M");
    place.make("bitmap --add image old");
    let path = place.path("image");
    let mut bytes = fs::read(&path).unwrap();
    bytes[95] &= !1;
    fs::write(&path, bytes).unwrap();
}

/// Whoever opens the image is told, once.
#[test]
fn stale_bitmaps_are_told_of() {
    let both = Both::new(|place| {
        stale(place);
        place.make("create -q -f raw raw 1M");
    });
    for line in [
        "map image",
        "check image",
        "measure -O raw image",
        "compare image raw",
        "compare raw image",
        "convert -O raw image copy",
        "snapshot -l image",
        "map --image-opts driver=qcow2,file.filename=image",
        "map -f raw image",
        "map -f foo image",
        // QEMU drops them when it opens the image for writing.
        "resize -q image 1M",
    ] {
        both.same(line);
    }
}

#[test]
fn stale_bitmaps_make_room() {
    let place = Place::tandem();
    stale(&place);
    assert_eq!(
        place.run(&["bitmap", "--add", "image", "new"]).status,
        Some(0)
    );
    let list = listed(&place, "image");
    assert_eq!(list.as_array().unwrap().len(), 1);
    assert_eq!(list[0]["name"], "new");
    place.make("check -q -r leaks image");
    sound(&place, "image");
}

/// The backing file is of no interest, the data file must be there.
#[test]
fn other_files() {
    let both = Both::new(|place| {
        images(place);
        fs::remove_file(place.path("base")).unwrap();
        fs::remove_file(place.path("raw-data.d")).unwrap();
        fs::create_dir(place.path("elsewhere")).unwrap();
    });
    for line in [
        "--add overlay a",
        "--merge a overlay a",
        "--merge a -b overlay plain a",
    ] {
        same(&both, &format!("bitmap {line}"));
    }
    both.tandem.make("create -q -f raw base 8M");
    sound(&both.tandem, "overlay");
    same(&both, "bitmap --add raw-data a");
    let place = &both.tandem;
    place.make("create -q -f qcow2 -o data_file=away.d elsewhere/image 1M");
    let run = |line: &str| place.run(&words(line));
    let refused = run("bitmap --add --follow=nothing elsewhere/image a");
    assert_eq!(refused.status, Some(1));
    assert_eq!(
        run("bitmap --add --follow=anywhere elsewhere/image a").status,
        Some(0)
    );
}

/// QEMU does not know such images.
#[test]
fn a_packed_data_file() {
    let place = Place::tandem();
    images(&place);
    let run = |line: &str| {
        let run = place.run(&words(line));
        assert_eq!((run.status, &*run.stderr), (Some(0), ""), "{line}");
        run.stdout
    };
    run("convert -O qcow2 -o data_file=p.d,data_file_layout=packed other packed");
    let before = fs::read(place.path("p.d")).unwrap();
    run("bitmap --add -g 64k packed a");
    run("bitmap --merge full --merge coarse -b other --disable packed a");
    run("bitmap --add -g 4k --merge a packed b");
    run("bitmap --remove packed a");
    let info = run("info packed");
    assert!(
        info.contains("name: b") && !info.contains("name: a"),
        "{info}"
    );
    run("check -q packed");
    assert!(fs::read(place.path("p.d")).unwrap() == before);
}
