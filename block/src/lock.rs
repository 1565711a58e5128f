//! Locks that keep other programs off a file in use: QEMU's, byte for byte.
//!
//! Each byte stands for a permission, and to hold it means to have a read lock on it:
//!
//! | byte | the holder |
//! | --- | --- |
//! | 100 | reads and relies on what it has read (`consistent read`) |
//! | 101 | writes (`write`) |
//! | 103 | changes the length (`resize`) |
//! | 201 | does not share `write`: nobody else may hold byte 101 |
//! | 203 | does not share `resize`: nobody else may hold byte 103 |
//!
//! A program takes its locks first and then looks whether another has one that contradicts them. So of
//! two that come at once, at least one sees the other. The locks belong to the open file: two disks
//! in one process keep each other off as well.

use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::path::Path;

use crate::names::named;
use crate::{Error, Result};

/// Whether the files of a disk are locked against other programs, QEMU's among them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Locking {
    /// A disk that is written keeps all others off, and one that is read keeps writers off.
    #[default]
    On,
    /// For a disk that is read: others may write meanwhile, and what is read may be inconsistent.
    ForceShare,
    /// No locks are taken or looked at: somebody else sees to it that the disk has one user.
    Off,
}

named!(Locking: On = "on", ForceShare = "force-share", Off = "off");

/// What a file is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    /// To write an image or its data file.
    Write,
    /// To read an image or its data file, or anything as a backing file.
    Read,
    /// To write a raw disk.
    WriteRaw,
    /// To read a raw disk.
    ReadRaw,
    /// To look at a header.
    Look,
    /// To put a new file in its place.
    Replace,
}

/// A permission, whose number is its place behind [`HELD`] and [`NOT_SHARED`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Permission {
    ConsistentRead = 0,
    Write = 1,
    Resize = 3,
}

/// First byte of the permissions in use.
const HELD: i64 = 100;
/// First byte of the permissions that nobody else may use.
const NOT_SHARED: i64 = 200;

impl Access {
    /// To write a file of a disk, or to read it.
    pub fn new(read_only: bool) -> Self {
        if read_only { Self::Read } else { Self::Write }
    }

    /// To write a raw disk, or to read it.
    pub fn raw(read_only: bool) -> Self {
        if read_only {
            Self::ReadRaw
        } else {
            Self::WriteRaw
        }
    }

    pub fn is_read_only(self) -> bool {
        matches!(self, Self::Read | Self::ReadRaw | Self::Look)
    }

    /// Permissions in use.
    fn held(self) -> &'static [Permission] {
        use Permission::{ConsistentRead, Resize, Write};
        match self {
            Self::Write | Self::WriteRaw => &[ConsistentRead, Write, Resize],
            Self::Read | Self::ReadRaw => &[ConsistentRead],
            Self::Look => &[],
            Self::Replace => &[Write, Resize],
        }
    }

    /// Permissions that nobody else may use. A raw disk has no metadata that depends on its length.
    fn not_shared(self) -> &'static [Permission] {
        use Permission::{Resize, Write};
        match self {
            Self::WriteRaw | Self::ReadRaw => &[Write],
            _ => &[Write, Resize],
        }
    }
}

impl Permission {
    /// What QEMU calls it.
    fn name(self) -> &'static str {
        match self {
            Self::ConsistentRead => "consistent read",
            Self::Write => "write",
            Self::Resize => "resize",
        }
    }
}

/// Locks `file`, which is called `path`, for `access`, until [`release`] is called.
///
/// Where the system or the file system has no such locks, nothing is locked.
///
/// # Errors
/// [`Error::Locked`] if another program uses the file in a way that contradicts `access`;
/// [`Error::Option`] for a writer with [`Locking::ForceShare`]; [`Error::Io`].
pub(crate) fn acquire(
    file: impl AsFd,
    path: &Path,
    access: Access,
    locking: Locking,
) -> Result<()> {
    let file = file.as_fd();
    let acquired = try_acquire(file, path, access, locking);
    if acquired.is_err() {
        release(file);
    }
    acquired
}

/// Gives up all locks on `file`.
///
/// To close it is not enough: a process that another thread is starting has it open as well for a
/// moment.
pub(crate) fn release(file: impl AsFd) {
    // It has no locks if this fails.
    let _ = byte_lock::release(file.as_fd(), HELD..NOT_SHARED + (NOT_SHARED - HELD));
}

/// Makes the locks of who has written to `file` those of who reads it from now on, as an image or below
/// one. At no moment may anybody else write.
///
/// # Errors
/// Those of [`acquire`]; the file is locked as before.
pub(crate) fn downgrade(file: impl AsFd, path: &Path) -> Result<()> {
    let file = file.as_fd();
    try_acquire(file, path, Access::Read, Locking::On)?;
    let writing = HELD + Permission::Write as i64..HELD + Permission::Resize as i64 + 1;
    byte_lock::release(file, writing).map_err(|e| Error::io(path, "lock", e))
}

fn try_acquire(file: BorrowedFd<'_>, path: &Path, access: Access, locking: Locking) -> Result<()> {
    let held = access.held();
    let not_shared = match locking {
        Locking::Off => return Ok(()),
        Locking::On => access.not_shared(),
        Locking::ForceShare if access.is_read_only() => &[],
        Locking::ForceShare => {
            let reason = "force-share=on can only be used with read-only images";
            return Err(Error::Option(reason.to_owned()));
        }
    };
    let at = |base| move |permission: &Permission| base + *permission as i64;
    for byte in held
        .iter()
        .map(at(HELD))
        .chain(not_shared.iter().map(at(NOT_SHARED)))
    {
        match byte_lock::share(file, byte) {
            Err(e) if is_unsupported(&e) => return Ok(()),
            result => result.map_err(|e| Error::io(path, "lock", e))?,
        }
    }
    for (base, permissions) in [(NOT_SHARED, held), (HELD, not_shared)] {
        for permission in permissions {
            let taken = byte_lock::is_taken(file, at(base)(permission));
            if taken.map_err(|e| Error::io(path, "lock", e))? {
                return Err(Error::Locked {
                    file: path.to_owned(),
                    permission: permission.name(),
                    shared: base == HELD,
                });
            }
        }
    }
    Ok(())
}

