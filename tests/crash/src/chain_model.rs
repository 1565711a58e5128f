//! What the files of a chain of images may be after power has failed.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::ops::Range;
use std::path::Path;

use tandem_block::qcow2::{CheckOptions, FindingKind, OpenOptions, Qcow2, check};
use tandem_block::{Disk, Error, LiveDisk, LiveImage, Raw};
use vm_memory::VolatileSlice;

use crate::bitmap;
use crate::judge::read_stamps;
use crate::qemu;
use crate::setup::BITMAP;
use crate::storage::{SECTOR, sector_bytes};

/// The stamp of what is written after the failure.
const AFTERWARDS: u64 = 1 << 32;

/// What a workload tells.
#[derive(Clone, Debug)]
pub enum Step {
    /// These sectors are about to get this stamp.
    Write { sectors: Range<usize>, stamp: u64 },
    /// What has been written is durable.
    Flushed,
    /// The disk is found in each of these files.
    Found(Vec<String>),
    /// There may be new images with these names soon, on top of the disk.
    Coming(Vec<String>),
    /// There is no such file any more.
    Gone(String),
    /// From now on this file holds what the disk holds now, and is not written.
    Kept(String),
    /// This one holds something else, and is not written.
    Beside { name: String, content: Vec<u64> },
    /// These files are about to be written, or lose their meaning. Who stands on them may be refused.
    Changing(Vec<String>),
}

/// A file that is not written.
#[derive(Clone)]
struct Kept {
    content: Vec<u64>,
    /// What it stands on may have changed, which it says then.
    may_be_refused: bool,
}

/// A disk, and files beside it, as they may be if power fails now.
pub struct ChainModel {
    /// What each sector may show.
    possible: Vec<BTreeSet<u64>>,
    pub content: Vec<u64>,
    /// What the disk held when the bitmap began.
    start: Vec<u64>,
    found: Vec<String>,
    coming: Vec<String>,
    gone: Vec<String>,
    kept: BTreeMap<String, Kept>,
}

/// Whether the file of that name is the disk.
pub fn is_raw(name: &str) -> bool {
    name.ends_with("raw")
}

/// Opens the disk in the file `name` of `dir`.
pub fn open(dir: &Path, name: &str, read_only: bool) -> tandem_block::Result<LiveImage> {
    let path = dir.join(name);
    if is_raw(name) {
        return Raw::open(&path, read_only).map(Into::into);
    }
    let options = OpenOptions {
        read_only,
        ..OpenOptions::default()
    };
    Qcow2::open(&path, &options).map(Into::into)
}

pub fn fill(disk: &dyn Disk, sectors: Range<usize>, stamp: u64) -> tandem_block::Result<()> {
    let mut bytes = sector_bytes(stamp).repeat(sectors.len());
    let bufs = [VolatileSlice::from(&mut bytes[..])];
    disk.write_at(&bufs, (sectors.start * SECTOR) as u64)
}

impl ChainModel {
    /// A disk that holds `content`, and is nowhere yet.
    pub fn new(content: Vec<u64>) -> Self {
        let possible = content.iter().map(|stamp| BTreeSet::from([*stamp]));
        Self {
            possible: possible.collect(),
            start: content.clone(),
            content,
            found: Vec::new(),
            coming: Vec::new(),
            gone: Vec::new(),
            kept: BTreeMap::new(),
        }
    }

    /// Takes a step into account. Returns whether less is allowed from now on.
    pub fn follow(&mut self, step: &Step) -> bool {
        match step {
            Step::Write { sectors, stamp } => {
                self.content[sectors.clone()].fill(*stamp);
                for possible in &mut self.possible[sectors.clone()] {
                    possible.insert(*stamp);
                }
            }
            Step::Flushed => {
                let durable = self.content.iter().map(|stamp| BTreeSet::from([*stamp]));
                self.possible = durable.collect();
            }
            Step::Found(names) => {
                self.found.clone_from(names);
                self.coming.clear();
            }
            Step::Coming(names) => self.coming.clone_from(names),
            Step::Gone(name) => {
                self.coming.clear();
                self.gone.push(name.clone());
            }
            Step::Kept(name) => self.keep(name, self.content.clone()),
            Step::Beside { name, content } => self.keep(name, content.clone()),
            Step::Changing(names) => {
                self.kept.retain(|name, _| !names.contains(name));
                self.kept
                    .values_mut()
                    .for_each(|kept| kept.may_be_refused = true);
            }
        }
        matches!(
            step,
            Step::Flushed | Step::Found(_) | Step::Gone(_) | Step::Kept(_)
        )
    }

