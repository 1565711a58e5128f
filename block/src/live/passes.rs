//! Going through a disk that changes meanwhile.
//!
//! What changes is taken down, and gone through again, in passes of which each has less to do than the
//! one before; if the guest writes too fast for that, its writes are held up after some of them. Each pass begins at an instant without requests: what
//! is on the list then has happened, and what happens later is on the next one. The last pass is left
//! to the caller, who makes it at an instant without requests.

use std::ops::{ControlFlow, Range};

use super::changes::Changes;
use super::{LiveDisk, State};
use crate::{Disk, Error, Result};

/// Told how many bytes of how many have been gone through; the number that there are grows when the
/// guest writes. [`ControlFlow::Break`] ends the operation with [`Error::Cancelled`], if it still can.
pub type Progress<'a> = &'a mut dyn FnMut(u64, u64) -> ControlFlow<()>;

/// Goes on with a part of the disk in `State`, and returns how many of its bytes have been dealt with,
/// one at least.
pub(super) type Step<'a> = dyn Fn(&State, Range<u64>) -> Result<u64> + 'a;

/// So much is left to the last pass.
const LITTLE: u64 = 1 << 20;
/// Most passes before the last one.
const MAX_PASSES: usize = 16;
/// So many of them leave the guest alone.
const FREE_PASSES: usize = 4;

pub(super) struct Passes<'a> {
    disk: &'a LiveDisk,
    changes: &'a Changes,
    progress: Progress<'a>,
    /// Makes durable what has been done.
    settle: &'a dyn Fn() -> Result<()>,
    done: u64,
}

impl<'a> Passes<'a> {
    /// Goes through all of `disk`. `changes` watches it.
    pub fn new(
        disk: &'a LiveDisk,
        changes: &'a Changes,
        progress: Progress<'a>,
        settle: &'a dyn Fn() -> Result<()>,
    ) -> Self {
        Self {
            disk,
            changes,
            progress,
            settle,
            done: 0,
        }
    }

    /// Takes every step but those of the last pass, which has at most `max_last` bytes.
    ///
    /// # Errors
    /// Those of `step`; [`Error::Cancelled`]; [`Error::Option`] if too much is left for the last pass.
    pub fn run(&mut self, max_last: Option<u64>, step: &Step<'_>) -> Result<()> {
        let size = self.disk.size();
        self.go_through(0..size, size, step)?;
        self.catch_up(max_last, step)
    }

    /// As [`run`](Self::run), of what has changed only.
    ///
    /// # Errors
    /// Those of [`run`](Self::run).
    pub fn catch_up(&mut self, max_last: Option<u64>, step: &Step<'_>) -> Result<()> {
        let size = self.disk.size();
        for pass in 0..MAX_PASSES {
            // So that little is left of this for the last pass as well.
            (self.settle)()?;
            if self.changes.bytes() <= LITTLE {
                break;
            }
            if pass >= FREE_PASSES {
                self.changes.slow_down();
            }
            let changed = self.disk.exclusive(|_| self.changes.take());
            let mut left = changed.bytes();
            let mut at = 0;
            while let Some(range) = changed.next(at..size, true) {
                at = range.end;
                self.go_through(range.clone(), left, step)?;
                left = left.saturating_sub(range.end - range.start);
            }
        }
        let left = self.changes.bytes();
        if let Some(max) = max_last.filter(|max| left > *max) {
            return Err(Error::Option(format!(
                "the guest writes faster than its data is copied: {left} bytes are left, and {max} may \
                 be copied while it waits"
            )));
        }
        Ok(())
    }

    /// Goes through `range`, the first of the `left` bytes that are to do.
    fn go_through(&mut self, range: Range<u64>, left: u64, step: &Step<'_>) -> Result<()> {
        let mut at = range.start;
        while at < range.end {
            let total = self.done + left - (at - range.start).min(left);
            if (self.progress)(self.done, total).is_break() {
                return Err(Error::Cancelled);
            }
            let len = step(&self.disk.shared(), at..range.end)?;
            at += len;
            self.done += len;
        }
        Ok(())
    }
}

/// Takes the steps of the last pass. No request is under way.
pub(super) fn last_pass(state: &State, changes: &Changes, step: &Step<'_>) -> Result<()> {
    changes.speed_up();
    let changed = changes.take();
    let mut at = 0;
    while let Some(range) = changed.next(at..u64::MAX, true) {
        at = range.start;
        while at < range.end {
            at += step(state, at..range.end)?;
        }
    }
    Ok(())
}
