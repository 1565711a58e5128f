//! The backing file: what shows where an image has nothing (qcow2 specification, "backing file").
//!
//! It is opened read-only, with its own backing file below it, and never changes while the image
//! above is open. What lies behind its end reads as zero.
//!
//! When images are committed, the one that takes up their data is opened for writing, and those above
//! it are opened without it.

use std::ffi::OsStr;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use vm_memory::VolatileSlice;

use super::header::Header;
use super::policy::{self, Follow};
use super::rebase::BackingName;
use super::{OpenOptions, Qcow2, check};
use crate::buffers::{Buffers, fill_zero};
use crate::disk::find_in_chain;
use crate::file::{FileOptions, ImageFile};
use crate::live::{ImageRef, LiveImage};
use crate::lock::{Access, Locking};
use crate::{Disk, Error, Extent, ExtentKind, ImageFormat, Limits, Raw, Result};

/// Most images below one another.
const MAX_DEPTH: usize = 256;

/// What is to be below an image.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Backing {
    /// The backing file that the image names, if it names one.
    #[default]
    Named,
    /// The backing file that the image names, if it names one, in this format, whatever the image says
    /// of it.
    NamedAs(ImageFormat),
    /// Nothing, whatever the image names: where it has nothing, it reads as zero.
    Nothing,
    /// Another file, wherever it is.
    File {
        /// The file.
        path: PathBuf,
        /// Its format, if the image is not to say what it is.
        format: Option<ImageFormat>,
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
pub(super) fn open(top: &Found, options: &OpenOptions) -> Result<Option<Arc<dyn Disk>>> {
    Ok(open_chain(top, options, None)?.below)
}

/// Opens what lies below `top` down to the image that has `depth` others above it besides `top`, and
/// this one, the base, for writing.
///
/// # Errors
/// [`Error::Option`] if there is no such image.
pub(super) fn open_above(top: &Found, options: &OpenOptions, depth: usize) -> Result<Above> {
    let base = Base {
        depth,
        shows: false,
    };
    let chain = open_chain(top, options, Some(base))?;
    let (Some(below), Some(base)) = (chain.below, chain.base) else {
        return Err(no_base());
    };
    Ok(Above {
        below,
        base: base.shared(),
        stamped: chain.stamped,
    })
}

/// As [`open_above`], and the images above the base are on it.
///
/// # Errors
/// Those of [`open_above`].
pub(crate) fn open_with_base(
    top: &Path,
    options: &OpenOptions,
    depth: usize,
) -> Result<(Arc<dyn Disk>, LiveImage)> {
    let base = Base { depth, shows: true };
    let chain = open_chain(&look(top, options)?, options, Some(base))?;
    chain.below.zip(chain.base).ok_or_else(no_base)
}

/// Opens what is below the image at `top` once it has `name` as the name of its backing file.
///
/// # Errors
/// As [`Qcow2::open`].
pub(crate) fn open_renamed(
    top: &Path,
    name: &BackingName,
    options: &OpenOptions,
) -> Result<Option<Arc<dyn Disk>>> {
    let mut top = look(top, options)?;
    top.header.backing_file = Some(name.file.clone());
    top.header.extensions.backing_format = Some(name.format.clone());
    open(&top, options)
}

/// Reads the header of an image that is in use.
fn look(image: &Path, options: &OpenOptions) -> Result<Found> {
    let unlocked = FileOptions {
        locking: Locking::Off,
        ..options.files
    };
    Found::new(ImageFile::open(image, Access::Look, unlocked)?, true)
}

fn no_base() -> Error {
    Error::Option("Image does not have a backing file".to_owned())
}

/// An image below another that is opened for writing.
#[derive(Clone, Copy)]
struct Base {
    /// How many others are between the two.
    depth: usize,
    /// Whether those show what it has.
    shows: bool,
}

/// What lies below an image, without a base.
pub(super) struct Above {
    /// The images above the base, on something in its place that has its size and cannot be read.
    pub below: Arc<dyn Disk>,
    /// On what lies below it.
    pub base: Arc<dyn Disk>,
    /// Those above the base, the one on top among them, that keep a stamp, from the base up.
    pub stamped: Vec<PathBuf>,
}

#[derive(Default)]
struct Chain {
    below: Option<Arc<dyn Disk>>,
    base: Option<LiveImage>,
    stamped: Vec<PathBuf>,
}

fn open_chain(top: &Found, options: &OpenOptions, base: Option<Base>) -> Result<Chain> {
    let given = &options.backing;
    let options = OpenOptions {
        read_only: true,
        data_file: None,
        snapshot: None,
        backing: Backing::Named,
        ..options.clone()
    };
    let forced = match given {
        Backing::Named => None,
        Backing::NamedAs(format) => Some(*format),
        Backing::Nothing => return Ok(Chain::default()),
        Backing::File { .. } if base.is_some() => {
            let reason = "only a backing file that the image names can be written";
            return Err(Error::Option(reason.to_owned()));
        }
        Backing::File { path, format } => {
            let opened = open_given(top, path, *format, &options);
            let below = opened.map_err(|reason| Error::BackingFile {
                file: top.image.path.clone(),
                reason,
            })?;
            return Ok(Chain {
                below: Some(below),
                ..Chain::default()
            });
        }
    };
    let (mut images, mut chain) = descend(top, &options, forced, base)?;
    let stamped = |image: &&Found| image.header.extensions.base_stamp.is_some();
    let stamped = images.iter().rev().chain([top]).filter(stamped);
    chain.stamped = stamped.map(|image| image.image.path.clone()).collect();
    while let Some(image) = images.pop() {
        let opened = Qcow2::from_found(image, &options, chain.below.take());
        let opened = opened.map_err(|e| failed_below(top, &images, e.reason()))?;
        chain.below = Some(Arc::new(opened));
    }
    Ok(chain)
}

/// What has gone wrong with the backing file of the last of `above`, for each image up to `top`, which is on
/// the first one.
fn failed_below(top: &Found, above: &[Found], reason: String) -> Error {
    let above = above.iter().rev().chain([top]);
    above.fold(Error::Option(reason), |error, image| Error::BackingFile {
        file: image.image.path.clone(),
        reason: error.reason(),
    })
}

/// Finds the images below `top` that are on others, from the top down, and opens what they are all on.
fn descend(
    top: &Found,
    options: &OpenOptions,
    mut forced: Option<ImageFormat>,
    base: Option<Base>,
) -> Result<(Vec<Found>, Chain)> {
    let mut images: Vec<Found> = Vec::new();
    let mut ids = Vec::new();
    let mut chain = Chain::default();
    while let Some(name) = &images.last().unwrap_or(top).header.backing_file {
        let above = images.last().unwrap_or(top);
        let is_base = base.is_some_and(|base| base.depth == images.len());
        let shows = base.is_some_and(|base| base.shows);
        let options = OpenOptions {
            read_only: !is_base,
            ..options.clone()
        };
        let wrapped = |error: Error| match error {
            // Which others may share with a reader, but not with a writer.
            Error::Locked { shared: false, .. } if is_base => error,
            error => failed_below(top, &images, error.reason()),
        };
        match find(above, name, forced.take(), &options, &mut ids).map_err(wrapped)? {
            next if is_base => {
                let base = next.open_base(&options).map_err(wrapped)?;
                chain.below = Some(if shows {
                    base.shared()
                } else {
                    let size = base.disk().size();
                    Arc::new(Absent { size })
                });
                chain.base = Some(base);
                break;
            }
            Next::Raw(raw) => {
                chain.below = Some(Arc::new(*raw));
                break;
            }
            Next::Image(image) => images.push(*image),
        }
    }
    Ok((images, chain))
}

/// A disk that is not there.
struct Absent {
    size: u64,
}

impl Disk for Absent {
    fn size(&self) -> u64 {
        self.size
    }

    fn limits(&self) -> Limits {
        Limits::new(512, true)
    }

    fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        let reason = "the base is not read through the images above it";
        Err(Error::Option(reason.to_owned()))
    }

    fn write_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn discard(&self, _: u64, _: u64) -> Result<()> {
        Err(Error::ReadOnly)
    }

    fn flush(&self) -> Result<()> {
        Ok(())
    }
}

