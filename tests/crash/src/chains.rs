//! Power failures while a disk in use is forked, committed and put on another backing file, and while
//! overlays are made.
//!
//! Files are real ones in a directory, so that names and times count ([`trace`](crate::trace)). At any
//! point the disk is found under the names that the operation promises, with what has been flushed; what is
//! not written stays what it is, and what stands on a file that is written says so.

use std::cell::RefCell;
use std::fs;
use std::ops::{ControlFlow, Range};
use std::path::Path;

use tandem_block::qcow2::{
    AmendOptions, BackingName, Base, BitmapEditor, Commit, CreateOptions, OpenOptions,
    OverlayOptions, OverlayPlace, Qcow2, amend, create, stamp_base,
};
use tandem_block::{
    CommitOptions, Disk, Error, ForkOptions, ImageFormat, LiveDisk, RebaseOptions, Result,
};

use crate::chain_model::{ChainModel, Step, fill, is_raw, open};
use crate::directory::{Directory, Outage};
use crate::judge::read_stamps;
use crate::power::{Effort, Run};
use crate::random::Random;
use crate::setup::{BITMAP, scratch};
use crate::storage::{SECTOR, sector_bytes};
use crate::trace::{Event, Trace};

/// Sectors of the disks: several units in which live operations see changes, and an end in a cluster.
const SECTORS: usize = 141;
/// The other backing file, and the stamp of its sectors.
pub(crate) const OTHER: (&str, u64) = ("other.raw", 1 << 40);

/// The end of the names of images with a data file, and the name of one that is a raw disk by itself.
const EXTERNAL: &str = "external";
pub(crate) const RAW_EXTERNAL: &str = "raw-external";

/// An operation on a disk in use.
#[derive(Clone, Copy, Debug)]
enum Op {
    Write,
    Zero {
        unmap: bool,
    },
    Flush,
    Fork,
    /// It fails when one of the files is there.
    ForkInVain,
    Commit {
        between: usize,
        pivot: bool,
    },
    /// Onto the other backing file, or onto none.
    Rebase {
        onto_other: bool,
    },
    Reopen,
}

/// A chain of images.
#[derive(Clone, Debug)]
pub(crate) struct Case<'a> {
    /// The cluster size, and the names of the images from the base up.
    cluster_size: u64,
    pub names: &'a [&'a str],
    /// Those that keep a stamp of what is below them.
    stamped: &'a [&'a str],
    pub has_bitmap: bool,
}

impl<'a> Case<'a> {
    pub(crate) const fn new(cluster_size: u64, names: &'a [&'a str]) -> Self {
        Self {
            cluster_size,
            names,
            stamped: &[],
            has_bitmap: false,
        }
    }

    pub(crate) const fn stamped(self, stamped: &'a [&'a str]) -> Self {
        Self { stamped, ..self }
    }

    pub(crate) const fn with_bitmap(self) -> Self {
        Self {
            has_bitmap: true,
            ..self
        }
    }

    /// Makes the files in `dir`. Returns what the disk holds.
    pub(crate) fn create(&self, dir: &Path) -> Vec<u64> {
        let other = sector_bytes(OTHER.1).repeat(100);
        fs::write(dir.join(OTHER.0), other).unwrap();
        let mut content = vec![0; SECTORS];
        let mut below = None;
        for (i, name) in self.names.iter().enumerate() {
            self.create_one(dir, name, below.replace(*name));
            let disk = open(dir, name, false).unwrap();
            // Some of it, so that the ones below show.
            for sectors in [10 + 15 * i..80 - 10 * i, 95..120 - 5 * i, 137..SECTORS] {
                content[sectors.clone()].fill(1 << 48 | (i as u64));
                fill(disk.disk(), sectors, 1 << 48 | (i as u64)).unwrap();
            }
            disk.disk().close().unwrap();
            drop(disk);
            if self.has_bitmap && i + 1 == self.names.len() {
                let disk = Qcow2::open(&dir.join(name), &OpenOptions::default()).unwrap();
                let mut editor = BitmapEditor::new(disk).unwrap();
                editor.add(BITMAP, Some(SECTOR as u64)).unwrap();
                editor.commit().unwrap();
            }
            if self.stamped.contains(name) {
                stamp_base(&dir.join(name), &OpenOptions::default()).unwrap();
            }
        }
        content
    }

    fn create_one(&self, dir: &Path, name: &str, below: Option<&str>) {
        if is_raw(name) {
            fs::write(dir.join(name), vec![0; SECTORS * SECTOR]).unwrap();
            return;
        }
        let format = |below: &str| match is_raw(below) {
            true => ImageFormat::Raw,
            false => ImageFormat::Qcow2,
        };
        let has_data_file = name.ends_with(EXTERNAL);
        let options = CreateOptions {
            size: (SECTORS * SECTOR) as u64,
            cluster_size: self.cluster_size,
            data_file: has_data_file.then(|| dir.join(format!("{name}.data"))),
            data_file_raw: name == RAW_EXTERNAL,
            backing_file: below.map(Into::into),
            backing_format: below.map(format),
            ..CreateOptions::default()
        };
        create(&dir.join(name), &options).unwrap();
        if has_data_file {
            // By its name alone, which it is found by in another directory as well.
            let named = AmendOptions {
                data_file: Some(format!("{name}.data").into()),
                ..AmendOptions::default()
            };
            amend(&dir.join(name), &named, &mut |_, _| ()).unwrap();
        }
    }
}

