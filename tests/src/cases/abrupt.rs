//! `tandem` is ended from outside while the guest writes.

use crate::disk::{Image, Kind};
use crate::error::{Context, Result};
use crate::guest::{Guest, seed, values};
use crate::process::{command, run};
use crate::suite::{Bench, Case};
use std::fs;
use std::os::unix::process::ExitStatusExt;

/// The size of the chunks in which [`WRITE`] writes `/seed`, over and over.
const CHUNK: usize = 64 << 10;

/// Fills the disk from its start, and says which chunk is on it for certain; beside that, writes
/// that are never flushed.
const WRITE: &str = r#"
(
    i=1000
    while true; do
        dd if=/seed of=/dev/vda bs=4k seek=$((i * 16)) count=16 conv=notrunc 2>/dev/null
        i=$((i + 3))
    done
) &
i=0
while [ $i -lt 1000 ]; do
    dd if=/seed of=/dev/vda bs=64k skip=$((i % 16)) seek=$i count=1 conv=notrunc,fsync 2>/dev/null
    echo "@ synced $i"
    i=$((i + 1))
done
"#;

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("abrupt::sigterm_while_writing", |bench| {
            terminated(bench, Kind::Internal)
        }),
        Case::new("abrupt::sigterm_while_writing_external", |bench| {
            terminated(bench, Kind::External)
        }),
        Case::new("abrupt::sigkill_while_writing", |bench| {
            killed(bench, Kind::Internal)
        }),
        Case::new("abrupt::sigkill_while_writing_external_raw", |bench| {
            killed(bench, Kind::ExternalRaw)
        }),
    ]
}

/// Has a guest run [`WRITE`] until it has written enough, then sends `signal`. Returns how many chunks
/// are on the disk for certain.
fn write_until(bench: &Bench, image: &Image<'_>, signal: i32) -> Result<usize> {
    let mut acted = false;
    let boot = Guest::new(bench)
        .disk(&image.path, "")
        .watch(WRITE, |console, child| {
            if !acted && values(console, "synced").count() >= 40 {
                acted = true;
                let kill = format!("-{signal}");
                run(command("kill").args([kill, child.id().to_string()])).unwrap();
            }
        })?;
    assert_eq!(boot.status().signal(), Some(signal), "{}", boot.status());
    assert!(acted, "the guest never wrote enough");
    assert_eq!(boot.values("script").count(), 0, "the guest ran to its end");
    Ok(boot.values("synced").count())
}

/// SIGTERM flushes and closes the disks: nothing leaks, nothing synced is lost.
fn terminated(bench: &Bench, kind: Kind) -> Result<()> {
    let image = Image::new(bench, "disk.qcow2", kind, "256M")?;
    let synced = write_until(bench, &image, libc::SIGTERM)?;
    image.check()?;
    assert_synced(&image, synced)
}

/// SIGKILL, again and again: nothing synced is lost, and clusters leak at worst.
fn killed(bench: &Bench, kind: Kind) -> Result<()> {
    let image = Image::new(bench, "disk.qcow2", kind, "256M")?;
    // Boots take longer than most rounds of others.
    for _ in 0..bench.rounds().div_ceil(4) {
        let synced = write_until(bench, &image, libc::SIGKILL)?;
        image.check_but_leaks();
        assert_synced(&image, synced)?;
    }
    Ok(())
}

fn assert_synced(image: &Image<'_>, synced: usize) -> Result<()> {
    let disk = fs::read(image.convert()?).context("reading the disk")?;
    let seed = seed();
    for (index, chunk) in disk.chunks(CHUNK).take(synced).enumerate() {
        let at = index * CHUNK % seed.len();
        assert!(
            chunk == &seed[at..at + CHUNK],
            "chunk {index} of {synced} synced ones is lost"
        );
    }
    Ok(())
}
