//! Changing what the directory tells, and the bitmaps of an image that nobody else uses.
//!
//! Changes are made in memory. To commit them, the bits that have changed, tables of them and a new
//! directory go to clusters of their own, and once these are on disk, with their counts, the header
//! changes to the new directory. After that the old clusters are given back. A crash leaves the old
//! bitmaps or the new ones, and at worst leaked clusters.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use super::Place;
use super::bits::Bits;
use super::directory;
use super::draft::{Draft, Edited};
use crate::Result;
use crate::file::ImageFile;
use crate::lock::Access;
use crate::qcow2::backing::Found;
use crate::qcow2::extension::Bitmaps as Extension;
use crate::qcow2::header::Header;
use crate::qcow2::reserved::Field;
use crate::qcow2::switch::Steps;
use crate::qcow2::{OpenOptions, Qcow2};

/// The persistent bitmaps of an image, to be looked at or changed.
///
/// Nothing is written before [`commit`](BitmapEditor::commit).
pub struct BitmapEditor {
    disk: Qcow2,
    draft: Draft,
}

impl fmt::Debug for BitmapEditor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BitmapEditor")
            .field("disk", &self.disk)
            .finish_non_exhaustive()
    }
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
    /// [`Error::Io`](crate::Error::Io), [`Error::Invalid`](crate::Error::Invalid)
    pub fn new(mut disk: Qcow2) -> Result<Self> {
        if !disk.read_only {
            // What the bitmaps have followed so far.
            disk.store_all()?;
            disk.bitmaps = None;
        }
        let header = Header::read(&*disk.image.storage, &disk.image.path)?;
        let draft = Draft::read(&disk, header.extensions.bitmaps)?;
        Ok(Self { disk, draft })
    }

    /// Adds an empty bitmap that follows changes of the disk. A bit of it stands for `granularity`
    /// bytes; by default for a cluster, but at least 4 KiB and at most 64 KiB.
    ///
    /// # Errors
    /// [`Error::Bitmap`](crate::Error::Bitmap) if there is such a bitmap, or there cannot be.
    pub fn add(&mut self, name: &[u8], granularity: Option<u64>) -> Result<()> {
        self.draft.add(&self.disk, name, granularity)
    }

    /// Removes a bitmap, in whatever state it is.
    ///
    /// # Errors
    /// [`Error::Bitmap`](crate::Error::Bitmap) if there is none called `name`.
    pub fn remove(&mut self, name: &[u8]) -> Result<()> {
        self.draft.remove(&self.disk, name)
    }

    /// Clears all bits of a bitmap.
    ///
    /// # Errors
    /// [`Error::Bitmap`](crate::Error::Bitmap) if there is none called `name`, or it cannot be used.
    pub fn clear(&mut self, name: &[u8]) -> Result<()> {
        self.draft.clear(&self.disk, name)
    }

    /// Makes a bitmap follow changes of the disk, or leave off.
    ///
    /// # Errors
    /// As [`clear`](Self::clear).
    pub fn set_enabled(&mut self, name: &[u8], enabled: bool) -> Result<()> {
        self.draft.set_enabled(&self.disk, name, enabled)
    }

    /// Sets the bits in the bitmap `name` that are set in `source`, a bitmap of the same image.
    ///
    /// # Errors
    /// As [`clear`](Self::clear), for either bitmap; [`Error::Io`](crate::Error::Io).
    pub fn merge(&mut self, name: &[u8], source: &[u8]) -> Result<()> {
        self.draft.merge(&self.disk, name, source)
    }

    /// As [`merge`](Self::merge), from a bitmap of another image, whose disk has the same size.
    ///
    /// # Errors
    /// As [`merge`](Self::merge).
    pub fn merge_from(&mut self, name: &[u8], other: &Self, source: &[u8]) -> Result<()> {
        let from = (&other.draft, &other.disk);
        self.draft.merge_from(&self.disk, name, from, source)
    }

    /// Makes the changes on disk, all of them or, after an error, none.
    ///
    /// # Errors
    /// [`Error::ReadOnly`](crate::Error::ReadOnly), [`Error::Corrupt`](crate::Error::Corrupt);
    /// [`Error::HeaderFull`](crate::Error::HeaderFull) if the header has no room for bitmaps;
    /// [`Error::Io`](crate::Error::Io), after which the new bitmaps may be there if the last sync failed.
    pub fn commit(mut self) -> Result<()> {
        if !self.draft.changed {
            return Ok(());
        }
        self.disk.check_writable()?;
        let written = |edited: &Edited| edited.bits.clone();
        let planned = self.disk.plan_directory(&mut self.draft, written, 0)?;
        planned.steps.run(&self.disk.image)?;
        self.disk.release_places(planned.old)
    }
}

