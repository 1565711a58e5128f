//! Persistent bitmaps: which parts of the disk have changed since somebody cleared them (qcow2
//! specification, "Bitmaps").
//!
//! They are read, and marked as in use on disk, before the first change of the disk; an image that is
//! opened and not written stays as it is. Every change then sets bits in memory before it reaches a
//! file. When the image is closed the bits are written to new clusters, then the entries of the
//! directory lead there, and at last the marks go: after a crash a bitmap is there in whole, or is
//! marked, and nobody takes it for complete. Neither the header nor its autoclear bits change, unless
//! bitmaps are added or removed.
//!
//! A bitmap that is marked already, or says something that is not known here, is not touched; if the
//! latter should follow changes, it is marked, for it does not.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `directory` | the format on disk |
//! | `bits`, `dirty` | the bits of a bitmap in memory, and what they tell |
//! | `tracked` | the bitmaps of an open image: following changes, storing them |
//! | `draft` | what may be changed, and to what |
//! | `change` | how a new directory takes the place of the old one; bitmaps of an image that nobody uses |
//! | `live` | changing bitmaps while the image is in use |

mod bits;
mod change;
mod directory;
mod dirty;
mod draft;
mod live;
mod tracked;

use std::ops::Range;
use std::path::Path;

use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::Header;
use super::reserved::{Field, Reserved};
use crate::file::ImageFile;
use crate::{Error, Result, Storage};

use bits::Bits;
pub use change::BitmapEditor;
pub(crate) use directory::MAX_BITMAP_NAME;
use directory::{Bitmap, Part};
pub use dirty::DirtyBits;
pub use draft::BitmapAction;
pub(super) use tracked::Bitmaps;

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

impl BitmapInfo {
    fn new(entry: &Bitmap) -> Self {
        Self {
            name: entry.name.clone(),
            granularity: 1 << entry.granularity_bits,
            in_use: entry.is_in_use(),
            auto: entry.is_auto(),
        }
    }
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
    Ok(bitmaps.iter().map(BitmapInfo::new).collect())
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

/// Bytes of the bits of all `entries` for a disk of `size` bytes, without those that are not followed.
fn total_size<'a>(entries: impl IntoIterator<Item = &'a Bitmap>, size: u64) -> u64 {
    let stored = entries.into_iter().filter(|entry| entry.is_stored());
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
