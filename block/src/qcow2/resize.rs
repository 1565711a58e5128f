//! Growing and shrinking a disk.
//!
//! The size that the header tells decides, and changes last when the disk grows, first when it
//! shrinks, in one sector: a crash leaves the old disk or the new one. What a shrink that was
//! interrupted may have left behind the end is removed before a disk grows, so that what a disk gains
//! reads as zero. Only a raw data file shows whatever is there: it is the disk.
//!
//! Requests go on meanwhile. One that was begun before a shrink, in the part that goes, may fail, or
//! may still change the data file there; no later read shows it, except in a raw data file. It cannot
//! map anything there later: whoever maps clusters looks at the size again while holding their range,
//! and a shrink takes the range of what it cuts off after it has changed the size.
//!
//! L2 tables behind the end are kept for the day when the disk grows again.

use crate::sync::atomic::Ordering;
use std::ops::Range;

use super::Qcow2;
use super::entry::{Entry, L2Entry};
use super::geometry::ENTRY_SIZE;
use super::header::{MAX_L1_SIZE, MAX_OFFSET};
use super::mapping::{Kind, Place};
use super::parse::offset;
use super::placement::Placement;
use super::refcount::Refcounts;
use super::reserved::Field;
use super::subclusters::Subclusters;
use super::zeroes::Zeroed;
use super::{DataFileLayout, table};
use crate::sync::{lock, lock_whole};
use crate::{Disk, Error, Preallocation, Result};

impl Qcow2 {
    /// Changes the size to `new` bytes; what the disk gains is preallocated.
    pub(super) fn change_size(&self, new: u64, preallocation: Preallocation) -> Result<()> {
        let _resizing = lock(&self.resizing);
        let old = self.size();
        self.check_size(new)?;
        if new < old && preallocation != Preallocation::Off {
            let reason = "Preallocation can't be used for shrinking an image";
            return Err(Error::Option(reason.to_owned()));
        }
        self.data().check_preallocation(preallocation)?;
        if new != old {
            self.check_bitmaps(new)?;
        }
        match new.cmp(&old) {
            std::cmp::Ordering::Less => self.shrink(old, new),
            std::cmp::Ordering::Equal => Ok(()),
            std::cmp::Ordering::Greater => self.grow(old, new, preallocation),
        }
    }

    /// Refuses what cannot succeed.
    pub(super) fn check_size(&self, new: u64) -> Result<()> {
        let wrong = |reason: &str| Err(Error::Option(reason.to_owned()));
        if self.version < 3 && self.has_snapshots {
            // Their table does not tell what size the disk had.
            return wrong("Can't resize a v2 image which has snapshots");
        }
        if !new.is_multiple_of(512) {
            return wrong("The new size must be a multiple of 512");
        }
        let standard = self.placement.data_file_layout() == Some(DataFileLayout::Standard);
        if self.geometry.l1_entries(new) > MAX_L1_SIZE / ENTRY_SIZE || standard && new > MAX_OFFSET
        {
            return wrong("The new size is too large for the cluster size of the image");
        }
        if standard
            && self
                .data()
                .capacity()?
                .is_some_and(|capacity| new > capacity)
        {
            return wrong("Cannot grow device files");
        }
        Ok(())
    }

