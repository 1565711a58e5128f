//! A file below a disk: storage with a name for error messages, and a memory for failed syncs.

use crate::sync::{Mutex, lock};
use std::fs::File;
use std::io;
use std::ops::Deref;
use std::os::fd::BorrowedFd;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use vm_memory::VolatileSlice;

use crate::cache_mode::CacheMode;
use crate::lock::{self, Access, Locking};
use crate::new_file::sync_directory;
use crate::preallocation::Preallocation;
use crate::storage::Direct;
use crate::{Error, FileStamp, FileStorage, Result, Storage, Units};

/// How the files of a disk are used: the image, its data file, and those below it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileOptions {
    /// Whether they are locked.
    pub locking: Locking,
    /// Which caches there are between the guest and the medium.
    pub cache: CacheMode,
}

impl FileOptions {
    /// Opens the file or block device at `path` so, locked as an image or its data file is: for whoever
    /// puts something between it and the disk.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, [`Error::Locked`] if another program uses it.
    pub fn open(self, path: &Path, read_only: bool) -> Result<Box<dyn Storage>> {
        let file = ImageFile::open(path, Access::new(read_only), self)?;
        Ok(match file.storage {
            Store::File(file) => Box::new(file),
            Store::Other(storage) => storage,
        })
    }
}

/// Zeros are written in pieces of this many bytes.
const ZEROS: usize = 1 << 20;

/// Attempts to open a file while others replace it.
const ATTEMPTS: usize = 16;

/// What a file below a disk is kept in.
#[derive(Debug)]
pub(crate) enum Store {
    /// As in most cases: requests find their way without a call through a table of functions.
    File(FileStorage),
    Other(Box<dyn Storage>),
}

impl Deref for Store {
    type Target = dyn Storage;

    fn deref(&self) -> &Self::Target {
        match self {
            Self::File(file) => file,
            Self::Other(storage) => &**storage,
        }
    }
}

/// The image file, the external data file, or a raw disk.
#[derive(Debug)]
pub(crate) struct ImageFile {
    pub storage: Store,
    pub path: PathBuf,
    /// A sync failed: what had been written before it may be lost, and no later sync can tell.
    sync_failed: Mutex<bool>,
    /// The directory of a name that is new, and not durable yet.
    named_in: Mutex<Option<File>>,
    cache: CacheMode,
    units: Units,
}

impl ImageFile {
    /// Storage that is called `path`. Of `cache`, only what is done above the storage counts.
    pub fn new(storage: Box<dyn Storage>, path: &Path, cache: CacheMode) -> Self {
        Self::with_store(Store::Other(storage), path, cache)
    }

    fn with_store(storage: Store, path: &Path, cache: CacheMode) -> Self {
        Self {
            units: storage.units(),
            storage,
            path: path.to_owned(),
            sync_failed: Mutex::new(false),
            named_in: Mutex::default(),
            cache,
        }
    }

    /// Opens and locks the file or block device at `path`.
    pub fn open(path: &Path, access: Access, options: FileOptions) -> Result<Self> {
        let open = || {
            FileStorage::open_file(path, access.is_read_only())
                .map_err(|e| Error::io(path, "open", e))
        };
        Self::open_with(path, open, access, options)
    }

    /// As [`open`](Self::open), with a function that opens what is at `path`. It may be called more
    /// than once.
    pub fn open_with(
        path: &Path,
        open: impl Fn() -> Result<File>,
        access: Access,
        options: FileOptions,
    ) -> Result<Self> {
        let failed = |e| Error::io(path, "open", e);
        for _ in 0..ATTEMPTS {
            let mut storage = FileStorage::new(open()?).map_err(failed)?;
            storage.lock(path, access, options.locking)?;
            // Between the two, another program may have put a new file in this one's place; from
            // now on it would meet the lock.
            if is_at(storage.file(), path) {
                return Self::with_cache(storage, path, access.is_read_only(), options.cache);
            }
        }
        Err(failed(io::ErrorKind::ResourceBusy.into()))
    }

