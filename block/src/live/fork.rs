//! Forking a disk in use: what it has becomes the base of two new images, one of which it goes on with.
//!
//! Both are complete and durable before requests wait. Then everything that has been written is made
//! durable below them, and the disk goes on with its new image, in one step: a crash finds the old image
//! with all of it, and below the new ones.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Instant;

use super::chain::Gone;
use super::{LiveDisk, LiveImage, LiveReport, State};
use crate::file::{ImageFile, is_at};
use crate::lock::{Access, Locking};
use crate::new_file::{directory_of, sync_directory};
use crate::qcow2::{Backing, CreateOptions, OpenOptions, Qcow2, name_from, stamp_base};
use crate::{Disk, Error, FileOptions, ImageFormat, NewImage, Result};

/// How to fork a disk in use.
#[derive(Clone, Debug)]
pub struct ForkOptions {
    /// How the disk has been opened, and its new image will be.
    pub open: OpenOptions,
    /// The new image of the disk, a file that does not exist.
    pub overlay: PathBuf,
    /// The image of the other side, a file that does not exist, and that nobody uses yet.
    pub fork: PathBuf,
}

impl LiveDisk {
    /// Makes two overlays of the disk as it is at one instant, and goes on with the first. The image that
    /// it has been on is only read from then on; others can stand on it, too.
    ///
    /// # Errors
    /// [`Error::Option`] for files that exist, or from whose place the image cannot be found; what keeps
    /// them from being made, or the disk from being flushed. The disk goes on as it was, and there are no
    /// new files.
    pub fn fork(&self, options: &ForkOptions) -> Result<LiveReport> {
        self.exclusive(|state| state.begin("fork"))?;
        let forked = self.fork_alone(options);
        self.exclusive(State::end);
        forked
    }

    fn fork_alone(&self, options: &ForkOptions) -> Result<LiveReport> {
        let (overlay, fork, size, placeholder) = {
            let base = &self.shared().image;
            base.as_ref()?.check_named()?;
            // A resize may go on meanwhile.
            let size = base.disk().size();
            let (overlay, fork) = New::both(base, size, options)?;
            // The new image is on this until the disk goes on with it.
            let reason = "the disk has not been forked yet".to_owned();
            let placeholder = Arc::new(Gone::new(base, reason));
            (overlay, fork, size, placeholder)
        };
        let open = OpenOptions {
            read_only: false,
            data_file: None,
            backing: Backing::Named,
            ..options.open.clone()
        };
        let image = ImageFile::open(&options.overlay, Access::Write, open.files)?;
        let mut top = Qcow2::with_files(image, None, Some(placeholder), &open)?;
        // Less is left for the moment when requests wait.
        self.flush()?;
        let report = self.exclusive(|state| {
            let begun = Instant::now();
            state.check_open()?;
            if state.image.disk().size() != size {
                let reason = "the size of the disk has changed meanwhile";
                return Err(Error::Option(reason.to_owned()));
            }
            let warning = freeze(state, &mut top)?;
            top.put_on(Some(state.image.shared()));
            state.image = LiveImage::Qcow2(Arc::new(top));
            Ok(LiveReport {
                stopped: begun.elapsed(),
                warning,
            })
        });
        let mut report = report?;
        overlay.keep();
        fork.keep();
        // A stamp tells of a base that has been written. Without one the images are as good.
        let open = OpenOptions {
            read_only: false,
            ..open
        };
        let stamped = self
            .stamp_below()
            .and_then(|()| stamp_base(&options.fork, &open));
        report.warning = report.warning.or(stamped.err());
        Ok(report)
    }
}

/// Has the image of the disk only read from now on; the bitmaps that follow the disk go to `top`. Returns
/// what could not be stored, and is not needed for the disk.
fn freeze(state: &mut State, top: &mut Qcow2) -> Result<Option<Error>> {
    let has_bitmaps = match state.image.qcow2() {
        Some(image) => {
            image.check_writable()?;
            !image.following_bitmaps()?.is_empty()
        }
        None => false,
    };
    if has_bitmaps {
        let image = state.image.qcow2_mut().ok_or_else(super::in_use)?;
        image.hand_over_bitmaps(top)?;
    }
    state.image.as_ref()?.freeze().inspect_err(|_| {
        if let Some(image) = state.image.qcow2_mut().filter(|_| has_bitmaps) {
            // They are lost only if nothing can be written any more.
            drop(top.hand_over_bitmaps(image));
        }
    })
}

/// A new file, which goes unless it is kept.
struct New<'a> {
    path: &'a Path,
    /// As it was made, and whether it is to go.
    file: Option<fs::File>,
}

impl<'a> New<'a> {
    /// Makes the two overlays of `base`, of `size` bytes.
    fn both(base: &LiveImage, size: u64, options: &'a ForkOptions) -> Result<(Self, Self)> {
        if base.disk().limits().read_only {
            return Err(Error::ReadOnly);
        }
        let overlay = Self::overlay(base, size, &options.overlay, &options.open)?;
        let fork = Self::overlay(base, size, &options.fork, &options.open)?;
        Ok((overlay, fork))
    }

    fn overlay(base: &LiveImage, size: u64, path: &'a Path, open: &OpenOptions) -> Result<Self> {
        let exists = || {
            let path = path.display();
            Error::Option(format!("'{path}' exists already; a fork makes new files"))
        };
        if path.symlink_metadata().is_ok() {
            return Err(exists());
        }
        let create = CreateOptions {
            size,
            cluster_size: base.qcow2().map_or(64 << 10, Qcow2::cluster_size),
            backing_file: Some(name_from(path, base.path())?),
            backing_format: Some(match base {
                LiveImage::Qcow2(_) => ImageFormat::Qcow2,
                _ => ImageFormat::Raw,
            }),
            ..CreateOptions::default()
        };
        let image = NewImage::qcow2(path, &create)?;
        if image.replaces() {
            return Err(exists());
        }
        // Which is known before it has a name, so that it goes whatever fails.
        let file = image.file()?;
        image.commit()?;
        let new = Self {
            path,
            file: Some(file),
        };
        // The base can be found from there, and is this one, on what it is on now.
        let unlocked = OpenOptions {
            read_only: true,
            data_file: None,
            backing: Backing::Named,
            files: FileOptions {
                locking: Locking::Off,
                ..FileOptions::default()
            },
            ..open.clone()
        };
        let found = Qcow2::open(path, &unlocked)?;
        let disk = base.as_ref()?;
        let other = match found.backing().and_then(Disk::as_image) {
            Some(below) => disk.find_other(below),
            None => Some(disk.path()),
        };
        if let Some(other) = other {
            let (path, other) = (path.display(), other.display());
            return Err(Error::Option(format!(
                "'{path}' would not stand on what the disk does: '{other}', its data file, or what is below \
                 it would be another"
            )));
        }
        Ok(new)
    }

    fn keep(mut self) {
        self.file = None;
    }
}

impl Drop for New<'_> {
    fn drop(&mut self) {
        // Not what somebody else has put in its place.
        if self
            .file
            .as_ref()
            .is_some_and(|file| is_at(file, self.path))
        {
            // Nor does it come back when power fails, on a disk that has become larger since.
            let removed = fs::remove_file(self.path);
            let directory = removed.and_then(|()| fs::File::open(directory_of(self.path)));
            let _ = directory.and_then(|directory| sync_directory(&directory));
        }
    }
}
