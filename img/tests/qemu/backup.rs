//! `backup` and `restore`: by themselves, and next to what QEMU's programs make of the results.

use std::fs;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use rustix::io::ioctl_fionread;
use tandem_block::backup_stream::{Header, StreamWriter};

use crate::run::{Place, words};

/// Runs `tandem-img`, which must succeed and say nothing.
fn quietly(place: &Place, line: &str) {
    let run = place.run(&words(line));
    let said = (run.status, &*run.stdout, &*run.stderr);
    assert_eq!(said, (Some(0), "", ""), "{line}");
}

/// Runs `tandem-img`, which must fail with `text`.
fn refused(place: &Place, line: &str, text: &str) {
    let run = place.run(&words(line));
    assert_eq!(run.status, Some(1), "{line}: {}", run.stderr);
    assert!(run.stderr.contains(text), "{line}: {}", run.stderr);
}

/// What the disk in `image` reads as.
fn content(place: &Place, image: &str) -> Vec<u8> {
    place.make(&format!("convert -O raw {image} content"));
    fs::read(place.path("content")).unwrap()
}

fn bitmaps(place: &Place, image: &str) -> String {
    place.run(&words(&format!("info {image}"))).stdout
}

const CHANGES: [&[&str]; 2] = [
    &["write -P 5 1M 100k", "discard 5M 1M", "write -z 3M 64k"],
    &[
        "write -P 6 1000k 512",
        "write -P 7 8387072 512",
        "write -z 100k 1k",
    ],
];

/// A full backup and two increments, as a chain of images and as streams.
#[test]
fn full_and_increments() {
    let kinds = [
        "",
        "-o cluster_size=2M",
        "-o data_file=data,data_file_raw=on",
        "-o extended_l2=on",
    ];
    // Most of the time goes by waiting for the disk.
    std::thread::scope(|scope| {
        for options in kinds {
            scope.spawn(move || full_and_increments_of(options));
        }
    });
}

fn full_and_increments_of(options: &str) {
    let place = Place::tandem();
    place.make(&format!("create -q -f qcow2 {options} disk 8M"));
    let first = ["write -P 1 0 3M", "write -P 2 5M 2M", "write -z 7M 64k"];
    place.qemu_io("disk", &first);
    quietly(&place, "backup --track b disk 0.qcow2");
    quietly(&place, "backup --track s -O stream disk 0.stream");
    quietly(&place, "backup -O raw disk copy.raw");
    for (before, changes) in CHANGES.into_iter().enumerate() {
        place.qemu_io_as("qcow2", "disk", changes);
        let i = before + 1;
        quietly(&place, "backup --since b --keep -O raw -n disk copy.raw");
        let chain = format!("backup --since b -b {before}.qcow2 -F qcow2 disk {i}.qcow2");
        quietly(&place, &chain);
        let stream = format!("backup --since s -b {before}.stream -O stream disk {i}.stream");
        quietly(&place, &stream);
    }
    let expected = content(&place, "disk");
    place.make("check -q 2.qcow2");
    assert!(content(&place, "2.qcow2") == expected, "{options}");
    assert!(
        fs::read(place.path("copy.raw")).unwrap() == expected,
        "{options}"
    );
    let streams = "0.stream 1.stream 2.stream";
    quietly(&place, &format!("restore {streams} restored.raw"));
    assert!(
        fs::read(place.path("restored.raw")).unwrap() == expected,
        "{options}"
    );
    quietly(
        &place,
        &format!("restore -O qcow2 {streams} restored.qcow2"),
    );
    place.make("check -q restored.qcow2");
    assert!(content(&place, "restored.qcow2") == expected, "{options}");
    // Only what has changed is in the last one, in units of 64 KiB or clusters.
    let map = place.qemu_img(&words("map --output=json 2.qcow2")).stdout;
    let own = map.lines().filter(|line| line.contains("\"depth\": 0"));
    assert!((1..=3).contains(&own.count()), "{map}");
    // One more increment onto what has been restored.
    place.qemu_io("disk", &["write -P 9 2M 1M"]);
    quietly(
        &place,
        "backup --since s -b 2.stream -O stream disk 3.stream",
    );
    for (format, name) in [("raw", "restored.raw"), ("qcow2", "restored.qcow2")] {
        quietly(&place, &format!("restore -n -O {format} 3.stream {name}"));
        assert!(
            content(&place, name) == content(&place, "disk"),
            "{options}"
        );
    }
    place.make("check -q disk");
}