/// A disk in use.
struct Session<'a> {
    dir: &'a Path,
    trace: &'a Trace<Step>,
    random: RefCell<Random>,
    disk: Option<LiveDisk>,
    /// The files that it is in, from the top down.
    chain: Vec<String>,
    made: usize,
}

impl<'a> Session<'a> {
    fn open(dir: &'a Path, trace: &'a Trace<Step>, seed: u64, chain: Vec<String>) -> Result<Self> {
        trace.mark(Step::Found(vec![chain[0].clone()]));
        Ok(Self {
            dir,
            trace,
            random: RefCell::new(Random(seed)),
            disk: Some(LiveDisk::new(open(dir, &chain[0], false)?)),
            chain,
            made: 0,
        })
    }

    fn disk(&self) -> &LiveDisk {
        self.disk.as_ref().unwrap()
    }

    fn below(&self, n: usize) -> usize {
        self.random.borrow_mut().below(n as u64) as usize
    }

    /// Some sectors, which are told to get a stamp: a new one, or none.
    fn some(&self, is_zero: bool) -> (Range<usize>, u64) {
        let len = 1 + self.below(40);
        let mut start = self.below(SECTORS - len);
        if self.below(2) == 0 {
            start -= start % 8;
        }
        let sectors = start..start + len;
        let stamp = if is_zero {
            0
        } else {
            self.random.borrow_mut().draw() >> 16 | 1
        };
        self.trace.mark(Step::Write {
            sectors: sectors.clone(),
            stamp,
        });
        (sectors, stamp)
    }

    fn write(&self) -> Result<()> {
        let (sectors, stamp) = self.some(false);
        fill(self.disk(), sectors, stamp)
    }

    fn flush(&self) -> Result<()> {
        self.disk().flush()?;
        self.trace.mark(Step::Flushed);
        Ok(())
    }

    /// What the guest does while something is under way.
    fn meanwhile(&self) -> ControlFlow<()> {
        let done = match self.below(4) {
            0 | 1 => self.write(),
            2 => self.flush(),
            _ => Ok(()),
        };
        done.unwrap();
        ControlFlow::Continue(())
    }

    fn perform(&mut self, op: Op) -> Result<()> {
        const LEN: u64 = SECTOR as u64;
        match op {
            Op::Write => self.write(),
            Op::Zero { unmap } => {
                let (sectors, _) = self.some(true);
                let (offset, len) = (sectors.start as u64 * LEN, sectors.len() as u64 * LEN);
                self.disk().write_zeroes(offset, len, unmap)
            }
            Op::Flush => self.flush(),
            Op::Fork => self.fork(),
            Op::ForkInVain => self.fork_in_vain(),
            Op::Commit { between, pivot } => self.commit(between, pivot),
            Op::Rebase { onto_other } => self.rebase(onto_other),
            Op::Reopen => {
                self.close()?;
                self.disk = Some(LiveDisk::new(open(self.dir, &self.chain[0], false)?));
                Ok(())
            }
        }
    }

