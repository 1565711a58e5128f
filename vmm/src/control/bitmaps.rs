//! The persistent bitmaps of the disks.

use tandem_block::LiveBitmap;
use tandem_block::qcow2::BitmapAction;

use super::{Control, ControlError};

impl Control {
    /// The persistent bitmaps of disk number `index`.
    ///
    /// # Errors
    /// [`ControlError::NoSuchDisk`]; [`ControlError::Disk`], for a raw disk for instance.
    pub fn bitmaps(&self, index: usize) -> Result<Vec<LiveBitmap>, ControlError> {
        let operated = self.disk(index)?;
        let bitmaps = operated.image.disk.bitmaps();
        bitmaps.map_err(|error| operated.error(error))
    }

    /// Changes the bitmaps of disk number `index` while it is used, at one instant: all that `actions`
    /// say or, after an error, nothing.
    ///
    /// # Errors
    /// As [`bitmaps`](Self::bitmaps); [`ControlError::Ended`].
    pub fn change_bitmaps(
        &self,
        index: usize,
        actions: &[BitmapAction],
    ) -> Result<(), ControlError> {
        let _operation = self.begin()?;
        let operated = self.disk(index)?;
        let changed = operated.image.disk.change_bitmaps(actions);
        changed.map_err(|error| operated.error(error))
    }
}
