//! Putting a disk in use on another backing file, or on none.
//!
//! What the image has nothing of, and the new backing file does not show, it takes up while requests go
//! on. What they change meanwhile is looked at again: they may remove a mapping where the old backing
//! file shows nothing, and the new one would. The header changes at an instant without requests, when
//! all of that is durable.

use std::ops::Range;
use std::time::Instant;

use super::chain;
use super::changes::Changes;
use super::passes::{Passes, Progress, last_pass};
use super::{LiveDisk, LiveReport, State};
use crate::qcow2::{BackingName, OpenOptions, Taking, open_renamed};
use crate::{Disk, Result};

/// How to put a disk in use on another backing file.
#[derive(Clone, Debug)]
pub struct RebaseOptions {
    /// How the disk has been opened.
    pub open: OpenOptions,
    /// The new backing file; `None` to have the image stand alone.
    pub backing: Option<BackingName>,
    /// Most bytes that may be left to be looked at while requests wait, if that is limited.
    pub max_last: Option<u64>,
}

impl LiveDisk {
    /// Puts the image on another backing file, without a change of what the disk reads, while requests
    /// go on.
    ///
    /// # Errors
    /// As [`Qcow2::rebase`](crate::qcow2::Qcow2::rebase), and as [`commit`](LiveDisk::commit). The disk
    /// reads as before, on what it has been on.
    pub fn rebase(&self, options: &RebaseOptions, progress: Progress<'_>) -> Result<LiveReport> {
        let watched = self.begin_watched("rebase")?;
        self.rebase_watched(options, &watched.changes, progress)
    }

    fn rebase_watched(
        &self,
        options: &RebaseOptions,
        changes: &Changes,
        progress: Progress<'_>,
    ) -> Result<LiveReport> {
        let (new, shared) = {
            let state = self.shared();
            let top = state.writable_qcow2()?;
            top.check_backing_name(options.backing.as_ref())?;
            let new = match &options.backing {
                Some(name) => open_renamed(top.path(), name, &options.open)?,
                None => None,
            };
            let image = new.as_deref().and_then(Disk::as_image);
            let shared = image.and_then(|new| chain::depth_of(top, new));
            (new, shared)
        };
        let step = |state: &State, range: Range<u64>| {
            let taking = Taking {
                disk: state.writable_qcow2()?,
                new: new.as_deref(),
                shared,
                compress: false,
            };
            taking.step(range)
        };
        let flush = || self.flush();
        Passes::new(self, changes, progress, &flush).run(options.max_last, &step)?;
        self.exclusive(|state| {
            let begun = Instant::now();
            last_pass(state, changes, &step)?;
            let top = state.image.qcow2_mut().ok_or_else(super::in_use)?;
            top.name_backing(options.backing.as_ref(), new.as_deref())?;
            top.put_on(new.clone());
            Ok(LiveReport {
                stopped: begun.elapsed(),
                warning: None,
            })
        })
    }
}
