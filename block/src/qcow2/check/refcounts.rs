//! Comparing the refcounts of an image with the references to its clusters, and writing the right
//! ones.

use std::cmp::Ordering;

use super::counters::Counters;
use super::{Check, FindingKind, Repair};
use crate::qcow2::header::MAX_REFCOUNT_TABLE_SIZE;
use crate::qcow2::parse::offset;
use crate::qcow2::table;
use crate::{Error, Result};

impl Check<'_> {
    pub(super) fn compare_refcounts(&mut self) -> Result<()> {
        self.read_refcounts()?;
        self.rebuild |= self.is_block_missing();
        // All that is wrong is told first, and then what is done about it.
        let is_right = self.compare_all(true);
        if !is_right {
            self.compare_all(false);
        }
        self.is_used_once = is_right && !self.is_shared && !self.dangling && !self.rebuild;
        self.report.image_end_offset = (self.last_used() + 1) << self.geometry.cluster_bits;
        match (self.repair, self.rebuild) {
            (Repair::Nothing, _) => Ok(()),
            (Repair::All, true) if self.rebuilds() => self.rebuild_refcounts(),
            (_, true) => Ok(()),
            (Repair::Leaks, false) => self.write_refcounts(u64::min),
            (Repair::All, false) => {
                // Too high is a leak at worst.
                self.write_refcounts(u64::max)?;
                self.write_refcounts(u64::min)
            }
        }
    }

    /// Tells of all refcounts that are wrong, and returns whether none is: the first time what is wrong,
    /// the second time of its repair.
    fn compare_all(&mut self, is_first: bool) -> bool {
        let mut is_right = true;
        for first in (0..self.clusters).step_by(self.refcounts_per_block() as usize) {
            let end = self.clusters.min(first + self.refcounts_per_block());
            if self.refcounts.agree(&self.references, first..end) {
                continue;
            }
            let is_told = self.refcount_block_of(first).is_some() || self.rebuilds();
            for cluster in first..end {
                let refcount = self.refcounts.get(cluster);
                let references = self.references_to(cluster);
                if refcount != references {
                    is_right = false;
                    if is_told {
                        self.compare(cluster, refcount, references, is_first);
                    }
                }
            }
        }
        is_right
    }

    /// The last cluster that is in use; 0 if there is none.
    fn last_used(&self) -> u64 {
        let is_used = |cluster: &u64| {
            let is_read = self.refcount_block_of(*cluster).is_some();
            is_read && (self.refcounts.get(*cluster) > 0 || self.references.get(*cluster) > 0)
        };
        (0..self.clusters).rev().find(is_used).unwrap_or(0)
    }

    /// References to `cluster`, as far as a refcount can tell.
    fn references_to(&self, cluster: u64) -> u64 {
        let max = self.header.refcount_width().max();
        self.references.get(cluster).min(max)
    }

    /// Reads all refcounts that the image has.
    fn read_refcounts(&mut self) -> Result<()> {
        let per_block = self.refcounts_per_block();
        let width = self.header.refcount_width();
        let mut block = vec![0; self.geometry.cluster_size() as usize];
        for index in 0..self.clusters.div_ceil(per_block) {
            let first = index * per_block;
            let end = self.clusters.min(first + per_block);
            match self.refcount_block_of(first) {
                Some(0) => {}
                Some(offset) => {
                    self.files.read(&mut block, offset)?;
                    let len = width.bytes_for(end - first);
                    self.refcounts.set_block(first, &block[..len as usize]);
                }
                None if self.rebuilds() => self.rebuild = true,
                None => (first..end).for_each(|cluster| {
                    let text =
                        format!("Can't get refcount for cluster {cluster}: Input/output error");
                    self.report(FindingKind::CheckError, text);
                }),
            }
            self.step();
        }
        Ok(())
    }

    /// Whether a cluster is in use that no block counts.
    fn is_block_missing(&self) -> bool {
        let per_block = self.refcounts_per_block();
        (0..self.clusters.div_ceil(per_block)).any(|index| {
            let first = index * per_block;
            let end = self.clusters.min(first + per_block);
            self.refcount_block_of(first) == Some(0)
                && (first..end).any(|cluster| self.references.get(cluster) > 0)
        })
    }

    /// Tells of a refcount that is wrong: the first time what is wrong, the second time of its repair.
    fn compare(&mut self, cluster: u64, refcount: u64, references: u64, is_first: bool) {
        let repairs = match (self.repair, self.rebuild) {
            (Repair::Nothing, _) | (Repair::Leaks, true) => false,
            (Repair::Leaks, false) => refcount > references,
            (Repair::All, rebuild) => !rebuild || self.rebuilds(),
        };
        let (kind, word) = match refcount.cmp(&references) {
            Ordering::Less => (FindingKind::Corruption, "ERROR"),
            _ => (FindingKind::Leak, "Leaked"),
        };
        let text =
            |word| format!("{word} cluster {cluster} refcount={refcount} reference={references}");
        let twice = repairs || self.repair != Repair::Nothing && !self.rebuild;
        match (is_first, repairs, kind) {
            (true, ..) if twice => self.report(FindingKind::Repairable, text(word)),
            (true, _, kind) => self.report(kind, text(word)),
            (false, true, FindingKind::Leak) => self.repair_leak(text("Repairing")),
            (false, true, _) => self.report(FindingKind::Repaired, text("Repairing")),
            (false, false, kind) if twice => self.report(kind, text(word)),
            (false, false, _) => {}
        }
    }

    fn repair_leak(&mut self, text: String) {
        self.report(FindingKind::Repaired, text);
        self.report.corruptions_fixed -= 1;
        self.report.leaks_fixed += 1;
    }

    /// Replaces each refcount that has a block by what `choose` makes of it and the number of
    /// references, and waits until the disk has them.
    fn write_refcounts(&mut self, choose: fn(u64, u64) -> u64) -> Result<()> {
        let per_block = self.refcounts_per_block();
        let width = self.header.refcount_width();
        for first in (0..self.clusters).step_by(per_block as usize) {
            let end = self.clusters.min(first + per_block);
            let changes = |cluster| {
                let refcount = self.refcounts.get(cluster);
                choose(refcount, self.references_to(cluster)) != refcount
            };
            let Some(offset) = self.refcount_block_of(first).filter(|offset| *offset != 0) else {
                continue;
            };
            if !(first..end).any(changes) {
                continue;
            }
            let mut block = self.read_block(offset)?;
            for cluster in first..end {
                let refcount = self.refcounts.get(cluster);
                let new = choose(refcount, self.references_to(cluster));
                width.set(&mut block, (cluster - first) as usize, new);
                self.refcounts.set(cluster, new);
            }
            self.files.write(&block, offset)?;
        }
        self.files.sync()
    }

    /// Writes new refcount structures, for all references but those to the old ones, behind the end
    /// of the file, and then the header that leads there.
    fn rebuild_refcounts(&mut self) -> Result<()> {
        let g = self.geometry;
        self.forget_old_structures();
        let first = self.clusters.max(g.clusters(self.file_len));
        let (blocks, table_clusters) = self.place_structures(first)?;
        let table_first = first + blocks.len() as u64;
        let end = table_first + table_clusters;
        let capacity = self.files.image.capacity();
        let capacity = capacity.map_err(|e| Error::io(self.files.path, "get the size of", e))?;
        if capacity.is_some_and(|capacity| end << g.cluster_bits > capacity) {
            let source = std::io::Error::from_raw_os_error(libc::ENOSPC);
            return Err(Error::io(
                self.files.path,
                "rebuild the refcounts of",
                source,
            ));
        }
        (first..end).for_each(|cluster| self.references.set(cluster, 1));
        self.other_metadata.extend(first..end);
        self.clusters = end;

        let per_block = self.refcounts_per_block();
        let width = self.header.refcount_width();
        let mut table = vec![0; (table_clusters * g.l2_words()) as usize];
        self.refcounts = Counters::new(width);
        for (k, index) in (0..).zip(blocks) {
            let mut block = vec![0; g.cluster_size() as usize];
            for i in 0..per_block {
                let cluster = index * per_block + i;
                let references = self.references_to(cluster);
                width.set(&mut block, i as usize, references);
                self.refcounts.set(cluster, references);
            }
            let offset = (first + k) << g.cluster_bits;
            table[index as usize] = offset;
            self.files.write(&block, offset)?;
        }
        let table_offset = table_first << g.cluster_bits;
        self.files
            .write(&table::encode(table.iter().copied()), table_offset)?;
        self.files.sync()?;
        let mut fields = table_offset.to_be_bytes().to_vec();
        fields.extend((table_clusters as u32).to_be_bytes());
        self.files.write(&fields, offset::REFCOUNT_TABLE)?;
        self.files.sync()?;
        self.refcount_table = table;
        self.rebuild = false;
        self.report.image_end_offset = end << g.cluster_bits;
        Ok(())
    }

    /// Takes back the references to the refcount structures that the image has.
    fn forget_old_structures(&mut self) {
        let first = self.cluster_of(self.header.refcount_table_offset);
        let table = first..first + u64::from(self.header.refcount_table_clusters);
        let blocks = std::mem::take(&mut self.blocks);
        let blocks = blocks.iter().map(|offset| self.geometry.cluster(*offset));
        for cluster in table.chain(blocks) {
            let references = self.references.get(cluster);
            self.references.set(cluster, references.saturating_sub(1));
            self.other_metadata.remove(&cluster);
        }
    }

    /// Indices of the refcount blocks that are needed once they, and a table of so many clusters,
    /// lie from cluster `first` on.
    fn place_structures(&self, first: u64) -> Result<(Vec<u64>, u64)> {
        let per_block = self.refcounts_per_block();
        let used = |index: u64| {
            let range = index * per_block..(index + 1) * per_block;
            range
                .into_iter()
                .any(|cluster| self.references.get(cluster) > 0)
        };
        let mut blocks: Vec<u64> = (0..first.div_ceil(per_block))
            .filter(|i| used(*i))
            .collect();
        let mut table_clusters = 1;
        loop {
            let end = first + blocks.len() as u64 + table_clusters;
            let needed = end.div_ceil(per_block);
            let words = self.geometry.l2_words();
            let missing = (first / per_block..needed).filter(|index| !blocks.contains(index));
            let missing: Vec<u64> = missing.collect();
            if missing.is_empty() && needed.div_ceil(words) <= table_clusters {
                break;
            }
            blocks.extend(missing);
            blocks.sort_unstable();
            table_clusters = needed.div_ceil(words).max(table_clusters);
        }
        if table_clusters << self.geometry.cluster_bits > MAX_REFCOUNT_TABLE_SIZE {
            let reason = "the image is too large for a refcount table";
            return Err(Error::invalid(
                self.files.path,
                "refcount_table_clusters",
                table_clusters,
                reason,
            ));
        }
        Ok((blocks, table_clusters))
    }

    /// Offset of the refcount block that counts `cluster`, 0 if there is none; `None` if there
    /// cannot be one where the table says.
    fn refcount_block_of(&self, cluster: u64) -> Option<u64> {
        let entry = usize::try_from(cluster >> self.refcounts_per_block_bits())
            .ok()
            .and_then(|i| self.refcount_table.get(i));
        let offset = entry.map_or(0, |entry| entry & !511);
        (self.is_aligned(offset) && offset <= i64::MAX as u64).then_some(offset)
    }

    fn refcounts_per_block(&self) -> u64 {
        1 << self.refcounts_per_block_bits()
    }

    fn refcounts_per_block_bits(&self) -> u32 {
        self.geometry.cluster_bits + 3 - self.header.refcount_width().order
    }

    /// The refcount of the cluster at `offset` according to the image; `None` if it is unreadable.
    pub(super) fn refcount_at(&self, offset: u64) -> Option<u64> {
        let cluster = self.cluster_of(offset);
        let references = self.references.get(cluster);
        if references > self.header.refcount_width().max() {
            // No refcount can tell; it must not pass for one that is used once.
            return Some(references);
        }
        let block = self.refcount_block_of(cluster)?;
        if block == 0 || cluster < self.clusters {
            return Some(self.refcounts.get(cluster));
        }
        let index = (cluster % self.refcounts_per_block()) as usize;
        let block = self.read_block(block).ok()?;
        Some(self.header.refcount_width().get(&block, index))
    }

    /// Reads the refcount block at `offset`.
    fn read_block(&self, offset: u64) -> Result<Vec<u8>> {
        let mut block = vec![0; self.geometry.cluster_size() as usize];
        self.files.read(&mut block, offset)?;
        Ok(block)
    }
}
