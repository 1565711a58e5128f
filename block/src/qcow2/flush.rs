//! The order in which data and metadata reach the disk.
//!
//! A request changes the data in the files, and the metadata in memory. Writing metadata back
//! takes these steps, with a sync between one and the next; power may fail at any point:
//!
//! 1. **Guest data**, and with it counts of new clusters, new refcount blocks and new L2 tables,
//!    which are empty: nothing on disk leads to any of them yet. At worst clusters are leaked.
//! 2. **Links of new refcount blocks**, whose content is on disk now.
//! 3. **The mapping**: entries of L2 tables, and L1 entries of new ones, in any order, since a new
//!    table maps nothing before. The data behind each entry and the count of each cluster are on
//!    disk.
//!
//! What step 3 writes is copied before step 1 syncs the data. An entry that another thread adds
//! later waits for the next time, since its data may have missed the sync.
//!
//! After step 3, clusters whose mapping it removed go back to the allocator, as soon as no request
//! uses them any more (`retired`). Their lower counts reach the disk with the next step 1.

use std::ops::Range;

use super::Qcow2;
use super::cache::DirtySlice;
use super::placement::Placement;
use super::reserved::Field;
use super::retired::{Batch, Freed};
use super::table;
use crate::sync::lock_whole;
use crate::{Disk, Error, Result};

impl Qcow2 {
    /// Makes all completed requests durable. After a failed sync, of whatever file, nothing is
    /// written back any more: the image on disk stays as consistent as it is.
    #[cfg_attr(mutate, track_caller)]
    pub(super) fn write_back(&self) -> Result<()> {
        #[cfg(mutate)]
        if crate::mutate::leaves_out(std::panic::Location::caller()) {
            return Ok(());
        }
        let _flushing = lock_whole(&self.flushing).ok_or(Error::BrokenOff)?;
        self.image.check_synced()?;
        self.data().check_synced()?;
        // Before the slices: the removal of each of these is in a slice that is dirty or on disk.
        let unmapped = self.retired.take_unmapped();
        let slices = self.l2.take_dirty();
        let result = self.write_in_order(&slices);
        match result {
            Ok(()) => {
                self.l2.written();
                self.retired.written(unmapped);
                self.reclaim();
            }
            Err(_) => {
                self.l2.not_written();
                self.retired.put_back(unmapped);
            }
        }
        result
    }

    /// Gives back the clusters that may be used again; those of an image that is marked as corrupt may
    /// not: nobody knows what else leads to them.
    fn reclaim(&self) {
        if self.check_sound().is_err() {
            return;
        }
        while let Some(batch) = self.retired.take_settled(&self.requests) {
            // At worst a range is leaked, and the next check finds it.
            for range in merged(&batch) {
                drop(self.give_back(range));
            }
            for freed in &batch {
                match freed.clone() {
                    Freed::Clusters(_) => {}
                    Freed::Compressed(range) => drop(self.give_back_compressed(range)),
                    Freed::Table(range) => {
                        drop(self.release_clusters(Some(Field::L2Table), range));
                    }
                }
            }
            self.retired.finished(&batch);
        }
    }

    fn write_in_order(&self, slices: &[DirtySlice]) -> Result<()> {
        let tables = self.l1.new_entries();
        let internal = matches!(self.placement, Placement::Internal);
        #[cfg(mutate)]
        if crate::mutate::is(crate::mutate::MAPPING_FIRST) {
            slices
                .iter()
                .try_for_each(|slice| self.write_slice(slice))?;
            self.l1.write(&self.image, &tables)?;
        }
        if !internal {
            self.data().sync()?;
        }
        // After the copy of the mapping: every cluster in it is counted.
        let counts = self.refcounts()?.write_counts(&self.image)?;
        let is_new = self.image.has_new_name();
        if internal || is_new || counts.sync || !tables.is_empty() {
            self.image.sync()?;
        }
        if !counts.blocks.is_empty() {
            self.refcounts()?.link_blocks(&self.image, &counts.blocks)?;
            self.image.sync()?;
        }

        if slices.is_empty() && tables.is_empty() {
            return Ok(());
        }
        slices
            .iter()
            .try_for_each(|slice| self.write_slice(slice))?;
        self.l1.write(&self.image, &tables)?;
        self.image.sync()?;
        self.l1.written(&tables);
        Ok(())
    }

    /// Makes the refcounts durable, and everything that has been written to the image file before.
    #[cfg_attr(mutate, track_caller)]
    pub(super) fn write_counts(&self) -> Result<()> {
        #[cfg(mutate)]
        if crate::mutate::leaves_out(std::panic::Location::caller()) {
            return Ok(());
        }
        let counts = self.refcounts()?.write_counts(&self.image)?;
        self.image.sync()?;
        if !counts.blocks.is_empty() {
            self.refcounts()?.link_blocks(&self.image, &counts.blocks)?;
            self.image.sync()?;
        }
        Ok(())
    }

    fn write_slice(&self, slice: &DirtySlice) -> Result<()> {
        let table = self
            .l1
            .get(self.geometry.slice_l1_index(slice.slice))
            .offset();
        let bytes = table::encode(slice.entries.iter().copied());
        self.image
            .write_bytes_at(&bytes, table + self.geometry.slice_offset(slice.slice))
    }
}

/// The ranges of whole clusters of `batch` in order, neighbours in one.
fn merged(batch: &Batch) -> Vec<Range<u64>> {
    let clusters = |freed: &Freed| match freed {
        Freed::Clusters(range) => Some(range.clone()),
        Freed::Compressed(_) | Freed::Table(_) => None,
    };
    let mut sorted: Vec<_> = batch.iter().filter_map(clusters).collect();
    sorted.sort_unstable_by_key(|range| range.start);
    sorted.dedup_by(|next, range| {
        let joins = range.end == next.start;
        if joins {
            range.end = next.end;
        }
        joins
    });
    sorted
}

impl Qcow2 {
    /// Writes everything back that is kept in memory while the image is open. No request is running.
    pub(super) fn store_all(&self) -> Result<()> {
        self.write_back()?;
        // Storing bitmaps takes free clusters, which a damaged image may not have where it says.
        self.check_sound()?;
        self.store_bitmaps()?;
        if self.refcounts()?.is_dirty() {
            // Counts of clusters that the first time gave back.
            self.write_back()?;
        }
        Ok(())
    }
}

impl Drop for Qcow2 {
    fn drop(&mut self) {
        // Whoever needs to know calls `close` first; this is for those who forgot.
        drop(self.close());
    }
}
