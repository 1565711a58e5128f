//! The crash explorer: what a power failure can leave on disk, and whether it keeps the promises.
//!
//! A random workload runs on an image in recording storage, which logs every change and sync of
//! both files. Then for points in the log, states are built that the disks could be in if power
//! failed there: what was synced, and of the rest any subset, torn at sectors of 512 bytes, each
//! file on its own. Each state is opened and judged:
//!
//! 1. what had been flushed is there; a sector written since is old or new; nothing else changed;
//! 2. `check` finds leaks at most;
//! 3. a raw data file whose mapping is complete has the same content as the disk;
//! 4. the image can be written on, and all of this holds again.
//!
//! The same is done with operations on images that no guest uses: `operations` and `rewrites`.

mod explore;
mod operations;
mod power;
mod rewrites;
mod storage;
mod workload;

use explore::{Explorer, Found};
use workload::{Kind, Setup};

/// Kinds and cluster sizes that are explored.
const SETUPS: [Setup; 23] = [
    Setup::new(Kind::Overlay, 3, 1024),
    Setup::new(Kind::Overlay, 3, 4096),
    Setup::new(Kind::Internal, 3, 512),
    Setup::new(Kind::Internal, 2, 512),
    Setup::new(Kind::Internal, 3, 4096),
    Setup::new(Kind::Internal, 3, 65536),
    Setup::new(Kind::External, 3, 512),
    Setup::new(Kind::External, 3, 4096),
    Setup::new(Kind::External, 3, 65536),
    Setup::new(Kind::Packed, 3, 512),
    Setup::new(Kind::Packed, 3, 4096),
    Setup::new(Kind::Packed, 3, 65536),
    Setup::new(Kind::RawIncomplete, 3, 512),
    Setup::new(Kind::RawIncomplete, 3, 4096),
    Setup::new(Kind::Raw, 3, 512),
    Setup::new(Kind::Raw, 3, 65536),
    Setup::new(Kind::Snapshot, 3, 512),
    Setup::new(Kind::Snapshot, 3, 4096),
    Setup::new(Kind::Internal, 3, 16384).with_subclusters(),
    Setup::new(Kind::External, 3, 16384).with_subclusters(),
    Setup::new(Kind::Overlay, 3, 16384).with_subclusters(),
    Setup::new(Kind::Snapshot, 3, 16384).with_subclusters(),
    Setup::new(Kind::Raw, 3, 16384).with_subclusters(),
];

/// Explores `seeds` workloads of every setup; the first violation fails, with what replays it.
fn explore(seeds: std::ops::Range<u64>) {
    let mut states = 0;
    for setup in SETUPS {
        for seed in seeds.clone() {
            let mut explorer = Explorer::new(setup, seed);
            if let Err(Found { problem, point }) = explorer.run(Some) {
                panic!("{setup:?}, seed {seed}, crash after event {point}: {problem}");
            }
            states += explorer.states;
        }
    }
    println!("crash explorer: {states} states, no violation");
}

/// How many seeds of each workload are tried.
fn seeds() -> u64 {
    let asked = std::env::var("TANDEM_CRASH_SEEDS");
    asked.ok().and_then(|n| n.parse().ok()).unwrap_or(6)
}

/// Each of `cases` with a seed, and with more of them where more workloads are asked for.
fn rounds<T: Clone>(cases: impl IntoIterator<Item = T>) -> impl Iterator<Item = (u64, T)> {
    let seeds = seeds().div_ceil(6);
    let cases = cases.into_iter().enumerate();
    cases
        .flat_map(move |(i, case)| (0..seeds).map(move |seed| (seed * 64 + i as u64, case.clone())))
}

#[test]
fn promises_hold_after_power_failures() {
    explore(0..seeds());
}

/// The explorer finds an engine at fault that leaves out any one of its barriers: the first, second or
/// third sync of a request or flush.
#[test]
fn each_missing_barrier_is_found() {
    for (kind, barriers) in [
        // Data and counts, links of refcount blocks or the mapping, the mapping.
        (Kind::Internal, 3),
        (Kind::Overlay, 2),
        (Kind::Snapshot, 2),
        // Data, counts, the mapping.
        (Kind::External, 3),
        (Kind::Packed, 3),
        // Data alone, where the mapping stays; and that behind it.
        (Kind::Raw, 1),
        (Kind::RawIncomplete, 2),
    ] {
        let setup = Setup::new(kind, 3, 512);
        for barrier in 0..barriers {
            let caught = (0..60).any(|seed| {
                let mut syncs = 0;
                let without = |event: storage::Event| match event {
                    storage::Event::Begun { .. } => {
                        syncs = 0;
                        Some(event)
                    }
                    storage::Event::Sync { .. } => {
                        syncs += 1;
                        (syncs != barrier + 1).then_some(event)
                    }
                    other => Some(other),
                };
                Explorer::new(setup, seed).run(without).is_err()
            });
            assert!(caught, "{kind:?} without sync {barrier} was not caught");
        }
    }
}
