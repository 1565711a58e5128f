//! Calls that fail in operations on a disk in use, and in the making of images: those about names and
//! directories, too.
//!
//! The one operation fails, with an error that tells of a file and why, and leaves no new names; the disk
//! goes on with what it had, and the operation can be repeated.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::Path;
use std::sync::Arc;

use tandem_block::qcow2::{
    BackingName, Base, CreateOptions, OpenOptions, OverlayOptions, OverlayPlace, create,
};
use tandem_block::{
    BackupKind, BackupOptions, CommitOptions, Disk, Error, ForkOptions, ImageFormat, LiveDisk,
    RebaseOptions, Result,
};

use crate::chain_model::{fill, open};
use crate::chains::{Case, OTHER};
use crate::directory::Directory;
use crate::faults::{FAULTS, Injected};
use crate::judge::read_stamps;
use crate::setup::{BITMAP, scratch};
use crate::storage::SECTOR;
use crate::syscalls::{Call, Fault, Plan, with_fault};
use crate::workload::restore;

/// Something that is done to a disk in use.
struct Operation {
    name: &'static str,
    case: Case<'static>,
    perform: fn(&Path, &Arc<LiveDisk>) -> Result<()>,
    /// Where the disk is found afterwards, if that is not where it was.
    moves_to: Option<&'static str>,
}

impl Operation {
    const fn new(
        name: &'static str,
        case: Case<'static>,
        perform: fn(&Path, &Arc<LiveDisk>) -> Result<()>,
    ) -> Self {
        Self {
            name,
            case,
            perform,
            moves_to: None,
        }
    }

    const fn moving_to(self, name: &'static str) -> Self {
        Self {
            moves_to: Some(name),
            ..self
        }
    }

    fn head(&self) -> &'static str {
        self.case.names[self.case.names.len() - 1]
    }
}

const RAW: Case = Case::new(4096, &["image.raw"]);
const ONE: Case = Case::new(4096, &["image"]);
const TWO: Case = Case::new(4096, &["base", "image"]);
const LEN: u64 = SECTOR as u64;

const OPERATIONS: [Operation; 18] = [
    Operation::new("write to a raw disk", RAW, |_, disk| write(disk)),
    Operation::new("write zeroes to a raw disk", RAW, |_, disk| {
        disk.write_zeroes(9 * LEN, 50 * LEN, false)?;
        disk.flush()
    }),
    Operation::new("release zeroes of a raw disk", RAW, |_, disk| {
        disk.write_zeroes(9 * LEN, 50 * LEN, true)?;
        disk.flush()
    }),
    Operation::new("discard of a raw disk", RAW, |_, disk| {
        disk.discard(8 * LEN, 56 * LEN)?;
        disk.flush()
    }),
    Operation::new("grow a raw disk", RAW, |_, disk| disk.resize(400 * LEN)),
    Operation::new("shrink a raw disk", RAW, |_, disk| disk.resize(100 * LEN)),
    Operation::new("back up a raw disk", RAW, |dir, disk| {
        back_up(dir, disk, BackupKind::Full { track: None })
    }),
    Operation::new("back up by a bitmap", ONE.with_bitmap(), |dir, disk| {
        let bitmap = BITMAP.to_vec();
        let kind = BackupKind::Since {
            bitmap,
            keep: false,
        };
        back_up(dir, disk, kind)
    }),
    Operation::new("fork a raw disk", RAW, fork).moving_to("over"),
    Operation::new("fork", TWO, fork).moving_to("over"),
    Operation::new("fork with a bitmap", ONE.with_bitmap(), fork).moving_to("over"),
    Operation::new("commit", TWO.stamped(&["image"]), |_, disk| {
        commit(disk, false)
    }),
    Operation::new("commit and go on with the base", TWO, |_, disk| {
        commit(disk, true)
    })
    .moving_to("base"),
    Operation::new("put on another backing file", TWO, |_, disk| {
        rebase(disk, Some(OTHER.0))
    }),
    Operation::new("put on none", TWO, |_, disk| rebase(disk, None)),
    Operation::new("make an overlay", ONE, |dir, _| overlay(dir)),
    Operation::new("make an image", RAW, |dir, _| make(dir, "new")),
    Operation::new("replace an image", RAW, |dir, _| make(dir, OTHER.0)),
];

