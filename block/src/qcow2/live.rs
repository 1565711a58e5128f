//! What is done to the image of a disk that is in use.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::entry::Entry;
use super::header::Header;
use super::mapping::Kind;
use super::placement::Placement;
use super::rebase::{self, Taking};
use super::zeroes::Zeroed;
use super::{BitmapInfo, Qcow2};
use crate::buffers::Buffers;
use crate::file::ImageFile;
use crate::sync::atomic::Ordering;
use crate::{Disk, Error, ExtentKind, Result, Stamp};

/// Bytes of a backing file that are looked at at once.
const PIECE: u64 = 1 << 20;

impl Qcow2 {
    /// Where the image is, as it was named when it was opened.
    pub fn path(&self) -> &Path {
        &self.image.path
    }

    /// The image file, and the external data file.
    pub(crate) fn files(&self) -> (&ImageFile, Option<&ImageFile>) {
        let data = match self.placement {
            Placement::Internal => None,
            _ => Some(self.data()),
        };
        (&self.image, data)
    }

    /// What shows where the image has nothing.
    pub(crate) fn lower(&self) -> Option<&Arc<dyn Disk>> {
        self.backing.as_ref()
    }

    /// Puts the image on something else, which shows the same where the image has nothing.
    pub(crate) fn put_on(&mut self, below: Option<Arc<dyn Disk>>) {
        self.backing = below;
    }

    /// Stores everything for the last time, unless that has been done, while nobody writes: the image is
    /// only read from now on. Returns what could not be stored, and is not needed for the disk.
    ///
    /// # Errors
    /// What is in memory could not be written back; the image goes on as before.
    pub(crate) fn freeze(&self) -> Result<Option<Error>> {
        if self.read_only || self.closed.load(Ordering::Relaxed) {
            return Ok(None);
        }
        self.write_back()?;
        Ok(self.close().err())
    }

    /// Whether the image keeps the stamp of what is below it.
    pub(crate) fn keeps_stamp(&self) -> Result<bool> {
        let header = Header::read(&*self.image.storage, &self.image.path)?;
        Ok(header.extensions.base_stamp.is_some())
    }

    /// Has the image keep this stamp of what is below it, or none. No request is under way.
    pub(crate) fn keep_stamp(&self, stamp: Option<Stamp>) -> Result<()> {
        self.check_writable()?;
        let mut header = Header::read(&*self.image.storage, &self.image.path)?;
        header.set_base_stamp(stamp);
        header.write(&self.image)
    }

    /// The bitmaps that follow changes of the disk.
    pub(crate) fn following_bitmaps(&self) -> Result<Vec<BitmapInfo>> {
        let bitmaps = self.bitmaps()?.unwrap_or_default().into_iter();
        Ok(bitmaps.filter(|bitmap| bitmap.auto).collect())
    }

    /// Makes what a raw data file holds behind the end of the disk zeros: a disk that grows shows it.
    pub(crate) fn clear_behind_end(&self) -> Result<()> {
        let Placement::Raw(external, _) = &self.placement else {
            return Ok(());
        };
        let (end, len) = (self.size(), external.file.size()?);
        if len > end {
            external.file.write_zeroes(end, len - end, true)?;
            external.file.sync()?;
        }
        Ok(())
    }

    /// Writes metadata back if much is waiting for that.
    pub(crate) fn make_room(&self) -> Result<()> {
        if self.wants_write_back() {
            return self.write_back();
        }
        Ok(())
    }

    /// How many bytes at the start of `range` the image has nothing of.
    pub(crate) fn unmapped(&self, range: Range<u64>) -> Result<u64> {
        let extent = self.extent(range.start, range.end - range.start)?;
        Ok(match extent.kind {
            ExtentKind::Unallocated => extent.len,
            _ => 0,
        })
    }

    /// Removes the mapping of the clusters that `range` touches, so that the backing file shows, which
    /// has the same there and is durable. No request is under way.
    pub(crate) fn empty_range(&self, range: Range<u64>) -> Result<()> {
        self.check_writable()?;
        let g = self.geometry;
        let clusters = g.cluster(range.start)..g.clusters(range.end);
        self.unmap_clusters(clusters, Zeroed::Emptied)
    }

    /// Whether clusters that lose their mapping keep their space in a file.
    pub(crate) fn keeps_space(&self) -> bool {
        matches!(self.placement, Placement::External(_))
    }

