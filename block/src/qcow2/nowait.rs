//! Reads and writes that wait for nothing: no device, no other request, no lock that somebody holds
//! during I/O.
//!
//! They find their way with what is in memory, and leave everything else to the ordinary methods:
//! mappings that are not cached or bad, compressed clusters, and writes that change the mapping, or
//! that would have to look twice whether metadata lies where they go.

use vm_memory::VolatileSlice;

use super::Qcow2;
use super::mapping::{Kind, Place};
use super::placement::Placement;
use crate::Result;
use crate::buffers::{Buffers, fill_zero};
use crate::disk::total_len;
use crate::file::ImageFile;

impl Qcow2 {
    /// Reads the `len` bytes at `offset`, a range of the disk, if that need not wait.
    pub(super) fn try_read(
        &self,
        bufs: &[VolatileSlice<'_>],
        offset: u64,
        len: u64,
    ) -> Result<bool> {
        if let Some(file) = self.seen_passthrough(offset, len) {
            return file.try_read_at(bufs, offset);
        }
        let _running = self.requests.begin();
        if let Some(place) = self.data_in_cluster(offset, len) {
            return self.data().try_read_at(bufs, place.offset);
        }
        self.try_runs(bufs, offset, len, |kind, bufs, at| match kind {
            Kind::Data(place) => self.data().try_read_at(bufs, place.offset),
            Kind::Zero(_) => {
                fill_zero(bufs);
                Ok(true)
            }
            Kind::Compressed { .. } => Ok(false),
            Kind::Unallocated(_) => self.try_read_backing(bufs, at),
        })
    }

    /// Writes the `len` bytes at `offset`, a range of a disk that may be written, if that need not
    /// wait.
    pub(super) fn try_write(
        &self,
        bufs: &[VolatileSlice<'_>],
        offset: u64,
        len: u64,
    ) -> Result<bool> {
        if !self.try_track(offset, len) {
            return Ok(false);
        }
        if let Some(file) = self.seen_passthrough(offset, len) {
            return file.try_write_at(bufs, offset);
        }
        let _running = self.requests.begin();
        let write = |place: Place, len, bufs: &[VolatileSlice<'_>]| {
            let may_write = place.in_place && !self.may_overlap(place.offset, len);
            Ok(may_write && self.data().try_write_at(bufs, place.offset)?)
        };
        if let Some(place) = self.data_in_cluster(offset, len) {
            return write(place, len, bufs);
        }
        self.try_runs(bufs, offset, len, |kind, bufs, _| match kind {
            Kind::Data(place) => write(place, total_len(bufs), bufs),
            _ => Ok(false),
        })
    }

    /// Calls `transfer` for each part of the `len` bytes at `offset` that is mapped in one way, with
    /// its buffers and its guest offset, until it returns `false` or the mapping is not at hand; `false`
    /// then.
    fn try_runs(
        &self,
        bufs: &[VolatileSlice<'_>],
        offset: u64,
        len: u64,
        transfer: impl Fn(Kind, &[VolatileSlice<'_>], u64) -> Result<bool>,
    ) -> Result<bool> {
        let mut buffers = Buffers::new(bufs);
        let mut done = 0;
        while done < len {
            let Some(run) = self.run_in_cache(offset + done, len - done) else {
                return Ok(false);
            };
            if run.len == len {
                return transfer(run.kind, bufs, offset);
            }
            let mut is_done = true;
            buffers.take(run.len, |piece, at| {
                is_done = is_done && transfer(run.kind.advanced(at), piece, offset + done + at)?;
                Ok::<_, crate::Error>(())
            })?;
            if !is_done {
                return Ok(false);
            }
            done += run.len;
        }
        Ok(true)
    }

    /// As [`passthrough`](Self::passthrough), as far as it has been seen already.
    fn seen_passthrough(&self, offset: u64, len: u64) -> Option<&ImageFile> {
        let Placement::Raw(external, tables) = &self.placement else {
            return None;
        };
        if len == 0 {
            return None;
        }
        let g = self.geometry;
        let mut range = g.l1_index(g.cluster(offset))..=g.l1_index(g.cluster(offset + len - 1));
        let is_complete = range.all(|table| tables.is_complete(table));
        is_complete.then_some(&external.file)
    }

    /// Reads what shows at `offset` where this image has nothing.
    fn try_read_backing(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        match &self.backing {
            Some(backing) if offset < backing.size() => {
                let left = backing.size() - offset;
                Ok(total_len(bufs) <= left && backing.try_read_at(bufs, offset)?)
            }
            _ => {
                fill_zero(bufs);
                Ok(true)
            }
        }
    }
}
