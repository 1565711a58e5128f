//! What is done to the files of a directory, call by call.
//!
//! The calls of a thread are held one by one (`syscalls`), and what each has done is seen in the files
//! themselves: so no call has to be taken apart, and whatever the engine does is seen, names and times
//! included.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fs::{self, File};
use std::os::fd::RawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::SystemTime;

use crate::storage::SECTOR;
use crate::syscalls::at_each_call;

/// What a file is like. It has a number in a trace, which the names of the directory lead to.
#[derive(Clone, Debug)]
pub struct Content {
    pub bytes: Vec<u8>,
    /// When it was written last.
    pub time: SystemTime,
}

impl Default for Content {
    fn default() -> Self {
        Self {
            bytes: Vec::new(),
            time: SystemTime::UNIX_EPOCH,
        }
    }
}

/// What a call has done, by parts that happen on disk by themselves.
#[derive(Clone, Debug)]
pub enum Part {
    /// The file has this in a sector, or up to its end in the last one.
    Sector {
        file: usize,
        at: usize,
        bytes: Vec<u8>,
    },
    Len {
        file: usize,
        len: usize,
    },
    Time {
        file: usize,
        time: SystemTime,
    },
    /// These names lead to other files now, or to none.
    Names(BTreeMap<OsString, Option<usize>>),
}

/// Something that happened.
#[derive(Clone, Debug)]
pub enum Event<M> {
    Change(Vec<Part>),
    /// The content of a file is durable, and if `all` of it is, the time when it was written as well.
    Sync {
        file: usize,
        all: bool,
    },
    /// The names in the directory are durable.
    SyncNames,
    /// Something that the workload tells.
    Mark(M),
}

/// Where a workload tells what it does.
pub struct Trace<M> {
    log: Mutex<Vec<Event<M>>>,
    nothing: File,
}

impl<M: Send> Trace<M> {
    /// Runs `f`, which changes files in `dir`. Returns what happened.
    pub fn record(dir: &Path, f: impl FnOnce(&Self) + Send) -> Vec<Event<M>> {
        let trace = Self {
            log: Mutex::default(),
            nothing: File::open("/dev/null").unwrap(),
        };
        let mut observer = Observer::new(dir);
        at_each_call(
            || f(&trace),
            |number, fd| {
                trace.log.lock().unwrap().extend(observer.settle());
                observer.last = fd.and_then(|fd| observer.target(fd)).map(|to| (number, to));
            },
        );
        let mut log = trace.log.into_inner().unwrap();
        log.extend(observer.settle());
        log
    }

    /// Tells of something that has happened, or is going to.
    pub fn mark(&self, mark: M) {
        // A call that is held, and fails: so what was done before comes before.
        drop(self.nothing.sync_all());
        self.log.lock().unwrap().push(Event::Mark(mark));
    }
}

/// The files and names of a directory, by number.
pub fn contents(dir: &Path) -> (Vec<Content>, BTreeMap<OsString, usize>) {
    let observer = Observer::new(dir);
    let files = observer.files.into_iter().map(|file| file.content);
    (files.collect(), observer.names)
}

struct Observer {
    dir: PathBuf,
    files: Vec<Known>,
    names: BTreeMap<OsString, usize>,
    /// The call that is being made.
    last: Option<(i64, Target)>,
}

struct Known {
    /// Keeps its number from being used again.
    file: File,
    ino: u64,
    content: Content,
}

#[derive(Clone, Copy)]
enum Target {
    File(usize),
    Directory,
}

impl Observer {
    fn new(dir: &Path) -> Self {
        let mut observer = Self {
            dir: dir.to_owned(),
            files: Vec::new(),
            names: BTreeMap::new(),
            last: None,
        };
        observer.names = observer.list();
        for i in 0..observer.files.len() {
            observer.changes_of(i);
        }
        observer
    }

    /// The names in the directory.
    fn list(&mut self) -> BTreeMap<OsString, usize> {
        let entries = fs::read_dir(&self.dir).unwrap().map(Result::unwrap);
        entries
            .map(|entry| (entry.file_name(), self.known(&entry.path())))
            .collect()
    }

    /// The number of the file at `path`.
    fn known(&mut self, path: &Path) -> usize {
        let ino = fs::metadata(path).unwrap().ino();
        let known = self.files.iter().position(|known| known.ino == ino);
        known.unwrap_or_else(|| {
            self.files.push(Known {
                file: File::open(path).unwrap(),
                ino,
                content: Content::default(),
            });
            self.files.len() - 1
        })
    }

    /// What the descriptor `fd` leads to, if that is in the directory.
    fn target(&mut self, fd: RawFd) -> Option<Target> {
        let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
        let to = fs::read_link(&path).ok()?;
        if to == self.dir {
            return Some(Target::Directory);
        }
        let is_inside = to.starts_with(&self.dir);
        is_inside.then(|| Target::File(self.known(&path)))
    }

    /// What the last call has done.
    fn settle<M>(&mut self) -> Vec<Event<M>> {
        let mut events = Vec::new();
        match self.last.take() {
            Some((libc::SYS_fsync, Target::Directory)) => events.push(Event::SyncNames),
            Some((number @ (libc::SYS_fsync | libc::SYS_fdatasync), Target::File(file))) => {
                let all = number == libc::SYS_fsync;
                events.push(Event::Sync { file, all });
            }
            Some((_, Target::File(file))) => events.push(Event::Change(self.changes_of(file))),
            _ => {}
        }
        let names = self.list();
        let mut changed = BTreeMap::new();
        for name in names.keys().chain(self.names.keys()) {
            let now = names.get(name).copied();
            if now != self.names.get(name).copied() {
                changed.insert(name.clone(), now);
            }
        }
        self.names = names;
        events.push(Event::Change(vec![Part::Names(changed)]));
        events.retain(
            |event| !matches!(event, Event::Change(parts) if parts.iter().all(Part::is_nothing)),
        );
        events
    }

    /// What has changed of a file.
    fn changes_of(&mut self, file: usize) -> Vec<Part> {
        let known = &mut self.files[file];
        let metadata = known.file.metadata().unwrap();
        let len = metadata.len() as usize;
        let mut now = Content {
            bytes: vec![0; len],
            time: metadata.modified().unwrap(),
        };
        known.file.read_exact_at(&mut now.bytes, 0).unwrap();
        let mut old = std::mem::replace(&mut known.content, now.clone());
        let mut parts = Vec::new();
        if old.bytes.len() != len {
            parts.push(Part::Len { file, len });
            old.bytes.resize(len, 0);
        }
        let sectors = now.bytes.chunks(SECTOR).zip(old.bytes.chunks(SECTOR));
        for (i, (bytes, _)) in (0..).zip(sectors).filter(|(_, (now, old))| now != old) {
            parts.push(Part::Sector {
                file,
                at: i * SECTOR,
                bytes: bytes.to_vec(),
            });
        }
        if now.time != old.time {
            parts.push(Part::Time {
                file,
                time: now.time,
            });
        }
        parts
    }
}

impl Part {
    fn is_nothing(&self) -> bool {
        matches!(self, Self::Names(names) if names.is_empty())
    }
}