    fn close(&mut self) -> Result<()> {
        self.disk().close()?;
        self.disk = None;
        self.trace.mark(Step::Flushed);
        Ok(())
    }

    fn fork(&mut self) -> Result<()> {
        self.made += 1;
        let [over, fork] = ["over", "fork"].map(|name| format!("{name}{}", self.made));
        self.trace
            .mark(Step::Coming(vec![over.clone(), fork.clone()]));
        let report = self.disk().fork(&ForkOptions {
            open: OpenOptions::default(),
            overlay: self.dir.join(&over),
            fork: self.dir.join(&fork),
        })?;
        report.warning.map_or(Ok(()), Err)?;
        self.trace.mark(Step::Flushed);
        self.trace.mark(Step::Kept(self.chain[0].clone()));
        self.trace.mark(Step::Kept(fork));
        self.trace.mark(Step::Found(vec![over.clone()]));
        self.chain.insert(0, over);
        Ok(())
    }

    fn fork_in_vain(&mut self) -> Result<()> {
        self.made += 1;
        let name = format!("over{}", self.made);
        self.trace.mark(Step::Coming(vec![name.clone()]));
        let options = ForkOptions {
            open: OpenOptions::default(),
            overlay: self.dir.join(&name),
            fork: self.dir.join(&name),
        };
        assert!(self.disk().fork(&options).is_err(), "a file is both");
        self.trace.mark(Step::Gone(name));
        Ok(())
    }

    fn commit(&mut self, between: usize, pivot: bool) -> Result<()> {
        let base = between + 1;
        if base >= self.chain.len() {
            return Ok(());
        }
        let changing = self.chain[1..=base].to_vec();
        self.trace.mark(Step::Changing(changing));
        let options = CommitOptions {
            open: OpenOptions::default(),
            between,
            pivot,
            max_last: None,
        };
        let report = self.disk().commit(&options, &mut |_, _| self.meanwhile());
        report?.warning.map_or(Ok(()), Err)?;
        let mut found = vec![self.chain[0].clone()];
        if pivot {
            self.trace.mark(Step::Flushed);
            self.chain.drain(..base);
            // What was on top has nothing of its own any more.
            found.insert(0, self.chain[0].clone());
        }
        self.trace.mark(Step::Found(found));
        Ok(())
    }

    fn rebase(&mut self, onto_other: bool) -> Result<()> {
        if is_raw(&self.chain[0]) {
            return Ok(());
        }
        let backing = onto_other.then(|| BackingName {
            file: OTHER.0.into(),
            format: "raw".into(),
        });
        let options = RebaseOptions {
            open: OpenOptions::default(),
            backing,
            max_last: None,
        };
        let report = self.disk().rebase(&options, &mut |_, _| self.meanwhile());
        report?.warning.map_or(Ok(()), Err)?;
        self.chain.truncate(1);
        self.chain.extend(onto_other.then(|| OTHER.0.to_owned()));
        Ok(())
    }
}

/// Explores what a power failure leaves in a directory that `create` has filled, and says what the disk
/// holds, during `work`.
fn explore(
    run: &mut Run,
    name: &str,
    seed: u64,
    create: impl FnOnce(&Path) -> Vec<u64>,
    work: impl FnOnce(&Path, &Trace<Step>) -> Result<()> + Send,
) {
    let dir = scratch();
    let mut model = ChainModel::new(create(dir.path()));
    let mut outage = Outage::new(Directory::read(dir.path()));
    let log = Trace::record(dir.path(), |trace| {
        work(dir.path(), trace).unwrap_or_else(|e| panic!("{name}, seed {seed}: {e}"));
    });
    // Files take their time: a few states at each point, of many points.
    let effort = Effort {
        sampled: run.effort.sampled.div_ceil(6),
        ..run.effort
    };
    let mut random = Random(seed);
    let sample = random.below(run.effort.by_qemu.max(1) as u64) as usize;
    run.tally.workloads += 1;
    for (point, event) in log.iter().enumerate() {
        let mut is_new = outage.follow(event);
        if let Event::Mark(step) = event {
            is_new = model.follow(step);
            if is_new {
                outage.restart();
            }
        }
        if !is_new {
            continue;
        }
        run.tally.points += 1;
        let (states, is_exhaustive) = outage.states(effort, &mut random);
        for state in states {
            run.tally.states += 1;
            run.tally.exhaustive += usize::from(is_exhaustive);
            let every = run.effort.by_qemu;
            let by_qemu = every > 0 && run.tally.states % every == sample;
            run.tally.by_qemu += usize::from(by_qemu);
            let left = scratch();
            state.write(left.path());
            let goes_on = random.below(3) == 0;
            let judged = model.judge(left.path(), by_qemu, goes_on);
            judged.unwrap_or_else(|e| {
                let last = log[..=point].iter().rev().find_map(|event| match event {
                    Event::Mark(step) => Some(step),
                    _ => None,
                });
                panic!(
                    "{name}, seed {seed}, after event {point} of {}, {last:?}: {e}",
                    log.len()
                )
            });
        }
    }
}

