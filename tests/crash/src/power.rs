//! What is on disk after a power failure, and what that is tried on.

use std::fmt;
use std::ops::AddAssign;
use std::sync::{Arc, Mutex};

use crate::random::Random;
use crate::storage::{Change, Event, Log, Memory, SECTOR, What, Which};

/// How thoroughly points of a log are explored.
#[derive(Clone, Copy, Debug)]
pub struct Effort {
    /// Most parts of which all subsets are tried.
    pub few: usize,
    /// States that are built where there are more, at random.
    pub sampled: usize,
    /// One of so many states is shown to QEMU's programs; none if 0.
    pub by_qemu: usize,
}

/// What has been explored.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    pub workloads: usize,
    /// Points where power failed.
    pub points: usize,
    pub states: usize,
    /// Those at points where all states were built that there are.
    pub exhaustive: usize,
    /// Those that QEMU's programs have judged too.
    pub by_qemu: usize,
    pub violations: usize,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, more: Self) {
        self.workloads += more.workloads;
        self.points += more.points;
        self.states += more.states;
        self.exhaustive += more.exhaustive;
        self.by_qemu += more.by_qemu;
        self.violations += more.violations;
    }
}

/// The content of both files.
#[derive(Clone, Debug, Default)]
pub struct Files {
    pub image: Vec<u8>,
    pub data: Vec<u8>,
}

impl Files {
    fn get(&mut self, which: Which) -> &mut Vec<u8> {
        match which {
            Which::Image => &mut self.image,
            Which::Data => &mut self.data,
        }
    }

    /// What is to be shared with storage.
    pub fn shared(&self) -> [Arc<Mutex<Vec<u8>>>; 2] {
        [&self.image, &self.data].map(|bytes| Arc::new(Mutex::new(bytes.clone())))
    }

    /// What has become of what was shared.
    pub fn of(image: &Mutex<Vec<u8>>, data: &Mutex<Vec<u8>>) -> Self {
        let [image, data] = [image, data].map(|bytes| bytes.lock().unwrap().clone());
        Self { image, data }
    }
}

/// What of a change happens or does not, by itself.
#[derive(Clone, Copy)]
pub struct Part<'a> {
    file: Which,
    /// Number of the change.
    change: usize,
    kind: PartKind<'a>,
}

#[derive(Clone, Copy)]
enum PartKind<'a> {
    /// A sector of a write, or what it has of one.
    Bytes {
        offset: usize,
        bytes: &'a [u8],
    },
    Len(u64),
}

impl Part<'_> {
    fn apply(&self, files: &mut Files) {
        let content = files.get(self.file);
        match self.kind {
            PartKind::Len(len) => content.resize(len as usize, 0),
            PartKind::Bytes { offset, bytes } => {
                let end = offset + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[offset..end].copy_from_slice(bytes);
            }
        }
    }
}

impl fmt::Display for Part<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let file = format!("{:?}", self.file).to_lowercase();
        match self.kind {
            PartKind::Len(len) => write!(f, "length of {file} {len:#x}"),
            PartKind::Bytes { offset, bytes } => {
                write!(f, "{} bytes of {file} at {offset:#x}", bytes.len())
            }
        }
    }
}

/// The disks below a workload, as its log tells.
pub struct Power {
    /// What is on disk for certain.
    pub synced: Files,
    /// What was done since then to each file.
    pending: Vec<Change>,
    /// How many of the pending changes were there when the last states were built.
    seen: usize,
}

/// States that the disks may be in: of which parts each consists.
pub struct States<'a> {
    pub parts: Vec<Part<'a>>,
    pub chosen: Vec<Vec<bool>>,
    /// There are no others that have not been built before.
    pub is_exhaustive: bool,
}

impl Power {
    pub fn new(start: &Files) -> Self {
        Self {
            synced: start.clone(),
            pending: Vec::new(),
            seen: 0,
        }
    }

    /// Takes an event of the log into account, where power has not failed. Returns whether there are new
    /// states since the last ones were built, or less is allowed.
    pub fn follow(&mut self, event: &Event) -> bool {
        match event {
            Event::Change(change) => {
                self.pending.push(change.clone());
                true
            }
            Event::Sync { file } => {
                for change in self.pending.extract_if(.., |change| change.file == *file) {
                    change.what.apply(self.synced.get(change.file));
                }
                self.seen = 0;
                true
            }
            Event::Begun { .. } => false,
            Event::Done { .. } => {
                self.seen = 0;
                true
            }
        }
    }

