//! What the header of an image says, for a user to read.

use std::path::Path;

use super::bitmaps::BitmapInfo;
use super::header::{Header, compatible, incompatible};
use super::snapshot::{SnapshotInfo, read_table};
use super::{DataFileLayout, bitmaps};
#[cfg(doc)]
use crate::Error;
use crate::file::{FileOptions, ImageFile};
use crate::lock::{Access, Locking};
use crate::{Result, Stamp, Storage};

/// What an image is like, as told by its header.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Info {
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Version of the format: 2 or 3.
    pub version: u32,
    /// Bytes in a cluster.
    pub cluster_size: u64,
    /// Name of the backing file, untrusted bytes.
    pub backing_file: Option<Vec<u8>>,
    /// Name of the backing file's format, untrusted bytes.
    pub backing_format: Option<Vec<u8>>,
    /// What the backing file was like when the image was put on it, if the image is to be opened only on
    /// that.
    pub base_stamp: Option<Stamp>,
    /// Whether compressed clusters are compressed with zstd instead of deflate.
    pub zstd: bool,
    /// Whether refcount updates may be postponed.
    pub lazy_refcounts: bool,
    /// Width of a refcount in bits.
    pub refcount_bits: u32,
    /// Whether guest data is in an external data file.
    pub has_data_file: bool,
    /// Name of the data file, untrusted bytes.
    pub data_file: Option<Vec<u8>>,
    /// Whether the data file is promised to be a valid raw image.
    pub data_file_raw: bool,
    /// How guest data lies in the data file, if there is one.
    pub data_file_layout: Option<DataFileLayout>,
    /// The persistent bitmaps.
    pub bitmaps: Vec<BitmapInfo>,
    /// Whether there are others, which a program without support for them has made worthless.
    pub stale_bitmaps: bool,
    /// The internal snapshots.
    pub snapshots: Vec<SnapshotInfo>,
    /// Whether refcounts may be wrong since the image was not closed.
    pub dirty: bool,
    /// Whether the image is marked as corrupt.
    pub corrupt: bool,
    /// Whether clusters are divided into subclusters.
    pub extended_l2: bool,
}

impl Info {
    /// Reads the header and the snapshot table of the image at `path`, and no other file.
    ///
    /// # Errors
    /// [`Error::NotQcow2`], [`Error::Invalid`], [`Error::Io`]; [`Error::Unsupported`] for unknown
    /// features, and for encryption, which it could not tell;
    /// [`Error::Locked`] if another program writes to the image.
    pub fn read(path: &Path) -> Result<Self> {
        Self::read_with(path, Locking::On)
    }

    /// As [`read`](Info::read). Unless `locking` is [`On`](Locking::On), the header may be read while
    /// another program changes it.
    ///
    /// # Errors
    /// As [`read`](Info::read).
    pub fn read_with(path: &Path, locking: Locking) -> Result<Self> {
        let options = FileOptions {
            locking,
            ..FileOptions::default()
        };
        let image = ImageFile::open(path, Access::Look, options)?;
        Self::read_storage(path, &*image.storage)
    }

    /// As [`read`](Info::read), of the image in `storage`, which is called `path`.
    ///
    /// # Errors
    /// As [`read`](Info::read).
    pub fn read_storage(path: &Path, storage: &dyn Storage) -> Result<Self> {
        let header = Header::read(storage, path)?;
        header.check_encryption(path)?;
        let table = read_table(storage, path, &header)?;
        let incompatible = |bit| header.incompatible_features & bit != 0;
        Ok(Self {
            size: header.disk_size(),
            version: header.version,
            cluster_size: header.cluster_size(),
            zstd: header.compression_type == 1,
            lazy_refcounts: header.compatible_features & compatible::LAZY_REFCOUNTS != 0,
            refcount_bits: 1 << header.refcount_order,
            has_data_file: header.has_data_file(),
            data_file_raw: header.data_file_is_raw(),
            data_file_layout: header.data_file_layout(),
            bitmaps: bitmaps::list(storage, path, &header)?,
            stale_bitmaps: header.extensions.stale_bitmaps,
            snapshots: table.snapshots.into_iter().map(Into::into).collect(),
            dirty: incompatible(incompatible::DIRTY),
            corrupt: incompatible(incompatible::CORRUPT),
            extended_l2: header.has_extended_l2(),
            base_stamp: header.extensions.base_stamp,
            backing_file: header.backing_file,
            backing_format: header.extensions.backing_format,
            data_file: header.extensions.data_file,
        })
    }
}
