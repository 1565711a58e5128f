//! `preadv`, `pwritev` and `preadv2` on volatile memory: the one place where guest memory meets the kernel.
//!
//! Most requests have one buffer. The way of those from [`Disk`](crate::Disk) to the system call is one
//! function, all of it inlined: processors do not predict where a function returns to after a system
//! call, so that each level of calls costs more than what it does.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};

use vm_memory::VolatileSlice;
use vm_memory::volatile_memory::PtrGuardMut;

use crate::buffers::fill_zero;

/// Segments handed to one system call. Linux takes up to 1024 (`UIO_MAXIOV`); requests of more are
/// rare and go out in several calls.
const MAX_IOV: usize = 128;

/// Segments of an ordinary request.
const FEW_IOV: usize = 8;

// Guards that unmap something must live as long as the pointers are used.
const _: () = assert!(!std::mem::needs_drop::<PtrGuardMut>());

#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Direction {
    Read,
    /// As `Read`, but fails with `EAGAIN` where that would wait for the device, or the end of the file
    /// may have come.
    ReadNoWait,
    Write,
}

/// Moves all of `bufs` from or to `offset`. A read past the end of the file yields zeros.
///
/// `unit` is what offsets must be a multiple of: a read that stops elsewhere has met the end of the
/// file, and the system would refuse to go on from there.
#[inline(always)]
pub(crate) fn transfer(
    fd: BorrowedFd<'_>,
    bufs: &[VolatileSlice<'_>],
    offset: u64,
    unit: u64,
    direction: Direction,
) -> io::Result<()> {
    if let [buf] = bufs
        && transfer_whole(fd, buf, offset, direction)?
    {
        return Ok(());
    }
    transfer_chunks(fd, bufs, offset, unit, direction)
}

/// [`transfer`], chunk by chunk.
#[inline(never)]
fn transfer_chunks(
    fd: BorrowedFd<'_>,
    bufs: &[VolatileSlice<'_>],
    mut offset: u64,
    unit: u64,
    direction: Direction,
) -> io::Result<()> {
    for chunk in bufs.chunks(MAX_IOV) {
        // Filling in the larger array would cost more than a small request's lookup.
        let done = if chunk.len() <= FEW_IOV {
            transfer_chunk::<FEW_IOV>(fd, chunk, offset, unit, direction)?
        } else {
            transfer_chunk::<MAX_IOV>(fd, chunk, offset, unit, direction)?
        };
        offset = offset
            .checked_add(done)
            .ok_or(io::ErrorKind::InvalidInput)?;
    }
    Ok(())
}

/// Moves `buf` in a single system call, which is all that most requests need. Returns whether all of it
/// has been moved; if not, everything is to be moved again.
#[inline(always)]
fn transfer_whole(
    fd: BorrowedFd<'_>,
    buf: &VolatileSlice<'_>,
    offset: u64,
    direction: Direction,
) -> io::Result<bool> {
    let position = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
    let (fd, len) = (fd.as_raw_fd(), buf.len());
    let start = buf.ptr_guard_mut().as_ptr().cast();
    let iov = libc::iovec {
        iov_base: start,
        iov_len: len,
    };
    // SAFETY: `start` and `len` describe memory of a `VolatileSlice` whose lifetime outlives this
    // call and which is not borrowed as a Rust reference anywhere; the kernel may read or write
    // it at will. The memory stays mapped without the guard that the pointer came from, since that
    // does nothing when it is dropped.
    let n = unsafe {
        match direction {
            Direction::Read => libc::pread(fd, start, len, position),
            Direction::ReadNoWait => libc::preadv2(fd, &iov, 1, position, libc::RWF_NOWAIT),
            Direction::Write => libc::pwrite(fd, start, len, position),
        }
    };
    if n < 0 {
        return check_interrupted();
    }
    Ok(n as usize == len)
}

/// `Ok(false)` if the system call that has just failed was interrupted, or its error.
#[cold]
fn check_interrupted() -> io::Result<bool> {
    let error = io::Error::last_os_error();
    if error.kind() == io::ErrorKind::Interrupted {
        return Ok(false);
    }
    Err(error)
}

/// Moves the at most `N` buffers of `bufs`, and returns their length.
fn transfer_chunk<const N: usize>(
    fd: BorrowedFd<'_>,
    bufs: &[VolatileSlice<'_>],
    offset: u64,
    unit: u64,
    direction: Direction,
) -> io::Result<u64> {
    let mut iov = [libc::iovec {
        iov_base: std::ptr::null_mut(),
        iov_len: 0,
    }; N];
    let mut total = 0usize;
    for (entry, buf) in iov.iter_mut().zip(bufs) {
        *entry = libc::iovec {
            iov_base: buf.ptr_guard_mut().as_ptr().cast(),
            iov_len: buf.len(),
        };
        total += buf.len();
    }
    let mut done = transfer_iov(fd, &mut iov[..bufs.len()], total, offset, unit, direction)?;
    if done < total {
        for buf in bufs {
            if let Ok(rest) = buf.offset(done.min(buf.len())) {
                fill_zero(&[rest]);
            }
            done = done.saturating_sub(buf.len());
        }
    }
    Ok(total as u64)
}

/// Moves the `left` bytes of `iov`, and returns how many: a read stops at the end of the file.
fn transfer_iov(
    fd: BorrowedFd<'_>,
    mut iov: &mut [libc::iovec],
    len: usize,
    mut offset: u64,
    unit: u64,
    direction: Direction,
) -> io::Result<usize> {
    let mut left = len;
    while left > 0 {
        let position = i64::try_from(offset).map_err(|_| io::ErrorKind::InvalidInput)?;
        let count = iov.len() as libc::c_int;
        // SAFETY: every entry of `iov` describes memory of a `VolatileSlice` whose lifetime
        // outlives this call and which is not borrowed as a Rust reference anywhere; the
        // kernel may read or write it at will. The memory stays mapped without the guards that
        // the pointers came from, since those do nothing when they are dropped.
        let n = unsafe {
            let fd = fd.as_raw_fd();
            match direction {
                Direction::Read => libc::preadv(fd, iov.as_ptr(), count, position),
                Direction::ReadNoWait => {
                    libc::preadv2(fd, iov.as_ptr(), count, position, libc::RWF_NOWAIT)
                }
                Direction::Write => libc::pwritev(fd, iov.as_ptr(), count, position),
            }
        };
        match n {
            // Linux 5.9 and 5.10 return this in the middle of a file as well (readv(2), "Bugs").
            0 if direction == Direction::ReadNoWait => return Err(io::ErrorKind::WouldBlock.into()),
            0 if direction == Direction::Read => return Ok(len - left),
            0 => return Err(io::ErrorKind::WriteZero.into()),
            n if n > 0 => {
                left -= n as usize;
                offset += n as u64;
                if direction != Direction::Write && !offset.is_multiple_of(unit) {
                    return Ok(len - left);
                }
                iov = advance(iov, n as usize);
            }
            _ => {
                let error = io::Error::last_os_error();
                if error.kind() != io::ErrorKind::Interrupted {
                    return Err(error);
                }
            }
        }
    }
    Ok(len)
}

/// Drops the first `n` bytes of `iov`.
fn advance(mut iov: &mut [libc::iovec], mut n: usize) -> &mut [libc::iovec] {
    while let Some(first) = iov.first_mut() {
        if n < first.iov_len {
            first.iov_base = first.iov_base.cast::<u8>().wrapping_add(n).cast();
            first.iov_len -= n;
            break;
        }
        n -= first.iov_len;
        iov = &mut iov[1..];
    }
    iov
}
