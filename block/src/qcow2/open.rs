//! From files to a [`Qcow2`].

use crate::sync::Mutex;
use crate::sync::atomic::{AtomicBool, AtomicU64};
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use super::backing::{self, Backing, Found};
use super::bitmaps::Bitmaps;
use super::cache::SliceCache;
use super::entry::L1Entry;
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::{Header, autoclear};
use super::l1::{self, L1Table};
use super::packed::Packed;
use super::parse::offset;
use super::placement::{External, Passthrough, Placement};
use super::policy::{self, Follow};
use super::refcount::Refcounts;
use super::requests::Requests;
use super::reserved::{Field, Reserved};
use super::retired::Retired;
use super::snapshot::Snapshot;
use super::{DataFileLayout, Qcow2, SnapshotName, bitmaps, snapshot, stamp, table, zstd};
use crate::file::{FileOptions, ImageFile};
use crate::lock::Access;
use crate::ranges::RangeLocks;
use crate::{Disk, Error, ImageFormat, Result, Storage};

const NO_DATA_FILE: &str = "'data-file' can only be set for images with an external data file";

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Neither file is ever written.
    pub read_only: bool,
    /// The external data file, in place of the one that the image names. With `None`, the name
    /// in the image is followed if it leads to a file in the image's own directory or below.
    pub data_file: Option<PathBuf>,
    /// Where the names in the image, and in those below it, may lead.
    pub follow: Follow,
    /// What is below the image.
    pub backing: Backing,
    /// Format of the backing file, if the image names one and not its format. It is never guessed:
    /// what a guest has written into a raw image could look like anything.
    pub backing_format: Option<ImageFormat>,
    /// Bytes of memory for L2 tables of each image; a few slices of 4 KiB are always kept. The default of 4 MiB
    /// maps 32 GiB with clusters of 64 KiB. Memory is taken as it is needed.
    pub l2_cache_size: usize,
    /// The internal snapshot whose state is the disk, in an image that is opened read-only.
    pub snapshot: Option<SnapshotName>,
    /// Whether zeros that are written are marked in the mapping even where the image has nothing and
    /// no image below shows, as QEMU does. Without this, such a request changes nothing.
    pub mark_zeroes: bool,
    /// How the files are used. Storage of the caller's is not locked, and whether it goes past the
    /// page cache is the caller's affair.
    pub files: FileOptions,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            data_file: None,
            follow: Follow::default(),
            backing: Backing::default(),
            backing_format: None,
            l2_cache_size: 4 << 20,
            snapshot: None,
            mark_zeroes: false,
            files: FileOptions::default(),
        }
    }
}

