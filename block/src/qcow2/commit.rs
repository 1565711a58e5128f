//! Committing: the data of an image goes to one below it, the base.
//!
//! What the images above the base have is written to it while it is open for writing, and it alone.
//! Until all of that is on disk the images above it are not touched, and hide what the base has; so
//! the disk on top reads the same at any time, and after a crash.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::backing::{self, Found};
use super::placement::Placement;
use super::zeroes::Zeroed;
use super::{OpenOptions, Qcow2, stamp};
use crate::file::ImageFile;
use crate::lock::Access;
use crate::{Disk, ExtentKind, Result, extent_in_chain};

/// Bytes that are copied at once.
const PIECE: u64 = 2 << 20;

/// An image whose data goes to one of those below it.
pub struct Commit {
    /// Without the base and what lies below that.
    top: Qcow2,
    base: Arc<dyn Disk>,
    /// How many images are between the two.
    between: usize,
    /// The images above the base that keep a stamp, from the base up.
    stamped: Vec<PathBuf>,
    options: OpenOptions,
}

impl Commit {
    /// Opens the image at `path` and, for writing, the one below it that has `between` others above
    /// it.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) if there is no such image; as [`Qcow2::open`].
    pub fn open(path: &Path, between: usize, options: &OpenOptions) -> Result<Self> {
        let options = OpenOptions {
            read_only: false,
            ..options.clone()
        };
        let image = ImageFile::open(path, Access::Write, options.files)?;
        let found = Found::new(image, false)?;
        // What keeps the images below from being read is no matter of writing them.
        let read = backing::open(&found, &options)?;
        stamp::check(&found.image.path, &found.header, read.as_ref())?;
        drop(read);
        let above = backing::open_above(&found, &options, between)?;
        Ok(Self {
            top: Qcow2::from_found(found, &options, Some(above.below))?,
            base: above.base,
            between,
            stamped: above.stamped,
            options,
        })
    }

    /// Commits `top` to `base`, which is what it lies on or, with `between` others, further down. They are
    /// open for writing, and what is below `top` is as large as `base`, whether it can be read or not.
    pub fn with_disks(top: Qcow2, base: Box<dyn Disk>, between: usize) -> Self {
        Self {
            top,
            base: base.into(),
            between,
            stamped: Vec::new(),
            options: OpenOptions::default(),
        }
    }

    /// Makes the base read as the disk on top, and as large if that is larger. `progress` is told how
    /// many bytes of data of how many have been written.
    ///
    /// # Errors
    /// What keeps an image from being read, or the base from being written. The disk on top reads as
    /// before.
    pub fn copy(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let mut total = 0;
        self.for_each_part(|part| {
            if !part.is_zero {
                total += part.len;
            }
            Ok(())
        })?;
        // The images stay as good as they are if this is broken off. From the top down: to end the stamp
        // of an image changes that of the one above it.
        let mut stamped = self.stamped.iter().rev();
        stamped.try_for_each(|path| stamp::end(path))?;
        if let Some(base) = self.base.as_image() {
            base.renew_stamps()?;
        }
        let size = self.top.size();
        if size > self.base.size() {
            self.base.resize(size)?;
        }
        let mut buffer = vec![0; PIECE as usize];
        let mut done = 0;
        self.for_each_part(|part| {
            if part.is_zero {
                return self.base.write_zeroes(part.offset, part.len, true);
            }
            progress(done, total);
            done += part.len;
            let piece = &mut buffer[..part.len as usize];
            self.top
                .read_at(&[VolatileSlice::from(&mut *piece)], part.offset)?;
            self.base
                .write_at(&[VolatileSlice::from(piece)], part.offset)
        })?;
        self.base.flush()?;
        progress(total, total);
        Ok(())
    }

    /// Calls `f` on what the images above the base have, and what lies behind its end.
    fn for_each_part(&self, mut f: impl FnMut(Part) -> Result<()>) -> Result<()> {
        let size = self.top.size();
        let mut offset = 0;
        while offset < size {
            let part = Part::find(&self.top, offset..size)?;
            offset += part.len;
            if part.depth <= self.between {
                f(part)?;
            }
        }
        Ok(())
    }

    /// Closes the images, and removes the data of the one on top with `empties`, if there is none
    /// between that and the base. Only after [`copy`](Self::copy) has succeeded.
    ///
    /// # Errors
    /// The disk on top reads as before.
    pub fn finish(self, empties: bool) -> Result<()> {
        self.base.close()?;
        if empties && self.between == 0 {
            self.top.empty()?;
        } else {
            self.top.close()?;
            drop(self.top);
        }
        drop(self.base);
        let mut stamped = self.stamped.iter();
        stamped.try_for_each(|path| stamp::stamp_base(path, &self.options))
    }
}

/// A part of the disk that one image shows.
pub(crate) struct Part {
    pub offset: u64,
    pub len: u64,
    pub is_zero: bool,
    /// How many images are above that one.
    pub depth: usize,
}

impl Part {
    /// The one that `range` of `top` begins with: up to [`PIECE`] bytes of data.
    pub fn find(top: &dyn Disk, range: Range<u64>) -> Result<Self> {
        let (depth, extent) = extent_in_chain(top, range.start, range.end - range.start)?;
        let (is_zero, len) = match extent.kind {
            ExtentKind::Data | ExtentKind::Compressed => (false, extent.len.min(PIECE)),
            // Unallocated, if the image below this one ends before. That goes for the base, too: a
            // raw data file of it may hold anything there.
            ExtentKind::Zero | ExtentKind::Unallocated => (true, extent.len),
        };
        Ok(Self {
            offset: range.start,
            len,
            is_zero,
            depth,
        })
    }
}

impl Qcow2 {
    /// Removes all mappings, so that the backing file shows everywhere, and closes the image.
    fn empty(self) -> Result<()> {
        self.check_writable()?;
        let clusters = self.geometry.clusters(self.size());
        self.unmap_clusters(0..clusters, Zeroed::Emptied)?;
        self.write_back()?;
        if let Placement::External(external) = &self.placement {
            external.file.discard(0, external.file.size()?)?;
        }
        self.close()
    }
}