/// A disk that has become larger, or smaller, since the backup before.
#[test]
fn increments_of_disks_that_change_their_size() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 disk 1M");
    place.qemu_io("disk", &["write -P 1 0 1M"]);
    quietly(&place, "backup --track b -O stream disk 0.stream");
    quietly(&place, "backup -O raw disk copy.raw");
    let mut streams = "0.stream".to_owned();
    for (i, size) in [(1, "3M"), (2, "700k")] {
        place.run(&words(&format!("resize -q --shrink disk {size}")));
        place.qemu_io("disk", &["write -P 3 200k 4k"]);
        quietly(&place, "backup --since b --keep -n -O raw disk copy.raw");
        quietly(
            &place,
            &format!(
                "backup --since b -b {}.stream -O stream disk {i}.stream",
                i - 1
            ),
        );
        streams += &format!(" {i}.stream");
        quietly(&place, &format!("restore {streams} restored"));
        let expected = content(&place, "disk");
        assert!(
            fs::read(place.path("restored")).unwrap() == expected,
            "{size}"
        );
        assert!(
            fs::read(place.path("copy.raw")).unwrap() == expected,
            "{size}"
        );
    }
}

/// What goes wrong leaves the bitmap, and a file of the target's name, as they were.
#[test]
fn mistakes() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 disk 1M");
    place.make("create -q -f raw raw 1M");
    place.make("create -q -f qcow2 -o compat=0.10 old 1M");
    place.make("bitmap --add disk b");
    place.make("bitmap --add --disable disk off");
    place.qemu_io("disk", &["write -P 1 0 64k"]);
    fs::write(place.path("out"), "there").unwrap();
    let before = place.content();
    for (line, text) in [
        ("disk", "Expecting a disk and a target"),
        (
            "-O vdi disk out",
            "-O expects 'qcow2', 'raw' or 'stream', not 'vdi'",
        ),
        ("--since b --track c disk out", "exclude each other"),
        ("--keep disk out", "--keep is for"),
        (
            "--since b -O raw disk out",
            "a raw disk is never an increment alone",
        ),
        ("-n disk out", "-n is for a raw disk"),
        ("-b x disk out", "requires explicit backing format"),
        (
            "-b x -F qcow disk out",
            "Unknown backing file format 'qcow'",
        ),
        ("-F qcow2 disk out", "-F is for"),
        ("-O raw -b x -F raw disk out", "no backing file"),
        ("-O stream -b x disk out", "only an increment"),
        (
            "--resume 00112233445566778899aabbccddeeff out",
            "--resume needs --from",
        ),
        (
            "--resume 00112233445566778899aabbccddeeff --from 0 out",
            "--resume is for",
        ),
        ("--from 0 disk out", "--from is for"),
        ("--cancel 1 --control s", "'1' is no name of a backup"),
        ("--scratch . disk out", "only the backup of a running disk"),
        (
            "--control nowhere vda out",
            "Could not connect to 'nowhere'",
        ),
        (
            "--since x disk out",
            "Could not open 'disk': Dirty bitmap 'x' not found",
        ),
        ("--since off disk out", "'off' does not follow changes"),
        ("--track off disk out", "'off' does not follow changes"),
        ("--track b -f raw raw out", "no place for bitmaps"),
        (
            "--track b old out",
            "Cannot store dirty bitmaps in qcow2 v2",
        ),
        (
            "--since b -O stream -b out disk new",
            "'out': this is no stream of a backup",
        ),
        (
            "--since b -O stream -b none disk new",
            "'none': No such file",
        ),
        ("--since b disk none/out", "Could not create 'none/out'"),
        ("--since b disk disk", "lock"),
        ("-p -O stream disk -", "-p prints to standard output"),
        ("missing out", "Could not open 'missing'"),
    ] {
        refused(&place, &format!("backup {line}"), text);
        assert!(place.content() == before, "{line}");
    }
}