/// Opens the file `path`, which is to be below `top`.
fn open_given(
    top: &Found,
    path: &Path,
    format: Option<ImageFormat>,
    options: &OpenOptions,
) -> std::result::Result<Arc<dyn Disk>, String> {
    let format = match format {
        Some(format) => format,
        None => format_of(&top.header, options)?,
    };
    if id(path)? == id(&top.image.path)? {
        return Err(format!("'{}' is below itself", path.display()));
    }
    let opened = match format {
        ImageFormat::Raw => ImageFile::open(path, Access::Read, options.files)
            .and_then(|file| Raw::from_file(file, true))
            .map(|raw| -> Arc<dyn Disk> { Arc::new(raw) }),
        ImageFormat::Qcow2 => {
            Qcow2::open(path, options).map(|image| -> Arc<dyn Disk> { Arc::new(image) })
        }
    };
    opened.map_err(|e| e.reason())
}

/// A backing file.
enum Next {
    Raw(Box<Raw>),
    Image(Box<Found>),
}

impl Next {
    /// Opens what is to be written, on top of what lies below it.
    fn open_base(self, options: &OpenOptions) -> Result<LiveImage> {
        match self {
            Self::Raw(raw) => Ok((*raw).into()),
            Self::Image(image) => {
                let below = open(&image, options)?;
                Ok(Qcow2::from_found(*image, options, below)?.into())
            }
        }
    }
}

