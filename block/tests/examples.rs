//! The examples of this crate do what they say. `cargo test` and `cargo build --examples` build them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use tandem_block::qcow2::{CheckOptions, check};

/// What the example `name` prints.
fn run(name: &str, arguments: &[PathBuf]) -> String {
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
fn an_image_with_a_raw_data_file_is_made_and_read() {
    let dir = tempfile::tempdir().unwrap();
    let out = run("create_external", &[dir.path().to_owned()]);
    assert_eq!(
        out,
        "in the file: what a guest writes\na second one may not write\n"
    );
    let image = dir.path().join("disk.qcow2");
    let report = check(&image, &CheckOptions::default(), &mut |finding| {
        panic!("{}", finding.text);
    });
    assert_eq!(report.unwrap().leaks, 0);
    fs::write(
        dir.path().join("disk.raw"),
        [&[7; 15][..], &[8; 497]].concat(),
    )
    .unwrap();
    let out = run("read_image", &[image]);
    let sevens = "07, ".repeat(15);
    assert_eq!(
        out,
        format!("1073741824 bytes, which begin with [{sevens}08]\n")
    );
}

#[test]
fn an_image_lies_in_storage_of_the_callers() {
    let out = run("own_storage", &[]);
    // Header, table of refcounts, refcounts, L1 table and L2 table; of the data the first bytes alone.
    assert_eq!(out, "kept in memory, in an image of 320 KiB\n");
}

/// The lines of `text` without what is before and behind each.
fn lines(text: &str) -> Vec<&str> {
    text.lines().map(str::trim).collect()
}

/// What `docs/embedding.md` shows of a file is in the file, line by line.
#[test]
fn the_guide_shows_the_examples() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let guide = fs::read_to_string(root.join("docs/embedding.md")).unwrap();
    let shown: Vec<_> = guide.split("<!-- ").skip(1).collect();
    assert!(shown.len() >= 8);
    for part in shown {
        let (name, rest) = part.split_once(" -->\n```").unwrap();
        let code = rest.split("```").next().unwrap();
        let (_language, code) = code.split_once('\n').unwrap();
        let file = fs::read_to_string(root.join(name)).unwrap();
        let (code, file) = (lines(code), lines(&file));
        let is_there = file.windows(code.len()).any(|place| place == code);
        assert!(is_there, "{name} does not have\n{}", code.join("\n"));
    }
}
