//! Names in the directory of a file: temporary ones, and those that change places.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::fs::{AtFlags, CWD, RenameFlags};
use rustix::io::Errno;

use crate::file::is_at;

/// Whether a file has its own name, and so what takes it away again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Placed {
    No,
    /// There was none of that name.
    Added,
    /// The old one has the temporary name.
    Exchanged,
    /// The old one is gone, on a file system that cannot exchange two names.
    Replaced,
}

/// Creates a file without a name in the directory of `target`, or with a temporary one where the
/// file system does not have such files.
pub(super) fn create_unnamed(target: &Path, mode: u32) -> io::Result<(File, Option<PathBuf>)> {
    if target.file_name().is_none() {
        return Err(io::Error::from_raw_os_error(libc::ENOENT));
    }
    let mut options = OpenOptions::new();
    options.read(true).write(true).mode(mode);
    let unnamed = options
        .clone()
        .custom_flags(libc::O_TMPFILE)
        .open(directory_of(target));
    match unnamed {
        Ok(file) => Ok((file, None)),
        // What old kernels and file systems answer differs; the second attempt will tell.
        Err(_) => {
            let create = |path: &Path| options.clone().create_new(true).open(path);
            create_beside(target, create).map(|(file, path)| (file, Some(path)))
        }
    }
}

/// Creates a file in `directory` that has no name and is gone once it is closed.
pub(crate) fn create_temporary(directory: &Path) -> io::Result<File> {
    let (file, named) = create_unnamed(&directory.join("temporary"), 0o600)?;
    if let Some(named) = named {
        std::fs::remove_file(named)?;
    }
    Ok(file)
}

/// Makes a file durable, but for its name.
#[cfg_attr(mutate, track_caller)]
pub(super) fn sync_content(file: &File) -> io::Result<()> {
    #[cfg(mutate)]
    if crate::mutate::leaves_out(std::panic::Location::caller()) {
        return Ok(());
    }
    file.sync_all()
}

/// Makes the names in a directory durable.
#[cfg_attr(mutate, track_caller)]
pub(crate) fn sync_directory(directory: &File) -> io::Result<()> {
    #[cfg(mutate)]
    if crate::mutate::leaves_out(std::panic::Location::caller()) {
        return Ok(());
    }
    match directory.sync_all() {
        // The file system does not sync directories.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => Ok(()),
        other => other,
    }
}

/// Gives the name `target` to the file `new`. If another file has it, that must be `old`.
pub(super) fn replace(new: &Path, target: &Path, old: Option<&File>) -> io::Result<Placed> {
    if let Some(old) = old {
        match exchange(new, target) {
            Ok(()) if is_at(old, new) => return Ok(Placed::Exchanged),
            Ok(()) => {
                exchange(new, target)?;
                let text = "another file has taken its place";
                return Err(io::Error::new(io::ErrorKind::ResourceBusy, text));
            }
            Err(Errno::NOENT) => {}
            Err(Errno::INVAL | Errno::NOSYS) => {
                return std::fs::rename(new, target).map(|()| Placed::Replaced);
            }
            Err(e) => return Err(e.into()),
        }
    }
    match rustix::fs::renameat_with(CWD, new, CWD, target, RenameFlags::NOREPLACE) {
        Err(Errno::INVAL | Errno::NOSYS) => std::fs::rename(new, target)?,
        renamed => renamed?,
    }
    Ok(Placed::Added)
}

pub(super) fn exchange(a: &Path, b: &Path) -> rustix::io::Result<()> {
    rustix::fs::renameat_with(CWD, a, CWD, b, RenameFlags::EXCHANGE)
}

/// Gives a temporary name in the directory of `target` to a file without one.
pub(super) fn link_beside(file: &File, target: &Path) -> io::Result<PathBuf> {
    let unnamed = format!("/proc/self/fd/{}", file.as_raw_fd());
    let link = |path: &Path| {
        Ok(rustix::fs::linkat(
            CWD,
            &unnamed,
            CWD,
            path,
            AtFlags::SYMLINK_FOLLOW,
        )?)
    };
    create_beside(target, link).map(|((), path)| path)
}

/// Calls `create` with names in the directory of `target` until one is not in use.
pub(super) fn create_beside<T>(
    target: &Path,
    create: impl Fn(&Path) -> io::Result<T>,
) -> io::Result<(T, PathBuf)> {
    static COUNTER: AtomicU32 = AtomicU32::new(0);
    loop {
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = target.with_file_name(format!(".tandem-{}-{number}", std::process::id()));
        match create(&path) {
            Err(e) if e.kind() == io::ErrorKind::AlreadyExists => {}
            Err(e) => return Err(e),
            Ok(created) => return Ok((created, path)),
        }
    }
}

pub(crate) fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}
