//! Checking an image that is not open, and repairing it.
//!
//! Every reference to a host cluster is counted by walking from the header through the tables
//! (`references`); then the counts are compared with the refcounts in the image (`refcounts`), the
//! COPIED flags with both (`flags`), and an external data file with the mapping (`data_file`). The
//! findings, their order and their words are those of `qemu-img check`; what is said about data files
//! is added, for QEMU does not look at them.
//!
//! Tables are read one by one. Two numbers are kept for each cluster of the image file, one as wide as
//! its refcounts and one twice as wide, and one for each cluster of metadata: memory is in
//! proportion to the metadata.
//!
//! A repair keeps what the guest sees: entries that lead nowhere stay as they are, and findings. A table
//! is only written where no other metadata is, and no data unless it looks like a table. Each step leaves an image that is no worse, and
//! begins after the one before is on disk:
//!
//! 1. an entry without data loses a place that cannot be one;
//! 2. refcounts that are too low are raised; or, if their blocks are damaged, all are written anew to
//!    the end of the file, and the header leads there (unless something else does already);
//! 3. refcounts that are too high are lowered;
//! 4. COPIED flags follow the refcounts;
//! 5. the data file is made as long as the disk, and, if all else was right, zero where the mapping of a
//!    raw disk says so;
//! 6. if nothing is left to repair, the image is not dirty or corrupt any more.

mod counters;
mod data_file;
mod flags;
mod refcounts;
mod references;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::path::{Path, PathBuf};

use super::geometry::Geometry;
use super::header::{Header, autoclear, incompatible};
use super::open::open_data_file;
use super::parse::offset;
use super::refcount_width::RefcountWidth;
use super::{Follow, OpenOptions, bitmaps, table};
use crate::file::{FileOptions, ImageFile};
use crate::lock::Access;
use crate::{Error, Result, Storage};

use counters::Counters;

/// What a check found, in total.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Errors that can harm data, and have not been repaired.
    pub corruptions: u64,
    /// Clusters that are marked as used and are not, and have not been repaired.
    pub leaks: u64,
    /// Parts of the check that could not be carried out.
    pub check_errors: u64,
    /// Errors that have been repaired.
    pub corruptions_fixed: u64,
    /// Leaked clusters that are free again.
    pub leaks_fixed: u64,
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
#[non_exhaustive]
pub enum FindingKind {
    /// It can harm data.
    Corruption,
    /// It wastes space.
    Leak,
    /// It kept a part of the check from being carried out.
    CheckError,
    /// It is being repaired.
    Repaired,
    /// It is wrong, and told again with what is done about it.
    Repairable,
}

/// What is to be repaired.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Repair {
    /// Nothing: the image is only read.
    #[default]
    Nothing,
    /// Leaked clusters.
    Leaks,
    /// Everything that can be without loss of data.
    All,
}

/// How to check an image.
#[derive(Clone, Default)]
pub struct CheckOptions<'a> {
    /// What is to be repaired. Nobody else may use the image meanwhile.
    pub repair: Repair,
    /// Where the name of the data file in the image may lead.
    pub follow: Follow,
    /// The external data file, in place of the one that the image names.
    pub data_file: Option<PathBuf>,
    /// How the files are used. With [`Locking::ForceShare`](crate::Locking::ForceShare) there may be
    /// findings that come from another program's changes.
    pub files: FileOptions,
    /// Is told how many of how many steps are done, now and then.
    pub progress: Option<&'a dyn Fn(u64, u64)>,
}

/// Most clusters that an image file may have to be checked, as in QEMU; it also bounds the memory
/// that a check takes.
const MAX_CLUSTERS: u64 = i32::MAX as u64;

/// Checks the image at `path`, and passes on each thing that is wrong as it is found.
///
/// # Errors
/// Whatever makes the header unusable; [`Error::Unsupported`] if the image uses a feature that is
/// not implemented; [`Error::DataFile`]; [`Error::Locked`] if another program writes to the image, or
/// uses one that is to be repaired; [`Error::Io`]. A repair that ends so can be repeated.
pub fn check(
    path: &Path,
    options: &CheckOptions<'_>,
    found: &mut dyn FnMut(Finding),
) -> Result<CheckReport> {
    let read_only = options.repair == Repair::Nothing;
    let image = ImageFile::open(path, Access::new(read_only), options.files)?;
    let header = read_header(path, &*image.storage)?;
    let data = if header.has_data_file() {
        let open = OpenOptions {
            read_only,
            follow: options.follow,
            data_file: options.data_file.clone(),
            files: options.files,
            ..OpenOptions::default()
        };
        Some(open_data_file(path, &header, &open)?)
    } else {
        None
    };
    let files = Files {
        path,
        image: &*image.storage,
        data: data.as_ref().map(|file| (&*file.path, &*file.storage)),
    };
    let mut check = Check::new(files, header, options.repair, found)?;
    check.progress = options.progress;
    check.run()
}

