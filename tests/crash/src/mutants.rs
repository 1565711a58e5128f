//! Mistakes of the engine, and whether they are found.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::{panic, thread};

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

/// What is none of the barriers that a power failure finds the lack of: in which file, how many, and why.
const OTHERS: &[(&str, usize, &str)] = &[
    (
        "amend/mod.rs",
        2,
        "gives back space, and looks at counts, that closing writes",
    ),
    ("bitmaps/change.rs", 1, "gives back space, at worst later"),
    ("bitmaps/tracked.rs", 1, "gives back space, at worst later"),
    (
        "check/refcounts.rs",
        2,
        "a repair that was broken off is repeated",
    ),
    ("io.rs", 1, "bounds memory"),
    (
        "resize.rs",
        3,
        "bounds memory; gives back the space of what a shrink has cut off",
    ),
    (
        "snapshot/mod.rs",
        6,
        "stand for each other; flags and leaks, which the dirty bit has repaired",
    ),
    (
        "preallocate.rs",
        1,
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

/// In which file of the engine the mistake is, or which it is.
fn file_of(mutation: Mutation) -> String {
    let file = match mutation {
        Mutation::Without(place) => place.file(),
        Mutation::Mistake(mistake) => mistake,
    };
    file.rsplit_once("src/")
        .map_or(file, |(_, file)| file)
        .to_owned()
}

fn describe(mutation: Mutation) -> String {
    let file = file_of(mutation);
    match mutation {
        Mutation::Without(place) => format!("without {file}:{}:{}", place.line(), place.column()),
        Mutation::Mistake(_) => file,
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
    let missed: Mutex<BTreeMap<String, usize>> = Mutex::default();
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
                    let (name, states) = (describe(*mutation), tally.states);
                    match found {
                        Some(found) => {
                            let found = found.lines().next().unwrap_or_default();
                            println!("{name}: found after {states} states: {found}");
                        }
                        None => {
                            *missed
                                .lock()
                                .unwrap()
                                .entry(file_of(*mutation))
                                .or_default() += 1;
                            println!("{name}: NOT FOUND in {states} states");
                        }
                    }
                }
            });
        }
    });
    let mut missed = missed.into_inner().unwrap();
    for &(file, count, why) in OTHERS {
        if let Some(left) = missed.get_mut(&format!("qcow2/{file}")) {
            println!("{file}: {left} not found, {count} are no such barriers: {why}");
            *left = left.saturating_sub(count);
        }
    }
    let missed: usize = missed.values().sum();
    println!("{} mistakes, {missed} more not found", all.len());
    match missed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
