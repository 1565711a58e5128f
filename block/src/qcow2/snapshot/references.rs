//! What L1 tables refer to: counting it, and which of it belongs to the active one alone.

use std::collections::HashMap;
use std::ops::Range;

#[cfg(doc)]
use crate::Error;
use crate::Result;
use crate::qcow2::Qcow2;
use crate::qcow2::compressed::Stored;
use crate::qcow2::entry::{COPIED, Cluster, Entry, L1Entry, L2Entry};
use crate::qcow2::geometry::Geometry;
use crate::qcow2::refcount::Refcounts;
use crate::qcow2::reserved::Field;
use crate::qcow2::table;

/// The tables and refcounts of an image that no request uses.
pub(super) struct References<'a> {
    disk: &'a Qcow2,
    geometry: Geometry,
}

impl<'a> References<'a> {
    pub fn new(disk: &'a Qcow2) -> Self {
        Self {
            disk,
            geometry: disk.geometry,
        }
    }

    /// Checks that the data that the entries of `l1` lead to is no metadata, unless that keeps its own
    /// references when these go, as after a repair. It marks the image as corrupt if not.
    ///
    /// # Errors
    /// [`Error::Invalid`], also for an entry that leads nowhere.
    pub fn check(&self, l1: &[u64]) -> Result<()> {
        let (disk, g) = (self.disk, self.geometry);
        let mut on_metadata = HashMap::new();
        let checked = self.for_each(l1, |field, cluster| {
            if field.is_some() {
                return Ok(());
            }
            disk.check_clusters(cluster << g.cluster_bits, g.cluster_size(), |cluster| {
                let lost = on_metadata.entry(cluster).or_insert(0);
                *lost += 1;
                disk.can_lose(cluster, *lost)
            })
        });
        checked.map_err(|e| disk.damaged_if_invalid(e))
    }

    /// Checks that each cluster that the entries of `l1` lead to can get another reference.
    ///
    /// # Errors
    /// [`Error::Invalid`] for an entry that leads to a free cluster, and for a refcount that cannot
    /// become larger.
    pub fn check_add(&self, l1: &[u64]) -> Result<()> {
        self.for_each(l1, |_, cluster| {
            let mut refcounts = self.disk.refcounts()?;
            refcounts.check_add(&self.disk.image, cluster).map(drop)
        })
    }

    /// Adds a reference for each one that the entries of `l1` lead to, all of them or, after an
    /// error, none.
    ///
    /// # Errors
    /// As [`check_add`](Self::check_add), where several entries lead to one cluster.
    pub fn add(&self, l1: &[u64]) -> Result<()> {
        let mut count = 0;
        let added = self.for_each(l1, |_, cluster| {
            self.disk.refcounts()?.add(&self.disk.image, cluster)?;
            count += 1;
            Ok(())
        });
        if added.is_err() {
            // The error is told already; what cannot be taken back is leaked.
            drop(self.take_back(l1, count));
        }
        added
    }

    /// Takes back the first `count` references that [`add`](Self::add) has added.
    pub fn take_back(&self, l1: &[u64], mut count: u64) -> Result<()> {
        self.for_each(l1, |_, cluster| {
            if count == 0 {
                return Ok(());
            }
            count -= 1;
            let offset = cluster << self.geometry.cluster_bits;
            self.disk.refcounts()?.free(&self.disk.image, offset, 1)
        })
    }

    /// Takes away a reference for each one that the entries of `l1` lead to, and releases the space
    /// of clusters that have none then. Nothing on disk leads to the table any more.
    pub fn remove(&self, l1: &[u64]) -> Result<()> {
        // Clusters in a row that are not released yet.
        let mut row: (Option<Field>, Range<u64>) = (None, 0..0);
        self.for_each(l1, |field, cluster| {
            if row.0 == field && row.1.end == cluster {
                row.1.end += 1;
                return Ok(());
            }
            let (field, clusters) = std::mem::replace(&mut row, (field, cluster..cluster + 1));
            self.release(field, clusters)
        })?;
        self.release(row.0, row.1)
    }

    /// As [`remove`](Self::remove), for a table itself, which `field` led to.
    pub fn remove_table(&self, field: Field, offset: u64, clusters: u64) -> Result<()> {
        let first = self.geometry.cluster(offset);
        self.release(Some(field), first..first + clusters)
    }

    fn release(&self, field: Option<Field>, clusters: Range<u64>) -> Result<()> {
        let bits = self.geometry.cluster_bits;
        let bytes = clusters.start << bits..clusters.end << bits;
        self.disk.release_clusters(field, bytes)
    }

    /// Sets the COPIED flag of the entries of `l1`, and in the L2 tables that they lead to, where
    /// the target is used once, and clears it elsewhere. The L2 tables are written, without waiting
    /// for the disk.
    pub fn set_copied(&self, l1: &mut [u64]) -> Result<()> {
        let mut refcounts = self.disk.refcounts()?;
        for raw in l1 {
            let offset = L1Entry(*raw).offset();
            if offset == 0 {
                continue;
            }
            *raw = self.with_flag(&mut refcounts, *raw, offset)?;
            let mut words = self.read_l2_table(offset)?;
            let mut changed = false;
            for word in words.iter_mut().step_by(self.geometry.l2_entry_words()) {
                if let Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) =
                    L2Entry(*word).cluster(None)
                {
                    let new = self.with_flag(&mut refcounts, *word, offset)?;
                    changed |= new != *word;
                    *word = new;
                }
            }
            if changed {
                let bytes = table::encode(words);
                self.disk.image.write_bytes_at(&bytes, offset)?;
            }
        }
        Ok(())
    }

    /// `entry`, which leads to `offset`, with the right COPIED flag.
    fn with_flag(&self, refcounts: &mut Refcounts, entry: u64, offset: u64) -> Result<u64> {
        let cluster = self.geometry.cluster(offset);
        Ok(match refcounts.count(&self.disk.image, cluster)? {
            1 => entry | COPIED,
            _ => entry & !COPIED,
        })
    }

    /// Calls `f` on each cluster that `l1` leads to, once for each reference to it: those of an L2
    /// table, which are data, before the table, with the field that leads to it.
    fn for_each(
        &self,
        l1: &[u64],
        mut f: impl FnMut(Option<Field>, u64) -> Result<()>,
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
                        f(None, g.cluster(offset))?;
                    }
                    Cluster::Compressed => {
                        let (offset, len) = entry.compressed(g.cluster_bits);
                        let range = Stored { offset, len }.range();
                        for cluster in g.cluster(range.start)..g.clusters(range.end) {
                            f(None, cluster)?;
                        }
                    }
                    Cluster::Unallocated | Cluster::ZeroPlain => {}
                }
            }
            f(Some(Field::SnapshotL2Table), g.cluster(table))?;
        }
        Ok(())
    }

    fn read_l2_table(&self, offset: u64) -> Result<Vec<u64>> {
        self.check_aligned("l1_table entry", offset, offset)?;
        let words = self.geometry.l2_words() as usize;
        table::read(&self.disk.image, "l1_table entry", offset, words)
    }

    fn check_aligned(&self, field: &'static str, value: u64, offset: u64) -> Result<()> {
        if self.geometry.in_cluster(offset) == 0 {
            return Ok(());
        }
        let reason = "the offset is not aligned to a cluster".to_owned();
        Err(self.disk.image.invalid(field, value, reason))
    }
}