    fn grow(&self, old: u64, new: u64, preallocation: Preallocation) -> Result<()> {
        let g = self.geometry;
        let gained = g.clusters(old)..g.clusters(new);
        let raw = matches!(self.placement, Placement::Raw(..));
        if !raw {
            self.unmap_clusters(gained.clone(), Zeroed::Behind)?;
            self.write_back()?;
        }
        self.grow_l1_table(g.l1_entries(new))?;
        match &self.placement {
            Placement::External(external) if preallocation == Preallocation::Off => {
                external.file.set_len(new)?;
                external.file.sync()?;
            }
            Placement::Raw(external, _) => {
                // The last cluster is complete where it is mapped, as in a new image.
                let end = new.next_multiple_of(g.cluster_size());
                let end = external.file.capacity()?.unwrap_or(end).min(end);
                let len = external.file.size()?;
                if len < end {
                    external.file.set_len(end)?;
                    let filled = external.file.fill(len, end - len, preallocation);
                    filled.inspect_err(|_| drop(external.file.set_len(len)))?;
                }
                self.map_raw(gained)?;
                // Its length is on disk before the mapping.
                self.write_back()?;
            }
            _ if preallocation == Preallocation::Off => {}
            _ => {
                self.preallocate_end(old, preallocation)?;
                self.preallocate(gained, preallocation)?;
            }
        }
        #[cfg(mutate)]
        if crate::mutate::is(crate::mutate::GROWN_EARLY) {
            self.write_size(new)?;
        }
        if self.backing_shows(old) {
            // What the disk gains reads as zero, not as what the backing file has there.
            let end = self.backing.as_ref().map_or(0, |backing| backing.size());
            let end = end.min(new).next_multiple_of(g.cluster_size());
            self.zero(old, end - old, false)?;
            self.write_back()?;
        }
        // A request that finds the disk's end in this cluster takes it for whole.
        let last = g.cluster(old);
        let _held = self.ranges.lock(last..last + 1);
        if !raw {
            self.clear_behind(old, new)?;
        }
        // Whoever has a copy from before a shrink has something else there.
        self.track(old, new - old)?;
        self.write_size(new)?;
        self.size.store(new, Ordering::Release);
        Ok(())
    }

    fn shrink(&self, old: u64, new: u64) -> Result<()> {
        let g = self.geometry;
        // From here on, no request begins behind the new end.
        self.size.store(new, Ordering::Release);
        if let Err(e) = self.write_size(new) {
            self.size.store(old, Ordering::Release);
            return Err(e);
        }
        // Requests that have looked at the size before may be mapping clusters behind the end; those
        // that come after them see the new one.
        drop(self.ranges.lock(g.cluster(new)..g.clusters(old)));
        // The disk has its new size, whatever becomes of the space behind its end.
        let freed = self
            .unmap_clusters(g.clusters(new)..g.clusters(old), Zeroed::Behind)
            // Other programs that make it grow may not look.
            .and_then(|()| {
                // A discard could give the cluster to others between the lookup and the zeros.
                let _held = self.ranges.lock(g.cluster(new)..g.cluster(new) + 1);
                self.clear_behind(new, old)
            })
            .and_then(|()| self.write_back());
        if let Placement::Raw(_, tables) = &self.placement {
            tables.forget(g.l1_index(g.cluster(new))..g.l1_entries(old) as usize);
        }
        let shorter = match &self.placement {
            Placement::External(external) if freed.is_ok() => Some(external),
            // What it keeps would show in a disk that grows, mapped or not.
            Placement::Raw(external, _) => Some(external),
            _ => None,
        };
        if let Some(external) = shorter {
            let cut = external.file.set_len(new);
            drop(cut.and_then(|()| external.file.sync()));
        }
        Ok(())
    }

    /// Removes the mapping of `clusters`, and gives back their space.
    pub(super) fn unmap_clusters(&self, clusters: Range<u64>, zeroed: Zeroed) -> Result<()> {
        let g = self.geometry;
        let mut first = clusters.start;
        while first < clusters.end {
            if self.l1.get(g.l1_index(first)).offset() == 0 {
                // Nothing is mapped, and a large disk has many more slices than tables.
                first = (first / g.l2_entries() + 1) * g.l2_entries();
                continue;
            }
            if self.wants_write_back() {
                self.write_back()?;
            }
            let slice_end = (g.slice(first) + 1) * g.slice_entries();
            let end = slice_end.min(clusters.end);
            let _held = self.ranges.lock(first..end);
            self.zero_clusters(first..end, zeroed)?;
            first = end;
        }
        Ok(())
    }

