//! The bitmaps of an image that is open for writing.

use std::sync::Arc;

use super::bits::Bits;
use super::directory::{self, Bitmap, MAX_BITMAP_SIZE, Part, flags};
use super::{
    BitmapInfo, MAX_BITMAPS, MAX_BITMAPS_SIZE, Place, check_sizes, list, load, total_size,
};
use crate::file::ImageFile;
use crate::qcow2::geometry::Geometry;
use crate::qcow2::header::Header;
use crate::qcow2::reserved::Field;
use crate::qcow2::{Qcow2, table};
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};
use crate::{Disk, Error, Result};

/// The bitmaps of an image that may be written, which has none at first if there is no directory.
pub(in crate::qcow2) struct Bitmaps {
    list: Vec<Tracked>,
    /// Those that follow changes of the disk.
    followers: Vec<Follower>,
    /// They are in memory, and marked on disk.
    started: AtomicBool,
    /// Held by whoever starts them.
    starting: Mutex<()>,
    /// It is not known which directory is in force on disk. What either of them tells is marked, and
    /// stays so.
    abandoned: bool,
}

/// A bitmap of an image that is open.
pub(super) struct Tracked {
    /// As on disk, without the mark, and as far as that is not in memory.
    pub entry: Bitmap,
    /// The bits of one that can be stored again, once all are in memory.
    pub bits: Option<Arc<Bits>>,
}

/// What a change of the disk needs to know of a bitmap.
struct Follower {
    granularity_bits: u8,
    bits: Arc<Bits>,
}

impl Follower {
    /// Sets the bits of `len` bytes, at least one, at `offset`.
    fn mark(&self, offset: u64, len: u64) {
        let first = offset >> self.granularity_bits;
        let last = (offset + len - 1) >> self.granularity_bits;
        self.bits.set_range(first, last);
    }
}

impl Bitmaps {
    /// Those of `image`.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a directory that is not valid, a bitmap that does not fit the
    /// disk, and bitmaps that are too many or too large to be kept in memory.
    pub fn open(image: &ImageFile, header: &Header) -> Result<Self> {
        let Some(extension) = header.extensions.bitmaps else {
            return Ok(Self::new(Vec::new(), true));
        };
        let g = header.geometry();
        let entries = directory::read(&*image.storage, &image.path, g, extension)?;
        check_sizes(&image.path, g, header.disk_size(), &entries)?;
        if entries.len() > MAX_BITMAPS
            || total_size(&entries, header.disk_size()) > MAX_BITMAPS_SIZE
        {
            let offset = extension.directory_offset;
            let reason = format!(
                "the bitmaps are more than {MAX_BITMAPS}, or have more than {MAX_BITMAPS_SIZE} bytes \
                 together, which a disk that is written would keep in memory"
            );
            return Err(image.invalid("bitmap_directory_offset", offset, reason));
        }
        let tracked = |entry: Bitmap| Tracked {
            bits: entry.is_stored().then(Arc::default),
            entry,
        };
        Ok(Self::new(entries.into_iter().map(tracked).collect(), false))
    }

    pub(super) fn new(list: Vec<Tracked>, started: bool) -> Self {
        let followers = list.iter().filter(|tracked| tracked.entry.is_auto());
        let followers = followers.filter_map(|tracked| {
            Some(Follower {
                granularity_bits: tracked.entry.granularity_bits,
                bits: tracked.bits.clone()?,
            })
        });
        Self {
            followers: followers.collect(),
            list,
            started: AtomicBool::new(started),
            starting: Mutex::default(),
            abandoned: false,
        }
    }

    /// All of them.
    pub(super) fn list(&self) -> &[Tracked] {
        &self.list
    }

    /// The bits that are in memory, with the entries that they belong to.
    fn stored(&self) -> impl Iterator<Item = (&Bitmap, &Bits)> {
        let tracked = self.list.iter();
        tracked.filter_map(|tracked| Some((&tracked.entry, &**tracked.bits.as_ref()?)))
    }

    pub(super) fn has_started(&self) -> bool {
        self.started.load(Ordering::Acquire)
    }

    /// From now on nothing is stored.
    pub(super) fn abandon(&mut self) {
        self.abandoned = true;
    }

