//! Which files an image may name.
//!
//! An image is untrusted input: whoever wrote it could name any file of the host as its data file
//! and read or overwrite it through the guest's disk. A stored name is therefore followed only to
//! a file inside the image's own directory tree, symbolic links resolved. Everything else needs
//! the caller's word.

use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags, ResolveFlags};

use crate::error::system_text;
use crate::names::named;
use crate::{Error, FileStorage, Result};

/// Where names that are stored in an image may lead.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Follow {
    /// Nowhere: an image that names another file is refused, unless the caller says which it is.
    Nothing,
    /// To files in the directory of the image that has the name, and below it.
    #[default]
    ImageDirectory,
    /// To any local file that the process can open.
    Anywhere,
}

named!(Follow: ImageDirectory = "image-directory", Anywhere = "anywhere", Nothing = "nothing");

/// Attempts to open a file while others rename what leads there.
const ATTEMPTS: usize = 16;

/// Opens the backing file of `image`, to which its name leads.
///
/// # Errors
/// The reason why it may not or cannot be opened.
pub(super) fn open_backing_file(
    image: &Path,
    path: &Path,
    follow: Follow,
    read_only: bool,
) -> Result<File> {
    let failed = |e: io::Error| {
        let shown = path.display().to_string().escape_debug().to_string();
        Error::Option(format!("Could not open '{shown}': {}", system_text(&e)))
    };
    let outside = |reason: &str| {
        let shown = path.display().to_string().escape_debug().to_string();
        Error::Option(format!("'{shown}' {reason} (follow=anywhere allows it)"))
    };
    match follow {
        Follow::Nothing => Err(outside("may not be followed")),
        Follow::Anywhere => FileStorage::open_file(path, read_only).map_err(failed),
        Follow::ImageDirectory => match open_in_directory_of(image, path, read_only) {
            Err(e) if e.raw_os_error() == Some(libc::EXDEV) => {
                Err(outside("lies outside the image's directory"))
            }
            opened => opened.map_err(failed),
        },
    }
}

/// Opens `path` if it leads to something in the directory of `image` or below; `EXDEV` if not.
fn open_in_directory_of(image: &Path, path: &Path, read_only: bool) -> io::Result<File> {
    let directory = match image.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let relative = match path.strip_prefix(directory) {
        Ok(relative) => relative,
        // An absolute name in an image whose own path is relative, or is spelled another way.
        Err(_) => {
            let outside = || io::Error::from_raw_os_error(libc::EXDEV);
            if path.is_absolute() {
                path.strip_prefix(directory.canonicalize()?)
                    .map_err(|_| outside())?
            } else {
                path
            }
        }
    };
    open_beneath(directory, relative, read_only)
}

/// Opens the data file `path` that [`resolve_data_file`] has found for `image`, unless it has become
/// another one outside the image's directory since and `follow` forbids that.
pub(crate) fn open_data_file(
    image: &Path,
    path: &Path,
    follow: Follow,
    read_only: bool,
) -> Result<File> {
    let failed = |e| Error::io(path, "open", e);
    if follow == Follow::Anywhere {
        return FileStorage::open_file(path, read_only).map_err(failed);
    }
    let directory = directory_of(image)?;
    let outside = |_| failed(io::Error::from_raw_os_error(libc::EXDEV));
    let relative = path.strip_prefix(&directory).map_err(outside)?;
    open_beneath(&directory, relative, read_only).map_err(failed)
}

/// Opens `relative`, which is relative to `directory`, if it leads to something in there or below;
/// `EXDEV` if not. The system resolves it, so that nobody who changes links or directories meanwhile
/// can lead it outside.
fn open_beneath(directory: &Path, relative: &Path, read_only: bool) -> io::Result<File> {
    let root = File::open(directory)?;
    let relative = if relative.as_os_str().is_empty() {
        Path::new(".")
    } else {
        relative
    };
    let access = if read_only {
        OFlags::RDONLY
    } else {
        OFlags::RDWR
    };
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS;
    for _ in 0..ATTEMPTS {
        match rustix::fs::openat2(&root, relative, flags, Mode::empty(), resolve) {
            Err(rustix::io::Errno::AGAIN) => {}
            opened => return Ok(opened?.into()),
        }
    }
    Err(io::ErrorKind::ResourceBusy.into())
}

