//! Runs workloads, and explores what power failures would leave of them.

use std::fmt;

use tandem_block::Disk;
use tandem_block::qcow2::OpenOptions;

use crate::judge::{Judge, check_clean};
use crate::model::Model;
use crate::power::{Effort, Files, Power, Tally};
use crate::qemu;
use crate::queues;
use crate::random::Random;
use crate::setup::Setup;
use crate::shrink;
use crate::storage::{Event, Log, Memory, Which};
use crate::workload::{Maker, Op, Session};

/// Operations of a workload.
const OPS: usize = 24;

/// A broken promise.
#[derive(Clone, Debug)]
pub struct Found {
    pub problem: String,
    /// The operations that lead to it.
    pub ops: Vec<Op>,
    /// Number of the last event before the power failure, and of all events.
    pub point: (usize, usize),
    /// What of the changes that were not synced was on disk.
    pub parts: Vec<String>,
}

impl fmt::Display for Found {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}", self.problem)?;
        for (i, op) in self.ops.iter().enumerate() {
            writeln!(f, "  {i}: {op:x?}")?;
        }
        let (point, events) = self.point;
        writeln!(f, "  power fails after event {point} of {events}, when")?;
        writeln!(f, "  not all was on disk that was not synced, but this:")?;
        for part in &self.parts {
            writeln!(f, "    {part}")?;
        }
        Ok(())
    }
}

/// Explores one workload on one image: a setup and a seed always lead to the same one.
pub struct Explorer {
    pub setup: Setup,
    seed: u64,
    pub options: OpenOptions,
    effort: Effort,
    /// How many threads make requests at the same time.
    pub queues: usize,
}

impl Explorer {
    pub fn new(setup: Setup, seed: u64, effort: Effort) -> Self {
        // With room for a few tables only, write-back happens in the middle of requests.
        let l2_cache_size = if seed.is_multiple_of(2) { 4 << 20 } else { 0 };
        Self {
            setup,
            seed,
            options: OpenOptions {
                l2_cache_size,
                ..OpenOptions::default()
            },
            effort,
            queues: 1,
        }
    }

    fn random(&self, parts: &[u64]) -> Random {
        let setup = &self.setup;
        let name = setup.to_string();
        let name = name
            .bytes()
            .fold(0u64, |n, byte| n.wrapping_mul(31) + u64::from(byte));
        let mut all = vec![name];
        all.extend(parts);
        Random::of(self.seed, &all)
    }

    /// Runs a workload and explores the log that `alter` makes of what was recorded. What is found comes
    /// with as few operations as lead to it.
    pub fn run(
        &self,
        tally: &mut Tally,
        alter: impl Fn(&mut Vec<Event>),
    ) -> Result<(), Box<Found>> {
        let mut maker = Maker::new(&self.setup);
        if self.queues > 1 {
            maker.operates = false;
            maker.resizes = false;
        }
        let ops = maker.make(&mut self.random(&[]), OPS);
        tally.workloads += 1;
        let explored = self.explore(&ops, tally, &alter);
        explored.inspect_err(|_| tally.violations += 1)
    }

    /// As [`run`](Self::run); what is found is made as small as possible.
    pub fn run_and_shrink(&self, tally: &mut Tally) -> Result<(), Box<Found>> {
        self.run(tally, |_| ()).map_err(|found| {
            let mut again = Self {
                options: self.options.clone(),
                ..*self
            };
            // If QEMU found it, it looks at every state.
            again.effort.by_qemu = usize::from(found.problem.starts_with("qemu"));
            shrink::ops(*found, |ops| {
                let is_possible = Maker::is_possible(&again.setup, ops);
                let explored =
                    is_possible.then(|| again.explore(ops, &mut Tally::default(), &|_| ()));
                explored.and_then(Result::err).map(|found| *found)
            })
        })
    }

    /// Explores `ops`.
    fn explore(
        &self,
        ops: &[Op],
        tally: &mut Tally,
        alter: &dyn Fn(&mut Vec<Event>),
    ) -> Result<(), Box<Found>> {
        let start = self.setup.files();
        let found = |problem, point, parts| {
            let ops = ops.to_vec();
            Box::new(Found {
                problem,
                ops,
                point,
                parts,
            })
        };
        let mut log = match self.record(&start, ops) {
            Ok(log) => log,
            Err(problem) => return Err(found(problem, (0, 0), Vec::new())),
        };
        alter(&mut log);
        let sample = self.random(&[3]).below(self.effort.by_qemu.max(1) as u64) as usize;
        let mut power = Power::new(&start);
        let mut model = Model::new(&self.setup, ops);
        for (point, event) in log.iter().enumerate() {
            match event {
                Event::Begun { op } => model.begin(*op),
                Event::Done { op } => model.finish(*op),
                Event::Change(_) | Event::Sync { .. } => {}
            }
            if !power.follow(event) {
                continue;
            }
            tally.points += 1;
            let mut random = self.random(&[1, point as u64]);
            let (synced, states) = power.split(self.effort, &mut random);
            for chosen in &states.chosen {
                tally.states += 1;
                tally.exhaustive += usize::from(states.is_exhaustive);
                let every = self.effort.by_qemu;
                let by_qemu = every > 0 && tally.states % every == sample;
                let judge = |chosen: &[bool]| {
                    let files = Power::with(&synced, &states.parts, chosen);
                    let mut random = self.random(&[2, point as u64]);
                    self.judge(files, &model, &mut random, by_qemu)
                };
                match judge(chosen) {
                    Ok(is_judged) => tally.by_qemu += usize::from(is_judged),
                    Err(problem) => {
                        let (problem, chosen) =
                            shrink::choice(problem, chosen, |chosen| judge(chosen).err());
                        let parts = states.parts.iter().zip(chosen);
                        let parts = parts.filter(|(_, chosen)| *chosen);
                        let parts = parts.map(|(part, _)| part.to_string()).collect();
                        return Err(found(problem, (point, log.len()), parts));
                    }
                }
            }
        }
        Ok(())
    }

    /// Judges a state; returns whether QEMU's programs have done so too.
    fn judge(
        &self,
        files: Files,
        model: &Model<'_>,
        random: &mut Random,
        by_qemu: bool,
    ) -> Result<bool, String> {
        let judge = Judge {
            setup: &self.setup,
            options: &self.options,
        };
        let copy = by_qemu.then(|| files.clone());
        let shown = judge.judge(files, model, random)?;
        copy.map_or(Ok(false), |files| qemu::judge(&self.setup, &files, &shown))
    }

    /// Carries out `ops`, and returns what happened to the files.
    fn record(&self, start: &Files, ops: &[Op]) -> Result<Vec<Event>, String> {
        let log = Log::default();
        let image = Memory::recording(Which::Image, start.image.clone(), &log);
        let data = Memory::recording(Which::Data, start.data.clone(), &log);
        let last = image.again();
        let mut session = Session::open(&self.setup, &self.options, image, data)
            .map_err(|e| format!("does not open: {e}"))?;
        if self.queues > 1 {
            queues::perform(session.disk(), ops, self.queues, &log)?;
        } else {
            for (op, request) in ops.iter().enumerate() {
                log.lock().unwrap().push(Event::Begun { op });
                let done = session.perform(request);
                done.map_err(|e| format!("{op}: {request:?}: {e}"))?;
                log.lock().unwrap().push(Event::Done { op });
            }
        }
        session.disk().close().map_err(|e| e.to_string())?;
        drop(session);
        check_clean(&last).map_err(|e| format!("after it was closed: {e}"))?;
        let log = std::mem::take(&mut *log.lock().unwrap());
        Ok(log)
    }
}