    /// Fails if they have been [abandoned](Self::abandon).
    pub(super) fn check_whole(&self, image: &ImageFile) -> Result<()> {
        if self.abandoned {
            return Err(Error::Bitmap {
                file: image.path.clone(),
                reason: "a change of the bitmaps was broken off by an error; they are not stored, \
                         and stay marked as in use"
                    .to_owned(),
            });
        }
        Ok(())
    }

    /// Reads the bits for a disk of `size` bytes, and marks the bitmaps on disk.
    #[inline(never)]
    fn start(&self, image: &ImageFile, geometry: Geometry, size: u64) -> Result<()> {
        let _starting = lock(&self.starting);
        if self.has_started() {
            return Ok(());
        }
        for (entry, bits) in self.stored() {
            load(image, geometry, entry, bits, size)?;
        }
        #[cfg(mutate)]
        if crate::mutate::is(crate::mutate::NOT_MARKED) {
            self.started.store(true, Ordering::Release);
            return Ok(());
        }
        self.write_flags(image, flags::IN_USE)?;
        self.started.store(true, Ordering::Release);
        Ok(())
    }

    /// Writes the flags of those that are stored, and of those that are not but should follow
    /// changes, with `mark`; without it only of the former.
    fn write_flags(&self, image: &ImageFile, mark: u32) -> Result<()> {
        for Tracked { entry, bits } in &self.list {
            if bits.is_some() || mark != 0 && entry.must_be_marked() {
                let flags = entry.flags | mark;
                image.write_bytes_at(&flags.to_be_bytes(), entry.flags_at())?;
            }
        }
        image.sync()
    }

    /// Sets the bits of `len` bytes at `offset` in those that follow changes.
    fn mark(&self, offset: u64, len: u64) {
        for follower in &self.followers {
            follower.mark(offset, len);
        }
    }

    /// Clears the bits behind the end of a disk of `size` bytes.
    fn truncate(&self, size: u64) {
        for (entry, bits) in self.stored() {
            bits.truncate(entry.bits(size));
        }
    }

    /// What is to be known of each.
    fn info(&self) -> Vec<BitmapInfo> {
        let info = |tracked: &Tracked| BitmapInfo {
            in_use: tracked.entry.is_in_use()
                || self.has_started() && tracked.bits.is_none() && tracked.entry.is_auto(),
            ..BitmapInfo::new(&tracked.entry)
        };
        self.list.iter().map(info).collect()
    }
}

impl Qcow2 {
    /// The persistent bitmaps; `None` if the image cannot have any, in version 2. Those that this disk
    /// uses itself are not in use for that.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a directory that is not valid; [`Error::Io`].
    pub fn bitmaps(&self) -> Result<Option<Vec<BitmapInfo>>> {
        if self.version < 3 {
            return Ok(None);
        }
        if let Some(bitmaps) = &self.bitmaps {
            return Ok(Some(bitmaps.info()));
        }
        let (image, path) = (&*self.image.storage, &self.image.path);
        list(image, path, &Header::read(image, path)?).map(Some)
    }

    /// The `len` bytes at `offset` are about to change.
    #[inline]
    pub(in crate::qcow2) fn track(&self, offset: u64, len: u64) -> Result<()> {
        let Some(bitmaps) = self.bitmaps.as_ref().filter(|_| len > 0) else {
            return Ok(());
        };
        self.start_bitmaps(bitmaps)?;
        bitmaps.mark(offset, len);
        Ok(())
    }

    /// As [`track`](Self::track), if the bitmaps are in memory. Returns whether they are.
    pub(in crate::qcow2) fn try_track(&self, offset: u64, len: u64) -> bool {
        let Some(bitmaps) = self.bitmaps.as_ref().filter(|_| len > 0) else {
            return true;
        };
        let has_started = bitmaps.has_started();
        if has_started {
            bitmaps.mark(offset, len);
        }
        has_started
    }

    #[inline]
    pub(super) fn start_bitmaps(&self, bitmaps: &Bitmaps) -> Result<()> {
        if bitmaps.has_started() {
            return Ok(());
        }
        bitmaps.start(&self.image, self.geometry, self.size())
    }

