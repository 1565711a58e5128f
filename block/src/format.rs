//! The formats of images.

use crate::names::named;

/// How an image is laid out. It is never guessed: a guest can write a qcow2 header into its raw disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The file is the disk.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

named!(ImageFormat: Qcow2 = "qcow2", Raw = "raw");

impl ImageFormat {
    /// The format that a header, or a tool that writes one, calls `name`: files and block devices are
    /// raw, too.
    pub fn from_header(name: &[u8]) -> Option<Self> {
        match name {
            b"file" | b"host_device" => Some(Self::Raw),
            name => Self::from_name(str::from_utf8(name).ok()?),
        }
    }
}
