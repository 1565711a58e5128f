//! Giving clusters their space before anything is written to them.

use std::ops::Range;

use super::Qcow2;
use super::allocator::Allocation;
use super::entry::{Entry, L2Entry};
use super::geometry::ENTRY_SIZE;
use super::placement::Placement;
use super::subclusters::Subclusters;
use super::zeroes::Zeroed;
use crate::{Preallocation, Result};

impl Qcow2 {
    /// Maps `clusters`, which lie behind the end of the disk and have no mapping, to space that reads
    /// as zero. After an error they have none.
    pub(super) fn preallocate(&self, clusters: Range<u64>, kind: Preallocation) -> Result<()> {
        let old_len = self.data().size()?;
        let done = self
            .map_clusters(clusters.clone(), kind)
            .and_then(|()| self.write_back());
        if done.is_err() {
            let end = clusters.start << self.geometry.cluster_bits;
            let undone = self
                .unmap_clusters(clusters, Zeroed::Behind)
                .and_then(|()| self.write_back());
            if let (Ok(()), Placement::External(external)) = (&undone, &self.placement) {
                // A request may have made the file as long as the disk meanwhile.
                drop(external.file.set_len(old_len.max(end)));
            }
        }
        done
    }

    /// Maps the cluster in which a disk of `size` bytes ends to space that reads as zero, if it has no
    /// mapping and nothing shows there from below.
    pub(super) fn preallocate_end(&self, size: u64, kind: Preallocation) -> Result<()> {
        let g = self.geometry;
        let cluster = g.cluster(size);
        if g.in_cluster(size) == 0 || self.backing_shows(cluster << g.cluster_bits) {
            return Ok(());
        }
        // Requests go on, and this cluster is one of theirs.
        let _held = self.ranges.lock(cluster..cluster + 1);
        if self.entries(cluster..cluster + 1)? != [Entry::UNALLOCATED] {
            return Ok(());
        }
        self.map_clusters(cluster..cluster + 1, kind)?;
        self.write_back()
    }

    fn map_clusters(&self, clusters: Range<u64>, kind: Preallocation) -> Result<()> {
        let g = self.geometry;
        if let Placement::External(external) = &self.placement {
            // As in a new image, the last cluster is complete.
            let end = clusters.end << g.cluster_bits;
            let capacity = external.file.capacity()?;
            external.file.set_len(capacity.unwrap_or(end).min(end))?;
        }
        let mut first = clusters.start;
        while first < clusters.end {
            if self.wants_write_back() {
                self.write_back()?;
            }
            let slice_end = (g.slice(first) + 1) * g.slice_entries();
            let end = slice_end.min(clusters.end);
            let place = self.allocate(first, end - first)?;
            let end = first + place.clusters;
            let mapped = self.give_space(&place, kind).and_then(|()| {
                self.change(first..end, |cluster, _| Entry {
                    word: L2Entry::normal(place.offset + ((cluster - first) << g.cluster_bits)),
                    // As in QEMU, space is there for subclusters, and nothing is known of them.
                    subclusters: Subclusters::default(),
                })
            });
            mapped.inspect_err(|_| self.release(&place))?;
            first = end;
        }
        Ok(())
    }

    /// Makes clusters that nothing leads to yet read as zero, and lie within their file.
    fn give_space(&self, place: &Allocation, kind: Preallocation) -> Result<()> {
        let file = self.data();
        let len = place.clusters << self.geometry.cluster_bits;
        let is_allocated = !matches!(self.placement, Placement::External(_));
        if is_allocated && file.capacity()?.is_none() {
            // Others may make the file longer meanwhile.
            let last = place.offset + len - ENTRY_SIZE;
            file.write_bytes_at(&[0; ENTRY_SIZE as usize], last)?;
        }
        if place.zeroed && kind == Preallocation::Metadata {
            return Ok(());
        }
        file.fill(place.offset, len, kind)
    }
}
