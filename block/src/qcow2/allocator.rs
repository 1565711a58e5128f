//! The cluster allocator of the image file.
//!
//! Free clusters are those that the refcounts count as such. The lowest ones are handed out first,
//! so the file grows only when there are none inside it; which slices of refcounts have some is
//! remembered, so that looking for them costs the same however large and full the image is.

use std::ops::Range;

use super::geometry::ENTRY_SIZE;
use super::header::MAX_REFCOUNT_TABLE_SIZE;
use super::parse::offset;
use super::refcount::Refcounts;
use super::reserved::Field;
use super::table;
use crate::Result;
use crate::file::ImageFile;

/// Rows that are tried before one is made at the end of the file.
const ROW_ATTEMPTS: usize = 4;

/// Clusters handed out by an allocator.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Allocation {
    /// Offset of the first one in bytes.
    pub offset: u64,
    /// How many, one behind the other; at least one.
    pub clusters: u64,
    /// Whether they are known to read as zero.
    pub zeroed: bool,
}

impl Refcounts {
    /// Takes 1 to `max` free clusters in a row: those from offset `goal` on, if the first of them
    /// is free and inside the file, else the first that are.
    ///
    /// # Errors
    /// No space left on a device; a refcount slice that counts metadata as free; I/O.
    pub fn allocate(
        &mut self,
        image: &ImageFile,
        goal: Option<u64>,
        max: u64,
    ) -> Result<Allocation> {
        let goal = goal.map(|offset| self.geometry.cluster(offset));
        let (first, clusters) = match goal {
            Some(cluster) if self.is_hole(image, cluster)? => {
                let index = self.index_in_slice(cluster);
                let slice = self.slice(image, cluster)?;
                (cluster, slice.free.run_length(index, max))
            }
            _ => self.find_free(image, max)?,
        };
        let end = first + clusters as u64;
        let (width, index) = (self.width, self.index_in_slice(first));
        self.slice(image, first)?
            .set_counts(width, index..index + clusters, 1);
        let zeroed = first >= self.untouched;
        self.untouched = self.untouched.max(end);
        Ok(Allocation {
            offset: first << self.geometry.cluster_bits,
            clusters: end - first,
            zeroed,
        })
    }

    /// Takes `len` bytes for a compressed cluster, less than a cluster has, behind the one before
    /// where possible, and returns their offset. Each cluster that they lie in has one more user.
    ///
    /// # Errors
    /// As [`allocate`](Self::allocate).
    pub fn allocate_packed(&mut self, image: &ImageFile, len: u64) -> Result<u64> {
        let end = self.packed_end;
        let shared = self.geometry.cluster(end);
        let room = end.next_multiple_of(self.geometry.cluster_size()) - end;
        let can_share = end != 0 && self.count(image, shared)? < self.width.max();
        let offset = if can_share && len <= room {
            self.add(image, shared)?;
            end
        } else {
            let next = can_share.then_some(end + room);
            let place = self.allocate(image, next, 1)?;
            if next == Some(place.offset) {
                if let Err(e) = self.add(image, shared) {
                    self.free(image, place.offset, 1)?;
                    return Err(e);
                }
                end
            } else {
                place.offset
            }
        };
        let end = offset + len;
        let is_full = self.geometry.in_cluster(end) == 0;
        self.packed_end = if is_full { 0 } else { end };
        Ok(offset)
    }

    /// The compressed cluster that is written next goes to none of `clusters`.
    pub(super) fn forget_packed(&mut self, clusters: Range<u64>) {
        if clusters.contains(&self.geometry.cluster(self.packed_end)) {
            self.packed_end = 0;
        }
    }

    /// Takes `count` free clusters in a row for what `field` will lead to, and returns the offset
    /// of the first.
    pub fn allocate_metadata(
        &mut self,
        image: &ImageFile,
        field: Field,
        count: u64,
    ) -> Result<Allocation> {
        let place = self.allocate_row(image, count)?;
        let first = self.geometry.cluster(place.offset);
        self.reserved.insert(field, first, count);
        Ok(place)
    }

    fn allocate_row(&mut self, image: &ImageFile, count: u64) -> Result<Allocation> {
        let mut short: Vec<Allocation> = Vec::new();
        let mut found = None;
        while found.is_none() && short.len() < ROW_ATTEMPTS {
            match self.allocate(image, None, count) {
                Ok(place) if place.clusters == count => found = Some(Ok(place)),
                Ok(place) => short.push(place),
                Err(e) => found = Some(Err(e)),
            }
        }
        for place in short {
            self.free(image, place.offset, place.clusters)?;
        }
        found.unwrap_or_else(|| self.append(image, count))
    }