impl Qcow2 {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// Nothing has been written if this fails, but for the repair of an image that was not closed
    /// before; and the error says why: the image is not valid, it
    /// uses a feature that is not implemented ([`Error::Unsupported`]), or a file cannot be used.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let image = ImageFile::open(path, Access::new(options.read_only), options.files)?;
        let top = Found::new(image, options.read_only)?;
        let backing = backing::open(&top, options)?;
        Self::from_found(top, options, backing)
    }

    /// Opens `found` on top of `backing`.
    pub(super) fn from_found(
        found: Found,
        options: &OpenOptions,
        backing: Option<Arc<dyn Disk>>,
    ) -> Result<Self> {
        let path = &found.image.path;
        let data = match (found.header.has_data_file(), &options.data_file) {
            (false, None) => None,
            (false, Some(_)) => {
                return Err(data_file_error(path, NO_DATA_FILE));
            }
            (true, _) => Some(open_data_file(path, &found.header, options)?),
        };
        Self::from_files(found, options, Files { data, backing })
    }

    /// Opens an image in storage of the caller's. `name` stands for the image in errors;
    /// `data_file` is the external data file, which must be given exactly if the image has one.
    /// [`OpenOptions::data_file`] has no meaning here, and an image with a backing file is for
    /// [`with_backing`](Qcow2::with_backing).
    ///
    /// # Errors
    /// As [`open`](Qcow2::open).
    pub fn with_storage(
        name: &Path,
        image: Box<dyn Storage>,
        data_file: Option<Box<dyn Storage>>,
        options: &OpenOptions,
    ) -> Result<Self> {
        Self::with_backing(name, image, data_file, None, options)
    }

    /// As [`with_storage`](Qcow2::with_storage), on top of `backing`, which shows where the image
    /// has nothing, and must be given if the image names a backing file. Nobody may change it or its
    /// size while the image is open.
    ///
    /// # Errors
    /// As [`open`](Qcow2::open).
    pub fn with_backing(
        name: &Path,
        image: Box<dyn Storage>,
        data_file: Option<Box<dyn Storage>>,
        backing: Option<Arc<dyn Disk>>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let cache = options.files.cache;
        let data = data_file.map(|storage| {
            let mut name = name.as_os_str().to_owned();
            name.push(" (data file)");
            ImageFile::new(storage, Path::new(&name), cache)
        });
        let image = ImageFile::new(image, name, cache);
        Self::with_files(image, data, backing, options)
    }

    /// As [`open`](Qcow2::open), with the image at `path` in storage of the caller's, and its data file
    /// too if `data_file` is given. Other names in the image are followed as if it were opened by name.
    ///
    /// # Errors
    /// As [`open`](Qcow2::open).
    pub fn open_storage(
        path: &Path,
        image: Box<dyn Storage>,
        data_file: Option<(&Path, Box<dyn Storage>)>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let cache = options.files.cache;
        let top = Found::new(ImageFile::new(image, path, cache), options.read_only)?;
        let backing = backing::open(&top, options)?;
        match data_file {
            None => Self::from_found(top, options, backing),
            Some(_) if !top.header.has_data_file() => Err(data_file_error(path, NO_DATA_FILE)),
            Some((name, storage)) => {
                let data = Some(ImageFile::new(storage, name, cache));
                Self::from_files(top, options, Files { data, backing })
            }
        }
    }

    /// Opens `image` with the files that it names, of which it must name each that is given.
    pub(crate) fn with_files(
        image: ImageFile,
        data: Option<ImageFile>,
        backing: Option<Arc<dyn Disk>>,
        options: &OpenOptions,
    ) -> Result<Self> {
        let found = Found::new(image, options.read_only)?;
        let name = &found.image.path;
        match (found.header.has_data_file(), &data) {
            (false, None) | (true, Some(_)) => {}
            (false, Some(_)) => return Err(data_file_error(name, NO_DATA_FILE)),
            (true, None) => {
                let reason = "'data-file' is required for this image";
                return Err(data_file_error(name, reason));
            }
        }
        if backing.is_some() != found.header.backing_file.is_some() {
            return Err(Error::BackingFile {
                file: name.to_owned(),
                reason: "one must be given exactly if the image names one".to_owned(),
            });
        }
        Self::from_files(found, options, Files { data, backing })
    }

    fn from_files(found: Found, options: &OpenOptions, files: Files) -> Result<Self> {
        let Found { image, mut header } = found;
        let Files { data, backing } = files;
        zstd::check_built(header.compression(), &image.path)?;
        if !matches!(options.backing, Backing::File { .. }) {
            stamp::check(&image.path, &header, backing.as_ref())?;
        }
        let read_only = options.read_only;
        if let Some(name) = &options.snapshot {
            snapshot::show(&image, &mut header, name, read_only)?;
        }
        let geometry = header.geometry();
        let l1 = L1Table::open(&image, geometry, header.l1_table_offset, header.l1_size)?;
        let refcounts = if read_only {
            None
        } else {
            Some(Mutex::new(open_refcounts(&image, geometry, &header, &l1)?))
        };
        let placement = match data {
            None => Placement::Internal,
            Some(file) if header.data_file_layout() == Some(DataFileLayout::Packed) => {
                Placement::Packed(match read_only {
                    true => Packed::read_only(file),
                    false => Packed::open(file, &image, geometry, &l1)?,
                })
            }
            Some(file) => outside(file, &header),
        };
        let bitmaps = if read_only {
            None
        } else {
            Some(Bitmaps::open(&image, &header)?)
        };
        let data_end = match &placement {
            Placement::Packed(packed) => packed.file.size()?,
            _ => image.size()?,
        };
        if !read_only {
            // Last: an image that is refused stays as it is.
            clear_unknown_autoclear(&image, &header)?;
        }
        Ok(Self {
            data_end: AtomicU64::new(data_end),
            image,
            placement,
            backing,
            geometry,
            size: AtomicU64::new(header.disk_size()),
            version: header.version,
            has_snapshots: header.nb_snapshots != 0,
            read_only,
            l1,
            l2: SliceCache::new(
                geometry.slice_words(),
                geometry.cluster_size(),
                options.l2_cache_size,
            ),
            metadata: OnceLock::new(),
            incompatible_features: header.incompatible_features,
            compression_type: header.compression(),
            decompressed: Mutex::default(),
            corrupt: AtomicBool::new(false),
            closed: AtomicBool::new(false),
            is_lost: AtomicBool::new(false),
            bitmaps,
            refcounts,
            ranges: RangeLocks::default(),
            requests: Requests::default(),
            retired: Retired::default(),
            preallocated: OnceLock::new(),
            mark_zeroes: options.mark_zeroes,
            resizing: Mutex::default(),
            flushing: Mutex::default(),
        })
    }
}

