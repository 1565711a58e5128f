//! New images that are filled before anybody sees them.

use std::path::Path;
use std::sync::Arc;

use crate::file::ImageFile;
use crate::new_file::NewFile;
use crate::qcow2::{self, CreateOptions, NewFiles, OpenOptions, Qcow2};
use crate::{CacheMode, Disk, Error, FileHints, Preallocation, Raw, Result};

/// A new image, and its data file if it has one, which have no names yet.
///
/// They take their names, and the place of files that are there already, once
/// [`commit`](NewImage::commit) has made them durable. If this is dropped before, or the process ends,
/// everything is as it was. (A block device is written in place.)
///
/// ```
/// use tandem_block::qcow2::{CreateOptions, OpenOptions};
/// use tandem_block::{Disk, NewImage, VolatileSlice};
///
/// # let dir = tempfile::tempdir().unwrap();
/// # let path = dir.path().join("disk.qcow2");
/// let options = CreateOptions {
///     size: 1 << 20,
///     ..CreateOptions::default()
/// };
/// let mut new = NewImage::qcow2(&path, &options)?;
/// let disk = new.open_qcow2(&OpenOptions::default(), None)?;
/// disk.write_at(&[VolatileSlice::from(&mut [7; 512][..])], 0)?;
/// disk.flush()?;
/// drop(disk);
/// assert!(!path.exists());
/// new.commit()?;
/// assert!(path.exists());
/// # Ok::<(), tandem_block::Error>(())
/// ```
#[derive(Debug)]
pub struct NewImage {
    files: NewFiles,
    /// Whether every part of the disk has its place in a file already.
    is_mapped: bool,
}

impl NewImage {
    /// A raw disk of `size` bytes, rounded up to whole sectors. On a block device, only the first
    /// sector is cleared.
    ///
    /// # Errors
    /// [`Error::Option`] for [`Preallocation::Metadata`], which a raw disk does not have, or if
    /// the block device is too small; [`Error::Locked`] if a file of that name is in use;
    /// [`Error::Io`].
    pub fn raw(path: &Path, size: u64, preallocation: Preallocation) -> Result<Self> {
        Self::raw_with(path, size, preallocation, FileHints::default(), &mut |_| ())
    }

    /// As [`raw`](NewImage::raw), and the file system gets `hints`; `warn` is told what it does not
    /// take.
    ///
    /// # Errors
    /// As [`raw`](NewImage::raw).
    pub fn raw_with(
        path: &Path,
        size: u64,
        preallocation: Preallocation,
        hints: FileHints,
        warn: &mut dyn FnMut(String),
    ) -> Result<Self> {
        let wrong = |reason: &str| Error::Option(reason.to_owned());
        if preallocation == Preallocation::Metadata {
            return Err(wrong("Unsupported preallocation mode: metadata"));
        }
        let size = size
            .checked_next_multiple_of(512)
            .ok_or_else(|| wrong("The image size is too large for file format 'raw'"))?;
        let mut image = NewFile::begin(path)?;
        image.hint(hints, warn);
        image.with_data(size, preallocation)?;
        Ok(Self::alone(image))
    }

    /// One that is all there is of a disk.
    fn alone(image: NewFile) -> Self {
        Self {
            files: NewFiles {
                image,
                data: None,
                kept: None,
            },
            is_mapped: true,
        }
    }

    /// A qcow2 image, and its data file if there is to be one.
    ///
    /// # Errors
    /// As [`qcow2::create`].
    pub fn qcow2(path: &Path, options: &CreateOptions) -> Result<Self> {
        Self::qcow2_with(path, options, &mut |_| ())
    }

    /// As [`qcow2`](NewImage::qcow2); `warn` is told what could not be done and is not needed.
    ///
    /// # Errors
    /// As [`qcow2::create`].
    pub fn qcow2_with(
        path: &Path,
        options: &CreateOptions,
        warn: &mut dyn FnMut(String),
    ) -> Result<Self> {
        let files = qcow2::begin(path, options, warn)?;
        let is_mapped = options.data_file_raw || options.preallocation != Preallocation::Off;
        Ok(Self { files, is_mapped })
    }

    /// Whether there is something in the place of the image that it will replace, or is written to.
    pub(crate) fn replaces(&self) -> bool {
        self.files.image.exists()
    }

    /// A file that is no image, and is written by way of [`file`](NewImage::file). A block device is
    /// refused.
    ///
    /// # Errors
    /// As [`raw`](NewImage::raw).
    pub fn plain(path: &Path) -> Result<Self> {
        let image = NewFile::begin(path)?;
        if !image.is_regular() {
            let source = std::io::ErrorKind::AlreadyExists.into();
            return Err(Error::io(path, "replace", source));
        }
        Ok(Self::alone(image))
    }

