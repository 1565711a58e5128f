//! Counting what the tables of an image refer to.

use super::{Check, CheckReport, FindingKind, Repair};
use crate::Result;
use crate::qcow2::entry::{COPIED, Cluster, Entry, L1Entry, L2Entry};
use crate::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::qcow2::header::MAX_L1_SIZE;
use crate::qcow2::snapshot::{Snapshot, SnapshotTable, read_table};
use crate::qcow2::subclusters::Subclusters;
use crate::qcow2::{DataFileLayout, bitmaps, packed, table};

/// So many times what is wrong with an L2 table is told, if it is referred to more often: a small image
/// must not be able to ask for endless work.
const MAX_VISITS: u64 = 16;

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
            let references = self.references.increment(cluster);
            self.is_shared |= references != Ok(1);
            // The first one that no refcount can tell.
            let width = self.header.refcount_width();
            if references.is_ok_and(|references| references - 1 == width.max()) {
                let at = cluster << self.geometry.cluster_bits;
                self.corruption(format!(
                    "ERROR: overflow cluster offset={at:#x}\n\
                     Use qemu-img amend to increase the refcount entry width or qemu-img convert \
                     to create a clean copy if the image cannot be opened for writing"
                ));
            }
        }
    }

    /// As [`count`](Self::count), of metadata that is no L2 table.
    fn count_metadata(&mut self, offset: u64, len: u64) {
        self.count(offset, len);
        let end = offset.saturating_add(len).min(self.file_len);
        let clusters = self.cluster_of(offset)..self.geometry.clusters(end);
        self.other_metadata.extend(clusters);
    }

    pub(super) fn count_references(&mut self) -> Result<()> {
        let snapshots = self.read_snapshots()?;
        let cluster_size = self.geometry.cluster_size();
        self.count_metadata(0, cluster_size);
        let l1_bytes = u64::from(self.header.l1_size) * ENTRY_SIZE;
        self.count_metadata(self.header.l1_table_offset, l1_bytes);
        for i in 0..self.l1_table.len() {
            self.count_l2_table(i as u64, L1Entry(self.l1_table[i]), Owner::Disk)?;
            self.step();
        }
        self.count_snapshots(&snapshots)?;
        self.count_more_visits()?;
        let table_len = u64::from(self.header.refcount_table_clusters) * cluster_size;
        let dangling = self.dangling;
        self.count_metadata(self.header.refcount_table_offset, table_len);
        if self.dangling && !dangling {
            // That is what is written anew.
            (self.dangling, self.rebuild) = (false, true);
        }
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
        table.check_overlaps(files.path)?;
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
        self.count_metadata(self.header.snapshots_offset, table.len);
        Ok(())
    }

    fn count_bitmaps(&mut self) -> Result<()> {
        let files = self.files;
        let mut ranges = Vec::new();
        bitmaps::for_each_range(files.image, files.path, &self.header, |_, offset, len| {
            ranges.push((offset, len));
        })?;
        for (offset, len) in ranges {
            self.count_metadata(offset, len);
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
        self.count_metadata(snapshot.l1_table_offset, entries * ENTRY_SIZE);
        let (files, offset) = (self.files, snapshot.l1_table_offset);
        table::for_each(files.image, files.path, offset, entries, |i, entry| {
            self.count_l2_table(i, L1Entry(entry), Owner::Snapshot)
        })
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
        let visits = self.l2_tables.entry(offset).or_default();
        *visits += 1;
        if *visits > MAX_VISITS {
            return Ok(());
        }
        let Some(words) = self.read_l2_table(offset)? else {
            return Ok(());
        };
        if self.count_plain_table(&words, i, owner) {
            return Ok(());
        }
        let mut expected = None;
        let problems = |report: &CheckReport| report.corruptions + report.corruptions_fixed;
        let before = problems(&self.report);
        let mut is_special = false;
        for (k, entry) in Entry::all(&words, g).enumerate() {
            let raw = words[k * g.l2_entry_words()];
            let guest = (i * g.l2_entries() + k as u64).saturating_mul(g.cluster_size());
            if raw == 0 && !g.extended_l2
                || self.count_plain(entry.word, guest, owner, &mut expected)
            {
                continue;
            }
            is_special = true;
            if !entry.word.is_compressed() && entry.word.reserved() != 0 {
                self.corruption(format!(
                    "ERROR found l2 entry with reserved bits set: {raw:x}"
                ));
            }
            let counted = self.count_entry(k, entry, guest, owner, &mut expected);
            if counted == Counted::HasNoPlace {
                self.misplaced.push((offset, k));
            }
        }
        if is_special {
            self.special_l2_tables.insert(offset);
        }
        if problems(&self.report) != before {
            self.bad_l2_tables.insert(offset);
        }
        Ok(())
    }

    /// Counts what L2 tables refer to that are referred to more often than they were looked at.
    fn count_more_visits(&mut self) -> Result<()> {
        let many = self.l2_tables.iter();
        let many: Vec<_> = many
            .filter(|(_, visits)| **visits > MAX_VISITS)
            .map(|(offset, visits)| (*offset, visits - MAX_VISITS))
            .collect();
        let g = self.geometry;
        for (offset, more) in many {
            let words = self.read_l2_table(offset)?.unwrap_or_default();
            for entry in Entry::all(&words, g) {
                let (at, len) = match entry.word.cluster(self.header.data_file_layout()) {
                    _ if self.header.has_data_file() => continue,
                    Cluster::Unallocated | Cluster::ZeroPlain => continue,
                    Cluster::Compressed => entry.word.compressed(g.cluster_bits),
                    Cluster::Normal(at) | Cluster::ZeroAlloc(at) => (at, g.cluster_size()),
                };
                let clusters = g.cluster(at)..g.clusters(at.saturating_add(len));
                for cluster in clusters.start..clusters.end.min(self.clusters) {
                    self.references.add(cluster, more);
                }
            }
        }
        Ok(())
    }

    /// The L2 table at `offset`, unless it lies outside the file.
    pub(super) fn read_l2_table(&self, offset: u64) -> Result<Option<Vec<u64>>> {
        if offset >= self.file_len {
            return Ok(None);
        }
        self.read_table(offset, self.geometry.l2_words()).map(Some)
    }

    /// Whether there is an L2 table at `offset`, and no other metadata. What an entry takes for data as
    /// well is a table if it looks like a sound one.
    pub(super) fn is_l2_table(&self, offset: u64) -> bool {
        let cluster = self.cluster_of(offset);
        let references = self.references.get(cluster);
        let is_alone = self.l2_tables.get(&offset) == Some(&references);
        self.is_aligned(offset)
            && offset < self.file_len
            && !self.other_metadata.contains(&cluster)
            && (is_alone || !self.bad_l2_tables.contains(&offset))
    }

    /// Takes their place from entries that have no data and cannot have it where they say.
    pub(super) fn clear_misplaced(&mut self) -> Result<()> {
        let g = self.geometry;
        let width = g.l2_entry_words();
        let misplaced = std::mem::take(&mut self.misplaced);
        for entries in misplaced.chunk_by(|a, b| a.0 == b.0) {
            let offset = entries[0].0;
            if !self.is_l2_table(offset) {
                self.report.corruptions_fixed -= entries.len() as u64;
                for (_, k) in entries {
                    self.corruption(format!(
                        "ERROR: entry {k} of the L2 table at {offset:#x} is not repaired: something \
                         else is there, too"
                    ));
                }
                continue;
            }
            let mut words = self.read_table(offset, g.l2_words())?;
            for (_, k) in entries {
                let words = &mut words[k * width..(k + 1) * width];
                without_place(Entry::read(words), g).write(words);
            }
            self.files.write(&table::encode(words), offset)?;
        }
        Ok(())
    }

    /// Does what [`count_plain`](Self::count_plain) would do for each entry of the table of L1 entry `i`,
    /// and quickly, if each of them is at its guest offset in the data file. Returns whether that is so.
    fn count_plain_table(&mut self, words: &[u64], i: u64, owner: Owner) -> bool {
        let g = self.geometry;
        let is_standard = self.header.data_file_layout() == Some(DataFileLayout::Standard);
        if g.extended_l2 || !is_standard {
            return false;
        }
        // As `count_plain` does, this leaves alone offsets that no file can have: if the last entry has
        // none of their bits, none has.
        let start = i.saturating_mul(g.l2_entries() * g.cluster_size());
        let last = L2Entry(start.saturating_add((g.l2_entries() - 1) * g.cluster_size()));
        if last.is_copied() || last.is_compressed() || last.reserved() != 0 {
            return false;
        }
        let mut places = (start..).step_by(g.cluster_size() as usize);
        let is_plain = words.len() as u64 == g.l2_entries()
            && words
                .iter()
                .all(|word| places.next().map(|at| COPIED | at) == Some(*word));
        if is_plain && owner == Owner::Disk {
            self.report.allocated_clusters += g.l2_entries();
        }
        is_plain
    }

    /// Does what [`count_entry`](Self::count_entry) would, and quickly, if `entry` says of a cluster of
    /// data in the image file that it is used once, and it is, as far as is known; or that it is at its
    /// guest offset in the data file. Returns whether that is so.
    fn count_plain(
        &mut self,
        entry: L2Entry,
        guest: u64,
        owner: Owner,
        expected: &mut Option<u64>,
    ) -> bool {
        let g = self.geometry;
        if g.extended_l2 {
            return false;
        }
        if let Some(layout) = self.header.data_file_layout() {
            // An offset that no file can have has bits in the places of flags.
            let has_flags = entry.is_compressed() || entry.reserved() != 0;
            let is_plain = entry.0 == COPIED | guest && !has_flags;
            if layout != DataFileLayout::Standard || !is_plain {
                return false;
            }
            if owner == Owner::Disk {
                self.count_allocated(guest, expected);
            }
            return true;
        }
        let offset = entry.0 & !COPIED;
        let cluster = g.cluster(offset);
        let is_plain = entry.is_copied() && cluster != 0 && g.in_cluster(offset) == 0;
        // What leads into the file, and to the start of a cluster, has no other flag.
        let is_inside = offset < self.file_len;
        if !is_plain || !is_inside || !self.references.set_first(cluster) {
            return false;
        }
        if owner == Owner::Disk {
            self.count_allocated(offset, expected);
        }
        true
    }

    /// Counts a cluster of the disk that has space at `offset`.
    fn count_allocated(&mut self, offset: u64, expected: &mut Option<u64>) {
        self.report.allocated_clusters += 1;
        if expected.is_some_and(|expected| offset != expected) {
            self.report.fragmented_clusters += 1;
        }
        *expected = Some(offset + self.geometry.cluster_size());
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
                    // What lies in a raw data file may be right, and the entry wrong.
                    let wanted = self.repair == Repair::All
                        && owner == Owner::Disk
                        && !self.header.data_file_is_raw();
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
                    self.count_allocated(offset, expected);
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
            self.count_metadata(offset, self.geometry.cluster_size());
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