    /// Takes `count` clusters behind everything that refcount blocks cover, with new blocks for
    /// them.
    fn append(&mut self, image: &ImageFile, count: u64) -> Result<Allocation> {
        let per_block = self.counts_per_block();
        let new_blocks = count.div_ceil(per_block - 1);
        let used = new_blocks + count;
        let mut first_block;
        loop {
            let last = self.table.iter().rposition(|offset| *offset != 0);
            first_block = last.map_or(0, |last| last as u64 + 1);
            if first_block + new_blocks <= self.table.len() as u64 {
                break;
            }
            self.grow_table(image)?;
        }
        let first = first_block * per_block;
        self.check_room(image, first + used)?;
        for block in 0..new_blocks {
            self.check_no_block(image, first_block + block)?;
        }
        self.write_blocks(image, first, new_blocks, used)?;
        self.written = true;
        for block in 0..new_blocks {
            let index = (first_block + block) as usize;
            self.table[index] = (first + block) << self.geometry.cluster_bits;
            self.unlinked.push(index);
        }
        self.reserved
            .insert(Field::RefcountBlock, first, new_blocks);
        let zeroed = first >= self.untouched;
        self.untouched = self.untouched.max(first + used);
        Ok(Allocation {
            offset: (first + new_blocks) << self.geometry.cluster_bits,
            clusters: count,
            zeroed,
        })
    }

    /// Writes `count` refcount blocks to the clusters from `first` on, the first that they cover,
    /// of which `used` are in use.
    fn write_blocks(&self, image: &ImageFile, first: u64, count: u64, used: u64) -> Result<()> {
        let per_block = self.counts_per_block();
        for block in 0..count {
            let mut bytes = vec![0; self.geometry.cluster_size() as usize];
            for index in 0..used.saturating_sub(block * per_block).min(per_block) {
                self.width.set(&mut bytes, index as usize, 1);
            }
            image.write_bytes_at(&bytes, (first + block) << self.geometry.cluster_bits)?;
        }
        Ok(())
    }

    /// Gives back clusters that no mapping on disk refers to. Those that are not counted stay so.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a cluster of metadata whose references are its
    /// own.
    pub fn free(&mut self, image: &ImageFile, offset: u64, clusters: u64) -> Result<()> {
        self.take_references(image, None, offset, clusters)
    }

    /// Gives back clusters that `field` led to.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for a cluster that other metadata is in.
    pub fn free_metadata(
        &mut self,
        image: &ImageFile,
        field: Field,
        offset: u64,
        clusters: u64,
    ) -> Result<()> {
        self.take_references(image, Some(field), offset, clusters)
    }

    /// Takes a reference from each of the clusters, which was one of `field` or, without that, of
    /// data.
    pub(super) fn take_references(
        &mut self,
        image: &ImageFile,
        field: Option<Field>,
        offset: u64,
        clusters: u64,
    ) -> Result<()> {
        let first = self.geometry.cluster(offset);
        for cluster in first..first + clusters {
            let count = self.count(image, cluster)?;
            self.check_free(image, field, cluster, count)?;
            if count == 0 {
                continue;
            }
            self.set_count(image, cluster, count - 1)?;
            if let Some(field) = field {
                self.reserved.release(field, cluster);
            }
            if count == 1 {
                self.forget_packed(cluster..cluster + 1);
            }
        }
        Ok(())
    }

    /// Checks that the metadata at `cluster`, which is counted `count` times, keeps its references
    /// when that of `field` or, without that, one of data goes.
    pub(super) fn check_free(
        &self,
        image: &ImageFile,
        field: Option<Field>,
        cluster: u64,
        count: u64,
    ) -> Result<()> {
        let needed = self.reserved.users(cluster, field);
        if needed == 0 || count > needed {
            return Ok(());
        }
        let structure = self.reserved.structure_at(cluster).unwrap_or_default();
        let reason = format!("Preventing invalid release of {structure}");
        let offset = cluster << self.geometry.cluster_bits;
        Err(image.invalid("refcount", offset, reason))
    }