/// Explores `ops` on the disk of `case`.
fn operate(run: &mut Run, seed: u64, case: &Case<'_>, ops: &[Op]) {
    let name = format!("{case:?} {ops:?}");
    explore(
        run,
        &name,
        seed,
        |dir| case.create(dir),
        |dir, trace| {
            let chain = case.names.iter().rev().map(|name| (*name).to_owned());
            let mut session = Session::open(dir, trace, seed, chain.collect())?;
            for op in ops {
                match session.perform(*op) {
                    // What cannot be done there.
                    Err(Error::Option(_)) => {}
                    done => done?,
                }
            }
            session.close()
        },
    );
}

const fn commit(between: usize, pivot: bool) -> Op {
    Op::Commit { between, pivot }
}

/// A fork that has been made is there, and the disk in its new image, on an image that stays as it is.
pub fn forking(run: &mut Run) {
    let ops = [
        Op::Write,
        Op::Flush,
        Op::Write,
        Op::ForkInVain,
        Op::Fork,
        Op::Write,
        Op::Flush,
        Op::Write,
    ];
    let more = [&ops[..], &[Op::Fork, Op::Write, commit(0, true), Op::Write]].concat();
    for (seed, (case, ops)) in run.rounds([
        (Case::new(512, &["image"]), &ops[..]),
        (
            Case::new(4096, &["base.raw", "image"]).stamped(&["image"]),
            &more,
        ),
        (Case::new(4096, &["image"]).with_bitmap(), &ops),
        (Case::new(4096, &["image.raw"]), &more),
        (Case::new(4096, &[RAW_EXTERNAL]), &more),
    ]) {
        operate(run, seed, &case, ops);
    }
}

/// The disk is found on top at any time, and in the base once that has become the disk.
pub fn committing_in_use(run: &mut Run) {
    let two = Case::new(4096, &["base", "top"]);
    let three = Case::new(512, &["base.raw", "mid", "top"]);
    for (seed, (case, op)) in run.rounds([
        (two.clone(), commit(0, true)),
        (two.clone().with_bitmap(), commit(0, true)),
        (two.stamped(&["top"]), commit(0, false)),
        (three.clone(), commit(1, true)),
        (three.clone().stamped(&["top"]), commit(1, false)),
        (three.stamped(&["mid", "top"]), commit(0, true)),
        (
            Case::new(4096, &[RAW_EXTERNAL, "top"]).stamped(&["top"]),
            commit(0, true),
        ),
        (
            Case::new(512, &["base.raw", EXTERNAL, "top"]),
            commit(0, true),
        ),
        (Case::new(4096, &["base", EXTERNAL]), commit(0, true)),
    ]) {
        operate(
            run,
            seed,
            &case,
            &[Op::Write, op, Op::Write, Op::Flush, Op::Write],
        );
    }
}

/// The disk reads the same on what it is put on.
pub fn rebasing_in_use(run: &mut Run) {
    let case = Case::new(4096, &["base.raw", "image"]);
    for (seed, (case, onto_other)) in run.rounds([
        (case.clone(), true),
        (case.clone().with_bitmap(), false),
        (case.stamped(&["image"]), true),
        (Case::new(4096, &["base.raw", EXTERNAL]), true),
    ]) {
        operate(
            run,
            seed,
            &case,
            &[Op::Write, Op::Rebase { onto_other }, Op::Write, Op::Flush],
        );
    }
}

