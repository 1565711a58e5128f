//! What a disk may be after power has failed.
//!
//! A sector is like a register: each write to it has a beginning and an end, and may take effect at any
//! moment between the two. What was complete when a flush began is durable when that ends. So after a
//! failure a sector shows the initial state or a write that has begun, unless there is another one that
//! began after that was complete, and that is durable.

use std::collections::{BTreeMap, BTreeSet};

use crate::setup::{Kind, Setup};
use crate::storage::SECTOR;
use crate::workload::Op;

/// A moment.
type Time = usize;

/// Something that a sector may show.
#[derive(Clone, Debug)]
struct Candidate {
    stamp: u64,
    begun: Time,
    /// When it was complete, if it is.
    done: Option<Time>,
    /// Number of the request.
    op: usize,
}

/// A disk, as it may be if power fails now.
pub struct Model<'a> {
    ops: &'a [Op],
    now: Time,
    /// When each request was begun.
    begun: Vec<Time>,
    /// How many sectors the disk may have.
    sizes: BTreeSet<u64>,
    /// For each sector; those that the disk does not have now, it may have later, and then they are
    /// zero.
    sectors: Vec<Vec<Candidate>>,
    /// What the disk holds if all that was completed has taken effect, as it is with one queue.
    content: Vec<u64>,
    /// What the snapshots hold.
    snapshots: BTreeMap<u64, Vec<u64>>,
    /// A snapshot that may be there or not.
    uncertain: Option<u64>,
    /// What the disk may hold as a whole instead: that of a snapshot that is being applied.
    other: Option<Vec<u64>>,
    /// What the bitmap may tell: since when it follows changes.
    bitmaps: Vec<Followed>,
    /// What it tells once the backup under way has succeeded.
    backup: Option<Followed>,
    has_bitmap: bool,
}

/// A bitmap that follows changes.
#[derive(Clone, Debug)]
struct Followed {
    /// What the disk held when it began.
    base: Vec<u64>,
    /// Sectors that may have changed since.
    touched: Vec<bool>,
}

impl Followed {
    fn new(base: Vec<u64>, sectors: usize) -> Self {
        let touched = vec![false; sectors];
        Self { base, touched }
    }
}

impl<'a> Model<'a> {
    /// A new disk of `setup`, on which `ops` are carried out.
    pub fn new(setup: &Setup, ops: &'a [Op]) -> Self {
        let mut content = setup.initial();
        content.resize(setup.size() as usize / SECTOR, 0);
        let all = setup.max_size() as usize / SECTOR;
        let mut model = Self {
            ops,
            now: 0,
            begun: vec![0; ops.len()],
            sizes: BTreeSet::new(),
            sectors: Vec::new(),
            snapshots: BTreeMap::new(),
            uncertain: None,
            other: None,
            bitmaps: Vec::new(),
            backup: None,
            has_bitmap: setup.bitmap,
            content: Vec::new(),
        };
        model.follow(content.clone(), all);
        if setup.kind == Kind::Snapshot {
            model.snapshots.insert(0, content.clone());
        }
        model.sectors.resize(all, Vec::new());
        model.hold(content);
        model
    }

    /// A bitmap may follow changes of a disk that holds `base`.
    fn follow(&mut self, base: Vec<u64>, sectors: usize) {
        self.bitmaps.push(Followed::new(base, sectors));
    }

    fn touch(&mut self, sectors: std::ops::Range<usize>) {
        for followed in self.bitmaps.iter_mut().chain(&mut self.backup) {
            followed.touched[sectors.clone()].fill(true);
        }
    }

    /// The disk holds `content`, for good.
    fn hold(&mut self, content: Vec<u64>) {
        self.sizes = BTreeSet::from([content.len() as u64]);
        for (i, sector) in self.sectors.iter_mut().enumerate() {
            let stamp = content.get(i).copied().unwrap_or(0);
            *sector = vec![Candidate {
                stamp,
                begun: 0,
                done: Some(0),
                op: usize::MAX,
            }];
        }
        self.content = content;
    }

    /// Request `op` may take effect from now on.
    pub fn begin(&mut self, op: usize) {
        self.now += 1;
        self.begun[op] = self.now;
        let request = &self.ops[op];
        if let Some(followed) = self.backup.take_if(|_| request.ends_backup()) {
            self.bitmaps.push(followed);
        } else if matches!(request, Op::Backup) && self.has_bitmap {
            self.backup = Some(Followed::new(self.content.clone(), self.sectors.len()));
        }
        match request {
            Op::Resize { sectors } => {
                let len = self.content.len();
                self.sizes.insert(*sectors);
                self.touch(len.min(*sectors as usize)..self.sectors.len());
            }
            Op::Take { snapshot } => {
                self.snapshots.insert(*snapshot, self.content.clone());
                self.uncertain = Some(*snapshot);
            }
            Op::Delete { snapshot } => self.uncertain = Some(*snapshot),
            Op::Apply { snapshot } => self.other = self.snapshots.get(snapshot).cloned(),
            Op::ClearBitmap => self.follow(self.content.clone(), self.sectors.len()),
            other => {
                let Some((sectors, stamp)) = other.written() else {
                    return;
                };
                self.touch(sectors.clone());
                let (begun, done) = (self.now, None);
                for sector in &mut self.sectors[sectors] {
                    sector.push(Candidate {
                        stamp,
                        begun,
                        done,
                        op,
                    });
                }
            }
        }
    }

