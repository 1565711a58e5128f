//! Builds states that a power failure can leave, and judges them.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::{Arc, Mutex};

use tandem_block::qcow2::{FindingKind, OpenOptions, Qcow2, Repair, check_storage};
use tandem_block::{Disk, Raw};
use vm_memory::VolatileSlice;

use crate::power::Files;
use crate::storage::{Change, Event, Log, Memory, SECTOR, Which};
use crate::workload::{Kind, Op, Random, SNAPSHOT, Setup, ops, perform, stamp_of};

/// Requests of a workload.
const OPS: usize = 24;
/// States built for each point of the log where power can fail.
const STATES_PER_POINT: usize = 3;

/// A broken promise.
pub struct Found {
    pub problem: String,
    /// Number of the last event before the power failure.
    pub point: usize,
}

/// Explores one workload on one image.
pub struct Explorer {
    setup: Setup,
    options: OpenOptions,
    random: Random,
    /// States judged so far.
    pub states: usize,
}

/// What the disk may be.
struct Allowed {
    /// How many sectors it may have.
    sizes: BTreeSet<u64>,
    /// What each of them may read as: the stamps of the writes it may show. Those that the disk
    /// does not have now, it may have later, and then they are zero.
    stamps: Vec<BTreeSet<u64>>,
}

impl Allowed {
    /// A new disk of `setup`.
    fn new(setup: &Setup) -> Self {
        let mut stamps = setup.initial();
        stamps.resize(setup.max_size() as usize / SECTOR, 0);
        Self {
            sizes: BTreeSet::from([setup.size() / SECTOR as u64]),
            stamps: stamps.into_iter().map(|stamp| [stamp].into()).collect(),
        }
    }

    /// `op` may take effect.
    fn begin(&mut self, op: &Op) {
        if let Op::Resize { sectors } = op {
            self.sizes.insert(*sectors);
        }
        if let Some((sectors, stamp)) = written(op) {
            for stamps in &mut self.stamps[sectors] {
                stamps.insert(stamp);
            }
        }
    }

    /// `op` has changed the size for good.
    fn resized(&mut self, op: &Op) {
        if let Op::Resize { sectors } = op {
            self.sizes = BTreeSet::from([*sectors]);
            self.stamps[*sectors as usize..].fill(BTreeSet::from([0]));
        }
    }

    /// `op` has taken effect for good.
    fn settle(&mut self, op: &Op) {
        self.resized(op);
        if let Some((sectors, stamp)) = written(op) {
            self.stamps[sectors].fill(BTreeSet::from([stamp]));
        }
    }

    fn check(&self, stamps: &[u64]) -> Result<(), String> {
        if !self.sizes.contains(&(stamps.len() as u64)) {
            return Err(format!(
                "{} sectors, not one of {:?}",
                stamps.len(),
                self.sizes
            ));
        }
        for (sector, (stamp, allowed)) in stamps.iter().zip(&self.stamps).enumerate() {
            if !allowed.contains(stamp) {
                return Err(format!(
                    "sector {sector} is {stamp:#x}, not one of {allowed:x?}"
                ));
            }
        }
        Ok(())
    }
}

impl Explorer {
    pub fn new(setup: Setup, seed: u64) -> Self {
        let tag = (setup.kind as u64) << 40
            | u64::from(setup.extended_l2) << 39
            | u64::from(setup.version) << 32
            | setup.cluster_size;
        // With room for a few tables only, write-back happens in the middle of requests.
        let l2_cache_size = if seed.is_multiple_of(2) { 4 << 20 } else { 0 };
        Self {
            setup,
            options: OpenOptions {
                l2_cache_size,
                ..OpenOptions::default()
            },
            random: Random(seed << 44 ^ tag),
            states: 0,
        }
    }