    /// The file `storage`, called `path`, by way of the caches that `cache` tells.
    pub fn with_cache(
        storage: FileStorage,
        path: &Path,
        read_only: bool,
        cache: CacheMode,
    ) -> Result<Self> {
        let storage = if cache.is_direct() {
            let direct = Direct::new(storage, read_only);
            Store::Other(Box::new(direct.map_err(|e| Error::io(path, "open", e))?))
        } else {
            Store::File(storage)
        };
        Ok(Self::with_store(storage, path, cache))
    }

    /// Gives up the locks, so that the file can be opened in another way.
    pub fn unlock(&self) {
        if let Some(file) = self.storage.locked() {
            lock::release(file);
        }
    }

    /// Takes the locks again that [`unlock`](Self::unlock) has given up.
    pub fn lock_again(&self, access: Access) -> Result<()> {
        match self.storage.locked() {
            Some(file) => lock::acquire(file, &self.path, access, Locking::On),
            None => Ok(()),
        }
    }

    /// Keeps writers off, and readers no more: the file will not be written from here.
    pub fn end_writing(&self) -> Result<()> {
        match self.storage.locked() {
            Some(file) => lock::downgrade(file, &self.path),
            None => Ok(()),
        }
    }

    /// Device and inode; of what is in its place now, if the storage does not tell.
    pub fn id(&self) -> Option<(u64, u64)> {
        let stat = match self.storage.locked().or_else(|| self.storage.fd()) {
            Some(file) => rustix::fs::fstat(file),
            None => rustix::fs::stat(&self.path),
        };
        stat.ok().map(|stat| (stat.st_dev, stat.st_ino))
    }

