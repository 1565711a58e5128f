//! Refcounts of the image file's clusters; `allocator` hands out those that are free.
//!
//! Ordering on disk (who holds which promise is told in `flush.rs`): a refcount slice may be
//! written at any time, since a count that is too high is a leak at worst. A new refcount block is
//! linked into the refcount table only after its content is on disk, or the table would name a
//! cluster full of anything.

use std::ops::Range;
use std::sync::Arc;

use super::free_map::FreeMap;
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::MAX_OFFSET;
use super::overlap::Filter;
use super::refcount_width::RefcountWidth;
use super::reserved::{Field, Reserved};
use super::table;
use crate::Result;
use crate::file::ImageFile;

/// Refcount slices kept in memory, of up to 4 KiB each.
const MAX_SLICES: usize = 64;

/// The refcount structures of a writable image.
///
/// Of what is free it remembers one bit for each slice of refcounts, that is 1 KiB per TiB of image
/// file in clusters of 64 KiB, and 1 MiB per TiB in clusters of 512 bytes, and one bit for each
/// cluster that a slice in memory counts.
pub(crate) struct Refcounts {
    pub(super) geometry: Geometry,
    pub(super) width: RefcountWidth,
    pub(super) table_offset: u64,
    pub(super) table_clusters: u64,
    /// Offsets of the refcount blocks; 0 where there is none and all counts are zero.
    pub(super) table: Vec<u64>,
    /// Blocks that `table` names and the table on disk does not yet.
    pub(super) unlinked: Vec<usize>,
    /// In no order, and no more than [`MAX_SLICES`].
    slices: Vec<Slice>,
    /// Index of the one that was used last.
    latest: usize,
    clock: u64,
    /// Metadata that must be counted.
    pub(super) reserved: Reserved,
    /// Slices below `examined` that count free clusters.
    pub(super) with_free: FreeMap,
    /// No slice from this one on has been looked at for free clusters.
    pub(super) examined: u64,
    /// No cluster from this one on has ever been written: they read as zero.
    pub(super) untouched: u64,
    /// There are no clusters from this one on.
    pub(super) end: u64,
    /// Counts were written to the file since the last [`write_counts`](Self::write_counts).
    pub(super) written: bool,
    /// Where the last compressed cluster ends, inside a cluster that others can share, in bytes; or
    /// 0. That cluster is in use.
    pub(super) packed_end: u64,
}

/// What must happen before a mapping that relies on the counts may be written.
pub(crate) struct Barrier {
    /// The image file must be synced.
    pub sync: bool,
    /// After that, these refcount blocks must be linked, and the image file synced again.
    pub blocks: Vec<usize>,
}

/// Clusters in a row.
pub(crate) struct Alike {
    pub clusters: u64,
    /// Whether each of them is used exactly once.
    pub exclusive: bool,
}

pub(super) struct Slice {
    number: u64,
    /// As on disk.
    counts: Box<[u8]>,
    /// Indices of those that are zero and whose clusters the file can have.
    pub(super) free: FreeMap,
    dirty: bool,
    last_used: u64,
}

impl Refcounts {
    /// Reads the refcount table of `image` at `table_offset`.
    ///
    /// # Errors
    /// An entry that is unaligned or points past the end of the file.
    pub fn open(
        image: &ImageFile,
        geometry: Geometry,
        width: RefcountWidth,
        table_offset: u64,
        table_clusters: u64,
    ) -> Result<Self> {
        let file_size = image.size()?;
        let count = table_clusters * geometry.cluster_size() / ENTRY_SIZE;
        let table = table::read(image, "refcount_table_offset", table_offset, count as usize)?;
        for (index, &entry) in table.iter().enumerate() {
            if geometry.in_cluster(entry) != 0 || entry >= file_size && entry != 0 {
                let reason = format!("refcount block offset of entry {index} is invalid");
                return Err(image.invalid("refcount_table entry", entry, reason));
            }
        }
        Ok(Self {
            geometry,
            width,
            table_offset,
            table_clusters,
            table,
            unlinked: Vec::new(),
            slices: Vec::new(),
            latest: 0,
            clock: 0,
            reserved: Reserved::new(geometry.cluster_bits, false),
            with_free: FreeMap::default(),
            examined: 0,
            untouched: file_size.div_ceil(geometry.cluster_size()),
            end: geometry.cluster(image.capacity()?.unwrap_or(MAX_OFFSET)),
            written: false,
            packed_end: 0,
        })
    }

