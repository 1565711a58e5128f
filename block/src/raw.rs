//! Raw disks: the file is the disk.

use std::os::fd::BorrowedFd;
use std::path::Path;

use vm_memory::VolatileSlice;

use crate::cache_mode::CacheMode;
use crate::disk::{check_range, total_len};
use crate::file::{FileOptions, ImageFile};
use crate::hints::FileHints;
use crate::hole::KnownHole;
use crate::live::ImageRef;
use crate::lock::Access;
use crate::preallocation::Preallocation;
use crate::sync::atomic::{AtomicU64, Ordering};
use crate::sync::{Mutex, lock};
use crate::writers::{Writers, Writing};
use crate::{Disk, Error, Extent, ExtentKind, Limits, NewImage, Result, Stamp, Storage};

const NO_METADATA: &str = "Unsupported preallocation mode: metadata";
const NOT_FOR_SHRINKING: &str = "Cannot use preallocation for shrinking files";

/// A disk whose bytes are the bytes of a file or host block device.
#[derive(Debug)]
pub struct Raw {
    file: ImageFile,
    size: AtomicU64,
    resizing: Mutex<()>,
    /// Who shrinks the file waits for those who write behind its new end: they would make it longer
    /// again.
    writers: Writers,
    read_only: bool,
    /// Of a file that is only read.
    hole: KnownHole,
}

impl Raw {
    /// Opens the file or block device at `path`.
    ///
    /// A length that is not a multiple of 512 is rounded up, as in QEMU: what the last sector lacks
    /// reads as zero, and a write to it makes the file longer.
    ///
    /// # Errors
    /// [`Error::Io`] if the file cannot be opened, or is neither a regular file nor a block device;
    /// [`Error::Locked`] if another program uses it.
    pub fn open(path: &Path, read_only: bool) -> Result<Self> {
        Self::open_with(path, read_only, FileOptions::default())
    }

    /// As [`open`](Raw::open), with a say in how the file is used.
    ///
    /// # Errors
    /// As [`open`](Raw::open).
    pub fn open_with(path: &Path, read_only: bool, options: FileOptions) -> Result<Self> {
        let file = ImageFile::open(path, Access::raw(read_only), options)?;
        Self::from_file(file, read_only)
    }

    /// Creates a disk of `size` bytes, rounded up to whole sectors.
    ///
    /// A file that exists is replaced once the new one is complete. On a block device, only the
    /// first sector is cleared.
    ///
    /// # Errors
    /// As [`NewImage::raw`].
    pub fn create(path: &Path, size: u64, preallocation: Preallocation) -> Result<()> {
        Self::create_with(path, size, preallocation, FileHints::default(), &mut |_| ())
    }

    /// As [`create`](Raw::create), and the file system gets `hints`; `warn` is told what it does not
    /// take.
    ///
    /// # Errors
    /// As [`create`](Raw::create).
    pub fn create_with(
        path: &Path,
        size: u64,
        preallocation: Preallocation,
        hints: FileHints,
        warn: &mut dyn FnMut(String),
    ) -> Result<()> {
        NewImage::raw_with(path, size, preallocation, hints, warn)?.commit()
    }

    /// Serves `storage` as a disk; `name` stands for it in error messages.
    ///
    /// # Errors
    /// [`Error::Io`] if its size cannot be told.
    pub fn with_storage(name: &Path, storage: Box<dyn Storage>, read_only: bool) -> Result<Self> {
        Self::from_file(
            ImageFile::new(storage, name, CacheMode::default()),
            read_only,
        )
    }

    /// Where the file was found.
    pub fn path(&self) -> &Path {
        &self.file.path
    }

    pub(crate) fn file(&self) -> &ImageFile {
        &self.file
    }

    /// Whether the `len` bytes at `offset` are known to be a hole of a file that nobody writes. Where the
    /// file cannot be asked they are not.
    pub(crate) fn is_hole(&self, offset: u64, len: u64) -> bool {
        let covers = || self.hole.covers(&self.file, offset..offset + len);
        self.read_only && covers().unwrap_or(false)
    }

    pub(crate) fn from_file(file: ImageFile, read_only: bool) -> Result<Self> {
        Ok(Self {
            size: AtomicU64::new(file.size()?.next_multiple_of(512)),
            resizing: Mutex::default(),
            writers: Writers::default(),
            file,
            read_only,
            hole: KnownHole::default(),
        })
    }
}

impl Disk for Raw {
    fn size(&self) -> u64 {
        self.size.load(Ordering::Acquire)
    }

