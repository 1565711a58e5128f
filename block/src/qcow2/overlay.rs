//! Overlays that are made to be used at once, on a base that many of them share.
//!
//! An overlay is a small image without any data: a header, two tables and a hole. It is not synced when
//! it is made. So one that is kept is durable, and its name with it, from its first flush on; a failure
//! of power before that can leave an image that is none, or nothing. The stamp of the base, which it
//! keeps, is made durable before the first of them.

use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::{fs::File, io};

use super::backing::{self, Found, path_of};
use super::create::Layout;
use super::policy::is_same_file;
use super::{CreateOptions, OpenOptions, Qcow2};
use crate::file::ImageFile;
use crate::lock::{Access, Locking};
use crate::new_file::{NewFile, create_temporary, directory_of, make_data};
use crate::{Disk, Error, FileOptions, FileStorage, ImageFormat, Raw, Result, Stamp};

/// A disk that overlays stand on: open read-only, shared by all of them, and locked against writers
/// as long as this or one of them is there.
///
/// ```
/// use tandem_block::ImageFormat;
/// use tandem_block::qcow2::{Base, CreateOptions, OpenOptions, OverlayOptions, create};
/// use tandem_block::{Disk, VolatileSlice};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("base.qcow2");
/// let options = CreateOptions {
///     size: 1 << 30,
///     ..CreateOptions::default()
/// };
/// create(&path, &options)?;
/// let base = Base::open(&path, ImageFormat::Qcow2, &OpenOptions::default())?;
/// // As many as there is room for, in any threads.
/// let (one, other) = (
///     base.overlay(&OverlayOptions::default())?,
///     base.overlay(&OverlayOptions::default())?,
/// );
/// one.write_at(&[VolatileSlice::from(&mut [7; 512][..])], 0)?;
/// let mut sector = [1; 512];
/// other.read_at(&[VolatileSlice::from(&mut sector[..])], 0)?;
/// assert_eq!(sector, [0; 512]);
/// # Ok::<(), tandem_block::Error>(())
/// ```
#[derive(Clone)]
pub struct Base {
    disk: Arc<dyn Disk>,
    /// Absolute, links resolved.
    path: PathBuf,
    format: ImageFormat,
    stamp: Option<Stamp>,
    /// Whether the stamp is durable.
    is_synced: Arc<AtomicBool>,
}

impl fmt::Debug for Base {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Base")
            .field("path", &self.path)
            .field("format", &self.format)
            .finish_non_exhaustive()
    }
}

/// Where a new overlay is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum OverlayPlace {
    /// In files without names, which are gone when the disk is closed, or the process ends.
    Temporary {
        /// The directory whose file system holds them; without it `TMPDIR`, or else `/var/tmp`.
        directory: Option<PathBuf>,
        /// Whether the data is in a file of its own.
        data_file: bool,
    },
    /// In files that stay. There must be none of their names before.
    Kept {
        /// The image.
        path: PathBuf,
        /// The file for the data, if it is not to be in the image.
        data_file: Option<PathBuf>,
    },
}

/// What a new overlay is to be like.
#[derive(Clone, Debug)]
pub struct OverlayOptions {
    /// Where it is.
    pub place: OverlayPlace,
    /// Size of its disk in bytes, rounded up to whole sectors, if that is to be more than the base has.
    pub size: Option<u64>,
    /// Bytes in a cluster: a power of two from 512 to 2 MiB.
    pub cluster_size: u64,
    /// Whether clusters are divided into subclusters, so that a small write takes less from the base.
    pub extended_l2: bool,
    /// How it is opened. What tells which files are used has no meaning here.
    pub open: OpenOptions,
}

impl Default for OverlayOptions {
    fn default() -> Self {
        let create = CreateOptions::default();
        Self {
            place: OverlayPlace::Temporary {
                directory: None,
                data_file: false,
            },
            size: None,
            cluster_size: create.cluster_size,
            extended_l2: create.extended_l2,
            open: OpenOptions::default(),
        }
    }
}

impl Base {
    /// Opens the image or raw disk at `path`, with what is below it.
    ///
    /// # Errors
    /// As [`Qcow2::open`]; [`Error::Locked`] if another program writes to it.
    pub fn open(path: &Path, format: ImageFormat, options: &OpenOptions) -> Result<Self> {
        let options = OpenOptions {
            read_only: true,
            ..options.clone()
        };
        let disk: Arc<dyn Disk> = match format {
            ImageFormat::Raw => {
                let file = ImageFile::open(path, Access::Read, options.files)?;
                Arc::new(Raw::from_file(file, true)?)
            }
            ImageFormat::Qcow2 => Arc::new(Qcow2::open(path, &options)?),
        };
        Ok(Self {
            // Before anything is read through it, and for all overlays.
            stamp: Stamp::settled(&*disk)?,
            path: absolute(path)?,
            disk,
            format,
            is_synced: Arc::default(),
        })
    }

