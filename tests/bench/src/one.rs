//! A single piece of work in a process of its own, to be looked at from outside: its system calls are
//! traced, its instructions counted, its memory is clean.

use std::path::{Path, PathBuf};
use std::time::Instant;

use clap::{Args, ValueEnum};
use tandem_block::qcow2::{Backing, OpenOptions, Qcow2};

use crate::clock;
use crate::image::{Kind, image};
use crate::target::{self, Target, Who, open_file};
use crate::work::{Buffer, Work, fill, shuffled};

const CLUSTER: u64 = 64 << 10;
const BLOCK: u64 = 4096;

/// What is done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Scenario {
    /// Random blocks are read.
    Read,
    /// Random blocks are written that are there.
    Overwrite,
    /// Random clusters are written for the first time, and flushed at the end.
    Allocate,
    /// The same, and each is flushed.
    AllocateFlushed,
    /// Random clusters are written over a backing file that has data, and flushed at the end.
    Copy,
    /// The image is opened, and what that has taken is printed.
    Open,
}

impl Scenario {
    pub fn name(self) -> String {
        let value = self.to_possible_value();
        value.map_or(String::new(), |value| value.get_name().to_owned())
    }
}

#[derive(Args)]
pub struct One {
    #[arg(long)]
    pub scenario: Scenario,
    /// Index of [`Who::ALL`]
    #[arg(long)]
    pub who: usize,
    /// Index of [`Kind::ALL`]
    #[arg(long)]
    pub kind: usize,
    #[arg(long, default_value_t = 1)]
    pub requests: usize,
    /// A directory that is made, or for `open` the image
    #[arg(long)]
    pub path: PathBuf,
}

pub fn run(one: &One) {
    let (who, kind) = (Who::ALL[one.who], Kind::ALL[one.kind]);
    if one.scenario == Scenario::Open {
        return open(who, kind, &one.path);
    }
    let is_there = matches!(one.scenario, Scenario::Read | Scenario::Overwrite);
    let size = if is_there {
        64 << 20
    } else {
        (one.requests as u64 + 1) * CLUSTER
    };
    let path = image(&one.path, kind, size);
    if who == Who::Bare {
        let file = open_file(&path.with_file_name("bare"));
        file.set_len(size).unwrap();
    }
    if one.scenario == Scenario::Copy {
        fill(&target::tandem(&path.with_file_name("base")), size);
    }
    let target: Box<dyn Target> = match who {
        Who::Tandem => Box::new(tandem(&path, kind)),
        _ => who.open(&path, kind),
    };
    if is_there {
        fill(&*target, size);
    }
    let step = if is_there { BLOCK } else { CLUSTER };
    let offsets = shuffled(size, step);
    let mut offsets = offsets.into_iter().cycle();
    let mut buffer = Buffer::new(BLOCK as usize);
    if one.scenario == Scenario::AllocateFlushed {
        // The first one makes tables, too, which those behind it find there.
        let first: Vec<u64> = offsets.by_ref().take(1).collect();
        counted(one.scenario, &*target, buffer.bytes(), &first);
    }
    let offsets: Vec<u64> = offsets.take(one.requests).collect();
    mark();
    counted(one.scenario, &*target, buffer.bytes(), &offsets);
    mark();
}

/// An image whose other files are told. Following their names takes a system call that `valgrind` (3.19 at
/// least) does not know.
fn tandem(image: &Path, kind: Kind) -> Qcow2 {
    let base = image.with_file_name("base");
    let options = OpenOptions {
        data_file: kind.has_data_file().then(|| image.with_file_name("data")),
        backing: match kind {
            Kind::Overlay => Backing::File {
                path: base,
                format: None,
            },
            _ => Backing::Named,
        },
        ..OpenOptions::default()
    };
    Qcow2::open(image, &options).unwrap()
}

/// A system call that who traces them knows the work by.
fn mark() {
    std::env::set_current_dir(".").unwrap();
}

/// What is counted. Who counts knows it by its name.
#[inline(never)]
fn counted(scenario: Scenario, target: &dyn Target, buffer: &mut [u8], offsets: &[u64]) {
    match scenario {
        Scenario::Read => Work::Read.carry_out(target, buffer, offsets),
        Scenario::AllocateFlushed => {
            for at in offsets {
                target.write(buffer, *at);
                target.flush();
            }
        }
        Scenario::Overwrite => Work::Write.carry_out(target, buffer, offsets),
        Scenario::Allocate | Scenario::Copy => {
            Work::Write.carry_out(target, buffer, offsets);
            target.flush();
        }
        Scenario::Open => {}
    }
}

/// Prints nanoseconds and KiB.
fn open(who: Who, kind: Kind, path: &Path) {
    let resident = || clock::resident_kib("self", |_| true);
    // What looking takes is there before.
    resident();
    let before = resident();
    let start = Instant::now();
    let target = who.open(path, kind);
    let time = start.elapsed();
    println!("{} {}", time.as_nanos(), resident() - before);
    drop(target);
}
