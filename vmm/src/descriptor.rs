//! File descriptors that are given by their numbers.

use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use rustix::fs::{OFlags, fcntl_getfl};

use crate::error::{Error, Result};

/// A copy, to write to, of the descriptor with this number.
pub(crate) fn duplicate(number: RawFd) -> io::Result<File> {
    // SAFETY: the call takes any number, and tells if no file is open under it.
    let number = unsafe { libc::fcntl(number, libc::F_DUPFD_CLOEXEC, 3) };
    if number < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the descriptor is new and belongs to nobody else.
    let file = unsafe { OwnedFd::from_raw_fd(number) };
    if fcntl_getfl(&file)? & OFlags::ACCMODE == OFlags::RDONLY {
        return Err(io::Error::other("it is open for reading only"));
    }
    Ok(file.into())
}

/// A copy of the descriptor that the guest's output goes to.
pub(crate) fn duplicate_output(number: RawFd) -> Result<File> {
    duplicate(number).map_err(|source| Error::Output {
        descriptor: number,
        source,
    })
}