    #[inline(always)]
    pub fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        match &self.storage {
            Store::File(file) => file.read_at(bufs, offset),
            Store::Other(storage) => storage.read_at(bufs, offset),
        }
        .map_err(|e| Error::io_at(&self.path, "read", offset, e))
    }

    #[inline(always)]
    pub fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        match &self.storage {
            Store::File(file) => file.write_at(bufs, offset),
            Store::Other(storage) => storage.write_at(bufs, offset),
        }
        .map_err(|e| Error::io_at(&self.path, "write to", offset, e))
    }

    /// As [`Storage::try_read_at`].
    #[inline(always)]
    pub fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        match &self.storage {
            Store::File(file) => file.try_read_at(bufs, offset),
            Store::Other(storage) => storage.try_read_at(bufs, offset),
        }
        .map_err(|e| Error::io_at(&self.path, "read", offset, e))
    }

    /// As [`Storage::try_write_at`]; if a write is to be durable when it completes, it waits.
    #[inline(always)]
    pub fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        if self.is_write_through() {
            return Ok(false);
        }
        match &self.storage {
            Store::File(file) => file.try_write_at(bufs, offset),
            Store::Other(storage) => storage.try_write_at(bufs, offset),
        }
        .map_err(|e| Error::io_at(&self.path, "write to", offset, e))
    }

    pub fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        self.storage
            .read_bytes_at(buf, offset)
            .map_err(|e| Error::io_at(&self.path, "read", offset, e))
    }

    pub fn write_bytes_at(&self, buf: &[u8], offset: u64) -> Result<()> {
        self.storage
            .write_bytes_at(buf, offset)
            .map_err(|e| Error::io_at(&self.path, "write to", offset, e))
    }

    pub fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.storage
            .write_zeroes(offset, len, unmap)
            .map_err(|e| Error::io_at(&self.path, "zero", offset, e))
    }

    pub fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.storage
            .discard(offset, len)
            .map_err(|e| Error::io_at(&self.path, "release space of", offset, e))
    }

    /// As [`Storage::copy_from`].
    pub fn copy_from(
        &self,
        source: BorrowedFd<'_>,
        from: u64,
        offset: u64,
        len: u64,
    ) -> Result<bool> {
        self.storage
            .copy_from(source, from, offset, len)
            .map_err(|e| Error::io_at(&self.path, "write to", offset, e))
    }

    /// In which units it works best.
    pub fn units(&self) -> Units {
        self.units
    }

    /// Whether a write is to be durable when it completes.
    pub fn is_write_through(&self) -> bool {
        self.cache.is_write_through()
    }

    /// Makes completed writes durable, unless the mode of the cache gives up that.
    ///
    /// After a failure the system may have dropped what it could not write, and reports that only
    /// once. So no later call succeeds either: a caller would take it for a promise that nobody
    /// can keep.
    #[cfg_attr(mutate, track_caller)]
    pub fn sync(&self) -> Result<()> {
        #[cfg(mutate)]
        if crate::mutate::leaves_out(std::panic::Location::caller()) {
            return Ok(());
        }
        self.sync_by(|| self.storage.sync().and_then(|()| self.sync_name()))
    }

    /// As [`sync`](Self::sync), and with it what [`stamp`](Self::stamp) tells.
    #[cfg_attr(mutate, track_caller)]
    pub fn sync_stamp(&self) -> Result<()> {
        #[cfg(mutate)]
        if crate::mutate::leaves_out(std::panic::Location::caller()) {
            return Ok(());
        }
        self.sync_by(|| self.storage.sync_stamp())
    }

    fn sync_by(&self, sync: impl FnOnce() -> io::Result<()>) -> Result<()> {
        if self.cache == CacheMode::Unsafe {
            return Ok(());
        }
        // Held meanwhile: of two syncs of one loss, the system fails only one.
        let mut sync_failed = lock(&self.sync_failed);
        self.check_not(*sync_failed)?;
        sync().map_err(|e| {
            *sync_failed = true;
            #[cfg(mutate)]
            if crate::mutate::is(crate::mutate::SYNC_FORGIVEN) {
                *sync_failed = false;
            }
            Error::io(&self.path, "sync", e)
        })
    }

    fn sync_name(&self) -> io::Result<()> {
        let mut named_in = lock(&self.named_in);
        if let Some(directory) = &*named_in {
            sync_directory(directory)?;
        }
        *named_in = None;
        Ok(())
    }

    /// The same file, whose name in `directory` is new: it becomes durable when the file is synced.
    pub fn named_in(self, directory: File) -> Self {
        *lock(&self.named_in) = Some(directory);
        self
    }

    /// Whether the name is not durable yet.
    pub fn has_new_name(&self) -> bool {
        lock(&self.named_in).is_some()
    }

    /// Fails if a sync has failed.
    pub fn check_synced(&self) -> Result<()> {
        self.check_not(*lock(&self.sync_failed))
    }

    fn check_not(&self, sync_failed: bool) -> Result<()> {
        if sync_failed {
            let file = self.path.clone();
            return Err(Error::SyncFailed { file });
        }
        Ok(())
    }

    /// Offset of the first data at or after `offset`; the largest offset if there is none.
    pub fn next_data(&self, offset: u64) -> Result<u64> {
        let next = self.storage.next_data(offset);
        let next = next.map_err(|e| Error::io_at(&self.path, "look for data in", offset, e))?;
        Ok(next.unwrap_or(u64::MAX))
    }

    /// Offset of the first hole at or after `offset`, which is inside the file.
    pub fn next_hole(&self, offset: u64) -> Result<u64> {
        self.storage
            .next_hole(offset)
            .map_err(|e| Error::io_at(&self.path, "look for holes in", offset, e))
    }

    /// Bytes that it takes on the host, if that can be told.
    pub fn allocated(&self) -> Result<Option<u64>> {
        let Some(file) = self.storage.fd() else {
            return Ok(None);
        };
        let stat = rustix::fs::fstat(file);
        let stat = stat.map_err(|e| Error::io(&self.path, "stat", e.into()))?;
        Ok(Some(stat.st_blocks.unsigned_abs() * 512))
    }

    /// As [`Storage::stamp`], with its path.
    pub fn stamp(&self) -> Result<Option<FileStamp>> {
        let stamp = self.storage.stamp();
        let stamp = stamp.map_err(|e| Error::io(&self.path, "stat", e))?;
        Ok(stamp.map(|stamp| FileStamp {
            path: self.path.clone(),
            ..stamp
        }))
    }

    /// As [`Storage::renew_stamp`], durably.
    #[cfg_attr(mutate, track_caller)]
    pub fn renew_stamp(&self) -> Result<()> {
        #[cfg(mutate)]
        if crate::mutate::leaves_out(std::panic::Location::caller()) {
            return Ok(());
        }
        let renewed = self.storage.renew_stamp();
        renewed.map_err(|e| Error::io(&self.path, "change the time of", e))?;
        self.sync_stamp()
    }

    pub fn size(&self) -> Result<u64> {
        self.storage
            .size()
            .map_err(|e| Error::io(&self.path, "get the size of", e))
    }

    /// Changes the length. A block device keeps its own, which must suffice.
    pub fn set_len(&self, len: u64) -> Result<()> {
        self.storage
            .set_len(len)
            .map_err(|e| Error::io(&self.path, "resize", e))
    }

    /// Gives space to a range of zeros within the file that nobody else uses: as holes, reserved, or
    /// written. What it holds now is lost.
    pub fn fill(&self, offset: u64, len: u64, preallocation: Preallocation) -> Result<()> {
        if preallocation != Preallocation::Full {
            let unmap = preallocation != Preallocation::Falloc;
            return self.write_zeroes(offset, len, unmap);
        }
        let zeros = vec![0; ZEROS.min(usize::try_from(len).unwrap_or(ZEROS))];
        let mut done = 0;
        while done < len {
            let n = (len - done).min(ZEROS as u64);
            self.write_bytes_at(&zeros[..n as usize], offset + done)?;
            done += n;
        }
        Ok(())
    }

    /// Refuses to reserve space in a block device, which has its own.
    pub fn check_preallocation(&self, preallocation: Preallocation) -> Result<()> {
        let reserves = matches!(preallocation, Preallocation::Falloc | Preallocation::Full);
        if reserves && self.capacity()?.is_some() {
            let mode = preallocation.name();
            return Err(Error::Option(format!(
                "Preallocation mode '{mode}' unsupported for this non-regular file"
            )));
        }
        Ok(())
    }

    /// The length that the file cannot exceed, in bytes, if it is fixed.
    pub fn capacity(&self) -> Result<Option<u64>> {
        self.storage
            .capacity()
            .map_err(|e| Error::io(&self.path, "get the size of", e))
    }

    /// The error of an allocation for which there is no room.
    pub fn full(&self) -> Error {
        let source = std::io::Error::from_raw_os_error(libc::ENOSPC);
        Error::io(&self.path, "allocate a cluster in", source)
    }

    /// An [`Error::Invalid`] of this file.
    pub fn invalid(&self, field: &'static str, value: u64, reason: String) -> Error {
        Error::Invalid {
            file: self.path.clone(),
            field,
            value,
            reason,
        }
    }
}

/// Whether `path` leads to `file`.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), path.metadata()) {
        (Ok(file), Ok(found)) => (file.dev(), file.ino()) == (found.dev(), found.ino()),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;
    use std::fs;

    #[test]
    fn a_file_that_is_replaced_before_it_is_locked_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let (path, new) = (dir.path().join("disk"), dir.path().join("new"));
        fs::write(&path, "old").unwrap();
        fs::write(&new, "new").unwrap();
        let opened = Cell::new(0);
        let open = || {
            let file = File::open(&path).unwrap();
            if opened.replace(opened.get() + 1) == 0 {
                fs::rename(&new, &path).unwrap();
            }
            Ok(file)
        };
        let file = ImageFile::open_with(&path, open, Access::Read, FileOptions::default());
        let mut text = [0; 3];
        file.unwrap().read_bytes_at(&mut text, 0).unwrap();
        assert_eq!((&text, opened.get()), (b"new", 2));
    }
}
