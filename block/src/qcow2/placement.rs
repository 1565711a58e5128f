//! Where guest data lies: in the image file, in an external data file, or in a raw data file.

use crate::sync::Mutex;
use crate::sync::atomic::Ordering;
use std::collections::HashMap;
use std::ops::{Range, RangeInclusive};
use std::path::PathBuf;

use super::geometry::ENTRY_SIZE;
use super::header::MAX_L1_SIZE;
use super::mapping::{Kind, Run};
use super::packed::Packed;
use super::words::Words;
use super::{DataFileLayout, Qcow2};
use crate::file::ImageFile;
use crate::hole::KnownHole;
use crate::sync::lock;
use crate::{Disk, Result};

/// How guest clusters find their place.
pub(crate) enum Placement {
    /// In the image file, where the cluster allocator puts them.
    Internal,
    /// In an external data file, each at its guest offset.
    External(External),
    /// As `External`, and the data file is a faithful raw image of the disk (`data_file_raw`).
    Raw(External, Passthrough),
    /// In an external data file, where its cluster allocator puts them.
    Packed(Packed),
}

impl Placement {
    /// The layout of the data file, if there is one.
    pub fn data_file_layout(&self) -> Option<DataFileLayout> {
        match self {
            Self::Internal => None,
            Self::External(_) | Self::Raw(..) => Some(DataFileLayout::Standard),
            Self::Packed(_) => Some(DataFileLayout::Packed),
        }
    }
}

/// An external data file in which every guest cluster lies at its guest offset.
pub(crate) struct External {
    pub file: ImageFile,
    /// A range in which every cluster is a hole of the file or mapped, if one is known: clusters
    /// that become mapped in it need not be cleared first. It stays true as long as what is
    /// written is mapped, and nothing is unmapped; else it must be forgotten.
    hole: KnownHole,
}

impl External {
    pub fn new(file: ImageFile) -> Self {
        Self {
            file,
            hole: KnownHole::default(),
        }
    }

    /// Whether `range` of the data file is known to read as zero.
    pub fn reads_zero(&self, range: Range<u64>) -> Result<bool> {
        self.hole.covers(&self.file, range)
    }

    /// Something was written that did not become mapped.
    pub fn forget_hole(&self) {
        self.hole.forget();
    }
}

/// A set of L2 tables. Who finds a table in it finds the data behind its mapping, as who reads an L2
/// entry does: acquired in [`contains`](Self::contains), released in [`insert`](Self::insert).
struct TableSet(Words);

impl TableSet {
    fn new() -> Self {
        Self(Words::new((MAX_L1_SIZE / ENTRY_SIZE) as usize / 64))
    }

    fn contains(&self, table: usize) -> bool {
        self.0
            .get(table / 64)
            .is_some_and(|word| word.load(Ordering::Acquire) & 1 << (table % 64) != 0)
    }

    fn insert(&self, table: usize) {
        let word = self.0.make(table / 64);
        word.fetch_or(1 << (table % 64), Ordering::Release);
    }

    fn remove(&self, table: usize) {
        if let Some(word) = self.0.get(table / 64) {
            word.fetch_and(!(1 << (table % 64)), Ordering::Relaxed);
        }
    }
}

/// Which parts of a raw disk need no look at the metadata.
///
/// Once every cluster of an L2 table has been seen to be mapped at its own offset, nothing that
/// Tandem does changes that but cutting off the disk's end, and requests in its range go to the data
/// file as they are.
pub(crate) struct Passthrough {
    /// Seen to be complete.
    complete: TableSet,
    /// Looked at.
    examined: TableSet,
    /// Tables that were seen to be incomplete: how many clusters, or subclusters, are missing.
    incomplete: Mutex<HashMap<usize, u64>>,
}

impl Passthrough {
    /// Nothing has been looked at.
    pub fn new() -> Self {
        Self {
            complete: TableSet::new(),
            examined: TableSet::new(),
            incomplete: Mutex::default(),
        }
    }

    /// Whether `table` has been seen to be complete.
    pub fn is_complete(&self, table: usize) -> bool {
        self.complete.contains(table)
    }

