//! Reads and writes of a qcow2 disk.

use crate::sync::atomic::Ordering;
use crate::sync::sleep;
use std::ops::Range;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use vm_memory::VolatileSlice;

use super::Qcow2;
use super::allocator::Allocation;
use super::mapping::{Kind, Place};
use super::placement::Placement;
use crate::buffers::{Buffers, fill_zero, with_scratch};
use crate::disk::{check_range, total_len};
use crate::live::ImageRef;
use crate::ranges::RangeGuard;
use crate::{Disk, Error, Extent, Limits, Preallocation, Result, Stamp};

/// How often a request on a full disk looks for clusters that have come back.
const SPACE_POLL: Duration = Duration::from_millis(1);

/// What a request to the mapping is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Area {
    Disk,
    /// Behind the disk. The right to change its size is held.
    VmState,
}

impl Disk for Qcow2 {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn limits(&self) -> Limits {
        let g = self.geometry;
        let units = self.data().units();
        let cluster = g.cluster_size() as u32;
        // A place in a raw data file, or one of the standard layout, is of use to nobody else, unless
        // the file system takes it back.
        let (discard_granularity, can_unmap) = match &self.placement {
            Placement::Raw(..) => (cluster.max(units.discard), units.can_unmap),
            Placement::External(_) => (cluster, units.can_unmap && self.can_unmap()),
            _ => (cluster, self.can_unmap()),
        };
        Limits {
            write_cache: !self.image.is_write_through(),
            physical_block_size: units.physical_block,
            optimal_io_size: cluster,
            discard_granularity,
            can_unmap: can_unmap && !self.read_only,
            ..Limits::new(512, self.read_only)
        }
    }

    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let len = total_len(bufs);
        check_range(offset, len, self.size())?;
        if let Some(file) = self.passthrough(offset, len)? {
            return file.read_at(bufs, offset);
        }
        self.read_mapped(bufs, offset)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.check_writable()?;
        let len = total_len(bufs);
        check_range(offset, len, self.size())?;
        self.track(offset, len)?;
        let is_written = match self.write_there(bufs, offset, len) {
            // Clusters may come back; that is waited for.
            Err(e) if e.is_no_space() => false,
            written => written?,
        };
        if !is_written {
            return self.with_space(|| self.write_mapped(bufs, offset, len, Area::Disk));
        }
        // No metadata has changed.
        if self.image.is_write_through() {
            self.write_back()
        } else {
            Ok(())
        }
    }

    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        let len = total_len(bufs);
        check_range(offset, len, self.size())?;
        self.try_read(bufs, offset, len)
    }

    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        self.check_writable()?;
        let len = total_len(bufs);
        check_range(offset, len, self.size())?;
        match self.try_write(bufs, offset, len) {
            // Clusters may come back; that is waited for.
            Err(e) if e.is_no_space() => Ok(false),
            tried => tried,
        }
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_writable()?;
        check_range(offset, len, self.size())?;
        self.track(offset, len)?;
        self.with_space(|| self.zero(offset, len, unmap))
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        check_range(offset, len, self.size())?;
        self.track(offset, len)?;
        self.with_space(|| self.unmap(offset, len))
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        check_range(offset, len, self.size())?;
        self.find_extent(offset, len)
    }

    fn sparse_extent(&self, offset: u64, len: u64) -> Result<Extent> {
        check_range(offset, len, self.size())?;
        self.find_sparse_extent(offset, len)
    }

    fn host_file(&self) -> Option<BorrowedFd<'_>> {
        self.data().storage.fd()
    }

    fn copy_from(&self, source: BorrowedFd<'_>, from: u64, offset: u64, len: u64) -> Result<bool> {
        self.check_writable()?;
        check_range(offset, len, self.size())?;
        let Some(file) = self.passthrough(offset, len)? else {
            return Ok(false);
        };
        self.track(offset, len)?;
        let is_copied = file.copy_from(source, from, offset, len)?;
        self.settle()?;
        Ok(is_copied)
    }

    fn as_image(&self) -> Option<ImageRef<'_>> {
        Some(ImageRef::Qcow2(self))
    }

    fn backing(&self) -> Option<&dyn Disk> {
        self.backing.as_deref()
    }

    fn stamp(&self) -> Result<Option<Stamp>> {
        let below = match &self.backing {
            None => Some(Vec::new()),
            Some(backing) => backing.stamp()?.map(|stamp| stamp.files),
        };
        let image = self.image.stamp()?;
        let data = match self.placement {
            Placement::Internal => Some(None),
            _ => self.data().stamp()?.map(Some),
        };
        let (Some(image), Some(data), Some(below)) = (image, data, below) else {
            return Ok(None);
        };
        Ok(Some(Stamp {
            size: self.size(),
            files: [image].into_iter().chain(data).chain(below).collect(),
        }))
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.check_writable()?;
        self.change_size(size, Preallocation::Off)
    }

    fn resize_preallocated(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        self.change_size(size, preallocation)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            Ok(())
        } else {
            self.write_back()
        }
    }

    fn close(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        if !self.closed.swap(true, Ordering::AcqRel) {
            let stored = self.store_all();
            self.is_lost.store(stored.is_err(), Ordering::Release);
            return stored;
        }
        if self.is_lost.load(Ordering::Acquire) {
            // What could not be stored then is not stored now.
            let file = self.image.path.clone();
            return Err(Error::Closed { file });
        }
        Ok(())
    }
}

