//! The images that a disk in use consists of.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::LiveImage;
use crate::file::ImageFile;
use crate::lock::Access;
use crate::qcow2::Qcow2;
use crate::{Disk, Error, Limits, Raw, Result};

/// An image that is open.
#[derive(Clone, Copy)]
pub enum ImageRef<'a> {
    /// The file is the disk.
    Raw(&'a Raw),
    /// qcow2.
    Qcow2(&'a Qcow2),
}

impl<'a> ImageRef<'a> {
    /// The image file, and the data file if there is one.
    fn files(self) -> (&'a ImageFile, Option<&'a ImageFile>) {
        match self {
            Self::Raw(raw) => (raw.file(), None),
            Self::Qcow2(image) => image.files(),
        }
    }

    /// Where it is.
    pub(super) fn path(self) -> &'a Path {
        &self.files().0.path
    }

    /// Whether both are the same files in the same format: in another one they show something else.
    fn is_same(self, other: ImageRef<'_>) -> bool {
        let ids = |image: ImageRef<'_>| {
            let is_raw = matches!(image, ImageRef::Raw(_));
            let (image, data) = image.files();
            Some((is_raw, image.id()?, data.map(ImageFile::id)))
        };
        ids(self).is_some_and(|own| ids(other) == Some(own))
    }

    /// The first image, from this one down, that `other` does not have in this place: it has another one
    /// there, with another data file, or on nothing.
    pub(super) fn find_other(self, other: ImageRef<'_>) -> Option<&'a Path> {
        let (mut image, mut other) = (self, other);
        loop {
            if !image.is_same(other) {
                return Some(image.path());
            }
            (image, other) = match (image.lower(), other.lower()) {
                (None, None) => return None,
                (Some(below), Some(other)) => match below.as_image().zip(other.as_image()) {
                    Some(images) => images,
                    None => return Some(image.path()),
                },
                _ => return Some(image.path()),
            };
        }
    }

    /// Makes the stamps of its files, and of those below it, durable.
    pub(crate) fn sync_stamps(self) -> Result<()> {
        let (image, data) = self.files();
        image.sync_stamp()?;
        if let Some(data) = data {
            data.sync_stamp()?;
        }
        match self.lower().and_then(Disk::as_image) {
            Some(below) => below.sync_stamps(),
            None => Ok(()),
        }
    }

    /// Gives its files other stamps, durably, before it is written: whoever keeps one of it sees that,
    /// though power fails.
    pub(crate) fn renew_stamps(self) -> Result<()> {
        let (image, data) = self.files();
        image.renew_stamp()?;
        data.map_or(Ok(()), ImageFile::renew_stamp)
    }

    fn lower(self) -> Option<&'a dyn Disk> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(image) => image.backing(),
        }
    }

    /// Refuses an image that others could not find by its name.
    pub(super) fn check_named(self) -> Result<()> {
        let (image, path) = (self.files().0, self.path());
        let found = path.metadata().map(|file| (file.dev(), file.ino()));
        if found.is_err() || found.ok() != image.id() {
            let path = path.display();
            return Err(Error::Option(format!(
                "the image of the disk is not at '{path}': it is a temporary overlay, or has been moved or \
                 replaced"
            )));
        }
        Ok(())
    }

    /// Gives up the locks of an image that is read, for it will be opened for writing.
    pub(super) fn unlock(self) {
        let (image, data) = self.files();
        [Some(image), data]
            .into_iter()
            .flatten()
            .for_each(ImageFile::unlock);
    }

    /// Takes the locks again that [`unlock`](Self::unlock) has given up.
    pub(super) fn lock_again(self) -> Result<()> {
        let (image, data) = self.files();
        let mut files = [Some(image), data].into_iter().flatten();
        files.try_for_each(|file| file.lock_again(Access::Read))
    }

    /// Makes everything durable, for the last time: the image is only read from now on, by others too.
    /// Returns what could not be stored, and is not needed for the disk.
    ///
    /// # Errors
    /// It can be written as before.
    pub(super) fn freeze(self) -> Result<Option<Error>> {
        let warning = match self {
            Self::Raw(raw) => raw.flush().map(|()| None)?,
            Self::Qcow2(image) => image.freeze()?,
        };
        let (image, data) = self.files();
        let mut files = [Some(image), data].into_iter().flatten();
        let unlocked = files.try_for_each(ImageFile::end_writing);
        Ok(warning.or(unlocked.err()))
    }
}

