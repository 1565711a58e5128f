//! The backing file: what shows where an image has nothing (qcow2 specification, "backing file").
//!
//! It is opened read-only, with its own backing file below it, and never changes while the image
//! above is open. What lies behind its end reads as zero.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vm_memory::VolatileSlice;

use super::header::Header;
use super::policy::{self, Follow};
use super::{OpenOptions, Qcow2, check};
use crate::buffers::{Buffers, fill_zero};
use crate::file::ImageFile;
use crate::lock::Access;
use crate::{Disk, Error, Raw, Result};

/// Most images below one another.
const MAX_DEPTH: usize = 256;

/// Format of a backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BackingFormat {
    /// The file is the disk.
    Raw,
    /// qcow2.
    Qcow2,
}

impl BackingFormat {
    /// The format called `name` in headers and by tools.
    pub fn from_name(name: &[u8]) -> Option<Self> {
        match name {
            b"raw" | b"file" | b"host_device" => Some(Self::Raw),
            b"qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    /// What it is called in headers and by tools.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// What is to be below an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// The backing file that the image names, if it names one.
    #[default]
    Named,
    /// Nothing, whatever the image names: where it has nothing, it reads as zero.
    Nothing,
    /// Another file, wherever it is.
    File {
        /// The file.
        path: PathBuf,
        /// Its format, if the image is not to say what it is.
        format: Option<BackingFormat>,
    },
}

/// An image that has been found, and its header.
pub(super) struct Found {
    pub image: ImageFile,
    pub header: Header,
}

impl Found {
    /// Reads the header of `image`, and refuses what is not implemented. If refcounts may be wrong,
    /// and the image is to be written, it is repaired first.
    pub fn new(image: ImageFile, read_only: bool) -> Result<Self> {
        let read = || {
            let header = Header::read(&*image.storage, &image.path)?;
            header.check_supported(&image.path, read_only)?;
            header.check_snapshots(&image.path)?;
            Ok(header)
        };
        let mut header = read()?;
        if header.is_dirty() && !read_only {
            check::repair_dirty(&image)?;
            header = read()?;
        }
        Ok(Self { image, header })
    }
}

/// Opens what lies below `top`: from the backing file that it names down to an image that names none,
/// and then from there up to the one below `top`.
pub(super) fn open(top: &Found, options: &OpenOptions) -> Result<Option<Box<dyn Disk>>> {
    let given = &options.backing;
    let options = OpenOptions {
        read_only: true,
        data_file: None,
        snapshot: None,
        backing: Backing::Named,
        ..options.clone()
    };
    match given {
        Backing::Named => {}
        Backing::Nothing => return Ok(None),
        Backing::File { path, format } => {
            let opened = open_given(top, path, *format, &options);
            return opened.map(Some).map_err(|reason| Error::BackingFile {
                file: top.image.path.clone(),
                reason,
            });
        }
    }
    let mut images: Vec<Found> = Vec::new();
    // From the image whose backing file could not be opened up to the top one.
    let failed = |above: &[Found], reason: String| {
        let above = above.iter().rev().chain([top]);
        above.fold(Error::Option(reason), |error, image| Error::BackingFile {
            file: image.image.path.clone(),
            reason: error.reason(),
        })
    };
    let mut ids = Vec::new();
    let mut disk: Option<Box<dyn Disk>> = None;
    while let Some(name) = &images.last().unwrap_or(top).header.backing_file {
        let above = images.last().unwrap_or(top);
        let next = find(above, name, &options, &mut ids);
        match next.map_err(|reason| failed(&images, reason))? {
            Next::Disk(raw) => {
                disk = Some(raw);
                break;
            }
            Next::Image(image) => images.push(*image),
        }
    }
    while let Some(image) = images.pop() {
        let opened = Qcow2::from_found(image, &options, disk.take());
        disk = Some(Box::new(opened.map_err(|e| failed(&images, e.reason()))?));
    }
    Ok(disk)
}

/// Opens the file `path`, which is to be below `top`.
fn open_given(
    top: &Found,
    path: &Path,
    format: Option<BackingFormat>,
    options: &OpenOptions,
) -> std::result::Result<Box<dyn Disk>, String> {
    let format = match format {
        Some(format) => format,
        None => format_of(&top.header, options)?,
    };
    if id(path)? == id(&top.image.path)? {
        return Err(format!("'{}' is below itself", path.display()));
    }
    let opened = match format {
        BackingFormat::Raw => ImageFile::open(path, Access::Read, options.files)
            .and_then(|file| Raw::from_file(file, true))
            .map(|raw| -> Box<dyn Disk> { Box::new(raw) }),
        BackingFormat::Qcow2 => {
            Qcow2::open(path, options).map(|image| -> Box<dyn Disk> { Box::new(image) })
        }
    };
    opened.map_err(|e| e.reason())
}

/// A backing file.
enum Next {
    Disk(Box<dyn Disk>),
    Image(Box<Found>),
}

/// Opens the backing file `name` of `above`, which has not been opened before: `ids` has those.
fn find(
    above: &Found,
    name: &[u8],
    options: &OpenOptions,
    ids: &mut Vec<(u64, u64)>,
) -> std::result::Result<Next, String> {
    ids.push(id(&above.image.path)?);
    let format = format_of(&above.header, options)?;
    let path = path_of(&above.image.path, name)?;
    if id(&path).is_ok_and(|id| ids.contains(&id)) {
        return Err(format!("'{}' is below itself", path.display()));
    }
    if ids.len() > MAX_DEPTH {
        return Err(format!("more than {MAX_DEPTH} images below one another"));
    }
    let open = || policy::open_backing_file(&above.image.path, &path, options.follow);
    ImageFile::open_with(&path, open, Access::Read, options.files)
        .and_then(|file| match format {
            BackingFormat::Raw => Raw::from_file(file, true).map(|raw| Next::Disk(Box::new(raw))),
            BackingFormat::Qcow2 => {
                Found::new(file, true).map(|found| Next::Image(Box::new(found)))
            }
        })
        .map_err(|e| e.reason())
}

/// Device and inode of the file at `path`.
fn id(path: &Path) -> std::result::Result<(u64, u64), String> {
    let failed = |e| Error::io(path, "open", e).reason();
    let metadata = path.metadata().map_err(failed)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// What the header says, and never what the file looks like: a guest could have written that.
fn format_of(header: &Header, options: &OpenOptions) -> std::result::Result<BackingFormat, String> {
    match (&header.extensions.backing_format, options.backing_format) {
        (Some(name), _) => BackingFormat::from_name(name)
            .ok_or_else(|| format!("Unknown driver '{}'", String::from_utf8_lossy(name))),
        (None, Some(format)) => Ok(format),
        (None, None) => Err(
            "the image does not tell its format; backing-format=FMT says what it is, and \
             qemu-img rebase -u -F FMT writes it into the image"
                .to_owned(),
        ),
    }
}

/// The path that the backing-file name `name` in `image` means: a relative one is relative to the
/// image's directory.
///
/// # Errors
/// The reason why it means none: names that are no local files, such as `json:` and `nbd:`, are
/// never followed.
pub fn path_of(image: &Path, name: &[u8]) -> std::result::Result<PathBuf, String> {
    let local = match name.iter().position(|byte| b":/".contains(byte)) {
        Some(end) if name[end] == b':' => name.strip_prefix(b"file:").ok_or_else(|| {
            format!(
                "Unknown protocol '{}'",
                String::from_utf8_lossy(&name[..end])
            )
        })?,
        _ => name,
    };
    let directory = image.parent().unwrap_or(Path::new(""));
    Ok(directory.join(OsStr::from_bytes(local)))
}

/// The path of the backing file that `image` calls `name`, if it exists and `follow` allows to open
/// it.
///
/// # Errors
/// [`Error::Option`] with the reason why not.
pub fn find_backing(image: &Path, name: &[u8], follow: Follow) -> Result<PathBuf> {
    let path = path_of(image, name).map_err(Error::Option)?;
    drop(policy::open_backing_file(image, &path, follow)?);
    Ok(path)
}

impl Qcow2 {
    /// Whether anything of a backing file may show at `offset` where this image has nothing.
    pub(super) fn backing_shows(&self, offset: u64) -> bool {
        self.backing.as_ref().is_some_and(|b| offset < b.size())
    }

    /// Fills `bufs`, `len` bytes, with what shows at `offset` where this image has nothing.
    pub(super) fn read_backing(
        &self,
        bufs: &[VolatileSlice<'_>],
        offset: u64,
        len: u64,
    ) -> Result<()> {
        let Some(backing) = self.backing.as_ref().filter(|b| offset < b.size()) else {
            fill_zero(bufs);
            return Ok(());
        };
        let stored = len.min(backing.size() - offset);
        if stored == len {
            return backing.read_at(bufs, offset);
        }
        let mut buffers = Buffers::new(bufs);
        buffers.take(stored, |piece, at| backing.read_at(piece, offset + at))?;
        buffers.take(len - stored, |piece, _| {
            fill_zero(piece);
            Ok(())
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_local_files() {
        let path = |name: &str| path_of(Path::new("dir/top"), name.as_bytes());
        assert_eq!(path("base").unwrap(), Path::new("dir/base"));
        assert_eq!(path("../a:b").unwrap(), Path::new("dir/../a:b"));
        assert_eq!(path("/x/base").unwrap(), Path::new("/x/base"));
        assert_eq!(path("file:base").unwrap(), Path::new("dir/base"));
        assert_eq!(path("nbd:host").unwrap_err(), "Unknown protocol 'nbd'");
        assert!(path("json:{}").is_err());
    }
}