impl Qcow2 {
    /// Ends a change: without a write cache, it is durable.
    fn settle(&self) -> Result<()> {
        if self.image.is_write_through() {
            self.write_back()
        } else {
            self.limit_dirty()
        }
    }

    /// Fails if the image is read-only, closed, or marked as corrupt.
    pub(crate) fn check_writable(&self) -> Result<()> {
        if self.read_only {
            Err(Error::ReadOnly)
        } else if self.closed.load(Ordering::Relaxed) {
            let file = self.image.path.clone();
            Err(Error::Closed { file })
        } else {
            self.check_sound()
        }
    }

    /// Fails if the image is marked as corrupt.
    pub(super) fn check_sound(&self) -> Result<()> {
        if self.corrupt.load(Ordering::Relaxed) {
            let file = self.image.path.clone();
            return Err(Error::Corrupt { file });
        }
        Ok(())
    }

    /// Calls `write` until it finds room for its data and tables, or no more clusters come back.
    pub(super) fn with_space(&self, mut write: impl FnMut() -> Result<()>) -> Result<()> {
        loop {
            let returned = self.retired.returned();
            match write() {
                Err(e) if e.is_no_space() && self.wait_for_space(returned)? => {}
                Err(e) => return Err(e),
                Ok(()) => return self.settle(),
            }
        }
    }

    /// Fills `bufs` through the mapping.
    #[inline]
    pub(super) fn read_mapped(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let len = total_len(bufs);
        let _running = self.requests.begin();
        match self.data_in_cluster(offset, len) {
            Some(place) => self.data().read_at(bufs, place.offset),
            None => self.read_runs(bufs, offset, len),
        }
    }