impl LiveImage {
    /// The image, unless it is gone.
    pub(super) fn as_ref(&self) -> Result<ImageRef<'_>> {
        match self {
            Self::Raw(raw) => Ok(ImageRef::Raw(raw)),
            Self::Qcow2(image) => Ok(ImageRef::Qcow2(image)),
            Self::Gone(gone) => Err(gone.error()),
        }
    }
}

/// The image below `top` that has `depth` others above it besides `top`, if nobody else in this
/// process stands on it or on one of those.
///
/// # Errors
/// [`Error::Option`] if there is none, or somebody does.
pub(super) fn sole_below(top: &Qcow2, depth: usize) -> Result<ImageRef<'_>> {
    let mut image = top;
    for left in (0..=depth).rev() {
        let Some(below) = image.lower() else { break };
        let Some(found) = below.as_image() else { break };
        if Arc::strong_count(below) > 1 {
            let path = found.path().display();
            return Err(Error::Option(format!(
                "'{path}' is below another disk, too"
            )));
        }
        match found {
            found if left == 0 => return Ok(found),
            ImageRef::Raw(_) => break,
            ImageRef::Qcow2(next) => image = next,
        }
    }
    let path = image.path().display();
    Err(Error::Option(format!("there is no image below '{path}'")))
}

impl LiveImage {
    /// As [`ImageView::find_below`](super::ImageView::find_below).
    pub(super) fn find_below(&self, path: &Path) -> Result<usize> {
        let file = path.metadata().map_err(|e| Error::io(path, "find", e))?;
        let id = (file.dev(), file.ino());
        let mut below = self.disk().backing();
        let mut between = 0;
        while let Some(disk) = below {
            if disk.as_image().and_then(|image| image.files().0.id()) == Some(id) {
                return Ok(between);
            }
            below = disk.backing();
            between += 1;
        }
        let (path, top) = (path.display(), self.path().display());
        Err(Error::Option(format!("'{path}' is not below '{top}'")))
    }
}

/// Refuses images between `top` and the one that has `depth` others above it besides `top`, that keep a
/// stamp of what is below them: they are open, and could not be given another one.
pub(super) fn check_stamps_above(top: &Qcow2, depth: usize) -> Result<()> {
    let mut below = top.backing();
    for _ in 0..depth {
        let Some(disk) = below else { break };
        if let Some(ImageRef::Qcow2(image)) = disk.as_image()
            && image.keeps_stamp()?
        {
            let path = image.path().display();
            return Err(Error::Option(format!(
                "'{path}' keeps a stamp of what is below it, which would change; commit while the disk is \
                 not in use"
            )));
        }
        below = disk.backing();
    }
    Ok(())
}

/// How many images are between `top` and the one below it that `other` is, too, on the same ones.
pub(super) fn depth_of(top: &Qcow2, other: ImageRef<'_>) -> Option<usize> {
    let mut below = top.backing();
    let mut depth = 0;
    while let Some(disk) = below {
        let image = disk.as_image();
        if image.is_some_and(|image| image.find_other(other).is_none()) {
            return Some(depth);
        }
        below = disk.backing();
        depth += 1;
    }
    None
}

/// What is left of a disk whose image could not be kept.
pub struct Gone {
    file: PathBuf,
    size: u64,
    limits: Limits,
    reason: String,
}

impl Gone {
    /// Nothing of `image` can be used any more.
    pub(super) fn new(image: &LiveImage, reason: String) -> Self {
        Self {
            file: image.path().to_owned(),
            size: image.disk().size(),
            limits: image.disk().limits(),
            reason,
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.file
    }

    pub(super) fn error(&self) -> Error {
        Error::Gone {
            file: self.file.clone(),
            reason: self.reason.clone(),
        }
    }
}

impl Disk for Gone {
    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        Err(self.error())
    }

    fn write_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        Err(self.error())
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(self.error())
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(self.error())
    }

    fn flush(&self) -> Result<()> {
        Err(self.error())
    }
}
