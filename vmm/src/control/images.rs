//! What is done to the images that a disk consists of, while the guest uses it.

use std::path::PathBuf;

use tandem_block::qcow2::BackingName;
use tandem_block::{CommitOptions, ForkOptions, LiveReport, RebaseOptions};

use super::{Control, ControlError, Operated};

/// The image below a disk that a commit goes to.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum CommitBase {
    /// The one that has so many others between it and the one on top.
    Between(usize),
    /// The one that this path leads to.
    Path(PathBuf),
}

impl Control {
    /// Begins to write what disk number `index` has above `base` to that, while the guest goes on. With
    /// `pivot`, the disk is the base from then on; otherwise the image on top stays and, if there is none
    /// between them, is emptied. More than `max_last` bytes, if that is given, are not copied while the
    /// guest's requests wait. Returns the number of the [job](Self::jobs).
    ///
    /// # Errors
    /// [`ControlError::NoSuchDisk`], [`ControlError::Ended`], [`ControlError::Busy`],
    /// [`ControlError::Disk`], [`ControlError::Host`]. What goes wrong later is told by the job; the disk goes on as it was.
    pub fn commit(
        &self,
        index: usize,
        base: &CommitBase,
        pivot: bool,
        max_last: Option<u64>,
    ) -> Result<u64, ControlError> {
        let operated = self.disk(index)?;
        let options = CommitOptions {
            open: operated.image.open_options.clone(),
            between: operated.between(base)?,
            pivot,
            max_last,
        };
        let disk = operated.image.disk.clone();
        self.start_job("commit", index, move |progress| {
            disk.commit(&options, progress)
        })
    }

    /// Begins to put disk number `index` on another backing file or, without one, on none, with nothing
    /// changed that it reads. Returns the number of the [job](Self::jobs).
    ///
    /// # Errors
    /// As [`commit`](Self::commit).
    pub fn rebase(
        &self,
        index: usize,
        backing: Option<BackingName>,
        max_last: Option<u64>,
    ) -> Result<u64, ControlError> {
        let operated = self.disk(index)?;
        let options = RebaseOptions {
            open: operated.image.open_options.clone(),
            backing,
            max_last,
        };
        let disk = operated.image.disk.clone();
        self.start_job("rebase", index, move |progress| {
            disk.rebase(&options, progress)
        })
    }

    /// Makes two overlays of disk number `index` as it is at one instant: the guest goes on with
    /// `overlay`, and `fork` is for somebody else, another VM for instance, that can use it at once.
    ///
    /// # Errors
    /// [`ControlError::NoSuchDisk`], [`ControlError::Ended`]; [`ControlError::Disk`]: the disk goes on as
    /// it was, and there are no new files.
    pub fn fork(
        &self,
        index: usize,
        overlay: PathBuf,
        fork: PathBuf,
    ) -> Result<LiveReport, ControlError> {
        let _operation = self.begin()?;
        let operated = self.disk(index)?;
        let options = ForkOptions {
            open: operated.image.open_options.clone(),
            overlay,
            fork,
        };
        let forked = operated.image.disk.fork(&options);
        forked.map_err(|error| operated.error(error))
    }
}

impl Operated {
    /// How many images are between the one on top and `base`.
    fn between(&self, base: &CommitBase) -> Result<usize, ControlError> {
        match base {
            CommitBase::Between(between) => Ok(*between),
            CommitBase::Path(path) => {
                let found = self.image.disk.with_image(|image| image.find_below(path));
                found.map_err(|error| self.error(error))
            }
        }
    }
}

#[cfg(test)]
mod tests;