    /// Makes sure that the bitmaps can follow when the disk gets a size of `new` bytes.
    ///
    /// # Errors
    /// [`Error::Option`] if there is one that cannot.
    pub(in crate::qcow2) fn check_bitmaps(&self, new: u64) -> Result<()> {
        let Some(bitmaps) = &self.bitmaps else {
            return Ok(());
        };
        for Tracked { entry, bits } in &bitmaps.list {
            let name = entry.name.escape_ascii();
            if bits.is_none() {
                let reason = format!("Bitmap '{name}' is inconsistent and cannot be used");
                return Err(Error::Option(reason));
            }
            if new == 0 {
                let reason = format!("Bitmap '{name}' cannot be stored for an empty disk");
                return Err(Error::Option(reason));
            }
            if entry.bits(new) > MAX_BITMAP_SIZE * 8 {
                let reason = format!("Bitmap '{name}' would be too large for the new size");
                return Err(Error::Option(reason));
            }
        }
        if total_size(bitmaps.list.iter().map(|tracked| &tracked.entry), new) > MAX_BITMAPS_SIZE {
            let reason = "The bitmaps would be too large together for the new size";
            return Err(Error::Option(reason.to_owned()));
        }
        self.start_bitmaps(bitmaps)
    }

    /// Stores the bitmaps of an image that is closed, and whose data and mapping are on disk.
    pub(in crate::qcow2) fn store_bitmaps(&self) -> Result<()> {
        let Some(bitmaps) = &self.bitmaps else {
            return Ok(());
        };
        if bitmaps.list.is_empty() || !bitmaps.has_started() {
            return Ok(());
        }
        bitmaps.check_whole(&self.image)?;
        #[cfg(mutate)]
        if crate::mutate::is(crate::mutate::STORED_LATE) {
            bitmaps.write_flags(&self.image, 0)?;
        }
        // A shrink leaves the bits behind the end alone, for requests go on beside it.
        bitmaps.truncate(self.size());
        let mut old = Vec::new();
        let mut places = Vec::new();
        for (entry, bits) in bitmaps.stored() {
            places.push((entry.at, self.write_bitmap(entry, bits, &mut Vec::new())?));
            old.extend(self.places(entry)?);
        }
        self.write_counts()?;
        for (at, (offset, size)) in places {
            let fields = Bitmap::table_fields(offset, size);
            self.image.write_bytes_at(&fields, at)?;
        }
        self.image.sync()?;
        bitmaps.write_flags(&self.image, 0)?;
        for (field, range) in old {
            self.release_clusters(Some(field), range)?;
        }
        self.write_counts()
    }

    /// What the table and the bits of `bitmap` take in the image file, in bytes.
    pub(super) fn places(&self, bitmap: &Bitmap) -> Result<Vec<Place>> {
        let (image, path, g) = (&*self.image.storage, &self.image.path, self.geometry);
        let (offset, clusters) = (bitmap.table_offset, bitmap.table_clusters(g));
        let table = offset..offset + (clusters << g.cluster_bits);
        let mut places = vec![(Field::BitmapTable, table)];
        for part in directory::read_table(image, path, g, bitmap)? {
            if let Part::At(offset) = part {
                places.push((Field::BitmapData, offset..offset + g.cluster_size()));
            }
        }
        Ok(places)
    }

    /// Writes the bits of `bitmap` and a table of them to clusters of their own, which are added to
    /// `new`, and returns the offset and the number of entries of the table.
    pub(super) fn write_bitmap(
        &self,
        bitmap: &Bitmap,
        bits: &Bits,
        new: &mut Vec<Place>,
    ) -> Result<(u64, u32)> {
        let g = self.geometry;
        let bits_len = bitmap.bits(self.size());
        let parts = g.clusters(bits_len.div_ceil(8));
        let (words, all) = (g.cluster_size() / 8, bits_len.div_ceil(64));
        let mut entries = vec![0; parts as usize];
        let mut bytes = Vec::new();
        for (i, entry) in (0..).zip(&mut entries) {
            bytes.clear();
            for index in i * words..all.min((i + 1) * words) {
                let word = bits.get(index as usize);
                let word = word.map_or(0, |word| word.load(Ordering::Relaxed));
                bytes.extend(word.to_le_bytes());
            }
            if bytes.iter().any(|byte| *byte != 0) {
                *entry = self.add_table(Field::BitmapData, &bytes)?;
                new.push((Field::BitmapData, *entry..*entry + g.cluster_size()));
            }
        }
        let table = table::encode(entries);
        let offset = self.add_table(Field::BitmapTable, &table)?;
        new.push((Field::BitmapTable, offset..offset + table.len() as u64));
        Ok((offset, parts as u32))
    }
}