/// The file meant by the data-file name `name` that is stored in `image`.
///
/// A name is a literal local path: no `json:`, no protocol. A relative name may be meant relative
/// to the image's directory or, as QEMU takes it, to the current directory; the file that exists
/// and is allowed counts.
///
/// # Errors
/// [`Error::DataFile`] if no candidate exists, if the one that exists is not inside the image's
/// directory tree, or if both exist and are different files.
pub(crate) fn resolve_data_file(image: &Path, name: &[u8], follow: Follow) -> Result<PathBuf> {
    let refused = |reason: String| Err(data_file_error(image, reason));
    let shown = String::from_utf8_lossy(name).escape_debug().to_string();
    let root = directory_of(image)?;
    match &find_candidates(image, &root, name)?[..] {
        [one, other] => refused(format!(
            "the data-file name '{shown}' in the image means '{}' or '{}', which both exist",
            one.display(),
            other.display()
        )),
        [path, ..] if follow == Follow::Anywhere => Ok(path.clone()),
        [path, ..] if follow == Follow::ImageDirectory && path.starts_with(&root) => {
            Ok(path.clone())
        }
        [path, ..] if follow == Follow::Nothing => refused(format!(
            "its data file '{shown}' is '{}', which may not be followed",
            path.display()
        )),
        found => refused(format!(
            "its data file '{shown}' is '{}', outside the image's directory '{}'",
            found.first().unwrap_or(&root).display(),
            root.display()
        )),
    }
}

/// The one or two different files that `name` may mean, symbolic links resolved.
fn find_candidates(image: &Path, root: &Path, name: &[u8]) -> Result<Vec<PathBuf>> {
    let name = Path::new(OsStr::from_bytes(name));
    let mut found: Vec<PathBuf> = Vec::new();
    let mut missing = None;
    // An empty name joined to a directory would be the directory.
    let candidates = if name.as_os_str().is_empty() {
        vec![name.to_owned()]
    } else {
        vec![root.join(name), name.to_owned()]
    };
    for candidate in candidates {
        match candidate.canonicalize() {
            Ok(path) if found.contains(&path) => {}
            Ok(path) => found.push(path),
            Err(e) => missing = missing.or(Some(e)),
        }
    }
    match missing {
        Some(e) if found.is_empty() => {
            let shown = String::from_utf8_lossy(name.as_os_str().as_bytes());
            let reason = format!("Could not open '{shown}': {}", system_text(&e));
            Err(data_file_error(image, reason))
        }
        _ => Ok(found),
    }
}

fn data_file_error(image: &Path, reason: impl Into<String>) -> Error {
    Error::DataFile {
        file: image.to_owned(),
        reason: reason.into(),
    }
}

/// Whether two paths lead to one file, be it through symbolic or hard links. False if one of them
/// does not exist.
pub(crate) fn is_same_file(a: &Path, b: &Path) -> bool {
    match (a.metadata(), b.metadata()) {
        (Ok(a), Ok(b)) => a.dev() == b.dev() && a.ino() == b.ino(),
        _ => false,
    }
}