    /// Runs a workload and explores the log that `alter` makes of what was recorded.
    pub fn run(&mut self, alter: impl FnMut(Event) -> Option<Event>) -> Result<(), Found> {
        let (image, data) = self.setup.files();
        let start = Files { image, data };
        let sectors = self.setup.size() / SECTOR as u64;
        let ops = ops(&self.setup, sectors, &mut self.random, OPS, 1, true);
        let log: Vec<Event> = self
            .record(&start, &ops)
            .into_iter()
            .filter_map(alter)
            .collect();

        // What is on disk for certain, and what was done since to each file.
        let mut synced = start;
        let mut pending: Vec<Change> = Vec::new();
        let mut allowed = Allowed::new(&self.setup);
        for (point, event) in log.iter().enumerate() {
            synced.follow(event, &mut pending);
            match event {
                Event::Change(_) | Event::Sync { .. } => {}
                Event::Begun { op } => allowed.begin(&ops[*op]),
                Event::Resized { op } => allowed.resized(&ops[*op]),
                Event::Flushed { op } => {
                    allowed = Allowed::new(&self.setup);
                    ops[..=*op].iter().for_each(|op| allowed.settle(op));
                }
            }
            for _ in 0..STATES_PER_POINT {
                let state = synced.crash(&pending, &mut self.random);
                self.states += 1;
                self.judge(state, &allowed)
                    .map_err(|problem| Found { problem, point })?;
            }
        }
        Ok(())
    }

    fn record(&self, start: &Files, ops: &[Op]) -> Vec<Event> {
        let log = Log::default();
        let image = Memory::recording(Which::Image, start.image.clone(), &log);
        let data = Memory::recording(Which::Data, start.data.clone(), &log);
        let disk = self.open(image, data).unwrap();
        for (op, request) in ops.iter().enumerate() {
            log.lock().unwrap().push(Event::Begun { op });
            perform(&disk, request);
            match request {
                Op::Flush => log.lock().unwrap().push(Event::Flushed { op }),
                Op::Resize { .. } => log.lock().unwrap().push(Event::Resized { op }),
                _ => {}
            }
        }
        drop(disk);
        std::mem::take(&mut *log.lock().unwrap())
    }

    fn open(&self, image: Memory, data: Memory) -> tandem_block::Result<Qcow2> {
        let name = Path::new("image");
        let data = self.setup.has_data_file().then(|| Box::new(data) as _);
        let backing = if self.setup.kind == Kind::Overlay {
            let base = Arc::new(Mutex::new(self.setup.initial_bytes()));
            let base = Memory::plain(Which::Data, &base);
            let base = Raw::with_storage(Path::new("base"), Box::new(base), true)?;
            Some(Arc::new(base) as _)
        } else {
            None
        };
        Qcow2::with_backing(name, Box::new(image), data, backing, &self.options)
    }

    /// Opens `state` and checks the promises, before and after more requests.
    fn judge(&mut self, state: Files, allowed: &Allowed) -> Result<(), String> {
        let image = Arc::new(Mutex::new(state.image));
        let data = Arc::new(Mutex::new(state.data));
        let files = || {
            (
                Memory::plain(Which::Image, &image),
                Memory::plain(Which::Data, &data),
            )
        };
        // What is written where there is no mapping yet is in a raw data file before it is in the disk.
        let with_data = self.setup.has_data_file() && self.setup.kind != Kind::RawIncomplete;
        let check_all = || {
            let (image, data) = files();
            check_with(&image, with_data.then_some(&data))
        };
        check_all()?;
        let (i, d) = files();
        let disk = self.open(i, d).map_err(|e| format!("does not open: {e}"))?;
        let mut stamps = self.read_stamps(&disk)?;
        allowed.check(&stamps)?;
        self.compare_raw(&data, &stamps)?;

        let sectors = stamps.len() as u64;
        // A raw disk that grows shows what the data file holds, and a shrink may have been cut off.
        let resizes = !matches!(self.setup.kind, Kind::Raw | Kind::RawIncomplete);
        let more = ops(&self.setup, sectors, &mut self.random, 4, 1 << 32, resizes);
        for op in &more {
            perform(&disk, op);
            note(&mut stamps, op);
        }
        disk.flush().map_err(|e| e.to_string())?;
        drop(disk);
        check_all()?;
        let (i, d) = files();
        let disk = self
            .open(i, d)
            .map_err(|e| format!("does not open again: {e}"))?;
        if self.read_stamps(&disk)? != stamps {
            return Err("content is wrong after the crash and more requests".into());
        }
        drop(disk);
        self.check_snapshot(&image)?;
        self.compare_raw(&data, &stamps)
    }

