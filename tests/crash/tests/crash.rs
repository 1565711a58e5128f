//! A part of what the command explores, which takes seconds.

use std::cell::Cell;
use std::thread;

use tandem_crash::explore::Explorer;
use tandem_crash::power::{Effort, Run, Tally};
use tandem_crash::scenarios::SCENARIOS;
use tandem_crash::setup::{Kind, SETUPS, Setup};
use tandem_crash::storage::Event;

const EFFORT: Effort = Effort {
    few: 4,
    sampled: 3,
    by_qemu: 400,
};

#[test]
fn promises_hold_after_power_failures() {
    let of_seed = |seed| {
        let mut tally = Tally::default();
        for setup in SETUPS {
            let explored = Explorer::new(setup, seed, EFFORT).run_and_shrink(&mut tally);
            explored.unwrap_or_else(|found| panic!("{setup}, seed {seed}: {found}"));
        }
        tally
    };
    let mut tally = Tally::default();
    thread::scope(|scope| {
        let seeds = [0, 1, 2].map(|seed| scope.spawn(move || of_seed(seed)));
        for explored in seeds {
            tally += explored.join().unwrap();
        }
    });
    println!("{tally:?}");
    assert!(tally.states > 10_000 && tally.by_qemu > 20);
}

#[test]
fn promises_hold_after_power_failures_during_operations() {
    let effort = Effort {
        sampled: 12,
        ..EFFORT
    };
    let mut run = Run::new(1, effort);
    for (_, scenario) in SCENARIOS {
        scenario(&mut run);
    }
    println!("{:?}", run.tally);
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
            let without = |log: &mut Vec<Event>| {
                let syncs = Cell::new(0);
                log.retain(|event| match event {
                    Event::Begun { .. } => {
                        syncs.set(0);
                        true
                    }
                    Event::Sync { .. } => {
                        syncs.set(syncs.get() + 1);
                        syncs.get() != barrier + 1
                    }
                    _ => true,
                });
            };
            let caught = (0..60).any(|seed| {
                let explorer = Explorer::new(setup, seed, EFFORT);
                explorer.run(&mut Tally::default(), without).is_err()
            });
            assert!(caught, "{kind:?} without sync {barrier} was not caught");
        }
    }
}
