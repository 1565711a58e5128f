//! `create -o data_file_reuse=…`

use std::fs;
use std::io::Write;
use std::process::{Command, Stdio};

use crate::run::{Place, len, words};

const KEEP: &str = "create -q -f qcow2 -o data_file=old,data_file_raw=on,data_file_reuse=keep";

/// A raw disk with something in every cluster.
fn old(place: &Place, size: usize) -> Vec<u8> {
    let content: Vec<u8> = (0..size).map(|i| (i / 512 % 251) as u8 + 1).collect();
    fs::write(place.path("old"), &content).unwrap();
    content
}

fn run(place: &Place, line: &str) -> String {
    let run = place.run(&words(line));
    assert_eq!((run.status, &*run.stderr), (Some(0), ""), "{line}");
    run.stdout
}

/// Both programs find the image sound, and `size` bytes of `content` in it.
fn assert_shows(place: &Place, content: &[u8], size: usize) {
    for check in [place.qemu_img(&["check", "t"]), place.run(&["check", "t"])] {
        assert_eq!(check.status, Some(0), "{}{}", check.stdout, check.stderr);
    }
    let convert = words("convert -f qcow2 -O raw t out");
    for converted in [place.qemu_img(&convert), place.run(&convert)] {
        assert_eq!(converted.status, Some(0), "{}", converted.stderr);
        assert!(fs::read(place.path("out")).unwrap() == content[..size]);
    }
    assert!(fs::read(place.path("old")).unwrap() == content);
}

#[test]
fn a_raw_disk_is_adopted_as_it_is() {
    for options in [
        "",
        ",cluster_size=512",
        ",cluster_size=2M",
        ",extended_l2=on",
        ",preallocation=metadata",
    ] {
        let place = Place::tandem();
        let content = old(&place, (3 << 20) + 512);
        let before = fs::metadata(place.path("old")).unwrap();
        run(&place, &format!("{KEEP}{options} t"));
        let after = fs::metadata(place.path("old")).unwrap();
        assert_eq!(
            after.modified().unwrap(),
            before.modified().unwrap(),
            "{options}"
        );
        assert_shows(&place, &content, content.len());
        let compare = place.qemu_img(&words("compare -f raw -F qcow2 old t"));
        assert_eq!(compare.stdout, "Images are identical.\n", "{options}");
        // Every cluster has its place: no metadata changes when the guest writes.
        let tables = fs::read(place.path("t")).unwrap();
        place.qemu_io("t", &["write -P 7 0 1M", "write -P 8 3M 512"]);
        assert!(fs::read(place.path("t")).unwrap() == tables, "{options}");
        assert_eq!(fs::read(place.path("old")).unwrap()[3 << 20..], [8; 512]);
    }
}

#[test]
fn a_part_of_a_raw_disk_is_adopted() {
    let place = Place::tandem();
    let content = old(&place, 1000);
    run(&place, &format!("{KEEP} t 512"));
    assert_shows(&place, &content, 512);
    // What lies behind the end becomes part of a disk that grows, and that is said.
    let content = old(&place, 4 << 20);
    run(&place, &format!("{KEEP} t 1M"));
    let resized = place.run(&["resize", "t", "4M"]);
    assert!(
        resized.stderr.contains("becomes part of the disk"),
        "{}",
        resized.stderr
    );
    assert_shows(&place, &content, 4 << 20);
}

#[test]
fn the_line_tells_what_is_done() {
    let place = Place::tandem();
    old(&place, 1 << 20);
    let line = KEEP.replace("-q ", "") + " t";
    assert_eq!(
        run(&place, &line),
        "Formatting 't', fmt=qcow2 cluster_size=65536 extended_l2=off compression_type=zlib \
         size=1048576 data_file=old data_file_raw=on data_file_reuse=keep lazy_refcounts=off \
         refcount_bits=16\n"
    );
}

/// A large one takes no longer than its tables: nothing is copied.
#[test]
fn a_large_disk_is_adopted_at_once() {
    let place = Place::tandem();
    let file = fs::File::create(place.path("old")).unwrap();
    file.set_len(1 << 40).unwrap();
    let started = std::time::Instant::now();
    run(&place, &format!("{KEEP},cluster_size=2M t"));
    let took = started.elapsed();
    assert!(len(&place, "t") < 16 << 20);
    println!("adopted 1 TiB in {took:?}");
    assert!(took.as_secs() < 5, "{took:?}");
}

