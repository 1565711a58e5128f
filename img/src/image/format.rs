//! The format of an image, as it is named, or told by what the file begins with.

use tandem_block::{FileStorage, Storage};

/// The formats that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// qcow2.
    Qcow2,
}

impl Format {
    /// The format called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Formats that are recognised in order to be refused: what they begin with.
const FOREIGN: [(&[u8], &str); 8] = [
    (b"QFI\xfb\0\0\0\x01", "qcow"),
    (b"QED\0", "qed"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"conectix", "vpc"),
    (b"vhdxfile", "vhdx"),
    (b"WithoutFreeSpace", "parallels"),
    (b"LUKS\xba\xbe", "luks"),
];

/// Bytes by which a format is told.
pub const PROBED: usize = 16;

pub fn probe(file: &FileStorage) -> std::io::Result<Result<Format, String>> {
    let mut start = [0; PROBED];
    file.read_bytes_at(&mut start, 0)?;
    Ok(format_of(&start))
}

/// Tells the format by what the file begins with; what is not known is raw.
///
/// # Errors
/// The text about a format that is known and not supported.
pub fn format_of(start: &[u8; PROBED]) -> Result<Format, String> {
    let foreign = FOREIGN.iter().find(|(magic, _)| start.starts_with(magic));
    match foreign {
        Some((_, name)) => Err(format!("Unknown driver '{name}'")),
        None if start.starts_with(b"QFI\xfb") && start[4..8] >= [0, 0, 0, 2][..] => {
            Ok(Format::Qcow2)
        }
        None => Ok(Format::Raw),
    }
}