    /// Request `op` is complete.
    pub fn finish(&mut self, op: usize) {
        self.now += 1;
        let request = &self.ops[op];
        if let Some((sectors, stamp)) = request.written() {
            for candidate in self.sectors[sectors.clone()].iter_mut().flatten() {
                if candidate.op == op {
                    candidate.done = Some(self.now);
                }
            }
            self.content[sectors].fill(stamp);
        }
        if request.is_durable() {
            self.settle(self.begun[op]);
        }
        match request {
            Op::Resize { sectors } => {
                let mut content = self.content.clone();
                content.resize(*sectors as usize, 0);
                self.sizes = BTreeSet::from([*sectors]);
                let done = Some(self.now);
                let zero = Candidate {
                    stamp: 0,
                    begun: self.now,
                    done,
                    op,
                };
                self.sectors[*sectors as usize..].fill(vec![zero]);
                self.content = content;
            }
            Op::Delete { snapshot } => {
                self.snapshots.remove(snapshot);
            }
            Op::Apply { .. } => {
                if let Some(content) = self.other.take() {
                    self.hold(content);
                }
            }
            Op::Cancel => self.backup = None,
            _ => {}
        }
        // The last one counts: a bitmap is cleared, or a backup has ended.
        self.bitmaps.drain(..self.bitmaps.len() - 1);
        if request.is_durable() {
            self.uncertain = None;
        }
    }

    /// What was complete before `begun` is durable.
    fn settle(&mut self, begun: Time) {
        for sector in &mut self.sectors {
            let durable = |one: &&Candidate| one.done.is_some_and(|done| done < begun);
            let last = sector.iter().filter(durable).map(|one| one.begun).max();
            let last = last.unwrap_or(0);
            sector.retain(|one| one.done.is_none_or(|done| done >= last));
        }
    }

    /// Checks what the disk shows.
    pub fn check(&self, stamps: &[u64]) -> Result<(), String> {
        if self.other.as_deref() == Some(stamps) {
            return Ok(());
        }
        if !self.sizes.contains(&(stamps.len() as u64)) {
            let (len, sizes) = (stamps.len(), &self.sizes);
            return Err(format!("{len} sectors, not one of {sizes:?}"));
        }
        for (i, (stamp, sector)) in stamps.iter().zip(&self.sectors).enumerate() {
            if !sector.iter().any(|one| one.stamp == *stamp) {
                let allowed: BTreeSet<u64> = sector.iter().map(|one| one.stamp).collect();
                return Err(format!("sector {i} is {stamp:#x}, not one of {allowed:x?}"));
            }
        }
        Ok(())
    }

    /// Checks a bitmap of a disk that shows `stamps`: it `has` a bit for all that has changed since it was
    /// cleared, and none for what nobody has written.
    pub fn check_bitmap(&self, stamps: &[u64], has: impl Fn(usize) -> bool) -> Result<(), String> {
        let wrong = |followed: &Followed| {
            let is_wrong = |sector: &usize| {
                let base = followed.base.get(*sector).copied().unwrap_or(0);
                let is_changed = stamps[*sector] != base;
                is_changed && !has(*sector) || has(*sector) && !followed.touched[*sector]
            };
            (0..stamps.len()).find(is_wrong)
        };
        let wrong: Vec<usize> = self.bitmaps.iter().map_while(wrong).collect();
        if wrong.len() == self.bitmaps.len() {
            return Err(format!("the bitmap is wrong at sectors {wrong:?}"));
        }
        Ok(())
    }

    /// What has been restored of the disk that the bitmap may go on from.
    pub fn restored(&self) -> impl Iterator<Item = &[u64]> {
        self.bitmaps.iter().map(|followed| &followed.base[..])
    }

    /// What each of the snapshots with the numbers `found` holds.
    ///
    /// # Errors
    /// There are others than should be there.
    pub fn check_snapshots(&self, found: &BTreeSet<u64>) -> Result<(), String> {
        let mut expected: BTreeSet<u64> = self.snapshots.keys().copied().collect();
        let mut found = found.clone();
        if let Some(uncertain) = self.uncertain {
            expected.remove(&uncertain);
            found.remove(&uncertain);
        }
        if found != expected {
            return Err(format!("snapshots {found:?}, not {expected:?}"));
        }
        Ok(())
    }

    pub fn snapshot(&self, number: u64) -> Option<&Vec<u64>> {
        self.snapshots.get(&number)
    }
}

/// `op`, which is none that changes the image as a whole, has taken effect.
pub fn note(stamps: &mut Vec<u64>, op: &Op) {
    if let Op::Resize { sectors } = op {
        stamps.resize(*sectors as usize, 0);
    }
    if let Some((sectors, stamp)) = op.written() {
        stamps[sectors].fill(stamp);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two writes at the same time, and one after them.
    #[test]
    fn what_is_durable_rules_out_what_was_before() {
        let setup = Setup::new(Kind::Internal, 3, 512);
        let write = |stamp| Op::Write {
            sector: 0,
            count: 1,
            stamp,
        };
        let ops = [write(1), write(2), Op::Flush, write(3), Op::Flush];
        let mut model = Model::new(&setup, &ops);
        let shows = |model: &Model, stamp| {
            let mut stamps = vec![0; setup.size() as usize / SECTOR];
            stamps[0] = stamp;
            model.check(&stamps).is_ok()
        };
        let allowed = |model: &Model| (0..5).filter(|stamp| shows(model, *stamp)).collect();
        let expect = |model: &Model, expected: &[u64]| {
            let allowed: Vec<u64> = allowed(model);
            assert_eq!(allowed, expected);
        };
        model.begin(0);
        expect(&model, &[0, 1]);
        model.begin(1);
        model.finish(0);
        // A flush that begins now makes the first durable, and says nothing of the second.
        model.begin(2);
        model.finish(1);
        expect(&model, &[0, 1, 2]);
        model.finish(2);
        expect(&model, &[1, 2]);
        model.begin(3);
        model.begin(4);
        model.finish(3);
        model.finish(4);
        expect(&model, &[1, 2, 3]);
    }
}
