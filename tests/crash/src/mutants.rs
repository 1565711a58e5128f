//! Mistakes of the engine, and whether they are found.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{fs, panic, thread};

use tandem_block::mutate::{self, Mutation};

use crate::explore::Explorer;
use crate::faults::{self, Injected};
use crate::power::{Effort, Run, Tally};
use crate::scenarios::{self, SCENARIOS};
use crate::setup::SETUPS;

const EFFORT: Effort = Effort {
    few: 4,
    sampled: 8,
    by_qemu: 0,
};
/// Workloads of each kind with which a mistake is looked for.
const SEEDS: u64 = 16;
/// States after which it is given up.
const ENOUGH: usize = 30_000;
/// Those by which it is told which mistakes can be made in a kind of workload.
const FIRST: u64 = 3;

/// What is none of the barriers that a power failure finds the lack of: where it is, and why.
const OTHERS: &[(&str, &str)] = &[
    (
        "qcow2/amend/mod.rs, carry_out: self.write_counts()?;",
        "gives back space, at worst when the image is closed",
    ),
    (
        "qcow2/amend/mod.rs, renew_refcounts: self.write_counts()?;",
        "looks at counts that are on disk as they are in memory",
    ),
    (
        "qcow2/bitmaps/change.rs, release_places: self.write_counts()",
        "gives back space, at worst later",
    ),
    (
        "qcow2/bitmaps/tracked.rs, store_bitmaps: self.write_counts()",
        "gives back space, at worst later",
    ),
    (
        "qcow2/check/refcounts.rs, write_refcounts: self.files.sync()",
        "a repair that was broken off is repeated",
    ),
    (
        "qcow2/check/refcounts.rs, rebuild_refcounts: self.files.sync()?; #2",
        "a repair that was broken off is repeated",
    ),
    (
        "qcow2/live.rs, freeze: self.write_back()?;",
        "stands for that of closing the image, which comes next",
    ),
    (
        "qcow2/io.rs, limit_dirty: self.write_back()",
        "bounds memory",
    ),
    (
        "qcow2/resize.rs, shrink: .and_then(|()| self.write_back());",
        "gives back the space of what has been cut off",
    ),
    (
        "qcow2/resize.rs, shrink: .and_then(|()| external.file.sync()),",
        "gives back the space of what has been cut off",
    ),
    (
        "qcow2/resize.rs, unmap_clusters: self.write_back()?;",
        "bounds memory",
    ),
    (
        "qcow2/snapshot/mod.rs, run: self.disk.write_back()?;",
        "gives back space, which the other one does, too",
    ),
    (
        "qcow2/snapshot/mod.rs, run: self.disk.write_back()?; #2",
        "writes the counts of what has been given back: at worst leaks",
    ),
    (
        "qcow2/snapshot/mod.rs, delete: self.disk.write_counts()?; #2",
        "flags, which the dirty bit has repaired",
    ),
    (
        "qcow2/snapshot/mod.rs, finish: self.disk.write_counts()?;",
        "leaks, which the dirty bit has repaired",
    ),
    (
        "qcow2/snapshot/mod.rs, set_dirty: return self.disk.image.sync();",
        "stands for others, in images that have no dirty bit",
    ),
    (
        "qcow2/snapshot/mod.rs, set_dirty: self.disk.image.sync()?;",
        "stands for the one before it",
    ),
    (
        "qcow2/preallocate.rs, preallocate_end: self.write_back()",
        "at worst the last cluster of the old disk has no space",
    ),
];

/// What is explored: numbers of scenarios, and behind them those of setups, and of faults.
const SUBJECTS: usize = SCENARIOS.len() + SETUPS.len();
const FAULTS: usize = SUBJECTS;

/// Explores `subject` with `seed`; what was found, if anything.
fn find(subject: usize, seed: u64, tally: &mut Tally) -> Option<String> {
    if subject == FAULTS {
        return faults::explore(&faults::SETUPS[0], 3, &mut Injected::default()).err();
    }
    match SCENARIOS.get(subject) {
        Some((name, scenario)) => {
            let mut run = Run::new(seed + 1, EFFORT);
            let found = scenarios::run(*scenario, &mut run).err();
            *tally += run.tally;
            found.map(|problem| format!("{name}: {problem}"))
        }
        None => {
            let setup = SETUPS[subject - SCENARIOS.len()];
            let explorer = Explorer::new(setup, seed, EFFORT);
            let found = explorer.run(tally, |_| ()).err();
            found.map(|found| format!("{setup}, seed {seed}: {}", found.problem))
        }
    }
}

