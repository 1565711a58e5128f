//! Time to make an overlay and open it, by the library, and by `qemu-img create -b` as a user would.
//!
//! `cargo bench -p tandem-tests --bench forks` prints the median of some rounds for each kind of
//! overlay, on bases of several sizes. What an overlay has is taken away again after each round, and
//! that is not counted. The files lie in `TANDEM_BENCH_DIR` (default `/dev/shm`).

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use tandem_block::qcow2::{
    BackingFormat, Base, CreateOptions, OpenOptions, OverlayOptions, OverlayPlace, create,
};

const SIZES: [(&str, u64); 3] = [("1 GiB", 1 << 30), ("1 TiB", 1 << 40), ("16 TiB", 16 << 40)];
const ROUNDS: usize = 201;
const PROCESSES: usize = 21;

fn main() {
    let dir = std::env::var("TANDEM_BENCH_DIR").unwrap_or_else(|_| "/dev/shm".into());
    let dir = tempfile::tempdir_in(dir).unwrap();
    println!(
        "{:<8} {:>12} {:>14} {:>12} {:>14} {:>14}",
        "base", "temp ns", "temp+data ns", "kept ns", "kept+data ns", "qemu-img ns"
    );
    for (name, size) in SIZES {
        let path = dir.path().join("base");
        let options = CreateOptions {
            size,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        let base = Base::open(&path, BackingFormat::Qcow2, &OpenOptions::default()).unwrap();
        let [temporary, temporary_data, kept, kept_data] =
            [(false, false), (false, true), (true, false), (true, true)]
                .map(|(kept, data)| median(ROUNDS, || overlay(&base, dir.path(), kept, data)));
        let qemu = median(PROCESSES, || qemu_img(dir.path()));
        println!(
            "{name:<8} {temporary:>12} {temporary_data:>14} {kept:>12} {kept_data:>14} {qemu:>14}"
        );
        drop(base);
        fs::remove_file(path).unwrap();
    }
}

fn median(rounds: usize, mut measure: impl FnMut() -> Duration) -> u128 {
    let mut times: Vec<_> = (0..rounds).map(|_| measure()).collect();
    times.sort_unstable();
    times[rounds / 2].as_nanos()
}

fn overlay(base: &Base, directory: &Path, kept: bool, data_file: bool) -> Duration {
    let [path, data] = ["over", "over.data"].map(|name| directory.join(name));
    let place = match kept {
        false => OverlayPlace::Temporary {
            directory: Some(directory.to_owned()),
            data_file,
        },
        true => OverlayPlace::Kept {
            path: path.clone(),
            data_file: data_file.then(|| data.clone()),
        },
    };
    let options = OverlayOptions {
        place,
        ..OverlayOptions::default()
    };
    let start = Instant::now();
    let disk = black_box(base.overlay(&options).unwrap());
    let time = start.elapsed();
    drop(disk);
    for file in [path, data] {
        let _ = fs::remove_file(file);
    }
    time
}

fn qemu_img(directory: &Path) -> Duration {
    let start = Instant::now();
    let made = Command::new("qemu-img")
        .args([
            "create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", "over",
        ])
        .current_dir(directory)
        .status()
        .unwrap();
    let time = start.elapsed();
    assert!(made.success());
    fs::remove_file(directory.join("over")).unwrap();
    time
}
