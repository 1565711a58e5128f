//! I/O on a regular file or a block device.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::Instant;

use rustix::fs::{FallocateFlags, SeekFrom, Timespec, Timestamps, UTIME_NOW};
use rustix::io::Errno;
use vm_memory::VolatileSlice;

use super::nowait::NoWait;
use super::units::{PAGE, Units};
use super::{Storage, vectored};
use crate::disk::total_len;
use crate::lock::{self, Access};
use crate::{FileStamp, Locking, Modified, Result};

/// A regular file or a host block device.
#[derive(Debug)]
pub struct FileStorage {
    file: File,
    is_block_device: bool,
    locking: Locking,
    nowait: NoWait,
    units: Units,
}

/// Zeros are written from a buffer of this many bytes where the file system cannot zero a range.
const ZERO_BUFFER: usize = 64 << 10;

/// The system copies what is written page by page, and may stop behind any page of memory that it has to
/// wait for, when the process is killed. So memory's pages have to begin where sectors do, or a sector would
/// be half zeros.
#[repr(align(4096))]
struct Zeros([u8; ZERO_BUFFER]);

static ZEROS: Zeros = Zeros([0; ZERO_BUFFER]);

impl FileStorage {
    /// Opens the file or block device at `path`, for reading only or for both. No lock is taken.
    ///
    /// # Errors
    /// As [`new`](FileStorage::new); a pipe is refused without waiting for its other end.
    pub fn open(path: &Path, read_only: bool) -> io::Result<Self> {
        Self::new(Self::open_file(path, read_only)?)
    }

