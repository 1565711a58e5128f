//! Where guest clusters are, and changing it.

use crate::sync::atomic::{AtomicU64, Ordering};
use std::ops::Range;

use super::allocator::Allocation;
use super::cache::LoadError;
use super::compressed::Stored;
use super::entry::{Cluster, L2Entry};
use super::geometry::ENTRY_SIZE;
use super::placement::{Passthrough, Placement};
use super::refcount::Refcounts;
use super::reserved::Field;
use super::{DataFileLayout, Qcow2, table};
use crate::file::ImageFile;
use crate::sync::{MutexGuard, lock_whole};
use crate::{Disk, Error, Extent, ExtentKind, Result};

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
    /// Reads as what the backing file has there, or zero.
    Unallocated,
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
struct BadEntry {
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
}

impl Kind {
    fn new(cluster: Cluster, in_place: bool, stored: Stored) -> Self {
        let place = |offset| Place { offset, in_place };
        match cluster {
            Cluster::Compressed => Self::Compressed { stored, skip: 0 },
            Cluster::Normal(offset) => Self::Data(place(offset)),
            Cluster::ZeroAlloc(offset) => Self::Zero(Some(place(offset))),
            Cluster::ZeroPlain => Self::Zero(None),
            Cluster::Unallocated => Self::Unallocated,
        }
    }

    /// Where it has its place, written or not.
    pub(super) fn place(self) -> Option<Place> {
        match self {
            Self::Data(place) | Self::Zero(Some(place)) => Some(place),
            Self::Zero(None) | Self::Compressed { .. } | Self::Unallocated => None,
        }
    }

    /// Whether it is stored as `expected`; whether it may be overwritten does not matter.
    fn continues(self, expected: Self) -> bool {
        match (self, expected) {
            (Self::Data(place), Self::Data(next)) => place.offset == next.offset,
            (Self::Zero(Some(place)), Self::Zero(Some(next))) => place.offset == next.offset,
            _ => self == expected,
        }
    }

