//! Committing while the disk is in use: what the images above the base have goes down to it.
//!
//! The base is opened for writing in the place where it has been read, below the images above it. What
//! those have hides what is copied: so the disk reads the same at any time, and after a crash, however
//! much has been copied, and however old the copy is by then. Only once the base is durable with all of
//! it does the disk become the base, or do the images on top lose theirs.

use std::ops::Range;
use std::os::unix::ffi::OsStringExt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use vm_memory::VolatileSlice;

use super::chain::{self, ImageRef};
use super::changes::Changes;
use super::passes::{Passes, Progress, last_pass};
use super::{LiveDisk, LiveImage, LiveReport, State};
use crate::qcow2::{BackingName, OpenOptions, Part, Qcow2, name_from, open_with_base};
use crate::{Disk, Error, ImageFormat, Result};

/// Bytes that are zeroed at once.
const ZEROS: u64 = 1 << 30;
/// Bytes of the disk whose mapping is removed at once.
const EMPTIED: u64 = 32 << 20;

/// How to commit a disk in use.
#[derive(Clone, Debug)]
pub struct CommitOptions {
    /// How the disk has been opened.
    pub open: OpenOptions,
    /// How many images are between the one on top and the base.
    pub between: usize,
    /// Whether the disk is the base from then on. If not, the image on top stays, and is emptied if there
    /// is none between them.
    pub pivot: bool,
    /// Most bytes that may be left to be copied while requests wait, if that is limited.
    pub max_last: Option<u64>,
}

impl LiveDisk {
    /// Makes the base read as the disk does, and as large if that is larger, while requests go on. With
    /// [`pivot`](CommitOptions::pivot), the image that was on top comes to stand on the base itself, and is
    /// emptied before, so that it shows what the base has.
    ///
    /// # Errors
    /// What keeps an image from being read, or the base from being written, because others use it for
    /// instance; [`Error::Cancelled`]; [`Error::Option`] for a disk without such a base, for one that is
    /// in another operation, for bitmaps that cannot go with the disk, and if the guest writes too fast for
    /// [`max_last`](CommitOptions::max_last). The disk reads as before, and goes on as it was.
    pub fn commit(&self, options: &CommitOptions, progress: Progress<'_>) -> Result<LiveReport> {
        let watched = self.begin_watched("commit")?;
        self.end_stamp().and_then(|stamped| {
            let base = self.open_base(options).inspect_err(|_| {
                if stamped {
                    // Without one it is as good.
                    drop(self.stamp_below());
                }
            })?;
            let mut commit = Commit::new(self, options, &watched.changes, base);
            commit.stamped = stamped;
            let done = commit.run(progress);
            commit.end(done)
        })
    }

    /// Has the image on top keep no stamp of what is below it, for that changes: a crash leaves an image
    /// without one. Returns whether it has kept one.
    pub(super) fn end_stamp(&self) -> Result<bool> {
        self.exclusive(|state| {
            let top = state.writable_qcow2()?;
            let stamped = top.keeps_stamp()?;
            if stamped {
                top.keep_stamp(None)?;
            }
            Ok(stamped)
        })
    }

    /// Puts the images above the base on one that is open for writing.
    fn open_base(&self, options: &CommitOptions) -> Result<LiveImage> {
        let opened = {
            let state = self.shared();
            let top = state.writable_qcow2()?;
            chain::check_stamps_above(top, options.between)?;
            let old = chain::sole_below(top, options.between)?;
            // After a commit that failed, what it has still to write must not come behind what is
            // written from here on.
            old.freeze()?;
            old.unlock();
            reopen(top, options)
        };
        let placed = opened.and_then(|(below, base)| {
            self.exclusive(|state| {
                let top = state.image.qcow2_mut().ok_or_else(super::in_use)?;
                let (size, base_size) = (top.size(), base.disk().size());
                if options.pivot && base_size > size {
                    return Err(Error::Option(format!(
                        "'{}' has {base_size} bytes, and the disk, which has {size}, would become \
                         larger",
                        base.path().display()
                    )));
                }
                if options.pivot {
                    check_bitmaps(top, &base)?;
                }
                base.as_ref()?.renew_stamps()?;
                if size > base_size {
                    if let LiveImage::Qcow2(base) = &base {
                        base.clear_behind_end()?;
                    }
                    base.disk().resize(size)?;
                }
                top.put_on(Some(below));
                Ok(base)
            })
        });
        placed.inspect_err(|_| self.lock_base(options.between))
    }

    /// Takes the locks again of an image that could not be opened for writing. Should somebody else have
    /// begun to write it, nobody knows what the disk reads.
    fn lock_base(&self, between: usize) {
        let locked = {
            let state = self.shared();
            let top = state.writable_qcow2();
            top.and_then(|top| chain::sole_below(top, between)?.lock_again())
        };
        if let Err(lost) = locked {
            let reason = format!("what is below it is in use: {lost}");
            self.exclusive(|state| state.give_up(reason));
        }
    }
}

