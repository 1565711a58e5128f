//! Checking an image without changing it.
//!
//! Every reference to a host cluster is counted by walking from the header through the tables;
//! then the counts are compared with the refcounts in the image, and the COPIED flags with both.
//! The findings, their order and their words are those of `qemu-img check`; one kind is added: a
//! cluster of an external data file that is not at its guest offset.

use std::path::Path;

use super::counters::Counters;
use super::entry::{Cluster, L1Entry, L2Entry};
use super::geometry::ENTRY_SIZE;
use super::header::Header;
use super::refcount_width::RefcountWidth;
use super::{DataFileLayout, packed, policy, table};
#[cfg(doc)]
use crate::Locking;
use crate::file::{FileOptions, ImageFile};
use crate::lock::Access;
use crate::{Error, Result, Storage};

/// What a check found, in total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Errors that can harm data.
    pub corruptions: u64,
    /// Clusters that are marked as used and are not.
    pub leaks: u64,
    /// Parts of the check that could not be carried out.
    pub check_errors: u64,
    /// Clusters of the disk.
    pub total_clusters: u64,
    /// Clusters of the disk that have space in a file.
    pub allocated_clusters: u64,
    /// Allocated clusters that do not follow the one before them.
    pub fragmented_clusters: u64,
    /// Allocated clusters that are compressed.
    pub compressed_clusters: u64,
    /// End of the last cluster of the image file that is in use, in bytes.
    pub image_end_offset: u64,
}

/// One thing that is wrong with an image.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// How bad it is.
    pub kind: FindingKind,
    /// What it is, in the words of `qemu-img check`, without a newline at the end.
    pub text: String,
}

/// How bad a [`Finding`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FindingKind {
    /// It can harm data.
    Corruption,
    /// It wastes space.
    Leak,
    /// It kept a part of the check from being carried out.
    CheckError,
}

/// Most clusters that an image file may have to be checked, as in QEMU; it also bounds the memory
/// that a check takes.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// An L2 table that is referred to more often is not looked at any more: a sound image refers to
/// each once, and a small bad one must not be able to ask for endless work.
const MAX_REPEATS: u64 = 1024;

/// Checks the image at `path`, and passes on each thing that is wrong as it is found.
///
/// The image is only read, and the data file of an image that has one only needs to exist: its
/// content cannot be wrong.
///
/// # Errors
/// Whatever makes the header unusable; [`Error::Unsupported`] if the image uses a feature that is
/// not implemented; [`Error::Locked`] if another program writes to the image; [`Error::Io`].
pub fn check(path: &Path, found: &mut dyn FnMut(Finding)) -> Result<CheckReport> {
    check_with(path, FileOptions::default(), found)
}

/// As [`check`], with a say in how the image is used. With [`Locking::ForceShare`] there may be
/// findings that come from another program's changes.
///
/// # Errors
/// As [`check`].
pub fn check_with(
    path: &Path,
    options: FileOptions,
    found: &mut dyn FnMut(Finding),
) -> Result<CheckReport> {
    let image = ImageFile::open(path, Access::Read, options)?;
    let header = read_header(path, &*image.storage)?;
    let mut check = Check::new(path, &*image.storage, &header, found)?;
    if header.has_data_file() {
        let data_file = policy::find_data_file(path, header.extensions.data_file.as_deref())?;
        let metadata = data_file
            .metadata()
            .map_err(|e| Error::io(&data_file, "get the size of", e))?;
        if metadata.is_file() {
            check.data_file_len = metadata.len();
        }
    }
    check.run()
}

/// [`check`] of an image in storage of the caller's, called `name` in errors. The external data
/// file is not looked at.
///
/// # Errors
/// As [`check`].
pub fn check_storage(
    name: &Path,
    image: &dyn Storage,
    found: &mut dyn FnMut(Finding),
) -> Result<CheckReport> {
    let header = read_header(name, image)?;
    Check::new(name, image, &header, found)?.run()
}

fn read_header(path: &Path, storage: &dyn Storage) -> Result<Header> {
    let header = Header::read_for_check(storage, path)?;
    header.check_supported(path, true)?;
    header.check_tellable(path)?;
    Ok(header)
}

