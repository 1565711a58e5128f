//! The formats of images.

/// How an image is laid out. It is never guessed: a guest can write a qcow2 header into its raw disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ImageFormat {
    /// The file is the disk.
    Raw,
    /// qcow2, version 2 or 3.
    Qcow2,
}

impl ImageFormat {
    /// All of them.
    pub const ALL: &[Self] = &[Self::Qcow2, Self::Raw];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }

    /// The format called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        let mut all = Self::ALL.iter().copied();
        all.find(|format| format.name() == name)
    }

    /// The format that a header, or a tool that writes one, calls `name`: files and block devices are
    /// raw, too.
    pub fn from_header(name: &[u8]) -> Option<Self> {
        match name {
            b"file" | b"host_device" => Some(Self::Raw),
            name => Self::from_name(str::from_utf8(name).ok()?),
        }
    }
}
