//! The bitmap directory and the bitmap tables (qcow2 specification, "Bitmaps").

use std::collections::HashSet;
use std::path::Path;

use zerocopy::big_endian::{U16, U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout};

use crate::qcow2::extension::Bitmaps;
use crate::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::qcow2::header::MAX_OFFSET;
use crate::qcow2::table;
use crate::{Error, Result, Storage};

/// Most entries of a bitmap table.
const MAX_TABLE_SIZE: u32 = 0x0800_0000;
/// Most bytes of a bitmap.
pub(crate) const MAX_BITMAP_SIZE: u64 = 512 << 20;
/// Longest name of a bitmap in bytes.
pub(crate) const MAX_BITMAP_NAME: usize = 1023;
/// Granularities as powers of two.
pub(super) const GRANULARITY_BITS: std::ops::RangeInclusive<u8> = 9..=31;
/// The only type of bitmap: of dirty clusters.
const TYPE_DIRTY: u8 = 1;
const ALIGNMENT: usize = 8;

/// Flags of a bitmap.
pub(crate) mod flags {
    /// It was not stored, and is not what it should be.
    pub(crate) const IN_USE: u32 = 1 << 0;
    /// It follows changes of the disk.
    pub(crate) const AUTO: u32 = 1 << 1;
    /// A program that does not know its extra data may use it all the same.
    pub(crate) const EXTRA_DATA_COMPATIBLE: u32 = 1 << 2;
    /// All flags that there are.
    pub(crate) const KNOWN: u32 = IN_USE | AUTO | EXTRA_DATA_COMPATIBLE;
}

/// An entry of the directory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Bitmap {
    /// Offset of its table in the image file in bytes.
    pub table_offset: u64,
    /// Entries of its table.
    pub table_size: u32,
    /// See [`flags`].
    pub flags: u32,
    /// How many guest bytes a bit stands for, as a power of two.
    pub granularity_bits: u8,
    /// See [`TYPE_DIRTY`].
    pub kind: u8,
    /// What there is besides, for those who know it.
    pub extra: Vec<u8>,
    /// Untrusted bytes.
    pub name: Vec<u8>,
    /// Offset of the entry in the image file in bytes.
    pub at: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Fixed {
    table_offset: U64,
    table_size: U32,
    flags: U32,
    kind: u8,
    granularity_bits: u8,
    name_len: U16,
    extra_len: U32,
}

/// Offset of the flags within an entry.
const FLAGS_OFFSET: u64 = 12;

/// Reads the directory of `image`, called `file` in errors.
///
/// # Errors
/// [`Error::Invalid`] for one that contradicts itself; [`Error::Io`].
pub(crate) fn read(
    image: &dyn Storage,
    file: &Path,
    geometry: Geometry,
    extension: Bitmaps,
) -> Result<Vec<Bitmap>> {
    let broken = |reason: &str| {
        let offset = extension.directory_offset;
        Err(Error::invalid(
            file,
            "bitmap_directory_offset",
            offset,
            reason,
        ))
    };
    let size = extension.directory_size as usize;
    if size == 0 {
        return broken("Requested bitmap directory size is zero");
    }
    let mut bytes = vec![0; size];
    image
        .read_bytes_at(&mut bytes, extension.directory_offset)
        .map_err(|e| Error::io_at(file, "read", extension.directory_offset, e))?;
    let mut bitmaps: Vec<Bitmap> = Vec::new();
    let mut names = HashSet::new();
    let mut at = 0;
    while at < size {
        let Some((bitmap, len)) = parse(&bytes[at..]) else {
            return broken("Broken bitmap directory");
        };
        if bitmaps.len() == extension.count as usize {
            return broken("More bitmaps found than specified in header extension");
        }
        if !is_sound(&bitmap, geometry) || !names.insert(bitmap.name.clone()) {
            let name = bitmap.name.escape_ascii();
            return broken(&format!("Bitmap '{name}' doesn't satisfy the constraints"));
        }
        bitmaps.push(Bitmap {
            at: extension.directory_offset + at as u64,
            ..bitmap
        });
        at += len;
    }
    if bitmaps.len() < extension.count as usize {
        return broken("Less bitmaps found than specified in header extension");
    }
    Ok(bitmaps)
}

/// The first entry of `bytes`, and its length.
fn parse(bytes: &[u8]) -> Option<(Bitmap, usize)> {
    let (fixed, rest) = Fixed::ref_from_prefix(bytes).ok()?;
    let (extra, rest) = rest.split_at_checked(fixed.extra_len.get() as usize)?;
    let name = rest.get(..usize::from(fixed.name_len.get()))?;
    let bitmap = Bitmap {
        table_offset: fixed.table_offset.get(),
        table_size: fixed.table_size.get(),
        flags: fixed.flags.get(),
        granularity_bits: fixed.granularity_bits,
        kind: fixed.kind,
        extra: extra.to_vec(),
        name: name.to_vec(),
        at: 0,
    };
    let len = bitmap.entry_len();
    (len <= bytes.len()).then_some((bitmap, len))
}

/// Bytes of an entry with `variable` bytes of extra data and name.
pub(super) fn entry_len(variable: usize) -> usize {
    (size_of::<Fixed>() + variable).next_multiple_of(ALIGNMENT)
}