/// Which mistakes can be made in what.
fn opportunities() -> BTreeMap<Mutation, Vec<usize>> {
    let mut all: BTreeMap<Mutation, Vec<usize>> = BTreeMap::new();
    for subject in 0..SUBJECTS {
        let seeds = if subject < SCENARIOS.len() { 1 } else { FIRST };
        for seed in 0..seeds {
            let found = find(subject, seed, &mut Tally::default());
            assert_eq!(found, None, "without a mistake");
        }
        for mutation in mutate::met() {
            all.entry(mutation).or_default().push(subject);
        }
    }
    // This one is made by another thread.
    let forgiven = Mutation::Mistake(mutate::SYNC_FORGIVEN);
    all.insert(forgiven, vec![FAULTS]);
    all
}

/// Explores `subjects` until `mutation` is found.
fn hunt(mutation: Mutation, subjects: &[usize], tally: &mut Tally) -> Option<String> {
    for seed in 0..SEEDS {
        for subject in subjects {
            // An operation is explored as far as it goes at the first time.
            let is_over = seed > 1 && *subject < SCENARIOS.len() || tally.states > ENOUGH;
            if is_over {
                continue;
            }
            mutate::set(Some(mutation));
            let found = find(*subject, seed, tally);
            mutate::set(None);
            if found.is_some() {
                return found;
            }
        }
    }
    None
}

/// What the mistake is: what is left out, by the line of the code and the function that it is in, so that
/// it is the same wherever that stands.
fn name(mutation: Mutation) -> String {
    let place = match mutation {
        Mutation::Without(place) => place,
        Mutation::Mistake(mistake) => return mistake.to_owned(),
    };
    let root = concat!(env!("CARGO_MANIFEST_DIR"), "/../..");
    let source = fs::read_to_string(Path::new(root).join(place.file())).unwrap();
    let lines: Vec<&str> = source.lines().map(str::trim).collect();
    let at = place.line() as usize - 1;
    let text = lines[at];
    let is_function = |line: &&str| line.split_whitespace().any(|word| word == "fn");
    let start = lines[..at]
        .iter()
        .rposition(|line| is_function(&line))
        .unwrap_or(0);
    let function = lines[start].split("fn ").nth(1).unwrap_or_default();
    let function = function.split(['(', '<']).next().unwrap_or_default();
    let file = place.file();
    let file = file.rsplit_once("src/").map_or(file, |(_, file)| file);
    match lines[start..at]
        .iter()
        .filter(|line| **line == text)
        .count()
    {
        0 => format!("{file}, {function}: {text}"),
        before => format!("{file}, {function}: {text} #{}", before + 1),
    }
}

/// Has the engine make each mistake that it can, on `threads` threads, and prints a table.
pub fn explore(threads: usize) -> ExitCode {
    thread_local!(static QUIET: Cell<bool> = const { Cell::new(false) });
    let hook = panic::take_hook();
    panic::set_hook(Box::new(move |info| {
        if !QUIET.get() {
            hook(info);
        }
    }));
    let all: Vec<_> = opportunities().into_iter().collect();
    let next = AtomicUsize::new(0);
    let missed: Mutex<BTreeSet<String>> = Mutex::default();
    let output = Mutex::new(());
    thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                QUIET.set(true);
                while let Some((mutation, subjects)) = all.get(next.fetch_add(1, Ordering::Relaxed))
                {
                    let mut tally = Tally::default();
                    let found = hunt(*mutation, subjects, &mut tally);
                    let _output = output.lock().unwrap();
                    let (name, states) = (name(*mutation), tally.states);
                    match found {
                        Some(found) => {
                            let found = found.lines().next().unwrap_or_default();
                            println!("{name}: found after {states} states: {found}");
                        }
                        None => {
                            println!("{name}: NOT FOUND in {states} states");
                            missed.lock().unwrap().insert(name);
                        }
                    }
                }
            });
        }
    });
    let mut missed = missed.into_inner().unwrap();
    let found = all.len() - missed.len();
    let mut listed = 0;
    for (name, why) in OTHERS {
        if missed.remove(*name) {
            listed += 1;
            println!("{name}: no such barrier: {why}");
        } else {
            println!("{name}: listed, and found or not there");
        }
    }
    for name in &missed {
        println!("{name}: NOT FOUND, and not listed");
    }
    println!(
        "{} mistakes: {found} found, {listed} listed as no such barriers, {} neither",
        all.len(),
        missed.len()
    );
    match missed.len() {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