    /// Looks at `table` once, with `count_missing`, and remembers whether it is complete.
    pub fn examine(&self, table: usize, count_missing: impl FnOnce() -> Result<u64>) -> Result<()> {
        if self.examined.contains(table) {
            return Ok(());
        }
        // The lock keeps mappings from being added while they are counted.
        let mut incomplete = lock(&self.incomplete);
        if !self.examined.contains(table) {
            match count_missing()? {
                0 => self.complete.insert(table),
                missing => drop(incomplete.insert(table, missing)),
            }
            self.examined.insert(table);
        }
        Ok(())
    }

    /// What has been seen of `tables` does not hold any more: the disk ends there now.
    pub fn forget(&self, tables: Range<usize>) {
        let mut incomplete = lock(&self.incomplete);
        for table in tables {
            self.complete.remove(table);
            self.examined.remove(table);
            incomplete.remove(&table);
        }
    }

    /// Runs `publish`, which maps `clusters` more clusters, or subclusters, of `table`.
    pub fn add_mapped(
        &self,
        table: usize,
        clusters: u64,
        publish: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let mut incomplete = lock(&self.incomplete);
        publish()?;
        if let Some(missing) = incomplete.get_mut(&table) {
            match missing.checked_sub(clusters) {
                Some(0) => {
                    incomplete.remove(&table);
                    self.complete.insert(table);
                }
                Some(rest) => *missing = rest,
                // More than were missing: the count is not worth anything.
                None => {
                    incomplete.remove(&table);
                    self.examined.remove(table);
                }
            }
        }
        Ok(())
    }
}

/// The external data file of an open image.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DataFile {
    /// Where it was found.
    pub path: PathBuf,
    /// How guest data lies in it.
    pub layout: DataFileLayout,
    /// Whether it is a faithful raw image of the disk (`data_file_raw`).
    pub is_raw: bool,
}

impl Qcow2 {
    /// The external data file, if there is one.
    pub fn data_file(&self) -> Option<DataFile> {
        let file = match &self.placement {
            Placement::Internal => return None,
            Placement::External(external) | Placement::Raw(external, _) => &external.file,
            Placement::Packed(packed) => &packed.file,
        };
        Some(DataFile {
            path: file.path.clone(),
            layout: self.placement.data_file_layout()?,
            is_raw: matches!(self.placement, Placement::Raw(..)),
        })
    }

    /// The data file, if the bytes of the range lie there at their guest offset, every one of
    /// them, and always will. The range lies within the disk.
    #[inline(always)]
    pub(super) fn passthrough(&self, offset: u64, len: u64) -> Result<Option<&ImageFile>> {
        let Placement::Raw(external, tables) = &self.placement else {
            return Ok(None);
        };
        if len == 0 {
            return Ok(None);
        }
        let g = self.geometry;
        let first = g.l1_index(g.cluster(offset));
        let last = g.l1_index(g.cluster(offset + len - 1));
        if first == last && tables.is_complete(first) || self.examine_all(first..=last, tables)? {
            return Ok(Some(&external.file));
        }
        Ok(None)
    }

    /// Whether all of `range` are complete; those that have not been looked at are.
    #[inline(never)]
    fn examine_all(&self, range: RangeInclusive<usize>, tables: &Passthrough) -> Result<bool> {
        for table in range {
            if !tables.is_complete(table) {
                self.examine(table, tables)?;
                if !tables.is_complete(table) {
                    return Ok(false);
                }
            }
        }
        Ok(true)
    }

    /// Looks at a table of a raw disk, the first time that it is asked for.
    fn examine(&self, table: usize, tables: &Passthrough) -> Result<()> {
        let g = self.geometry;
        tables.examine(table, || {
            let table_size = g.l2_entries() * g.cluster_size();
            let mut at = table as u64 * table_size;
            // All of the cluster that the disk ends in: what it has when the disk grows is mapped by then,
            // but for subclusters of this one.
            let size = self.size().next_multiple_of(g.cluster_size());
            let end = size.min(at + table_size);
            let mut missing = 0;
            while at < end {
                at += match self.look(at, end - at)? {
                    Ok(Run {
                        kind: Kind::Data(_),
                        len,
                    }) => len,
                    Ok(run) => {
                        missing += run.len.div_ceil(g.grain_size());
                        run.len
                    }
                    // It fails the requests that meet it, not those around it.
                    Err(_) => {
                        missing += g.cluster_size() / g.grain_size();
                        g.cluster_size()
                    }
                };
            }
            Ok(missing)
        })
    }
}
