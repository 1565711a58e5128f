//! The [`Disk`] trait: what a device model sees of an image.

use std::os::fd::BorrowedFd;

use vm_memory::VolatileSlice;

use crate::live::ImageRef;
use crate::preallocation::Preallocation;
use crate::{Error, Result, Stamp};

/// What a device needs to know of a disk to describe it to its guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Limits {
    /// Logical block size in bytes: the unit in which a guest addresses the disk.
    pub block_size: u32,
    /// Whether every writing call fails with [`Error::ReadOnly`](crate::Error::ReadOnly).
    pub read_only: bool,
    /// Whether a completed write needs a [`flush`](Disk::flush) to be durable.
    pub write_cache: bool,
    /// Physical block size in bytes: what begins and ends at multiples of it is written without
    /// reading what lies around it. A power of two, at least [`block_size`](Limits::block_size).
    pub physical_block_size: u32,
    /// Requests of multiples of so many bytes are served best; 0 if that is not known.
    pub optimal_io_size: u32,
    /// The smallest aligned unit in bytes of which a [`discard`](Disk::discard) releases the space.
    pub discard_granularity: u32,
    /// Whether [`write_zeroes`](Disk::write_zeroes) can release space when it is asked to unmap.
    pub can_unmap: bool,
}

impl Limits {
    /// For a disk that is addressed in blocks of `block_size` bytes, has a write cache, does with each
    /// block what it is told, and of which no more is known.
    pub fn new(block_size: u32, read_only: bool) -> Self {
        Self {
            block_size,
            read_only,
            write_cache: true,
            physical_block_size: block_size,
            optimal_io_size: 0,
            discard_granularity: block_size,
            can_unmap: !read_only,
        }
    }
}

/// How a range of a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes; zero only for an empty range.
    pub len: u64,
    /// What is stored.
    pub kind: ExtentKind,
    /// Where its place begins in the file that holds guest data, if it has one.
    pub offset: Option<u64>,
}

/// What is stored for a range of a disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ExtentKind {
    /// Anything.
    Data,
    /// Anything, compressed.
    Compressed,
    /// The image says that the range reads as zero.
    Zero,
    /// Nothing: the disk below shows ([`Disk::backing`]), or the range reads as zero.
    Unallocated,
}

/// A flat array of bytes: the guest's view of an image.
///
/// # Contract
/// * Offsets and lengths are in bytes and need no alignment. Devices that serve sectors check
///   their own alignment.
/// * The implementation checks ranges, because only it knows the size at the moment of the call
///   (a disk can be resized while requests are under way). A caller may pass any value: a range
///   that does not lie within the disk fails with
///   [`Error::OutOfRange`](crate::Error::OutOfRange) and has no effect. Implementations never
///   panic on a caller's numbers.
/// * All methods take `&self` and may be called from several threads at once. Concurrent requests
///   to overlapping ranges may take effect in any order, sector by sector.
/// * A failed write may have changed any part of its own range and nothing else.
/// * What a completed write stored is seen by every later read. It survives a power failure once a
///   [`flush`](Disk::flush) that began after the write had completed has returned `Ok`; if
///   [`limits`](Disk::limits) tells of no write cache, at once.
/// * Buffers may be guest memory that changes during the call: an implementation passes it to the
///   system call or copies it once, and never bases a decision on its content.
pub trait Disk: Send + Sync {
    /// Size of the disk in bytes, a multiple of 512.
    fn size(&self) -> u64;

    /// Block size and access mode.
    fn limits(&self) -> Limits;

    /// Fills `bufs`, one after another, with the bytes that start at `offset`.
    ///
    /// # Errors
    /// The content of `bufs` is unspecified after an error.
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()>;

    /// Writes the bytes of `bufs`, one after another, at `offset`.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange), [`Error::ReadOnly`](crate::Error::ReadOnly), or
    /// what keeps the range from being written, no space among it.
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()>;