/// A check under way.
struct Check<'a> {
    path: &'a Path,
    storage: &'a dyn Storage,
    header: &'a Header,
    found: &'a mut dyn FnMut(Finding),
    report: CheckReport,
    file_len: u64,
    /// Length of the data file, as far as it is known.
    data_file_len: u64,
    l1_table: Vec<u64>,
    refcount_table: Vec<u64>,
    /// Clusters of the image file; a reference may add the one that the file's end cuts.
    clusters: u64,
    /// References found to each cluster.
    references: Counters,
    /// References found to each cluster of a packed data file.
    data_references: Counters,
    /// Refcount of each cluster according to the image.
    refcounts: Counters,
}

impl<'a> Check<'a> {
    fn new(
        path: &'a Path,
        storage: &'a dyn Storage,
        header: &'a Header,
        found: &'a mut dyn FnMut(Finding),
    ) -> Result<Self> {
        let file_len = storage
            .size()
            .map_err(|e| Error::io(path, "get the size of", e))?;
        let clusters = file_len.div_ceil(header.cluster_size());
        if clusters > MAX_CLUSTERS {
            let too_many = std::io::Error::from_raw_os_error(libc::EFBIG);
            return Err(Error::io(path, "check", too_many));
        }
        let refcount_table_size =
            u64::from(header.refcount_table_clusters) * header.cluster_size() / ENTRY_SIZE;
        let mut check = Self {
            path,
            storage,
            header,
            found,
            report: CheckReport::default(),
            file_len,
            data_file_len: u64::MAX,
            l1_table: Vec::new(),
            refcount_table: Vec::new(),
            clusters,
            references: Counters::new(header.refcount_width()),
            data_references: Counters::new(RefcountWidth { order: 0 }),
            refcounts: Counters::new(header.refcount_width()),
        };
        check.report.total_clusters = header.disk_size().div_ceil(header.cluster_size());
        check.l1_table = check.read_table(header.l1_table_offset, header.l1_size.into())?;
        check.refcount_table =
            check.read_table(header.refcount_table_offset, refcount_table_size)?;
        Ok(check)
    }

    fn run(mut self) -> Result<CheckReport> {
        self.count_references()?;
        self.compare_refcounts()?;
        self.check_copied_flags()?;
        Ok(self.report)
    }

    /// Reads `entries` big-endian words, where the header has limited their number.
    fn read_table(&self, offset: u64, entries: u64) -> Result<Vec<u64>> {
        // Past its end the file reads as zero.
        let stored = entries.min(self.file_len.saturating_sub(offset).div_ceil(ENTRY_SIZE));
        let mut bytes = vec![0; (stored * ENTRY_SIZE) as usize];
        self.read(&mut bytes, offset)?;
        Ok(table::decode(&bytes).collect())
    }