    /// What the part of the range from `bytes` on is mapped as.
    pub(super) fn advanced(self, bytes: u64) -> Self {
        match self {
            Self::Data(place) => Self::Data(place.advanced(bytes)),
            Self::Zero(place) => Self::Zero(place.map(|place| place.advanced(bytes))),
            Self::Compressed { stored, skip } => Self::Compressed {
                stored,
                skip: skip + bytes,
            },
            Self::Unallocated => Self::Unallocated,
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
        let mut run = self.run_in_slice(offset, len)?;
        while run.len < len && matches!(run.kind, Kind::Data(_)) {
            // A bad entry further on is for the request that reaches it.
            match self.run_in_slice(offset + run.len, len - run.len) {
                Ok(next) if next.kind == run.kind.advanced(run.len) => run.len += next.len,
                _ => break,
            }
        }
        Ok(run)
    }

    /// As [`run`](Self::run), but not past the end of the L2 slice.
    pub(super) fn run_in_slice(&self, offset: u64, len: u64) -> Result<Run> {
        let g = self.geometry;
        let cluster = g.cluster(offset);
        let slice = g.slice(cluster);
        let len = len.min(g.slice_end(offset) - offset);
        if self.l1.get(g.l1_index(cluster)).offset() == 0 {
            return Ok(Run {
                kind: Kind::Unallocated,
                len,
            });
        }
        let scan = |entries: &[AtomicU64]| self.scan(entries, offset, len);
        let found = match self.l2.read(slice, scan) {
            Some(found) => found,
            None => {
                let fill = |words: &[AtomicU64]| self.fill_slice(slice, words);
                self.retry_when_full(|| self.l2.load(slice, fill, scan))?
            }
        };
        found.map_err(|bad| self.bad_entry(bad))
    }

    /// How the bytes from `offset` on are stored.
    pub(super) fn find_extent(&self, offset: u64, len: u64) -> Result<Extent> {
        let mut end = 0;
        let mut first = None;
        for _ in 0..EXTENT_SLICES {
            if end == len {
                break;
            }
            let run = self.run_in_slice(offset + end, len - end)?;
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
            Some(Kind::Unallocated) | None => (ExtentKind::Unallocated, None),
        };
        Ok(Extent {
            len: end,
            kind,
            offset,
        })
    }

    /// The run that starts at `offset` in the `entries` of its slice.
    fn scan(
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
                if g.in_cluster(offset) != 0 {
                    return bad(Problem::Unaligned);
                }
                if layout == Some(DataFileLayout::Standard) {
                    if g.cluster(offset) != cluster {
                        return bad(Problem::NotGuestOffset);
                    }
                } else if offset >= self.data_end.load(Ordering::Relaxed) {
                    // Data is in the file before anything leads to it.
                    return bad(Problem::PastEnd);
                }
            }
            Cluster::Unallocated | Cluster::ZeroPlain | Cluster::Compressed => {}
        }
        // A cluster of an external data file has one place and cannot be shared.
        let in_place = entry.is_copied() || layout.is_some();
        Ok(Kind::new(found, in_place, stored))
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
            Problem::ZeroInVersion2 => {
                format!("Zero cluster entry found in pre-v3 image (guest offset: {guest:#x})")
            }
        };
        self.damaged(self.image.invalid("l2_table entry", bad.entry, reason))
    }

    /// Reads a slice of an existing L2 table.
    fn fill_slice(&self, slice: u64, words: &[AtomicU64]) -> Result<()> {
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
    fn retry_when_full<R>(
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

    /// Finds room for up to `clusters` guest clusters from `first` on, behind the one before them
    /// where possible.
    pub(super) fn allocate(&self, first: u64, clusters: u64) -> Result<Allocation> {
        let offset = first << self.geometry.cluster_bits;
        match &self.placement {
            Placement::Internal => {
                // Before the lock: it may take others.
                let goal = self.goal(first);
                let mut refcounts = self.refcounts()?;
                let place = refcounts.allocate(&self.image, goal, clusters)?;
                let end = place.offset + (place.clusters << self.geometry.cluster_bits);
                self.data_end.fetch_max(end, Ordering::Relaxed);
                Ok(place)
            }
            Placement::Packed(packed) => {
                let goal = self.goal(first);
                let place = packed.clusters()?.allocate(&packed.file, goal, clusters)?;
                let end = place.offset + (place.clusters << self.geometry.cluster_bits);
                self.data_end.fetch_max(end, Ordering::Relaxed);
                Ok(place)
            }
            Placement::External(external) | Placement::Raw(external, _) => {
                let end = offset + (clusters << self.geometry.cluster_bits);
                // A request that found a mapping that is gone can still fill a hole.
                let zeroed = self.retired.is_empty() && external.reads_zero(offset..end)?;
                Ok(Allocation {
                    offset,
                    clusters,
                    zeroed,
                })
            }
        }
    }

    /// Where guest cluster `first` would continue the one before it, as far as that can be told
    /// without another L2 slice.
    fn goal(&self, first: u64) -> Option<u64> {
        let g = self.geometry;
        if g.slice_index(first) == 0 {
            return None;
        }
        match self.run_in_slice((first - 1) << g.cluster_bits, 1) {
            Ok(Run {
                kind: Kind::Data(place),
                ..
            }) => Some(place.offset + g.cluster_size()),
            _ => None,
        }
    }

    /// Gives back clusters that were allocated and not mapped. That can only leak them if it
    /// fails, and it follows an error that is reported.
    pub(super) fn release(&self, place: &Allocation) {
        match &self.placement {
            Placement::Internal => {
                let freed = self
                    .refcounts()
                    .and_then(|mut r| r.free(&self.image, place.offset, place.clusters));
                drop(freed);
            }
            Placement::External(external) | Placement::Raw(external, _) => external.forget_hole(),
            Placement::Packed(packed) => {
                if let Ok(mut all) = packed.clusters() {
                    all.free(place.offset, place.clusters);
                }
            }
        }
    }

    /// Gives the range of the L1 entry at `index` an L2 table that belongs to it alone, if it has
    /// none: an empty one, or a copy of the one that it shares with snapshots.
    pub(super) fn own_table(&self, index: usize) -> Result<()> {
        let shared = self.l1.own_table(index, |old| {
            let table = self
                .refcounts()?
                .allocate_metadata(&self.image, Field::L2Table, 1)?;
            let made = match old {
                0 => self.clear_table(&table),
                _ => self.copy_table(old, table.offset),
            };
            if let Err(e) = made {
                self.refcounts()?.free(&self.image, table.offset, 1)?;
                return Err(e);
            }
            Ok(table.offset)
        })?;
        if let Some(old) = shared {
            // After the entry has changed: what is written back before leaves the old one in use.
            let size = self.geometry.cluster_size();
            self.retired.add_shared(old..old + size);
        }
        Ok(())
    }

    /// Copies an L2 table that nobody changes: a shared one is never written, so what the cache
    /// has of it is on disk.
    fn copy_table(&self, old: u64, new: u64) -> Result<()> {
        let mut table = vec![0; self.geometry.cluster_size() as usize];
        self.image.read_bytes_at(&mut table, old)?;
        self.image.write_bytes_at(&table, new)
    }

    /// Makes a cluster an empty L2 table, and the file reach to its end: the L1 entry must not lead
    /// out of the file, whether anything will be mapped in the table or not.
    fn clear_table(&self, table: &Allocation) -> Result<()> {
        let size = self.geometry.cluster_size();
        if !table.zeroed {
            self.image.write_zeroes(table.offset, size, false)?;
        }
        let last_entry = table.offset + size - ENTRY_SIZE;
        self.image
            .write_bytes_at(&[0; ENTRY_SIZE as usize], last_entry)
    }

    /// Maps `clusters`, which lie in one slice and have no data yet, to the data at `offset`.
    pub(super) fn map_data(&self, clusters: Range<u64>, offset: u64) -> Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let publish = || {
            self.change(clusters.clone(), |i, _| {
                L2Entry::normal(offset + i * cluster_size)
            })
        };
        match &self.placement {
            Placement::Raw(_, tables) => {
                let table = self.geometry.l1_index(clusters.start);
                tables.add_mapped(table, clusters.end - clusters.start, publish)
            }
            _ => publish(),
        }
    }

    /// Lets `clusters`, which lie in one slice and have data, read as zero.
    pub(super) fn map_zero(&self, clusters: Range<u64>) -> Result<()> {
        if let Placement::External(external) = &self.placement {
            // Data that was written stays in the file and is mapped no longer.
            external.forget_hole();
        }
        self.change(clusters, |_, old| old.zeroed())
    }

    /// Lets `clusters`, which lie in one slice, read as zero without a place.
    pub(super) fn map_nothing(&self, clusters: Range<u64>) -> Result<()> {
        let entry = if self.version < 3 {
            L2Entry::UNALLOCATED
        } else {
            L2Entry::ZERO_PLAIN
        };
        self.change(clusters, |_, _| entry)
    }

    /// The `len` bytes at `offset` of the data have lost their mapping. The caller holds the range
    /// of their guest clusters.
    pub(super) fn retire(&self, offset: u64, len: u64) {
        self.retired.add(offset..offset + len);
        if let Placement::External(external) = &self.placement {
            // The place belongs to its guest clusters for good, so its space can be released at
            // once; a crash may bring the old mapping back, which finds the old data or zeros. An
            // error only leaves space in use.
            drop(external.file.discard(offset, len));
        }
    }

    /// Gives back a range of clusters that nothing can lead to any more. An error leaks them.
    pub(super) fn give_back(&self, range: Range<u64>) -> Result<()> {
        match &self.placement {
            Placement::Internal => self.release_clusters(range),
            Placement::External(external) | Placement::Raw(external, _) => {
                // A request that had found the old mapping may have written there since.
                external.forget_hole();
                Ok(())
            }
            Placement::Packed(packed) => {
                let len = range.end - range.start;
                packed.file.discard(range.start, len)?;
                let clusters = self.geometry.cluster(len);
                packed.clusters()?.free(range.start, clusters);
                Ok(())
            }
        }
    }

    /// Takes a reference from each of the clusters of the image file that `range` lies in, and
    /// releases the space of those that have no other.
    pub(super) fn release_clusters(&self, range: Range<u64>) -> Result<()> {
        let g = self.geometry;
        let (mut cluster, end) = (g.cluster(range.start), g.clusters(range.end));
        while cluster < end {
            let offset = cluster << g.cluster_bits;
            let alike = self
                .refcounts()?
                .run_alike(&self.image, cluster, end - cluster)?;
            if alike.exclusive {
                self.image
                    .discard(offset, alike.clusters << g.cluster_bits)?;
            }
            self.refcounts()?
                .free(&self.image, offset, alike.clusters)?;
            cluster += alike.clusters;
        }
        Ok(())
    }

    /// Replaces the entries of `clusters`, all of them or, after an error, none.
    pub(super) fn change(
        &self,
        clusters: Range<u64>,
        entry: impl Fn(u64, L2Entry) -> L2Entry,
    ) -> Result<()> {
        let g = self.geometry;
        self.own_table(g.l1_index(clusters.start))?;
        let slice = g.slice(clusters.start);
        self.retry_when_full(|| {
            self.l2.update(
                slice,
                |words| self.fill_slice(slice, words),
                |words| {
                    let first = g.slice_index(clusters.start);
                    for (i, word) in (0..clusters.end - clusters.start).zip(&words[first..]) {
                        let old = L2Entry(word.load(Ordering::Relaxed));
                        // Whoever reads the new entry finds the data behind it.
                        word.store(entry(i, old).0, Ordering::Release);
                    }
                },
            )
        })
    }

    /// The data file, if the bytes of the range lie there at their guest offset, every one of
    /// them, and always will. The range lies within the disk.
    pub(super) fn passthrough(&self, offset: u64, len: u64) -> Result<Option<&ImageFile>> {
        let Placement::Raw(external, tables) = &self.placement else {
            return Ok(None);
        };
        if len == 0 {
            return Ok(None);
        }
        let g = self.geometry;
        for table in g.l1_index(g.cluster(offset))..=g.l1_index(g.cluster(offset + len - 1)) {
            if !tables.is_complete(table) {
                self.examine(table, tables)?;
                if !tables.is_complete(table) {
                    return Ok(None);
                }
            }
        }
        Ok(Some(&external.file))
    }

    /// Looks at a table of a raw disk, the first time that it is asked for.
    fn examine(&self, table: usize, tables: &Passthrough) -> Result<()> {
        let g = self.geometry;
        tables.examine(table, || {
            let table_size = g.l2_entries() * g.cluster_size();
            let mut at = table as u64 * table_size;
            let end = self.size().min(at + table_size);
            let mut missing = 0;
            while at < end {
                at += match self.run(at, end - at) {
                    Ok(Run {
                        kind: Kind::Data(_),
                        len,
                    }) => len,
                    Ok(run) => {
                        missing += run.len.div_ceil(g.cluster_size());
                        run.len
                    }
                    // A bad entry fails the requests that meet it, not those around it.
                    Err(Error::Invalid { .. }) => {
                        missing += 1;
                        g.cluster_size()
                    }
                    Err(e) => return Err(e),
                };
            }
            Ok(missing)
        })
    }
}
