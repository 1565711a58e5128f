//! Counting what the tables of an image refer to.

use super::{Check, FindingKind, Repair};
use crate::Result;
use crate::qcow2::entry::{COPIED, Cluster, Entry, L1Entry};
use crate::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::qcow2::header::MAX_L1_SIZE;
use crate::qcow2::snapshot::{Snapshot, SnapshotTable, read_table};
use crate::qcow2::subclusters::Subclusters;
use crate::qcow2::{DataFileLayout, bitmaps, packed, table};

/// An L2 table that is referred to more often, not counting snapshots, is not looked at any more: a
/// sound image refers to each once, and a small bad one must not be able to ask for endless work.
const MAX_REPEATS: u64 = 1024;

/// Whose L1 table an L2 table belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Owner {
    /// The disk: its clusters are told of in the report.
    Disk,
    Snapshot,
}

impl Check<'_> {
    /// Counts a reference to each cluster that `len` bytes at `offset` touch.
    pub(super) fn count(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let end = offset.saturating_add(len);
        if end >= self.file_len.saturating_add(self.geometry.cluster_size()) {
            self.dangling = true;
            return self.corruption(format!(
                "ERROR: counting reference for region exceeding the end of the file by one \
                 cluster or more: offset {offset:#x} size {len:#x}"
            ));
        }
        for cluster in self.cluster_of(offset)..=self.cluster_of(end - 1) {
            self.clusters = self.clusters.max(cluster + 1);
            if self.references.increment(cluster).is_err() {
                let at = cluster << self.geometry.cluster_bits;
                self.corruption(format!(
                    "ERROR: overflow cluster offset={at:#x}\n\
                     Use qemu-img amend to increase the refcount entry width or qemu-img convert \
                     to create a clean copy if the image cannot be opened for writing"
                ));
            }
        }
    }

    pub(super) fn count_references(&mut self) -> Result<()> {
        let snapshots = self.read_snapshots()?;
        let cluster_size = self.geometry.cluster_size();
        self.count(0, cluster_size);
        let l1_bytes = u64::from(self.header.l1_size) * ENTRY_SIZE;
        self.count(self.header.l1_table_offset, l1_bytes);
        for i in 0..self.l1_table.len() {
            self.count_l2_table(i as u64, L1Entry(self.l1_table[i]), Owner::Disk)?;
            self.step();
        }
        self.count_snapshots(&snapshots)?;
        let table_len = u64::from(self.header.refcount_table_clusters) * cluster_size;
        self.count(self.header.refcount_table_offset, table_len);
        self.count_bitmaps()?;
        for i in 0..self.refcount_table.len() {
            self.count_refcount_block(i);
        }
        Ok(())
    }

    /// Reads and checks the snapshot table.
    fn read_snapshots(&mut self) -> Result<SnapshotTable> {
        let files = self.files;
        let table = read_table(files.image, files.path, &self.header)?;
        for (i, snapshot) in table.snapshots.iter().enumerate() {
            if self.header.version >= 3 && !snapshot.is_complete {
                self.corruption(format!("ERROR snapshot table entry {i} is incomplete"));
            }
        }
        Ok(table)
    }

    fn count_snapshots(&mut self, table: &SnapshotTable) -> Result<()> {
        let count = table.snapshots.len();
        if count > 0 && self.header.has_data_file() {
            self.corruption(format!("ERROR {count} snapshots in image with data file"));
        }
        for snapshot in &table.snapshots {
            if self.is_l1_table_sound(snapshot) {
                self.count_snapshot(snapshot)?;
            }
        }
        self.count(self.header.snapshots_offset, table.len);
        Ok(())
    }

    fn count_bitmaps(&mut self) -> Result<()> {
        let files = self.files;
        let mut ranges = Vec::new();
        bitmaps::for_each_range(files.image, files.path, &self.header, |_, offset, len| {
            ranges.push((offset, len));
        })?;
        for (offset, len) in ranges {
            self.count(offset, len);
        }
        Ok(())
    }

    fn is_l1_table_sound(&mut self, snapshot: &Snapshot) -> bool {
        let (offset, entries) = (snapshot.l1_table_offset, snapshot.l1_entries);
        let problem = if !self.is_aligned(offset) {
            format!("l1_offset={offset:#x}: L1 table is not cluster aligned")
        } else if u64::from(entries) > MAX_L1_SIZE / ENTRY_SIZE {
            format!("l1_size={entries:#x}: L1 table is too large")
        } else {
            return true;
        };
        self.corruption(format!(
            "ERROR snapshot {} ({}) {problem}; snapshot table entry corrupted",
            snapshot.id.escape_ascii(),
            snapshot.name.escape_ascii()
        ));
        false
    }

    fn count_snapshot(&mut self, snapshot: &Snapshot) -> Result<()> {
        let entries = u64::from(snapshot.l1_entries);
        self.count(snapshot.l1_table_offset, entries * ENTRY_SIZE);
        let l1 = self.read_table(snapshot.l1_table_offset, entries)?;
        for (i, entry) in (0..).zip(l1) {
            self.count_l2_table(i, L1Entry(entry), Owner::Snapshot)?;
        }
        Ok(())
    }

    /// Checks L1 entry `i`, and counts the L2 table that it refers to, with what that does.
    fn count_l2_table(&mut self, i: u64, entry: L1Entry, owner: Owner) -> Result<()> {
        if entry.0 == 0 {
            return Ok(());
        }
        if entry.reserved() != 0 {
            let text = format!("ERROR found L1 entry with reserved bits set: {:x}", entry.0);
            self.corruption(text);
        }
        let g = self.geometry;
        let offset = entry.offset();
        self.count(offset, g.cluster_size());
        if !self.is_aligned(offset) {
            self.corruption(format!(
                "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
            ));
        }
        let Some(mut words) = self.read_l2_table(offset)? else {
            return Ok(());
        };
        let mut changed = false;
        let mut expected = None;
        let entries: Vec<_> = Entry::all(&words, g).collect();
        for (k, entry) in entries.into_iter().enumerate() {
            let raw = words[k * g.l2_entry_words()];
            if !entry.word.is_compressed() && entry.word.reserved() != 0 {
                self.corruption(format!(
                    "ERROR found l2 entry with reserved bits set: {raw:x}"
                ));
            }
            let guest = (i * g.l2_entries() + k as u64).saturating_mul(g.cluster_size());
            let counted = self.count_entry(k, entry, guest, owner, &mut expected);
            if counted == Counted::HasNoPlace {
                let width = g.l2_entry_words();
                without_place(entry, g).write(&mut words[k * width..(k + 1) * width]);
                changed = true;
            }
        }
        if changed {
            self.files.write(&table::encode(words), offset)?;
        }
        Ok(())
    }

    /// The L2 table at `offset`, unless it lies outside the file, or has been seen too often.
    pub(super) fn read_l2_table(&self, offset: u64) -> Result<Option<Vec<u64>>> {
        let most = MAX_REPEATS + u64::from(self.header.nb_snapshots);
        if offset >= self.file_len || self.references.get(self.cluster_of(offset)) > most {
            return Ok(None);
        }
        self.read_table(offset, self.geometry.l2_words()).map(Some)
    }

    /// Checks entry `index` of an L2 table, of the cluster at guest offset `guest`, and counts what
    /// it refers to. `expected` is where data would follow that of the entry before.
    fn count_entry(
        &mut self,
        index: usize,
        entry: Entry,
        guest: u64,
        owner: Owner,
        expected: &mut Option<u64>,
    ) -> Counted {
        let word = entry.word;
        let cluster = word.cluster(self.header.data_file_layout());
        if self.geometry.extended_l2 {
            self.check_subclusters(entry.subclusters, cluster);
        }
        match cluster {
            Cluster::Unallocated | Cluster::ZeroPlain => {}
            Cluster::Compressed => self.count_compressed(index, entry, owner),
            Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) => {
                let has_data = matches!(cluster, Cluster::Normal(_))
                    && (!self.geometry.extended_l2 || entry.subclusters.0 as u32 != 0);
                if !self.is_aligned(offset) && !has_data {
                    let wanted = self.repair == Repair::All && owner == Owner::Disk;
                    let repaired = self.repairs(wanted, |word| {
                        format!(
                            "{word} offset={offset:x}: Preallocated cluster is not properly \
                             aligned; L2 entry corrupted."
                        )
                    });
                    if repaired {
                        return Counted::HasNoPlace;
                    }
                } else {
                    self.check_offset(offset, guest);
                }
                if owner == Owner::Disk {
                    self.report.allocated_clusters += 1;
                    if expected.is_some_and(|expected| offset != expected) {
                        self.report.fragmented_clusters += 1;
                    }
                    *expected = Some(offset + self.geometry.cluster_size());
                }
                if !self.header.has_data_file() {
                    self.count(offset, self.geometry.cluster_size());
                }
            }
        }
        Counted::Yes
    }

    fn check_subclusters(&mut self, subclusters: Subclusters, cluster: Cluster) {
        match cluster {
            Cluster::Compressed => {}
            Cluster::Normal(_) if subclusters.is_valid(true) => {}
            Cluster::Normal(offset) => self.corruption(format!(
                "ERROR offset={offset:x}: Allocated cluster has corrupted subcluster allocation \
                 bitmap"
            )),
            _ if subclusters.is_valid(false) => {}
            _ => self.corruption(
                "ERROR: Unallocated cluster has non-zero subcluster allocation map".to_owned(),
            ),
        }
    }

    fn check_offset(&mut self, offset: u64, guest: u64) {
        if !self.is_aligned(offset) {
            return self.corruption(format!(
                "ERROR offset={offset:x}: Data cluster is not properly aligned; L2 entry \
                 corrupted."
            ));
        }
        match self.header.data_file_layout() {
            Some(DataFileLayout::Standard) if offset != guest => {
                self.corruption(format!(
                    "ERROR offset={offset:x}: Cluster in the data file is not at its guest offset \
                     {guest:x}; L2 entry corrupted."
                ));
            }
            Some(DataFileLayout::Packed) => self.check_packed(offset),
            _ => {}
        }
    }

    /// Checks and counts a cluster of a packed data file.
    fn check_packed(&mut self, offset: u64) {
        let cluster = self.cluster_of(offset);
        let problem = if self.data_file_len().is_some_and(|len| offset >= len)
            || cluster >= packed::MAX_CLUSTERS
        {
            "lies past its end"
        } else if self.data_references.get(cluster) > 0 {
            "is that of another entry, too"
        } else {
            self.data_references.set(cluster, 1);
            return;
        };
        self.corruption(format!(
            "ERROR offset={offset:x}: Cluster in the data file {problem}; L2 entry corrupted."
        ));
    }

    /// Checks and counts a compressed cluster (qcow2 specification, "Compressed Clusters
    /// Descriptor").
    fn count_compressed(&mut self, index: usize, entry: Entry, owner: Owner) {
        let subclusters = entry.subclusters;
        let entry = entry.word;
        let (offset, len) = entry.compressed(self.geometry.cluster_bits);
        if entry.is_copied() {
            self.corruption(format!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
        }
        if self.header.has_data_file() {
            let entry = entry.0 & !COPIED;
            return self.corruption(format!(
                "ERROR compressed cluster {index} with data file, entry={entry:#x}"
            ));
        }
        if self.geometry.extended_l2 && subclusters.0 != 0 {
            let entry = entry.0 & !COPIED;
            return self.corruption(format!(
                "ERROR compressed cluster {index} with non-zero subcluster allocation bitmap, \
                 entry={entry:#x}"
            ));
        }
        self.count(offset, len);
        if owner == Owner::Disk {
            self.report.allocated_clusters += 1;
            self.report.compressed_clusters += 1;
            self.report.fragmented_clusters += 1;
        }
    }

    fn count_refcount_block(&mut self, i: usize) {
        let entry = self.refcount_table[i];
        let offset = entry & !511;
        let problem = if entry != offset {
            format!("ERROR refcount table entry {i} has reserved bits set")
        } else if !self.is_aligned(offset) {
            format!(
                "ERROR refcount block {i} is not cluster aligned; refcount table entry corrupted"
            )
        } else if self.cluster_of(offset) >= self.clusters {
            format!("ERROR refcount block {i} is outside image")
        } else if offset == 0 {
            return;
        } else {
            self.count(offset, self.geometry.cluster_size());
            self.blocks.push(offset);
            match self.references.get(self.cluster_of(offset)) {
                1 => return,
                references => format!("ERROR refcount block {i} refcount={references}"),
            }
        };
        self.rebuild = true;
        if self.rebuilds() {
            self.report(FindingKind::Repaired, problem);
        } else {
            self.corruption(problem);
        }
    }
}

/// `entry`, of a cluster that has a place and no data there, without the place: what reads as zero
/// does so, and what shows from below shows.
fn without_place(entry: Entry, geometry: Geometry) -> Entry {
    if !geometry.extended_l2 {
        return Entry::zero_plain(geometry);
    }
    Entry {
        word: Entry::UNALLOCATED.word,
        subclusters: entry.subclusters,
    }
}

/// What has become of an entry.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counted {
    Yes,
    /// It has no data, and is to lose its place.
    HasNoPlace,
}
