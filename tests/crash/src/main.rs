//! Explores what power failures leave of images, and prints what has been explored.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use clap::Parser;
use tandem_crash::explore::Explorer;
use tandem_crash::power::{Effort, Run, Tally};
use tandem_crash::queues;
use tandem_crash::report;
use tandem_crash::scenarios::{self, SCENARIOS, Scenario};
use tandem_crash::setup::{SETUPS, Setup};

/// Builds states that a power failure could leave, and judges each. Ends with status 1 if one of them
/// breaks a promise.
#[derive(Parser)]
struct Args {
    /// Explore more than a million states
    #[arg(long)]
    long: bool,
    /// How many workloads of each kind are run
    #[arg(long, value_name = "N")]
    seeds: Option<u64>,
    /// Number of the first workload of each kind
    #[arg(long, value_name = "N", default_value_t = 0)]
    from: u64,
    /// Only what has this in its name
    #[arg(long, value_name = "NAME")]
    only: Option<String>,
    /// Requests of so many threads at the same time, in an order that the seed decides on (in a build
    /// with `--cfg shuttle`)
    #[arg(long, value_name = "N", default_value_t = 1)]
    queues: usize,
    /// Threads that explore
    #[arg(long, value_name = "N", default_value_t = 2)]
    threads: usize,
    /// Have the engine make mistakes, and tell which are found (in a build with `--cfg mutate`)
    #[arg(long)]
    mutants: bool,
}

/// Something to explore.
enum Task {
    Workload(Setup, u64),
    Operation(&'static str, Scenario),
}

impl Args {
    fn seeds(&self) -> u64 {
        self.seeds.unwrap_or(if self.long { 160 } else { 6 })
    }

    fn effort(&self) -> Effort {
        Effort {
            few: if self.long { 6 } else { 4 },
            sampled: 4,
            by_qemu: if cfg!(shuttle) { 0 } else { 1000 },
        }
    }

    fn tasks(&self) -> Vec<Task> {
        let is_asked = |name: &str| self.only.as_ref().is_none_or(|only| name.contains(only));
        let mut tasks = Vec::new();
        if self.queues == 1 {
            let asked = SCENARIOS.iter().filter(|(name, _)| is_asked(name));
            tasks.extend(asked.map(|(name, scenario)| Task::Operation(name, *scenario)));
        }
        for seed in self.from..self.from.saturating_add(self.seeds()) {
            let asked = SETUPS
                .into_iter()
                .filter(|setup| is_asked(&setup.to_string()));
            tasks.extend(asked.map(|setup| Task::Workload(setup, seed)));
        }
        tasks
    }

    /// Explores `task`, and says what has gone wrong.
    fn explore(&self, task: &Task) -> (String, Tally, Result<(), String>) {
        match *task {
            Task::Workload(setup, seed) => {
                let mut explorer = Explorer::new(setup, seed, self.effort());
                explorer.queues = self.queues;
                let explore = move || {
                    let mut tally = Tally::default();
                    let explored = explorer.run_and_shrink(&mut tally);
                    (tally, explored.map_err(|found| found.to_string()))
                };
                let (tally, explored) = queues::scheduled(seed, explore);
                let again = format!("--only {setup} --from {seed} --seeds 1");
                let name = setup.to_string();
                (name, tally, explored.map_err(|e| format!("{again}: {e}")))
            }
            Task::Operation(name, scenario) => {
                let effort = Effort {
                    sampled: 12,
                    ..self.effort()
                };
                let mut run = Run::new(self.seeds().div_ceil(6), effort);
                let explored = scenarios::run(scenario, &mut run);
                let explored = explored.map_err(|e| format!("--only {name}: {e}"));
                (name.to_owned(), run.tally, explored)
            }
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    if args.mutants {
        #[cfg(mutate)]
        return tandem_crash::mutants::explore(args.threads);
        #[cfg(not(mutate))]
        {
            eprintln!("this needs a build with RUSTFLAGS=\"--cfg mutate\"");
            return ExitCode::FAILURE;
        }
    }
    let tasks = args.tasks();
    let next = AtomicUsize::new(0);
    let rows: Mutex<BTreeMap<String, Tally>> = Mutex::default();
    thread::scope(|scope| {
        for _ in 0..args.threads {
            scope.spawn(|| {
                while let Some(task) = tasks.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let (name, tally, explored) = args.explore(task);
                    if let Err(problem) = explored {
                        println!("VIOLATION: {problem}");
                    }
                    *rows.lock().unwrap().entry(name).or_default() += tally;
                }
            });
        }
    });
    let rows: Vec<(String, Tally)> = rows.into_inner().unwrap().into_iter().collect();
    report::print(&rows);
    let violations: usize = rows.iter().map(|(_, tally)| tally.violations).sum();
    match violations {
        0 => ExitCode::SUCCESS,
        _ => ExitCode::FAILURE,
    }
}
