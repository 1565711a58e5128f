//! The stamp of the backing file that an image keeps, so that it is seen when that has changed.
//!
//! It is an extension of the format: a header extension of type 0x4253544d ("BSTM"), which holds while
//! autoclear feature bit 62 is set. QEMU keeps the one and clears the other when it opens the image for
//! writing, so a program that does not know of the stamp, and may change the backing file on purpose,
//! ends it. All numbers are big-endian:
//!
//! | bytes | content |
//! | --- | --- |
//! | 0 to 7 | size of the backing file's disk in bytes |
//! | 8 to 11 | number of the files that follow |
//! | 12 to 15 | zero |
//! | 24 for each | its length in bytes (8), seconds since 1970 when it was written last, signed (8), nanoseconds after that (4), and 1 for a file or 0 for a block device, whose time is zero (4) |
//!
//! The files are those of the backing file and of what is below it, from the top down, an image before
//! its data file.
//!
//! What Tandem does to an image keeps the stamp right. `commit`, which writes to a backing file, ends
//! it first and makes a new one afterwards, so that a crash leaves an image without a stamp.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use zerocopy::byteorder::big_endian::{I64, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::OpenOptions;
use super::backing::{self, Found};
use super::header::Header;
use crate::file::ImageFile;
use crate::lock::{Access, Locking};
use crate::{Disk, Error, FileOptions, FileStamp, Modified, Result, Stamp};

const SECOND: u32 = 1_000_000_000;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct StampLayout {
    size: U64,
    count: U32,
    reserved: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FileLayout {
    len: U64,
    seconds: I64,
    nanoseconds: U32,
    is_file: U32,
}

/// Content of the header extension.
pub(super) fn encode(stamp: &Stamp) -> Vec<u8> {
    let head = StampLayout {
        size: stamp.size.into(),
        count: (stamp.files.len() as u32).into(),
        reserved: 0.into(),
    };
    let mut bytes = head.as_bytes().to_vec();
    for file in &stamp.files {
        let modified = file.modified;
        let layout = FileLayout {
            len: file.len.into(),
            seconds: modified.map_or(0, |at| at.seconds).into(),
            nanoseconds: modified.map_or(0, |at| at.nanoseconds).into(),
            is_file: u32::from(modified.is_some()).into(),
        };
        bytes.extend_from_slice(layout.as_bytes());
    }
    bytes
}

/// What the content of a header extension means; `None` if it is none.
pub(super) fn decode(bytes: &[u8]) -> Option<Stamp> {
    let (head, files) = StampLayout::ref_from_prefix(bytes).ok()?;
    let files = <[FileLayout]>::ref_from_bytes(files).ok()?;
    if files.len() != head.count.get() as usize || head.reserved.get() != 0 {
        return None;
    }
    let decode = |file: &FileLayout| {
        let modified = Modified {
            seconds: file.seconds.get(),
            nanoseconds: file.nanoseconds.get(),
        };
        let modified = match file.is_file.get() {
            0 => None,
            1 if modified.nanoseconds < SECOND => Some(modified),
            _ => return None,
        };
        Some(FileStamp {
            path: PathBuf::new(),
            len: file.len.get(),
            modified,
        })
    };
    let files = files.iter().map(decode).collect::<Option<_>>()?;
    let size = head.size.get();
    Some(Stamp { size, files })
}

/// Refuses to put the image at `path` on `backing` if that is not what it was according to `header`.
pub(super) fn check(path: &Path, header: &Header, backing: Option<&Arc<dyn Disk>>) -> Result<()> {
    let (Some(then), Some(backing)) = (&header.extensions.base_stamp, backing) else {
        return Ok(());
    };
    let now = backing.stamp()?;
    match now.and_then(|now| then.difference(&now)) {
        None => Ok(()),
        Some(difference) => {
            let name = header.backing_file.as_deref().unwrap_or_default();
            let format = header.extensions.backing_format.as_deref();
            Err(Error::BaseChanged {
                file: path.to_owned(),
                base: OsStr::from_bytes(name).into(),
                format: String::from_utf8_lossy(format.unwrap_or(b"FMT")).into_owned(),
                difference,
            })
        }
    }
}

/// What has changed of the backing file of the image at `path` since the image kept its stamp, if it
/// does; `None` if nothing has.
///
/// # Errors
/// What keeps the image, or one below it, from being read.
pub fn base_difference(path: &Path, options: &OpenOptions) -> Result<Option<String>> {
    let image = ImageFile::open(path, Access::Read, options.files)?;
    let found = Found::new(image, true)?;
    let Some(then) = &found.header.extensions.base_stamp else {
        return Ok(None);
    };
    let backing = backing::open(&found, options)?;
    let now = backing.and_then(|backing| backing.stamp().transpose());
    Ok(now.transpose()?.and_then(|now| then.difference(&now)))
}

/// Has the image at `path` keep the stamp of its backing file as that is now, whatever it kept before.
///
/// # Errors
/// As [`Qcow2::open`](super::Qcow2::open); [`Error::Option`] for an image of version 2, or without a
/// backing file; [`Error::HeaderFull`].
pub fn stamp_base(path: &Path, options: &OpenOptions) -> Result<()> {
    let image = ImageFile::open(path, Access::Write, options.files)?;
    let found = Found::new(image, false)?;
    let backing = backing::open(&found, options)?;
    let Found { image, mut header } = found;
    let wrong = |reason: &str| Err(Error::Option(reason.to_owned()));
    let Some(backing) = backing else {
        return wrong("Image does not have a backing file");
    };
    if header.version < 3 {
        return wrong(ONLY_V3);
    }
    header.set_base_stamp(Stamp::of(&*backing)?);
    header.forget_unknown_autoclear();
    header.write(&image)
}

pub(super) const ONLY_V3: &str = "A stamp of the backing file is only supported with compatibility \
                                  level 1.1 and above (use version=v3 or greater)";

/// Ends the stamp that the image at `path` keeps, durably. The caller has locked the image.
pub(super) fn end(path: &Path) -> Result<()> {
    let options = FileOptions {
        locking: Locking::Off,
        ..FileOptions::default()
    };
    let image = ImageFile::open(path, Access::Write, options)?;
    let mut header = Header::read(&*image.storage, path)?;
    header.set_base_stamp(None);
    header.write(&image)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_stamp() {
        let file = FileStamp {
            path: PathBuf::new(),
            len: 7,
            modified: Some(Modified {
                seconds: 1,
                nanoseconds: 2,
            }),
        };
        let stamp = Stamp {
            size: 512,
            files: vec![file],
        };
        let bytes = encode(&stamp);
        assert_eq!(bytes.len(), 40);
        assert_eq!(decode(&bytes), Some(stamp));
        for len in [0, 15, 16, 39] {
            assert_eq!(decode(&bytes[..len]), None, "{len}");
        }
        // Another count, bytes that are zero, too many nanoseconds, another kind.
        for (at, byte) in [(8, 1), (11, 2), (12, 1), (32, 0x80), (39, 2)] {
            let mut wrong = bytes.clone();
            wrong[at] = byte;
            assert_eq!(decode(&wrong), None, "{at}");
        }
        assert_eq!(decode(&[&bytes[..], &[0; 24]].concat()), None);
    }
}
