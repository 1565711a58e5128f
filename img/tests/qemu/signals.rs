//! What signals ask for.

use std::fs;
use std::process::{Command, Output, Stdio};

use crate::run::{Both, Place};

/// The bit of `SIGUSR1` in what `/proc` tells of a process.
const SIGUSR1: u64 = 1 << 9;

/// Whether process `id` has asked to be told of the signal.
fn catches(id: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap_or_default();
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    caught.is_some_and(|caught| caught & SIGUSR1 != 0)
}

/// Runs a slow `convert`, which is sent the signal once it can.
fn ask(place: &Place) -> Output {
    let args = ["convert", "-r", "8M", "-O", "qcow2", "raw", "out"];
    let mut command = place.command(&args);
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    while !catches(child.id()) {
        assert!(child.try_wait().unwrap().is_none(), "it has ended too soon");
        std::thread::yield_now();
    }
    let sent = Command::new("kill")
        .args(["-USR1", &child.id().to_string()])
        .status();
    assert!(sent.unwrap().success());
    child.wait_with_output().unwrap()
}

/// One line on standard error says how far the work has come.
#[test]
fn sigusr1_asks_for_the_progress() {
    let both = Both::new(|place| fs::write(place.path("raw"), vec![7; 8 << 20]).unwrap());
    for place in [&both.qemu, &both.tandem] {
        let done = ask(place);
        assert!(done.status.success());
        assert_eq!(done.stdout, b"");
        let told = String::from_utf8(done.stderr).unwrap();
        let percent = told
            .strip_prefix("    (")
            .and_then(|told| told.strip_suffix("/100%)\n"));
        let percent = percent.and_then(|percent| percent.parse::<f32>().ok());
        assert!(percent.is_some_and(|percent| percent <= 100.0), "{told}");
    }
    both.same("compare -f raw raw out");
}
