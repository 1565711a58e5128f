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

mod explore;
mod storage;
mod workload;

use explore::{Explorer, Found};
use workload::{Kind, Setup};

/// Kinds and cluster sizes that are explored.
const SETUPS: [Setup; 16] = [
    Setup {
        kind: Kind::Overlay,
        version: 3,
        cluster_size: 1024,
    },
    Setup {
        kind: Kind::Overlay,
        version: 3,
        cluster_size: 4096,
    },
    Setup {
        kind: Kind::Internal,
        version: 3,
        cluster_size: 512,
    },
    Setup {
        kind: Kind::Internal,
        version: 2,
        cluster_size: 512,
    },
    Setup {
        kind: Kind::Internal,
        version: 3,
        cluster_size: 4096,
    },
    Setup {
        kind: Kind::Internal,
        version: 3,
        cluster_size: 65536,
    },
    Setup {
        kind: Kind::External,
        version: 3,
        cluster_size: 512,
    },
    Setup {
        kind: Kind::External,
        version: 3,
        cluster_size: 4096,
    },
    Setup {
        kind: Kind::External,
        version: 3,
        cluster_size: 65536,
    },
    Setup {
        kind: Kind::Packed,
        version: 3,
        cluster_size: 512,
    },
    Setup {
        kind: Kind::Packed,
        version: 3,
        cluster_size: 4096,
    },
    Setup {
        kind: Kind::Packed,
        version: 3,
        cluster_size: 65536,
    },
    Setup {
        kind: Kind::RawIncomplete,
        version: 3,
        cluster_size: 512,
    },
    Setup {
        kind: Kind::RawIncomplete,
        version: 3,
        cluster_size: 4096,
    },
    Setup {
        kind: Kind::Raw,
        version: 3,
        cluster_size: 512,
    },
    Setup {
        kind: Kind::Raw,
        version: 3,
        cluster_size: 65536,
    },
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

#[test]
fn promises_hold_after_power_failures() {
    let seeds = std::env::var("TANDEM_CRASH_SEEDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(6);
    explore(0..seeds);
}

/// The explorer finds an engine at fault whose syncs do nothing.
#[test]
fn a_missing_barrier_is_found() {
    for kind in [Kind::Internal, Kind::External, Kind::Packed] {
        let setup = Setup {
            kind,
            version: 3,
            cluster_size: 512,
        };
        let caught = (0..20).any(|seed| {
            let dropped = |event: storage::Event| match event {
                storage::Event::Sync { .. } => None,
                other => Some(other),
            };
            Explorer::new(setup, seed).run(dropped).is_err()
        });
        assert!(caught, "{kind:?} without syncs was not caught");
    }
}
