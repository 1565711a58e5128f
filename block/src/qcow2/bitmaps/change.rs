//! Adding, removing and changing the bitmaps of an image that nobody else uses.
//!
//! Changes are made in memory. To commit them, the bits that have changed, tables of them and a new
//! directory go to clusters of their own, and once these are on disk, with their counts, the header
//! changes to the new directory. After that the old clusters are given back. A crash leaves the old
//! bitmaps or the new ones, and at worst leaked clusters.

use std::path::Path;

use super::bits::Bits;
use super::directory::{self, Bitmap, GRANULARITY_BITS, MAX_NAME};
use super::{MAX_BITMAP_SIZE, MAX_BITMAPS, MAX_BITMAPS_SIZE, Place, flags, load, total_size};
use crate::file::ImageFile;
use crate::lock::Access;
use crate::qcow2::backing::Found;
use crate::qcow2::extension::Bitmaps as Extension;
use crate::qcow2::header::Header;
use crate::qcow2::reserved::Field;
use crate::qcow2::{OpenOptions, Qcow2};
use crate::{Disk, Error, Result};

/// The default granularity is the cluster size within these bounds.
const DEFAULT_GRANULARITY_BITS: std::ops::RangeInclusive<u32> = 12..=16;

/// The persistent bitmaps of an image, to be looked at or changed.
///
/// Nothing is written before [`commit`](BitmapEditor::commit).
pub struct BitmapEditor {
    disk: Qcow2,
    header: Header,
    bitmaps: Vec<Edited>,
    /// Entries of the directory on disk that have been removed.
    removed: Vec<Bitmap>,
    changed: bool,
}

/// A bitmap, as it is to be.
struct Edited {
    entry: Bitmap,
    /// What the bitmap on disk has become if it has changed.
    bits: Option<Bits>,
}

