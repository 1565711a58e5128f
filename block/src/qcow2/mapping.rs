//! Where guest clusters are.

use crate::sync::atomic::{AtomicU64, Ordering};

use super::cache::LoadError;
use super::compressed::Stored;
use super::entry::{Cluster, Entry, L2Entry};
use super::placement::Placement;
use super::refcount::Refcounts;
use super::subclusters::Subcluster;
use super::{DataFileLayout, Qcow2, table};
use crate::file::ImageFile;
use crate::sync::{MutexGuard, lock_whole};
use crate::{Error, Extent, ExtentKind, Result};

/// Most L2 slices that are looked at for one extent.
const EXTENT_SLICES: usize = 4096;

/// A range of guest bytes that is mapped in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Run {
    pub kind: Kind,
    /// Length in bytes.
    pub len: u64,
}

/// How a range of guest bytes is mapped. Offsets are those of the range's first byte in the file
/// that holds guest data; the bytes that follow it lie behind it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// Stored here.
    Data(Place),
    /// Reads as zero; space may be reserved for it.
    Zero(Option<Place>),
    /// From `skip` bytes on in a compressed cluster.
    Compressed { stored: Stored, skip: u64 },
    /// Reads as what the backing file has there, or zero; space may be reserved for it if its
    /// cluster has other subclusters.
    Unallocated(Option<Place>),
}

/// Where guest bytes have their place in the file that holds guest data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Place {
    pub offset: u64,
    /// Belongs to this mapping alone and may be overwritten. Else snapshots may have it too.
    pub in_place: bool,
}

/// What is wrong with an L2 entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct BadEntry {
    cluster: u64,
    entry: u64,
    problem: Problem,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Problem {
    Compressed,
    Unaligned,
    NotGuestOffset,
    PastEnd,
    ZeroInVersion2,
    Subclusters,
}

impl Kind {
    fn new(cluster: Cluster, in_place: bool, stored: Stored) -> Self {
        let place = |offset| Place { offset, in_place };
        match cluster {
            Cluster::Compressed => Self::Compressed { stored, skip: 0 },
            Cluster::Normal(offset) => Self::Data(place(offset)),
            Cluster::ZeroAlloc(offset) => Self::Zero(Some(place(offset))),
            Cluster::ZeroPlain => Self::Zero(None),
            Cluster::Unallocated => Self::Unallocated(None),
        }
    }

    /// Where it has its place, written or not.
    pub(super) fn place(self) -> Option<Place> {
        match self {
            Self::Data(place) => Some(place),
            Self::Zero(place) | Self::Unallocated(place) => place,
            Self::Compressed { .. } => None,
        }
    }

    /// Whether it is stored as `expected`; whether it may be overwritten does not matter.
    fn continues(self, expected: Self) -> bool {
        let offset = |place: Option<Place>| place.map(|place| place.offset);
        match (self, expected) {
            (Self::Data(place), Self::Data(next)) => place.offset == next.offset,
            (Self::Zero(place), Self::Zero(next))
            | (Self::Unallocated(place), Self::Unallocated(next)) => offset(place) == offset(next),
            _ => self == expected,
        }
    }

    /// What the part of the range from `bytes` on is mapped as.
    pub(super) fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::Data(place) => Self::Data(place.advanced(bytes)),
            Self::Zero(place) => Self::Zero(place.map(|place| place.advanced(bytes))),
            Self::Unallocated(place) => Self::Unallocated(place.map(|place| place.advanced(bytes))),
            Self::Compressed { stored, skip } => Self::Compressed {
                stored,
                skip: skip + bytes,
            },
        }
    }
}

impl Place {
    fn advanced(self, bytes: u64) -> Self {
        Self {
            offset: self.offset + bytes,
            ..self
        }
    }
}

/// `first`, at `offset`, and what `look` finds behind it, as far as that is data that lies behind it
/// in the file, too.
fn follow(first: Run, offset: u64, len: u64, look: impl Fn(u64, u64) -> Option<Run>) -> Run {
    let mut run = first;
    while run.len < len && matches!(run.kind, Kind::Data(_)) {
        match look(offset + run.len, len - run.len) {
            Some(next) if next.kind == run.kind.advanced(run.len) => run.len += next.len,
            _ => break,
        }
    }
    run
}