fn write(disk: &LiveDisk) -> Result<()> {
    fill(disk, 20..60, 77)?;
    disk.flush()
}

fn fork(dir: &Path, disk: &Arc<LiveDisk>) -> Result<()> {
    let options = ForkOptions {
        open: OpenOptions::default(),
        overlay: dir.join("over"),
        fork: dir.join("fork"),
    };
    // What is not needed may be told as a warning.
    disk.fork(&options).map(drop)
}

fn commit(disk: &LiveDisk, pivot: bool) -> Result<()> {
    let options = CommitOptions {
        open: OpenOptions::default(),
        between: 0,
        pivot,
        max_last: None,
    };
    let go_on = &mut |_, _| ControlFlow::Continue(());
    disk.commit(&options, go_on).map(drop)
}

fn rebase(disk: &LiveDisk, onto: Option<&str>) -> Result<()> {
    let options = RebaseOptions {
        open: OpenOptions::default(),
        backing: onto.map(|onto| BackingName {
            file: onto.into(),
            format: "raw".into(),
        }),
        max_last: None,
    };
    let go_on = &mut |_, _| ControlFlow::Continue(());
    disk.rebase(&options, go_on).map(drop)
}

/// Writes while it goes on: what fails in the copy fails the backup, and not the write.
fn back_up(dir: &Path, disk: &Arc<LiveDisk>, kind: BackupKind) -> Result<()> {
    let options = BackupOptions {
        kind,
        scratch_dir: Some(dir.to_owned()),
        ..BackupOptions::default()
    };
    let backup = LiveDisk::begin_backup(disk, &options)?;
    write(disk)?;
    restore(&backup, &mut Vec::new())?;
    backup.finish()
}

fn overlay(dir: &Path) -> Result<()> {
    let base = Base::open(&dir.join("image"), ImageFormat::Qcow2, &unlocked())?;
    let options = OverlayOptions {
        place: OverlayPlace::Kept {
            path: dir.join("over"),
            data_file: Some(dir.join("data")),
        },
        ..OverlayOptions::default()
    };
    base.overlay(&options).map(drop)
}

fn unlocked() -> OpenOptions {
    let mut options = OpenOptions::default();
    options.files.locking = tandem_block::Locking::Off;
    options
}

fn make(dir: &Path, name: &str) -> Result<()> {
    let options = CreateOptions {
        size: 1 << 20,
        data_file: Some(dir.join("data")),
        ..CreateOptions::default()
    };
    create(&dir.join(name), &options)
}

/// Has calls of all operations fail: every `step`th one in each way.
///
/// # Errors
/// What is wrong, and when.
pub fn explore(step: usize, injected: &mut Injected) -> std::result::Result<(), String> {
    for operation in OPERATIONS {
        let dir = scratch();
        operation.case.create(dir.path());
        let start = Directory::read(dir.path());
        let expected = Expected::of(&operation, &start)?;
        for fault in FAULTS {
            for after in (0..).step_by(step) {
                let plan = Plan { after, fault };
                let done = expected.with_fault(&operation, &start, plan);
                let wrong = |e| format!("{}, {fault:?} after {after} calls: {e}", operation.name);
                let Some((call, succeeded)) = done.map_err(wrong)? else {
                    break;
                };
                injected.faults += 1;
                injected.survived += usize::from(succeeded && !is_harmless(fault));
                injected.syncs += usize::from(call.is_sync());
            }
        }
    }
    Ok(())
}

fn is_harmless(fault: Fault) -> bool {
    matches!(fault, Fault::Short | Fault::Error(libc::EINTR))
}

/// What an operation does when nothing fails.
struct Expected {
    /// What is durable at first, and the disk has besides.
    start: Vec<u64>,
    before: Vec<u64>,
    after: Vec<u64>,
}

/// What has become of an operation.
#[derive(Clone, Copy, PartialEq, Eq)]
enum How {
    Done,
    Failed,
    /// It has failed, and what was written before it may be lost.
    NotSynced,
}

type Judged = std::result::Result<Option<(Call, bool)>, String>;

impl Expected {
    fn of(operation: &Operation, start: &Directory) -> std::result::Result<Self, String> {
        let dir = scratch();
        start.write(dir.path());
        let text = |e: Error| e.to_string();
        let unused = open(dir.path(), operation.head(), true).map_err(text)?;
        let start = read_stamps(unused.disk())?;
        drop(unused);
        let disk = begin(operation, dir.path())?;
        let before = read_stamps(&*disk)?;
        (operation.perform)(dir.path(), &disk).map_err(text)?;
        let after = read_stamps(&*disk)?;
        Ok(Self {
            start,
            before,
            after,
        })
    }

