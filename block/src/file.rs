//! A file below a disk: storage with a name for error messages, and a memory for failed syncs.

use crate::sync::{Mutex, lock};
use std::path::{Path, PathBuf};

use vm_memory::VolatileSlice;

use crate::{Error, FileStorage, Result, Storage};

/// The image file, the external data file, or a raw disk.
#[derive(Debug)]
pub(crate) struct ImageFile {
    pub storage: Box<dyn Storage>,
    pub path: PathBuf,
    /// A sync failed: what had been written before it may be lost, and no later sync can tell.
    sync_failed: Mutex<bool>,
}

impl ImageFile {
    pub fn new(storage: Box<dyn Storage>, path: &Path) -> Self {
        Self {
            storage,
            path: path.to_owned(),
            sync_failed: Mutex::new(false),
        }
    }

    /// Opens the file or block device at `path`.
    pub fn open(path: &Path, read_only: bool) -> Result<Self> {
        let storage = FileStorage::open(path, read_only).map_err(|e| Error::io(path, "open", e))?;
        Ok(Self::new(Box::new(storage), path))
    }

    pub fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.storage
            .read_at(bufs, offset)
            .map_err(|e| Error::io_at(&self.path, "read", offset, e))
    }

    pub fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.storage
            .write_at(bufs, offset)
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

    /// Makes completed writes durable.
    ///
    /// After a failure the system may have dropped what it could not write, and reports that only
    /// once. So no later call succeeds either: a caller would take it for a promise that nobody
    /// can keep.
    pub fn sync(&self) -> Result<()> {
        // Held meanwhile: of two syncs of one loss, the system fails only one.
        let mut sync_failed = lock(&self.sync_failed);
        self.check_not(*sync_failed)?;
        self.storage.sync().map_err(|e| {
            *sync_failed = true;
            Error::io(&self.path, "sync", e)
        })
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