/// The directory that holds `image` itself, wherever symbolic links to it may lie.
fn directory_of(image: &Path) -> Result<PathBuf> {
    let path = image
        .canonicalize()
        .map_err(|e| Error::io(image, "open", e))?;
    Ok(path.parent().unwrap_or(&path).to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    /// A directory with `vm/disk.qcow2`, `vm/sub/in`, and `out` beside `vm`.
    fn tree() -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("vm/sub")).unwrap();
        for file in ["vm/disk.qcow2", "vm/sub/in", "out"] {
            fs::write(dir.path().join(file), "").unwrap();
        }
        let image = dir.path().join("vm/disk.qcow2");
        (dir, image)
    }

    fn resolve(image: &Path, name: impl AsRef<OsStr>) -> std::result::Result<PathBuf, String> {
        let name = name.as_ref().as_bytes();
        resolve_data_file(image, name, Follow::ImageDirectory).map_err(|e| e.to_string())
    }

    /// What a name meant when it was looked at may have become something else when it is opened.
    #[test]
    fn what_changes_meanwhile_leads_nowhere_else() {
        let (dir, image) = tree();
        let sub = dir.path().join("vm/sub");
        let found = resolve(&image, "sub/in").unwrap();
        let open = || open_data_file(&image, &found, Follow::ImageDirectory, true);
        open().unwrap();
        // The file becomes a link, and then its directory does.
        fs::remove_file(sub.join("in")).unwrap();
        symlink("../../out", sub.join("in")).unwrap();
        open().unwrap_err();
        fs::remove_dir_all(&sub).unwrap();
        fs::create_dir(dir.path().join("other")).unwrap();
        fs::write(dir.path().join("other/in"), "").unwrap();
        symlink("../other", &sub).unwrap();
        open().unwrap_err();
        assert!(File::open(&found).is_ok(), "the system would follow it");
    }

    #[test]
    fn inside_the_tree_is_followed() {
        let (dir, image) = tree();
        let inside = dir.path().join("vm/sub/in").canonicalize().unwrap();
        symlink("sub/in", dir.path().join("vm/link")).unwrap();
        symlink("vm/disk.qcow2", dir.path().join("image-link")).unwrap();
        for name in ["sub/in", "./sub/../sub/in", "link"] {
            assert_eq!(resolve(&image, name).unwrap(), inside, "{name}");
            assert_eq!(
                resolve(&dir.path().join("image-link"), name).unwrap(),
                inside,
                "{name}"
            );
        }
        assert_eq!(
            resolve(&image, dir.path().join("vm/sub/in")).unwrap(),
            inside
        );
    }

    #[test]
    fn outside_the_tree_needs_the_callers_word() {
        let (dir, image) = tree();
        symlink("../out", dir.path().join("vm/link")).unwrap();
        let absolute = dir.path().join("out");
        for name in [
            OsStr::new("../out"),
            OsStr::new("link"),
            absolute.as_os_str(),
        ] {
            let error = resolve(&image, name).unwrap_err();
            assert!(error.contains("outside the image's directory"), "{error}");
            assert!(error.contains("data-file=PATH"), "{error}");
        }
        // "vm" is a prefix of the name, not a directory above the file.
        fs::create_dir(dir.path().join("vm2")).unwrap();
        fs::write(dir.path().join("vm2/data"), "").unwrap();
        assert!(resolve(&image, "../vm2/data").is_err());
    }

    #[test]
    fn names_are_literal() {
        let (dir, image) = tree();
        for name in [
            "json:{\"driver\":\"null-co\"}",
            "nbd:host",
            "",
            "a\0b",
            "gone",
        ] {
            assert!(resolve(&image, name).is_err(), "{name}");
        }
        fs::write(dir.path().join("vm/file:odd"), "").unwrap();
        assert!(resolve(&image, "file:odd").is_ok());
        assert_eq!(
            resolve(&image, "gone").unwrap_err(),
            format!(
                "'{}': Could not open 'gone': No such file or directory (data-file=PATH decides \
                 which file is used)",
                image.display()
            )
        );
    }

    #[test]
    fn two_different_candidates_are_refused() {
        let (dir, image) = tree();
        let in_current_directory = Path::new("Cargo.toml");
        assert!(in_current_directory.exists());
        let outside = resolve(&image, "Cargo.toml").unwrap_err();
        assert!(
            outside.contains("outside the image's directory"),
            "{outside}"
        );
        fs::write(dir.path().join("vm/Cargo.toml"), "").unwrap();
        let ambiguous = resolve(&image, "Cargo.toml").unwrap_err();
        assert!(ambiguous.contains("which both exist"), "{ambiguous}");
    }
}