    fn with_fault(&self, operation: &Operation, start: &Directory, plan: Plan) -> Judged {
        let dir = scratch();
        let dir = dir.path();
        start.write(dir);
        let disk = begin(operation, dir)?;
        let names = list(dir);
        let (result, call) = with_fault(plan, || (operation.perform)(dir, &disk));
        let Some(call) = call else {
            result.map_err(|e| e.to_string())?;
            return Ok(None);
        };
        let what = |e| format!("{call:?}: {e}");
        let succeeded = result.is_ok();
        if let Err(error) = &result {
            check_error(error, dir, plan.fault).map_err(what)?;
            let left: Vec<_> = list(dir).difference(&names).cloned().collect();
            if !left.is_empty() {
                return Err(what(format!("{left:?} are left")));
            }
        }
        let mut how = match succeeded {
            true => How::Done,
            false => How::Failed,
        };
        self.check(&read_stamps(&*disk)?, how).map_err(what)?;
        let text = |e: Error| what(format!("later: {e}"));
        if !succeeded && !call.is_sync() {
            match (operation.perform)(dir, &disk) {
                // A change of the bitmaps has been broken off, and they say so.
                Err(Error::Bitmap { .. }) if operation.case.has_bitmap => {}
                repeated => {
                    repeated.map_err(text)?;
                    how = How::Done;
                }
            }
            self.check(&read_stamps(&*disk)?, how).map_err(what)?;
        }
        // What could not be synced cannot be any more.
        match disk.close() {
            Err(_) if call.is_sync() && succeeded => {}
            Err(Error::Bitmap { .. }) if operation.case.has_bitmap => {}
            Err(_) if call.is_sync() => how = How::NotSynced,
            closed => closed.map_err(text)?,
        }
        drop(disk);
        let head = operation.moves_to.filter(|_| how == How::Done);
        let disk = open(dir, head.unwrap_or(operation.head()), false).map_err(text)?;
        self.check(&read_stamps(disk.disk())?, how).map_err(what)?;
        Ok(Some((call, succeeded)))
    }

    fn check(&self, shown: &[u64], how: How) -> std::result::Result<(), String> {
        let allowed: &[&[u64]] = match how {
            How::Done => &[&self.after],
            How::Failed => &[&self.after, &self.before],
            How::NotSynced => &[&self.after, &self.before, &self.start],
        };
        if !allowed.iter().any(|stamps| stamps.len() == shown.len()) {
            return Err(format!("the disk has {} sectors", shown.len()));
        }
        for (i, stamp) in shown.iter().enumerate() {
            if !allowed.iter().any(|stamps| stamps.get(i) == Some(stamp)) {
                return Err(format!("sector {i} is {stamp:#x}"));
            }
        }
        Ok(())
    }
}

/// The disk, in use, with something that has not been flushed.
fn begin(operation: &Operation, dir: &Path) -> std::result::Result<Arc<LiveDisk>, String> {
    let text = |e: Error| e.to_string();
    let disk = LiveDisk::new(open(dir, operation.head(), false).map_err(text)?);
    fill(&disk, 90..120, 7).map_err(text)?;
    Ok(Arc::new(disk))
}

fn list(dir: &Path) -> BTreeSet<OsString> {
    let entries = fs::read_dir(dir).unwrap().map(io::Result::unwrap);
    entries.map(|entry| entry.file_name()).collect()
}

/// A failure is told with a file, and what the system says of it.
fn check_error(error: &Error, dir: &Path, fault: Fault) -> std::result::Result<(), String> {
    let text = error.to_string();
    let Fault::Error(errno) = fault else {
        return Err(text);
    };
    let reason = io::Error::from_raw_os_error(errno).to_string();
    let reason = reason.split(" (").next().unwrap_or_default();
    let is_told = text.contains(&*dir.to_string_lossy()) && text.contains(reason);
    match is_told && !is_harmless(fault) || matches!(error, Error::SyncFailed { .. }) {
        true => Ok(()),
        false => Err(format!("the error is '{text}'")),
    }
}
