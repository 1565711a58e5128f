//! The images below an image, as their headers tell.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use tandem_block::qcow2::{Info, backing_path};
use tandem_block::{ImageFormat, Locking};

/// Most images that are looked at.
const MAX_DEPTH: usize = 256;

/// A backing file.
#[derive(Debug)]
pub struct Below {
    /// The image that names it.
    pub above: PathBuf,
    /// Its name there.
    pub name: Vec<u8>,
    /// Its format, if that is one that there is.
    pub format: Option<ImageFormat>,
    /// What its name leads to.
    pub path: PathBuf,
}

/// What is below the image at `path`, from the top down, as far as it can be read.
pub fn below(path: &Path) -> Vec<Below> {
    let mut chain: Vec<Below> = Vec::new();
    let mut next = Some(path.to_owned());
    while let Some(above) = next.take().filter(|_| chain.len() < MAX_DEPTH) {
        let Ok(info) = Info::read_with(&above, Locking::Off) else {
            break;
        };
        let Some(name) = info.backing_file else {
            break;
        };
        let Ok(path) = backing_path(&above, &name) else {
            break;
        };
        let format = info.backing_format.as_deref();
        let format = format.and_then(ImageFormat::from_header);
        next = (format == Some(ImageFormat::Qcow2)).then(|| path.clone());
        chain.push(Below {
            above,
            name,
            format,
            path,
        });
    }
    chain
}

/// Which of `chain` the user means by `name`: a path that is relative to the image above, like the
/// name there.
pub fn find(chain: &[Below], name: &OsStr) -> Option<usize> {
    chain.iter().position(|below| {
        let meant = backing_path(&below.above, name.as_bytes());
        below.name == name.as_bytes() || meant.is_ok_and(|meant| is_same(&meant, &below.path))
    })
}

/// Whether two paths lead to one file.
pub fn is_same(one: &Path, other: &Path) -> bool {
    match (one.canonicalize(), other.canonicalize()) {
        (Ok(one), Ok(other)) => one == other,
        _ => false,
    }
}