#[test]
fn streams_that_do_not_fit() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 disk 4M");
    place.qemu_io("disk", &["write -P 1 0 4M"]);
    quietly(&place, "backup --track b -O stream disk 0");
    place.qemu_io("disk", &["write -P 2 1M 1M"]);
    quietly(&place, "backup --since b -b 0 -O stream disk 1");
    place.qemu_io("disk", &["write -P 3 0 64k"]);
    quietly(&place, "backup --since b -O stream disk 2");
    let expected = content(&place, "disk");
    let whole = fs::read(place.path("0")).unwrap();
    fs::write(place.path("cut"), &whole[..whole.len() - 100_000]).unwrap();
    let mut damaged = fs::read(place.path("1")).unwrap();
    damaged[5000] ^= 1;
    fs::write(place.path("damaged"), damaged).unwrap();
    fs::write(place.path("empty"), "").unwrap();
    fs::write(place.path("out"), "there").unwrap();
    quietly(&place, "restore 0 base.raw");
    let before = place.content();
    for (line, text) in [
        ("0", "Expecting streams and a target"),
        ("-O vdi 0 out", "Unknown file format"),
        (
            "1 out",
            "'1': this is an increment; the full backup comes first",
        ),
        ("0 1 0 out", "'0': this is a full backup, which comes first"),
        ("-n 2 1 base.raw", "'1': this goes on from backup"),
        (
            "cut out",
            "'cut': the stream ends before it is whole; it is good up to offset 3145728 of the disk",
        ),
        ("cut 1 out", "it is good up to offset 3145728"),
        (
            "0 damaged out",
            "'damaged': the stream is damaged, and good up to offset",
        ),
        ("-n damaged base.raw", "'damaged': the stream is damaged"),
        ("-n 1 cut base.raw", "'cut': this is a full backup"),
        ("-n cut base.raw", "it is good up to offset 3145728"),
        ("empty out", "'empty': there is no stream in it"),
        ("out new", "'out': this is no stream of a backup"),
        ("missing out", "'missing': No such file"),
        ("-n 1 missing.raw", "Could not open 'missing.raw'"),
    ] {
        refused(&place, &format!("restore {line}"), text);
        assert!(place.content() == before, "{line}");
    }
    // Nothing says what the last one goes on from.
    let run = place.run(&words("restore 0 1 2 out"));
    assert_eq!(run.status, Some(0));
    assert!(
        run.stderr.contains("warning: it is not known"),
        "{}",
        run.stderr
    );
    assert!(fs::read(place.path("out")).unwrap() == expected);
    quietly(&place, "restore -q 0 1 2 out");
    for line in ["-p 0 out", "-p -n 1 base.raw"] {
        let shown = place.run(&words(&format!("restore {line}"))).stdout;
        assert!(shown.ends_with("(100.00/100%)\r\n"), "{shown}");
        // What is read beforehand is no progress.
        let steps = shown.matches("(100.00/100%)").count();
        assert!(steps <= 2, "{shown}");
    }
    assert!(bitmaps(&place, "disk").contains("name: b"));
}

/// What no record of a full backup tells is zero, whatever the target held.
#[test]
fn what_a_full_backup_does_not_tell_is_zero() {
    let place = Place::tandem();
    let header = Header {
        id: [1; 16].into(),
        is_incremental: false,
        base: None,
        size: 1 << 20,
        granularity: 65536,
        start: 0,
        bitmap: Vec::new(),
    };
    let mut stream = StreamWriter::new(Vec::new(), &header).unwrap();
    stream.data(65536, &[1; 65536]).unwrap();
    fs::write(place.path("stream"), stream.finish().unwrap()).unwrap();
    let mut expected = vec![0; 1 << 20];
    expected[65536..131_072].fill(1);
    fs::write(place.path("old"), [2; 1 << 20]).unwrap();
    quietly(&place, "restore -n stream old");
    quietly(&place, "restore stream new");
    for name in ["old", "new"] {
        assert!(fs::read(place.path(name)).unwrap() == expected, "{name}");
    }
}

/// All of the stream fits into the pipe, and nobody takes it out.
#[test]
fn a_reader_that_goes_behind_the_last_byte_is_missed() {
    let place = Place::tandem();
    place.make("create -q -f qcow2 disk 32k");
    place.qemu_io("disk", &["write -P 5 0 32k"]);
    quietly(&place, "backup -O stream disk all");
    let all = fs::metadata(place.path("all")).unwrap().len();
    let mut child = place.command(&words("backup --track b -O stream disk -"));
    let child = child.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = child.spawn().unwrap();
    let pipe = child.stdout.take().unwrap();
    let start = Instant::now();
    // The name of the bitmap, of one byte, is in it, too.
    while ioctl_fionread(&pipe).unwrap() <= all {
        assert!(start.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(2));
    }
    drop(pipe);
    let output = child.wait_with_output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(said.contains("Broken pipe"), "{said}");
    assert!(!bitmaps(&place, "disk").contains("bitmaps"));
}