    fn limits(&self) -> Limits {
        let units = self.file.units();
        Limits {
            write_cache: !self.file.is_write_through(),
            physical_block_size: units.physical_block,
            optimal_io_size: units.optimal_io,
            discard_granularity: units.discard,
            can_unmap: units.can_unmap && !self.read_only,
            ..Limits::new(512, self.read_only)
        }
    }

    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        check_range(offset, total_len(bufs), self.size())?;
        self.file.read_at(bufs, offset)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.check_writable()?;
        let _writing = self.begin_write(offset, total_len(bufs))?;
        self.file.write_at(bufs, offset)?;
        self.settle()
    }

    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        check_range(offset, total_len(bufs), self.size())?;
        self.file.try_read_at(bufs, offset)
    }

    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        self.check_writable()?;
        let _writing = self.begin_write(offset, total_len(bufs))?;
        self.file.try_write_at(bufs, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.check_writable()?;
        let _writing = self.begin_write(offset, len)?;
        self.file.write_zeroes(offset, len, unmap)?;
        self.settle()
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.check_writable()?;
        let _writing = self.begin_write(offset, len)?;
        self.file.discard(offset, len)?;
        self.settle()
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        check_range(offset, len, self.size())?;
        let data = match len {
            0 => offset,
            _ => self.file.next_data(offset)?,
        };
        let (kind, end) = if data > offset {
            (ExtentKind::Zero, data)
        } else if len == 0 {
            (ExtentKind::Data, offset)
        } else {
            // Another program may have cut the file meanwhile.
            let end = self.file.next_hole(offset)?.max(offset + 1);
            (ExtentKind::Data, end)
        };
        Ok(Extent {
            len: len.min(end - offset),
            kind,
            offset: Some(offset),
        })
    }

    fn as_image(&self) -> Option<ImageRef<'_>> {
        Some(ImageRef::Raw(self))
    }

    fn stamp(&self) -> Result<Option<Stamp>> {
        Ok(self.file.stamp()?.map(|file| Stamp {
            size: self.size(),
            files: vec![file],
        }))
    }

    fn host_file(&self) -> Option<BorrowedFd<'_>> {
        self.file.storage.fd()
    }

    fn copy_from(&self, source: BorrowedFd<'_>, from: u64, offset: u64, len: u64) -> Result<bool> {
        self.check_writable()?;
        let _writing = self.begin_write(offset, len)?;
        let is_copied = self.file.copy_from(source, from, offset, len)?;
        self.settle()?;
        Ok(is_copied)
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.resize_preallocated(size, Preallocation::Off)
    }

    fn resize_preallocated(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        self.check_writable()?;
        let _resizing = lock(&self.resizing);
        let old = self.size();
        // As on opening, the last sector may lie in the file in part.
        let whole = size.checked_next_multiple_of(512);
        let Some(whole) = whole.filter(|whole| i64::try_from(*whole).is_ok()) else {
            return Err(Error::Option("The new size is too large".to_owned()));
        };
        if preallocation == Preallocation::Metadata {
            return Err(Error::Option(NO_METADATA.to_owned()));
        }
        if size < old && preallocation != Preallocation::Off {
            return Err(Error::Option(NOT_FOR_SHRINKING.to_owned()));
        }
        self.file.check_preallocation(preallocation)?;
        // A device has the length that it has; the disk follows, once that has changed.
        if size != old && self.file.capacity()?.is_some_and(|length| size != length) {
            return Err(Error::Option("Cannot resize device files".to_owned()));
        }
        // From here on, no request begins behind the end.
        self.size.store(whole.min(old), Ordering::Release);
        let _alone = (whole < old).then(|| self.writers.exclude(whole..u64::MAX));
        let resized = self.file.set_len(size).and_then(|()| {
            if preallocation == Preallocation::Off {
                return Ok(());
            }
            let filled = self.file.fill(old, size.saturating_sub(old), preallocation);
            if filled.is_err() {
                drop(self.file.set_len(old));
            }
            filled
        });
        let size = if resized.is_ok() { whole } else { old };
        self.size.store(size, Ordering::Release);
        resized?;
        self.file.sync()
    }

    fn follow_size(&self) -> Result<bool> {
        let _resizing = lock(&self.resizing);
        // What a file cannot have is left alone.
        let size = self.file.size()?.checked_next_multiple_of(512);
        if let Some(size) = size {
            self.size.store(size, Ordering::Release);
        }
        Ok(true)
    }

    fn flush(&self) -> Result<()> {
        if self.read_only {
            return Ok(());
        }
        self.file.sync()
    }
}

