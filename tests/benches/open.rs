//! Time to open disks of 16 TiB for writing, and to read and write a first block.
//!
//! `cargo bench -p tandem-tests --bench open` prints the median of some rounds for each kind of
//! image, empty and with everything mapped (`preallocation=metadata`, 2 GiB of L2 tables). The files
//! lie in `TANDEM_BENCH_DIR` (default `/dev/shm`), in the page cache.

use std::path::Path;
use std::time::{Duration, Instant};

use tandem_block::qcow2::{CreateOptions, DataFileLayout, OpenOptions, Qcow2, create};
use tandem_block::{Disk, Preallocation};
use vm_memory::VolatileSlice;

const SIZE: u64 = (16 << 40) - (1 << 20);
const ROUNDS: usize = 21;

fn main() {
    let dir = std::env::var("TANDEM_BENCH_DIR").unwrap_or_else(|_| "/dev/shm".into());
    println!(
        "{:<28} {:>9} {:>9} {:>9}",
        "16 TiB", "open ms", "read ms", "write ms"
    );
    for (name, external, raw, mapped) in [
        ("internal, empty", false, false, false),
        ("internal, all mapped", false, false, true),
        ("external, empty", true, false, false),
        ("external, all mapped", true, false, true),
        ("raw (all mapped)", true, true, true),
        ("packed, empty", true, false, false),
    ] {
        let dir = tempfile::tempdir_in(&dir).unwrap();
        let mut options = CreateOptions {
            size: SIZE,
            data_file: external.then(|| dir.path().join("data")),
            data_file_raw: raw,
            ..CreateOptions::default()
        };
        if mapped {
            options.preallocation = Preallocation::Metadata;
        }
        if name.starts_with("packed") {
            options.data_file_layout = DataFileLayout::Packed;
        }
        let path = dir.path().join("image");
        create(&path, &options).unwrap();
        let rounds: Vec<_> = (0..ROUNDS).map(|_| measure(&path)).collect();
        let column = |i: usize| {
            let mut times: Vec<Duration> = rounds.iter().map(|round| round[i]).collect();
            times.sort_unstable();
            times[ROUNDS / 2].as_secs_f64() * 1000.0
        };
        println!(
            "{name:<28} {:>9.3} {:>9.3} {:>9.3}",
            column(0),
            column(1),
            column(2)
        );
    }
}

/// Times to open the image, and to read and write one block in its middle.
fn measure(path: &Path) -> [Duration; 3] {
    let mut block = [0; 4096];
    let start = Instant::now();
    let disk = Qcow2::open(path, &OpenOptions::default()).unwrap();
    let opened = start.elapsed();
    let slice = [VolatileSlice::from(&mut block[..])];
    disk.read_at(&slice, SIZE / 2).unwrap();
    let read = start.elapsed();
    disk.write_at(&slice, SIZE / 2).unwrap();
    [opened, read - opened, start.elapsed() - read]
}