    /// As [`read_at`](Disk::read_at), but only if that need not wait: for a device, for another
    /// request, or for processor time as long as that. Returns whether it has been done; if not, the
    /// content of `bufs` is unspecified, and the ordinary method is to be called.
    ///
    /// # Errors
    /// Those of [`read_at`](Disk::read_at).
    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        let _ = (bufs, offset);
        Ok(false)
    }

    /// As [`write_at`](Disk::write_at), but only if that need not wait, as in
    /// [`try_read_at`](Disk::try_read_at). Returns whether it has been done; if not, any part of the
    /// range may have been written, and the ordinary method is to be called.
    ///
    /// # Errors
    /// Those of [`write_at`](Disk::write_at).
    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        let _ = (bufs, offset);
        Ok(false)
    }

    /// Makes the `len` bytes at `offset` read as zero, without transferring data where possible.
    ///
    /// With `unmap`, the space that the range occupies on the host may be released; without it,
    /// space that was reserved for the range stays reserved.
    ///
    /// # Errors
    /// Those of [`write_at`](Disk::write_at); each part of the range is as it was or zero then.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()>;

    /// Tells that the content of the `len` bytes at `offset` is no longer needed, so that the space
    /// they occupy on the host can be released.
    ///
    /// Each part of the range keeps its content or reads as zero from then on; a qcow2 disk
    /// releases whole clusters.
    ///
    /// # Errors
    /// Those of [`write_at`](Disk::write_at); each part of the range is as it was or zero then.
    fn discard(&self, offset: u64, len: u64) -> Result<()>;

    /// How the bytes from `offset` on are stored: as many of `len` as are stored in one way, one
    /// behind the other, but for what would take too long to look at in one call.
    ///
    /// A qcow2 disk tells what the image says of its clusters, and does not look for holes in the
    /// file that they lie in. A disk that does not know calls everything data.
    ///
    /// # Errors
    /// [`Error::OutOfRange`](crate::Error::OutOfRange), or what keeps the range from being read.
    fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        check_range(offset, len, self.size())?;
        Ok(Extent {
            len,
            kind: ExtentKind::Data,
            offset: None,
        })
    }

    /// As [`extent`](Disk::extent), but data that lies in holes of the file is told as
    /// [`ExtentKind::Zero`], as far as it is worth looking for them.
    ///
    /// # Errors
    /// Those of [`extent`](Disk::extent).
    fn sparse_extent(&self, offset: u64, len: u64) -> Result<Extent> {
        self.extent(offset, len)
    }

    /// The disk below, which shows where this one has nothing; what lies behind its end reads as
    /// zero.
    fn backing(&self) -> Option<&dyn Disk> {
        None
    }

    /// What this is, if it is an image that this crate has opened.
    #[doc(hidden)]
    fn as_image(&self) -> Option<ImageRef<'_>> {
        None
    }

    /// What tells later whether the files of this disk, and of those below it, have been written since,
    /// by whatever program; `None` if that cannot be told. [`Stamp::of`] is for one that is kept.
    ///
    /// # Errors
    /// [`Error::Io`].
    fn stamp(&self) -> Result<Option<Stamp>> {
        Ok(None)
    }

    /// The file whose offsets [`extent`](Disk::extent) tells, if the system can copy from it.
    fn host_file(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Writes the `len` bytes at `offset` by having the system copy those at `from` of the file
    /// `source`, where it can: the two may share their space then. Returns whether it could; if not,
    /// each part of the range is as it was or copied.
    ///
    /// # Errors
    /// Those of [`write_at`](Disk::write_at).
    fn copy_from(&self, source: BorrowedFd<'_>, from: u64, offset: u64, len: u64) -> Result<bool> {
        let _ = (source, from, offset, len);
        Ok(false)
    }

    /// Changes the size of the disk to `size` bytes. What it gains reads as zero, but for what a
    /// raw data file holds there already.
    ///
    /// Other requests may go on meanwhile. Those that were begun before, in a part that goes, may
    /// fail. The new size is durable when this returns.
    ///
    /// # Errors
    /// [`Error::Option`](crate::Error::Option) for a size that the format or the device below cannot
    /// have (only a raw disk can have one that is not a multiple of 512, and shows it rounded up), and,
    /// unless implemented, for any; the disk has its old size then. After another error
    /// [`size`](Disk::size) tells which it has, and that may not be durable.
    fn resize(&self, size: u64) -> Result<()> {
        let reason = format!("This disk cannot be resized (to {size} bytes)");
        Err(Error::Option(reason))
    }

    /// As [`resize`](Disk::resize), and what the disk gains gets its space at once.
    ///
    /// # Errors
    /// As [`resize`](Disk::resize); [`Error::Option`](crate::Error::Option) for a disk that becomes
    /// smaller, or that cannot do so; too little room, the disk having its old size then.
    fn resize_preallocated(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        if preallocation == Preallocation::Off {
            return self.resize(size);
        }
        let reason = format!("This disk cannot be preallocated (to {size} bytes)");
        Err(Error::Option(reason))
    }

    /// Takes over the size that the file or device below has now, where that is the size of the disk:
    /// another program may have changed it. Returns whether that is so.
    ///
    /// # Errors
    /// The size cannot be told; the disk has its old size then.
    fn follow_size(&self) -> Result<bool> {
        Ok(false)
    }

    /// Makes everything that was written before the call durable.
    ///
    /// # Errors
    /// After an error nothing may be assumed about which earlier writes are durable.
    fn flush(&self) -> Result<()>;

    /// Ends the use of the disk: [`flush`](Disk::flush), and what is stored only at the end, such as
    /// the persistent bitmaps of a qcow2 image. Writing requests fail from then on.
    ///
    /// The caller sees to it that no request is under way. A disk that is dropped without this does
    /// the same, but cannot tell whether it has succeeded.
    ///
    /// # Errors
    /// Those of `flush`. What could not be stored is marked as such in the image: it is not wrong, but
    /// of no use any more. Then another call fails, too.
    fn close(&self) -> Result<()> {
        self.flush()
    }
}