/// [`check`] of an image in storage of the caller's, called `name` in errors. Without an external
/// data file that one is not looked at.
///
/// # Errors
/// As [`check`].
pub fn check_storage(
    name: &Path,
    image: &dyn Storage,
    data_file: Option<&dyn Storage>,
    repair: Repair,
    found: &mut dyn FnMut(Finding),
) -> Result<CheckReport> {
    let header = read_header(name, image)?;
    let files = Files {
        path: name,
        image,
        data: data_file.map(|storage| (name, storage)),
    };
    Check::new(files, header, repair, found)?.run()
}

/// Repairs `image`, whose dirty bit is set, before it is written.
///
/// # Errors
/// [`Error::Invalid`] if something is left that is wrong.
pub(super) fn repair_dirty(image: &ImageFile) -> Result<()> {
    let check = |repair| {
        let mut left = None;
        let found = &mut |finding: Finding| match finding.kind {
            FindingKind::Corruption | FindingKind::CheckError => left = Some(finding.text),
            FindingKind::Leak | FindingKind::Repaired | FindingKind::Repairable => {}
        };
        check_storage(&image.path, &*image.storage, None, repair, found)?;
        Ok(left)
    };
    let mut left = check(Repair::All)?;
    if left.is_some() {
        // What was told before it was repaired is not left.
        left = check(Repair::Nothing)?;
    }
    match left {
        None => Ok(()),
        Some(text) => {
            let reason = format!("the image was not closed, and cannot be repaired: {text}");
            let dirty = incompatible::DIRTY;
            Err(image.invalid("incompatible_features", dirty, reason))
        }
    }
}

fn read_header(path: &Path, storage: &dyn Storage) -> Result<Header> {
    let header = Header::read_for_check(storage, path)?;
    header.check_supported(path, true)?;
    // As in QEMU, a bitmap directory that is not valid keeps the image from being opened.
    bitmaps::validate(storage, path, &header)?;
    Ok(header)
}

/// The files of an image.
#[derive(Clone, Copy)]
struct Files<'a> {
    path: &'a Path,
    image: &'a dyn Storage,
    data: Option<(&'a Path, &'a dyn Storage)>,
}

impl Files<'_> {
    fn read(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.image
            .read_bytes_at(buf, offset)
            .map_err(|e| Error::io_at(self.path, "read", offset, e))
    }

    fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        self.image
            .write_bytes_at(bytes, offset)
            .map_err(|e| Error::io_at(self.path, "write to", offset, e))
    }

    #[cfg_attr(mutate, track_caller)]
    fn sync(&self) -> Result<()> {
        #[cfg(mutate)]
        if crate::mutate::leaves_out(std::panic::Location::caller()) {
            return Ok(());
        }
        self.image
            .sync()
            .map_err(|e| Error::io(self.path, "sync", e))
    }
}

/// A check under way.
struct Check<'a> {
    files: Files<'a>,
    header: Header,
    geometry: Geometry,
    repair: Repair,
    found: &'a mut dyn FnMut(Finding),
    progress: Option<&'a dyn Fn(u64, u64)>,
    report: CheckReport,
    file_len: u64,
    l1_table: Vec<u64>,
    refcount_table: Vec<u64>,
    /// Clusters of the image file; a reference may add the one that the file's end cuts.
    clusters: u64,
    /// References found to each cluster; a counter can tell of more than a refcount.
    references: Counters,
    /// References found to each L2 table, by its offset.
    l2_tables: HashMap<u64, u64>,
    /// Of those the ones with bad entries.
    bad_l2_tables: HashSet<u64>,
    /// Clusters of all metadata but L2 tables.
    other_metadata: HashSet<u64>,
    /// Of those of the disk, the ones with entries other than of plain data that is used once.
    special_l2_tables: HashSet<u64>,
    /// Entries without data, and with a place that cannot be one: the offset of their L2 table, and
    /// their index.
    misplaced: Vec<(u64, usize)>,
    /// References found to each cluster of a packed data file.
    data_references: Counters,
    /// Refcount of each cluster according to the image.
    refcounts: Counters,
    /// Refcount blocks that are sound, and counted as references.
    blocks: Vec<u64>,
    /// There is more than one reference to a cluster.
    is_shared: bool,
    /// All refcounts are right, and none is more than one.
    is_used_once: bool,
    /// The refcount structures themselves are damaged.
    rebuild: bool,
    /// Something leads past the end of the file, which must not grow there.
    dangling: bool,
    /// A raw data file is zeroed where the mapping says that it is zero.
    zeroes_raw: bool,
    done: u64,
}