    /// The file that has no name yet.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn file(&self) -> Result<std::fs::File> {
        let image = &self.files.image;
        let file = image.file().try_clone();
        file.map_err(|e| Error::io(image.name(), "open", e))
    }

    /// Whether all of the disk reads as zero: a block device shows what it held before where it has a
    /// place in the disk.
    pub fn reads_zero(&self) -> bool {
        !self.is_mapped
            || self
                .files
                .data
                .as_ref()
                .unwrap_or(&self.files.image)
                .is_regular()
    }

    /// Opens the new raw disk for writing. It must be closed before the image is committed.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open_raw(&mut self, cache: CacheMode) -> Result<Raw> {
        let file = Self::image_file(&mut self.files.image, cache)?;
        Raw::from_file(file, false)
    }

    /// Opens the new qcow2 disk for writing, on top of `backing`, which must be given if the image
    /// names a backing file. It must be closed before the image is committed. Of `options`, what
    /// decides which files are used has no meaning here.
    ///
    /// # Errors
    /// As [`Qcow2::open`]; [`Error::DataFile`] if the data file is one that is kept as it is, which
    /// nobody writes to.
    pub fn open_qcow2(
        &mut self,
        options: &OpenOptions,
        backing: Option<Arc<dyn Disk>>,
    ) -> Result<Qcow2> {
        let options = OpenOptions {
            read_only: false,
            ..options.clone()
        };
        let cache = options.files.cache;
        let image = Self::image_file(&mut self.files.image, cache)?;
        let data = self
            .files
            .data
            .as_mut()
            .map(|data| Self::image_file(data, cache));
        Qcow2::with_files(image, data.transpose()?, backing, &options)
    }

    fn image_file(new: &mut NewFile, cache: CacheMode) -> Result<ImageFile> {
        let storage = new.storage()?;
        ImageFile::with_cache(storage, new.name(), false, cache)
    }

    /// Makes the files durable and gives them their names: all of them or, on an error, none.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(self) -> Result<()> {
        let NewFiles { image, data, kept } = self.files;
        NewFile::commit(data.into_iter().chain([image]).collect())?;
        // Nobody has written to it meanwhile.
        drop(kept);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ExtentKind, FileOptions, VolatileSlice};
    use std::fs;

    fn fill(disk: &dyn Disk) {
        disk.write_at(&[VolatileSlice::from(&mut [5; 4096][..])], 8192)
            .unwrap();
        disk.flush().unwrap();
    }

    fn filled(path: &Path, data: &Path, cache: CacheMode) -> NewImage {
        let options = CreateOptions {
            size: 1 << 20,
            data_file: Some(data.to_owned()),
            data_file_raw: true,
            ..CreateOptions::default()
        };
        let open_options = OpenOptions {
            files: FileOptions {
                cache,
                ..FileOptions::default()
            },
            ..OpenOptions::default()
        };
        let mut new = NewImage::qcow2(path, &options).unwrap();
        fill(&new.open_qcow2(&open_options, None).unwrap());
        new
    }

    #[test]
    fn old_files_stay_until_the_new_ones_are_full() {
        let dir = tempfile::tempdir().unwrap();
        let (path, data) = (dir.path().join("image"), dir.path().join("data"));
        fs::write(&path, "old").unwrap();
        fs::write(&data, "old data").unwrap();
        let content = || {
            let names = fs::read_dir(dir.path()).unwrap().count();
            (
                names,
                fs::read(&path).unwrap().len(),
                fs::read(&data).unwrap().len(),
            )
        };
        for cache in [CacheMode::Unsafe, CacheMode::Writethrough, CacheMode::None] {
            let new = filled(&path, &data, cache);
            assert_eq!(content(), (2, 3, 8));
            drop(new);
            assert_eq!(content(), (2, 3, 8));
        }
        filled(&path, &data, CacheMode::Unsafe).commit().unwrap();
        assert_eq!(fs::read(&data).unwrap()[8192..12288], [5; 4096]);
        let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
        assert_eq!(disk.extent(8192, 4096).unwrap().kind, ExtentKind::Data);
        let mut back = [0; 4096];
        disk.read_at(&[VolatileSlice::from(&mut back[..])], 8192)
            .unwrap();
        assert_eq!(back, [5; 4096]);
    }

    #[test]
    fn and_other_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("stream");
        fs::write(&path, "old").unwrap();
        let new = NewImage::plain(&path).unwrap();
        std::io::Write::write_all(&mut new.file().unwrap(), b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        new.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert!(NewImage::plain(Path::new("/dev/null")).is_err());
    }

    #[test]
    fn raw_disks_too() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        let mut new = NewImage::raw(&path, 1 << 20, Preallocation::Off).unwrap();
        assert!(new.reads_zero());
        fill(&new.open_raw(CacheMode::Unsafe).unwrap());
        assert!(!path.exists());
        new.commit().unwrap();
        assert_eq!(fs::read(&path).unwrap()[8192..12288], [5; 4096]);
    }
}
