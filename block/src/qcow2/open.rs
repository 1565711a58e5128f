//! From files to a [`Qcow2`].

use crate::sync::atomic::{AtomicBool, AtomicU64};
use crate::sync::{Mutex, lock};
use std::path::{Path, PathBuf};

use super::cache::SliceCache;
use super::geometry::{ENTRY_SIZE, Geometry};
use super::header::{Header, autoclear};
use super::l1::L1Table;
use super::packed::Packed;
use super::placement::{External, Passthrough, Placement};
use super::policy;
use super::ranges::RangeLocks;
use super::refcount::Refcounts;
use super::requests::Requests;
use super::reserved::{Field, Reserved};
use super::retired::Retired;
use super::{DataFileLayout, Qcow2};
use crate::file::ImageFile;
use crate::{Error, Result, Storage};

/// How to open an image.
#[derive(Clone, Debug)]
pub struct OpenOptions {
    /// Neither file is ever written.
    pub read_only: bool,
    /// The external data file, in place of the one that the image names. With `None`, the name
    /// in the image is followed if it leads to a file in the image's own directory or below.
    pub data_file: Option<PathBuf>,
    /// Bytes of memory for L2 tables; a few slices of 4 KiB are always kept. The default of 4 MiB
    /// maps 32 GiB with clusters of 64 KiB. Memory is taken as it is needed.
    pub l2_cache_size: usize,
}

impl Default for OpenOptions {
    fn default() -> Self {
        Self {
            read_only: false,
            data_file: None,
            l2_cache_size: 4 << 20,
        }
    }
}

impl Qcow2 {
    /// Opens the image at `path`.
    ///
    /// # Errors
    /// Nothing has been written if this fails, and the error says why: the image is not valid, it
    /// uses a feature that is not implemented ([`Error::Unsupported`]), or a file cannot be used.
    pub fn open(path: &Path, options: &OpenOptions) -> Result<Self> {
        let image = ImageFile::open(path, options.read_only)?;
        Self::from_files(image, options, |image, header| {
            match (header.has_data_file(), &options.data_file) {
                (false, None) => Ok(None),
                (false, Some(_)) => Err(data_file_error(
                    &image.path,
                    "'data-file' can only be set for images with an external data file",
                )),
                (true, _) => open_data_file(&image.path, header, options).map(Some),
            }
        })
    }

    /// Opens an image in storage of the caller's. `name` stands for the image in errors;
    /// `data_file` is the external data file, which must be given exactly if the image has one.
    /// [`OpenOptions::data_file`] has no meaning here.
    ///
    /// # Errors
    /// As [`open`](Qcow2::open).
    pub fn with_storage(
        name: &Path,
        image: Box<dyn Storage>,
        data_file: Option<Box<dyn Storage>>,
        options: &OpenOptions,
    ) -> Result<Self> {
        Self::from_files(
            ImageFile::new(image, name),
            options,
            |image, header| match (header.has_data_file(), data_file) {
                (false, None) => Ok(None),
                (true, Some(storage)) => {
                    let mut name = image.path.clone().into_os_string();
                    name.push(" (data file)");
                    Ok(Some(ImageFile::new(storage, Path::new(&name))))
                }
                (false, Some(_)) => Err(data_file_error(
                    &image.path,
                    "'data-file' can only be set for images with an external data file",
                )),
                (true, None) => Err(data_file_error(
                    &image.path,
                    "'data-file' is required for this image",
                )),
            },
        )
    }

    fn from_files(
        image: ImageFile,
        options: &OpenOptions,
        data_file: impl FnOnce(&ImageFile, &Header) -> Result<Option<ImageFile>>,
    ) -> Result<Self> {
        let read_only = options.read_only;
        let header = Header::read(&*image.storage, &image.path)?;
        header.check_supported(&image.path, read_only)?;
        let geometry = Geometry {
            cluster_bits: header.cluster_bits,
        };
        let l1 = L1Table::open(&image, geometry, header.l1_table_offset, header.l1_size)?;
        let refcounts = if read_only {
            None
        } else {
            Some(Mutex::new(open_refcounts(&image, geometry, &header, &l1)?))
        };
        let placement = match data_file(&image, &header)? {
            None => Placement::Internal,
            Some(file) if header.data_file_layout() == Some(DataFileLayout::Packed) => {
                Placement::Packed(if read_only {
                    Packed::read_only(file)
                } else {
                    Packed::open(file, &image, geometry, &l1)?
                })
            }
            Some(file) if header.data_file_is_raw() => {
                Placement::Raw(External::new(file), Passthrough::new())
            }
            Some(file) => Placement::External(External::new(file)),
        };
        if !read_only {
            clear_unknown_autoclear(&image, &header)?;
        }
        let data_end = match &placement {
            Placement::Packed(packed) => packed.file.size()?,
            _ => image.size()?,
        };
        let metadata = match (&placement, &refcounts) {
            (Placement::Internal, Some(refcounts)) => Some(lock(refcounts).metadata()),
            _ => None,
        };
        Ok(Self {
            data_end: AtomicU64::new(data_end),
            image,
            placement,
            geometry,
            size: AtomicU64::new(header.disk_size()),
            version: header.version,
            read_only,
            l1,
            l2: SliceCache::new(geometry.slice_entries() as usize, options.l2_cache_size),
            metadata,
            incompatible_features: header.incompatible_features,
            corrupt: AtomicBool::new(false),
            refcounts,
            ranges: RangeLocks::default(),
            requests: Requests::default(),
            retired: Retired::default(),
            resizing: Mutex::default(),
            flushing: Mutex::default(),
        })
    }
}

/// The refcounts of an image to be written, after all of its metadata has been seen to lie apart.
fn open_refcounts(
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
    let mut reserved = Reserved::new(geometry.cluster_bits);
    reserved.push(Field::Header, 0, 1);
    reserved.push(Field::RefcountTable, geometry.cluster(table), clusters);
    let l1_table = geometry.cluster(header.l1_table_offset);
    reserved.push(Field::L1Table, l1_table, l1_clusters);
    for offset in l1.tables() {
        reserved.push(Field::L2Table, geometry.cluster(offset), 1);
    }
    for offset in refcounts.blocks() {
        reserved.push(Field::RefcountBlock, geometry.cluster(offset), 1);
    }
    reserved.sort(image)?;
    refcounts.reserve(image, reserved)?;
    Ok(refcounts)
}

/// Clears the autoclear bits of features that this version does not know: it will not keep up
/// what they promise (qcow2 specification, "autoclear_features").
fn clear_unknown_autoclear(image: &ImageFile, header: &Header) -> Result<()> {
    let known = header.autoclear_features & autoclear::KNOWN;
    if known == header.autoclear_features {
        return Ok(());
    }
    image.write_bytes_at(&known.to_be_bytes(), autoclear::OFFSET)?;
    image.sync()
}

fn open_data_file(image: &Path, header: &Header, options: &OpenOptions) -> Result<ImageFile> {
    let path = match (&options.data_file, &header.extensions.data_file) {
        (Some(path), _) => path.clone(),
        (None, Some(name)) => policy::resolve_data_file(image, name)?,
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
    ImageFile::open(&path, options.read_only)
}

fn data_file_error(image: &Path, reason: &str) -> Error {
    Error::DataFile {
        file: image.to_owned(),
        reason: reason.to_owned(),
    }
}
