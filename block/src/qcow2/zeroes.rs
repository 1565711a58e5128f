//! Writing zeroes, and discarding.
//!
//! In a raw data file both become zeros in the file, and the mapping stays, so that the file
//! remains a faithful raw image. Elsewhere whole clusters, and subclusters, read as zero by their
//! mapping, or lose it and go back to the allocator.

use std::ops::Range;

use super::Qcow2;
use super::entry::Entry;
use super::mapping::{Kind, Place};
use super::placement::Placement;
use crate::buffers::Buffers;
use crate::{Disk, Result};
use vm_memory::VolatileSlice;

/// What whole clusters that are zeroed become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Zeroed {
    /// Zero, with their space reserved.
    Reserved,
    /// Zero or unallocated, their space given back.
    Unmapped,
    /// As that, and they lie behind the end of the disk: the backing file does not show.
    Behind,
    /// Zero by their mapping, even where they read as zero without one: another backing file may
    /// show there soon.
    Explicit,
    /// Unallocated: the backing file shows. The space in an external data file stays in use: were it
    /// released before the mapping is gone from the disk, a crash could bring back zeros.
    Emptied,
}

impl Qcow2 {
    /// Makes a range read as zero.
    pub(super) fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        if let Placement::Raw(external, _) = &self.placement {
            if self.passthrough(offset, len)?.is_none() {
                self.check_mapping(offset, len)?;
            }
            // What reads as zero by its mapping must be zero in the raw file too.
            return external.file.write_zeroes(offset, len, unmap);
        }
        let zeroed = if unmap {
            Zeroed::Unmapped
        } else {
            Zeroed::Reserved
        };
        self.zero_as(offset, len, zeroed)
    }

    /// Makes a range of a disk without a raw data file read as zero in one of the first two ways, or
    /// explicitly.
    pub(super) fn zero_as(&self, offset: u64, len: u64, zeroed: Zeroed) -> Result<()> {
        let by_mapping = match zeroed {
            Zeroed::Reserved | Zeroed::Explicit => self.version >= 3,
            Zeroed::Unmapped | Zeroed::Behind | Zeroed::Emptied => self.can_unmap(),
        };
        let mut running = self.requests.begin();
        let mut done = 0;
        while done < len {
            if self.wants_write_back() {
                // A request waits for itself: what it unmapped comes back after it.
                drop(running);
                self.write_back()?;
                running = self.requests.begin();
            }
            let (at, left) = (offset + done, len - done);
            done += match self.whole_clusters(at, left) {
                whole if whole > 0 && by_mapping => self.zero_whole(at, whole, zeroed)?,
                _ => self.zero_part(at, left.min(self.to_cluster_end(at)), zeroed)?,
            };
        }
        Ok(())
    }

    /// Fails if an entry of a range is bad.
    fn check_mapping(&self, offset: u64, len: u64) -> Result<()> {
        let _running = self.requests.begin();
        let mut done = 0;
        while done < len {
            done += self.run(offset + done, len - done)?.len;
        }
        Ok(())
    }

    /// Gives the space of the whole clusters in a range back; the rest of the range stays as it is.
    pub(super) fn unmap(&self, offset: u64, len: u64) -> Result<()> {
        let g = self.geometry;
        let mut at = offset.next_multiple_of(g.cluster_size());
        let end = match offset + len {
            end if end == self.size() => end,
            end => end - g.in_cluster(end),
        };
        if at >= end {
            return Ok(());
        }
        if let Placement::Raw(external, _) = &self.placement {
            return external.file.discard(at, end - at);
        }
        if !self.can_unmap() {
            return Ok(());
        }
        let mut running = self.requests.begin();
        while at < end {
            if self.wants_write_back() {
                drop(running);
                self.write_back()?;
                running = self.requests.begin();
            }
            at += match self.whole_clusters(at, end - at) {
                // The disk has grown, and this is not its end any more.
                0 => end - at,
                whole => self.zero_whole(at, whole, Zeroed::Unmapped)?,
            };
        }
        Ok(())
    }

    /// Whether a cluster can lose its place and read as zero: version 2 has no flag for that, and the
    /// backing file would show.
    pub(super) fn can_unmap(&self) -> bool {
        self.version >= 3 || self.backing.is_none()
    }

    /// Makes the `len` bytes at `offset`, whole clusters of one slice, read as zero by their
    /// mapping. Returns `len`, or 0 if the disk has another end by now.
    fn zero_whole(&self, offset: u64, len: u64, zeroed: Zeroed) -> Result<u64> {
        let g = self.geometry;
        let clusters = g.cluster(offset)..g.clusters(offset + len);
        let _held = self.ranges.lock(clusters.clone());
        if self.whole_clusters(offset, len) != len {
            return Ok(0);
        }
        self.zero_clusters(clusters, zeroed)?;
        Ok(len)
    }

    /// Makes `clusters`, which lie in one slice and are held, read as zero by their mapping: those
    /// that could read as anything else, or are to lose the space that they have.
    pub(super) fn zero_clusters(&self, clusters: Range<u64>, zeroed: Zeroed) -> Result<()> {
        let g = self.geometry;
        let mut lost = Lost::default();
        let mut changed = clusters.end..clusters.start;
        let old = self.entries(clusters.clone())?;
        for (cluster, entry) in clusters.zip(old) {
            let kind = self.cluster_kind(entry.word, cluster)?;
            let new = self.zeroed_entry(entry, cluster, kind, zeroed);
            if new == entry {
                continue;
            }
            changed = changed.start.min(cluster)..cluster + 1;
            if let Kind::Compressed { stored, .. } = kind {
                self.check_leaving(stored.offset, stored.len)?;
                lost.compressed.push(stored.range());
            } else if let Some(place) = kind.place() {
                if place.in_place {
                    self.check_overlap(place.offset, g.cluster_size())?;
                } else {
                    self.check_leaving(place.offset, g.cluster_size())?;
                }
                if new.word != entry.zeroed(g).word {
                    lost.add(place.offset..place.offset + g.cluster_size());
                }
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        if let Placement::External(external) = &self.placement {
            // Data that was written stays in the file and is mapped no longer.
            external.forget_hole();
        }
        self.change(changed, |cluster, old| {
            match self.cluster_kind(old.word, cluster) {
                Ok(kind) => self.zeroed_entry(old, cluster, kind, zeroed),
                Err(_) => old,
            }
        })?;
        let external = matches!(self.placement, Placement::External(_));
        if !(zeroed == Zeroed::Emptied && external) {
            for range in lost.clusters {
                self.retire(range.start, range.end - range.start);
            }
        }
        for range in lost.compressed {
            self.retired.add_compressed(range);
        }
        Ok(())
    }

    /// What `entry` of a cluster of this kind becomes.
    fn zeroed_entry(&self, entry: Entry, cluster: u64, kind: Kind, zeroed: Zeroed) -> Entry {
        let g = self.geometry;
        let shows = match zeroed {
            Zeroed::Behind => false,
            Zeroed::Explicit => true,
            _ => self.backing_shows(cluster << g.cluster_bits),
        };
        match kind {
            _ if zeroed == Zeroed::Emptied => Entry::UNALLOCATED,
            Kind::Zero(_) if zeroed == Zeroed::Reserved => entry,
            Kind::Data(place) if zeroed == Zeroed::Reserved && place.in_place => entry.zeroed(g),
            _ if entry == Entry::UNALLOCATED && !shows => entry,
            _ if self.version < 3 => Entry::UNALLOCATED,
            _ => Entry::zero_plain(g),
        }
    }

    /// Zeroes some of the `len` bytes at `offset`, which lie in one cluster, and returns how many;
    /// none if another request has changed their mapping meanwhile.
    fn zero_part(&self, offset: u64, len: u64, zeroed: Zeroed) -> Result<u64> {
        let run = self.run_in_slice(offset, len)?;
        let reads_zero = match run.kind {
            Kind::Zero(_) => true,
            Kind::Unallocated(_) => zeroed != Zeroed::Explicit && !self.backing_shows(offset),
            Kind::Data(_) | Kind::Compressed { .. } => false,
        };
        if reads_zero {
            return Ok(run.len);
        }
        let whole = self.whole_subclusters(offset, run.len);
        if !whole.is_empty() && !matches!(run.kind, Kind::Compressed { .. }) {
            return match whole.start - offset {
                0 => self.zero_subclusters(whole, run.kind),
                head => self.zero_bytes(offset, head, run.kind),
            };
        }
        self.zero_bytes(offset, run.len, run.kind)
    }

    /// Makes whole subclusters of one cluster, mapped as `kind`, read as zero by their mapping.
    /// Returns how many bytes they have; 0 if another request was faster.
    fn zero_subclusters(&self, range: Range<u64>, kind: Kind) -> Result<u64> {
        let g = self.geometry;
        let len = range.end - range.start;
        let cluster = g.cluster(range.start);
        let _held = self.ranges.lock(cluster..cluster + 1);
        let now = self.run_in_slice(range.start, len)?;
        if now.len < len || now.kind != kind {
            return Ok(0);
        }
        if let Placement::External(external) = &self.placement {
            external.forget_hole();
        }
        self.change(cluster..cluster + 1, |_, old| {
            let subclusters = old.subclusters.zeroed(g.subclusters(cluster, &range));
            Entry { subclusters, ..old }
        })?;
        Ok(len)
    }

    /// Zeroes some of the `len` bytes at `offset`, which are mapped as `kind`, by writing zeros, and
    /// returns how many; none if another request has changed their mapping meanwhile.
    fn zero_bytes(&self, offset: u64, len: u64, kind: Kind) -> Result<u64> {
        match kind {
            Kind::Data(Place {
                offset: data,
                in_place: true,
            }) => {
                self.check_overlap(data, len)?;
                self.data().write_zeroes(data, len, false)?;
                Ok(len)
            }
            _ => self.write_zeros(offset, len),
        }
    }

    /// Gives the `len` bytes at `offset`, which lie in one cluster, zeros, and keeps what shows now
    /// around them. Returns how many bytes that are; none if another request has given it data
    /// meanwhile.
    fn write_zeros(&self, offset: u64, len: u64) -> Result<u64> {
        let (len, _held) = self.hold(offset, len);
        self.write_zeros_held(offset, len)
    }

    /// [`write_zeros`](Self::write_zeros) of a range in one cluster that is held.
    pub(super) fn write_zeros_held(&self, offset: u64, len: u64) -> Result<u64> {
        let mut zeros = vec![0; len as usize];
        let zeros = [VolatileSlice::from(&mut zeros[..])];
        self.write_held(offset, len, &mut Buffers::new(&zeros))
    }

    /// How many of the `len` bytes at `offset` are whole clusters of one L2 slice. The part of a
    /// cluster that the disk ends in is a whole one.
    fn whole_clusters(&self, offset: u64, len: u64) -> u64 {
        let g = self.geometry;
        if g.in_cluster(offset) != 0 {
            return 0;
        }
        let end = (offset + len).min(g.slice_end(offset));
        let whole_end = if end == self.size() {
            end
        } else {
            end - g.in_cluster(end)
        };
        whole_end - offset
    }

    /// The whole subclusters in the `len` bytes at `offset`, if clusters have any.
    fn whole_subclusters(&self, offset: u64, len: u64) -> Range<u64> {
        let g = self.geometry;
        if !g.extended_l2 {
            return offset..offset;
        }
        let end = offset + len;
        offset.next_multiple_of(g.grain_size())..end - g.in_grain(end)
    }

    /// Bytes from `offset` to the end of its cluster.
    fn to_cluster_end(&self, offset: u64) -> u64 {
        self.geometry.cluster_size() - self.geometry.in_cluster(offset)
    }
}

/// What loses its mapping.
#[derive(Default)]
struct Lost {
    /// Whole clusters of the file that holds guest data.
    clusters: Vec<Range<u64>>,
    compressed: Vec<Range<u64>>,
}

impl Lost {
    fn add(&mut self, range: Range<u64>) {
        match self.clusters.last_mut() {
            Some(last) if last.end == range.start => last.end = range.end,
            _ => self.clusters.push(range),
        }
    }
}
