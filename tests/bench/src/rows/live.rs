//! What a backup under way costs the guest, and what it costs to fork a disk.

use std::fs;
use std::hint::black_box;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use tandem_block::qcow2::{Base, CreateOptions, OpenOptions, OverlayOptions, OverlayPlace, create};
use tandem_block::{BackupOptions, Disk, ImageFormat, LiveDisk};
use vm_memory::VolatileSlice;

use super::requests::BLOCK;
use crate::child;
use crate::image::{Kind, image};
use crate::measure::{Contender, Line, Unit};
use crate::plot::{Plot, number};
use crate::suite::Suite;
use crate::target;
use crate::work::{Buffer, Random, fill};

const SIZE: u64 = 256 << 20;
/// Writes that are measured.
const WRITES: usize = 20_000;

/// Writes of 4 KiB to a disk of which nobody, or somebody, reads a backup.
pub fn backup(suite: &mut Suite) {
    let dir = suite.memory();
    let disk = target::tandem(&image(&dir.path().join("disk"), Kind::Internal, SIZE));
    fill(&disk, SIZE);
    let disk = Arc::new(LiveDisk::new(disk));
    let goes_on = AtomicBool::new(false);
    let mut peak = 0;
    let curves = [("no backup", false), ("a backup under way", true)].map(|(name, has_backup)| {
        let times = std::thread::scope(|scope| {
            goes_on.store(true, Ordering::Relaxed);
            let reader = has_backup.then(|| scope.spawn(|| read_backups(&disk, &goes_on)));
            let times = write(&disk);
            goes_on.store(false, Ordering::Relaxed);
            peak = peak.max(reader.map_or(0, |reader| reader.join().unwrap()));
            times
        });
        (name.to_owned(), percentiles(&times))
    });
    println!(
        "\nLatency of writes beside a backup: see the plot. Its scratch file had at most {} of {} MiB.\n",
        peak >> 20,
        SIZE >> 20
    );
    suite.plots.push(Plot {
        name: "backup",
        title: "Random writes of 4 KiB: one in so many takes longer",
        x: "writes",
        y: "time, µs",
        is_log_y: true,
        marks: number,
        curves: curves.into(),
    });
}

/// Makes one backup after another as long as `goes_on` says. The most that a scratch file has had.
fn read_backups(disk: &Arc<LiveDisk>, goes_on: &AtomicBool) -> u64 {
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

/// What the writes take, sorted.
fn write(disk: &LiveDisk) -> Vec<Duration> {
    let mut random = Random::new(7);
    let mut buffer = Buffer::new(BLOCK as usize);
    let mut times = Vec::new();
    for _ in 0..WRITES {
        let offset = random.below(SIZE / BLOCK) * BLOCK;
        let start = Instant::now();
        disk.write_at(&[VolatileSlice::from(buffer.bytes())], offset)
            .unwrap();
        times.push(start.elapsed());
        // A guest does something else, too.
        std::thread::sleep(Duration::from_micros(50));
    }
    times.sort();
    times
}

/// What all but one in 2, 4, 8… take at most.
fn percentiles(times: &[Duration]) -> Vec<(f64, f64)> {
    let one_in = (1..=14).map(|power| 1 << power);
    one_in
        .map(|n: usize| {
            let at = times.len() - 1 - times.len() / n;
            (n as f64, times[at].as_secs_f64() * 1e6)
        })
        .collect()
}

/// Making an overlay and opening it, by the library, and by `qemu-img create` as a user would.
pub fn forks(suite: &mut Suite) {
    for (name, size) in [("1 GiB", 1 << 30), ("16 TiB", 16 << 40)] {
        let dir = suite.memory();
        let path = dir.path().join("base");
        let options = CreateOptions {
            size,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        let base = Base::open(&path, ImageFormat::Qcow2, &OpenOptions::default()).unwrap();
        for (place, kept, data) in [
            ("temporary", false, false),
            ("temporary, with a data file", false, true),
            ("kept", true, false),
            ("kept, with a data file", true, true),
        ] {
            let contenders = vec![
                Contender::tandem(|_| overlay(&base, dir.path(), kept, data)),
                Contender::peer("qemu-img create", |_| qemu_img(dir.path())),
            ];
            let series = suite.turns(9).run(contenders);
            let text = format!("fork of {name}, {place}");
            suite.add(Line::new(text, Unit::Nanoseconds, series));
        }
    }
}

fn overlay(base: &Base, directory: &Path, kept: bool, data_file: bool) -> f64 {
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
    time.as_nanos() as f64
}

fn qemu_img(directory: &Path) -> f64 {
    let line = "create -q -f qcow2 -b base -F qcow2 over";
    let mut create = Command::new("qemu-img");
    let taken = child::run(create.args(line.split(' ')).current_dir(directory));
    fs::remove_file(directory.join("over")).unwrap();
    taken.wall * 1e9
}
