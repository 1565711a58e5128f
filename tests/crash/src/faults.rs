//! Files that fail: each call of each operation in turn, in each way that it can, on any of the files.
//!
//! The one request fails and tells of which file; it has changed nothing outside its range; it can be
//! repeated, and later ones work; the image is whole when it is opened again. What is only interrupted,
//! or transferred in part, succeeds. After a sync that has failed no flush succeeds any more until the
//! image is opened again, since the system may have dropped what it could not write.

use std::fmt;
use std::fs;
use std::ops::AddAssign;
use std::path::{Path, PathBuf};

use tandem_block::qcow2::{
    BitmapEditor, CheckOptions, Commit, FindingKind, OpenOptions, Qcow2, Repair, check,
};
use tandem_block::{Disk, Error, LiveDisk, Result};
use tempfile::TempDir;
use vm_memory::VolatileSlice;

use crate::judge::read_stamps;
use crate::model::note;
use crate::setup::{Kind, SNAPSHOT, Setup, scratch};
use crate::storage::{SECTOR, sector_bytes};
use crate::syscalls::{Call, Fault, Plan, with_fault};
use crate::workload::{Amendment, Op, request};

/// Each way in which a call can fail.
pub const FAULTS: [Fault; 5] = [
    Fault::Error(libc::EIO),
    Fault::Error(libc::ENOSPC),
    Fault::Error(libc::EDQUOT),
    Fault::Error(libc::EINTR),
    Fault::Short,
];

/// Images of which files fail.
pub const SETUPS: [Setup; 8] = [
    Setup::new(Kind::Internal, 3, 4096),
    Setup::new(Kind::External, 3, 4096),
    Setup::new(Kind::Raw, 3, 4096),
    Setup::new(Kind::RawIncomplete, 3, 4096),
    Setup::new(Kind::Packed, 3, 4096),
    Setup::new(Kind::Overlay, 3, 4096),
    Setup::new(Kind::Snapshot, 3, 4096),
    Setup::new(Kind::Internal, 3, 4096).with_bitmap(),
];

/// Something that is done while files fail.
#[derive(Clone)]
enum Action {
    /// A request, and a flush.
    Request(Op),
    /// What opens the image at a path, and closes it.
    Whole(fn(&Path) -> Result<()>),
}

const STAMP: u64 = 77;

/// The operations on an image of `setup`, by name.
fn operations(setup: &Setup) -> Vec<(&'static str, Action)> {
    let write = |sector, count| {
        Action::Request(Op::Write {
            sector,
            count,
            stamp: STAMP,
        })
    };
    let zero = |sector, count, unmap| {
        Action::Request(Op::Zero {
            sector,
            count,
            unmap,
        })
    };
    let sectors = setup.size() / SECTOR as u64;
    let resize = |sectors| Action::Request(Op::Resize { sectors });
    let mut all = vec![
        ("write in place", write(9, 20)),
        ("write to new clusters", write(70, 50)),
        ("write at the end", write(sectors - 3, 3)),
        ("write zeroes", zero(9, 20, false)),
        ("write zeroes and release", zero(8, 24, true)),
        (
            "discard",
            Action::Request(Op::Discard {
                sector: 8,
                count: 24,
            }),
        ),
        ("grow", resize(sectors + 4000)),
        ("shrink", resize(21)),
        ("write and close", Action::Whole(write_and_close)),
        ("check and repair", Action::Whole(repair)),
    ];
    if !setup.has_data_file() {
        let compress = Op::Compress {
            sector: 16,
            count: 8,
            stamp: STAMP,
        };
        all.push(("write compressed", Action::Request(compress)));
        if !setup.bitmap {
            all.push(("take a snapshot", Action::Whole(take)));
        }
    }
    if setup.kind == Kind::Snapshot {
        all.push(("apply a snapshot", Action::Whole(apply)));
        all.push(("delete a snapshot", Action::Whole(delete)));
    }
    if setup.kind == Kind::Overlay {
        all.push(("commit", Action::Whole(commit)));
    }
    if setup.bitmap {
        all.push(("change bitmaps", Action::Whole(change_bitmaps)));
    } else {
        all.push(("amend refcounts", Action::Whole(amend_refcounts)));
    }
    all
}

fn open(path: &Path) -> Result<Qcow2> {
    Qcow2::open(path, &OpenOptions::default())
}

fn fill(disk: &dyn Disk, sector: u64, count: usize, stamp: u64) -> Result<()> {
    let mut bytes = sector_bytes(stamp).repeat(count);
    disk.write_at(
        &[VolatileSlice::from(&mut bytes[..])],
        sector * SECTOR as u64,
    )
}

fn write_and_close(path: &Path) -> Result<()> {
    let disk = open(path)?;
    fill(&disk, 100, 10, STAMP)?;
    disk.close()
}