    /// The disk.
    pub fn disk(&self) -> &Arc<dyn Disk> {
        &self.disk
    }

    /// Makes an overlay, which keeps the stamp of the base, and opens it for writing.
    ///
    /// # Errors
    /// [`Error::Option`] for a file that is there already, and for what an image cannot be;
    /// [`Error::BaseChanged`] if the base has been written since it was opened; [`Error::Io`]. There is
    /// no file then that was not there before.
    pub fn overlay(&self, options: &OverlayOptions) -> Result<Qcow2> {
        match &options.place {
            OverlayPlace::Temporary {
                directory,
                data_file,
            } => {
                let directory = match directory {
                    Some(directory) => directory.clone(),
                    None => default_directory(),
                };
                self.temporary(&directory, *data_file, options)
            }
            OverlayPlace::Kept { path, data_file } => {
                self.kept(path, data_file.as_deref(), options)
            }
        }
    }

    /// Opens the overlay at `path`, which is one of this very base, for writing.
    ///
    /// # Errors
    /// [`Error::BackingFile`] if it is none; as [`Qcow2::open`].
    pub fn open_overlay(&self, path: &Path, options: &OpenOptions) -> Result<Qcow2> {
        let image = ImageFile::open(path, Access::Write, options.files)?;
        let found = Found::new(image, false)?;
        self.check_is_base_of(&found)?;
        let options = OpenOptions {
            read_only: false,
            ..options.clone()
        };
        Qcow2::from_found(found, &options, Some(self.disk.clone()))
    }

    fn check_is_base_of(&self, overlay: &Found) -> Result<()> {
        let file = overlay.image.path.clone();
        let base = self.path.display();
        let refused = |reason| Err(Error::BackingFile { file, reason });
        let Some(name) = &overlay.header.backing_file else {
            return refused(format!("it has none, and is no overlay of '{base}'"));
        };
        let path = path_of(&overlay.image.path, name).map_err(Error::Option)?;
        if !is_same_file(&path, &self.path) {
            let path = path.display();
            return refused(format!("it is '{path}' and not '{base}'"));
        }
        let format = backing::format_of(&overlay.header, &OpenOptions::default());
        if format != Ok(self.format) {
            let format = self.format.name();
            return refused(format!("the image does not take '{base}' for {format}"));
        }
        Ok(())
    }

    fn temporary(
        &self,
        directory: &Path,
        data_file: bool,
        options: &OverlayOptions,
    ) -> Result<Qcow2> {
        let create =
            self.create_options(options, self.path.clone(), data_file.then(PathBuf::new))?;
        let layout = Layout::new(&create)?;
        // For messages.
        let name = directory.join("(temporary overlay)");
        let made = |e| Error::io(&name, "create", e);
        let new = || create_temporary(directory).map_err(made);
        let file = new()?;
        fill(&file, &layout, &layout.header(&create).encode(&name)?).map_err(made)?;
        let data = match data_file {
            true => Some(new()?),
            false => None,
        };
        if let Some(data) = &data {
            make_data(data, layout.data_file_len()).map_err(made)?;
        }
        let open = |file| {
            let storage = FileStorage::new(file).map_err(made)?;
            ImageFile::with_cache(storage, &name, false, options.open.files.cache)
        };
        self.open_new(open(file)?, data.map(open).transpose()?, options)
    }

    fn kept(
        &self,
        path: &Path,
        data_file: Option<&Path>,
        options: &OverlayOptions,
    ) -> Result<Qcow2> {
        let directory = absolute(directory_of(path))?;
        let backing_file = name_from(path, &self.path)?;
        let data_name = match data_file {
            Some(data_file) => {
                let file_name = data_file.file_name().unwrap_or_default();
                let full = absolute(directory_of(data_file))?.join(file_name);
                Some(relative_to(&directory, full))
            }
            None => None,
        };
        let create = self.create_options(options, backing_file, data_name)?;
        let layout = Layout::new(&create)?;
        let header = layout.header(&create).encode(path)?;
        let files = options.open.files;
        let image = begin(path)?;
        fill(image.file(), &layout, &header).map_err(|e| Error::io(path, "write", e))?;
        let data = match data_file {
            Some(name) => {
                let data = begin(name)?;
                make_data(data.file(), layout.data_file_len())
                    .map_err(|e| Error::io(name, "resize", e))?;
                Some(data)
            }
            None => None,
        };
        let opened = open_new_file(&image, files)?;
        let opened_data = match &data {
            Some(data) => Some(open_new_file(data, files)?),
            None => None,
        };
        let disk = self.open_new(opened, opened_data, options)?;
        self.sync_stamp()?;
        NewFile::hand_over(data.into_iter().chain([image]).collect())?;
        Ok(disk)
    }

    /// Makes the stamp durable, once: an overlay that outlives a failure of power is refused otherwise.
    fn sync_stamp(&self) -> Result<()> {
        if !self.is_synced.load(Ordering::Relaxed) {
            Stamp::sync(&*self.disk)?;
            self.is_synced.store(true, Ordering::Relaxed);
        }
        Ok(())
    }

