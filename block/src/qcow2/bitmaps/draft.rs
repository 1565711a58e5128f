//! What bitmaps are to become: changes are made here first, and carried out when all have succeeded.

use std::sync::Arc;

use super::bits::Bits;
use super::directory::{self, Bitmap, GRANULARITY_BITS, MAX_BITMAP_NAME, MAX_BITMAP_SIZE, flags};
use super::tracked::Bitmaps;
use super::{MAX_BITMAPS, MAX_BITMAPS_SIZE, load, total_size};
use crate::qcow2::Qcow2;
use crate::qcow2::extension::Bitmaps as Extension;
use crate::{Disk, Error, Result};

/// The default granularity is the cluster size within these bounds.
const DEFAULT_GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 12..=16;

/// A change of the bitmaps of an image. Names are bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BitmapAction {
    /// Add an empty bitmap.
    Add {
        /// What no other bitmap of the image is called.
        name: Vec<u8>,
        /// Bytes that a bit stands for; by default a cluster, but at least 4 KiB and at most 64 KiB.
        granularity: Option<u64>,
        /// Whether it follows changes of the disk.
        enabled: bool,
    },
    /// Remove a bitmap, in whatever state it is.
    Remove {
        /// Which one.
        name: Vec<u8>,
    },
    /// Clear all bits of a bitmap.
    Clear {
        /// Which one.
        name: Vec<u8>,
    },
    /// Make a bitmap follow changes of the disk, or leave off.
    SetEnabled {
        /// Which one.
        name: Vec<u8>,
        /// Whether it is to follow them.
        enabled: bool,
    },
    /// Set the bits in a bitmap that are set in another one.
    Merge {
        /// The bitmap that changes.
        target: Vec<u8>,
        /// The one that tells how.
        source: Vec<u8>,
    },
}

/// The bitmaps of an image as they are to be.
pub(super) struct Draft {
    pub bitmaps: Vec<Edited>,
    /// Entries of the directory on disk that have been removed.
    pub removed: Vec<Bitmap>,
    /// Whether anything is to be other than it was.
    pub changed: bool,
}

/// A bitmap as it is to be.
pub(super) struct Edited {
    pub entry: Bitmap,
    /// The bits, unless they are those on disk.
    pub bits: Option<Arc<Bits>>,
}

impl Draft {
    /// The bitmaps in the directory on disk.
    ///
    /// # Errors
    /// [`Error::Invalid`], [`Error::Io`]
    pub fn read(disk: &Qcow2, extension: Option<Extension>) -> Result<Self> {
        let (image, path) = (&*disk.image.storage, &disk.image.path);
        let entries = match extension {
            Some(extension) => directory::read(image, path, disk.geometry, extension)?,
            None => Vec::new(),
        };
        let edited = |entry| Edited { entry, bits: None };
        Ok(Self::new(entries.into_iter().map(edited)))
    }

    /// The bitmaps of an image that is open, as far as they are in memory.
    pub fn of(bitmaps: &Bitmaps) -> Self {
        Self::new(bitmaps.list().iter().map(|tracked| Edited {
            entry: tracked.entry.clone(),
            bits: tracked.bits.clone(),
        }))
    }

    fn new(bitmaps: impl Iterator<Item = Edited>) -> Self {
        Self {
            bitmaps: bitmaps.collect(),
            removed: Vec::new(),
            changed: false,
        }
    }

    /// Makes one change; after an error, this is not to be used any more.
    ///
    /// # Errors
    /// [`Error::Bitmap`] for what is not possible; [`Error::Io`], [`Error::Invalid`] if bits cannot be read.
    pub fn apply(&mut self, disk: &Qcow2, action: &BitmapAction) -> Result<()> {
        match action {
            BitmapAction::Add {
                name,
                granularity,
                enabled,
            } => {
                self.add(disk, name, *granularity)?;
                self.set_enabled(disk, name, *enabled)
            }
            BitmapAction::Remove { name } => self.remove(disk, name),
            BitmapAction::Clear { name } => self.clear(disk, name),
            BitmapAction::SetEnabled { name, enabled } => self.set_enabled(disk, name, *enabled),
            BitmapAction::Merge { target, source } => self.merge(disk, target, source),
        }
    }

