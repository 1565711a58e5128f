//! Writing zeroes, and discarding.
//!
//! In a raw data file both become zeros in the file, and the mapping stays, so that the file
//! remains a faithful raw image. Elsewhere whole clusters get the zero flag, or lose their mapping
//! and go back to the allocator.

use super::Qcow2;
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
}

impl Qcow2 {
    /// Makes a range read as zero.
    pub(super) fn zero(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let passthrough = self.passthrough(offset, len)?;
        if passthrough.is_none() {
            let mut running = self.requests.begin();
            let zeroed = if unmap {
                Zeroed::Unmapped
            } else {
                Zeroed::Reserved
            };
            let is_raw = matches!(self.placement, Placement::Raw(..));
            let mut done = 0;
            while done < len {
                if self.wants_write_back() {
                    // A request waits for itself: what it unmapped comes back after it.
                    drop(running);
                    self.write_back()?;
                    running = self.requests.begin();
                }
                let run = self.run_in_slice(offset + done, len - done)?;
                done += match run.kind {
                    Kind::Data(place) => self.zero_data(offset + done, run.len, place, zeroed)?,
                    Kind::Zero(Some(_)) if unmap && !is_raw => {
                        match self.whole_clusters(offset + done, run.len) {
                            0 => run.len.min(self.to_cluster_end(offset + done)),
                            whole => self.change_whole(offset + done, whole, zeroed)?,
                        }
                    }
                    Kind::Compressed { .. } => match self.whole_clusters(offset + done, run.len) {
                        whole if whole > 0 && self.can_unmap() => {
                            self.change_whole(offset + done, whole, Zeroed::Unmapped)?
                        }
                        _ => self.write_zeros(offset + done, run.len)?,
                    },
                    Kind::Unallocated if self.backing_shows(offset + done) => {
                        self.hide_backing(offset + done, run.len)?
                    }
                    Kind::Zero(_) | Kind::Unallocated => run.len,
                };
            }
        }
        if let Placement::Raw(external, _) = &self.placement {
            // What reads as zero by its mapping must be zero in the raw file too.
            external.file.write_zeroes(offset, len, unmap)?;
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
            let run = self.run_in_slice(at, end - at)?;
            at += match run.kind {
                Kind::Data(_) | Kind::Compressed { .. } | Kind::Zero(Some(_)) => {
                    match self.whole_clusters(at, run.len) {
                        // The disk has grown, and this is not its end any more.
                        0 => run.len,
                        whole => self.change_whole(at, whole, Zeroed::Unmapped)?,
                    }
                }
                Kind::Unallocated if self.backing_shows(at) => {
                    match self.whole_clusters(at, run.len) {
                        0 => run.len,
                        _ => self.hide_backing(at, run.len)?,
                    }
                }
                Kind::Zero(None) | Kind::Unallocated => run.len,
            };
        }
        Ok(())
    }

    /// Whether a cluster can lose its place and read as zero: version 2 has no flag for that, and the
    /// backing file would show.
    fn can_unmap(&self) -> bool {
        self.version >= 3 || self.backing.is_none()
    }

    /// Makes some of the `len` bytes at `offset`, where nothing is mapped, read as zero instead of
    /// what the backing file holds, and returns how many; none if another request has mapped
    /// something there meanwhile.
    fn hide_backing(&self, offset: u64, len: u64) -> Result<u64> {
        let g = self.geometry;
        let whole = self.whole_clusters(offset, len);
        if whole == 0 || self.version < 3 {
            return self.write_zeros(offset, len);
        }
        let clusters = g.cluster(offset)..g.cluster(offset + whole - 1) + 1;
        let _held = self.ranges.lock(clusters.clone());
        let run = self.run_in_slice(offset, whole)?;
        if run.kind != Kind::Unallocated
            || run.len != whole
            || self.whole_clusters(offset, whole) != whole
        {
            return Ok(0);
        }
        self.map_nothing(clusters)?;
        Ok(whole)
    }

    /// Gives the first cluster of the `len` bytes at `offset` data, zeros in the range and what shows
    /// now around it, and returns how many bytes of the range that are; none if another request has
    /// given it data meanwhile.
    fn write_zeros(&self, offset: u64, len: u64) -> Result<u64> {
        let len = len.min(self.to_cluster_end(offset));
        let (len, _held) = self.hold(offset, len);
        self.write_zeros_held(offset, len)
    }

    /// [`write_zeros`](Self::write_zeros) of a range in one cluster that is held.
    pub(super) fn write_zeros_held(&self, offset: u64, len: u64) -> Result<u64> {
        let mut zeros = vec![0; len as usize];
        let zeros = [VolatileSlice::from(&mut zeros[..])];
        self.write_held(offset, len, &mut Buffers::new(&zeros))
    }

    /// Zeroes some of the `len` bytes at guest offset `offset`, which are stored at `place`, and
    /// returns how many; none if another request has changed their mapping meanwhile.
    fn zero_data(&self, offset: u64, len: u64, place: Place, zeroed: Zeroed) -> Result<u64> {
        if let Placement::Raw(..) = self.placement {
            // The caller zeroes the data file; the mapping stays.
            return Ok(len);
        }
        let by_mapping = match zeroed {
            Zeroed::Reserved => self.version >= 3,
            Zeroed::Unmapped => self.can_unmap(),
        };
        match self.whole_clusters(offset, len) {
            whole if whole > 0 && by_mapping => self.change_whole(offset, whole, zeroed),
            _ if !place.in_place => self.write_zeros(offset, len),
            _ => {
                let len = len.min(self.to_cluster_end(offset));
                self.check_overlap(place.offset, len)?;
                self.data().write_zeroes(place.offset, len, false)?;
                Ok(len)
            }
        }
    }

    /// Changes the mapping of the `len` bytes at `offset`, which are whole clusters of one slice
    /// with data or reserved space. Returns `len`, or 0 if another request was faster.
    pub(super) fn change_whole(&self, offset: u64, len: u64, zeroed: Zeroed) -> Result<u64> {
        let g = self.geometry;
        let clusters = g.cluster(offset)..g.cluster(offset + len - 1) + 1;
        let _held = self.ranges.lock(clusters.clone());
        if self.whole_clusters(offset, len) != len {
            // The disk ended in the last of them, and has grown.
            return Ok(0);
        }
        let run = self.run_in_slice(offset, len)?;
        if run.len < len {
            return Ok(0);
        }
        if let Kind::Compressed { stored, .. } = run.kind {
            self.check_overlap(stored.offset, stored.len)?;
            self.map_nothing(clusters)?;
            self.retired.add_shared(stored.range());
            return Ok(len);
        }
        let Some(place) = run.kind.place() else {
            return Ok(0);
        };
        self.check_overlap(place.offset, len)?;
        if zeroed == Zeroed::Reserved && place.in_place {
            self.map_zero(clusters)?;
        } else {
            let size = (clusters.end - clusters.start) << g.cluster_bits;
            self.map_nothing(clusters)?;
            self.retire(place.offset, size);
        }
        Ok(len)
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

    /// Bytes from `offset` to the end of its cluster.
    fn to_cluster_end(&self, offset: u64) -> u64 {
        self.geometry.cluster_size() - self.geometry.in_cluster(offset)
    }
}
