//! Persistent bitmaps: which parts of the disk have changed since somebody cleared them (qcow2
//! specification, "Bitmaps").
//!
//! They are read, and marked as in use on disk, before the first change of the disk; an image that is
//! opened and not written stays as it is. Every change then sets bits in memory before it reaches a
//! file. When the image is closed the bits are written to new clusters, then the entries of the
//! directory lead there, and at last the marks go: after a crash a bitmap is there in whole, or is
//! marked, and nobody takes it for complete. Neither the header nor its autoclear bits change.
//!
//! A bitmap that is marked already, or says something that is not known here, is not touched; if the
//! latter should follow changes, it is marked, for it does not.

mod bits;
mod change;
mod directory;

use std::ops::Range;
use std::path::Path;

use super::Qcow2;
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::Header;
use super::reserved::{Field, Reserved};
use crate::file::ImageFile;
use crate::sync::atomic::{AtomicBool, Ordering};
use crate::sync::{Mutex, lock};
use crate::{Disk, Error, Result, Storage};

use bits::Bits;
pub use change::BitmapEditor;
use directory::{Bitmap, MAX_BITMAP_SIZE, Part, flags};

/// Most bytes that the bitmaps of a disk that is written may have together: they are kept in memory.
const MAX_BITMAPS_SIZE: u64 = 1 << 30;
/// Most bitmaps of a disk that is written: each of its changes goes through all of them.
const MAX_BITMAPS: usize = 4096;

/// A persistent bitmap, as its entry in the bitmap directory tells.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// Untrusted bytes.
    pub name: Vec<u8>,
    /// Bytes of the disk that a bit stands for.
    pub granularity: u64,
    /// Whether it was not stored, and is not what it should be.
    pub in_use: bool,
    /// Whether it follows changes of the disk.
    pub auto: bool,
}

/// Bytes of the entry in the directory for a bitmap whose name has `name_len` bytes.
pub(super) fn entry_len(name_len: usize) -> u64 {
    directory::entry_len(name_len) as u64
}

/// What the directory of `image` tells of its bitmaps.
pub(super) fn list(image: &dyn Storage, file: &Path, header: &Header) -> Result<Vec<BitmapInfo>> {
    let Some(extension) = header.extensions.bitmaps else {
        return Ok(Vec::new());
    };
    let bitmaps = directory::read(image, file, header.geometry(), extension)?;
    let info = |bitmap: Bitmap| BitmapInfo {
        granularity: 1 << bitmap.granularity_bits,
        in_use: bitmap.is_in_use(),
        auto: bitmap.is_auto(),
        name: bitmap.name,
    };
    Ok(bitmaps.into_iter().map(info).collect())
}

/// Checks what the directory of `image` tells of its bitmaps, as far as it keeps QEMU from opening it.
pub(super) fn validate(image: &dyn Storage, file: &Path, header: &Header) -> Result<()> {
    let Some(extension) = header.extensions.bitmaps else {
        return Ok(());
    };
    let g = header.geometry();
    let bitmaps = directory::read(image, file, g, extension)?;
    check_sizes(file, g, header.disk_size(), &bitmaps)
}

/// Calls `f` on each range of clusters that the bitmaps of an image take, in bytes: of the directory,
/// and of each bitmap its table and its bits.
pub(super) fn for_each_range(
    image: &dyn Storage,
    file: &Path,
    header: &Header,
    mut f: impl FnMut(Field, u64, u64),
) -> Result<()> {
    let Some(extension) = header.extensions.bitmaps else {
        return Ok(());
    };
    let g = header.geometry();
    let (offset, size) = (extension.directory_offset, extension.directory_size);
    f(Field::BitmapDirectory, offset, size);
    let file_size = image
        .size()
        .map_err(|e| Error::io(file, "get the size of", e))?;
    let mut tables = 0;
    for bitmap in directory::read(image, file, g, extension)? {
        let len = u64::from(bitmap.table_size) * ENTRY_SIZE;
        tables += bitmap.table_clusters(g) << g.cluster_bits;
        if tables > file_size.next_multiple_of(g.cluster_size()) {
            // A small file must not ask for the work of a large one.
            let reason = "the tables of the bitmaps overlap, or lie behind the end of the file";
            let offset = bitmap.table_offset;
            return Err(Error::invalid(file, "bitmap_table_offset", offset, reason));
        }
        f(Field::BitmapTable, bitmap.table_offset, len);
        for part in directory::read_table(image, file, g, &bitmap)? {
            if let Part::At(offset) = part {
                f(Field::BitmapData, offset, g.cluster_size());
            }
        }
    }
    Ok(())
}

