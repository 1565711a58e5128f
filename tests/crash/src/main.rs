//! Explores what power failures leave of images, and prints what has been explored.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;
use tandem_crash::explore::Explorer;
use tandem_crash::faults::{self, Injected};
use tandem_crash::power::{Effort, Run, Tally};
use tandem_crash::scenarios::{self, SCENARIOS, Scenario};
use tandem_crash::setup::{SETUPS, Setup};
use tandem_crash::{live_faults, queues, report, stress};

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
    /// Instead, have each system call of each operation fail in turn, in each way that it can
    #[arg(long)]
    faults: bool,
    /// Instead, have threads meet on one disk for so many seconds, and judge what each of them saw
    #[arg(long, value_name = "SECONDS")]
    stress: Option<u64>,
    /// Instead, have the engine make mistakes, and tell which are found (in a build with `--cfg mutate`)
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
        self.seeds.unwrap_or(if self.long { 90 } else { 6 })
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

fn inject_faults() -> ExitCode {
    let mut all = Injected::default();
    for setup in faults::SETUPS {
        let mut injected = Injected::default();
        if let Err(problem) = faults::explore(&setup, 1, &mut injected) {
            println!("VIOLATION: {problem}");
            return ExitCode::FAILURE;
        }
        println!("{setup}: {injected}");
        all += injected;
    }
    let mut injected = Injected::default();
    if let Err(problem) = live_faults::explore(1, &mut injected) {
        println!("VIOLATION: {problem}");
        return ExitCode::FAILURE;
    }
    println!("disks in use: {injected}");
    all += injected;
    println!("all: {all}");
    ExitCode::SUCCESS
}

fn stress(from: u64, time: Duration) -> ExitCode {
    let begun = Instant::now();
    let mut judged = 0;
    for seed in from.. {
        for setup in stress::SETUPS {
            match stress::run(&setup, seed, 40) {
                Ok(more) => judged += more,
                Err(problem) => {
                    println!("VIOLATION: {setup}, --from {seed}: {problem}");
                    return ExitCode::FAILURE;
                }
            }
        }
        if begun.elapsed() >= time {
            break;
        }
    }
    println!("{judged} accesses to sectors, no violation");
    ExitCode::SUCCESS
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
    if args.faults {
        return inject_faults();
    }
    if let Some(seconds) = args.stress {
        return stress(args.from, Duration::from_secs(seconds));
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