    fn create_options(
        &self,
        options: &OverlayOptions,
        backing_file: PathBuf,
        data_file: Option<PathBuf>,
    ) -> Result<CreateOptions> {
        let (size, base) = (self.disk.size(), self.path.display());
        if options.size.is_some_and(|wanted| wanted < size) {
            let reason = format!("An overlay cannot be smaller than '{base}', of {size} bytes");
            return Err(Error::Option(reason));
        }
        Ok(CreateOptions {
            size: options.size.unwrap_or(size),
            cluster_size: options.cluster_size,
            extended_l2: options.extended_l2,
            backing_file: Some(backing_file),
            backing_format: Some(self.format),
            base_stamp: self.stamp.clone(),
            data_file,
            ..CreateOptions::default()
        })
    }

    fn open_new(
        &self,
        image: ImageFile,
        data: Option<ImageFile>,
        options: &OverlayOptions,
    ) -> Result<Qcow2> {
        let open = OpenOptions {
            read_only: false,
            snapshot: None,
            ..options.open.clone()
        };
        Qcow2::with_files(image, data, Some(self.disk.clone()), &open)
    }
}

/// Starts to make a file that is not there yet.
fn begin(path: &Path) -> Result<NewFile> {
    let new = NewFile::begin(path)?;
    if new.exists() {
        let path = path.display();
        return Err(Error::Option(format!("'{path}' exists already")));
    }
    Ok(new)
}

/// Writes everything that an image has before there is data.
fn fill(file: &File, layout: &Layout, header: &[u8]) -> io::Result<()> {
    file.set_len(layout.file_len)?;
    layout.write_tables(file)?;
    file.write_all_at(header, 0)
}

/// Opens a file in the making, locked as one of a disk that is written.
fn open_new_file(new: &NewFile, options: FileOptions) -> Result<ImageFile> {
    let opened = |e| Error::io(new.name(), "open", e);
    let file = new.file().try_clone().map_err(opened)?;
    let mut storage = FileStorage::new(file).map_err(opened)?;
    if options.locking != Locking::Off {
        storage.lock(new.name(), Access::Write, Locking::On)?;
    }
    let file = ImageFile::with_cache(storage, new.name(), false, options.cache)?;
    let directory = File::open(directory_of(new.name())).map_err(opened)?;
    Ok(file.named_in(directory))
}

fn default_directory() -> PathBuf {
    std::env::var_os("TMPDIR").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

fn absolute(path: &Path) -> Result<PathBuf> {
    path.canonicalize().map_err(|e| Error::io(path, "find", e))
}

/// The name of the file `backing` in an image that will be at `path`.
pub(crate) fn name_from(path: &Path, backing: &Path) -> Result<PathBuf> {
    let directory = absolute(directory_of(path))?;
    Ok(literal(&relative_to(&directory, absolute(backing)?)))
}

/// How an image in `directory` names the file at `path`, so that both can be moved together.
fn relative_to(directory: &Path, path: PathBuf) -> PathBuf {
    match path.strip_prefix(directory) {
        Ok(relative) => relative.to_owned(),
        Err(_) => path,
    }
}

/// The name of a backing file that cannot be taken for a protocol's.
fn literal(name: &Path) -> PathBuf {
    let has_colon = name.as_os_str().as_bytes().contains(&b':');
    if has_colon && name.is_relative() {
        return Path::new(".").join(name);
    }
    name.to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whatever the first flush has to write besides.
    #[test]
    fn names_are_durable_from_the_first_flush_on() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("base");
        Raw::create(&path, 1 << 20, crate::Preallocation::Off).unwrap();
        let base = Base::open(&path, ImageFormat::Raw, &OpenOptions::default()).unwrap();
        for data_file in [None, Some(dir.path().join("data"))] {
            let path = dir.path().join(format!("over{}", data_file.is_some()));
            let options = OverlayOptions {
                place: OverlayPlace::Kept { path, data_file },
                ..OverlayOptions::default()
            };
            let disk = base.overlay(&options).unwrap();
            let is_new = || (disk.image.has_new_name(), disk.data().has_new_name());
            assert_eq!(is_new(), (true, true));
            disk.flush().unwrap();
            assert_eq!(is_new(), (false, false));
        }
    }

    #[test]
    fn how_an_image_names_files() {
        let name = |path: &str| relative_to(Path::new("/vm/one"), path.into());
        assert_eq!(name("/vm/one/base"), Path::new("base"));
        assert_eq!(name("/vm/one/sub/base"), Path::new("sub/base"));
        assert_eq!(name("/vm/ones"), Path::new("/vm/ones"));
        assert_eq!(literal(Path::new("a:b")), Path::new("./a:b"));
        assert_eq!(literal(Path::new("/a:b")), Path::new("/a:b"));
        assert_eq!(literal(Path::new("base")), Path::new("base"));
    }
}