    /// [`read_mapped`](Self::read_mapped), run by run.
    #[inline(never)]
    fn read_runs(&self, bufs: &[VolatileSlice<'_>], offset: u64, len: u64) -> Result<()> {
        let mut buffers = Buffers::new(bufs);
        let mut done = 0;
        while done < len {
            let run = self.run(offset + done, len - done)?;
            if run.len == len {
                return self.read_run(run.kind, bufs, offset);
            }
            buffers.take(run.len, |piece, at| {
                self.read_run(run.kind.advanced(at), piece, offset + done + at)
            })?;
            done += run.len;
        }
        Ok(())
    }

    /// Writes `bufs`, of `len` bytes, where data is already, if that place is found in a few steps.
    /// Returns whether they have been written.
    #[inline(always)]
    fn write_there(&self, bufs: &[VolatileSlice<'_>], offset: u64, len: u64) -> Result<bool> {
        if let Some(file) = self.passthrough(offset, len)? {
            return file.write_at(bufs, offset).map(|()| true);
        }
        let _running = self.requests.begin();
        let Some(Place {
            offset,
            in_place: true,
        }) = self.data_in_cluster(offset, len)
        else {
            return Ok(false);
        };
        self.check_overlap(offset, len)?;
        self.data().write_at(bufs, offset).map(|()| true)
    }

    /// Writes `bufs`, of `len` bytes in `area`, through the mapping.
    pub(super) fn write_mapped(
        &self,
        bufs: &[VolatileSlice<'_>],
        offset: u64,
        len: u64,
        area: Area,
    ) -> Result<()> {
        let _running = self.requests.begin();
        let mut buffers = Buffers::new(bufs);
        let mut done = 0;
        let g = self.geometry;
        let in_cluster = 1..=g.cluster_size() - g.in_cluster(offset);
        if in_cluster.contains(&len) && !g.extended_l2 {
            // `write_there` would have found data, but for what is not in the cache.
            done = self.write_new(offset, len, area, &mut buffers)?;
        }
        while done < len {
            let run = self.run(offset + done, len - done)?;
            done += match run.kind {
                Kind::Data(Place {
                    offset,
                    in_place: true,
                }) if run.len == len => {
                    self.check_overlap(offset, len)?;
                    return self.data().write_at(bufs, offset);
                }
                Kind::Data(Place {
                    offset,
                    in_place: true,
                }) => {
                    self.check_overlap(offset, run.len)?;
                    let data = self.data();
                    buffers.take(run.len, |piece, at| data.write_at(piece, offset + at))?;
                    run.len
                }
                _ => self.write_new(offset + done, run.len, area, &mut buffers)?,
            };
        }
        Ok(())
    }

    /// Fills `bufs` with what is mapped as `kind` at guest offset `offset`.
    fn read_run(&self, kind: Kind, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        match kind {
            Kind::Data(place) => self.data().read_at(bufs, place.offset),
            Kind::Zero(_) => {
                fill_zero(bufs);
                Ok(())
            }
            Kind::Compressed { stored, skip } => self.read_compressed(stored, skip as usize, bufs),
            Kind::Unallocated(_) => self.read_backing(bufs, offset, total_len(bufs)),
        }
    }

    /// Writes up to `len` bytes to clusters at `offset` that have no data, and returns how many;
    /// none if another request has given them data meanwhile.
    fn write_new(
        &self,
        offset: u64,
        len: u64,
        area: Area,
        buffers: &mut Buffers<'_, '_>,
    ) -> Result<u64> {
        let (len, _held) = self.hold(offset, len);
        if area == Area::Disk {
            // A shrink waits for those who hold what it cuts off, and finds what they have mapped there.
            check_range(offset, len, self.size())?;
        }
        self.write_held(offset, len, buffers)
    }

    /// As much of the `len` bytes at `offset` as lies in one slice, so that mapping their clusters
    /// succeeds or fails as a whole, and the range of those.
    pub(super) fn hold(&self, offset: u64, len: u64) -> (u64, RangeGuard<'_>) {
        let g = self.geometry;
        let len = len.min(g.slice_end(offset) - offset);
        let clusters = g.cluster(offset)..g.cluster(offset + len - 1) + 1;
        (len, self.ranges.lock(clusters))
    }

    /// [`write_new`](Self::write_new) of a range that is held.
    ///
    /// Nobody sees the clusters before the mapping changes, and it changes last: a reader finds
    /// all zeros or all of the data, and after an error the old state.
    pub(super) fn write_held(
        &self,
        offset: u64,
        len: u64,
        buffers: &mut Buffers<'_, '_>,
    ) -> Result<u64> {
        let g = self.geometry;
        let first = g.cluster(offset);
        let run = self.run(offset, len)?;
        let old = run.kind.place();
        match (run.kind, old) {
            (Kind::Data(_), Some(Place { in_place: true, .. })) => return Ok(0),
            // What it leaves will be given back.
            (Kind::Compressed { stored, .. }, _) => {
                self.check_leaving(stored.offset, stored.len)?;
            }
            (_, Some(place)) if place.in_place => self.check_overlap(place.offset, run.len)?,
            (_, Some(place)) => self.check_leaving(place.offset, run.len)?,
            (_, None) => {}
        }
        self.own_table(g.l1_index(first))?;
        let clusters = g.cluster(offset + run.len - 1) - first + 1;
        let reserved = old.filter(|place| place.in_place);
        let place = match reserved {
            // What the reserved clusters hold is anything.
            Some(place) => Allocation {
                offset: place.offset - g.in_cluster(offset),
                clusters,
                zeroed: false,
            },
            None => self.allocate(first, clusters)?,
        };
        let allocated = (place.clusters << g.cluster_bits) - g.in_cluster(offset);
        let len = run.len.min(allocated);
        let whole = self.whole(offset..offset + len, run.kind);
        let mapped = self
            .write_filled(offset, len, &place, run.kind, buffers)
            .and_then(|()| self.map_data(whole, place.offset));
        if mapped.is_err() && reserved.is_none() {
            self.release(&place);
        }
        mapped?;
        match (run.kind, old) {
            (Kind::Compressed { stored, .. }, _) => self.retired.add_compressed(stored.range()),
            (_, Some(shared)) if reserved.is_none() => {
                let start = shared.offset - g.in_cluster(offset);
                self.retire(start, place.clusters << g.cluster_bits);
            }
            _ => {}
        }
        Ok(len)
    }

    /// The clusters, or subclusters, that get data of their own when those of `range` are written,
    /// which are mapped as `old`: all of a cluster that was compressed.
    fn whole(&self, range: Range<u64>, old: Kind) -> Range<u64> {
        let unit = match old {
            Kind::Compressed { .. } => self.geometry.cluster_size(),
            _ => self.geometry.grain_size(),
        };
        range.start / unit * unit..range.end.next_multiple_of(unit)
    }

    /// Writes `len` bytes for guest offset `offset` to the clusters of `place`, and to the rest of
    /// the first and the last of them what shows there before, which is mapped as `old`, in one
    /// piece: a cluster is written once, and no later than its data.
    fn write_filled(
        &self,
        offset: u64,
        len: u64,
        place: &Allocation,
        old: Kind,
        buffers: &mut Buffers<'_, '_>,
    ) -> Result<()> {
        let g = self.geometry;
        let end = offset + len;
        let whole = self.whole(offset..end, old);
        // What other subclusters have moves with them.
        let moved = match old.place() {
            Some(Place {
                in_place: false, ..
            }) => whole.start - g.in_cluster(whole.start)..end.next_multiple_of(g.cluster_size()),
            _ => whole.clone(),
        };
        let tail_end = end + self.tail(end, whole.end)?;
        let shows = match old {
            Kind::Unallocated(_) => {
                self.backing_shows(whole.start)
                    && !(self.is_empty_below(whole.start..offset)?
                        && self.is_empty_below(end..tail_end)?)
            }
            Kind::Compressed { .. } | Kind::Data(_) => true,
            Kind::Zero(_) => false,
        };
        let has_edges = (whole.start, tail_end) != (offset, end);
        let is_filled = !has_edges || place.zeroed && !shows;
        if is_filled && moved == whole {
            let at = place.offset + g.in_cluster(offset);
            return buffers.take(len, |piece, done| self.data().write_at(piece, at + done));
        }
        let edges = [
            moved.start..whole.start,
            whole.start..offset,
            end..tail_end,
            whole.end..moved.end,
        ];
        let lens = edges
            .each_ref()
            .map(|edge| (edge.end - edge.start) as usize);
        with_scratch(lens.iter().sum(), |mut scratch| {
            let parts = lens.map(|len| scratch.split_off_mut(..len).unwrap_or_default());
            let parts = parts.map(VolatileSlice::from);
            for (i, part) in parts.into_iter().enumerate() {
                let keeps = i == 0 || i == 3;
                if !(shows || keeps) {
                    fill_zero(&[part]);
                } else if !part.is_empty() {
                    self.read_old(old, offset, edges[i].start, part, keeps)?;
                }
            }
            let mut pieces = parts[..2].to_vec();
            buffers.take(len, |piece, _| {
                pieces.extend_from_slice(piece);
                Ok::<_, Error>(())
            })?;
            pieces.extend_from_slice(&parts[2..]);
            let at = place.offset + g.in_cluster(moved.start);
            self.data().write_at(&pieces, at)
        })
    }

    /// Fills `buf` with what there is at guest offset `at` of a cluster that is mapped as `old` from
    /// `offset` on: what shows there or, if the rest of it only `moves`, what lies there.
    fn read_old(
        &self,
        old: Kind,
        offset: u64,
        at: u64,
        buf: VolatileSlice<'_>,
        moves: bool,
    ) -> Result<()> {
        match (old, old.place()) {
            (Kind::Compressed { stored, .. }, _) => {
                let skip = self.geometry.in_cluster(at);
                self.read_compressed(stored, skip as usize, &[buf])
            }
            (Kind::Unallocated(_), _) if !moves => self.read_backing(&[buf], at, buf.len() as u64),
            (_, Some(place)) => self.data().read_at(&[buf], place.offset + at - offset),
            (_, None) => {
                fill_zero(&[buf]);
                Ok(())
            }
        }
    }

    /// Bytes from `end` to `whole_end`, where its cluster or subcluster ends, as far as they exist: an
    /// external data file is not extended beyond the disk, and what it holds there is cleared.
    fn tail(&self, end: u64, whole_end: u64) -> Result<u64> {
        let size = self.size();
        let is_shared = matches!(self.placement, Placement::Internal | Placement::Packed(_));
        if whole_end <= size || is_shared {
            return Ok(whole_end - end);
        }
        let file_end = self.data().size()?.max(size);
        Ok(whole_end.min(file_end).saturating_sub(end))
    }

    /// Waits until clusters have come back that have lost their mapping, unless some have since
    /// `returned` of them had. Whether any have.
    ///
    /// The calling request must not be running: what it waits for waits for running requests. All
    /// of those end by themselves.
    fn wait_for_space(&self, returned: usize) -> Result<bool> {
        while self.retired.returned() == returned {
            if self.retired.is_empty() {
                return Ok(false);
            }
            self.write_back()?;
            if self.retired.returned() == returned {
                sleep(SPACE_POLL);
            }
        }
        Ok(true)
    }

    pub(super) fn wants_write_back(&self) -> bool {
        self.l2.wants_write_back() || self.retired.wants_write_back()
    }

    /// Writes metadata back if much of the cache is waiting for it.
    fn limit_dirty(&self) -> Result<()> {
        if self.wants_write_back() {
            self.write_back()
        } else {
            Ok(())
        }
    }
}
