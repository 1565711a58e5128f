//! The library as programs in C have it.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use tandem_block::qcow2::{CheckOptions, check};
// The library is built for the programs to link.
use tandem as _;

const CRATE: &str = env!("CARGO_MANIFEST_DIR");

/// Where the libraries are: beside this program.
fn libraries() -> PathBuf {
    let program = std::env::current_exe().unwrap();
    program.parent().unwrap().to_owned()
}

/// Compiles `source` of this crate with `arguments` to `program`.
fn compile(compiler: &str, source: &str, program: &Path, arguments: &[&str]) {
    let out = Command::new(compiler)
        .args([
            "-Wall",
            "-Wextra",
            "-Wpedantic",
            "-Werror",
            "-pthread",
            "-o",
        ])
        .arg(program)
        .arg(format!("-I{CRATE}/include"))
        .arg(format!("{CRATE}/{source}"))
        .args(arguments)
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success(), "{compiler} {source}: {text}");
}

fn run(program: &Path, dir: &Path) -> Output {
    Command::new(program)
        .args(["disk.qcow2", "disk.raw"])
        .current_dir(dir)
        .env("LD_LIBRARY_PATH", libraries())
        .output()
        .unwrap()
}

fn assert_clean(image: &Path) {
    let options = CheckOptions::default();
    let report = check(image, &options, &mut |finding| panic!("{}", finding.text)).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0));
}

#[test]
fn the_example_has_threads_write_to_a_raw_data_file() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    let library = format!("-L{}", libraries().display());
    let arguments = ["-std=c11", &library, "-ltandem"];
    compile("cc", "examples/disk.c", &program, &arguments);
    let out = run(&program, dir.path());
    assert_eq!(String::from_utf8_lossy(&out.stderr), "");
    assert_eq!(
        String::from_utf8_lossy(&out.stdout),
        "the byte at 3 MiB is 3\nbehind the end: request of 1 bytes at offset 4194304 lies outside the \
         disk of 4194304 bytes\n"
    );
    assert!(out.status.success());
    let data = fs::read(dir.path().join("disk.raw")).unwrap();
    let expected: Vec<u8> = (0..4u8).flat_map(|i| vec![i; 1 << 20]).collect();
    assert!(data == expected);
    assert_clean(&dir.path().join("disk.qcow2"));
}

/// With the static library.
#[test]
fn each_call_does_what_it_says_or_says_why_not() {
    let dir = tempfile::tempdir().unwrap();
    let program = dir.path().join("program");
    let library = format!("{}/libtandem.a", libraries().display());
    let arguments = ["-std=c11", &library, "-ldl", "-lm"];
    compile("cc", "tests/calls.c", &program, &arguments);
    let out = run(&program, dir.path());
    let text = String::from_utf8_lossy(&out.stdout);
    assert_eq!(text, "all calls are right\n");
    assert!(out.status.success());
    assert_clean(&dir.path().join("disk.qcow2"));
}
