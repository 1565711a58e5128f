//! What L1 tables refer to: counting it, and which of it belongs to the active one alone.

use crate::Result;
use crate::file::ImageFile;
use crate::qcow2::compressed::Stored;
use crate::qcow2::entry::{Cluster, Entry, L1Entry, L2Entry};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::table;

/// The tables and refcounts of an image that no request uses.
pub(super) struct References<'a> {
    pub image: &'a ImageFile,
    pub geometry: Geometry,
    pub refcounts: &'a mut Refcounts,
    /// References that have been added.
    added: u64,
    /// Clusters in a row that have lost their last reference, and keep their space: the first one
    /// and their number.
    freed: (u64, u64),
}

impl<'a> References<'a> {
    pub fn new(image: &'a ImageFile, geometry: Geometry, refcounts: &'a mut Refcounts) -> Self {
        Self {
            image,
            geometry,
            refcounts,
            added: 0,
            freed: (0, 0),
        }
    }

    /// Adds a reference for each one that the entries of `l1` lead to, all of them or, after an
    /// error, none.
    ///
    /// # Errors
    /// [`Error::Invalid`](crate::Error::Invalid) for an entry that leads nowhere, and for a refcount
    /// that would become too large.
    pub fn add(&mut self, l1: &[u64]) -> Result<()> {
        self.added = 0;
        let added = self.for_each(l1, |this, cluster| {
            this.refcounts.add(this.image, cluster)?;
            this.added += 1;
            Ok(())
        });
        if added.is_err() {
            let mut left = self.added;
            // The error is told already; what cannot be taken back is leaked.
            drop(self.for_each(l1, |this, cluster| {
                if left == 0 {
                    return Ok(());
                }
                left -= 1;
                let offset = cluster << this.geometry.cluster_bits;
                this.refcounts.free(this.image, offset, 1)
            }));
        }
        added
    }

    /// Takes away a reference for each one that the entries of `l1` lead to, and releases the space
    /// of clusters that have none then. Nothing on disk leads to the table any more.
    pub fn remove(&mut self, l1: &[u64]) -> Result<()> {
        self.for_each(l1, Self::release)?;
        self.discard_freed()
    }

    /// As [`remove`](Self::remove), for a table itself.
    pub fn remove_table(&mut self, offset: u64, clusters: u64) -> Result<()> {
        let first = self.geometry.cluster(offset);
        (first..first + clusters).try_for_each(|cluster| self.release(cluster))?;
        self.discard_freed()
    }

    fn release(&mut self, cluster: u64) -> Result<()> {
        let offset = cluster << self.geometry.cluster_bits;
        let last = self.refcounts.count(self.image, cluster)? == 1;
        self.refcounts.free(self.image, offset, 1)?;
        if last {
            if self.freed.0 + self.freed.1 != cluster {
                self.discard_freed()?;
                self.freed = (cluster, 0);
            }
            self.freed.1 += 1;
        }
        Ok(())
    }

    fn discard_freed(&mut self) -> Result<()> {
        let (first, clusters) = std::mem::take(&mut self.freed);
        if clusters == 0 {
            return Ok(());
        }
        let bits = self.geometry.cluster_bits;
        self.image.discard(first << bits, clusters << bits)
    }

    /// Sets the COPIED flag of the entries of `l1`, and in the L2 tables that they lead to, where
    /// the target is used once, and clears it elsewhere. The L2 tables are written, without waiting
    /// for the disk.
    pub fn set_copied(&mut self, l1: &mut [u64]) -> Result<()> {
        for raw in l1 {
            let offset = L1Entry(*raw).offset();
            if offset == 0 {
                continue;
            }
            *raw = self.with_flag(*raw, offset)?;
            let mut words = self.read_l2_table(offset)?;
            let mut changed = false;
            for word in words.iter_mut().step_by(self.geometry.l2_entry_words()) {
                if let Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) =
                    L2Entry(*word).cluster(None)
                {
                    let new = self.with_flag(*word, offset)?;
                    changed |= new != *word;
                    *word = new;
                }
            }
            if changed {
                self.image.write_bytes_at(&table::encode(words), offset)?;
            }
        }
        Ok(())
    }

    /// `entry`, which leads to `offset`, with the right COPIED flag.
    fn with_flag(&mut self, entry: u64, offset: u64) -> Result<u64> {
        let cluster = self.geometry.cluster(offset);
        let flag = super::COPIED;
        Ok(match self.refcounts.count(self.image, cluster)? {
            1 => entry | flag,
            _ => entry & !flag,
        })
    }

    /// Calls `f` on each cluster that `l1` leads to, once for each reference to it: those of an L2
    /// table before the table.
    fn for_each(
        &mut self,
        l1: &[u64],
        mut f: impl FnMut(&mut Self, u64) -> Result<()>,
    ) -> Result<()> {
        let g = self.geometry;
        for &raw in l1 {
            let table = L1Entry(raw).offset();
            if table == 0 {
                continue;
            }
            for entry in Entry::all(&self.read_l2_table(table)?, g) {
                let entry = entry.word;
                match entry.cluster(None) {
                    Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) => {
                        self.check_aligned("l2_table entry", entry.0, offset)?;
                        f(self, g.cluster(offset))?;
                    }
                    Cluster::Compressed => {
                        let (offset, len) = entry.compressed(g.cluster_bits);
                        let range = Stored { offset, len }.range();
                        for cluster in g.cluster(range.start)..g.clusters(range.end) {
                            f(self, cluster)?;
                        }
                    }
                    Cluster::Unallocated | Cluster::ZeroPlain => {}
                }
            }
            f(self, g.cluster(table))?;
        }
        Ok(())
    }

    fn read_l2_table(&self, offset: u64) -> Result<Vec<u64>> {
        self.check_aligned("l1_table entry", offset, offset)?;
        let words = self.geometry.l2_words() as usize;
        table::read(self.image, "l1_table entry", offset, words)
    }

    fn check_aligned(&self, field: &'static str, value: u64, offset: u64) -> Result<()> {
        if self.geometry.in_cluster(offset) == 0 {
            return Ok(());
        }
        let reason = "the offset is not aligned to a cluster".to_owned();
        Err(self.image.invalid(field, value, reason))
    }
}