#[test]
fn what_cannot_be_kept_is_refused() {
    let place = Place::tandem();
    old(&place, 1000);
    fs::write(place.path("t"), "an image").unwrap();
    let before = place.content();
    for (options, size, message) in [
        (
            "data_file=old,data_file_raw=on",
            "",
            "1000 bytes, which is no multiple of 512",
        ),
        (
            "data_file=old,data_file_raw=on",
            "1000",
            "has 1000 bytes, and a disk of",
        ),
        (
            "data_file=old,data_file_raw=on",
            "1M",
            "has 1000 bytes, and a disk of",
        ),
        (
            "data_file=gone,data_file_raw=on",
            "",
            "Could not open 'gone': No such file",
        ),
        (
            "data_file=gone,data_file_raw=on",
            "1M",
            "Could not open 'gone': No such file",
        ),
        ("data_file=.,data_file_raw=on", "", "to be a regular file"),
        ("data_file=old", "512", "requires data-file-raw=on"),
        (
            "data_file=old,data_file_layout=packed",
            "512",
            "requires data-file-raw=on",
        ),
        (
            "data_file=old,data_file_raw=on,preallocation=full",
            "512",
            "preallocation of data",
        ),
        (
            "data_file=old,data_file_raw=on,preallocation=falloc",
            "512",
            "preallocation of data",
        ),
        (
            "data_file=old,data_file_raw=on,compat=0.10",
            "512",
            "External data files are only",
        ),
        ("data_file=t,data_file_raw=on", "", "no multiple of 512"),
        ("data_file=t,data_file_raw=on", "0", "is the image itself"),
        ("cluster_size=64k", "1M", "requires data-file"),
    ] {
        let line = format!("create -q -f qcow2 -o {options},data_file_reuse=keep t {size}");
        let refused = place.run(&words(&line));
        assert_eq!(refused.status, Some(1), "{line}");
        assert!(
            refused.stderr.starts_with("qemu-img: t: "),
            "{line}: {}",
            refused.stderr
        );
        assert!(
            refused.stderr.contains(message),
            "{line}: {}",
            refused.stderr
        );
        assert!(place.content() == before, "{line}");
    }
    let line = "create -f qcow2 -o data_file=old,data_file_reuse=foo t 1M";
    assert!(
        place
            .run(&words(line))
            .stderr
            .ends_with("t: Parameter 'data-file-reuse' does not accept value 'foo'\n")
    );
    let line = "convert -O qcow2 -o data_file=old,data_file_raw=on,data_file_reuse=keep t u";
    assert!(
        place
            .run(&words(line))
            .stderr
            .contains("images that are not written to")
    );
    assert!(place.content() == before);
}

/// Whoever writes to the file would write to the disk.
#[test]
fn a_file_that_is_being_written_is_not_adopted() {
    let place = Place::tandem();
    old(&place, 1 << 20);
    let mut writer = Command::new("qemu-io")
        .args(["-f", "raw"])
        .arg(place.path("old"))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = writer.stdin.take().unwrap();
    // Its answer tells that it has the file open.
    writeln!(stdin, "length").unwrap();
    let mut answer = std::io::BufReader::new(writer.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut answer, &mut String::new()).unwrap();
    let refused = place.run(&words(&format!("{KEEP} t")));
    assert_eq!(refused.status, Some(1));
    assert!(
        refused.stderr.contains("lock\nIs another process using"),
        "{}",
        refused.stderr
    );
    assert!(!place.path("t").exists());
    drop(stdin);
    writer.wait().unwrap();
    run(&place, &format!("{KEEP} t"));
}

#[test]
fn an_existing_file_can_be_refused() {
    let line = "create -q -f qcow2 -o data_file=old,data_file_reuse=refuse t 1M";
    let place = Place::tandem();
    let content = old(&place, 1000);
    let refused = place.run(&words(line));
    assert_eq!(refused.status, Some(1));
    assert_eq!(
        refused.stderr,
        "qemu-img: t: The data file 'old' exists already\n"
    );
    assert!(fs::read(place.path("old")).unwrap() == content && !place.path("t").exists());
    fs::remove_file(place.path("old")).unwrap();
    run(&place, line);
    assert_eq!(len(&place, "old"), 1 << 20);
    // `replace` is what happens without the option.
    old(&place, 1000);
    run(&place, &line.replace("refuse", "replace"));
    assert!(fs::read(place.path("old")).unwrap() == vec![0; 1 << 20]);
}

/// A loop device, where this process may have one.
struct Loop(String);

impl Loop {
    fn new(place: &Place) -> Option<Self> {
        let set = Command::new("losetup")
            .args(["-f", "--show"])
            .arg(place.path("old"))
            .output();
        let name = set.ok().filter(|set| set.status.success())?.stdout;
        Some(Self(String::from_utf8(name).unwrap().trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        drop(Command::new("losetup").args(["-d", &self.0]).status());
    }
}

#[test]
fn a_block_device_is_adopted() {
    let place = Place::tandem();
    let content = old(&place, 2 << 20);
    let Some(device) = Loop::new(&place) else {
        println!("no loop device: nothing tested");
        return;
    };
    let line = KEEP.replace("=old", &format!("={}", device.0));
    run(&place, &format!("{line} t"));
    let converted = place.qemu_img(&words("convert -O raw t out"));
    assert_eq!(converted.status, Some(0), "{}", converted.stderr);
    assert!(fs::read(place.path("out")).unwrap() == content);
    let refused = place.run(&words(&format!("{line} u 3M")));
    assert!(refused.stderr.contains("needs more"), "{}", refused.stderr);
    let check = place.run(&words("check --follow=anywhere t"));
    assert_eq!(check.status, Some(0), "{}", check.stderr);
}
