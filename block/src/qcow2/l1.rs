//! The active L1 table, kept in memory whole.

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeSet;

use super::entry::L1Entry;
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::MAX_L1_SIZE;
use super::table;
use super::words::Words;
use crate::Result;
use crate::file::ImageFile;
use crate::sync::lock;

/// The active L1 table.
pub(crate) struct L1Table {
    /// On disk, in bytes. Changes with write-back locked out.
    offset: AtomicU64,
    /// Entries of the table on disk.
    size: AtomicU64,
    entries: Words,
    /// Entries that name a new L2 table and are not known to be on disk.
    new: Mutex<BTreeSet<usize>>,
}

/// Checks entry `index` of an L1 table of an image of `file_size` bytes.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) if reserved bits are set, or the L2 table is unaligned
/// or past the end of the file.
#[inline]
pub(crate) fn check_entry(
    image: &ImageFile,
    geometry: Geometry,
    file_size: u64,
    index: usize,
    raw: u64,
) -> Result<()> {
    let entry = L1Entry(raw);
    let problem = if entry.reserved() != 0 {
        "has reserved bits set"
    } else if geometry.in_cluster(entry.offset()) != 0 {
        "is not aligned to a cluster"
    } else if entry.offset() >= file_size && entry.offset() != 0 {
        "points past the end of the file"
    } else {
        return Ok(());
    };
    let reason = format!("L2 table offset of L1 entry {index} {problem}");
    Err(image.invalid("l1_table entry", raw, reason))
}

impl L1Table {
    /// Reads the `count` entries at `offset`, which the header has bounded.
    ///
    /// # Errors
    /// As [`check_entry`].
    pub fn open(image: &ImageFile, geometry: Geometry, offset: u64, count: u32) -> Result<Self> {
        let file_size = image.size()?;
        if count > 0 && offset >= file_size {
            let reason = "the table lies past the end of the file".to_owned();
            return Err(image.invalid("l1_table_offset", offset, reason));
        }
        let words = Words::new((MAX_L1_SIZE / ENTRY_SIZE) as usize);
        // That of a new image is a hole.
        table::for_each(
            &*image.storage,
            &image.path,
            offset,
            count.into(),
            |index, raw| {
                check_entry(image, geometry, file_size, index as usize, raw)?;
                words.make(index as usize).store(raw, Ordering::Relaxed);
                Ok(())
            },
        )?;
        Ok(Self {
            offset: AtomicU64::new(offset),
            size: AtomicU64::new(count.into()),
            entries: words,
            new: Mutex::default(),
        })
    }

    /// The entry at `index`; that of an empty range if there is none.
    #[inline]
    pub fn get(&self, index: usize) -> L1Entry {
        L1Entry(
            self.entries
                .get(index)
                .map_or(0, |e| e.load(Ordering::Acquire)),
        )
    }

    /// Offsets of the L2 tables.
    pub fn tables(&self) -> impl Iterator<Item = u64> + '_ {
        let entries = self
            .entries
            .made()
            .map(|e| L1Entry(e.load(Ordering::Acquire)));
        entries.map(L1Entry::offset).filter(|offset| *offset != 0)
    }

    /// Gives the entry at `index` an L2 table from `make`, unless it has one of its own already.
    /// `make` is told the offset of the one that it shares with snapshots, or 0; a shared one is
    /// returned, and has one user less.
    pub fn own_table(
        &self,
        index: usize,
        make: impl FnOnce(u64) -> Result<u64>,
    ) -> Result<Option<u64>> {
        let mut new = lock(&self.new);
        let old = self.get(index);
        if old.owns_table() {
            return Ok(None);
        }
        let entry = L1Entry::new(make(old.offset())?);
        new.insert(index);
        self.entries.make(index).store(entry.0, Ordering::Release);
        Ok(Some(old.offset()).filter(|offset| *offset != 0))
    }

    /// The entries that are not known to be on disk.
    pub fn new_entries(&self) -> BTreeSet<usize> {
        lock(&self.new).clone()
    }

    /// Writes the entries at `indices`, without waiting for the disk.
    pub fn write(&self, image: &ImageFile, indices: &BTreeSet<usize>) -> Result<()> {
        let offset = self.offset.load(Ordering::Relaxed);
        for index in indices {
            let at = offset + *index as u64 * ENTRY_SIZE;
            image.write_bytes_at(&self.get(*index).0.to_be_bytes(), at)?;
        }
        Ok(())
    }

    /// Offset in bytes and number of entries of the table on disk.
    pub fn place(&self) -> (u64, u64) {
        let size = self.size.load(Ordering::Relaxed);
        (self.offset.load(Ordering::Relaxed), size)
    }

    /// The first `count` entries.
    pub fn entries(&self, count: u64) -> impl Iterator<Item = u64> + '_ {
        (0..count as usize).map(|index| self.get(index).0)
    }

    /// The table on disk has `size` entries at `offset` from now on. Write-back is locked out.
    pub fn moved(&self, offset: u64, size: u64) {
        self.offset.store(offset, Ordering::Relaxed);
        self.size.store(size, Ordering::Relaxed);
    }

    /// The entries at `indices` are on disk.
    pub fn written(&self, indices: &BTreeSet<usize>) {
        lock(&self.new).retain(|index| !indices.contains(index));
    }
}