    pub fn add(&mut self, disk: &Qcow2, name: &[u8], granularity: Option<u64>) -> Result<()> {
        if name.is_empty() {
            return Err(error(disk, "Bitmap name cannot be empty"));
        }
        let bits = match granularity {
            None => {
                let (min, max) = DEFAULT_GRANULARITY_BITS.into_inner();
                disk.geometry.cluster_bits.clamp(min, max) as u8
            }
            Some(granularity) => {
                let bits = granularity.trailing_zeros() as u8;
                if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
                    let reason = "Granularity must be power of 2 and at least 512";
                    return Err(error(disk, reason));
                }
                bits
            }
        };
        if self.position(name).is_some() {
            let name = name.escape_ascii();
            return Err(error(disk, format!("Bitmap already exists: {name}")));
        }
        self.check_new(disk, name, bits).map_err(|reason| {
            let (name, file) = (name.escape_ascii(), disk.image.path.display());
            let reason = format!("Can't make bitmap '{name}' persistent in '{file}': {reason}");
            error(disk, reason)
        })?;
        self.bitmaps.push(Edited {
            entry: Bitmap::new(name, bits),
            bits: Some(Arc::default()),
        });
        self.changed = true;
        Ok(())
    }

    /// Whether there may be one more bitmap, called `name`.
    fn check_new(
        &self,
        disk: &Qcow2,
        name: &[u8],
        granularity_bits: u8,
    ) -> std::result::Result<(), String> {
        let size = disk.size();
        if disk.version < 3 {
            return Err("Cannot store dirty bitmaps in qcow2 v2 files".to_owned());
        }
        if size == 0 {
            return Err("The disk is empty".to_owned());
        }
        let bytes = size.div_ceil(1 << granularity_bits).div_ceil(8);
        if bytes > MAX_BITMAP_SIZE {
            let reason = "Too much space will be occupied by the bitmap. Use larger granularity";
            return Err(reason.to_owned());
        }
        if name.len() > MAX_BITMAP_NAME {
            return Err(format!(
                "Name length exceeds maximum ({MAX_BITMAP_NAME} characters)"
            ));
        }
        if self.bitmaps.len() >= MAX_BITMAPS {
            return Err("Maximum number of persistent bitmaps is already reached".to_owned());
        }
        let entries = self.bitmaps.iter().map(|bitmap| &bitmap.entry);
        if total_size(entries, size).saturating_add(bytes) > MAX_BITMAPS_SIZE {
            return Err("The bitmaps are too large together. Use larger granularity".to_owned());
        }
        Ok(())
    }

    pub fn remove(&mut self, disk: &Qcow2, name: &[u8]) -> Result<()> {
        let index = self.find(disk, name)?;
        let entry = self.bitmaps.remove(index).entry;
        if entry.table_size != 0 {
            self.removed.push(entry);
        }
        self.changed = true;
        Ok(())
    }

    pub fn clear(&mut self, disk: &Qcow2, name: &[u8]) -> Result<()> {
        let index = self.find_usable(disk, name)?;
        self.bitmaps[index].bits = Some(Arc::default());
        self.changed = true;
        Ok(())
    }

    pub fn set_enabled(&mut self, disk: &Qcow2, name: &[u8], enabled: bool) -> Result<()> {
        let index = self.find_usable(disk, name)?;
        let entry = &mut self.bitmaps[index].entry;
        if entry.is_auto() != enabled {
            entry.flags ^= flags::AUTO;
            self.changed = true;
        }
        Ok(())
    }

    pub fn merge(&mut self, disk: &Qcow2, target: &[u8], source: &[u8]) -> Result<()> {
        let (index, source) = (self.find(disk, target)?, self.find(disk, source)?);
        self.check_usable(disk, index)?;
        self.check_usable(disk, source)?;
        if index == source {
            return Ok(());
        }
        let bits = self.bits(disk, source)?;
        self.add_bits(
            disk,
            index,
            &bits,
            self.bitmaps[source].entry.granularity_bits,
        )
    }

    /// As [`merge`](Self::merge), from a bitmap of `other`, another image.
    pub fn merge_from(
        &mut self,
        disk: &Qcow2,
        target: &[u8],
        (other, other_disk): (&Self, &Qcow2),
        source: &[u8],
    ) -> Result<()> {
        let (index, source) = (self.find(disk, target)?, other.find(other_disk, source)?);
        self.check_usable(disk, index)?;
        other.check_usable(other_disk, source)?;
        let (size, other_size) = (disk.size(), other_disk.size());
        if size != other_size {
            let reason = format!(
                "Bitmaps are of different sizes (destination size is {size}, source size is \
                 {other_size}) and can't be merged"
            );
            return Err(error(disk, reason));
        }
        let bits = other.bits(other_disk, source)?;
        self.add_bits(
            disk,
            index,
            &bits,
            other.bitmaps[source].entry.granularity_bits,
        )
    }

    /// The bits of the bitmap at `index`.
    fn bits(&self, disk: &Qcow2, index: usize) -> Result<Arc<Bits>> {
        let Edited { entry, bits } = &self.bitmaps[index];
        if let Some(bits) = bits {
            return Ok(bits.clone());
        }
        let bits = Bits::new();
        load(&disk.image, disk.geometry, entry, &bits, disk.size())?;
        Ok(Arc::new(bits))
    }

    /// Sets in the bitmap at `index` what is set in `source`.
    fn add_bits(
        &mut self,
        disk: &Qcow2,
        index: usize,
        source: &Bits,
        source_bits: u8,
    ) -> Result<()> {
        let mut bits = self.bits(disk, index)?;
        let Edited { entry, bits: old } = &mut self.bitmaps[index];
        // What nobody else uses need not be copied.
        *old = None;
        let target = Arc::make_mut(&mut bits);
        target.merge(entry.granularity_bits, source, source_bits, disk.size());
        *old = Some(bits);
        self.changed = true;
        Ok(())
    }

    fn position(&self, name: &[u8]) -> Option<usize> {
        let mut bitmaps = self.bitmaps.iter();
        bitmaps.position(|bitmap| bitmap.entry.name == name)
    }

    fn find(&self, disk: &Qcow2, name: &[u8]) -> Result<usize> {
        self.position(name).ok_or_else(|| not_found(disk, name))
    }

    fn find_usable(&self, disk: &Qcow2, name: &[u8]) -> Result<usize> {
        let index = self.find(disk, name)?;
        self.check_usable(disk, index)?;
        Ok(index)
    }

    fn check_usable(&self, disk: &Qcow2, index: usize) -> Result<()> {
        check_usable(disk, &self.bitmaps[index].entry)
    }
}

/// Fails if a bitmap does not tell what has changed, or nobody knows what it tells.
pub(super) fn check_usable(disk: &Qcow2, entry: &Bitmap) -> Result<()> {
    let name = entry.name.escape_ascii();
    if entry.is_in_use() {
        let reason = format!(
            "Bitmap '{name}' is inconsistent and cannot be used\n\
             Try block-dirty-bitmap-remove to delete this bitmap from disk"
        );
        return Err(error(disk, reason));
    }
    if !entry.is_known() {
        let reason = format!("Bitmap '{name}' has extra data or flags that are not supported");
        return Err(error(disk, reason));
    }
    Ok(())
}

/// There is no bitmap called `name`.
pub(super) fn not_found(disk: &Qcow2, name: &[u8]) -> Error {
    error(
        disk,
        format!("Dirty bitmap '{}' not found", name.escape_ascii()),
    )
}

/// An [`Error::Bitmap`] of `disk`.
pub(super) fn error(disk: &Qcow2, reason: impl Into<String>) -> Error {
    Error::Bitmap {
        file: disk.image.path.clone(),
        reason: reason.into(),
    }
}
