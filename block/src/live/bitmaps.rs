//! The persistent bitmaps of a disk that is used.

use std::sync::Arc;

use super::{LiveDisk, LiveImage, in_use};
use crate::qcow2::{BitmapAction, BitmapInfo, DirtyBits, Qcow2};
use crate::{Error, Raw, Result};

/// A persistent bitmap of a disk that is used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct LiveBitmap {
    /// What it is.
    pub info: BitmapInfo,
    /// Bytes that it has as dirty, if it can be told.
    pub dirty: Option<u64>,
}

impl LiveDisk {
    /// The persistent bitmaps, in the order in which they were added.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for a raw disk; otherwise as [`Qcow2::bitmaps`] and [`Qcow2::dirty_bytes`].
    pub fn bitmaps(&self) -> Result<Vec<LiveBitmap>> {
        let state = self.shared();
        let disk = state.image.with_bitmaps()?;
        let live = |info: BitmapInfo| {
            let dirty = match disk.dirty_bytes(&info.name) {
                Ok(dirty) => Some(dirty),
                Err(Error::Bitmap { .. } | Error::ReadOnly) => None,
                Err(error) => return Err(error),
            };
            Ok(LiveBitmap { info, dirty })
        };
        let bitmaps = disk.bitmaps()?.unwrap_or_default();
        bitmaps.into_iter().map(live).collect()
    }

    /// Changes the bitmaps at one instant: a write is in those that followed changes before, or in
    /// those that do so after.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for a raw disk; [`Error::Backup`] for a bitmap of a backup under way; otherwise as
    /// [`Qcow2::change_bitmaps`].
    pub fn change_bitmaps(&self, actions: &[BitmapAction]) -> Result<()> {
        self.exclusive(|state| {
            state.history.check(actions)?;
            state.image.with_bitmaps_mut()?.change_bitmaps(actions)?;
            state.history.note(actions);
            Ok(())
        })
    }

    /// A copy of what a bitmap has as dirty.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for a raw disk; otherwise as [`Qcow2::read_bitmap`].
    pub fn read_bitmap(&self, name: &[u8]) -> Result<DirtyBits> {
        self.shared().image.with_bitmaps()?.read_bitmap(name)
    }
}

impl LiveImage {
    pub(crate) fn with_bitmaps(&self) -> Result<&Qcow2> {
        match self {
            Self::Raw(disk) => Err(no_place(disk)),
            Self::Qcow2(disk) => Ok(disk),
            Self::Gone(gone) => Err(gone.error()),
        }
    }

    pub(crate) fn with_bitmaps_mut(&mut self) -> Result<&mut Qcow2> {
        match self {
            Self::Raw(disk) => Err(no_place(disk)),
            Self::Qcow2(disk) => Arc::get_mut(disk).ok_or_else(in_use),
            Self::Gone(gone) => Err(gone.error()),
        }
    }
}

fn no_place(disk: &Raw) -> Error {
    let file = disk.path();
    let reason = format!(
        "a raw disk has no place for bitmaps; make it the data file of a qcow2 image, and use that: \
         tandem-img create -f qcow2 -o data_file='{}',data_file_raw=on,data_file_reuse=keep IMAGE",
        file.display()
    );
    let file = file.to_owned();
    Error::Bitmap { file, reason }
}