/// Anything of this, in any order.
pub fn operating_on_chains(run: &mut Run) {
    let cases = [
        Case::new(4096, &["base.raw", "image"]).stamped(&["image"]),
        Case::new(512, &["base", "image"]),
        Case::new(4096, &["base", "image"]).with_bitmap(),
        Case::new(4096, &["base.raw"]),
        Case::new(4096, &[RAW_EXTERNAL, "image"]).stamped(&["image"]),
        Case::new(4096, &["base", EXTERNAL, "image"]),
    ];
    for (seed, ()) in run.rounds([()]) {
        let mut random = Random(seed);
        let case = &cases[random.below(cases.len() as u64) as usize];
        let mut op = || match random.below(12) {
            0 => Op::Fork,
            1 => commit(0, true),
            2 => commit(0, false),
            3 => commit(1, true),
            4 => Op::Rebase {
                onto_other: random.below(2) == 0,
            },
            5 => Op::Reopen,
            6 | 7 => Op::Flush,
            8 => Op::Zero {
                unmap: random.below(2) == 0,
            },
            _ => Op::Write,
        };
        let ops: Vec<Op> = (0..8).map(|_| op()).collect();
        operate(run, seed, case, &ops);
    }
}

/// As [`committing_in_use`], while nobody uses the disk. Another overlay of the base sees that it changes.
pub fn committing_with_stamps(run: &mut Run) {
    for (seed, (names, between)) in run.rounds([
        (&["base.raw", "top"][..], 0),
        (&["base", "top"], 0),
        (&["base", "mid", "top"], 1),
        (&[RAW_EXTERNAL, "top"], 0),
        (&[EXTERNAL, "top"], 0),
    ]) {
        let case = Case {
            names,
            ..Case::new(4096, &[]).stamped(&["mid", "top"])
        };
        explore(
            run,
            &format!("{case:?}"),
            seed,
            |dir| {
                let content = case.create(dir);
                let below = names[names.len() - 2];
                case.create_one(dir, "other", Some(below));
                stamp_base(&dir.join("other"), &OpenOptions::default()).unwrap();
                content
            },
            |dir, trace| {
                let other = open(dir, "other", true)?;
                trace.mark(Step::Beside {
                    name: "other".to_owned(),
                    content: read_stamps(other.disk()).unwrap(),
                });
                drop(other);
                trace.mark(Step::Found(vec!["top".to_owned()]));
                let changing = names.iter().map(|name| (*name).to_owned());
                trace.mark(Step::Changing(changing.collect()));
                let commit = Commit::open(&dir.join("top"), between, &OpenOptions::default())?;
                commit.copy(&mut |_, _| ())?;
                commit.finish(true)?;
                trace.mark(Step::Kept(names[0].to_owned()));
                Ok(())
            },
        );
    }
}

/// An overlay is there from its first flush on; what it stands on, written just before, stays as it is.
pub fn making_overlays(run: &mut Run) {
    let data = [false, true];
    let cases = ["base.raw", "base"]
        .into_iter()
        .flat_map(|base| data.map(|data| (base, data)));
    for (seed, (base, has_data_file)) in run.rounds(cases) {
        let case = Case {
            names: &[base],
            ..Case::new(4096, &[])
        };
        explore(
            run,
            &format!("{base} {has_data_file}"),
            seed,
            |dir| case.create(dir),
            |dir, trace| {
                let mut session = Session::open(dir, trace, seed, vec![base.to_owned()])?;
                session.perform(Op::Write)?;
                session.close()?;
                drop(session);
                trace.mark(Step::Kept(base.to_owned()));
                let format = match is_raw(base) {
                    true => ImageFormat::Raw,
                    false => ImageFormat::Qcow2,
                };
                let below = Base::open(&dir.join(base), format, &OpenOptions::default())?;
                let path = dir.join("over");
                let overlay = below.overlay(&OverlayOptions {
                    place: OverlayPlace::Kept {
                        data_file: has_data_file.then(|| dir.join("data")),
                        path: path.clone(),
                    },
                    ..OverlayOptions::default()
                })?;
                overlay.flush()?;
                drop(overlay);
                drop(below);
                let mut session = Session::open(dir, trace, seed, vec!["over".to_owned()])?;
                for op in [Op::Write, Op::Flush, Op::Write] {
                    session.perform(op)?;
                }
                session.close()
            },
        );
    }
}