/// How the clusters of an image with `header` lie in the data file `file`, each at its guest offset.
fn outside(file: ImageFile, header: &Header) -> Placement {
    let external = External::new(file);
    match header.data_file_is_raw() {
        true => Placement::Raw(external, Passthrough::new()),
        false => Placement::External(external),
    }
}

/// The other files of an image.
struct Files {
    data: Option<ImageFile>,
    backing: Option<Arc<dyn Disk>>,
}

/// The refcounts of an image to be written, after all of its metadata has been seen to lie apart.
pub(super) fn open_refcounts(
    image: &ImageFile,
    geometry: Geometry,
    header: &Header,
    l1: &L1Table,
) -> Result<Refcounts> {
    let (table, clusters) = (
        header.refcount_table_offset,
        u64::from(header.refcount_table_clusters),
    );
    let mut refcounts = Refcounts::open(image, geometry, header.refcount_width(), table, clusters)?;
    let l1_size = u64::from(header.l1_size) * ENTRY_SIZE;
    let l1_clusters = l1_size.div_ceil(geometry.cluster_size());
    let mut reserved = Reserved::new(geometry.cluster_bits, header.nb_snapshots != 0);
    reserved.push(Field::Header, 0, 1);
    reserved.push(Field::RefcountTable, geometry.cluster(table), clusters);
    let l1_table = geometry.cluster(header.l1_table_offset);
    reserved.push(Field::L1Table, l1_table, l1_clusters);
    reserved.make_room(l1.tables().count() + refcounts.blocks().count());
    for offset in l1.tables() {
        reserved.push(Field::L2Table, geometry.cluster(offset), 1);
    }
    for offset in refcounts.blocks() {
        reserved.push(Field::RefcountBlock, geometry.cluster(offset), 1);
    }
    reserve_snapshots(image, geometry, header, &mut reserved)?;
    bitmaps::reserve(image, header, &mut reserved)?;
    reserved.sort(image)?;
    refcounts.reserve(image, reserved)?;
    Ok(refcounts)
}