    /// The states that a power failure can leave now, or some of them if there are many.
    pub fn states(&mut self, effort: Effort, random: &mut Random) -> States<'_> {
        let new = std::mem::replace(&mut self.seen, self.pending.len());
        let parts: Vec<Part> = (0..)
            .zip(&self.pending)
            .flat_map(|(i, change)| parts(i, change))
            .collect();
        let changes: Vec<usize> = parts.iter().map(|part| part.change).collect();
        let (chosen, is_exhaustive) = choices(&changes, new, effort, random);
        States {
            parts,
            chosen,
            is_exhaustive,
        }
    }

    /// The state with the `chosen` ones of `parts`.
    pub fn with(synced: &Files, parts: &[Part<'_>], chosen: &[bool]) -> Files {
        let mut state = synced.clone();
        for (part, _) in parts.iter().zip(chosen).filter(|(_, chosen)| **chosen) {
            part.apply(&mut state);
        }
        state
    }

    /// [`states`](Self::states), with what is synced.
    pub fn split(&mut self, effort: Effort, random: &mut Random) -> (Files, States<'_>) {
        let synced = self.synced.clone();
        (synced, self.states(effort, random))
    }
}

/// Which parts of changes happen, where part `i` is one of change `changes[i]`, and the changes before
/// number `new` have been dealt with: all choices that there are or, if they are many, some. And whether
/// these are all.
pub fn choices(
    changes: &[usize],
    new: usize,
    effort: Effort,
    random: &mut Random,
) -> (Vec<Vec<bool>>, bool) {
    let len = changes.len();
    if len > effort.few {
        let some = (0..effort.sampled).map(|_| choose(changes, random));
        return (some.collect(), false);
    }
    let old = changes.iter().filter(|change| **change < new).count();
    // Those without any of the new parts have been built.
    let is_new = |subset: &u32| new == 0 || subset >> old != 0;
    let chosen = |subset: u32| (0..len).map(|i| subset >> i & 1 != 0).collect();
    let all = (0..1u32 << len).filter(is_new).map(chosen);
    (all.collect(), true)
}

/// None of the parts, all, each change or not, or each part or not.
fn choose(changes: &[usize], random: &mut Random) -> Vec<bool> {
    let mode = random.below(6);
    let mut last = None;
    let mut choice = false;
    let mut chosen = |change: &usize| match mode {
        0 => false,
        1 => true,
        2 | 3 => {
            if last.replace(*change) != Some(*change) {
                choice = random.below(2) == 0;
            }
            choice
        }
        _ => random.below(2) == 0,
    };
    changes.iter().map(&mut chosen).collect()
}

/// The parts of a change: the sectors of a write.
fn parts(number: usize, change: &Change) -> Vec<Part<'_>> {
    let part = |kind| Part {
        file: change.file,
        change: number,
        kind,
    };
    match &change.what {
        What::SetLen(len) => vec![part(PartKind::Len(*len))],
        What::Write { offset, bytes } => {
            let start = *offset as usize;
            let end = start + bytes.len();
            let sector = |sector: usize| {
                let from = start.max(sector * SECTOR);
                let to = end.min((sector + 1) * SECTOR);
                let bytes = &bytes[from - start..to - start];
                part(PartKind::Bytes {
                    offset: from,
                    bytes,
                })
            };
            (start / SECTOR..end.div_ceil(SECTOR)).map(sector).collect()
        }
    }
}

/// Operations on images that no guest uses: how thoroughly they are explored, and what has been.
pub struct Run {
    /// How many seeds each case is tried with.
    pub seeds: u64,
    pub effort: Effort,
    pub tally: Tally,
}

impl Run {
    pub fn new(seeds: u64, effort: Effort) -> Self {
        Self {
            seeds,
            effort,
            tally: Tally::default(),
        }
    }

    /// Each of `cases` with its seeds.
    pub fn rounds<T: Clone>(&self, cases: impl IntoIterator<Item = T>) -> Vec<(u64, T)> {
        let rounds = |(i, case): (usize, T)| {
            (0..self.seeds).map(move |seed| (seed * 64 + i as u64, case.clone()))
        };
        cases.into_iter().enumerate().flat_map(rounds).collect()
    }

    /// Runs `change` on `start`, and `judge` on what a power failure may leave at any point of it.
    /// Returns what is on disk for certain at the end.
    pub fn explore(
        &mut self,
        start: &Files,
        seed: u64,
        change: impl FnOnce(Memory, Memory),
        mut judge: impl FnMut(Files, &str),
    ) -> Files {
        let log = Log::default();
        change(
            Memory::recording(Which::Image, start.image.clone(), &log),
            Memory::recording(Which::Data, start.data.clone(), &log),
        );
        let log: Vec<Event> = std::mem::take(&mut *log.lock().unwrap());
        let mut random = Random(seed);
        let mut power = Power::new(start);
        self.tally.workloads += 1;
        for (point, event) in log.iter().enumerate() {
            if !power.follow(event) {
                continue;
            }
            self.tally.points += 1;
            let what = format!("seed {seed}, after event {point} of {}", log.len());
            let (synced, states) = power.split(self.effort, &mut random);
            for chosen in &states.chosen {
                self.tally.states += 1;
                self.tally.exhaustive += usize::from(states.is_exhaustive);
                judge(Power::with(&synced, &states.parts, chosen), &what);
            }
        }
        power.synced
    }
}