    /// Offsets of the refcount blocks.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.table.iter().copied().filter(|offset| *offset != 0)
    }

    /// The first cluster from `cluster` on that a refcount block counts.
    pub(super) fn next_counted(&self, cluster: u64) -> Option<u64> {
        let per_block = self.counts_per_block();
        let first = usize::try_from(cluster / per_block).ok()?;
        let found = self.table.get(first..)?.iter().position(|at| *at != 0)?;
        Some(cluster.max((first + found) as u64 * per_block))
    }

    /// From now on, a slice that counts any of the clusters of `reserved` as free is not used.
    ///
    /// Slices are verified as they are read, so that opening a large image reads few of them: some
    /// here, for a mistake had better be found before the image is in use.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid), naming the field that leads to a cluster that is
    /// counted as free.
    pub fn reserve(&mut self, image: &ImageFile, reserved: Reserved) -> Result<()> {
        self.reserved = reserved;
        let mut first = 0;
        for blocks in self.table.chunk_by(|a, b| (*a == 0) == (*b == 0)) {
            let end = first + blocks.len() as u64 * self.counts_per_block();
            if blocks[0] == 0 {
                self.reserved.check(image, first..end, |_| 0)?;
            }
            first = end;
        }
        self.check_no_more(image)?;
        let mut counts = vec![0; self.geometry.slice_size() as usize];
        let mut next = 0;
        for _ in 0..MAX_SLICES {
            let Some(cluster) = self.reserved.first_from(next) else {
                break;
            };
            let number = cluster / self.counts_per_slice();
            self.read_counts(image, number, &mut counts)?;
            next = (number + 1) * self.counts_per_slice();
        }
        Ok(())
    }

    /// The structure of metadata that `cluster` is a part of.
    pub fn metadata_at(&self, cluster: u64) -> Option<&'static str> {
        self.reserved.structure_at(cluster)
    }

    /// How many references `cluster` has that are those of metadata there, but for one of `but`.
    pub fn metadata_users(&self, cluster: u64, but: Option<Field>) -> u64 {
        self.reserved.users(cluster, but)
    }

    /// How many L2 tables there are, those of snapshots too.
    pub fn l2_tables(&self) -> usize {
        self.reserved.l2_tables()
    }

    /// Contains the clusters of all metadata.
    pub fn metadata(&self) -> Arc<Filter> {
        self.reserved.filter()
    }

    /// Checks that there is no metadata among the clusters that block `index`, which does not
    /// exist, would count.
    pub(super) fn check_no_block(&self, image: &ImageFile, index: u64) -> Result<()> {
        let first = index * self.counts_per_block();
        self.reserved
            .check(image, first..first + self.counts_per_block(), |_| 0)
    }

    /// Checks that there is no metadata behind everything that the refcount table can count.
    pub(super) fn check_no_more(&self, image: &ImageFile) -> Result<()> {
        let first = self.table.len() as u64 * self.counts_per_block();
        self.reserved.check(image, first..u64::MAX, |_| 0)
    }

    /// How many of `range`, at least one, are used exactly once like its first, or more or less often
    /// like it. No compressed cluster is added any more to those that are used once: they are about
    /// to go.
    ///
    /// # Errors
    /// As [`free`](Self::free), or [`free_metadata`](Self::free_metadata) of what `field` led to.
    pub fn run_alike(
        &mut self,
        image: &ImageFile,
        field: Option<Field>,
        range: Range<u64>,
    ) -> Result<Alike> {
        let first = range.start;
        let exclusive = self.count(image, first)? == 1;
        let mut clusters = 0;
        for cluster in range {
            let count = self.count(image, cluster)?;
            if (count == 1) != exclusive {
                break;
            }
            self.check_free(image, field, cluster, count)?;
            clusters += 1;
        }
        if exclusive {
            self.forget_packed(first..first + clusters);
        }
        Ok(Alike {
            clusters,
            exclusive,
        })
    }

    /// Whether counts have changed that are not in the file.
    pub fn is_dirty(&self) -> bool {
        self.slices.iter().any(|slice| slice.dirty)
    }

    /// Writes changed counts to the file, without waiting for the disk.
    pub fn write_counts(&mut self, image: &ImageFile) -> Result<Barrier> {
        self.write_dirty(image)?;
        let sync = std::mem::take(&mut self.written);
        Ok(Barrier {
            sync,
            blocks: self.unlinked.clone(),
        })
    }

    /// Enters `blocks` into the refcount table, except those that have been since.
    pub fn link_blocks(&mut self, image: &ImageFile, blocks: &[usize]) -> Result<()> {
        for &index in blocks {
            if let Some(i) = self.unlinked.iter().position(|u| *u == index) {
                let at = self.table_offset + index as u64 * ENTRY_SIZE;
                image.write_bytes_at(&self.table[index].to_be_bytes(), at)?;
                self.unlinked.swap_remove(i);
            }
        }
        Ok(())
    }

    pub(super) fn write_dirty(&mut self, image: &ImageFile) -> Result<()> {
        (0..self.slices.len()).try_for_each(|index| self.write_slice(image, index))
    }

    /// Writes the slice at `index` in memory to the file, if it has changed.
    fn write_slice(&mut self, image: &ImageFile, index: usize) -> Result<()> {
        if self.slices[index].dirty {
            let at = self.slice_position(self.slices[index].number);
            image.write_bytes_at(&self.slices[index].counts, at)?;
            self.slices[index].dirty = false;
            self.written = true;
        }
        Ok(())
    }

    /// How often `cluster`, which can be anything, is used.
    pub(super) fn count(&mut self, image: &ImageFile, cluster: u64) -> Result<u64> {
        if !self.has_block(cluster) {
            return Ok(0);
        }
        let index = self.index_in_slice(cluster);
        let width = self.width;
        Ok(width.get(&self.slice(image, cluster)?.counts, index))
    }

    /// Whether a refcount block counts `cluster`, which can be anything.
    pub(super) fn has_block(&self, cluster: u64) -> bool {
        let offset = self.table.get(self.block_of(cluster));
        offset.is_some_and(|offset| *offset != 0)
    }

    /// Adds a reference to `cluster`, which can be anything.
    ///
    /// # Errors
    /// As [`check_add`](Self::check_add).
    pub fn add(&mut self, image: &ImageFile, cluster: u64) -> Result<()> {
        let count = self.check_add(image, cluster)?;
        self.set_count(image, cluster, count + 1)
    }

    /// How often `cluster`, which can be anything and get another reference, is used.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for one that is counted as free, and for one that
    /// has as many references as can be counted.
    pub fn check_add(&mut self, image: &ImageFile, cluster: u64) -> Result<u64> {
        let count = self.count(image, cluster)?;
        let offset = cluster << self.geometry.cluster_bits;
        if count == 0 {
            let reason = format!("cluster at {offset:#x} is in use and counted as free");
            return Err(image.invalid("refcount", count, reason));
        }
        if count == self.width.max() {
            let bits = 1 << self.width.order;
            let reason = format!(
                "the refcount of the cluster at {offset:#x} cannot become larger in {bits} bits"
            );
            return Err(image.invalid("refcount", count, reason));
        }
        Ok(count)
    }

    /// Sets the refcount of `cluster`, whose block exists, to one that it can have.
    pub(super) fn set_count(&mut self, image: &ImageFile, cluster: u64, count: u64) -> Result<()> {
        let index = self.index_in_slice(cluster);
        let width = self.width;
        let slice = self.slice(image, cluster)?;
        slice.set_counts(width, index..index + 1, count);
        let number = slice.number;
        if count == 0 && number < self.examined {
            self.with_free.insert(number as usize);
        }
        Ok(())
    }

    /// The slice that counts `cluster`, whose refcount block exists.
    pub(super) fn slice(&mut self, image: &ImageFile, cluster: u64) -> Result<&mut Slice> {
        let number = cluster >> self.slice_bits();
        let is_it = |slice: &Slice| slice.number == number;
        if !self.slices.get(self.latest).is_some_and(is_it) {
            self.latest = match self.slices.iter().position(is_it) {
                Some(index) => index,
                None => self.load(image, number)?,
            };
        }
        self.clock += 1;
        let slice = &mut self.slices[self.latest];
        slice.last_used = self.clock;
        Ok(slice)
    }

    /// Brings slice `number`, whose refcount block exists, into memory. Its index there.
    #[cold]
    fn load(&mut self, image: &ImageFile, number: u64) -> Result<usize> {
        let oldest = (0..self.slices.len()).min_by_key(|index| self.slices[*index].last_used);
        let oldest = oldest.filter(|_| self.slices.len() == MAX_SLICES);
        if let Some(index) = oldest {
            self.write_slice(image, index)?;
        }
        let slice = self.read_slice(image, number)?;
        match oldest {
            Some(index) => self.slices[index] = slice,
            None => self.slices.push(slice),
        }
        Ok(oldest.unwrap_or(self.slices.len() - 1))
    }

    fn read_slice(&self, image: &ImageFile, number: u64) -> Result<Slice> {
        let mut counts = vec![0; self.geometry.slice_size() as usize].into_boxed_slice();
        self.read_counts(image, number, &mut counts)?;
        let first = number << self.slice_bits();
        let room = self.end.saturating_sub(first).min(self.counts_per_slice());
        let used = |index: u64| index >= room || self.width.get(&counts, index as usize) != 0;
        let words = (0..self.counts_per_slice()).step_by(64);
        let word = |start: u64| (0..64).map(|bit| u64::from(used(start + bit)) << bit).sum();
        Ok(Slice {
            number,
            free: FreeMap::complement(words.map(word).collect()),
            counts,
            dirty: false,
            last_used: 0,
        })
    }

    /// Reads slice `number`, whose refcount block exists, and verifies that it counts the metadata.
    fn read_counts(&self, image: &ImageFile, number: u64, counts: &mut [u8]) -> Result<()> {
        image.read_bytes_at(counts, self.slice_position(number))?;
        let first = number * self.counts_per_slice();
        self.reserved
            .check(image, first..first + self.counts_per_slice(), |cluster| {
                self.width.get(counts, (cluster - first) as usize)
            })
    }

    fn slice_position(&self, number: u64) -> u64 {
        let per_block = self.geometry.slices_per_table();
        let block = self.table[(number / per_block) as usize];
        block + number % per_block * self.geometry.slice_size()
    }

    /// Index of the block that counts `cluster`, or would.
    pub(super) fn block_of(&self, cluster: u64) -> usize {
        (cluster >> self.block_bits()) as usize
    }

    /// Index of the count of `cluster` in its slice.
    pub(super) fn index_in_slice(&self, cluster: u64) -> usize {
        (cluster & (self.counts_per_slice() - 1)) as usize
    }

    pub(super) fn counts_per_slice(&self) -> u64 {
        1 << self.slice_bits()
    }

    pub(super) fn counts_per_block(&self) -> u64 {
        1 << self.block_bits()
    }

    /// Counts in a slice, as a power of two.
    fn slice_bits(&self) -> u32 {
        self.width.count_bits(self.geometry.slice_size_bits())
    }

    fn block_bits(&self) -> u32 {
        self.width.count_bits(self.geometry.cluster_bits)
    }
}

impl Slice {
    /// Sets the counts with these indices.
    pub(super) fn set_counts(&mut self, width: RefcountWidth, indices: Range<usize>, count: u64) {
        self.dirty = true;
        for index in indices {
            width.set(&mut self.counts, index, count);
            match count {
                0 => self.free.insert(index),
                _ => self.free.remove(index),
            }
        }
    }
}