    /// Maps `clusters` of a raw disk, behind its end, each at its own offset.
    fn map_raw(&self, clusters: Range<u64>) -> Result<()> {
        let g = self.geometry;
        let mut first = clusters.start;
        while first < clusters.end {
            let slice_end = (g.slice(first) + 1) * g.slice_entries();
            let end = slice_end.min(clusters.end);
            self.change(first..end, |cluster, _| {
                let word = L2Entry::normal(cluster << g.cluster_bits);
                let subclusters = Subclusters::ALL_ALLOCATED;
                Entry { word, subclusters }
            })?;
            first = end;
        }
        Ok(())
    }

    /// Zeroes what is stored from `start` to the end of the cluster that it lies in, but not behind
    /// `end`. The cluster is held.
    fn clear_behind(&self, start: u64, end: u64) -> Result<()> {
        let cluster_end = start.next_multiple_of(self.geometry.cluster_size());
        let end = end.min(cluster_end);
        let mut at = start;
        while at < end {
            let run = self.run_in_slice(at, end - at)?;
            match run.kind {
                Kind::Data(Place {
                    offset,
                    in_place: true,
                }) => {
                    self.check_overlap(offset, run.len)?;
                    self.data().write_zeroes(offset, run.len, false)?;
                    self.data().sync()?;
                }
                Kind::Data(_) | Kind::Compressed { .. } => {
                    self.write_zeros_held(at, run.len)?;
                    self.write_back()?;
                }
                Kind::Zero(_) | Kind::Unallocated(_) => {}
            }
            at += run.len;
        }
        Ok(())
    }

    fn write_size(&self, size: u64) -> Result<()> {
        self.image
            .write_bytes_at(&size.to_be_bytes(), offset::SIZE)?;
        self.image.sync()
    }

    /// Makes the L1 table on disk have room for `needed` entries.
    ///
    /// The header changes to a new table in one write, after that and its refcounts are on disk, and
    /// the old one is given back only after that.
    pub(super) fn grow_l1_table(&self, needed: u64) -> Result<()> {
        let _flushing = lock_whole(&self.flushing).ok_or(Error::BrokenOff)?;
        let (old_offset, old_size) = self.l1.place();
        if needed <= old_size {
            return Ok(());
        }
        let g = self.geometry;
        let clusters = |entries: u64| (entries * ENTRY_SIZE).div_ceil(g.cluster_size());
        let count = clusters(needed);
        let place = self
            .refcounts()?
            .allocate_metadata(&self.image, Field::L1Table, count)?;
        let offset = place.offset;
        let switched = self.switch_l1_table(offset, needed);
        let mut refcounts = self.refcounts()?;
        let free = |refcounts: &mut Refcounts, offset, count| {
            refcounts.free_metadata(&self.image, Field::L1Table, offset, count)
        };
        // Either table serves, whether the other's clusters come back or are leaked.
        drop(match &switched {
            Ok(()) => free(&mut refcounts, old_offset, clusters(old_size)),
            Err(_) => free(&mut refcounts, offset, count),
        });
        switched
    }

    fn switch_l1_table(&self, offset: u64, size: u64) -> Result<()> {
        let mut entries: Vec<u64> = self.l1.entries(size).collect();
        let per_cluster = (self.geometry.cluster_size() / ENTRY_SIZE) as usize;
        entries.resize(entries.len().next_multiple_of(per_cluster), 0);
        self.image.write_bytes_at(&table::encode(entries), offset)?;
        self.write_counts()?;
        let mut fields = (size as u32).to_be_bytes().to_vec();
        fields.extend(offset.to_be_bytes());
        self.image.write_bytes_at(&fields, offset::L1_TABLE)?;
        self.image.sync()?;
        self.l1.moved(offset, size);
        Ok(())
    }
}