fn repair(path: &Path) -> Result<()> {
    let options = CheckOptions {
        repair: Repair::All,
        ..CheckOptions::default()
    };
    check(path, &options, &mut |_| ()).map(drop)
}

fn take(path: &Path) -> Result<()> {
    open(path)?.create_snapshot(b"new")
}

fn apply(path: &Path) -> Result<()> {
    open(path)?.apply_snapshot(SNAPSHOT)
}

fn delete(path: &Path) -> Result<()> {
    match open(path)?.delete_snapshot(SNAPSHOT) {
        // The last time it had got so far before it failed.
        Err(Error::NoSnapshot { .. }) => Ok(()),
        deleted => deleted,
    }
}

fn commit(path: &Path) -> Result<()> {
    let commit = Commit::open(path, 0, &OpenOptions::default())?;
    commit.copy(&mut |_, _| ())?;
    commit.finish(true)
}

fn change_bitmaps(path: &Path) -> Result<()> {
    let mut editor = BitmapEditor::new(open(path)?)?;
    // The last time it had got so far before it failed.
    drop(editor.remove(b"new"));
    editor.add(b"new", Some(512))?;
    editor.set_enabled(b"new", false)?;
    editor.commit()
}

fn amend_refcounts(path: &Path) -> Result<()> {
    open(path)?.amend(&Amendment::RefcountBits(32).options(), &mut |_, _| ())
}

/// An image whose files are as they were at first before each case.
struct Fixture {
    dir: TempDir,
    files: Vec<(PathBuf, Vec<u8>)>,
}

impl Fixture {
    fn new(setup: &Setup) -> Self {
        let dir = scratch();
        setup.create_in(dir.path());
        let disk = open(&dir.path().join("image")).unwrap();
        fill(&disk, 3, 30, 5).unwrap();
        fill(&disk, 41, 3, 6).unwrap();
        disk.close().unwrap();
        drop(disk);
        let read = |entry: std::io::Result<fs::DirEntry>| {
            let path = entry.unwrap().path();
            let bytes = fs::read(&path).unwrap();
            (path, bytes)
        };
        let files = fs::read_dir(dir.path()).unwrap().map(read).collect();
        Self { dir, files }
    }

    fn restore(&self) -> PathBuf {
        for (path, bytes) in &self.files {
            fs::write(path, bytes).unwrap();
        }
        self.dir.path().join("image")
    }
}

/// How many faults there were.
#[derive(Clone, Copy, Debug, Default)]
pub struct Injected {
    pub faults: usize,
    /// In how many cases the operation can do without what failed, and succeeds all the same.
    pub survived: usize,
    /// Of how many of them the failing call was a sync.
    pub syncs: usize,
}

impl AddAssign for Injected {
    fn add_assign(&mut self, more: Self) {
        self.faults += more.faults;
        self.survived += more.survived;
        self.syncs += more.syncs;
    }
}

impl fmt::Display for Injected {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} faults, {} of them in syncs; {} could be done without; no violation",
            self.faults, self.syncs, self.survived
        )
    }
}

/// Has calls of all operations on images of `setup` fail: every `step`th one in each way.
///
/// # Errors
/// What is wrong, and when.
pub fn explore(
    setup: &Setup,
    step: usize,
    injected: &mut Injected,
) -> std::result::Result<(), String> {
    let fixture = Fixture::new(setup);
    for (name, action) in operations(setup) {
        for fault in FAULTS {
            let harmless = matches!(fault, Fault::Short | Fault::Error(libc::EINTR));
            for after in (0..).step_by(step) {
                let case = Case {
                    path: fixture.restore(),
                    plan: Plan { after, fault },
                    harmless,
                    may_leak_data: setup.kind == Kind::RawIncomplete,
                };
                let done = match &action {
                    Action::Request(op) => case.request(op),
                    Action::Whole(operation) => case.whole(*operation),
                };
                let wrong = |e| format!("{setup}, {name}, {fault:?} after {after} calls: {e}");
                let Some(Done { call, succeeded }) = done.map_err(wrong)? else {
                    break;
                };
                injected.faults += 1;
                injected.survived += usize::from(succeeded && !harmless);
                injected.syncs += usize::from(call.is_sync());
            }
        }
    }
    Ok(())
}

/// A call that fails once.
struct Case {
    path: PathBuf,
    plan: Plan,
    /// The operation succeeds.
    harmless: bool,
    /// A raw data file may hold more than the disk shows.
    may_leak_data: bool,
}

/// What has become of an operation.
struct Done {
    call: Call,
    succeeded: bool,
}

type Judged = std::result::Result<Option<Done>, String>;