impl<'a> Check<'a> {
    fn new(
        files: Files<'a>,
        header: Header,
        repair: Repair,
        found: &'a mut dyn FnMut(Finding),
    ) -> Result<Self> {
        let file_len = files
            .image
            .size()
            .map_err(|e| Error::io(files.path, "get the size of", e))?
            // As QEMU sees it.
            .next_multiple_of(512);
        let geometry = header.geometry();
        let clusters = geometry.clusters(file_len);
        if clusters > MAX_CLUSTERS {
            let too_many = std::io::Error::from_raw_os_error(libc::EFBIG);
            return Err(Error::io(files.path, "check", too_many));
        }
        let mut check = Self {
            files,
            geometry,
            repair,
            found,
            progress: None,
            report: CheckReport::default(),
            file_len,
            l1_table: Vec::new(),
            refcount_table: Vec::new(),
            clusters,
            references: Counters::new(RefcountWidth {
                order: (header.refcount_width().order + 1).min(6),
            }),
            l2_tables: HashMap::new(),
            bad_l2_tables: HashSet::new(),
            special_l2_tables: HashSet::new(),
            other_metadata: HashSet::new(),
            misplaced: Vec::new(),
            data_references: Counters::new(RefcountWidth { order: 0 }),
            refcounts: Counters::new(header.refcount_width()),
            blocks: Vec::new(),
            is_shared: false,
            is_used_once: false,
            rebuild: false,
            dangling: false,
            zeroes_raw: false,
            done: 0,
            header,
        };
        let header = &check.header;
        check.report.total_clusters = geometry.clusters(header.disk_size());
        check.l1_table = check.read_table(header.l1_table_offset, header.l1_size.into())?;
        let words = u64::from(check.header.refcount_table_clusters) * geometry.l2_words();
        check.refcount_table = check.read_table(check.header.refcount_table_offset, words)?;
        Ok(check)
    }

    fn run(mut self) -> Result<CheckReport> {
        if self.repair != Repair::Nothing {
            self.clear_unknown_autoclear()?;
        }
        self.count_references()?;
        self.clear_misplaced()?;
        self.compare_refcounts()?;
        self.check_copied_flags()?;
        self.check_data_file()?;
        self.finish_repairs()?;
        Ok(self.report)
    }

    /// What is not known here is not kept up either.
    fn clear_unknown_autoclear(&self) -> Result<()> {
        let known = self.header.autoclear_features & autoclear::KNOWN;
        if known != self.header.autoclear_features {
            let bytes = known.to_be_bytes();
            self.files.write(&bytes, offset::AUTOCLEAR_FEATURES)?;
            self.files.sync()?;
        }
        Ok(())
    }

    /// Waits for what has been repaired to be on disk, and clears the bits that say that the image may be
    /// damaged, if it is not.
    fn finish_repairs(&self) -> Result<()> {
        const BITS: u64 = incompatible::DIRTY | incompatible::CORRUPT;
        if self.repair == Repair::Nothing {
            return Ok(());
        }
        self.files.sync()?;
        let features = self.header.incompatible_features;
        let is_clean = self.report.corruptions == 0 && self.report.check_errors == 0;
        if !is_clean || features & BITS == 0 {
            return Ok(());
        }
        let bytes = (features & !BITS).to_be_bytes();
        self.files.write(&bytes, offset::INCOMPATIBLE_FEATURES)?;
        self.files.sync()
    }

    /// Reads `entries` big-endian words, where the header has limited their number.
    fn read_table(&self, offset: u64, entries: u64) -> Result<Vec<u64>> {
        // Past its end the file reads as zero.
        let stored = entries.min(self.file_len.saturating_sub(offset).div_ceil(8));
        let mut bytes = vec![0; (stored * 8) as usize];
        self.files.read(&mut bytes, offset)?;
        Ok(table::decode(&bytes).collect())
    }

    fn report(&mut self, kind: FindingKind, text: String) {
        let counter = match kind {
            FindingKind::Corruption => &mut self.report.corruptions,
            FindingKind::Leak => &mut self.report.leaks,
            FindingKind::CheckError => &mut self.report.check_errors,
            FindingKind::Repaired => &mut self.report.corruptions_fixed,
            FindingKind::Repairable => &mut 0,
        };
        *counter += 1;
        (self.found)(Finding { kind, text });
    }

    fn corruption(&mut self, text: String) {
        self.report(FindingKind::Corruption, text);
    }

    /// Reports `text`, in which `{}` stands for what is done about it, and returns whether it is to
    /// be repaired.
    fn repairs(&mut self, wanted: bool, text: impl FnOnce(&str) -> String) -> bool {
        if wanted {
            self.report(FindingKind::Repaired, text("Repairing"));
        } else {
            self.corruption(text("ERROR"));
        }
        wanted
    }

    /// Whether damaged refcount structures are to be written anew.
    fn rebuilds(&self) -> bool {
        self.repair == Repair::All && !self.dangling
    }

    /// One more L1 entry, or refcount block, has been dealt with.
    fn step(&mut self) {
        self.done += 1;
        if let Some(progress) = self.progress {
            let per_block = self
                .header
                .refcount_width()
                .count_in(self.header.cluster_size());
            let blocks = self.clusters.div_ceil(per_block);
            let total = 2 * self.l1_table.len() as u64 + blocks;
            progress(self.done, total.max(self.done));
        }
    }

    fn is_aligned(&self, offset: u64) -> bool {
        self.geometry.in_cluster(offset) == 0
    }

    fn cluster_of(&self, offset: u64) -> u64 {
        self.geometry.cluster(offset)
    }
}