/// Opens the base, whose locks have been given up, for writing, and the images between it and `top` on it.
fn reopen(top: &Qcow2, options: &CommitOptions) -> Result<(Arc<dyn Disk>, LiveImage)> {
    let (below, base) = open_with_base(top.path(), &options.open, options.between)?;
    let old = top.backing().and_then(Disk::as_image);
    let other = old
        .zip(below.as_image())
        .and_then(|(old, now)| old.find_other(now));
    if let Some(path) = other {
        let path = path.display();
        return Err(Error::Option(format!(
            "'{path}', or what is below it, has been replaced by another file since it was opened"
        )));
    }
    Ok((below, base))
}

/// Copies the first part of `range` of the disk `top` to `base`, if one of the images above that, which
/// has `between` others above it, has it. Returns how long it is.
fn copy(top: &dyn Disk, base: &dyn Disk, between: usize, range: Range<u64>) -> Result<u64> {
    let part = Part::find(top, range)?;
    if part.depth > between {
        return Ok(part.len);
    }
    if part.is_zero {
        let len = part.len.min(ZEROS);
        base.write_zeroes(part.offset, len, true)?;
        return Ok(len);
    }
    let mut data = vec![0; part.len as usize];
    let data = [VolatileSlice::from(&mut data[..])];
    top.read_at(&data, part.offset)?;
    base.write_at(&data, part.offset)?;
    Ok(part.len)
}

/// Makes durable what has been copied to `base`.
fn settle(base: &dyn Disk) -> Result<()> {
    #[cfg(mutate)]
    if crate::mutate::is(crate::mutate::EMPTIED_EARLY) {
        return Ok(());
    }
    base.flush()
}

/// Refuses to leave an image whose bitmaps follow the disk if they cannot go with it.
fn check_bitmaps(top: &Qcow2, base: &LiveImage) -> Result<()> {
    let following = top.following_bitmaps()?;
    let refused = |why: String| {
        let (top, base) = (top.path().display(), base.path().display());
        let reason = format!("the bitmaps of '{top}' cannot follow the disk to '{base}': {why}");
        Err(Error::Option(reason))
    };
    let Some(base) = base.qcow2() else {
        return match following.is_empty() {
            true => Ok(()),
            false => refused("it is raw".to_owned()),
        };
    };
    let known = base.bitmaps()?;
    let known = known.filter(|_| !following.is_empty());
    let is_known = |name: &[u8]| known.iter().flatten().any(|other| other.name == name);
    match following
        .into_iter()
        .find(|bitmap| is_known(&bitmap.name[..]))
    {
        Some(bitmap) => refused(format!("it has a bitmap '{}'", bitmap.name.escape_ascii())),
        None => Ok(()),
    }
}

/// Puts the image on top on `base` itself, which reads as the images between them do.
fn put_on_base(state: &mut State, base: &Arc<dyn Disk>) -> Result<()> {
    let top = state.image.qcow2_mut().ok_or_else(super::in_use)?;
    let image = base.as_image().ok_or_else(super::in_use)?;
    let format = match image {
        ImageRef::Raw(_) => ImageFormat::Raw,
        ImageRef::Qcow2(_) => ImageFormat::Qcow2,
    };
    let file = name_from(top.path(), image.path())?;
    let name = BackingName {
        file: file.into_os_string().into_vec(),
        format: format.name().into(),
    };
    top.name_backing(Some(&name), None)?;
    top.put_on(Some(base.clone()));
    Ok(())
}

/// Has the disk become `base`, and `base` what the disk was, on nothing. The disk is then in use by nobody
/// else, as any operation on it wants.
pub(super) fn pivot(state: &mut State, base: &mut LiveImage) -> Result<()> {
    let top = state.image.qcow2_mut().ok_or_else(super::in_use)?;
    top.put_on(None);
    if let Err(error) = hand_bitmaps_over(top, base) {
        top.put_on(Some(base.shared()));
        return Err(error);
    }
    std::mem::swap(&mut state.image, base);
    Ok(())
}

fn hand_bitmaps_over(top: &mut Qcow2, base: &mut LiveImage) -> Result<()> {
    if top.following_bitmaps()?.is_empty() {
        return Ok(());
    }
    top.hand_over_bitmaps(base.with_bitmaps_mut()?)
}

/// A commit whose base is open for writing.
pub(super) struct Commit<'a> {
    disk: &'a LiveDisk,
    options: &'a CommitOptions,
    changes: &'a Arc<Changes>,
    /// What the disk was, once it is the base.
    base: LiveImage,
    /// Whether the image on top has kept the stamp of what is below it.
    pub stamped: bool,
    report: LiveReport,
}

impl<'a> Commit<'a> {
    pub fn new(
        disk: &'a LiveDisk,
        options: &'a CommitOptions,
        changes: &'a Arc<Changes>,
        base: LiveImage,
    ) -> Self {
        Self {
            disk,
            options,
            changes,
            base,
            stamped: false,
            report: LiveReport {
                stopped: Duration::ZERO,
                warning: None,
            },
        }
    }

