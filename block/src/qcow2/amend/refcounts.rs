//! Refcounts of another width.
//!
//! They are written behind everything that is in use, where a crash leaves them as if they had never
//! been, and count themselves and not the old ones. The header changes from the latter to the former,
//! and to the new width, in one sector.

use std::collections::BTreeSet;
use std::ops::Range;

use crate::file::ImageFile;
use crate::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::qcow2::header::MAX_REFCOUNT_TABLE_SIZE;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::refcount_width::RefcountWidth;
use crate::qcow2::table;
use crate::{Error, Result};

/// Refcounts that are on disk, and to which nothing leads yet.
pub(super) struct NewRefcounts {
    pub table_offset: u64,
    /// Length of the table in clusters.
    pub table_clusters: u32,
    /// What the old ones take, in bytes.
    old: Vec<Range<u64>>,
}

impl NewRefcounts {
    /// Releases the space of the old ones, now that nothing leads there any more.
    pub fn discard_old(&self, image: &ImageFile) -> Result<()> {
        let mut old = self.old.iter();
        old.try_for_each(|range| image.discard(range.start, range.end - range.start))
    }
}

impl Refcounts {
    /// Fails if a refcount is too large for `width`.
    pub(super) fn check_width(&mut self, image: &ImageFile, width: RefcountWidth) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        self.for_each_count(image, |cluster, count| {
            if count <= width.max() {
                return Ok(());
            }
            Err(Error::Option(format!(
                "Cannot decrease refcount entry width to {} bits: Cluster at offset {:#x} has a \
                 refcount of {count}",
                1u64 << width.order,
                cluster << bits,
            )))
        })
    }

    /// Writes refcounts of `width`, all of which have been seen to fit.
    pub(super) fn renew(
        &mut self,
        image: &ImageFile,
        width: RefcountWidth,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<NewRefcounts> {
        let g = self.geometry;
        let mut old: Vec<u64> = self.blocks().map(|offset| g.cluster(offset)).collect();
        let table = g.cluster(self.table_offset);
        old.extend(table..table + self.table_clusters);
        old.sort_unstable();
        let is_old = |cluster: u64| old.binary_search(&cluster).is_ok();

        let mut layout = Layout::new(g, width);
        self.for_each_count(image, |cluster, _| {
            layout.first = cluster + 1;
            if !is_old(cluster) {
                layout.add(cluster);
            }
            Ok(())
        })?;
        layout.make_room()?;
        self.check_room(image, layout.end())?;

        let mut writer = Writer::new(image, &layout);
        let total = layout.first;
        self.for_each_count(image, |cluster, count| {
            if is_old(cluster) {
                return Ok(());
            }
            if writer.set(cluster, count)? {
                progress(cluster, total);
            }
            Ok(())
        })?;
        for cluster in layout.first..layout.end() {
            writer.set(cluster, 1)?;
        }
        writer.finish()?;
        progress(total, total);
        let clusters = |cluster: &u64| cluster << g.cluster_bits..(cluster + 1) << g.cluster_bits;
        Ok(NewRefcounts {
            table_offset: layout.first << g.cluster_bits,
            table_clusters: layout.table_clusters as u32,
            old: old.iter().map(clusters).collect(),
        })
    }

    /// Calls `f` on each cluster that is in use, and its refcount.
    fn for_each_count(
        &mut self,
        image: &ImageFile,
        mut f: impl FnMut(u64, u64) -> Result<()>,
    ) -> Result<()> {
        let per_block = self.counts_per_block();
        for block in 0..self.table.len() as u64 {
            if self.table[block as usize] == 0 {
                continue;
            }
            for cluster in block * per_block..(block + 1) * per_block {
                match self.count(image, cluster)? {
                    0 => {}
                    count => f(cluster, count)?,
                }
            }
        }
        Ok(())
    }
}

/// Where new refcounts are: a table, and the blocks behind it.
struct Layout {
    geometry: Geometry,
    width: RefcountWidth,
    /// First cluster of the table; none from this one on is in use.
    first: u64,
    table_clusters: u64,
    /// Indices of the blocks in the table.
    blocks: BTreeSet<u64>,
}

impl Layout {
    fn new(geometry: Geometry, width: RefcountWidth) -> Self {
        Self {
            geometry,
            width,
            first: 0,
            table_clusters: 0,
            blocks: BTreeSet::new(),
        }
    }

    /// Makes sure that there is a block that counts `cluster`.
    fn add(&mut self, cluster: u64) {
        self.blocks.insert(self.block_of(cluster));
    }

    fn block_of(&self, cluster: u64) -> u64 {
        cluster / self.width.count_in(self.geometry.cluster_size())
    }

    /// Adds blocks that count the table and the blocks.
    fn make_room(&mut self) -> Result<()> {
        loop {
            let last = self.blocks.last().copied().unwrap_or(0);
            let table = (last + 1) * ENTRY_SIZE;
            if table > MAX_REFCOUNT_TABLE_SIZE {
                return Err(Error::Option(
                    "This operation would make the refcount table grow beyond the maximum size \
                     supported by QEMU, aborting"
                        .to_owned(),
                ));
            }
            self.table_clusters = self.geometry.clusters(table);
            let before = self.blocks.len();
            let (first, last) = (self.block_of(self.first), self.block_of(self.end() - 1));
            self.blocks.extend(first..=last);
            if self.blocks.len() == before {
                return Ok(());
            }
        }
    }

    /// End of the blocks.
    fn end(&self) -> u64 {
        self.first + self.table_clusters + self.blocks.len() as u64
    }
}

/// Writes new refcounts in the order of the clusters.
struct Writer<'a> {
    image: &'a ImageFile,
    layout: &'a Layout,
    /// Content of the table.
    table: Vec<u64>,
    /// The block that is being filled, and how many came before it.
    block: Option<u64>,
    done: u64,
    counts: Vec<u8>,
}

impl<'a> Writer<'a> {
    fn new(image: &'a ImageFile, layout: &'a Layout) -> Self {
        let cluster_size = layout.geometry.cluster_size();
        Self {
            image,
            layout,
            table: vec![0; (layout.table_clusters * cluster_size / ENTRY_SIZE) as usize],
            block: None,
            done: 0,
            counts: vec![0; cluster_size as usize],
        }
    }

    /// Sets the refcount of `cluster`, which follows all others; tells whether that began a block.
    fn set(&mut self, cluster: u64, count: u64) -> Result<bool> {
        let width = self.layout.width;
        let block = self.layout.block_of(cluster);
        let begins = self.block != Some(block);
        if begins {
            self.write_block()?;
            self.block = Some(block);
        }
        let first = block * width.count_in(self.layout.geometry.cluster_size());
        width.set(&mut self.counts, (cluster - first) as usize, count);
        Ok(begins)
    }

    fn write_block(&mut self) -> Result<()> {
        let Some(block) = self.block.take() else {
            return Ok(());
        };
        let cluster = self.layout.first + self.layout.table_clusters + self.done;
        let offset = cluster << self.layout.geometry.cluster_bits;
        self.image.write_bytes_at(&self.counts, offset)?;
        self.counts.fill(0);
        self.table[block as usize] = offset;
        self.done += 1;
        Ok(())
    }

    /// Writes what is left, and waits for the disk.
    fn finish(mut self) -> Result<()> {
        self.write_block()?;
        let offset = self.layout.first << self.layout.geometry.cluster_bits;
        let table = table::encode(self.table.iter().copied());
        self.image.write_bytes_at(&table, offset)?;
        self.image.sync()
    }
}