impl Case {
    fn request(&self, op: &Op) -> Judged {
        let text = |e: Error| e.to_string();
        let disk = LiveDisk::new(open(&self.path).map_err(text)?);
        let before = read_stamps(&disk)?;
        let mut after = before.clone();
        note(&mut after, op);
        let (result, call) = with_fault(self.plan, || {
            request(&disk, op)?;
            disk.flush()
        });
        let Some(call) = call else {
            result.map_err(text)?;
            return Ok(None);
        };
        let what = |e| format!("{call:?}: {e}");
        let succeeded = self.check_result(&result, &call).map_err(what)?;
        let shown = read_stamps(&disk)?;
        self.expect(&shown, &before, &after, succeeded)
            .map_err(what)?;
        if call.is_sync() && !self.harmless {
            for _ in 0..2 {
                if disk.flush().is_ok() {
                    return Err(what("a flush after a sync that failed succeeds".into()));
                }
            }
            drop(disk);
            self.expect_whole(&before, &after, false).map_err(what)?;
            return Ok(Some(Done { call, succeeded }));
        }
        let again = |e: Error| what(format!("later: {e}"));
        request(&disk, op).map_err(again)?;
        disk.flush().map_err(again)?;
        fill(&disk, 0, 2, STAMP + 1).map_err(again)?;
        after[..2].fill(STAMP + 1);
        self.expect(&read_stamps(&disk)?, &after, &after, true)
            .map_err(what)?;
        disk.close().map_err(again)?;
        drop(disk);
        self.expect_whole(&after, &after, true).map_err(what)?;
        Ok(Some(Done { call, succeeded }))
    }

    fn whole(&self, operation: fn(&Path) -> Result<()>) -> Judged {
        let content = || {
            let disk = open(&self.path).map_err(|e| format!("does not open: {e}"))?;
            read_stamps(&disk)
        };
        let before = content()?;
        let (result, call) = with_fault(self.plan, || operation(&self.path));
        let Some(call) = call else {
            result.map_err(|e| e.to_string())?;
            return Ok(None);
        };
        let what = |e| format!("{call:?}: {e}");
        let succeeded = self.check_result(&result, &call).map_err(what)?;
        let shown = content().map_err(what)?;
        self.check_image().map_err(what)?;
        operation(&self.path).map_err(|e| what(format!("once more: {e}")))?;
        let after = content().map_err(what)?;
        self.check_image().map_err(what)?;
        self.expect(&shown, &before, &after, succeeded)
            .map_err(what)?;
        Ok(Some(Done { call, succeeded }))
    }

    /// A failure is told with the file. Returns whether there was none.
    fn check_result(&self, result: &Result<()>, call: &Call) -> std::result::Result<bool, String> {
        let Err(error) = result else {
            return Ok(true);
        };
        let text = error.to_string();
        if self.harmless {
            return Err(text);
        }
        if call.is_open() {
            // Whoever has opened it for another one says so in its own words.
            return Ok(false);
        }
        let name = call.file.file_name().unwrap_or_default().to_string_lossy();
        let is_known = matches!(error, Error::Io { .. } | Error::SyncFailed { .. });
        match is_known && text.contains(&*name) {
            true => Ok(false),
            false => Err(format!("the error is '{text}'")),
        }
    }

    /// Each sector is as `before` or `after` the operation, and as after it if that `succeeded`.
    fn expect(
        &self,
        shown: &[u64],
        before: &[u64],
        after: &[u64],
        succeeded: bool,
    ) -> std::result::Result<(), String> {
        let fits = |len: usize| shown.len() == len;
        if !fits(after.len()) && (succeeded || !fits(before.len())) {
            return Err(format!("the disk has {} sectors", shown.len()));
        }
        for (i, stamp) in shown.iter().enumerate() {
            let of = |stamps: &[u64]| stamps.get(i).copied().unwrap_or(0);
            let is_old = *stamp == of(before) && !succeeded;
            if *stamp != of(after) && !is_old {
                return Err(format!("sector {i} is {stamp:#x}"));
            }
        }
        Ok(())
    }

    /// The image, opened again, is whole and has the content.
    fn expect_whole(
        &self,
        before: &[u64],
        after: &[u64],
        succeeded: bool,
    ) -> std::result::Result<(), String> {
        let disk = open(&self.path).map_err(|e| format!("does not open: {e}"))?;
        self.expect(&read_stamps(&disk)?, before, after, succeeded)?;
        drop(disk);
        self.check_image()
    }

    /// A check finds leaks at most.
    fn check_image(&self) -> std::result::Result<(), String> {
        let mut worst = None;
        let found = &mut |finding: tandem_block::qcow2::Finding| {
            let is_data = self.may_leak_data && finding.text.contains("Raw data file has data");
            if finding.kind != FindingKind::Leak && !is_data {
                worst = Some(finding.text);
            }
        };
        let checked = check(&self.path, &CheckOptions::default(), found);
        checked.map_err(|e| format!("check fails: {e}"))?;
        match worst {
            Some(text) => Err(format!("check finds: {text}")),
            None => Ok(()),
        }
    }
}
