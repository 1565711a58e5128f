//! Commands from standard input, and how results are told.

use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::process::Command;

use super::{TANDEM, args, run, runs};
use crate::run::{Both, Place};

#[test]
fn commands_from_standard_input() {
    let both = Both::new(|place| place.make("create -q -f qcow2 disk 1M"));
    let long = format!("read 0 {}512\nlength\n", " ".repeat(1100));
    for input in [
        "",
        "\n",
        "   \n\n",
        "length\n",
        "length",
        "write -P 5 0 512\nread -P 5 0 512\nread -P 6 0 512\nlength\n",
        "foo\nquit\nlength\n",
        "q\n",
        "close\nlength\nopen disk\nlength\n",
        "read 0\nhelp foo\nread -v 0 20\n",
        "aio_write 0 1k\naio_flush\naio_read -P 0xcd 0 1k\naio_flush\nquit\n",
        "length\t\n",
        &long,
    ] {
        let [expected, found] = runs(&both, &["disk"], input);
        assert_eq!(found, expected, "{input:?}");
    }
    let [expected, found] = runs(&both, &["-c", "length", "disk"], "foo\n");
    assert_eq!(found, expected);
    let [expected, found] = runs(&both, &[], "open disk\nlength\n");
    assert_eq!(found, expected);
}

/// What other tests do not look at: figures that differ from run to run.
#[test]
fn figures() {
    let place = Place::tandem();
    place.make("create -q -f raw disk 1M");
    let output = Command::new(TANDEM)
        .args(["-f", "raw", "disk", "-c", "read 0 4k"])
        .args([
            "-c",
            "read -C 0 4k",
            "-c",
            "write -C 0 2k",
            "-c",
            "discard -C 0 1k",
        ])
        .current_dir(place.path(""))
        .output()
        .unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let shape: String = text
        .chars()
        .map(|c| if c.is_ascii_digit() { '0' } else { c })
        .collect();
    let mut lines = shape.lines();
    assert_eq!(lines.next(), Some("read 0000/0000 bytes at offset 0"));
    let second = lines.next().unwrap();
    let rest = second.strip_prefix("0 KiB, 0 ops; 00.00 sec (").unwrap();
    let (speed, rate) = rest.split_once("iB/sec and ").unwrap();
    assert!(speed.contains(".000 ") || !speed.contains('.'), "{second}");
    assert!(rate.ends_with(".0000 ops/sec)"), "{second}");
    let lines: Vec<_> = lines.collect();
    assert_eq!(lines.len(), 3);
    for (line, len) in lines.into_iter().zip(["0000", "0000", "0000"]) {
        let parts: Vec<_> = line.split(',').collect();
        assert_eq!(parts[..3], [len, "0", "0:00:00.00"], "{line}");
        assert!(
            parts[3].ends_with(".000") && parts[4].ends_with(".000"),
            "{line}"
        );
    }
}

/// A crash leaves what has been written: by default nothing waits for a flush.
#[test]
fn crashes() {
    for (command, signal) in [("abort", 6), ("sigraise 9", 9), ("sigraise 15", 15)] {
        let place = Place::tandem();
        place.make("create -q -f qcow2 disk 1M");
        let status = Command::new(TANDEM)
            .args(["-c", "write -P 7 100k 100k", "-c", command, "disk"])
            .current_dir(place.path(""))
            .arg0("qemu-io")
            .output()
            .unwrap()
            .status;
        assert_eq!(status.signal(), Some(signal), "{command}");
        place.make("check -q disk");
        let found = run(&place, TANDEM, &args("disk :: read -P 7 100k 100k"), "");
        assert_eq!(found.status, Some(0), "{}", found.stdout);
    }
}
