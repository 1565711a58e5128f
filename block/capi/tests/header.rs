//! Whether `include/tandem.h` tells what this crate has:
//! `cargo test -p tandem-capi --features header --test header`; with `TANDEM_HEADER=write` it is made anew.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs;
use std::path::Path;

#[test]
fn the_header_is_up_to_date() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let path = root.join("include/tandem.h");
    let config = cbindgen::Config::from_file(root.join("cbindgen.toml")).unwrap();
    let mut header = Vec::new();
    cbindgen::Builder::new()
        .with_config(config)
        .with_src(root.join("src/lib.rs"))
        .generate()
        .unwrap()
        .write(&mut header);
    if std::env::var_os("TANDEM_HEADER").is_some() {
        fs::write(&path, &header).unwrap();
    }
    assert!(
        fs::read(&path).unwrap() == header,
        "make it anew, and commit it"
    );
}
