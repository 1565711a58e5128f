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

fn describe(mutation: Mutation) -> String {
    match mutation {
        Mutation::Without(place) => {
            let file = place.file();
            let file = file.rsplit_once("src/").map_or(file, |(_, file)| file);
            format!("without {file}:{}:{}", place.line(), place.column())
        }
        Mutation::Mistake(mistake) => mistake.to_owned(),
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
    let (next, missed) = (AtomicUsize::new(0), AtomicUsize::new(0));
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
                            missed.fetch_add(1, Ordering::Relaxed);
                            println!("{name}: NOT FOUND in {states} states");
                        }
                    }
                }
            });
        }
    });
    let missed = missed.into_inner();
    println!("{} mistakes, {missed} not found", all.len());
    match missed {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
