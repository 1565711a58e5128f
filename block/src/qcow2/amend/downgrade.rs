//! From version 3 to version 2, which has no clusters that read as zero by a flag.
//!
//! They become unallocated if there is no backing file, and data otherwise: in their own place if
//! space was reserved for them, else in a new one. The disk, and what snapshots hold, reads the same
//! at any time.

use std::collections::BTreeSet;

use super::{AmendOptions, Amended, apply, wrong};
use crate::qcow2::Qcow2;
use crate::qcow2::entry::{COPIED, Cluster, L1Entry, L2Entry};
use crate::qcow2::geometry::ENTRY_SIZE;
use crate::qcow2::header::Header;
use crate::qcow2::snapshot::read_table;
use crate::qcow2::table;
use crate::{Disk, Result};

impl Header {
    /// This one in version 2, without what there is no field for.
    pub(super) fn lowered(&self) -> Self {
        let mut lowered = Self {
            version: 2,
            incompatible_features: 0,
            compatible_features: 0,
            compression_type: 0,
            unknown_fields: Vec::new(),
            ..self.clone()
        };
        lowered.set_base_stamp(None);
        lowered.autoclear_features = 0;
        lowered
    }
}

impl Qcow2 {
    /// Makes the image one of version 2, and changes what else is asked for.
    pub(super) fn downgrade(
        mut self,
        options: &AmendOptions,
        amended: &Amended,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        let size = amended.size.unwrap_or(self.size());
        self.check_size(size)?;
        let header = Header::read(&*self.image.storage, &self.image.path)?;
        let snapshots = read_table(&*self.image.storage, &self.image.path, &header)?.snapshots;
        let fits = |vm_state_size: u64| vm_state_size <= u32::MAX.into();
        if !snapshots
            .iter()
            .all(|snapshot| fits(snapshot.vm_state_size) && snapshot.disk_size == size)
        {
            return wrong("Internal snapshots prevent downgrade of image");
        }
        let mut l2_tables = self.l2_tables(&header)?;
        if header.compression_type != 0 && self.has_compressed_clusters(&l2_tables)? {
            return wrong(
                "Cannot downgrade an image with zstd compression type and existing compressed \
                 clusters",
            );
        }
        if let Some(width) = amended.width {
            self.refcounts()?.check_width(&self.image, width)?;
        }
        if amended.size.is_some() {
            self.resize(size)?;
            self.flush()?;
            l2_tables = self.l2_tables(&Header::read(&*self.image.storage, &self.image.path)?)?;
        }
        let total = l2_tables.len() as u64;
        for (done, l2_table) in (0..).zip(l2_tables) {
            progress(done, total);
            self.expand_zero_clusters(l2_table)?;
        }
        let mut header = Header::read(&*self.image.storage, &self.image.path)?;
        apply(&mut header, options)?;
        let new_counts = match amended.width {
            Some(width) => Some(self.renew_refcounts(&mut header, width, progress)?),
            None => None,
        };
        let header = header.lowered();
        self.switch_header(&header, new_counts)?;
        self.close()
    }

    /// Offsets of all L2 tables, those of snapshots too.
    fn l2_tables(&self, header: &Header) -> Result<BTreeSet<u64>> {
        let mut tables: BTreeSet<u64> = self.l1.tables().collect();
        let snapshots = read_table(&*self.image.storage, &self.image.path, header)?;
        snapshots.check_l1_tables(&self.image.path, self.geometry)?;
        for snapshot in snapshots.snapshots {
            let count = snapshot.l1_entries as usize;
            let offset = snapshot.l1_table_offset;
            let l1 = table::read(&self.image, "l1_table_offset", offset, count)?;
            tables.extend(l1.into_iter().map(|entry| L1Entry(entry).offset()));
        }
        tables.remove(&0);
        Ok(tables)
    }

    fn read_l2_table(&self, offset: u64) -> Result<Vec<u64>> {
        let words = self.geometry.cluster_size() / ENTRY_SIZE;
        table::read(&self.image, "l1_table entry", offset, words as usize)
    }

    fn has_compressed_clusters(&self, l2_tables: &BTreeSet<u64>) -> Result<bool> {
        for offset in l2_tables {
            let words = self.read_l2_table(*offset)?;
            if words.into_iter().any(|word| L2Entry(word).is_compressed()) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Gives those clusters of the L2 table at `offset` a place that read as zero by their flag.
    fn expand_zero_clusters(&self, offset: u64) -> Result<()> {
        let g = self.geometry;
        let mut words = self.read_l2_table(offset)?;
        let users = self.refcounts()?.count(&self.image, g.cluster(offset))?;
        let mut left = Vec::new();
        let mut changed = false;
        for word in &mut words {
            let place = match L2Entry(*word).cluster(None) {
                Cluster::ZeroPlain if self.backing.is_none() => None,
                Cluster::ZeroPlain => Some(self.allocate_zeros(users)?),
                Cluster::ZeroAlloc(place) if self.is_used(place, users)? => {
                    self.image.write_zeroes(place, g.cluster_size(), false)?;
                    Some(place)
                }
                // Somebody else may have data there.
                Cluster::ZeroAlloc(place) => {
                    left.push(place);
                    Some(self.allocate_zeros(users)?)
                }
                Cluster::Normal(_) | Cluster::Compressed | Cluster::Unallocated => continue,
            };
            changed = true;
            *word = match place {
                None => 0,
                Some(place) if users == 1 => L2Entry::normal(place).0,
                Some(place) => L2Entry::normal(place).0 & !COPIED,
            };
        }
        if !changed {
            return Ok(());
        }
        self.write_counts()?;
        self.image.write_bytes_at(&table::encode(words), offset)?;
        self.image.sync()?;
        let mut refcounts = self.refcounts()?;
        for place in left {
            (0..users).try_for_each(|_| refcounts.free(&self.image, place, 1))?;
        }
        Ok(())
    }

    /// Whether the cluster at `place` is data that is used so often.
    fn is_used(&self, place: u64, users: u64) -> Result<bool> {
        let g = self.geometry;
        if g.in_cluster(place) != 0 {
            let reason = "the offset is not aligned to a cluster".to_owned();
            return Err(self.image.invalid("l2_table entry", place, reason));
        }
        self.check_leaving(place, g.cluster_size())?;
        let mut refcounts = self.refcounts()?;
        let is_data = refcounts.metadata_at(g.cluster(place)).is_none();
        Ok(is_data && refcounts.count(&self.image, g.cluster(place))? == users)
    }

    /// A new cluster of zeros that is used so often.
    fn allocate_zeros(&self, users: u64) -> Result<u64> {
        let g = self.geometry;
        let mut refcounts = self.refcounts()?;
        let place = refcounts.allocate(&self.image, None, 1)?.offset;
        self.image.write_zeroes(place, g.cluster_size(), false)?;
        let end = place + g.cluster_size();
        if self.image.size()? < end {
            // An entry must not lead out of the file.
            self.image.set_len(end)?;
        }
        (1..users).try_for_each(|_| refcounts.add(&self.image, g.cluster(place)))?;
        Ok(place)
    }
}
