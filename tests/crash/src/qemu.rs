//! What QEMU's programs say of a state.

use std::path::Path;
use std::process::{Command, Output};

use crate::power::Files;
use crate::setup::{Kind, Setup, scratch};
use crate::storage::{SECTOR, sector_bytes};

/// Exit statuses of `qemu-img check`.
const CLEAN: i32 = 0;
const LEAKS: i32 = 3;

/// Has `qemu-img check` and `qemu-io` judge the image in `files`, which shows `stamps`. Returns whether
/// QEMU knows such images.
///
/// # Errors
/// More than leaks, or something else to read.
pub fn judge(setup: &Setup, files: &Files, stamps: &[u64]) -> Result<bool, String> {
    if setup.kind == Kind::Packed {
        return Ok(false);
    }
    let dir = scratch();
    let write = |name: &str, bytes: &[u8]| std::fs::write(dir.path().join(name), bytes).unwrap();
    write("image", &files.image);
    if setup.has_data_file() {
        write(Setup::DATA, &files.data);
    }
    if setup.kind == Kind::Overlay {
        write(Setup::BASE, &setup.initial_bytes());
    }
    let image = match setup.has_data_file() {
        true => "driver=qcow2,file.filename=image,data-file.filename=data",
        false => "driver=qcow2,file.filename=image",
    };
    let is_dirty = files.image[7] == 3 && files.image[79] & 1 != 0;
    if is_dirty {
        // As it says itself, it may have to be repaired.
        let repair = ["check", "-q", "-r", "all", "--image-opts", image];
        run(dir.path(), "qemu-img", &repair);
    }
    judge_in(dir.path(), image, stamps)?;
    Ok(true)
}

/// As [`judge`], of the image `name` in `dir`.
///
/// # Errors
/// As [`judge`].
pub fn judge_at(dir: &Path, name: &str, stamps: &[u64]) -> Result<(), String> {
    let image = format!("driver=qcow2,file.filename={name}");
    judge_in(dir, &image, stamps)
}

/// As [`judge`], of an image in `dir`, which is not dirty.
fn judge_in(dir: &Path, image: &str, stamps: &[u64]) -> Result<(), String> {
    let checked = run(dir, "qemu-img", &["check", "--image-opts", image]);
    if !matches!(checked.status.code(), Some(CLEAN | LEAKS)) {
        let text = [checked.stdout, checked.stderr].concat();
        return Err(format!(
            "qemu-img check: {}",
            String::from_utf8_lossy(&text)
        ));
    }
    let shown: Vec<u8> = stamps
        .iter()
        .flat_map(|stamp| sector_bytes(*stamp))
        .collect();
    std::fs::write(dir.join("shown"), &shown).unwrap();
    compare(dir, image)?;
    read_zeros(dir, image, stamps)
}

fn compare(dir: &Path, image: &str) -> Result<(), String> {
    let shown = "driver=raw,file.filename=shown";
    let arguments = ["compare", "--image-opts", image, shown];
    let compared = run(dir, "qemu-img", &arguments);
    if !compared.status.success() {
        let text = [compared.stdout, compared.stderr].concat();
        let text = String::from_utf8_lossy(&text);
        return Err(format!("qemu-img compare: {text}"));
    }
    Ok(())
}

/// `qemu-io` reads zeros where the first sector without a stamp is.
fn read_zeros(dir: &Path, image: &str, stamps: &[u64]) -> Result<(), String> {
    let Some(sector) = stamps.iter().position(|stamp| *stamp == 0) else {
        return Ok(());
    };
    let command = format!("read -P 0 {} 512", sector * SECTOR);
    let read = run(
        dir,
        "qemu-io",
        &["-r", "--image-opts", "-c", &command, image],
    );
    let text = String::from_utf8_lossy(&read.stdout);
    if !read.status.success() || text.contains("verification failed") {
        return Err(format!("qemu-io: {text}"));
    }
    Ok(())
}

fn run(dir: &Path, program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    let output = command.current_dir(dir).args(arguments).output();
    output.unwrap_or_else(|e| panic!("{program}: {e}"))
}
