//! Telling the format of an image by what the file begins with.

use tandem_block::{FileStorage, ImageFormat, Storage};

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

pub fn probe(file: &FileStorage) -> std::io::Result<Result<ImageFormat, String>> {
    let mut start = [0; PROBED];
    file.read_bytes_at(&mut start, 0)?;
    Ok(format_of(&start))
}

/// Tells the format by what the file begins with; what is not known is raw.
///
/// # Errors
/// The text about a format that is known and not supported.
pub fn format_of(start: &[u8; PROBED]) -> Result<ImageFormat, String> {
    let foreign = FOREIGN.iter().find(|(magic, _)| start.starts_with(magic));
    match foreign {
        Some((_, name)) => Err(format!("Unknown driver '{name}'")),
        None if start.starts_with(b"QFI\xfb") && start[4..8] >= [0, 0, 0, 2][..] => {
            Ok(ImageFormat::Qcow2)
        }
        None => Ok(ImageFormat::Raw),
    }
}