impl Qcow2 {
    /// The file that holds guest data.
    pub(super) fn data(&self) -> &ImageFile {
        match &self.placement {
            Placement::Internal => &self.image,
            Placement::External(external) | Placement::Raw(external, _) => &external.file,
            Placement::Packed(packed) => &packed.file,
        }
    }

    /// The refcounts of a writable image.
    pub(super) fn refcounts(&self) -> Result<MutexGuard<'_, Refcounts>> {
        let refcounts = self.refcounts.as_ref().ok_or(Error::ReadOnly)?;
        lock_whole(refcounts).ok_or(Error::BrokenOff)
    }

    /// How the bytes from `offset` on are mapped: as many of `len` as are mapped in the same way,
    /// one behind the other. The range lies within the disk and is not empty.
    ///
    /// Only data is followed beyond an L2 slice, for the sake of long transfers; whoever changes
    /// mappings goes on slice by slice, and must not look at what follows again each time.
    pub(super) fn run(&self, offset: u64, len: u64) -> Result<Run> {
        let first = self.run_in_slice(offset, len)?;
        // What is wrong further on is for the request that reaches it.
        let next = |offset, len| self.look(offset, len).ok()?.ok();
        Ok(follow(first, offset, len, next))
    }

    /// As [`run`](Self::run), if what it needs to look at is in the cache, and not bad.
    pub(super) fn run_in_cache(&self, offset: u64, len: u64) -> Option<Run> {
        let look = |offset, len| self.look_in_cache(offset, len)?.ok();
        let first = look(offset, len)?;
        Some(follow(first, offset, len, look))
    }

    /// Where the `len` bytes at `offset` are, if that is found in a few steps: they are data, in one
    /// cluster that is not divided, and its entry is in the cache, and not bad.
    #[inline(always)]
    pub(super) fn data_in_cluster(&self, offset: u64, len: u64) -> Option<Place> {
        let g = self.geometry;
        let (cluster, skip) = (g.cluster(offset), g.in_cluster(offset));
        if g.extended_l2 || len > g.cluster_size() - skip {
            return None;
        }
        // A slice of a table that does not exist is not in the cache.
        let entry = L2Entry(self.l2.entry(g.slice(cluster), g.slice_index(cluster))?);
        let layout = self.placement.data_file_layout();
        match entry.cluster(layout) {
            Cluster::Normal(start) if self.check_place(start, layout, cluster).is_ok() => {
                Some(Place {
                    offset: start + skip,
                    in_place: entry.is_copied() || layout.is_some(),
                })
            }
            _ => None,
        }
    }

    /// As [`run`](Self::run), but not past the end of the L2 slice.
    pub(super) fn run_in_slice(&self, offset: u64, len: u64) -> Result<Run> {
        self.look(offset, len)?.map_err(|bad| self.bad_entry(bad))
    }

    /// As [`run_in_slice`](Self::run_in_slice), for somebody who is not about to use what is there: a
    /// bad entry does the image no harm yet.
    pub(super) fn look(&self, offset: u64, len: u64) -> Result<std::result::Result<Run, BadEntry>> {
        if let Some(found) = self.look_in_cache(offset, len) {
            return Ok(found);
        }
        let slice = self.geometry.slice(self.geometry.cluster(offset));
        let fill = |words: &[AtomicU64]| self.fill_slice(slice, words);
        let scan = |words: &[AtomicU64]| self.scan(words, offset, len);
        self.retry_when_full(|| self.l2.load(slice, fill, scan))
    }

    /// As [`look`](Self::look), if the slice is in the cache, or there is no table.
    fn look_in_cache(&self, offset: u64, len: u64) -> Option<std::result::Result<Run, BadEntry>> {
        let g = self.geometry;
        let cluster = g.cluster(offset);
        if self.l1.get(g.l1_index(cluster)).offset() == 0 {
            return Some(Ok(Run {
                kind: Kind::Unallocated(None),
                len: len.min(g.slice_end(offset) - offset),
            }));
        }
        let scan = |words: &[AtomicU64]| self.scan(words, offset, len);
        self.l2.read(g.slice(cluster), scan)
    }

    /// How the bytes from `offset` on are stored.
    pub(super) fn find_extent(&self, offset: u64, len: u64) -> Result<Extent> {
        let mut end = 0;
        let mut first = None;
        for _ in 0..EXTENT_SLICES {
            if end == len {
                break;
            }
            let run = match self.look(offset + end, len - end)? {
                Ok(run) => run,
                // It is for whoever asks for what is there.
                Err(_) if end > 0 => break,
                Err(bad) => return Err(self.bad_entry(bad)),
            };
            let kind = *first.get_or_insert(run.kind);
            if !run.kind.continues(kind.advanced(end)) {
                break;
            }
            end += run.len;
        }
        let (kind, offset) = match first {
            Some(Kind::Data(place)) => (ExtentKind::Data, Some(place.offset)),
            Some(Kind::Zero(place)) => (ExtentKind::Zero, place.map(|place| place.offset)),
            Some(Kind::Compressed { .. }) => (ExtentKind::Compressed, None),
            Some(Kind::Unallocated(place)) => {
                (ExtentKind::Unallocated, place.map(|place| place.offset))
            }
            None => (ExtentKind::Unallocated, None),
        };
        Ok(Extent {
            len: end,
            kind,
            offset,
        })
    }

    /// The run that starts at `offset` in the `words` of its slice, and does not leave it.
    fn scan(
        &self,
        words: &[AtomicU64],
        offset: u64,
        len: u64,
    ) -> std::result::Result<Run, BadEntry> {
        let g = self.geometry;
        let len = len.min(g.slice_end(offset) - offset);
        if g.extended_l2 {
            self.scan_subclusters(words, offset, len)
        } else {
            self.scan_clusters(words, offset, len)
        }
    }

    /// As [`scan`](Self::scan), of entries that are not extended.
    fn scan_clusters(
        &self,
        entries: &[AtomicU64],
        offset: u64,
        len: u64,
    ) -> std::result::Result<Run, BadEntry> {
        let g = self.geometry;
        let first = g.cluster(offset);
        let index = g.slice_index(first);
        let load = |entry: &AtomicU64| L2Entry(entry.load(Ordering::Acquire));
        let whole = self.kind(load(&entries[index]), first)?;
        let skip = g.in_cluster(offset);
        let mut end = g.cluster_size();
        for (next, entry) in (first + 1..).zip(&entries[index + 1..]) {
            if end >= skip + len || self.kind(load(entry), next) != Ok(whole.advanced(end)) {
                break;
            }
            end += g.cluster_size();
        }
        Ok(Run {
            kind: whole.advanced(skip),
            len: len.min(end - skip),
        })
    }

    /// As [`scan`](Self::scan), of extended entries. What it says of an entry that changes
    /// meanwhile may be anything.
    fn scan_subclusters(
        &self,
        words: &[AtomicU64],
        offset: u64,
        len: u64,
    ) -> std::result::Result<Run, BadEntry> {
        let (kind, mut end) = self.subcluster_run(words, offset)?;
        while end < len {
            match self.subcluster_run(words, offset + end) {
                Ok((next, more)) if next == kind.advanced(end) => end += more,
                _ => break,
            }
        }
        Ok(Run {
            kind,
            len: len.min(end),
        })
    }

    /// What the subcluster at `offset` is mapped as from there on, and how many bytes of its cluster
    /// are.
    fn subcluster_run(
        &self,
        words: &[AtomicU64],
        offset: u64,
    ) -> std::result::Result<(Kind, u64), BadEntry> {
        let g = self.geometry;
        let cluster = g.cluster(offset);
        let entry = Entry::load(words, g, cluster);
        let kind = self.kind(entry.word, cluster)?;
        let skip = g.in_cluster(offset);
        if let Kind::Compressed { .. } = kind {
            return Ok((kind.advanced(skip), g.cluster_size() - skip));
        }
        let place = kind.place();
        if !entry.subclusters.is_valid(place.is_some()) {
            return Err(BadEntry {
                cluster,
                entry: entry.subclusters.0,
                problem: Problem::Subclusters,
            });
        }
        let (state, count) = entry.subclusters.run(g.subcluster(offset));
        let kind = match (state, place) {
            (Subcluster::Allocated, Some(place)) => Kind::Data(place),
            (Subcluster::Zero, place) => Kind::Zero(place),
            (_, place) => Kind::Unallocated(place),
        };
        let len = u64::from(count) * g.grain_size() - g.in_grain(offset);
        Ok((kind.advanced(skip), len))
    }

    /// What `entry` says of guest cluster `cluster`, after everything about it has been verified
    /// that can be without other metadata.
    fn kind(&self, entry: L2Entry, cluster: u64) -> std::result::Result<Kind, BadEntry> {
        let g = self.geometry;
        let bad = |problem| {
            Err(BadEntry {
                cluster,
                entry: entry.0,
                problem,
            })
        };
        let layout = self.placement.data_file_layout();
        let found = entry.cluster(layout);
        let (offset, len) = entry.compressed(g.cluster_bits);
        let stored = Stored { offset, len };
        match found {
            Cluster::Compressed if layout.is_some() => return bad(Problem::Compressed),
            Cluster::Compressed if stored.offset >= self.data_end.load(Ordering::Relaxed) => {
                return bad(Problem::PastEnd);
            }
            Cluster::ZeroPlain | Cluster::ZeroAlloc(_) if self.version < 3 => {
                return bad(Problem::ZeroInVersion2);
            }
            Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) => {
                if let Err(problem) = self.check_place(offset, layout, cluster) {
                    return bad(problem);
                }
            }
            Cluster::Unallocated | Cluster::ZeroPlain | Cluster::Compressed => {}
        }
        // A cluster of an external data file has one place and cannot be shared.
        let in_place = entry.is_copied() || layout.is_some();
        Ok(Kind::new(found, in_place, stored))
    }

    /// Whether guest cluster `cluster` can have its place at `offset`.
    #[inline]
    fn check_place(
        &self,
        offset: u64,
        layout: Option<DataFileLayout>,
        cluster: u64,
    ) -> std::result::Result<(), Problem> {
        let g = self.geometry;
        if g.in_cluster(offset) != 0 {
            return Err(Problem::Unaligned);
        }
        if layout == Some(DataFileLayout::Standard) {
            if g.cluster(offset) != cluster {
                return Err(Problem::NotGuestOffset);
            }
        } else if offset >= self.data_end.load(Ordering::Relaxed) {
            // Data is in the file before anything leads to it.
            return Err(Problem::PastEnd);
        }
        Ok(())
    }

    /// How the whole of guest cluster `cluster` is mapped by `entry`, which subclusters have no part
    /// in.
    pub(super) fn cluster_kind(&self, entry: L2Entry, cluster: u64) -> Result<Kind> {
        self.kind(entry, cluster).map_err(|bad| self.bad_entry(bad))
    }

    fn bad_entry(&self, bad: BadEntry) -> Error {
        let guest = bad.cluster << self.geometry.cluster_bits;
        let reason = match bad.problem {
            Problem::Compressed => format!(
                "Compressed cluster entry found in image with external data file \
                 (guest offset: {guest:#x})"
            ),
            Problem::Unaligned => {
                format!("Cluster allocation offset unaligned (guest offset: {guest:#x})")
            }
            Problem::NotGuestOffset => format!(
                "External data file host cluster offset does not match guest cluster offset: \
                 {guest:#x}"
            ),
            Problem::PastEnd => {
                format!("Cluster lies past the end of the file (guest offset: {guest:#x})")
            }
            Problem::Subclusters => {
                format!("Invalid cluster entry found (guest offset: {guest:#x})")
            }
            Problem::ZeroInVersion2 => {
                format!("Zero cluster entry found in pre-v3 image (guest offset: {guest:#x})")
            }
        };
        self.damaged(self.image.invalid("l2_table entry", bad.entry, reason))
    }

    /// Reads a slice of an existing L2 table.
    pub(super) fn fill_slice(&self, slice: u64, words: &[AtomicU64]) -> Result<()> {
        // Keeps the table from being used again, if it is replaced meanwhile.
        let _running = self.requests.begin();
        let table = self.l1.get(self.geometry.slice_l1_index(slice)).offset();
        let mut bytes = [0; 4096];
        let bytes = &mut bytes[..self.geometry.slice_size() as usize];
        self.image
            .read_bytes_at(bytes, table + self.geometry.slice_offset(slice))?;
        for (word, entry) in words.iter().zip(table::decode(bytes)) {
            word.store(entry, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Calls `attempt` until the cache has room for what it loads.
    pub(super) fn retry_when_full<R>(
        &self,
        mut attempt: impl FnMut() -> std::result::Result<R, LoadError<Error>>,
    ) -> Result<R> {
        loop {
            match attempt() {
                Ok(found) => return Ok(found),
                Err(LoadError::Full) => self.write_back()?,
                Err(LoadError::Read(e)) => return Err(e),
            }
        }
    }
}