    /// Whether `cluster` is free and lies between others that have been in use.
    fn is_hole(&mut self, image: &ImageFile, cluster: u64) -> Result<bool> {
        let is_inside = cluster < self.untouched.min(self.end);
        Ok(is_inside && self.has_block(cluster) && self.count(image, cluster)? == 0)
    }

    /// Up to `max` free clusters, counted by the first slice that counts any: the first of them,
    /// and how many there are in a row.
    fn find_free(&mut self, image: &ImageFile, max: u64) -> Result<(u64, usize)> {
        loop {
            let number = match self.with_free.first_from(0) {
                Some(number) => number as u64,
                None => self.examined,
            };
            let first = number * self.counts_per_slice();
            self.check_room(image, first + 1)?;
            let block = self.block_of(first);
            if block >= self.table.len() {
                self.grow_table(image)?;
                continue;
            }
            if self.table[block] == 0 {
                self.add_block(image, block)?;
            }
            let run = self.slice(image, first)?.free.run(max);
            if number == self.examined {
                self.examined += 1;
                self.with_free.insert(number as usize);
            }
            match run {
                Some(run) => return Ok((first + run.start as u64, run.len())),
                None => self.with_free.remove(number as usize),
            }
        }
    }

    /// Checks that the file can have the clusters below `end`.
    pub(super) fn check_room(&self, image: &ImageFile, end: u64) -> Result<()> {
        if end > self.end {
            return Err(image.full());
        }
        Ok(())
    }

    /// Makes the first of the clusters that refcount block `index` would count that block. None of
    /// them is in use.
    fn add_block(&mut self, image: &ImageFile, index: usize) -> Result<()> {
        self.check_no_block(image, index as u64)?;
        let cluster = index as u64 * self.counts_per_block();
        let offset = cluster << self.geometry.cluster_bits;
        if cluster < self.untouched {
            image.write_zeroes(offset, self.geometry.cluster_size(), false)?;
        }
        self.table[index] = offset;
        if let Err(e) = self.set_count(image, cluster, 1) {
            // A block that does not count itself would be handed out.
            self.table[index] = 0;
            return Err(e);
        }
        self.unlinked.push(index);
        self.reserved.insert(Field::RefcountBlock, cluster, 1);
        self.untouched = self.untouched.max(cluster + 1);
        Ok(())
    }

    /// Moves the refcount table to a larger one, behind everything that the old one covers.
    ///
    /// The header changes to it in one write, after the new table and all blocks that it names are
    /// on disk, and the old one is given back only after that.
    fn grow_table(&mut self, image: &ImageFile) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let per_block = self.counts_per_block();
        let first_block = self.table.len();
        let first = first_block as u64 * per_block;
        let table_clusters = self.table_clusters * 2;
        if table_clusters * cluster_size > MAX_REFCOUNT_TABLE_SIZE {
            let reason = "the refcount table cannot grow further".to_owned();
            return Err(image.invalid("refcount_table_clusters", self.table_clusters, reason));
        }
        // New blocks cover themselves and the new table, which lies behind them.
        let blocks = table_clusters.div_ceil(per_block - 1);
        let used = blocks + table_clusters;
        self.check_no_more(image)?;
        self.check_room(image, first + used)?;

        self.write_blocks(image, first, blocks, used)?;
        let mut table = self.table.clone();
        table.extend((0..blocks).map(|block| (first + block) * cluster_size));
        table.resize((table_clusters * cluster_size / ENTRY_SIZE) as usize, 0);
        let table_offset = (first + blocks) * cluster_size;
        image.write_bytes_at(&table::encode(table.iter().copied()), table_offset)?;
        self.write_dirty(image)?;
        image.sync()?;

        let mut fields = table_offset.to_be_bytes().to_vec();
        fields.extend((table_clusters as u32).to_be_bytes());
        image.write_bytes_at(&fields, offset::REFCOUNT_TABLE)?;
        image.sync()?;

        let (old_offset, old_clusters) = (self.table_offset, self.table_clusters);
        self.table = table;
        self.table_offset = table_offset;
        self.table_clusters = table_clusters;
        self.unlinked.clear();
        self.reserved.insert(Field::RefcountBlock, first, blocks);
        let table = first + blocks;
        self.reserved
            .insert(Field::RefcountTable, table, table_clusters);
        self.untouched = self.untouched.max(first + used);
        // The new table serves, whether the old one's clusters come back or are leaked.
        let field = Field::RefcountTable;
        drop(self.free_metadata(image, field, old_offset, old_clusters));
        Ok(())
    }
}