    pub fn run(&mut self, progress: Progress<'_>) -> Result<()> {
        let CommitOptions {
            between,
            pivot,
            max_last,
            ..
        } = *self.options;
        let base = self.base.shared();
        let step = |state: &State, range| copy(state.image.disk(), &*base, between, range);
        let flush = || settle(&*base);
        Passes::new(self.disk, self.changes, &mut *progress, &flush).run(max_last, &step)?;
        // What the image on top has again once it has been emptied.
        let left = Arc::new(self.changes.empty());
        self.exclusive(|state, changes| {
            last_pass(state, changes, &step)?;
            settle(&*base)?;
            if pivot && between > 0 {
                put_on_base(state, &base)?;
            }
            if pivot {
                state.watchers.push(left.clone());
            }
            Ok(())
        })?;
        match pivot {
            true => {
                let pivoted = self
                    .empty(&mut *progress)
                    .and_then(|()| self.pivot(base, &left, progress));
                self.disk.exclusive(|state| state.unwatch(&left));
                pivoted
            }
            false if between == 0 => self.empty(progress),
            false => Ok(()),
        }
    }

    /// Has the disk become the base. The image on top has nothing of its own then, on disk, so that it
    /// reads the same: whoever opens one or the other after a crash finds what the guest has flushed.
    fn pivot(
        &mut self,
        base: Arc<dyn Disk>,
        left: &Arc<Changes>,
        progress: Progress<'_>,
    ) -> Result<()> {
        let step = move |state: &State, range| copy(state.image.disk(), &*base, 0, range);
        // Both, lest their syncs take long when requests wait.
        let flush = || {
            self.base.disk().flush()?;
            self.disk.flush()
        };
        let mut passes = Passes::new(self.disk, self.changes, progress, &flush);
        passes.catch_up(self.options.max_last, &step)?;
        let (disk, changes) = (self.disk, self.changes);
        let stopped = disk.exclusive(|state| {
            let begun = Instant::now();
            last_pass(state, changes, &step)?;
            // It has the base.
            drop(step);
            self.base.disk().flush()?;
            let top = state.writable_qcow2()?;
            check_bitmaps(top, &self.base)?;
            let mut at = 0;
            while let Some(range) = left.next(at..top.size(), true) {
                at = range.end;
                top.empty_range(range)?;
            }
            top.flush()?;
            pivot(state, &mut self.base)?;
            state.unwatch(changes);
            Ok::<_, Error>(begun.elapsed())
        })?;
        self.report.stopped = self.report.stopped.max(stopped);
        self.report.warning = self.base.disk().close().err();
        Ok(())
    }

    /// Removes from the image on top what has not changed since the base has it, which is durable.
    fn empty(&mut self, progress: Progress<'_>) -> Result<()> {
        let size = self.disk.size();
        let mut at = 0;
        while at < size {
            if progress(at, size).is_break() {
                // What is left hides the same in the base.
                return match self.options.pivot {
                    true => Err(Error::Cancelled),
                    false => Ok(()),
                };
            }
            let unmapped = {
                let state = self.disk.shared();
                let top = state.writable_qcow2()?;
                top.make_room()?;
                top.unmapped(at..size)?
            };
            at += unmapped;
            if unmapped == 0 {
                let end = size.min(at.saturating_add(EMPTIED));
                self.exclusive(|state, changes| {
                    let top = state.writable_qcow2()?;
                    let mut from = at;
                    while let Some(same) = changes.next(from..end, false) {
                        from = same.end;
                        top.empty_range(same)?;
                    }
                    Ok(())
                })?;
                at = end;
            }
        }
        self.disk.flush()?;
        self.release_space(size)
    }

    /// Releases the space in an external data file of what is not mapped any more.
    fn release_space(&mut self, size: u64) -> Result<()> {
        let mut at = 0;
        while at < size && self.disk.shared().writable_qcow2()?.keeps_space() {
            let end = size.min(at.saturating_add(EMPTIED));
            self.exclusive(|state, _| state.writable_qcow2()?.release_unmapped(at..end))?;
            at = end;
        }
        Ok(())
    }

    /// Does something while requests wait, and takes the time.
    fn exclusive(
        &mut self,
        operation: impl FnOnce(&mut State, &Changes) -> Result<()>,
    ) -> Result<()> {
        let (done, stopped) = self.disk.exclusive(|state| {
            let begun = Instant::now();
            (operation(state, self.changes), begun.elapsed())
        });
        self.report.stopped = self.report.stopped.max(stopped);
        done
    }

    /// Has the base only read from now on, unless it is the disk.
    pub fn end(mut self, done: Result<()>) -> Result<LiveReport> {
        if done.is_ok() && self.options.pivot {
            return Ok(self.report);
        }
        let frozen = self.base.as_ref().and_then(ImageRef::freeze);
        // What could not be written is written later, and changes the stamp.
        let stamped = match self.stamped && frozen.is_ok() {
            true => self.disk.stamp_below(),
            false => Ok(()),
        };
        done?;
        // The disk needs what the base has.
        let warning = frozen?;
        self.report.warning = self.report.warning.or(warning).or(stamped.err());
        Ok(self.report)
    }
}
