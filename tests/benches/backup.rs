//! What a backup costs: its reader, and the guest.
//!
//! `cargo bench -p tandem-tests --bench backup` prints how fast `tandem-img backup` and `qemu-img convert`
//! copy the same image, in turns; and how long random writes of 4 KiB take to a disk of which nobody, or
//! somebody, reads a backup, and how much the scratch file has had. A plot of the latter is written to
//! `TANDEM_BENCH_PLOT` (default `backup.svg` in the directory of what Cargo builds).
//!
//! The files lie in `TANDEM_BENCH_DIR` (default `/dev/shm`), in the page cache.

use std::fmt::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{BackupOptions, Disk, LiveDisk, VolatileSlice};

const SIZE: u64 = 512 << 20;
const TURNS: usize = 5;
/// Writes that are measured.
const WRITES: usize = 30_000;
const WRITE: u64 = 4096;

fn main() {
    let base = std::env::var("TANDEM_BENCH_DIR").unwrap_or_else(|_| "/dev/shm".into());
    let dir = tempfile::tempdir_in(base).unwrap();
    let image = dir.path().join("disk.qcow2");
    let options = CreateOptions {
        size: SIZE,
        ..CreateOptions::default()
    };
    create(&image, &options).unwrap();
    fill(&image);
    throughput(dir.path());
    latency(&image);
}

/// Writes something everywhere.
fn fill(image: &Path) {
    let disk = Qcow2::open(image, &OpenOptions::default()).unwrap();
    let mut bytes = vec![0; 1 << 20];
    for offset in (0..SIZE).step_by(bytes.len()) {
        bytes.fill(1 + (offset >> 20) as u8 % 255);
        disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
            .unwrap();
    }
    disk.close().unwrap();
}

/// The directory of what Cargo builds.
fn built() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    own.ancestors().nth(3).unwrap().to_owned()
}

fn throughput(dir: &Path) {
    let status = Command::new(env!("CARGO"))
        .args(["build", "--quiet", "--release", "--package", "tandem-img"])
        .status();
    assert!(status.unwrap().success());
    let tandem = built().join("release/tandem-img");
    let time = |program: &Path, line: &str| {
        let start = Instant::now();
        let status = Command::new(program)
            .args(line.split(' '))
            .current_dir(dir)
            .status();
        assert!(status.unwrap().success(), "{line}");
        start.elapsed().as_secs_f64()
    };
    println!(
        "{:<10} {:>14} {:>14} {:>7}",
        "copy to", "backup MiB/s", "convert MiB/s", "ratio"
    );
    for format in ["qcow2", "raw"] {
        let mut times = Vec::new();
        for _ in 0..TURNS {
            let backup = time(
                &tandem,
                &format!("backup -f qcow2 -O {format} disk.qcow2 a"),
            );
            let convert = format!("convert -f qcow2 -O {format} disk.qcow2 b");
            times.push((backup, time(Path::new("qemu-img"), &convert)));
        }
        let backup = median(times.iter().map(|times| times.0));
        let convert = median(times.iter().map(|times| times.1));
        let ratio = median(times.iter().map(|(backup, convert)| convert / backup));
        let speed = |seconds: f64| (SIZE >> 20) as f64 / seconds;
        let (backup, convert) = (speed(backup), speed(convert));
        println!("{format:<10} {backup:>14.0} {convert:>14.0} {ratio:>7.2}");
    }
}

