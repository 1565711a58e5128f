//! Refcounts of the image file's clusters, and the cluster allocator built on them.
//!
//! Ordering on disk (who holds which promise is told in `flush.rs`): a refcount slice may be
//! written at any time, since a count that is too high is a leak at worst. A new refcount block is
//! linked into the refcount table only after its content is on disk, or the table would name a
//! cluster full of anything.

use std::collections::HashMap;

use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::MAX_REFCOUNT_TABLE_SIZE;
use super::table;
use crate::Result;
use crate::file::ImageFile;

/// Refcounts are 16 bits wide (`refcount_order` 4).
const COUNT_SIZE: u64 = 2;

/// Refcount slices kept in memory, of up to 4 KiB each.
const MAX_SLICES: usize = 64;

/// Offset of `refcount_table_offset` in the header; `refcount_table_clusters` follows it.
const HEADER_TABLE_FIELDS: u64 = 48;

/// Offsets in the image file end here (qcow2 specification, bits 9 to 55 of an entry).
const MAX_FILE_SIZE: u64 = 1 << 56;

/// The refcount structures of a writable image.
pub(crate) struct Refcounts {
    geometry: Geometry,
    table_offset: u64,
    table_clusters: u64,
    /// Offsets of the refcount blocks; 0 where there is none and all counts are zero.
    table: Vec<u64>,
    /// Blocks that `table` names and the table on disk does not yet.
    unlinked: Vec<usize>,
    slices: HashMap<u64, Slice>,
    clock: u64,
    /// Every cluster below this one is in use.
    first_free: u64,
    /// No cluster from this one on has ever been written: they read as zero.
    untouched: u64,
    /// Counts were written to the file since the last [`write_counts`](Self::write_counts).
    written: bool,
}

/// What must happen before a mapping that relies on the counts may be written.
pub(crate) struct Barrier {
    /// The image file must be synced.
    pub sync: bool,
    /// After that, these refcount blocks must be linked, and the image file synced again.
    pub blocks: Vec<usize>,
}

struct Slice {
    counts: Box<[u16]>,
    dirty: bool,
    last_used: u64,
}