/// Whether `error` says that there are no such locks, rather than that they fail here and now.
fn is_unsupported(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(libc::EINVAL | libc::ENOSYS | libc::EOPNOTSUPP | libc::ENOTTY)
    )
}

/// Locks of single bytes that belong to the open file ("open file description locks").
mod byte_lock {
    use super::*;

    /// Takes a read lock.
    pub fn share(file: BorrowedFd<'_>, byte: i64) -> io::Result<()> {
        call(file, libc::F_OFD_SETLK, libc::F_RDLCK, byte..byte + 1).map(drop)
    }

    /// Whether anybody else has a lock.
    pub fn is_taken(file: BorrowedFd<'_>, byte: i64) -> io::Result<bool> {
        let found = call(file, libc::F_OFD_GETLK, libc::F_WRLCK, byte..byte + 1)?;
        Ok(i32::from(found.l_type) != libc::F_UNLCK)
    }

    /// Gives up all locks in `bytes`.
    pub fn release(file: BorrowedFd<'_>, bytes: Range<i64>) -> io::Result<()> {
        call(file, libc::F_OFD_SETLK, libc::F_UNLCK, bytes).map(drop)
    }

    fn call(
        file: BorrowedFd<'_>,
        command: i32,
        kind: i32,
        bytes: Range<i64>,
    ) -> io::Result<libc::flock> {
        let mut lock = libc::flock {
            l_type: kind as i16,
            l_whence: libc::SEEK_SET as i16,
            l_start: bytes.start,
            l_len: bytes.end - bytes.start,
            // The system wants a zero for this kind of lock.
            l_pid: 0,
        };
        // SAFETY: the descriptor is open for as long as `file` is borrowed, both commands take a
        // pointer to a `flock`, and `lock` is one that lives, unshared, during the call.
        let result = unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) };
        if result == -1 {
            return Err(io::Error::last_os_error());
        }
        Ok(lock)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::File;

    /// Whether a second access is granted while the first goes on.
    fn together(first: Access, second: (Access, Locking)) -> Result<()> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (one, other) = (open(), open());
        acquire(&one, &path, first, Locking::On).unwrap();
        acquire(&other, &path, second.0, second.1)
    }

    #[test]
    fn released_although_the_file_is_still_open() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let mut storage = crate::FileStorage::open(&path, false).unwrap();
        storage.lock(&path, Access::Write, Locking::On).unwrap();
        let as_in_a_child = storage.file().try_clone().unwrap();
        let refused = crate::Raw::open(&path, false).map(drop).unwrap_err();
        assert!(matches!(refused, Error::Locked { .. }), "{refused}");
        drop(storage);
        crate::Raw::open(&path, false).unwrap();
        drop(as_in_a_child);
    }

    #[test]
    fn a_failure_leaves_no_locks() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        let (one, other, third) = (open(), open(), open());
        acquire(&one, &path, Access::Read, Locking::On).unwrap();
        acquire(&other, &path, Access::Write, Locking::On).unwrap_err();
        acquire(&third, &path, Access::Read, Locking::On).unwrap();
    }

    #[test]
    fn a_writer_that_becomes_a_reader_keeps_writers_off() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        std::fs::write(&path, "").unwrap();
        let open = || File::options().read(true).write(true).open(&path).unwrap();
        for access in [Access::Write, Access::WriteRaw] {
            let (one, other) = (open(), open());
            acquire(&one, &path, access, Locking::On).unwrap();
            acquire(&other, &path, Access::Read, Locking::On).unwrap_err();
            downgrade(&one, &path).unwrap();
            acquire(&other, &path, Access::Read, Locking::On).unwrap();
            release(&other);
            for refused in [Access::Write, Access::WriteRaw, Access::Replace] {
                acquire(&other, &path, refused, Locking::On).unwrap_err();
            }
            release(&one);
            acquire(&other, &path, Access::Write, Locking::On).unwrap();
        }
    }

    #[test]
    fn who_keeps_whom_off() {
        use Access::{Look, Read, ReadRaw, Replace, Write, WriteRaw};
        let all = [Write, Read, WriteRaw, ReadRaw, Look, Replace];
        let writes = |access| matches!(access, Write | WriteRaw | Replace);
        for first in all {
            for second in all {
                let both = together(first, (second, Locking::On));
                let expected = writes(first) || writes(second);
                assert_eq!(both.is_err(), expected, "{first:?}, then {second:?}");
                together(first, (second, Locking::Off)).unwrap();
                let share = together(first, (second, Locking::ForceShare));
                assert_eq!(share.is_err(), writes(second), "{first:?}, then {second:?}");
            }
        }
    }

    #[test]
    fn says_what_is_in_the_way_as_qemu_does() {
        let reason = |first, second| {
            let error = together(first, (second, Locking::On)).unwrap_err();
            assert!(matches!(error, Error::Locked { .. }), "{error}");
            error.reason()
        };
        let text = reason(Access::Write, Access::Write);
        assert!(
            text.starts_with("Failed to get \"write\" lock\nIs another process using the image ["),
            "{text}"
        );
        let text = reason(Access::Write, Access::Read);
        assert!(
            text.starts_with("Failed to get shared \"write\" lock\n"),
            "{text}"
        );
    }
}
