//! Looking at the image of a disk in use, which changes through the disk alone: so its watchers are told.

use std::os::fd::BorrowedFd;
use std::path::Path;

use super::LiveImage;
use crate::Result;
use crate::qcow2::{BitmapInfo, DataFile, Qcow2};

/// The image of a [`LiveDisk`](super::LiveDisk) as it is now, of which nothing can be changed.
#[derive(Clone, Copy)]
pub struct ImageView<'a>(pub(super) &'a LiveImage);

impl<'a> ImageView<'a> {
    /// Where the image is, as it was named when it was opened.
    pub fn path(self) -> &'a Path {
        self.0.path()
    }

    /// Whether it is in qcow2 format.
    pub fn is_qcow2(self) -> bool {
        self.0.qcow2().is_some()
    }

    /// The external data file, if there is one.
    pub fn data_file(self) -> Option<DataFile> {
        self.0.qcow2().and_then(Qcow2::data_file)
    }

    /// As [`host_file`](crate::Disk::host_file) of a disk.
    pub fn host_file(self) -> Option<BorrowedFd<'a>> {
        self.0.disk().host_file()
    }

    /// As [`Qcow2::bitmaps`].
    ///
    /// # Errors
    /// Those of [`Qcow2::bitmaps`]; [`Error::Bitmap`](crate::Error::Bitmap) for a raw disk.
    pub fn bitmaps(self) -> Result<Option<Vec<BitmapInfo>>> {
        self.0.with_bitmaps()?.bitmaps()
    }

    /// How many images are between this one and the one below it that is the file at `path`.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) if it is none of those; [`Error::Io`](crate::Error::Io).
    pub fn find_below(self, path: &Path) -> Result<usize> {
        self.0.find_below(path)
    }
}
