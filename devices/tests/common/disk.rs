//! A disk in memory that can fail on demand.

use std::io;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tandem_block::{Disk, Error, FileStorage, Limits, Raw, Result};
use vm_memory::{Bytes, VolatileSlice};

/// Block size that the disk reports: not the sector size, so that mixing them up shows.
pub const BLOCK_SIZE: u32 = 4096;

#[derive(Debug)]
pub struct MemoryDisk {
    data: Mutex<Vec<u8>>,
    limits: Limits,
    /// While set, every call fails as if the host's disk were full.
    pub is_failing: AtomicBool,
    /// While set, no read or write is done without waiting.
    pub is_cold: AtomicBool,
    /// Calls of `flush` so far.
    pub flushes: AtomicU64,
    /// Calls of `write_at` so far.
    pub writes: AtomicU64,
    /// Offset and length of each `discard` so far.
    pub discards: Mutex<Vec<(u64, u64)>>,
}

impl MemoryDisk {
    /// A disk of `sectors` sectors, each filled with its own number.
    pub fn new(sectors: u8) -> Self {
        Self::with_access(sectors, false)
    }

    /// As [`new`](Self::new), for reading only.
    pub fn read_only(sectors: u8) -> Self {
        Self::with_access(sectors, true)
    }

    /// As [`new`](Self::new), with writes that are durable when they complete.
    pub fn without_write_cache(sectors: u8) -> Self {
        let mut disk = Self::new(sectors);
        disk.limits.write_cache = false;
        disk
    }

    fn with_access(sectors: u8, read_only: bool) -> Self {
        let storage = FileStorage::new(tempfile::tempfile().unwrap()).unwrap();
        let raw = Raw::with_storage("".as_ref(), Box::new(storage), read_only).unwrap();
        let mut limits = raw.limits();
        limits.block_size = BLOCK_SIZE;
        Self {
            data: Mutex::new((0..sectors).flat_map(|n| [n; 512]).collect()),
            limits,
            is_failing: AtomicBool::new(false),
            is_cold: AtomicBool::new(false),
            flushes: AtomicU64::new(0),
            writes: AtomicU64::new(0),
            discards: Mutex::default(),
        }
    }

    /// As [`new`](Self::new), with reads and writes that have to wait.
    pub fn cold(sectors: u8) -> Self {
        let disk = Self::new(sectors);
        disk.is_cold.store(true, Ordering::SeqCst);
        disk
    }

    pub fn content(&self) -> Vec<u8> {
        self.data.lock().unwrap().clone()
    }

    fn range(&self, len: usize, offset: u64) -> Result<std::ops::Range<usize>> {
        if self.is_failing.load(Ordering::SeqCst) {
            return Err(Error::Io {
                file: PathBuf::from("test.disk"),
                action: "use",
                offset: Some(offset),
                source: io::Error::from_raw_os_error(libc::ENOSPC),
            });
        }
        let size = self.size();
        match offset.checked_add(len as u64) {
            Some(end) if end <= size => Ok(offset as usize..end as usize),
            _ => Err(Error::OutOfRange {
                offset,
                len: len as u64,
                size,
            }),
        }
    }
}

impl Disk for MemoryDisk {
    fn size(&self) -> u64 {
        self.data.lock().unwrap().len() as u64
    }

    fn limits(&self) -> Limits {
        self.limits
    }

    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        let mut range = self.range(bufs.iter().map(VolatileSlice::len).sum(), offset)?;
        let data = self.data.lock().unwrap();
        for buf in bufs {
            buf.write_slice(&data[range.start..][..buf.len()], 0)
                .unwrap();
            range.start += buf.len();
        }
        Ok(())
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.writes.fetch_add(1, Ordering::SeqCst);
        if self.limits.read_only {
            return Err(Error::ReadOnly);
        }
        let mut range = self.range(bufs.iter().map(VolatileSlice::len).sum(), offset)?;
        let mut data = self.data.lock().unwrap();
        for buf in bufs {
            buf.read_slice(&mut data[range.start..][..buf.len()], 0)
                .unwrap();
            range.start += buf.len();
        }
        Ok(())
    }

    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        if self.is_cold.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.read_at(bufs, offset).map(|()| true)
    }

    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        if self.is_cold.load(Ordering::SeqCst) {
            return Ok(false);
        }
        self.write_at(bufs, offset).map(|()| true)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> Result<()> {
        let range = self.range(len as usize, offset)?;
        self.data.lock().unwrap()[range].fill(0);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.range(len as usize, offset)?;
        self.discards.lock().unwrap().push((offset, len));
        Ok(())
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.range(0, 0)?;
        self.data.lock().unwrap().resize(size as usize, 0);
        Ok(())
    }

    fn flush(&self) -> Result<()> {
        self.range(0, 0)?;
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }
}
