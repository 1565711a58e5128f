//! Positioned, vectored, synchronous I/O on what is below a disk.
//!
//! | module | what it knows |
//! | --- | --- |
//! | `file` | regular files and block devices |
//! | `direct` | the same past the page cache |
//! | `vectored` | the system calls that move data |
//! | `nowait` | which of them need not wait for a device |
//! | `units` | in which units a file works best |

mod direct;
mod file;
mod nowait;
mod units;
mod vectored;

use std::fmt::Debug;
use std::io;
use std::os::fd::BorrowedFd;

use vm_memory::VolatileSlice;

use crate::FileStamp;

pub(crate) use direct::Direct;
pub use file::FileStorage;
pub use units::Units;

/// One host file below a disk: image metadata, guest data, or both.
///
/// All methods take `&self` and may run in parallel. Offsets and lengths are bytes. Reads and
/// writes are complete or fail: short transfers and `EINTR` are dealt with inside. All methods fail
/// with the system's error; what a failed one has done of its range is unspecified, and nothing else
/// has changed.
#[allow(clippy::missing_errors_doc, reason = "told above, once")]
pub trait Storage: Debug + Send + Sync {
    /// Fills `bufs` from `offset` on. Bytes past the end of the file read as zero.
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// Writes `bufs` at `offset`; a file grows as needed.
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()>;

    /// [`read_at`](Storage::read_at), if that need not wait for a device. Returns whether it has been
    /// done; if not, the content of `bufs` is unspecified.
    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        let _ = (bufs, offset);
        Ok(false)
    }

    /// [`write_at`](Storage::write_at), if that need not wait for a device. Returns whether it has
    /// been done; if not, any part of the range may have been written.
    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        let _ = (bufs, offset);
        Ok(false)
    }

    /// [`read_at`](Storage::read_at) into ordinary memory, for metadata.
    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()>;

    /// [`write_at`](Storage::write_at) from ordinary memory, for metadata.
    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()>;

    /// Makes a range read as zero. With `unmap` its space may be released. The length of the file
    /// stays as it is.
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()>;

    /// Releases the space of a range where that is possible; transfers no data. Each part of the
    /// range keeps its content or reads as zero. The length of the file stays as it is.
    fn discard(&self, offset: u64, len: u64) -> io::Result<()>;

    /// Offset of the first byte at or after `offset` that may be other than zero; `None` if all
    /// that follows, past the end of the file too, reads as zero. May err towards data.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>>;

    /// Offset of the first byte at or after `offset`, which is inside the file, that may lie in a
    /// hole; the end of the file counts as one. May err towards data.
    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        let _ = offset;
        self.size()
    }

    /// The file, if the system can copy from it.
    fn fd(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Has the system copy `len` bytes at `from` of the file `source` to `offset`, where it can.
    /// Returns whether it could.
    fn copy_from(
        &self,
        source: BorrowedFd<'_>,
        from: u64,
        offset: u64,
        len: u64,
    ) -> io::Result<bool> {
        let _ = (source, from, offset, len);
        Ok(false)
    }

    /// Makes completed writes durable, with the metadata needed to read them back.
    fn sync(&self) -> io::Result<()>;

    /// Length in bytes.
    fn size(&self) -> io::Result<u64>;

    /// Makes it `len` bytes long; what it gains reads as zero. A block device keeps its length.
    ///
    /// # Errors
    /// `len` is more than the [`capacity`](Storage::capacity); `Unsupported`, unless implemented.
    fn set_len(&self, len: u64) -> io::Result<()> {
        let _ = len;
        Err(io::ErrorKind::Unsupported.into())
    }

    /// The length that it cannot exceed, in bytes, where that is fixed: that of a block device.
    fn capacity(&self) -> io::Result<Option<u64>> {
        Ok(None)
    }

    /// What tells later whether anybody has written to it since, without a path; `None` if nothing
    /// does.
    fn stamp(&self) -> io::Result<Option<FileStamp>> {
        Ok(None)
    }

    /// Makes the [`stamp`](Storage::stamp) durable: a [`sync`](Storage::sync) leaves the time of the last
    /// write to the system.
    fn sync_stamp(&self) -> io::Result<()> {
        Ok(())
    }

    /// Gives it another [`stamp`](Storage::stamp), as a write does.
    fn renew_stamp(&self) -> io::Result<()> {
        Ok(())
    }

    /// In which units it works best.
    fn units(&self) -> Units {
        Units::default()
    }

    /// The file that has the locks, if they keep others off.
    #[doc(hidden)]
    fn locked(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