/// How the bytes from `offset` on of what `disk` shows are stored, in it or in the disks below: as
/// many of `len` as [`Disk::extent`] tells, and how many disks above the one that has them.
///
/// [`ExtentKind::Unallocated`] means that they read as zero because none has anything, or because
/// the next one ends before them.
///
/// # Errors
/// Those of [`Disk::extent`].
pub fn extent_in_chain(disk: &dyn Disk, offset: u64, len: u64) -> Result<(usize, Extent)> {
    find_in_chain(disk, offset, len, |disk, len| disk.extent(offset, len))
}

/// As [`extent_in_chain`], of [`Disk::sparse_extent`].
///
/// # Errors
/// Those of [`Disk::sparse_extent`].
pub fn sparse_extent_in_chain(disk: &dyn Disk, offset: u64, len: u64) -> Result<(usize, Extent)> {
    find_in_chain(disk, offset, len, |disk, len| {
        disk.sparse_extent(offset, len)
    })
}

/// As [`extent_in_chain`], of what `find` tells of the up to `len` bytes at `offset` of a disk.
pub(crate) fn find_in_chain(
    disk: &dyn Disk,
    offset: u64,
    len: u64,
    find: impl Fn(&dyn Disk, u64) -> Result<Extent>,
) -> Result<(usize, Extent)> {
    let (mut disk, mut len, mut depth) = (disk, len, 0);
    loop {
        let extent = find(disk, len)?;
        match disk.backing() {
            Some(below)
                if extent.kind == ExtentKind::Unallocated && offset < below.size() && len > 0 =>
            {
                len = extent.len.min(below.size() - offset);
                disk = below;
                depth += 1;
            }
            _ => return Ok((depth, extent)),
        }
    }
}

/// Sum of the lengths of `bufs` in bytes.
///
/// A list that names the same memory often enough to overflow saturates, and is then refused by
/// [`check_range`].
pub(crate) fn total_len(bufs: &[VolatileSlice<'_>]) -> u64 {
    bufs.iter()
        .fold(0u64, |sum, buf| sum.saturating_add(buf.len() as u64))
}

/// Checks that `len` bytes at `offset` lie within a disk of `size` bytes.
pub(crate) fn check_range(offset: u64, len: u64, size: u64) -> Result<()> {
    match offset.checked_add(len) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Error::OutOfRange { offset, len, size }),
    }
}