    /// Releases the space in an external data file of what is not mapped in `range`. No request is under
    /// way, and the mapping is on disk.
    pub(crate) fn release_unmapped(&self, range: Range<u64>) -> Result<()> {
        let Placement::External(external) = &self.placement else {
            return Ok(());
        };
        // What is released may be mapped again, and lie outside of the hole that was known.
        external.forget_hole();
        let mut at = range.start;
        while at < range.end {
            let extent = self.extent(at, range.end - at)?;
            if extent.kind == ExtentKind::Unallocated {
                external.file.discard(at, extent.len)?;
            }
            at += extent.len;
        }
        Ok(())
    }

    /// Makes whole subclusters, or clusters, of one slice, which is held, read as zero by their mapping, if
    /// that can be told, else by zeros. The image has nothing of them.
    fn take_zeros(&self, range: Range<u64>) -> Result<()> {
        let g = self.geometry;
        let clusters = g.cluster(range.start)..g.clusters(range.end);
        if self.version < 3 {
            let mut at = range.start;
            while at < range.end {
                let cluster_end = range.end.min((g.cluster(at) + 1) << g.cluster_bits);
                at += self.write_zeros_held(at, cluster_end - at)?;
            }
            return Ok(());
        }
        if !g.extended_l2 {
            return self.zero_clusters(clusters, Zeroed::Explicit);
        }
        if let Placement::External(external) = &self.placement {
            external.forget_hole();
        }
        let end = range.end.next_multiple_of(g.grain_size());
        self.change(clusters, |cluster, old| {
            let start = cluster << g.cluster_bits;
            let part = range.start.max(start)..end.min(start + g.cluster_size());
            let subclusters = old.subclusters.zeroed(g.subclusters(cluster, &part));
            Entry { subclusters, ..old }
        })
    }
}

impl Taking<'_> {
    /// Takes up what the old backing file shows at the start of `range` and the new one does not, while
    /// requests go on, and returns how many bytes that was about.
    pub(crate) fn step(&self, range: Range<u64>) -> Result<u64> {
        let (at, len) = (range.start, range.end - range.start);
        let unmapped = self.disk.unmapped(range)?;
        if unmapped == 0 {
            return Ok(self.disk.extent(at, len)?.len);
        }
        let same = self.known_same(at, unmapped)?;
        if same > 0 {
            return Ok(same);
        }
        let mut done = 0;
        let len = unmapped.min(PIECE);
        self.disk.with_space(|| {
            done = self.take_held(at, len)?;
            Ok(())
        })?;
        Ok(done)
    }

    /// [`step`](Self::step) of what lies in one slice, if the image has still nothing there.
    fn take_held(&self, at: u64, len: u64) -> Result<u64> {
        let disk = self.disk;
        let _running = disk.requests.begin();
        let (len, _held) = disk.hold(at, len);
        let run = disk.run(at, len)?;
        if !matches!(run.kind, Kind::Unallocated(_)) {
            return Ok(run.len);
        }
        let mut old = vec![0; run.len as usize];
        let mut new = old.clone();
        disk.read_backing(&[VolatileSlice::from(&mut old[..])], at, run.len)?;
        rebase::read(self.new, at, &mut new)?;
        let mut done = 0;
        while done < old.len() {
            let from = at + done as u64;
            let mut end = done + self.unit(from).min(old.len() - done);
            if old[done..end] == new[done..end] {
                done = end;
                continue;
            }
            let is_zero = |range: Range<usize>| old[range].iter().all(|byte| *byte == 0);
            if is_zero(done..end) {
                disk.take_zeros(from..at + end as u64)?;
                done = end;
                continue;
            }
            // What else is to be written goes with it.
            while end < old.len() {
                let next = end..end + self.unit(at + end as u64).min(old.len() - end);
                if is_zero(next.clone()) || old[next.clone()] == new[next.clone()] {
                    break;
                }
                end = next.end;
            }
            let data = [VolatileSlice::from(&mut old[done..end])];
            let mut buffers = Buffers::new(&data);
            while done < end {
                let (from, len) = (at + done as u64, (end - done) as u64);
                done += match disk.write_held(from, len, &mut buffers)? {
                    // It is mapped, and so taken up.
                    0 => end - done,
                    written => written as usize,
                };
            }
        }
        Ok(run.len)
    }
}