/// Adds the metadata of the internal snapshots to `reserved`.
fn reserve_snapshots(
    image: &ImageFile,
    geometry: Geometry,
    header: &Header,
    reserved: &mut Reserved,
) -> Result<()> {
    let file_size = image.size()?;
    let table = snapshot::read_table(&*image.storage, &image.path, header)?;
    table.check_l1_tables(&image.path, geometry)?;
    let first = geometry.cluster(header.snapshots_offset);
    reserved.push(Field::SnapshotTable, first, geometry.clusters(table.len));
    for snapshot in &table.snapshots {
        let offset = snapshot.l1_table_offset;
        let clusters = snapshot.l1_clusters(geometry);
        if clusters > 0 && offset >= file_size {
            let reason = "the table lies past the end of the file".to_owned();
            return Err(image.invalid("l1_table_offset of a snapshot", offset, reason));
        }
        reserved.push(Field::SnapshotL1Table, geometry.cluster(offset), clusters);
    }
    // No two of them overlap, so that to read them all is no more than to read the file.
    reserved.sort(image)?;
    for snapshot in table.snapshots {
        for cluster in snapshot_l2_tables(image, geometry, file_size, &snapshot)? {
            reserved.push(Field::SnapshotL2Table, cluster, 1);
        }
        reserved.merge_shared(image)?;
    }
    Ok(())
}

/// The clusters of the L2 tables of `snapshot`.
///
/// # Errors
/// [`Error::Invalid`] if there is one twice: an operation on the snapshot would go through it as often
/// as that, and a small image must not be able to ask for endless work.
fn snapshot_l2_tables(
    image: &ImageFile,
    geometry: Geometry,
    file_size: u64,
    snapshot: &Snapshot,
) -> Result<Vec<u64>> {
    let mut tables = Vec::new();
    let (offset, count) = (snapshot.l1_table_offset, snapshot.l1_entries.into());
    table::for_each(&*image.storage, &image.path, offset, count, |index, raw| {
        l1::check_entry(image, geometry, file_size, index as usize, raw)?;
        let offset = L1Entry(raw).offset();
        if offset != 0 {
            tables.push(geometry.cluster(offset));
        }
        Ok(())
    })?;
    tables.sort_unstable();
    if let Some(pair) = tables.windows(2).find(|pair| pair[0] == pair[1]) {
        let offset = pair[0] << geometry.cluster_bits;
        let reason = "two entries lead to the same L2 table".to_owned();
        return Err(image.invalid("l1_table entry of a snapshot", offset, reason));
    }
    Ok(tables)
}

/// Clears the autoclear bits of features that this version does not know: it will not keep up
/// what they promise (qcow2 specification, "autoclear_features").
fn clear_unknown_autoclear(image: &ImageFile, header: &Header) -> Result<()> {
    let known = header.autoclear_features & autoclear::KNOWN;
    if known == header.autoclear_features {
        return Ok(());
    }
    image.write_bytes_at(&known.to_be_bytes(), offset::AUTOCLEAR_FEATURES)?;
    image.sync()
}

pub(super) fn open_data_file(
    image: &Path,
    header: &Header,
    options: &OpenOptions,
) -> Result<ImageFile> {
    let path = match (&options.data_file, &header.extensions.data_file) {
        (Some(path), _) => path.clone(),
        (None, Some(name)) => policy::resolve_data_file(image, name, options.follow)?,
        (None, None) => {
            return Err(data_file_error(
                image,
                "'data-file' is required for this image",
            ));
        }
    };
    if policy::is_same_file(image, &path) {
        let reason = format!("its data file '{}' is the image itself", path.display());
        return Err(Error::DataFile {
            file: image.to_owned(),
            reason,
        });
    }
    let access = Access::new(options.read_only);
    if options.data_file.is_some() {
        return ImageFile::open(&path, access, options.files);
    }
    let open = || policy::open_data_file(image, &path, options.follow, options.read_only);
    ImageFile::open_with(&path, open, access, options.files)
}

fn data_file_error(image: &Path, reason: &str) -> Error {
    Error::DataFile {
        file: image.to_owned(),
        reason: reason.to_owned(),
    }
}