/// The directory of `bitmaps`.
pub(super) fn encode(bitmaps: impl Iterator<Item = Bitmap>) -> Vec<u8> {
    let mut bytes = Vec::new();
    for bitmap in bitmaps {
        let fixed = Fixed {
            table_offset: bitmap.table_offset.into(),
            table_size: bitmap.table_size.into(),
            flags: bitmap.flags.into(),
            kind: bitmap.kind,
            granularity_bits: bitmap.granularity_bits,
            name_len: (bitmap.name.len() as u16).into(),
            extra_len: (bitmap.extra.len() as u32).into(),
        };
        let end = bytes.len() + bitmap.entry_len();
        bytes.extend_from_slice(fixed.as_bytes());
        bytes.extend_from_slice(&bitmap.extra);
        bytes.extend_from_slice(&bitmap.name);
        bytes.resize(end, 0);
    }
    bytes
}

fn is_sound(bitmap: &Bitmap, geometry: Geometry) -> bool {
    let bytes = u64::from(bitmap.table_size) << geometry.cluster_bits;
    (1..=MAX_TABLE_SIZE).contains(&bitmap.table_size)
        && bytes <= MAX_BITMAP_SIZE
        && bitmap.table_offset != 0
        && bitmap.table_offset < MAX_OFFSET
        && geometry.in_cluster(bitmap.table_offset) == 0
        && (1..=MAX_BITMAP_NAME).contains(&bitmap.name.len())
        && GRANULARITY_BITS.contains(&bitmap.granularity_bits)
}

impl Bitmap {
    /// One that follows changes of the disk from now on, and has no table yet.
    pub fn new(name: &[u8], granularity_bits: u8) -> Self {
        Self {
            table_offset: 0,
            table_size: 0,
            flags: flags::AUTO,
            granularity_bits,
            kind: TYPE_DIRTY,
            extra: Vec::new(),
            name: name.to_vec(),
            at: 0,
        }
    }

    /// Whether all that the entry says is known here.
    pub fn is_known(&self) -> bool {
        self.kind == TYPE_DIRTY
            && self.flags & !flags::KNOWN == 0
            && (self.extra.is_empty() || self.flags & flags::EXTRA_DATA_COMPATIBLE != 0)
    }

    /// Bytes of the entry.
    pub fn entry_len(&self) -> usize {
        entry_len(self.extra.len() + self.name.len())
    }

    /// Whether it does not tell what has changed, since it was not stored.
    pub fn is_in_use(&self) -> bool {
        self.flags & flags::IN_USE != 0
    }

    /// Whether it follows changes of the disk.
    pub fn is_auto(&self) -> bool {
        self.flags & flags::AUTO != 0
    }

    /// Whether it should follow changes of the disk, and does not say yet that it has missed some.
    pub fn must_be_marked(&self) -> bool {
        self.is_auto() && !self.is_in_use()
    }

    /// The entry with `mark` in its flags, if it tells what has changed or should.
    pub fn marked(&self, mark: u32) -> Self {
        let mut marked = self.clone();
        if self.is_stored() || self.must_be_marked() {
            marked.flags |= mark;
        }
        marked
    }

    /// Whether its bits can be kept up to date, and stored again.
    pub fn is_stored(&self) -> bool {
        self.is_known() && !self.is_in_use()
    }

    /// Bits that it needs for a disk of `size` bytes.
    pub fn bits(&self, size: u64) -> u64 {
        size.div_ceil(1 << self.granularity_bits)
    }

    /// Offset of its flags in the image file in bytes.
    pub fn flags_at(&self) -> u64 {
        self.at + FLAGS_OFFSET
    }

    /// Clusters of its table.
    pub fn table_clusters(&self, geometry: Geometry) -> u64 {
        geometry.clusters(u64::from(self.table_size) * ENTRY_SIZE)
    }

    /// The offset and size of its table, as they stand at the beginning of the entry.
    pub fn table_fields(offset: u64, size: u32) -> Vec<u8> {
        let mut fixed = Fixed::new_zeroed();
        fixed.table_offset = offset.into();
        fixed.table_size = size.into();
        fixed.as_bytes()[..FLAGS_OFFSET as usize].to_vec()
    }
}

/// An entry of a bitmap table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Part {
    /// A cluster of bits that are all like this.
    All(bool),
    /// A cluster of bits at this offset in the image file.
    At(u64),
}

/// Reads the table of `bitmap`.
///
/// # Errors
/// [`Error::Invalid`] for an entry with reserved bits, or that is not aligned; [`Error::Io`].
pub(crate) fn read_table(
    image: &dyn Storage,
    file: &Path,
    geometry: Geometry,
    bitmap: &Bitmap,
) -> Result<Vec<Part>> {
    /// Bits 9 to 55.
    const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;
    let mut bytes = vec![0; bitmap.table_size as usize * ENTRY_SIZE as usize];
    image
        .read_bytes_at(&mut bytes, bitmap.table_offset)
        .map_err(|e| Error::io_at(file, "read", bitmap.table_offset, e))?;
    let part = |entry: u64| match entry {
        0 => Ok(Part::All(false)),
        1 => Ok(Part::All(true)),
        offset if entry & !OFFSET == 0 && geometry.in_cluster(offset) == 0 => Ok(Part::At(offset)),
        _ => {
            let name = bitmap.name.escape_ascii();
            let reason = format!("the table of bitmap '{name}' has an entry that is not valid");
            Err(Error::invalid(file, "bitmap_table entry", entry, reason))
        }
    };
    table::decode(&bytes).map(part).collect()
}