impl BitmapEditor {
    /// Opens the image at `path` and its data file, but no backing file.
    ///
    /// # Errors
    /// As [`Qcow2::open`].
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let image = ImageFile::open(path, Access::new(options.read_only), options.files)?;
        let found = Found::new(image, options.read_only)?;
        Self::new(Qcow2::from_found(found, options, None)?)
    }

    /// The bitmaps of `disk`, which nobody else uses, and which is closed with this.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Invalid`]
    pub fn new(mut disk: Qcow2) -> Result<Self> {
        if !disk.read_only {
            // What the bitmaps have followed so far.
            disk.store_all()?;
            disk.bitmaps = None;
        }
        let (image, path) = (&*disk.image.storage, &disk.image.path);
        let header = Header::read(image, path)?;
        let entries = match header.extensions.bitmaps {
            Some(extension) => directory::read(image, path, disk.geometry, extension)?,
            None => Vec::new(),
        };
        let edited = |entry| Edited { entry, bits: None };
        Ok(Self {
            header,
            bitmaps: entries.into_iter().map(edited).collect(),
            removed: Vec::new(),
            changed: false,
            disk,
        })
    }

    /// Adds an empty bitmap that follows changes of the disk. A bit of it stands for `granularity`
    /// bytes; by default for a cluster, but at least 4 KiB and at most 64 KiB.
    ///
    /// # Errors
    /// [`Error::Bitmap`] if there is such a bitmap, or there cannot be.
    pub fn add(&mut self, name: &[u8], granularity: Option<u64>) -> Result<()> {
        if name.is_empty() {
            return Err(self.error("Bitmap name cannot be empty"));
        }
        let bits = match granularity {
            None => {
                let (min, max) = DEFAULT_GRANULARITY_BITS.into_inner();
                self.header.cluster_bits.clamp(min, max) as u8
            }
            Some(granularity) => {
                let bits = granularity.trailing_zeros() as u8;
                if !granularity.is_power_of_two() || !GRANULARITY_BITS.contains(&bits) {
                    let reason = "Granularity must be power of 2 and at least 512";
                    return Err(self.error(reason));
                }
                bits
            }
        };
        if self.position(name).is_some() {
            let name = name.escape_ascii();
            return Err(self.error(format!("Bitmap already exists: {name}")));
        }
        self.check_new(name, bits).map_err(|reason| {
            let (name, file) = (name.escape_ascii(), self.disk.image.path.display());
            self.error(format!(
                "Can't make bitmap '{name}' persistent in '{file}': {reason}"
            ))
        })?;
        self.bitmaps.push(Edited {
            entry: Bitmap::new(name, bits),
            bits: Some(Bits::new()),
        });
        self.changed = true;
        Ok(())
    }

    /// Whether there may be one more bitmap, called `name`.
    fn check_new(&self, name: &[u8], granularity_bits: u8) -> std::result::Result<(), String> {
        if self.header.version < 3 {
            return Err("Cannot store dirty bitmaps in qcow2 v2 files".to_owned());
        }
        if self.disk.size() == 0 {
            return Err("The disk is empty".to_owned());
        }
        let bytes = self.disk.size().div_ceil(1 << granularity_bits).div_ceil(8);
        if bytes > MAX_BITMAP_SIZE {
            let reason = "Too much space will be occupied by the bitmap. Use larger granularity";
            return Err(reason.to_owned());
        }
        if name.len() > MAX_NAME {
            return Err(format!(
                "Name length exceeds maximum ({MAX_NAME} characters)"
            ));
        }
        if self.bitmaps.len() >= MAX_BITMAPS {
            return Err("Maximum number of persistent bitmaps is already reached".to_owned());
        }
        let entries = self.bitmaps.iter().map(|bitmap| &bitmap.entry);
        if total_size(entries, self.disk.size()).saturating_add(bytes) > MAX_BITMAPS_SIZE {
            return Err("The bitmaps are too large together. Use larger granularity".to_owned());
        }
        Ok(())
    }

    /// Removes a bitmap, in whatever state it is.
    ///
    /// # Errors
    /// [`Error::Bitmap`] if there is none called `name`.
    pub fn remove(&mut self, name: &[u8]) -> Result<()> {
        let index = self.find(name)?;
        let entry = self.bitmaps.remove(index).entry;
        if entry.table_size != 0 {
            self.removed.push(entry);
        }
        self.changed = true;
        Ok(())
    }

    /// Clears all bits of a bitmap.
    ///
    /// # Errors
    /// [`Error::Bitmap`] if there is none called `name`, or it cannot be used.
    pub fn clear(&mut self, name: &[u8]) -> Result<()> {
        let index = self.find_usable(name)?;
        self.bitmaps[index].bits = Some(Bits::new());
        self.changed = true;
        Ok(())
    }

    /// Makes a bitmap follow changes of the disk, or leave off.
    ///
    /// # Errors
    /// As [`clear`](Self::clear).
    pub fn set_enabled(&mut self, name: &[u8], enabled: bool) -> Result<()> {
        let index = self.find_usable(name)?;
        let entry = &mut self.bitmaps[index].entry;
        if entry.is_auto() != enabled {
            entry.flags ^= flags::AUTO;
            self.changed = true;
        }
        Ok(())
    }

    /// Sets the bits in the bitmap `name` that are set in `source`, a bitmap of the same image.
    ///
    /// # Errors
    /// As [`clear`](Self::clear), for either bitmap; [`Error::Io`].
    pub fn merge(&mut self, name: &[u8], source: &[u8]) -> Result<()> {
        let (index, source) = (self.find(name)?, self.find(source)?);
        self.check_usable(index)?;
        self.check_usable(source)?;
        if index == source {
            return Ok(());
        }
        let target = self.take_bits(index)?;
        let merged = self.add_bits(source, &target, self.bitmaps[index].entry.granularity_bits);
        self.bitmaps[index].bits = Some(target);
        self.changed = true;
        merged
    }

    /// As [`merge`](Self::merge), from a bitmap of another image, whose disk has the same size.
    ///
    /// # Errors
    /// As [`merge`](Self::merge).
    pub fn merge_from(&mut self, name: &[u8], other: &Self, source: &[u8]) -> Result<()> {
        let (index, source) = (self.find(name)?, other.find(source)?);
        self.check_usable(index)?;
        other.check_usable(source)?;
        let (size, other_size) = (self.disk.size(), other.disk.size());
        if size != other_size {
            return Err(self.error(format!(
                "Bitmaps are of different sizes (destination size is {size}, source size is \
                 {other_size}) and can't be merged"
            )));
        }
        let target = self.take_bits(index)?;
        let merged = other.add_bits(source, &target, self.bitmaps[index].entry.granularity_bits);
        self.bitmaps[index].bits = Some(target);
        self.changed = true;
        merged
    }

    /// The bits of a bitmap, to be put back.
    fn take_bits(&mut self, index: usize) -> Result<Bits> {
        match self.bitmaps[index].bits.take() {
            Some(bits) => Ok(bits),
            None => self.load(index),
        }
    }

    fn load(&self, index: usize) -> Result<Bits> {
        let bits = Bits::new();
        let entry = &self.bitmaps[index].entry;
        let size = self.disk.size();
        load(&self.disk.image, self.disk.geometry, entry, &bits, size)?;
        Ok(bits)
    }

    /// Sets in `target` what is set in the bitmap at `index`.
    fn add_bits(&self, index: usize, target: &Bits, granularity_bits: u8) -> Result<()> {
        let loaded;
        let source = match &self.bitmaps[index].bits {
            Some(bits) => bits,
            None => {
                loaded = self.load(index)?;
                &loaded
            }
        };
        let (size, source_bits) = (self.disk.size(), self.bitmaps[index].entry.granularity_bits);
        for run in source.runs() {
            let (start, end) = (run.start << source_bits, run.end << source_bits);
            if start < size {
                let last = end.min(size) - 1;
                target.set_range(start >> granularity_bits, last >> granularity_bits);
            }
        }
        Ok(())
    }

    fn position(&self, name: &[u8]) -> Option<usize> {
        self.bitmaps
            .iter()
            .position(|bitmap| bitmap.entry.name == name)
    }

    fn find(&self, name: &[u8]) -> Result<usize> {
        self.position(name).ok_or_else(|| {
            let name = name.escape_ascii();
            self.error(format!("Dirty bitmap '{name}' not found"))
        })
    }

    fn find_usable(&self, name: &[u8]) -> Result<usize> {
        let index = self.find(name)?;
        self.check_usable(index)?;
        Ok(index)
    }

    fn check_usable(&self, index: usize) -> Result<()> {
        let entry = &self.bitmaps[index].entry;
        let name = entry.name.escape_ascii();
        if entry.is_in_use() {
            return Err(self.error(format!(
                "Bitmap '{name}' is inconsistent and cannot be used\n\
                 Try block-dirty-bitmap-remove to delete this bitmap from disk"
            )));
        }
        if !entry.is_known() {
            return Err(self.error(format!(
                "Bitmap '{name}' has extra data or flags that are not supported"
            )));
        }
        Ok(())
    }

    fn error(&self, reason: impl Into<String>) -> Error {
        Error::Bitmap {
            file: self.disk.image.path.clone(),
            reason: reason.into(),
        }
    }

    /// Makes the changes on disk, all of them or, after an error, none.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Corrupt`]; [`Error::HeaderFull`] if the header has no room for
    /// bitmaps; [`Error::Io`], after which the new bitmaps may be there if the last sync failed.
    pub fn commit(mut self) -> Result<()> {
        if !self.changed {
            return Ok(());
        }
        self.disk.check_writable()?;
        let old = self.old_places()?;
        let mut new = Vec::new();
        let planned = self.write(&mut new).and_then(|extension| {
            // Counts of the new clusters may have changed it.
            let mut header = Header::read(&*self.disk.image.storage, &self.disk.image.path)?;
            header.set_bitmaps(extension);
            header.plan(&self.disk.image)
        });
        let steps = match planned {
            Ok(steps) => steps,
            Err(error) => {
                // Nothing leads there. What cannot be given back is leaked.
                for (field, range) in new {
                    drop(self.disk.release_clusters(Some(field), range));
                }
                return Err(error);
            }
        };
        steps.run(&self.disk.image)?;
        for (field, range) in old {
            self.disk.release_clusters(Some(field), range)?;
        }
        self.disk.write_counts()
    }

    /// What is given back once the header has been switched: the directory, and what has changed.
    fn old_places(&self) -> Result<Vec<Place>> {
        let directory = self.header.extensions.bitmaps.map(|extension| {
            let offset = extension.directory_offset;
            let range = offset..offset + extension.directory_size;
            (Field::BitmapDirectory, range)
        });
        let mut places = Vec::from_iter(directory);
        let changed = self.bitmaps.iter().filter(|bitmap| bitmap.bits.is_some());
        let stored = changed.map(|bitmap| &bitmap.entry);
        for entry in stored.chain(&self.removed) {
            if entry.table_size != 0 {
                places.extend(self.disk.places(entry)?);
            }
        }
        Ok(places)
    }

    /// Writes what has changed, and a directory, to new clusters, which are added to `new`; returns
    /// what the header is to say.
    fn write(&mut self, new: &mut Vec<Place>) -> Result<Option<Extension>> {
        for bitmap in &mut self.bitmaps {
            let Some(bits) = &bitmap.bits else {
                continue;
            };
            let (offset, size) = self.disk.write_bitmap(&bitmap.entry, bits, new)?;
            bitmap.entry.table_offset = offset;
            bitmap.entry.table_size = size;
        }
        let directory = directory::encode(self.bitmaps.iter().map(|bitmap| &bitmap.entry));
        let len = directory.len() as u64;
        let offset = self.disk.add_table(Field::BitmapDirectory, &directory)?;
        new.push((Field::BitmapDirectory, offset..offset + len));
        self.disk.write_counts()?;
        Ok((len > 0).then_some(Extension {
            count: self.bitmaps.len() as u32,
            directory_size: len,
            directory_offset: offset,
        }))
    }
}
