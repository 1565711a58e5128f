//! What a new image can be like.

use std::path::PathBuf;

use crate::ImageFormat;
use crate::hints::FileHints;
use crate::names::named;
use crate::preallocation::Preallocation;
use crate::qcow2::DataFileLayout;
use crate::qcow2::compressed::CompressionType;
use crate::qcow2::header::CLUSTER_BITS;
use crate::qcow2::parse::MAX_BACKING_FILE;
use crate::qcow2::stamp::ONLY_V3;
use crate::{Error, Result, Stamp};

/// The smallest cluster whose subclusters are sectors.
const MIN_EXTENDED_CLUSTER: u64 = 16 << 10;

/// What becomes of a data file that exists already.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum DataFileReuse {
    /// It is made anew, and its content is lost.
    #[default]
    Replace,
    /// No image is created.
    Refuse,
    /// It becomes the data of the disk as it is, and is not written. For raw data files only.
    Keep,
}

named!(DataFileReuse: Replace = "replace", Refuse = "refuse", Keep = "keep");

/// What a new image is to be like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CreateOptions {
    /// Size of the disk in bytes; rounded up to whole sectors of 512 bytes.
    pub size: u64,
    /// Version of the format: 2 (`compat=0.10`) or 3 (`compat=1.1`).
    pub version: u32,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Name of the backing file, which shows where the image has nothing, as it will stand in the
    /// image: relative to the image's directory. It is not opened.
    pub backing_file: Option<PathBuf>,
    /// Format of the backing file.
    pub backing_format: Option<ImageFormat>,
    /// The [stamp](Stamp::of) of the backing file, if the image is to be opened only on what that is now.
    pub base_stamp: Option<Stamp>,
    /// File for the guest's data, made anew, and named in the image as it is here. Without it the
    /// data goes into the image.
    pub data_file: Option<PathBuf>,
    /// Whether the data file is to be a valid raw image at all times. The mapping of such an image
    /// is always complete, whatever `preallocation` says.
    pub data_file_raw: bool,
    /// How guest data lies in the data file.
    pub data_file_layout: DataFileLayout,
    /// What becomes of a data file that exists already.
    pub data_file_reuse: DataFileReuse,
    /// What the file system is told of the files.
    pub hints: FileHints,
    /// How much of the disk gets its space at once.
    pub preallocation: Preallocation,
    /// Allows a writer to postpone refcount updates.
    pub lazy_refcounts: bool,
    /// How clusters are compressed by those who compress any.
    pub compression_type: CompressionType,
    /// Width of a refcount in bits: a power of two from 1 to 64, 16 in version 2.
    pub refcount_bits: u32,
    /// Whether clusters, of 16 KiB at least, are divided into 32 subclusters each. A small write
    /// then takes less from the backing file.
    pub extended_l2: bool,
}

impl Default for CreateOptions {
    fn default() -> Self {
        Self {
            size: 0,
            version: 3,
            cluster_size: 64 << 10,
            backing_file: None,
            backing_format: None,
            base_stamp: None,
            data_file: None,
            data_file_raw: false,
            data_file_layout: DataFileLayout::Standard,
            data_file_reuse: DataFileReuse::Replace,
            hints: FileHints::default(),
            preallocation: Preallocation::Off,
            lazy_refcounts: false,
            compression_type: CompressionType::Deflate,
            refcount_bits: 16,
            extended_l2: false,
        }
    }
}

impl CreateOptions {
    /// Refuses what cannot be, or does not go together, in QEMU's order.
    pub(super) fn check(&self) -> Result<()> {
        let wrong = |reason: &str| Err(Error::Option(reason.to_owned()));
        let is_v2 = match self.version {
            2 => true,
            3 => false,
            _ => return wrong("The version must be 2 or 3"),
        };
        if self.extended_l2 && is_v2 {
            return wrong(
                "Extended L2 entries are only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if !self.cluster_size.is_power_of_two()
            || !CLUSTER_BITS.contains(&self.cluster_size.trailing_zeros())
        {
            return wrong("Cluster size must be a power of two between 512 and 2048k");
        }
        if self.extended_l2 && self.cluster_size < MIN_EXTENDED_CLUSTER {
            return wrong(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        let is_preallocated = self.preallocation != Preallocation::Off;
        if self.backing_file.is_some() && is_preallocated && !self.extended_l2 {
            return wrong(
                "Backing file and preallocation can only be used at the same time if extended_l2 \
                 is on",
            );
        }
        if self.backing_file.is_none() && self.backing_format.is_some() {
            return wrong("Backing format cannot be used without backing file");
        }
        if self.backing_file.is_none() && self.base_stamp.is_some() {
            return wrong("A stamp of the backing file cannot be kept without one");
        }
        if self.base_stamp.is_some() && is_v2 {
            return wrong(ONLY_V3);
        }
        if self.lazy_refcounts && is_v2 {
            return wrong(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if self.refcount_bits > 64 || !self.refcount_bits.is_power_of_two() {
            return wrong("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if self.refcount_bits != 16 && is_v2 {
            return wrong(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use version=v3 or greater)",
            );
        }
        self.check_data_file()?;
        if self.data_file.is_some() && is_v2 {
            return wrong(
                "External data files are only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if self.compression_type != CompressionType::Deflate && is_v2 {
            return wrong(
                "Non-zlib compression type is only supported with compatibility level 1.1 and above \
                 (use version=v3 or greater)",
            );
        }
        if let Some(name) = &self.backing_file
            && name.as_os_str().len() > MAX_BACKING_FILE
        {
            return wrong("Could not assign backing file: File name too long");
        }
        Ok(())
    }

    /// Refuses what does not go together with the data file, or without one.
    fn check_data_file(&self) -> Result<()> {
        let wrong = |reason: &str| Err(Error::Option(reason.to_owned()));
        if self.data_file_raw && self.data_file.is_none() {
            return wrong("data-file-raw requires data-file");
        }
        if self.data_file_raw && self.backing_file.is_some() {
            return wrong("Backing file and data-file-raw cannot be used at the same time");
        }
        if self.data_file_layout == DataFileLayout::Packed {
            if self.data_file.is_none() {
                return wrong("data-file-layout=packed requires data-file");
            }
            if self.data_file_raw {
                return wrong(
                    "data-file-layout=packed and data-file-raw cannot be used at the same time",
                );
            }
        }
        if self.data_file_reuse != DataFileReuse::Replace && self.data_file.is_none() {
            return wrong("data-file-reuse requires data-file");
        }
        if self.data_file_reuse == DataFileReuse::Keep {
            // Nothing of what the file holds would show.
            if !self.data_file_raw {
                return wrong("data-file-reuse=keep requires data-file-raw=on");
            }
            if matches!(
                self.preallocation,
                Preallocation::Falloc | Preallocation::Full
            ) {
                return wrong(
                    "data-file-reuse=keep and preallocation of data cannot be used at the same time",
                );
            }
        }
        Ok(())
    }
}
