//! `tandem run` with a guest that writes to a disk of each kind at the same time, and tells of each flush
//! that has been answered.

use std::fs;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::{GUEST, have_kvm};
use crate::history::{History, Stamp};
use crate::image::{Image, KINDS, SECTORS};
use crate::{PATIENCE, Random, Running, content, kills, program};

/// The longest time that is given to a guest after its first flush, in microseconds.
const LONGEST: u64 = 500_000;
/// Batches that the guest may have begun after the last flush that it was heard of.
const UNHEARD: u64 = 2;

/// Runs the guest until it has been at work for `time`, kills it, and returns the number of the last batch
/// that it has told to be flushed.
fn killed(images: &[Image], start: u64, time: Duration) -> u64 {
    let console = images[0].path("console");
    fs::write(&console, "").unwrap();
    let disks = (0..images.len()).map(|index| format!("disk={SECTORS}:rw:{index}"));
    let words: Vec<_> = disks.chain([format!("cases=stamps-{start}")]).collect();
    let mut command = Command::new(program("tandem"));
    command.args(["run", "--memory", "64M"]);
    command.arg("--kernel").arg(&*GUEST);
    command
        .arg("--serial")
        .arg(format!("file={}", console.display()));
    command.args(["--cmdline", &words.join(" ")]);
    for (index, image) in images.iter().enumerate() {
        command
            .arg("--disk")
            .arg(format!("{},serial={index}", image.disk()));
    }
    let mut tandem = Running::start(command);
    let said = || fs::read_to_string(&console).unwrap();
    let end = Instant::now() + PATIENCE;
    while !said().contains("flushed 1") {
        assert!(
            Instant::now() < end,
            "the guest flushes nothing: {}",
            said()
        );
        tandem.assert_running();
        thread::sleep(Duration::from_millis(1));
    }
    thread::sleep(time);
    tandem.kill();
    let said = said();
    let lines = said
        .split_inclusive('\n')
        .filter(|line| line.ends_with('\n'));
    let mut flushed = lines.filter_map(|line| line.trim_end().strip_prefix("flushed "));
    flushed
        .next_back()
        .map_or(0, |number| number.parse().unwrap())
}

#[test]
fn tandem_run_loses_nothing() {
    if !have_kvm() {
        return;
    }
    let times = kills(3);
    let images = KINDS.map(Image::create);
    let mut histories = KINDS.map(|_| History::new(SECTORS));
    let mut random = Random(3);
    let mut batches = 0;
    for start in 0..times {
        let time = Duration::from_micros(random.below(LONGEST));
        let flushed = killed(&images, start, time);
        batches += flushed;
        for (image, history) in images.iter().zip(&mut histories) {
            for number in 1..=flushed + UNHEARD {
                let (writes, seed) = content::batch(start, number, SECTORS);
                for sectors in writes {
                    let stamp = Stamp::of_seed(seed);
                    history.begin(sectors.clone(), stamp);
                    if number <= flushed {
                        history.complete(sectors, stamp);
                    }
                }
            }
            history.flushed(history.before_flush());
            let judged = history.judge(&image.judge(start % 8 == 7));
            judged.unwrap_or_else(|lost| panic!("{}, kill {start}: {lost}", image.kind.name));
        }
    }
    let disks = images.len();
    println!(
        "tandem run: {times} kills with {disks} disks each, {batches} batches flushed, nothing lost"
    );
}