/// Clusters handed out by the allocator.
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
    /// Reads the refcount table of `image` at `table_offset`.
    ///
    /// # Errors
    /// An entry that is unaligned or points past the end of the file.
    pub fn open(
        image: &ImageFile,
        geometry: Geometry,
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
            table_offset,
            table_clusters,
            table,
            unlinked: Vec::new(),
            slices: HashMap::new(),
            clock: 0,
            first_free: 0,
            untouched: file_size.div_ceil(geometry.cluster_size()),
            written: false,
        })
    }

    /// Offsets of the refcount blocks.
    pub fn blocks(&self) -> impl Iterator<Item = u64> + '_ {
        self.table.iter().copied().filter(|offset| *offset != 0)
    }

    /// Checks that the clusters of `len` bytes of metadata at `offset` are counted as used: the
    /// allocator would hand them out, and what is there be overwritten.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid), naming `field`, which leads there.
    pub fn check_used(
        &mut self,
        image: &ImageFile,
        field: &'static str,
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let first = self.geometry.cluster(offset);
        for cluster in first..first + len.div_ceil(self.geometry.cluster_size()) {
            if self.count(image, cluster)? == 0 {
                let reason = format!(
                    "cluster {cluster} holds metadata and is counted as free; repair the image \
                     first: qemu-img check -r all"
                );
                return Err(image.invalid(field, offset, reason));
            }
        }
        Ok(())
    }

    /// Takes 1 to `max` free clusters in a row.
    pub fn allocate(&mut self, image: &ImageFile, max: u64) -> Result<Allocation> {
        let first = self.find_free(image)?;
        let per_block = self.counts_per_block();
        let block_end = (first / per_block + 1) * per_block;
        let end = block_end.min(first.saturating_add(max));
        let mut cluster = first;
        while cluster < end {
            let count = self.count_mut(image, cluster)?;
            if *count != 0 {
                break;
            }
            *count = 1;
            cluster += 1;
        }
        self.first_free = cluster;
        let zeroed = first >= self.untouched;
        self.untouched = self.untouched.max(cluster);
        let offset = first << self.geometry.cluster_bits;
        Ok(Allocation {
            offset,
            clusters: cluster - first,
            zeroed,
        })
    }

    /// Whether each of the clusters is used exactly once.
    pub fn are_exclusive(&mut self, image: &ImageFile, offset: u64, clusters: u64) -> Result<bool> {
        let first = self.geometry.cluster(offset);
        for cluster in first..first + clusters {
            if self.count(image, cluster)? != 1 {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Gives back clusters that no mapping on disk refers to, and that are counted.
    pub fn free(&mut self, image: &ImageFile, offset: u64, clusters: u64) -> Result<()> {
        let first = self.geometry.cluster(offset);
        for cluster in first..first + clusters {
            let count = self.count_mut(image, cluster)?;
            *count = count.saturating_sub(1);
            if *count == 0 {
                self.first_free = self.first_free.min(cluster);
            }
        }
        Ok(())
    }

    /// Whether counts have changed that are not in the file.
    pub fn is_dirty(&self) -> bool {
        self.slices.values().any(|slice| slice.dirty)
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

    /// The first free cluster, whose refcount block exists.
    fn find_free(&mut self, image: &ImageFile) -> Result<u64> {
        let mut cluster = self.first_free;
        loop {
            let block = (cluster / self.counts_per_block()) as usize;
            if cluster >= MAX_FILE_SIZE >> self.geometry.cluster_bits {
                return Err(image.invalid("file size", MAX_FILE_SIZE, "the image is full".into()));
            } else if block >= self.table.len() {
                self.grow_table(image)?;
            } else if self.table[block] == 0 {
                self.add_block(image, block, cluster)?;
                cluster += 1;
            } else {
                let per_slice = self.counts_per_slice();
                let index = cluster % per_slice;
                let counts = &self.slice(image, cluster)?.counts[index as usize..];
                match counts.iter().position(|count| *count == 0) {
                    Some(skip) => return Ok(cluster + skip as u64),
                    None => cluster += per_slice - index,
                }
            }
        }
    }

    /// Makes `cluster`, which is free, the refcount block `index`, which covers it.
    fn add_block(&mut self, image: &ImageFile, index: usize, cluster: u64) -> Result<()> {
        let offset = cluster << self.geometry.cluster_bits;
        if cluster < self.untouched {
            image.write_zeroes(offset, self.geometry.cluster_size(), false)?;
        }
        self.table[index] = offset;
        match self.count_mut(image, cluster) {
            Ok(count) => *count = 1,
            Err(e) => {
                // A block that does not count itself would be handed out.
                self.table[index] = 0;
                return Err(e);
            }
        }
        self.unlinked.push(index);
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

        for block in 0..blocks {
            let counts = (0..per_block).map(|i| u16::from(block * per_block + i < used));
            let bytes: Vec<u8> = counts.flat_map(u16::to_be_bytes).collect();
            image.write_bytes_at(&bytes, (first + block) * cluster_size)?;
        }
        let mut table = self.table.clone();
        table.extend((0..blocks).map(|block| (first + block) * cluster_size));
        table.resize((table_clusters * cluster_size / ENTRY_SIZE) as usize, 0);
        let table_offset = (first + blocks) * cluster_size;
        image.write_bytes_at(&table::encode(table.iter().copied()), table_offset)?;
        self.write_dirty(image)?;
        image.sync()?;

        let mut fields = table_offset.to_be_bytes().to_vec();
        fields.extend((table_clusters as u32).to_be_bytes());
        image.write_bytes_at(&fields, HEADER_TABLE_FIELDS)?;
        image.sync()?;

        let (old_offset, old_clusters) = (self.table_offset, self.table_clusters);
        self.table = table;
        self.table_offset = table_offset;
        self.table_clusters = table_clusters;
        self.unlinked.clear();
        self.untouched = self.untouched.max(first + used);
        // The new table serves, whether the old one's clusters come back or are leaked.
        drop(self.free(image, old_offset, old_clusters));
        Ok(())
    }

    fn write_dirty(&mut self, image: &ImageFile) -> Result<()> {
        let dirty: Vec<u64> = self
            .slices
            .iter()
            .filter(|(_, s)| s.dirty)
            .map(|(number, _)| *number)
            .collect();
        dirty
            .into_iter()
            .try_for_each(|number| self.write_slice(image, number))
    }

    fn write_slice(&mut self, image: &ImageFile, number: u64) -> Result<()> {
        let at = self.slice_position(number);
        if let Some(slice) = self.slices.get_mut(&number) {
            let bytes: Vec<u8> = slice.counts.iter().flat_map(|c| c.to_be_bytes()).collect();
            image.write_bytes_at(&bytes, at)?;
            slice.dirty = false;
            self.written = true;
        }
        Ok(())
    }

    /// How often `cluster`, which can be anything, is used.
    fn count(&mut self, image: &ImageFile, cluster: u64) -> Result<u16> {
        let block = (cluster / self.counts_per_block()) as usize;
        if self.table.get(block).is_none_or(|offset| *offset == 0) {
            return Ok(0);
        }
        let index = (cluster % self.counts_per_slice()) as usize;
        Ok(self.slice(image, cluster)?.counts[index])
    }

    fn count_mut(&mut self, image: &ImageFile, cluster: u64) -> Result<&mut u16> {
        let index = (cluster % self.counts_per_slice()) as usize;
        let slice = self.slice(image, cluster)?;
        slice.dirty = true;
        Ok(&mut slice.counts[index])
    }

    /// The slice that counts `cluster`, whose refcount block exists.
    fn slice(&mut self, image: &ImageFile, cluster: u64) -> Result<&mut Slice> {
        let number = cluster / self.counts_per_slice();
        self.clock += 1;
        if !self.slices.contains_key(&number) {
            if self.slices.len() >= MAX_SLICES {
                self.evict(image)?;
            }
            let mut bytes = vec![0; self.geometry.slice_size() as usize];
            image.read_bytes_at(&mut bytes, self.slice_position(number))?;
            let counts = bytes
                .as_chunks()
                .0
                .iter()
                .map(|c| u16::from_be_bytes(*c))
                .collect();
            self.slices.insert(
                number,
                Slice {
                    counts,
                    dirty: false,
                    last_used: 0,
                },
            );
        }
        #[expect(clippy::expect_used, reason = "present or inserted just above")]
        let slice = self.slices.get_mut(&number).expect("cached");
        slice.last_used = self.clock;
        Ok(slice)
    }

    fn evict(&mut self, image: &ImageFile) -> Result<()> {
        let oldest = self
            .slices
            .iter()
            .min_by_key(|(_, s)| s.last_used)
            .map(|(n, s)| (*n, s.dirty));
        if let Some((number, dirty)) = oldest {
            if dirty {
                self.write_slice(image, number)?;
            }
            self.slices.remove(&number);
        }
        Ok(())
    }

    fn slice_position(&self, number: u64) -> u64 {
        let per_block = self.geometry.slices_per_table();
        let block = self.table[(number / per_block) as usize];
        block + number % per_block * self.geometry.slice_size()
    }

    fn counts_per_slice(&self) -> u64 {
        self.geometry.slice_size() / COUNT_SIZE
    }

    fn counts_per_block(&self) -> u64 {
        self.geometry.cluster_size() / COUNT_SIZE
    }
}