    fn keep(&mut self, name: &str, content: Vec<u64>) {
        let kept = Kept {
            content,
            may_be_refused: false,
        };
        self.kept.insert(name.to_owned(), kept);
    }

    /// Judges what is in `dir`, by QEMU's programs too, and by what it is like after more requests.
    ///
    /// # Errors
    /// What is wrong.
    pub fn judge(&self, dir: &Path, by_qemu: bool, goes_on: bool) -> Result<(), String> {
        let wrong = |name: &str| {
            let name = name.to_owned();
            move |e| format!("{name}: {e}")
        };
        for (name, kept) in &self.kept {
            let fits = |i: usize, stamp| kept.content[i] == stamp;
            let shown = show(dir, name, fits).map_err(wrong(name))?;
            if !kept.may_be_refused {
                shown.map_err(wrong(name))?;
            }
        }
        let fits = |i: usize, stamp| self.possible[i].contains(&stamp);
        for name in &self.coming {
            if dir.join(name).exists() {
                // What it stands on may have been written since it took its stamp.
                drop(show(dir, name, fits).map_err(wrong(name))?);
            }
        }
        if let Some(name) = self.gone.iter().find(|name| dir.join(name).exists()) {
            return Err(format!("{name}: it is there"));
        }
        for name in &self.found {
            let shown = show(dir, name, fits).map_err(wrong(name))?;
            let shown = shown.map_err(wrong(name))?;
            self.check_bitmap(dir, name, &shown).map_err(wrong(name))?;
            if by_qemu && !is_raw(name) {
                qemu::judge_at(dir, name, &shown)?;
            }
        }
        match self.found.first().filter(|_| goes_on) {
            Some(name) => go_on(dir, name).map_err(|e| format!("{name}, afterwards: {e}")),
            None => Ok(()),
        }
    }

    /// A bitmap that is not marked as in use has a bit for all that has changed.
    fn check_bitmap(&self, dir: &Path, name: &str, shown: &[u64]) -> Result<(), String> {
        if is_raw(name) {
            return Ok(());
        }
        let stored = bitmap::stored(&fs::read(dir.join(name)).unwrap());
        for stored in stored.iter().filter(|one| one.name == BITMAP) {
            let is_lost = |i: &usize| {
                let has = stored.has((i * SECTOR) as u64);
                shown[*i] != self.start[*i] && has == Some(false)
            };
            if let Some(i) = (0..shown.len()).find(is_lost) {
                return Err(format!("the bitmap does not tell of sector {i}"));
            }
        }
        Ok(())
    }
}

/// What the disk in `name` shows, each sector of which is to be one that `fits`; or that what is below it
/// has changed, as it says.
fn show(
    dir: &Path,
    name: &str,
    fits: impl Fn(usize, u64) -> bool,
) -> Result<Result<Vec<u64>, String>, String> {
    if !is_raw(name) {
        check_image(dir, name)?;
    }
    let disk = match open(dir, name, true) {
        Ok(disk) => disk,
        Err(e @ Error::BaseChanged { .. }) => return Ok(Err(e.to_string())),
        Err(e) => return Err(format!("does not open: {e}")),
    };
    let shown = read_stamps(disk.disk())?;
    match (0..shown.len()).find(|i| !fits(*i, shown[*i])) {
        Some(i) => Err(format!("sector {i} is {:#x}", shown[i])),
        None => Ok(Ok(shown)),
    }
}

fn check_image(dir: &Path, name: &str) -> Result<(), String> {
    let mut worst = None;
    let found = &mut |finding: tandem_block::qcow2::Finding| {
        if finding.kind != FindingKind::Leak {
            worst = Some(finding.text);
        }
    };
    let checked = check(&dir.join(name), &CheckOptions::default(), found);
    checked.map_err(|e| format!("check fails: {e}"))?;
    worst.map_or(Ok(()), |text| Err(format!("check finds: {text}")))
}

/// The disk in `name` can be written.
fn go_on(dir: &Path, name: &str) -> Result<(), String> {
    let text = |e: Error| e.to_string();
    let disk = LiveDisk::new(open(dir, name, false).map_err(text)?);
    let mut stamps = read_stamps(&disk)?;
    for (i, sectors) in [(0, 3..9), (1, 60..100), (2, 130..139)] {
        fill(&disk, sectors.clone(), AFTERWARDS + i).map_err(text)?;
        stamps[sectors].fill(AFTERWARDS + i);
    }
    disk.close().map_err(text)?;
    drop(disk);
    show(dir, name, |i, stamp| stamps[i] == stamp)?.map(drop)
}
