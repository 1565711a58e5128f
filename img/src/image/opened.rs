//! Disks that are open, of either format.

use std::path::Path;

use tandem_block::qcow2::{Info, OpenOptions, Qcow2};
use tandem_block::{Disk, Error, ImageFormat, Locking, Raw, Result};

use crate::image::Image;
use crate::image::layers;
use crate::image::opts::With;

/// An open disk.
pub enum Opened {
    /// A raw disk.
    Raw(Box<Raw>),
    /// A qcow2 disk.
    Qcow2(Box<Qcow2>),
    /// A raw disk that is more than a file.
    Other(Box<dyn Disk>),
}

impl Opened {
    /// Opens `image`; of `options`, the files count for a raw disk, too.
    pub fn open(image: &Image<'_>, options: &OpenOptions) -> Result<Self> {
        Self::open_file(image.format, &image.path, &image.with, options)
    }

    /// As [`open`](Self::open), with what the header of a qcow2 image says.
    pub fn open_with_info(
        image: &Image<'_>,
        options: &OpenOptions,
    ) -> Result<(Self, Option<Info>)> {
        if image.with.is_layered() {
            return layers::open(image.format, &image.path, &image.with, options);
        }
        let opened = Self::open(image, options)?;
        let info = match image.format {
            ImageFormat::Raw => None,
            ImageFormat::Qcow2 => Some(Info::read_with(&image.path, Locking::Off)?),
        };
        Ok((opened, info))
    }

    /// Opens the file `path`, or what `with` tells.
    pub fn open_file(
        format: ImageFormat,
        path: &Path,
        with: &With,
        options: &OpenOptions,
    ) -> Result<Self> {
        if with.is_layered() {
            return Ok(layers::open(format, path, with, options)?.0);
        }
        Ok(match format {
            ImageFormat::Raw => {
                let raw = Raw::open_with(path, options.read_only, options.files)?;
                Self::Raw(Box::new(raw))
            }
            ImageFormat::Qcow2 => {
                let qcow2 = Qcow2::open(path, options)?;
                let checked = with.check_cluster_size(qcow2.cluster_size());
                checked.map_err(Error::Option)?;
                Self::Qcow2(Box::new(qcow2))
            }
        })
    }

    /// Its format.
    pub fn format(&self) -> ImageFormat {
        match self {
            Self::Raw(_) | Self::Other(_) => ImageFormat::Raw,
            Self::Qcow2(_) => ImageFormat::Qcow2,
        }
    }

    /// The disk.
    pub fn disk(&self) -> &dyn Disk {
        match self {
            Self::Raw(raw) => &**raw,
            Self::Qcow2(qcow2) => &**qcow2,
            Self::Other(disk) => &**disk,
        }
    }

    /// The disk, to be the backing file of another.
    pub fn into_disk(self) -> Box<dyn Disk> {
        match self {
            Self::Raw(raw) => raw,
            Self::Qcow2(qcow2) => qcow2,
            Self::Other(disk) => disk,
        }
    }
}
