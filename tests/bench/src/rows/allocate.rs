//! First writes: to clusters that are not there yet, the flush at the end included.

use std::fs;
use std::path::{Path, PathBuf};

use super::requests::contender;
use crate::clock::{self, Clock};
use crate::image::{Kind, image};
use crate::measure::{Goal, Line, Series, Unit};
use crate::suite::Suite;
use crate::target::{Target, Who, fill_image, open_file};
use crate::work::{Buffer, Work, in_order, shuffled};

const SIZE: u64 = 256 << 20;
const CLUSTER: u64 = 64 << 10;
const BLOCK: u64 = 4096;

/// Processor time in memory, and time that goes by on a disk.
pub fn rows(suite: &mut Suite) {
    let shapes = [
        ("4 KiB random", BLOCK, shuffled(SIZE, CLUSTER)),
        ("64 KiB sequential", CLUSTER, in_order(SIZE, CLUSTER)),
    ];
    for (place, clock) in [("", clock::thread as Clock), (", on a disk", clock::wall)] {
        for (name, length, offsets) in &shapes {
            for kind in Kind::ALL.into_iter().chain([Kind::OverHole]) {
                let dir = if place.is_empty() {
                    suite.memory()
                } else {
                    suite.disk()
                };
                let series = measure(suite, dir.path(), kind, *length, offsets, clock);
                let text = format!("{name} first writes and a flush, {}{place}", kind.name());
                let line = Line::new(text, Unit::Nanoseconds, series);
                suite.add(line.goal(Goal::OfBare(0.95)));
            }
        }
    }
}

/// Every turn has a new image.
fn measure(
    suite: &Suite,
    dir: &Path,
    kind: Kind,
    length: u64,
    offsets: &[u64],
    clock: Clock,
) -> Vec<Series> {
    let all = [Who::Bare, Who::Tandem, Who::Imago, Who::Qcow2Rs];
    let contenders = all.into_iter().filter(|who| who.knows(kind)).map(|who| {
        let own = dir.join(who.name());
        let mut buffer = Buffer::new(length as usize);
        contender(who, move |_| {
            let path = image(&own, kind, SIZE);
            let target = who.open(&path, kind);
            if who == Who::Bare {
                let file = open_file(&path.with_file_name("bare"));
                file.set_len(SIZE).unwrap();
            }
            let time = until_flushed(clock, &*target, buffer.bytes(), offsets);
            drop(target);
            fs::remove_dir_all(&own).unwrap();
            time
        })
    });
    suite.turns(1).run(contenders.collect())
}

/// What a write to each of `offsets` takes, with its part of a flush.
pub fn until_flushed(clock: Clock, target: &dyn Target, buffer: &mut [u8], offsets: &[u64]) -> f64 {
    let before = clock();
    Work::Write.carry_out(target, buffer, offsets);
    target.flush();
    (clock() - before) / offsets.len() as f64
}

/// Small writes over a backing file that has data everywhere. Bare is what they come down to: a
/// cluster is read and written.
pub fn copies(suite: &mut Suite) {
    const DISK: u64 = 128 << 20;
    let offsets = shuffled(DISK, CLUSTER);
    let dir = suite.memory();
    let all = [Who::Bare, Who::Tandem, Who::Imago, Who::Qcow2Rs];
    let contenders = all.map(|who| {
        let own = dir.path().join(who.name());
        let overlay = image(&own, Kind::Overlay, DISK);
        fill_image(&own.join("base"), DISK);
        let empty = fs::read(&overlay).unwrap();
        let mut buffer = Buffer::new(BLOCK as usize);
        let offsets = &offsets;
        let run = move |_| {
            if who == Who::Bare {
                return bare_copies(&own, offsets);
            }
            fs::write(&overlay, &empty).unwrap();
            let target = who.open(&overlay, Kind::Overlay);
            until_flushed(clock::thread, &*target, buffer.bytes(), offsets)
        };
        contender(who, run)
    });
    let series = suite.turns(3).run(contenders.into());
    let text = "4 KiB random first writes over a backing file";
    let line = Line::new(text, Unit::Nanoseconds, series);
    suite.add(line.goals(&[Goal::TimesPeers(2.0), Goal::OfBare(0.9)]));
}

fn bare_copies(dir: &Path, offsets: &[u64]) -> f64 {
    let base = open_file(&dir.join("base"));
    let path: PathBuf = dir.join("bare");
    let new = open_file(&path);
    let mut buffer = Buffer::new(CLUSTER as usize);
    let before = clock::thread();
    for at in offsets {
        base.read(buffer.bytes(), *at);
        new.write(buffer.bytes(), *at);
    }
    new.flush();
    let time = (clock::thread() - before) / offsets.len() as f64;
    fs::remove_file(path).unwrap();
    time
}
