//! What a file system is told of a new file.

use std::fs::File;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;

use crate::error::system_text;

/// What a file system is told of a new file. One that takes no notice of it does no harm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct FileHints {
    /// Writes change the file in place, on file systems that copy what is written (btrfs).
    pub nocow: bool,
    /// Space is taken in pieces of this many bytes; 0 leaves that to the file system.
    pub extent_size: u32,
}

impl FileHints {
    /// Tells them to the file system of `file`, which is empty; what it does not want to know is told to
    /// `warn`.
    pub(crate) fn apply(self, file: &File, warn: &mut dyn FnMut(String)) {
        if self.nocow
            && let Ok(flags) = rustix::fs::ioctl_getflags(file)
        {
            // As in QEMU, nothing is lost if that fails.
            let _ = rustix::fs::ioctl_setflags(file, flags | rustix::fs::IFlags::NOCOW);
        }
        if self.extent_size > 0
            && let Err(e) = set_extent_size(file, self.extent_size)
        {
            let reason = system_text(&e);
            warn(format!("Failed to set extent size hint: {reason}"));
        }
    }
}

/// `struct fsxattr` of the system.
#[repr(C)]
struct Attributes {
    flags: u32,
    extent_size: u32,
    extents: u32,
    project: u32,
    cow_extent_size: u32,
    padding: [u8; 8],
}

/// `FS_IOC_FSGETXATTR`
const GET: libc::Ioctl = 0x801c_581f_u32 as libc::Ioctl;
/// `FS_IOC_FSSETXATTR`
const SET: libc::Ioctl = 0x401c_5820;
/// `FS_XFLAG_EXTSIZE`: the hint has a meaning.
const HAS_EXTENT_SIZE: u32 = 0x800;

/// Tells the file system to take space for `file` in pieces of `bytes`.
fn set_extent_size(file: &File, bytes: u32) -> io::Result<()> {
    let check = |result| match result {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    };
    let mut attributes = MaybeUninit::<Attributes>::uninit();
    // SAFETY: the file is open, and the call fills in the structure that it gets, or fails.
    check(unsafe { libc::ioctl(file.as_raw_fd(), GET, attributes.as_mut_ptr()) })?;
    // SAFETY: the call has succeeded, and any bytes are valid in each field.
    let mut attributes = unsafe { attributes.assume_init() };
    attributes.flags |= HAS_EXTENT_SIZE;
    attributes.extent_size = bytes;
    // SAFETY: the file is open, and the call only reads the structure.
    check(unsafe { libc::ioctl(file.as_raw_fd(), SET, &attributes) })
}

const _: () = assert!(size_of::<Attributes>() == 28);
