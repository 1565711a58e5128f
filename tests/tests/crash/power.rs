//! What is on disk after a power failure, and what that is tried on.

use crate::storage::{Change, Event, Log, Memory, SECTOR, What, Which};
use crate::workload::Random;

/// States built for each point of the log where power can fail, at random.
const STATES_PER_POINT: usize = 12;
/// Most parts of which all subsets are tried.
const FEW_PARTS: usize = 4;

/// The content of both files.
#[derive(Clone)]
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

    /// These, which are synced, with a random part of what is `pending`.
    pub fn crash(&self, pending: &[Change], random: &mut Random) -> Self {
        let mut state = self.clone();
        // None, all, each of them or not, or each sector of them or not.
        let mode = random.below(6);
        for Change { file, what } in pending {
            let content = state.get(*file);
            match mode {
                0 => {}
                1 => what.apply(content),
                2 | 3 => {
                    if random.below(2) == 0 {
                        what.apply(content);
                    }
                }
                _ => {
                    for part in parts(what) {
                        if random.below(2) == 0 {
                            part.apply(content);
                        }
                    }
                }
            }
        }
        state
    }

    /// These with each part of what is `pending` that there can be, if it is in few sectors, else with
    /// some.
    fn crashes(&self, pending: &[Change], random: &mut Random) -> Vec<Self> {
        let in_file = |change: &Change| {
            parts(&change.what)
                .map(|part| (change.file, part))
                .collect()
        };
        let parts: Vec<(Which, What)> = pending.iter().flat_map::<Vec<_>, _>(in_file).collect();
        if parts.len() > FEW_PARTS {
            return (0..STATES_PER_POINT)
                .map(|_| self.crash(pending, random))
                .collect();
        }
        let with = |subset: u32| {
            let mut state = self.clone();
            for (i, (file, part)) in parts.iter().enumerate() {
                if subset >> i & 1 != 0 {
                    part.apply(state.get(*file));
                }
            }
            state
        };
        (0..1 << parts.len()).map(with).collect()
    }

    /// Takes an event of the log into account, where power has not failed; `pending` is what is not
    /// known to be on disk.
    pub fn follow(&mut self, event: &Event, pending: &mut Vec<Change>) {
        match event {
            Event::Change(change) => pending.push(change.clone()),
            Event::Sync { file } => {
                for change in pending.extract_if(.., |change| change.file == *file) {
                    change.what.apply(self.get(change.file));
                }
            }
            Event::Begun { .. } | Event::Resized { .. } | Event::Flushed { .. } => {}
        }
    }
}

/// What of a change happens or does not, each by itself: the sectors of a write.
fn parts(what: &What) -> impl Iterator<Item = What> {
    let (start, bytes) = match what {
        What::Write { offset, bytes } => (*offset as usize, &bytes[..]),
        What::SetLen(_) => (0, &[][..]),
    };
    let end = start + bytes.len();
    let sectors = start / SECTOR..end.div_ceil(SECTOR);
    let writes = sectors.filter(move |_| start < end).map(move |sector| {
        let from = start.max(sector * SECTOR);
        let to = end.min((sector + 1) * SECTOR);
        What::Write {
            offset: from as u64,
            bytes: bytes[from - start..to - start].to_vec(),
        }
    });
    let length = matches!(what, What::SetLen(_)).then(|| what.clone());
    writes.chain(length)
}

/// Runs `change` on `start`, and `judge` on what a power failure may leave at any point of it. Returns
/// what is on disk for certain at the end, and adds to `states` how many have been judged.
pub fn explore(
    start: &Files,
    seed: u64,
    states: &mut usize,
    change: impl FnOnce(Memory, Memory),
    mut judge: impl FnMut(Files, &str),
) -> Files {
    let log = Log::default();
    change(
        Memory::recording(Which::Image, start.image.clone(), &log),
        Memory::recording(Which::Data, start.data.clone(), &log),
    );
    let log: Vec<Event> = std::mem::take(&mut *log.lock().unwrap());
    assert!(log.iter().any(|event| matches!(event, Event::Sync { .. })));
    let mut random = Random(seed);
    let mut synced = start.clone();
    let mut pending: Vec<Change> = Vec::new();
    for (point, event) in log.iter().enumerate() {
        synced.follow(event, &mut pending);
        for state in synced.crashes(&pending, &mut random) {
            *states += 1;
            judge(
                state,
                &format!("seed {seed}, after event {point} of {}", log.len()),
            );
        }
    }
    synced
}