    /// Opens whatever is at `path`, without waiting for the other end of a pipe.
    pub(crate) fn open_file(path: &Path, read_only: bool) -> io::Result<File> {
        OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)
    }

    /// The open file.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// Wraps an open file.
    ///
    /// # Errors
    /// `InvalidInput` if `file` is neither a regular file nor a block device; a directory, a pipe
    /// or a character device has no positions to read from.
    pub fn new(file: File) -> io::Result<Self> {
        let kind = file.metadata()?.file_type();
        if !kind.is_file() && !kind.is_block_device() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "neither a regular file nor a block device",
            ));
        }
        let is_block_device = kind.is_block_device();
        Ok(Self {
            nowait: NoWait::new(&file, is_block_device),
            units: if is_block_device {
                Units::of_device(&file)
            } else {
                Units::of_file(&file)
            },
            file,
            is_block_device,
            locking: Locking::Off,
        })
    }

    /// Locks the file, which is called `path`, until this is dropped.
    pub(crate) fn lock(&mut self, path: &Path, access: Access, locking: Locking) -> Result<()> {
        lock::acquire(&self.file, path, access, locking)?;
        self.locking = locking;
        Ok(())
    }

    /// Whether the pages that a write of `len` bytes at `offset` changes in part are in the page cache,
    /// or lie behind the end of the file.
    fn has_edges(&self, offset: u64, len: u64) -> io::Result<bool> {
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let mut byte = [0];
        let byte = [VolatileSlice::from(&mut byte[..])];
        for edge in [offset, end] {
            let page = edge - edge % u64::from(PAGE);
            if page != edge && !self.read_nowait(&byte, page)? && page < self.size()? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    #[inline(always)]
    fn read_nowait(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        self.nowait.try_read(|| {
            let direction = vectored::Direction::ReadNoWait;
            vectored::transfer(self.file.as_fd(), bufs, offset, 1, direction)
        })
    }

    fn fallocate(&self, flags: FallocateFlags, offset: u64, len: u64) -> rustix::io::Result<()> {
        let _blocking = self.nowait.block();
        rustix::io::retry_on_intr(|| rustix::fs::fallocate(&self.file, flags, offset, len))
    }

    /// Whether `fallocate` fails with `error` where it is not to be had: on this file system, or for
    /// parts of a device's blocks.
    fn cannot_fallocate(&self, error: rustix::io::Errno) -> bool {
        match error {
            Errno::OPNOTSUPP | Errno::NODEV => true,
            Errno::INVAL => self.is_block_device,
            _ => false,
        }
    }

    fn write_zero_bytes(&self, mut offset: u64, mut len: u64) -> io::Result<()> {
        while len > 0 {
            let n = len.min(ZERO_BUFFER as u64);
            self.file.write_all_at(&ZEROS.0[..n as usize], offset)?;
            offset += n;
            len -= n;
        }
        Ok(())
    }
}

impl Drop for FileStorage {
    fn drop(&mut self) {
        if self.locking != Locking::Off {
            lock::release(&self.file);
        }
    }
}

impl Storage for FileStorage {
    #[inline(always)]
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        vectored::transfer(
            self.file.as_fd(),
            bufs,
            offset,
            1,
            vectored::Direction::Read,
        )
    }

    #[inline(always)]
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        vectored::transfer(
            self.file.as_fd(),
            bufs,
            offset,
            1,
            vectored::Direction::Write,
        )
    }

    #[inline(always)]
    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        if self.nowait.is_in_memory() {
            return self.read_at(bufs, offset).map(|()| true);
        }
        self.read_nowait(bufs, offset)
    }

    #[inline(always)]
    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        let (len, begun) = (total_len(bufs), Instant::now());
        if !self.nowait.may_write(begun)
            || !self.nowait.is_in_memory() && !self.has_edges(offset, len)?
        {
            return Ok(false);
        }
        self.write_at(bufs, offset)?;
        self.nowait.has_written(len, begun, begun.elapsed());
        Ok(true)
    }

    fn read_bytes_at(&self, mut buf: &mut [u8], mut offset: u64) -> io::Result<()> {
        while !buf.is_empty() {
            match self.file.read_at(buf, offset) {
                Ok(0) => {
                    buf.fill(0);
                    return Ok(());
                }
                Ok(n) => {
                    buf = &mut buf[n..];
                    offset += n as u64;
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        // What lies past the end of a file reads as zero already, and growing the file here could
        // race with a writer that grows it further.
        let end = offset
            .checked_add(len)
            .ok_or(io::ErrorKind::InvalidInput)?
            .min(self.size()?);
        if end <= offset {
            return Ok(());
        }
        let len = end - offset;
        let flags = if unmap {
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
        } else {
            FallocateFlags::ZERO_RANGE
        };
        match self.fallocate(flags, offset, len) {
            Ok(()) => Ok(()),
            Err(e) if self.cannot_fallocate(e) => self.write_zero_bytes(offset, len),
            Err(e) => Err(e.into()),
        }
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        if len == 0 {
            // Not a length that the system takes.
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match self.fallocate(flags, offset, len) {
            Err(e) if self.cannot_fallocate(e) => Ok(()),
            result => Ok(result?),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        if self.is_block_device {
            return Ok(Some(offset));
        }
        match rustix::fs::seek(&self.file, SeekFrom::Data(offset)) {
            Ok(data) => Ok(Some(data)),
            Err(rustix::io::Errno::NXIO) => Ok(None),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => Ok(Some(offset)),
            Err(e) => Err(e.into()),
        }
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        if self.is_block_device {
            return self.size();
        }
        match rustix::fs::seek(&self.file, SeekFrom::Hole(offset)) {
            Ok(hole) => Ok(hole),
            Err(rustix::io::Errno::INVAL | rustix::io::Errno::OPNOTSUPP) => self.size(),
            Err(e) => Err(e.into()),
        }
    }

    fn fd(&self) -> Option<BorrowedFd<'_>> {
        Some(self.file.as_fd())
    }

    fn copy_from(
        &self,
        source: BorrowedFd<'_>,
        mut from: u64,
        mut offset: u64,
        mut len: u64,
    ) -> io::Result<bool> {
        let _blocking = self.nowait.block();
        while len > 0 {
            let at = (Some(&mut from), Some(&mut offset));
            let some = usize::try_from(len).unwrap_or(usize::MAX);
            match rustix::fs::copy_file_range(source, at.0, &self.file, at.1, some) {
                // The source ends before.
                Ok(0) => return Ok(false),
                Ok(copied) => len -= copied as u64,
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL | Errno::NOSYS) => {
                    return Ok(false);
                }
                Err(e) => return Err(e.into()),
            }
        }
        Ok(true)
    }

    fn sync(&self) -> io::Result<()> {
        let _blocking = self.nowait.block();
        Ok(rustix::io::retry_on_intr(|| {
            rustix::fs::fdatasync(&self.file)
        })?)
    }

    fn size(&self) -> io::Result<u64> {
        if self.is_block_device {
            // The position is private to this descriptor's owner and never used for I/O.
            return Ok(rustix::fs::seek(&self.file, SeekFrom::End(0))?);
        }
        Ok(self.file.metadata()?.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match self.capacity()? {
            Some(capacity) if len > capacity => Err(io::ErrorKind::StorageFull.into()),
            Some(_) => Ok(()),
            None => {
                let _blocking = self.nowait.block();
                self.file.set_len(len)
            }
        }
    }

    fn capacity(&self) -> io::Result<Option<u64>> {
        if self.is_block_device {
            return self.size().map(Some);
        }
        Ok(None)
    }

    fn locked(&self) -> Option<BorrowedFd<'_>> {
        (self.locking == Locking::On).then(|| self.file.as_fd())
    }

    fn stamp(&self) -> io::Result<Option<FileStamp>> {
        let metadata = self.file.metadata()?;
        let modified = Modified {
            seconds: metadata.mtime(),
            // Less than a second.
            nanoseconds: metadata.mtime_nsec() as u32,
        };
        Ok(Some(FileStamp {
            path: PathBuf::new(),
            len: self.size()?,
            modified: (!self.is_block_device).then_some(modified),
        }))
    }

    fn sync_stamp(&self) -> io::Result<()> {
        if self.is_block_device {
            return Ok(());
        }
        let _blocking = self.nowait.block();
        match rustix::io::retry_on_intr(|| rustix::fs::fsync(&self.file)) {
            // A file system that is never written.
            Err(Errno::INVAL | Errno::ROFS) => Ok(()),
            synced => Ok(synced?),
        }
    }

    fn renew_stamp(&self) -> io::Result<()> {
        let now = Timespec {
            tv_sec: 0,
            tv_nsec: UTIME_NOW,
        };
        let now = Timestamps {
            last_access: now,
            last_modification: now,
        };
        if !self.is_block_device {
            rustix::io::retry_on_intr(|| rustix::fs::futimens(&self.file, &now))?;
        }
        Ok(())
    }

    fn units(&self) -> Units {
        self.units
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn storage() -> FileStorage {
        FileStorage::new(tempfile::tempfile().unwrap()).unwrap()
    }

    #[test]
    fn vectored_transfers_are_whole() {
        let s = storage();
        let mut parts: Vec<Vec<u8>> = (0..300).map(|i| vec![i as u8; 1 + i % 7]).collect();
        let expected = parts.concat();
        let bufs: Vec<_> = parts
            .iter_mut()
            .map(|p| VolatileSlice::from(&mut p[..]))
            .collect();
        s.write_at(&bufs, 5).unwrap();
        let mut back = vec![0; expected.len()];
        s.read_bytes_at(&mut back, 5).unwrap();
        assert_eq!(back, expected);

        let mut parts: Vec<Vec<u8>> = (0..300).map(|i| vec![0xee; 1 + i % 7]).collect();
        let bufs: Vec<_> = parts
            .iter_mut()
            .map(|p| VolatileSlice::from(&mut p[..]))
            .collect();
        s.read_at(&bufs, 5).unwrap();
        assert_eq!(parts.concat(), expected);
    }

    #[test]
    fn past_the_end_reads_zero() {
        let s = storage();
        s.write_bytes_at(b"abc", 0).unwrap();
        let (mut a, mut b) = ([0xee; 2], [0xee; 4]);
        s.read_at(
            &[
                VolatileSlice::from(&mut a[..]),
                VolatileSlice::from(&mut b[..]),
            ],
            1,
        )
        .unwrap();
        assert_eq!((&a, &b), (b"bc", &[0; 4]));
    }

    /// Takes the file out of the page cache, as far as the system does so when it is asked.
    fn evict(s: &FileStorage) {
        s.sync().unwrap();
        rustix::fs::fadvise(&s.file, 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }

    /// What is cold is not read, nor read to be written in part; what is hot is.
    #[test]
    fn does_not_wait_for_what_is_cold() {
        const LEN: u64 = 4 << 20;
        let s = storage();
        s.write_bytes_at(&vec![7; LEN as usize], 0).unwrap();
        let read = |offset| {
            let mut bytes = [0xee; 8192];
            let done = s.try_read_at(&[VolatileSlice::from(&mut bytes[..])], offset);
            done.unwrap().then_some(bytes)
        };
        let write = |offset| {
            // However long this machine took for the last one.
            s.nowait.resume();
            let mut bytes = [9; 8192];
            let done = s.try_write_at(&[VolatileSlice::from(&mut bytes[..])], offset);
            done.unwrap()
        };
        if !write(0) {
            eprintln!("skipped: nothing is known of the file system");
            return;
        }
        if !s.nowait.is_in_memory() {
            // Somebody may have a page in hand just when it is to go.
            let attempts = || (0..100).map(|_| evict(&s));
            assert!(attempts().any(|()| read(1 << 20).is_none()));
            assert!(attempts().any(|()| !write((2 << 20) + 512)));
            evict(&s);
            assert!(write(3 << 20), "whole pages need not be read");
        }
        s.read_bytes_at(&mut [0; 65536], 1 << 20).unwrap();
        assert_eq!(read((1 << 20) + 100), Some([7; 8192]));
        assert!(write((1 << 20) + 512));
        assert_eq!(read((1 << 20) + 512), Some([9; 8192]));
        assert!(
            write(LEN + 512),
            "what lies behind the end need not be read"
        );
        let end = LEN + 512 + 8192;
        assert_eq!(s.size().unwrap(), end);
        if let Some(back) = read(end - 100) {
            assert!(
                s.nowait.is_in_memory(),
                "what nothing is read of may not be the end"
            );
            assert_eq!(
                (&back[..100], &back[100..]),
                (&[9; 100][..], &[0; 8092][..])
            );
        }
        let _blocking = s.nowait.block();
        assert!(!write(0));
    }

    #[test]
    fn zeroes_inside_across_and_past_the_end() {
        for unmap in [false, true] {
            let s = storage();
            s.write_bytes_at(&[7; 100_000], 0).unwrap();
            s.write_zeroes(10_000, 20_000, unmap).unwrap();
            s.write_zeroes(90_000, 50_000, unmap).unwrap();
            assert_eq!(s.size().unwrap(), 100_000);
            let mut back = vec![0xee; 140_000];
            s.read_bytes_at(&mut back, 0).unwrap();
            for (i, byte) in back.iter().enumerate() {
                let zero = (10_000..30_000).contains(&i) || i >= 90_000;
                assert_eq!(*byte, if zero { 0 } else { 7 }, "byte {i}");
            }
        }
    }

    #[test]
    fn finds_data_behind_holes() {
        let s = storage();
        assert_eq!(s.next_data(0).unwrap(), None);
        s.file.set_len(8 << 20).unwrap();
        s.write_bytes_at(&[1; 10], 4 << 20).unwrap();
        let data = s.next_data(0).unwrap().unwrap();
        assert!(data <= 4 << 20);
        assert_eq!(s.next_data(4 << 20).unwrap(), Some(4 << 20));
        assert_eq!(s.next_data(9 << 20).unwrap(), None);
    }

    #[test]
    fn copies_from_another_file() {
        let (source, target) = (storage(), storage());
        let bytes: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        source.write_bytes_at(&bytes, 0).unwrap();
        let fd = source.fd().unwrap();
        if target.copy_from(fd, 1000, 5000, 90_000).unwrap() {
            let mut back = vec![0; 95_000];
            target.read_bytes_at(&mut back, 0).unwrap();
            assert_eq!(back[..5000], [0; 5000]);
            assert_eq!(back[5000..], bytes[1000..91_000]);
        }
        // What the source does not have is for the caller to read.
        assert!(!target.copy_from(fd, 99_000, 0, 2000).unwrap());
    }

    #[test]
    fn a_pipe_is_refused_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pipe");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        assert!(FileStorage::open(&path, true).is_err());
        assert!(crate::Raw::open(&path, true).is_err());
        let options = crate::qcow2::OpenOptions {
            read_only: true,
            ..Default::default()
        };
        assert!(crate::qcow2::Qcow2::open(&path, &options).is_err());
    }

    #[test]
    fn refuses_what_has_no_positions() {
        assert!(FileStorage::new(File::open("/dev/null").unwrap()).is_err());
        assert!(FileStorage::new(File::open("/").unwrap()).is_err());
    }
}