    /// Reads the refcount block at `offset`.
    fn read_block(&self, offset: u64) -> Result<Vec<u8>> {
        let mut block = vec![0; self.header.cluster_size() as usize];
        self.read(&mut block, offset)?;
        Ok(block)
    }

    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.storage
            .read_bytes_at(buf, offset)
            .map_err(|e| Error::io_at(self.path, "read", offset, e))
    }

    fn report(&mut self, kind: FindingKind, text: String) {
        let counter = match kind {
            FindingKind::Corruption => &mut self.report.corruptions,
            FindingKind::Leak => &mut self.report.leaks,
            FindingKind::CheckError => &mut self.report.check_errors,
        };
        *counter += 1;
        (self.found)(Finding { kind, text });
    }

    fn corruption(&mut self, text: String) {
        self.report(FindingKind::Corruption, text);
    }

    fn is_aligned(&self, offset: u64) -> bool {
        offset.is_multiple_of(self.header.cluster_size())
    }

    fn cluster_of(&self, offset: u64) -> u64 {
        offset >> self.header.cluster_bits
    }

    /// Counts a reference to each cluster that `len` bytes at `offset` touch.
    fn count(&mut self, offset: u64, len: u64) {
        if len == 0 {
            return;
        }
        let end = offset.saturating_add(len);
        if end >= self.file_len.saturating_add(self.header.cluster_size()) {
            return self.corruption(format!(
                "ERROR: counting reference for region exceeding the end of the file by one \
                 cluster or more: offset {offset:#x} size {len:#x}"
            ));
        }
        for cluster in self.cluster_of(offset)..=self.cluster_of(end - 1) {
            self.clusters = self.clusters.max(cluster + 1);
            if self.references.increment(cluster).is_err() {
                let at = cluster << self.header.cluster_bits;
                self.corruption(format!(
                    "ERROR: overflow cluster offset={at:#x}\n\
                     Use qemu-img amend to increase the refcount entry width or qemu-img convert \
                     to create a clean copy if the image cannot be opened for writing"
                ));
            }
        }
    }

    fn count_references(&mut self) -> Result<()> {
        let cluster_size = self.header.cluster_size();
        self.count(0, cluster_size);
        self.count(
            self.header.l1_table_offset,
            u64::from(self.header.l1_size) * ENTRY_SIZE,
        );
        self.for_each_l2_table(Self::check_l1_entry, Self::check_l2_entries)?;
        let table_len = u64::from(self.header.refcount_table_clusters) * cluster_size;
        self.count(self.header.refcount_table_offset, table_len);
        for i in 0..self.refcount_table.len() {
            self.check_refcount_block(i);
        }
        Ok(())
    }

    /// Calls `on_l1` for each L1 entry in use and, if it wants that, `on_l2` for the table that the
    /// entry refers to. Tables outside the file are empty.
    fn for_each_l2_table(
        &mut self,
        on_l1: fn(&mut Self, usize, L1Entry) -> bool,
        on_l2: fn(&mut Self, u64, &[L2Entry]),
    ) -> Result<()> {
        let entries = self.header.l2_entries();
        for i in 0..self.l1_table.len() {
            let entry = L1Entry(self.l1_table[i]);
            let offset = entry.offset();
            if entry.0 != 0
                && on_l1(self, i, entry)
                && offset < self.file_len
                && self.references.get(self.cluster_of(offset)) <= MAX_REPEATS
            {
                let table: Vec<_> = self
                    .read_table(offset, entries)?
                    .into_iter()
                    .map(L2Entry)
                    .collect();
                on_l2(self, i as u64 * entries, &table);
            }
        }
        Ok(())
    }

    fn check_l1_entry(&mut self, _: usize, entry: L1Entry) -> bool {
        if entry.reserved() != 0 {
            let text = format!("ERROR found L1 entry with reserved bits set: {:x}", entry.0);
            self.corruption(text);
        }
        let offset = entry.offset();
        self.count(offset, self.header.cluster_size());
        if !self.is_aligned(offset) {
            self.corruption(format!(
                "ERROR l2_offset={offset:x}: Table is not cluster aligned; L1 entry corrupted"
            ));
        }
        true
    }

    /// Checks the L2 table whose first entry is that of guest cluster `first`.
    fn check_l2_entries(&mut self, first: u64, table: &[L2Entry]) {
        let mut expected = None;
        for (i, &entry) in table.iter().enumerate() {
            let cluster = entry.cluster(self.header.data_file_layout());
            if cluster != Cluster::Compressed && entry.reserved() != 0 {
                let text = format!("ERROR found l2 entry with reserved bits set: {:x}", entry.0);
                self.corruption(text);
            }
            match cluster {
                Cluster::Unallocated | Cluster::ZeroPlain => {}
                Cluster::Compressed => self.check_compressed(i, entry),
                Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) => {
                    let is_zero = matches!(cluster, Cluster::ZeroAlloc(_));
                    self.check_offset(offset, is_zero, first + i as u64);
                    self.report.allocated_clusters += 1;
                    if expected.is_some_and(|expected| offset != expected) {
                        self.report.fragmented_clusters += 1;
                    }
                    expected = Some(offset + self.header.cluster_size());
                    if !self.header.has_data_file() {
                        self.count(offset, self.header.cluster_size());
                    }
                }
            }
        }
    }

    fn check_offset(&mut self, offset: u64, is_zero: bool, guest_cluster: u64) {
        let guest_offset = guest_cluster.saturating_mul(self.header.cluster_size());
        if !self.is_aligned(offset) {
            let kind = if is_zero { "Preallocated" } else { "Data" };
            self.corruption(format!(
                "ERROR offset={offset:x}: {kind} cluster is not properly aligned; L2 entry \
                 corrupted."
            ));
            return;
        }
        match self.header.data_file_layout() {
            Some(DataFileLayout::Standard) if offset != guest_offset => {
                self.corruption(format!(
                    "ERROR offset={offset:x}: Cluster in the data file is not at its guest offset \
                     {guest_offset:x}; L2 entry corrupted."
                ));
            }
            Some(DataFileLayout::Packed) => self.check_packed(offset),
            _ => {}
        }
    }

    /// Checks and counts a cluster of a packed data file.
    fn check_packed(&mut self, offset: u64) {
        let cluster = self.cluster_of(offset);
        let problem = if offset >= self.data_file_len || cluster >= packed::MAX_CLUSTERS {
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
    fn check_compressed(&mut self, index: usize, entry: L2Entry) {
        let (offset, len) = entry.compressed(self.header.cluster_bits);
        if entry.is_copied() {
            self.corruption(format!(
                "ERROR: coffset={offset:#x}: copied flag must never be set for compressed clusters"
            ));
        }
        if self.header.has_data_file() {
            let entry = entry.0 & !super::entry::COPIED;
            return self.corruption(format!(
                "ERROR compressed cluster {index} with data file, entry={entry:#x}"
            ));
        }
        self.count(offset, len);
        self.report.allocated_clusters += 1;
        self.report.compressed_clusters += 1;
        self.report.fragmented_clusters += 1;
    }

    fn check_refcount_block(&mut self, i: usize) {
        let entry = self.refcount_table[i];
        let offset = entry & !511;
        if entry != offset {
            self.corruption(format!(
                "ERROR refcount table entry {i} has reserved bits set"
            ));
        } else if !self.is_aligned(offset) {
            self.corruption(format!(
                "ERROR refcount block {i} is not cluster aligned; refcount table entry corrupted"
            ));
        } else if self.cluster_of(offset) >= self.clusters {
            self.corruption(format!("ERROR refcount block {i} is outside image"));
        } else if offset != 0 {
            self.count(offset, self.header.cluster_size());
            let references = self.references.get(self.cluster_of(offset));
            if references != 1 {
                self.corruption(format!("ERROR refcount block {i} refcount={references}"));
            }
        }
    }

    fn compare_refcounts(&mut self) -> Result<()> {
        let width = self.header.refcount_width();
        let per_block = self.refcounts_per_block();
        let mut last_used = 0;
        let mut block = Vec::new();
        for cluster in 0..self.clusters {
            let Some(offset) = self.refcount_block_of(cluster) else {
                let text = format!("Can't get refcount for cluster {cluster}: Input/output error");
                self.report(FindingKind::CheckError, text);
                continue;
            };
            if cluster % per_block == 0 {
                block = match offset {
                    0 => Vec::new(),
                    offset => self.read_block(offset)?,
                };
            }
            let refcount = match block.is_empty() {
                true => 0,
                false => width.get(&block, (cluster % per_block) as usize),
            };
            let references = self.references.get(cluster);
            self.refcounts.set(cluster, refcount);
            if refcount > 0 || references > 0 {
                last_used = cluster;
            }
            self.compare(cluster, refcount, references);
        }
        self.report.image_end_offset = (last_used + 1) * self.header.cluster_size();
        Ok(())
    }

    fn compare(&mut self, cluster: u64, refcount: u64, references: u64) {
        let (kind, word) = match refcount.cmp(&references) {
            std::cmp::Ordering::Equal => return,
            std::cmp::Ordering::Less => (FindingKind::Corruption, "ERROR"),
            std::cmp::Ordering::Greater => (FindingKind::Leak, "Leaked"),
        };
        let text = format!("{word} cluster {cluster} refcount={refcount} reference={references}");
        self.report(kind, text);
    }

    /// Offset of the refcount block that counts `cluster`, 0 if there is none; `None` if there
    /// cannot be one where the table says.
    fn refcount_block_of(&self, cluster: u64) -> Option<u64> {
        let entry = usize::try_from(cluster / self.refcounts_per_block())
            .ok()
            .and_then(|i| self.refcount_table.get(i));
        let offset = entry.map_or(0, |entry| entry & !511);
        (self.is_aligned(offset) && offset <= i64::MAX as u64).then_some(offset)
    }

    fn refcounts_per_block(&self) -> u64 {
        let width = self.header.refcount_width();
        width.count_in(self.header.cluster_size())
    }

    /// The refcount of the cluster at `offset` according to the image; `None` if it is unreadable.
    fn refcount_at(&self, offset: u64) -> Option<u64> {
        let cluster = self.cluster_of(offset);
        let block = self.refcount_block_of(cluster)?;
        if block == 0 || cluster < self.clusters {
            return Some(self.refcounts.get(cluster));
        }
        let index = (cluster % self.refcounts_per_block()) as usize;
        let block = self.read_block(block).ok()?;
        Some(self.header.refcount_width().get(&block, index))
    }

    fn check_copied_flags(&mut self) -> Result<()> {
        self.for_each_l2_table(Self::check_l1_copied, Self::check_l2_copied)
    }

    fn check_l1_copied(&mut self, i: usize, entry: L1Entry) -> bool {
        if entry.offset() == 0 {
            return false;
        }
        let Some(refcount) = self.refcount_at(entry.offset()) else {
            return false;
        };
        if (refcount == 1) != entry.is_copied() {
            self.corruption(format!(
                "ERROR OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={:x} refcount={refcount}",
                entry.0
            ));
        }
        true
    }

    fn check_l2_copied(&mut self, _: u64, table: &[L2Entry]) {
        let layout = self.header.data_file_layout();
        for entry in table {
            let refcount = match entry.cluster(layout) {
                Cluster::Normal(_) | Cluster::ZeroAlloc(_) if layout.is_some() => Some(1),
                Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) => self.refcount_at(offset),
                _ => None,
            };
            if let Some(refcount) = refcount
                && (refcount == 1) != entry.is_copied()
            {
                self.corruption(format!(
                    "ERROR OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}",
                    entry.0
                ));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::{CreateOptions, create};
    use std::fs::{self, OpenOptions};
    use std::os::unix::fs::FileExt;

    fn texts(path: &Path) -> (CheckReport, Vec<String>) {
        let mut texts = Vec::new();
        let report = check(path, &mut |finding| texts.push(finding.text)).unwrap();
        (report, texts)
    }

    #[test]
    fn data_must_be_at_its_guest_offset() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = CreateOptions {
            size: 1 << 20,
            data_file: Some(dir.path().join("data")),
            data_file_raw: true,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        let image = OpenOptions::new().write(true).open(&path).unwrap();
        let second_entry = 0x4_0008;
        image
            .write_all_at(&L2Entry::normal(0x5_0000).0.to_be_bytes(), second_entry)
            .unwrap();
        let before = fs::read(&path).unwrap();
        let (report, texts) = texts(&path);
        assert_eq!(report.corruptions, 1);
        assert_eq!(
            texts,
            [
                "ERROR offset=50000: Cluster in the data file is not at its guest offset 10000; L2 \
              entry corrupted."
            ]
        );
        assert_eq!(fs::read(&path).unwrap(), before);
    }

    /// 2^18 references to one L2 table: 2^36 entries, if each were followed.
    #[test]
    fn a_small_image_cannot_ask_for_endless_work() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let cluster_size = 2 << 20;
        let repeats = 1 << 18;
        let options = CreateOptions {
            size: repeats * cluster_size * (cluster_size / 8),
            cluster_size,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        let image = OpenOptions::new().write(true).open(&path).unwrap();
        let (l1_offset, l2_offset) = (3 * cluster_size, 4 * cluster_size);
        image.set_len(l2_offset + cluster_size).unwrap();
        let entries: Vec<u8> = (0..repeats)
            .flat_map(|_| L1Entry::new(l2_offset).0.to_be_bytes())
            .collect();
        image.write_all_at(&entries, l1_offset).unwrap();
        let report = check(&path, &mut |_| ()).unwrap();
        // Counting stops at the maximum; the table has no refcount; no entry may say COPIED.
        let overflows = repeats - u64::from(u16::MAX);
        assert_eq!(report.corruptions, overflows + 1 + repeats);
    }
}