    /// A snapshot still holds what the disk held at first.
    fn check_snapshot(&self, image: &Mutex<Vec<u8>>) -> Result<(), String> {
        if self.setup.kind != Kind::Snapshot {
            return Ok(());
        }
        let copy = Arc::new(Mutex::new(image.lock().unwrap().clone()));
        let open = || {
            let nothing = Memory::plain(Which::Data, &Arc::default());
            self.open(Memory::plain(Which::Image, &copy), nothing)
                .map_err(|e| format!("snapshot: {e}"))
        };
        let applied = open()?.apply_snapshot(SNAPSHOT);
        applied.map_err(|e| format!("snapshot: {e}"))?;
        if self.read_stamps(&open()?)? != self.setup.initial() {
            return Err("the snapshot has changed".into());
        }
        check(&Memory::plain(Which::Image, &copy)).map_err(|e| format!("snapshot: {e}"))
    }

    fn read_stamps(&self, disk: &dyn Disk) -> Result<Vec<u64>, String> {
        let mut bytes = vec![0; disk.size() as usize];
        disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 0)
            .map_err(|e| e.to_string())?;
        let stamp = |(i, s)| stamp_of(s).map_err(|e| format!("sector {i} {e}"));
        bytes.chunks_exact(SECTOR).enumerate().map(stamp).collect()
    }

    /// A raw data file shows what the disk shows.
    fn compare_raw(&self, data: &Mutex<Vec<u8>>, stamps: &[u64]) -> Result<(), String> {
        if self.setup.kind != Kind::Raw {
            return Ok(());
        }
        let data = data.lock().unwrap();
        for (sector, (bytes, stamp)) in data.chunks_exact(SECTOR).zip(stamps).enumerate() {
            if stamp_of(bytes) != Ok(*stamp) {
                return Err(format!("raw file: sector {sector} is not {stamp:#x}"));
            }
        }
        Ok(())
    }
}

/// `check` finds leaks at most.
pub fn check(image: &Memory) -> Result<(), String> {
    check_with(image, None)
}

/// As [`check`], in the data file too if there is one.
pub fn check_with(image: &Memory, data: Option<&Memory>) -> Result<(), String> {
    let mut worst = None;
    let report = check_storage(
        Path::new("image"),
        image,
        data.map(|data| data as _),
        Repair::Nothing,
        &mut |finding| {
            if finding.kind != FindingKind::Leak {
                worst = Some(finding.text);
            }
        },
    );
    match (report, worst) {
        (Err(e), _) => Err(format!("check fails: {e}")),
        (Ok(_), Some(text)) => Err(format!("check finds: {text}")),
        (Ok(report), None) if report.corruptions > 0 => Err("check finds corruptions".into()),
        (Ok(_), None) => Ok(()),
    }
}

/// The sectors that `op` writes, and the stamp they get.
fn written(op: &Op) -> Option<(std::ops::Range<usize>, u64)> {
    match *op {
        Op::Write {
            sector,
            count,
            stamp,
        }
        | Op::Compress {
            sector,
            count,
            stamp,
        } => Some((sector, count, stamp)),
        Op::Zero { sector, count, .. } | Op::Discard { sector, count } => Some((sector, count, 0)),
        Op::Resize { .. } | Op::Flush => None,
    }
    .map(|(sector, count, stamp)| (sector as usize..(sector + count) as usize, stamp))
}

/// `op` has taken effect.
fn note(stamps: &mut Vec<u64>, op: &Op) {
    if let Op::Resize { sectors } = op {
        stamps.resize(*sectors as usize, 0);
    }
    if let Some((sectors, stamp)) = written(op) {
        stamps[sectors].fill(stamp);
    }
}
