//! Disks that are open, of either format.

use tandem_block::qcow2::{OpenOptions, Qcow2};
use tandem_block::{Disk, Raw};

use crate::image::{Format, Image};

/// An open disk.
pub enum Opened {
    /// A raw disk.
    Raw(Raw),
    /// A qcow2 disk.
    Qcow2(Box<Qcow2>),
}

impl Opened {
    /// Opens `image`; of `options`, the files count for a raw disk, too.
    pub fn open(image: &Image<'_>, options: &OpenOptions) -> tandem_block::Result<Self> {
        Ok(match image.format {
            Format::Raw => {
                let raw = Raw::open_with(&image.path, options.read_only, options.files)?;
                Self::Raw(raw)
            }
            Format::Qcow2 => Self::Qcow2(Box::new(Qcow2::open(&image.path, options)?)),
        })
    }

    /// The disk.
    pub fn disk(&self) -> &dyn Disk {
        match self {
            Self::Raw(raw) => raw,
            Self::Qcow2(qcow2) => &**qcow2,
        }
    }

    /// The disk, to be the backing file of another.
    pub fn into_disk(self) -> Box<dyn Disk> {
        match self {
            Self::Raw(raw) => Box::new(raw),
            Self::Qcow2(qcow2) => qcow2,
        }
    }
}
