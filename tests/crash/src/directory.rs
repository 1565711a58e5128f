//! What is in a directory after a power failure.
//!
//! A file's content is durable once it has been synced, its time only if all of it has been (fsync(2), not
//! fdatasync(2)), and its name once the directory has. Until then each sector, length and time is there or
//! not, and each name leads to where it has led or leads, whatever of the file is there: one with a new
//! name may be empty. What one call does to several names happens as one.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::path::Path;

use crate::power::{Effort, choices};
use crate::random::Random;
use crate::trace::{Content, Event, Part, contents};

/// Files, and the names that lead to them.
#[derive(Clone, Default)]
pub struct Directory {
    files: Vec<Content>,
    names: BTreeMap<OsString, usize>,
}

impl Directory {
    /// What is in the directory at `path` now.
    pub fn read(path: &Path) -> Self {
        let (files, names) = contents(path);
        Self { files, names }
    }

    fn file(&mut self, file: usize) -> &mut Content {
        if self.files.len() <= file {
            self.files.resize_with(file + 1, Content::default);
        }
        &mut self.files[file]
    }

    fn apply(&mut self, part: &Part) {
        match part {
            Part::Sector { file, at, bytes } => {
                let content = &mut self.file(*file).bytes;
                let end = at + bytes.len();
                if content.len() < end {
                    content.resize(end, 0);
                }
                content[*at..end].copy_from_slice(bytes);
            }
            Part::Len { file, len } => self.file(*file).bytes.resize(*len, 0),
            Part::Time { file, time } => self.file(*file).time = *time,
            Part::Names(names) => {
                for (name, file) in names {
                    match file {
                        Some(file) => drop(self.names.insert(name.clone(), *file)),
                        None => drop(self.names.remove(name)),
                    }
                }
            }
        }
    }

    /// Makes the files in the empty directory at `path`.
    pub fn write(&self, path: &Path) {
        for (name, file) in &self.names {
            let to = path.join(name);
            let nothing = Content::default();
            let content = self.files.get(*file).unwrap_or(&nothing);
            fs::write(&to, &content.bytes).unwrap();
            let file = File::options().write(true).open(to).unwrap();
            file.set_modified(content.time).unwrap();
        }
    }
}

/// A directory of which not everything is durable.
pub struct Outage {
    durable: Directory,
    /// What has been done since, with the number of the call.
    pending: Vec<(usize, Part)>,
    calls: usize,
    /// How many calls had been made when the last states were built.
    seen: usize,
}

impl Outage {
    pub fn new(start: Directory) -> Self {
        Self {
            durable: start,
            pending: Vec::new(),
            calls: 0,
            seen: 0,
        }
    }

    /// Something has happened where power has not failed. Returns whether there are new states since the
    /// last ones were built.
    pub fn follow<M>(&mut self, event: &Event<M>) -> bool {
        match event {
            Event::Change(parts) => {
                let parts = parts.iter().cloned().map(|part| (self.calls, part));
                self.pending.extend(parts);
                self.calls += 1;
                true
            }
            Event::Sync { file, all } => self.settle(|part| match part {
                Part::Sector { file: of, .. } | Part::Len { file: of, .. } => of == file,
                Part::Time { file: of, .. } => *all && of == file,
                Part::Names(_) => false,
            }),
            Event::SyncNames => self.settle(|part| matches!(part, Part::Names(_))),
            Event::Mark(_) => false,
        }
    }

    /// All states are new: less is allowed from now on.
    pub fn restart(&mut self) {
        self.seen = 0;
    }

    /// Returns whether there is anything that becomes durable.
    fn settle(&mut self, is_durable: impl Fn(&Part) -> bool) -> bool {
        let before = self.pending.len();
        for (_, part) in self.pending.extract_if(.., |(_, part)| is_durable(part)) {
            self.durable.apply(&part);
        }
        let settles = self.pending.len() < before;
        if settles {
            self.restart();
        }
        settles
    }

    /// The directory with all that has been done, and others that a power failure can leave now: all of
    /// them, or some if they are many. And whether these are all.
    pub fn states(&mut self, effort: Effort, random: &mut Random) -> (Vec<Directory>, bool) {
        let new = std::mem::replace(&mut self.seen, self.calls);
        let calls: Vec<usize> = self.pending.iter().map(|(call, _)| *call).collect();
        let (mut chosen, is_exhaustive) = choices(&calls, new, effort, random);
        if !is_exhaustive {
            chosen.push(vec![true; calls.len()]);
        }
        let state = |chosen: Vec<bool>| {
            let mut state = self.durable.clone();
            let parts = self.pending.iter().zip(chosen);
            for ((_, part), _) in parts.filter(|(_, chosen)| *chosen) {
                state.apply(part);
            }
            state
        };
        (chosen.into_iter().map(state).collect(), is_exhaustive)
    }
}