fn median(values: impl Iterator<Item = f64>) -> f64 {
    let mut values = Vec::from_iter(values);
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// What the writes to a disk take, sorted.
struct Series {
    name: &'static str,
    times: Vec<Duration>,
}

fn latency(image: &Path) {
    let disk = Qcow2::open(image, &OpenOptions::default()).unwrap();
    let disk = Arc::new(LiveDisk::new(disk));
    let goes_on = AtomicBool::new(false);
    let mut peak = 0;
    let series = [("no backup", false), ("backup under way", true)].map(|(name, has_backup)| {
        let times = std::thread::scope(|scope| {
            goes_on.store(true, Ordering::Relaxed);
            let reader = has_backup.then(|| scope.spawn(|| read(&disk, &goes_on)));
            let times = write(&disk);
            goes_on.store(false, Ordering::Relaxed);
            peak = peak.max(reader.map_or(0, |reader| reader.join().unwrap()));
            times
        });
        Series { name, times }
    });
    println!(
        "\n{:<18} {:>9} {:>9} {:>9} {:>9}",
        "write, µs", "p50", "p99", "p99.9", "most"
    );
    for series in &series {
        let at = |part| series.at(part).as_secs_f64() * 1e6;
        let [half, most, nearly, all] = [0.5, 0.99, 0.999, 1.0].map(at);
        println!(
            "{:<18} {half:>9.1} {most:>9.1} {nearly:>9.1} {all:>9.1}",
            series.name
        );
    }
    println!("scratch file: at most {} of {} MiB", peak >> 20, SIZE >> 20);
    let path = std::env::var_os("TANDEM_BENCH_PLOT").map(PathBuf::from);
    let path = path.unwrap_or_else(|| built().join("backup.svg"));
    std::fs::write(&path, plot(&series)).unwrap();
    println!("plot: {}", path.display());
}

/// Makes one backup after another as long as `goes_on` says. The most that a scratch file has had.
fn read(disk: &Arc<LiveDisk>, goes_on: &AtomicBool) -> u64 {
    let mut buffer = vec![0; 1 << 20];
    let mut peak = 0;
    while goes_on.load(Ordering::Relaxed) {
        let backup = LiveDisk::begin_backup(disk, &BackupOptions::default()).unwrap();
        let mut at = 0;
        while at < backup.size() {
            at = backup.read(at, &mut buffer).unwrap().next;
            backup.release(at).unwrap();
        }
        peak = peak.max(backup.status().scratch_peak);
        backup.finish().unwrap();
    }
    peak
}

fn write(disk: &LiveDisk) -> Vec<Duration> {
    let mut random = 88_172_645_463_325_252_u64;
    let mut bytes = [7; WRITE as usize];
    let mut times = Vec::new();
    for _ in 0..WRITES {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let offset = random % (SIZE / WRITE) * WRITE;
        let start = Instant::now();
        disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
            .unwrap();
        times.push(start.elapsed());
        // A guest does something else, too.
        std::thread::sleep(Duration::from_micros(50));
    }
    times.sort();
    times
}

impl Series {
    /// What so great a part of the writes take at most.
    fn at(&self, part: f64) -> Duration {
        let last = self.times.len() - 1;
        self.times[((last as f64) * part) as usize]
    }
}

/// For each part of the writes, 90 % to the left of 99 %, how long they take at most.
fn plot(series: &[Series]) -> String {
    const WIDTH: f64 = 720.0;
    const HEIGHT: f64 = 400.0;
    const LEFT: f64 = 80.0;
    // Each nine has the same width, and each power of ten the same height.
    let x = |nines: f64| LEFT + nines / 4.0 * WIDTH;
    let y = |micros: f64| HEIGHT + 40.0 - micros.max(1.0).log10() / 5.0 * HEIGHT;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{0}\" height=\"500\" font-family=\"sans-serif\" \
         font-size=\"13\"><rect width=\"100%\" height=\"100%\" fill=\"#fff\"/>\n\
         <text x=\"{LEFT}\" y=\"24\" font-size=\"16\">Random writes of 4 KiB: latency in µs</text>\n",
        LEFT + WIDTH + 40.0
    );
    for (nines, name) in (0..).zip(["0 %", "90 %", "99 %", "99.9 %", "99.99 %"]) {
        let x = x(f64::from(nines));
        let _ = writeln!(
            svg,
            "<line x1=\"{x}\" y1=\"40\" x2=\"{x}\" y2=\"440\" stroke=\"#ccc\"/>\
             <text x=\"{x}\" y=\"460\" text-anchor=\"middle\">{name}</text>"
        );
    }
    for power in 0..=5 {
        let y = y(10_f64.powi(power));
        let _ = writeln!(
            svg,
            "<line x1=\"{LEFT}\" y1=\"{y}\" x2=\"{0}\" y2=\"{y}\" stroke=\"#ccc\"/>\
             <text x=\"{1}\" y=\"{y}\" text-anchor=\"end\">{2}</text>",
            LEFT + WIDTH,
            LEFT - 8.0,
            10_u32.pow(power as u32)
        );
    }
    for (series, (color, row)) in series.iter().zip([("#0969da", 484.0), ("#bf3989", 484.0)]) {
        let points = (0..=400).map(|step| {
            let nines = f64::from(step) / 100.0;
            let time = series.at(1.0 - 10_f64.powf(-nines));
            format!("{:.1},{:.1}", x(nines), y(time.as_secs_f64() * 1e6))
        });
        let points = Vec::from_iter(points).join(" ");
        let at = if color == "#0969da" {
            LEFT
        } else {
            LEFT + 200.0
        };
        let name = series.name;
        let _ = writeln!(
            svg,
            "<polyline points=\"{points}\" fill=\"none\" stroke=\"{color}\" stroke-width=\"2\"/>\
             <text x=\"{at}\" y=\"{row}\" fill=\"{color}\">{name}</text>"
        );
    }
    svg + "</svg>\n"
}