/// Adds what the bitmaps take to `reserved`.
pub(super) fn reserve(image: &ImageFile, header: &Header, reserved: &mut Reserved) -> Result<()> {
    let g = header.geometry();
    for_each_range(
        &*image.storage,
        &image.path,
        header,
        |field, offset, len| {
            reserved.push(field, g.cluster(offset), g.clusters(len));
        },
    )
}

/// A range of the image file in bytes, and what leads there.
type Place = (Field, Range<u64>);

/// The bitmaps of an image that may be written.
pub(super) struct Bitmaps {
    entries: Vec<Bitmap>,
    /// They are in memory, and marked on disk.
    started: AtomicBool,
    /// Held by whoever starts them.
    starting: Mutex<()>,
    /// The bits of each of the entries that can be stored again.
    bits: Vec<Option<Bits>>,
}

impl Bitmaps {
    /// Those of `image`, if it has any.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a directory that is not valid, a bitmap that does not fit the
    /// disk, and bitmaps that are too many or too large to be kept in memory.
    pub fn open(image: &ImageFile, header: &Header) -> Result<Option<Self>> {
        let Some(extension) = header.extensions.bitmaps else {
            return Ok(None);
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
        let bits = entries.iter().map(|entry| is_stored(entry).then(Bits::new));
        Ok(Some(Self {
            bits: bits.collect(),
            entries,
            started: AtomicBool::new(false),
            starting: Mutex::default(),
        }))
    }

    /// The bits that are in memory, with the entries that they belong to.
    fn stored(&self) -> impl Iterator<Item = (&Bitmap, &Bits)> {
        let pairs = self.entries.iter().zip(&self.bits);
        pairs.filter_map(|(entry, bits)| Some((entry, bits.as_ref()?)))
    }

    /// Reads the bits for a disk of `size` bytes, and marks the bitmaps on disk.
    fn start(&self, image: &ImageFile, geometry: Geometry, size: u64) -> Result<()> {
        let _starting = lock(&self.starting);
        if self.started.load(Ordering::Acquire) {
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
        for (entry, bits) in self.entries.iter().zip(&self.bits) {
            let follows = mark != 0 && entry.is_auto() && !entry.is_in_use();
            if bits.is_some() || follows {
                let flags = entry.flags | mark;
                image.write_bytes_at(&flags.to_be_bytes(), entry.flags_at())?;
            }
        }
        image.sync()
    }

    /// Sets the bits of `len` bytes at `offset` in those that follow changes.
    fn mark(&self, offset: u64, len: u64) {
        for (entry, bits) in self.stored().filter(|(entry, _)| entry.is_auto()) {
            let first = offset >> entry.granularity_bits;
            bits.set_range(first, (offset + len - 1) >> entry.granularity_bits);
        }
    }

    /// Clears the bits behind the end of a disk of `size` bytes.
    fn truncate(&self, size: u64) {
        for (entry, bits) in self.stored() {
            bits.truncate(entry.bits(size));
        }
    }
}

/// Checks that the tables of bitmaps are as large as a disk of `size` bytes needs them.
///
/// # Errors
/// [`Error::Invalid`], in QEMU's words.
fn check_sizes(file: &Path, g: Geometry, size: u64, entries: &[Bitmap]) -> Result<()> {
    for entry in entries.iter().filter(|entry| !entry.is_in_use()) {
        let table_size = u64::from(entry.table_size);
        let needed = g.clusters(entry.bits(size).div_ceil(8));
        let name = entry.name.escape_ascii();
        let reason = match table_size.cmp(&needed) {
            std::cmp::Ordering::Equal => continue,
            std::cmp::Ordering::Less => format!("Bitmap '{name}' doesn't satisfy the constraints"),
            std::cmp::Ordering::Greater => {
                format!("Could not read bitmap '{name}' from image: Invalid argument")
            }
        };
        return Err(Error::invalid(
            file,
            "bitmap_table_size",
            table_size,
            reason,
        ));
    }
    Ok(())
}

/// Whether the bits of a bitmap can be kept up to date, and stored again.
fn is_stored(entry: &Bitmap) -> bool {
    entry.is_known() && !entry.is_in_use()
}

/// Bytes of the bits of all `entries` for a disk of `size` bytes, without those that are not followed.
fn total_size<'a>(entries: impl IntoIterator<Item = &'a Bitmap>, size: u64) -> u64 {
    let stored = entries.into_iter().filter(|entry| is_stored(entry));
    stored.fold(0, |total: u64, entry| {
        total.saturating_add(entry.bits(size).div_ceil(8))
    })
}

/// Reads the bits of `bitmap`.
fn load(
    image: &ImageFile,
    geometry: Geometry,
    bitmap: &Bitmap,
    bits: &Bits,
    size: u64,
) -> Result<()> {
    let parts = directory::read_table(&*image.storage, &image.path, geometry, bitmap)?;
    let words = (geometry.cluster_size() / 8) as usize;
    let all = bitmap.bits(size).div_ceil(64) as usize;
    let mut bytes = vec![0; words.min(all) * 8];
    for (i, part) in parts.into_iter().enumerate().take(all.div_ceil(words)) {
        bytes.truncate((all - i * words) * 8);
        match part {
            Part::All(false) => continue,
            Part::All(true) => bytes.fill(0xff),
            Part::At(offset) => image.read_bytes_at(&mut bytes, offset)?,
        }
        for (k, word) in bytes.as_chunks().0.iter().enumerate() {
            let word = u64::from_le_bytes(*word);
            if word != 0 {
                bits.set(i * words + k, word);
            }
        }
    }
    bits.truncate(bitmap.bits(size));
    Ok(())
}

impl Qcow2 {
    /// The persistent bitmaps, as the image tells; `None` if it cannot have any, in version 2.
    ///
    /// # Errors
    /// [`Error::Invalid`] for a directory that is not valid; [`Error::Io`].
    pub fn bitmaps(&self) -> Result<Option<Vec<BitmapInfo>>> {
        if self.version < 3 {
            return Ok(None);
        }
        let (image, path) = (&*self.image.storage, &self.image.path);
        list(image, path, &Header::read(image, path)?).map(Some)
    }

