//! Guests on overlays of one base, which stays as it is.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::MetadataExt;

use crate::cases::disks::root_image;
use crate::disk::{Image, sha256};
use crate::error::{Context, Result};
use crate::guest::{Boot, Guest};
use crate::suite::{Bench, Case};

pub fn cases() -> Vec<Case> {
    vec![Case::new("forks::overlays", overlays)]
}

/// A throw-away overlay leaves nothing, a kept one holds what was written, and the base is the same
/// byte for byte.
fn overlays(bench: &Bench) -> Result<()> {
    let base = root_image(bench)?;
    let data_file = base.data_file.as_ref().expect("an external data file");
    let files = || Ok((sha256(&base.path)?, sha256(data_file)?));
    let before = files()?;
    let directory = bench.directory().display();
    let keys = format!(",overlay=temp,overlay-dir={directory},overlay-data-file=temp");
    let before_boot = names(bench)?;
    assert_eq!(boot(bench, &base, &keys)?.value("boots"), "1");
    assert_eq!(names(bench)?, before_boot, "a file is left");
    // Each begins with a base that has never been booted.
    for (name, data_file, boots) in [
        ("over", None, &["1", "2"][..]),
        ("over-external", Some("over-data"), &["1"]),
    ] {
        let path = bench.scratch(name);
        let mut keys = format!(",overlay={}", path.display());
        if let Some(data_file) = data_file {
            keys += &format!(",overlay-data-file={}", bench.scratch(data_file).display());
        }
        for expected in boots {
            assert_eq!(boot(bench, &base, &keys)?.value("boots"), *expected);
            let tool = &mut bench.tool("qemu-img");
            bench.run(tool.args(["check", "-f", "qcow2"]).arg(&path))?;
            let mut bytes = 0;
            for name in [name].into_iter().chain(data_file) {
                let metadata = fs::metadata(bench.scratch(name)).context("reading a size")?;
                bytes += metadata.blocks() * 512;
            }
            println!("forks::overlays: {name} takes {bytes} bytes after boot {expected}");
        }
    }
    assert_eq!(files()?, before, "the base changed");
    Ok(())
}

fn names(bench: &Bench) -> Result<BTreeSet<OsString>> {
    let entries = fs::read_dir(bench.directory()).context("listing files")?;
    let names = entries.map(|entry| Ok(entry.context("listing files")?.file_name()));
    // The guest's own files, which each boot makes.
    let is_disk = |name: &OsString| !name.to_string_lossy().contains("initrd");
    Ok(names
        .collect::<Result<BTreeSet<_>>>()?
        .into_iter()
        .filter(is_disk)
        .collect())
}

/// Boots from the root file system of `base`, which counts that.
fn boot(bench: &Bench, base: &Image<'_>, keys: &str) -> Result<Boot> {
    let boot = Guest::new(bench)
        .cmdline("root=/dev/vda")
        .disk(&base.path, keys)
        .boot(
            r#"
            mount -t ext4 /dev/vda /mnt
            mount --move /dev /mnt/dev
            touch /switch_root
            "#,
        )?;
    assert!(boot.status().success(), "{}", boot.status());
    Ok(boot)
}