/// A new directory that is on disk, and to which nothing leads yet.
pub(super) struct Planned {
    /// Change the header to it.
    pub steps: Steps,
    /// Is given back after that.
    pub old: Vec<Place>,
}

impl Qcow2 {
    /// Writes the bits of those of `draft` for which there are some to be `written`, and a directory of
    /// all, to new clusters, whose places go into the entries. Those that tell what has changed, or
    /// should, have flags with `mark`.
    ///
    /// # Errors
    /// [`Error::HeaderFull`](crate::Error::HeaderFull), [`Error::Io`](crate::Error::Io), [`Error::Invalid`](crate::Error::Invalid): nothing has changed.
    pub(super) fn plan_directory(
        &self,
        draft: &mut Draft,
        written: impl Fn(&Edited) -> Option<Arc<Bits>>,
        mark: u32,
    ) -> Result<Planned> {
        let written = Vec::from_iter(draft.bitmaps.iter().map(written));
        let mut new = Vec::new();
        let planned = self.old_places(draft, &written).and_then(|old| {
            let extension = self.write_directory(draft, &written, mark, &mut new)?;
            // Counts of the new clusters may have changed it.
            let mut header = Header::read(&*self.image.storage, &self.image.path)?;
            header.set_bitmaps(extension);
            let steps = header.plan(&self.image)?;
            Ok(Planned { steps, old })
        });
        if planned.is_err() {
            // Nothing leads there. What cannot be given back is leaked.
            for (field, range) in new {
                drop(self.release_clusters(Some(field), range));
            }
        }
        planned
    }

    /// Gives back `places`, to which nothing on disk leads any more.
    pub(super) fn release_places(&self, places: Vec<Place>) -> Result<()> {
        for (field, range) in places {
            self.release_clusters(Some(field), range)?;
        }
        self.write_counts()
    }

    /// What is given back once the header has been switched: the directory, and what is not in
    /// use any more.
    fn old_places(&self, draft: &Draft, written: &[Option<Arc<Bits>>]) -> Result<Vec<Place>> {
        let header = Header::read(&*self.image.storage, &self.image.path)?;
        let directory = header.extensions.bitmaps.map(|extension| {
            let offset = extension.directory_offset;
            let range = offset..offset + extension.directory_size;
            (Field::BitmapDirectory, range)
        });
        let mut places = Vec::from_iter(directory);
        let pairs = draft.bitmaps.iter().zip(written);
        let replaced = pairs.filter(|(_, bits)| bits.is_some());
        let replaced = replaced.map(|(bitmap, _)| &bitmap.entry);
        for entry in replaced.chain(&draft.removed) {
            if entry.table_size != 0 {
                places.extend(self.places(entry)?);
            }
        }
        Ok(places)
    }

    /// Writes what is to be `written`, and a directory, to new clusters, which are added to `new`;
    /// returns what the header is to say.
    fn write_directory(
        &self,
        draft: &mut Draft,
        written: &[Option<Arc<Bits>>],
        mark: u32,
        new: &mut Vec<Place>,
    ) -> Result<Option<Extension>> {
        for (bitmap, bits) in draft.bitmaps.iter_mut().zip(written) {
            if let Some(bits) = bits {
                let (offset, size) = self.write_bitmap(&bitmap.entry, bits, new)?;
                bitmap.entry.table_offset = offset;
                bitmap.entry.table_size = size;
            }
        }
        let entries = draft.bitmaps.iter().map(|bitmap| bitmap.entry.marked(mark));
        let directory = directory::encode(entries);
        let len = directory.len() as u64;
        let offset = self.add_table(Field::BitmapDirectory, &directory)?;
        new.push((Field::BitmapDirectory, offset..offset + len));
        let mut at = offset;
        for bitmap in &mut draft.bitmaps {
            bitmap.entry.at = at;
            at += bitmap.entry.entry_len() as u64;
        }
        self.write_counts()?;
        Ok((len > 0).then_some(Extension {
            count: draft.bitmaps.len() as u32,
            directory_size: len,
            directory_offset: offset,
        }))
    }
}