    /// The `len` bytes at `offset` are about to change.
    pub(super) fn track(&self, offset: u64, len: u64) -> Result<()> {
        let Some(bitmaps) = self.bitmaps.as_ref().filter(|_| len > 0) else {
            return Ok(());
        };
        self.start_bitmaps(bitmaps)?;
        bitmaps.mark(offset, len);
        Ok(())
    }

    /// As [`track`](Self::track), if the bitmaps are in memory. Returns whether they are.
    pub(super) fn try_track(&self, offset: u64, len: u64) -> bool {
        let Some(bitmaps) = self.bitmaps.as_ref().filter(|_| len > 0) else {
            return true;
        };
        let has_started = bitmaps.started.load(Ordering::Acquire);
        if has_started {
            bitmaps.mark(offset, len);
        }
        has_started
    }

    fn start_bitmaps(&self, bitmaps: &Bitmaps) -> Result<()> {
        if bitmaps.started.load(Ordering::Acquire) {
            return Ok(());
        }
        bitmaps.start(&self.image, self.geometry, self.size())
    }

    /// Makes sure that the bitmaps can follow when the disk gets a size of `new` bytes.
    ///
    /// # Errors
    /// [`Error::Option`] if there is one that cannot.
    pub(super) fn check_bitmaps(&self, new: u64) -> Result<()> {
        let Some(bitmaps) = &self.bitmaps else {
            return Ok(());
        };
        for (entry, bits) in bitmaps.entries.iter().zip(&bitmaps.bits) {
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
        if total_size(&bitmaps.entries, new) > MAX_BITMAPS_SIZE {
            let reason = "The bitmaps would be too large together for the new size";
            return Err(Error::Option(reason.to_owned()));
        }
        self.start_bitmaps(bitmaps)
    }

    /// Stores the bitmaps of an image that is closed, and whose data and mapping are on disk.
    pub(super) fn store_bitmaps(&self) -> Result<()> {
        let Some(bitmaps) = &self.bitmaps else {
            return Ok(());
        };
        if !bitmaps.started.load(Ordering::Acquire) {
            return Ok(());
        }
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
    fn places(&self, bitmap: &Bitmap) -> Result<Vec<Place>> {
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
    fn write_bitmap(
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
        let table = super::table::encode(entries);
        let offset = self.add_table(Field::BitmapTable, &table)?;
        new.push((Field::BitmapTable, offset..offset + table.len() as u64));
        Ok((offset, parts as u32))
    }
}
