//! The examples of this crate do what they say. `cargo test` and `cargo build --examples` build them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::path::Path;
use std::process::Command;

use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{Disk, VolatileSlice};

/// What the example `name` prints.
fn run(name: &str, arguments: &[&Path]) -> String {
    let test = std::env::current_exe().unwrap();
    let profile = test.ancestors().nth(2).unwrap();
    let example = profile.join("examples").join(name);
    let out = Command::new(&example).args(arguments).output();
    let out = out.unwrap_or_else(|error| panic!("{}: {error}", example.display()));
    let errors = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{name}: {errors}");
    String::from_utf8(out.stdout).unwrap()
}

#[test]
fn a_monitor_gives_its_guest_an_image() {
    let dir = tempfile::tempdir().unwrap();
    let image = dir.path().join("disk.qcow2");
    let options = CreateOptions {
        size: 1 << 20,
        ..CreateOptions::default()
    };
    create(&image, &options).unwrap();
    let disk = Qcow2::open(&image, &OpenOptions::default()).unwrap();
    let mut text = *b"sector 3";
    let bufs = [VolatileSlice::from(&mut text[..])];
    disk.write_at(&bufs, 3 * 512).unwrap();
    disk.close().unwrap();
    drop(disk);
    assert_eq!(
        run("own_vmm", &[&image]),
        "sector 3 begins with \"sector 3\"\nlast error: None\n"
    );
}

#[test]
fn a_guest_reads_a_disk_that_nobody_stores() {
    let out = run("own_disk", &[]);
    assert_eq!(out, "the sector says \"123456789   \"\n");
}