/// Opens the backing file `name` of `above`, which has not been opened before: `ids` has those. Its
/// format is what `above` says unless it is given.
fn find(
    above: &Found,
    name: &[u8],
    format: Option<ImageFormat>,
    options: &OpenOptions,
    ids: &mut Vec<(u64, u64)>,
) -> Result<Next> {
    ids.push(id(&above.image.path).map_err(Error::Option)?);
    let format = match format {
        Some(format) => format,
        None => format_of(&above.header, options).map_err(Error::Option)?,
    };
    let path = path_of(&above.image.path, name).map_err(Error::Option)?;
    if id(&path).is_ok_and(|id| ids.contains(&id)) {
        let reason = format!("'{}' is below itself", path.display());
        return Err(Error::Option(reason));
    }
    if ids.len() > MAX_DEPTH {
        let reason = format!("more than {MAX_DEPTH} images below one another");
        return Err(Error::Option(reason));
    }
    let read_only = options.read_only;
    let open = || policy::open_backing_file(&above.image.path, &path, options.follow, read_only);
    let access = match format {
        ImageFormat::Raw if !read_only => Access::WriteRaw,
        ImageFormat::Raw | ImageFormat::Qcow2 => Access::new(read_only),
    };
    let file = ImageFile::open_with(&path, open, access, options.files)?;
    Ok(match format {
        ImageFormat::Raw => Next::Raw(Box::new(Raw::from_file(file, read_only)?)),
        ImageFormat::Qcow2 => Next::Image(Box::new(Found::new(file, read_only)?)),
    })
}

/// Device and inode of the file at `path`.
fn id(path: &Path) -> std::result::Result<(u64, u64), String> {
    let failed = |e| Error::io(path, "open", e).reason();
    let metadata = path.metadata().map_err(failed)?;
    Ok((metadata.dev(), metadata.ino()))
}

/// What the header says, and never what the file looks like: a guest could have written that.
pub(super) fn format_of(
    header: &Header,
    options: &OpenOptions,
) -> std::result::Result<ImageFormat, String> {
    match (&header.extensions.backing_format, options.backing_format) {
        (Some(name), _) => ImageFormat::from_header(name)
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
    drop(policy::open_backing_file(image, &path, follow, true)?);
    Ok(path)
}

impl Qcow2 {
    /// Whether anything of a backing file may show at `offset` where this image has nothing.
    pub(super) fn backing_shows(&self, offset: u64) -> bool {
        self.backing.as_ref().is_some_and(|b| offset < b.size())
    }

    /// Whether what shows in `range` where this image has nothing is known to be zero.
    pub(super) fn shows_zeros(&self, range: Range<u64>) -> Result<bool> {
        self.find_only_zeros(range, |disk, at, len| disk.extent(at, len))
    }

    /// As [`shows_zeros`](Self::shows_zeros), for a request that will not wait long for the answer: a raw
    /// disk is asked for a hole that covers all of it, and remembers where there is one.
    pub(super) fn is_empty_below(&self, range: Range<u64>) -> Result<bool> {
        self.find_only_zeros(range, |disk, at, len| {
            let is_hole = match disk.as_image() {
                Some(ImageRef::Qcow2(image)) => return image.extent(at, len),
                Some(ImageRef::Raw(raw)) => raw.is_hole(at, len),
                None => false,
            };
            let kind = if is_hole {
                ExtentKind::Zero
            } else {
                ExtentKind::Data
            };
            Ok(Extent {
                len,
                kind,
                offset: None,
            })
        })
    }

    /// Whether what `find` tells of the disks below, where this image has nothing, is all zeros.
    fn find_only_zeros(
        &self,
        range: Range<u64>,
        find: impl Fn(&dyn Disk, u64, u64) -> Result<Extent>,
    ) -> Result<bool> {
        let Some(backing) = &self.backing else {
            return Ok(true);
        };
        let mut at = range.start;
        let end = range.end.min(backing.size());
        while at < end {
            let find = |disk: &dyn Disk, len| find(disk, at, len);
            let (_, extent) = find_in_chain(&**backing, at, end - at, find)?;
            match extent.kind {
                ExtentKind::Zero | ExtentKind::Unallocated => at += extent.len,
                ExtentKind::Data | ExtentKind::Compressed => return Ok(false),
            }
        }
        Ok(true)
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
