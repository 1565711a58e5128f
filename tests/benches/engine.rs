//! Cost of the engine, next to the same system calls made directly.
//!
//! `cargo bench -p tandem-tests --bench engine [FILTER]` prints, for each kind of work and image,
//! processor time per request of the bare system call and of the engine in the same run, in turns
//! of some thousand requests, and the median of the differences. The files lie in `TANDEM_BENCH_DIR`
//! (default `/dev/shm`), in the page cache.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use tandem_block::Disk;
use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use vm_memory::VolatileSlice;

const SIZE: u64 = 1 << 30;
const TURNS: usize = 15;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Internal,
    External,
    Raw,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Work {
    Read,
    Overwrite,
    Allocate,
}

fn main() {
    let filter = std::env::args()
        .skip(1)
        .find(|a| !a.starts_with("--"))
        .unwrap_or_default();
    let dir = std::env::var("TANDEM_BENCH_DIR").unwrap_or_else(|_| "/dev/shm".into());
    println!(
        "{:<32} {:>10} {:>10} {:>10} {:>7}",
        "", "bare ns", "tandem ns", "above ns", "ratio"
    );
    for (work, random, len) in [
        (Work::Read, true, 4096),
        (Work::Overwrite, true, 4096),
        (Work::Read, false, 1 << 20),
        (Work::Overwrite, false, 1 << 20),
        (Work::Allocate, true, 4096),
        (Work::Allocate, false, 65536),
    ] {
        for kind in [Kind::Raw, Kind::External, Kind::Internal] {
            let order = if random { "random" } else { "sequential" };
            let name = format!("{work:?} {order} {}K {kind:?}", len >> 10).to_lowercase();
            if name.contains(&filter.to_lowercase()) {
                let dir = tempfile::tempdir_in(&dir).unwrap();
                measure(&name, dir.path(), kind, work, random, len);
            }
        }
    }
}

fn measure(name: &str, dir: &Path, kind: Kind, work: Work, random: bool, len: usize) {
    let bare = File::options()
        .read(true)
        .write(true)
        .create(true)
        .truncate(true)
        .open(dir.join("bare"))
        .unwrap();
    bare.set_len(SIZE).unwrap();
    let image = dir.join("image");
    let options = CreateOptions {
        size: SIZE,
        data_file: (kind != Kind::Internal).then(|| dir.join("data")),
        data_file_raw: kind == Kind::Raw,
        ..CreateOptions::default()
    };
    create(&image, &options).unwrap();
    let disk = Qcow2::open(&image, &OpenOptions::default()).unwrap();
    let mut buffer = vec![0x5a; len.max(1 << 20)];
    if work != Work::Allocate {
        for at in (0..SIZE).step_by(1 << 20) {
            bare.write_all_at(&buffer[..1 << 20], at).unwrap();
            let slice = VolatileSlice::from(&mut buffer[..1 << 20]);
            disk.write_at(&[slice], at).unwrap();
        }
        disk.flush().unwrap();
    }

    let offsets = offsets(work, random, len);
    let per_turn = (offsets.len() / TURNS).min(20_000);
    let (mut bare_ns, mut tandem_ns) = (Vec::new(), Vec::new());
    for turn in offsets.chunks_exact(per_turn).take(TURNS) {
        bare_ns.push(time(turn, |at| {
            let buffer = &mut buffer[..len];
            match work {
                Work::Read => bare.read_exact_at(buffer, at).unwrap(),
                _ => bare.write_all_at(buffer, at).unwrap(),
            }
        }));
        tandem_ns.push(time(turn, |at| {
            let slice = [VolatileSlice::from(&mut buffer[..len])];
            match work {
                Work::Read => disk.read_at(&slice, at).unwrap(),
                _ => disk.write_at(&slice, at).unwrap(),
            }
        }));
    }
    if work == Work::Allocate {
        // What the engine puts off until the flush belongs to its writes.
        let requests = (per_turn * bare_ns.len()) as f64;
        let flush = time(&[0], |_| disk.flush().unwrap()) / requests;
        let sync = time(&[0], |_| bare.sync_data().unwrap()) / requests;
        tandem_ns.iter_mut().for_each(|ns| *ns += flush);
        bare_ns.iter_mut().for_each(|ns| *ns += sync);
    }
    let above = bare_ns.iter().zip(&tandem_ns).map(|(b, t)| t - b).collect();
    let ratio = bare_ns.iter().zip(&tandem_ns).map(|(b, t)| b / t).collect();
    println!(
        "{name:<32} {:>10.0} {:>10.0} {:>10.0} {:>7.2}",
        median(bare_ns),
        median(tandem_ns),
        median(above),
        median(ratio)
    );
}

/// Where the requests go. Allocating ones touch each cluster of 64 KiB once.
fn offsets(work: Work, random: bool, len: usize) -> Vec<u64> {
    let step = if work == Work::Allocate {
        65536
    } else {
        len as u64
    };
    let mut offsets: Vec<u64> = (0..SIZE / step).map(|i| i * step).collect();
    let mut state = 1u64;
    if random {
        for i in (1..offsets.len()).rev() {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            offsets.swap(i, (state >> 33) as usize % (i + 1));
        }
    }
    offsets
}

/// Processor time per request in nanoseconds.
fn time(offsets: &[u64], mut request: impl FnMut(u64)) -> f64 {
    let before = cpu_time();
    offsets.iter().for_each(|at| request(*at));
    (cpu_time() - before).as_nanos() as f64 / offsets.len() as f64
}

fn cpu_time() -> Duration {
    let mut time = libc::timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    // SAFETY: `time` is valid for the kernel to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &mut time) };
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