impl Raw {
    /// Begins a write of the `len` bytes at `offset`.
    fn begin_write(&self, offset: u64, len: u64) -> Result<Writing<'_>> {
        let writing = self.writers.share(offset..offset.saturating_add(len));
        // Not earlier: who shrinks the file either waits for this write or has stored the new size.
        check_range(offset, len, self.size())?;
        Ok(writing)
    }

    /// Ends a change: without a write cache, it is durable.
    fn settle(&self) -> Result<()> {
        if self.file.is_write_through() {
            return self.file.sync();
        }
        Ok(())
    }

    fn check_writable(&self) -> Result<()> {
        if self.read_only {
            Err(Error::ReadOnly)
        } else {
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FileStorage;
    use std::io;

    #[test]
    fn serves_whole_sectors_within_range() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        std::fs::write(&path, vec![5; 1300]).unwrap();
        let disk = Raw::open(&path, false).unwrap();
        assert_eq!(disk.size(), 1536);
        let mut buf = [1; 512];
        let bufs = [VolatileSlice::from(&mut buf[..])];
        disk.read_at(&bufs, 1024).unwrap();
        assert_eq!((buf[275], buf[276]), (5, 0));
        buf.fill(1);
        let bufs = [VolatileSlice::from(&mut buf[..])];
        disk.write_at(&bufs, 512).unwrap();
        assert!(matches!(
            disk.write_at(&bufs, 1025),
            Err(Error::OutOfRange { .. })
        ));
        assert!(matches!(
            disk.read_at(&bufs, u64::MAX),
            Err(Error::OutOfRange { .. })
        ));
        disk.write_zeroes(0, 512, false).unwrap();
        disk.flush().unwrap();
        let mut expected = vec![5; 1300];
        expected[..512].fill(0);
        expected[512..1024].fill(1);
        assert!(std::fs::read(&path).unwrap() == expected);
    }

    /// A file that cannot be synced.
    #[derive(Debug)]
    struct Unsynced(FileStorage);

    impl Storage for Unsynced {
        fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
            self.0.read_at(bufs, offset)
        }

        fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
            self.0.write_at(bufs, offset)
        }

        fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
            self.0.read_bytes_at(buf, offset)
        }

        fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
            self.0.write_bytes_at(buf, offset)
        }

        fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
            self.0.write_zeroes(offset, len, unmap)
        }

        fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
            self.0.discard(offset, len)
        }

        fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
            self.0.next_data(offset)
        }

        fn sync(&self) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }

        fn sync_stamp(&self) -> io::Result<()> {
            self.sync()
        }

        fn size(&self) -> io::Result<u64> {
            self.0.size()
        }
    }

    #[test]
    fn syncs_as_the_cache_mode_says() {
        type Change = fn(&Raw) -> Result<()>;
        let changes: [Change; 3] = [
            |raw| raw.write_at(&[VolatileSlice::from(&mut [1; 512][..])], 512),
            |raw| raw.write_zeroes(512, 512, false),
            |raw| raw.discard(0, 512),
        ];
        for (cache, change_syncs, flush_syncs) in [
            (CacheMode::Writeback, false, true),
            (CacheMode::None, false, true),
            (CacheMode::Writethrough, true, true),
            (CacheMode::Directsync, true, true),
            (CacheMode::Unsafe, false, false),
        ] {
            let raw = || {
                let file = tempfile::tempfile().unwrap();
                file.set_len(4096).unwrap();
                let storage = Box::new(Unsynced(FileStorage::new(file).unwrap()));
                let file = ImageFile::new(storage, Path::new("raw"), cache);
                Raw::from_file(file, false).unwrap()
            };
            for change in changes {
                assert_eq!(change(&raw()).is_err(), change_syncs, "{cache:?}");
            }
            assert_eq!(raw().flush().is_err(), flush_syncs, "{cache:?}");
            assert_eq!(raw().limits().write_cache, !change_syncs, "{cache:?}");
            let raw = raw();
            assert_eq!(raw.file().sync_stamp().is_err(), flush_syncs, "{cache:?}");
            let is_final = raw.file().check_synced().is_err();
            assert_eq!(is_final, flush_syncs, "{cache:?}");
        }
    }

    #[test]
    fn follows_the_size_of_its_file() {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(4096).unwrap();
        let disk = Raw::open(file.path(), true).unwrap();
        file.as_file().set_len(8000).unwrap();
        assert_eq!(disk.size(), 4096);
        assert!(disk.follow_size().unwrap());
        assert_eq!(disk.size(), 8192);
    }

    #[test]
    fn read_only_refuses_writes() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("raw");
        std::fs::write(&path, vec![5; 1024]).unwrap();
        let disk = Raw::open(&path, true).unwrap();
        let mut buf = [1; 512];
        assert!(matches!(
            disk.write_at(&[VolatileSlice::from(&mut buf[..])], 0),
            Err(Error::ReadOnly)
        ));
        assert!(matches!(
            disk.write_zeroes(0, 512, true),
            Err(Error::ReadOnly)
        ));
    }
}
