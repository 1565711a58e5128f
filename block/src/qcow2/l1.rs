//! The active L1 table, kept in memory whole.

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicU64, Ordering};
use std::collections::BTreeMap;

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
    new: Mutex<BTreeMap<usize, OnDisk>>,
}

/// Whether an entry that is being added may be in the L1 table on disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OnDisk {
    /// It has never been written: nothing on disk leads to its L2 table.
    No,
    /// Writing it was begun and not confirmed.
    Maybe,
}

impl L1Table {
    /// Reads the `count` entries at `offset`, which the header has bounded.
    ///
    /// # Errors
    /// An entry with reserved bits set, or an L2 table that is unaligned or past the end of the
    /// file.
    pub fn open(image: &ImageFile, geometry: Geometry, offset: u64, count: u32) -> Result<Self> {
        let file_size = image.size()?;
        let entries = table::read(image, "l1_table_offset", offset, count as usize)?;
        let words = Words::new((MAX_L1_SIZE / ENTRY_SIZE) as usize);
        for (index, &raw) in entries.iter().enumerate() {
            if raw != 0 {
                words.make(index).store(raw, Ordering::Relaxed);
            }
            let entry = L1Entry(raw);
            let problem = if entry.reserved() != 0 {
                "has reserved bits set"
            } else if geometry.in_cluster(entry.offset()) != 0 {
                "is not aligned to a cluster"
            } else if entry.offset() >= file_size && entry.offset() != 0 {
                "points past the end of the file"
            } else {
                continue;
            };
            let reason = format!("L2 table offset of L1 entry {index} {problem}");
            return Err(image.invalid("l1_table entry", raw, reason));
        }
        Ok(Self {
            offset: AtomicU64::new(offset),
            size: AtomicU64::new(count.into()),
            entries: words,
            new: Mutex::default(),
        })
    }

    /// The entry at `index`; that of an empty range if there is none.
    pub fn get(&self, index: usize) -> L1Entry {
        L1Entry(
            self.entries
                .get(index)
                .map_or(0, |e| e.load(Ordering::Acquire)),
        )
    }

    /// Offsets of the L2 tables.
    pub fn tables(&self) -> impl Iterator<Item = u64> + '_ {
        self.entries
            .indices()
            .map(|index| self.get(index).offset())
            .filter(|offset| *offset != 0)
    }

    /// Gives the entry at `index` a new L2 table from `allocate`, unless it has one already.
    pub fn add_table(&self, index: usize, allocate: impl FnOnce() -> Result<u64>) -> Result<()> {
        let mut new = lock(&self.new);
        if self.get(index).offset() == 0 {
            let entry = L1Entry::new(allocate()?);
            new.insert(index, OnDisk::No);
            self.entries.make(index).store(entry.0, Ordering::Release);
        }
        Ok(())
    }

    /// The entries that are not known to be on disk.
    pub fn new_entries(&self) -> BTreeMap<usize, OnDisk> {
        lock(&self.new).clone()
    }

    /// Writes `indices`, without waiting for the disk.
    pub fn write(
        &self,
        image: &ImageFile,
        indices: impl Iterator<Item = usize> + Clone,
    ) -> Result<()> {
        {
            let mut new = lock(&self.new);
            new.extend(indices.clone().map(|index| (index, OnDisk::Maybe)));
        }
        let offset = self.offset.load(Ordering::Relaxed);
        for index in indices {
            let at = offset + index as u64 * ENTRY_SIZE;
            image.write_bytes_at(&self.get(index).0.to_be_bytes(), at)?;
        }
        Ok(())
    }

    /// Offset in bytes and number of entries of the table on disk.
    pub fn place(&self) -> (u64, u64) {
        let size = self.size.load(Ordering::Relaxed);
        (self.offset.load(Ordering::Relaxed), size)
    }

    /// The first `count` entries as they may be on disk now: without those that lead to L2 tables
    /// of which nothing may be there yet.
    pub fn on_disk(&self, count: u64) -> Vec<u64> {
        let new = lock(&self.new);
        (0..count as usize)
            .map(|index| match new.get(&index) {
                Some(OnDisk::No) => 0,
                _ => self.get(index).0,
            })
            .collect()
    }

    /// The table on disk has `size` entries at `offset` from now on. Write-back is locked out.
    pub fn moved(&self, offset: u64, size: u64) {
        self.offset.store(offset, Ordering::Relaxed);
        self.size.store(size, Ordering::Relaxed);
    }

    /// `indices` are on disk.
    pub fn written(&self, indices: impl Iterator<Item = usize>) {
        let mut new = lock(&self.new);
        indices.for_each(|index| {
            new.remove(&index);
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FileStorage;
    use std::path::Path;

    /// A table that moves while another thread adds L2 tables must not lead to them: what maps
    /// there is written before its data is synced, since nothing leads there.
    #[test]
    fn a_table_that_moves_leaves_out_new_entries() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4096).unwrap();
        let storage = FileStorage::new(file).unwrap();
        let image = ImageFile::new(Box::new(storage), Path::new("image"));
        let l1 = L1Table::open(&image, Geometry { cluster_bits: 9 }, 512, 8).unwrap();
        l1.add_table(3, || Ok(1024)).unwrap();
        assert_eq!(l1.on_disk(8), [0; 8]);
        assert_eq!(l1.new_entries(), [(3, OnDisk::No)].into());
        l1.write(&image, [3].into_iter()).unwrap();
        let entry = L1Entry::new(1024).0;
        assert_eq!(l1.on_disk(8), [0, 0, 0, entry, 0, 0, 0, 0]);
    }
}
