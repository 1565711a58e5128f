//! Changing options of an image that exists.

use std::path::{Path, PathBuf};

use std::os::unix::ffi::OsStrExt;

use super::backing::Found;
use super::header::{Header, autoclear, compatible};
use crate::file::{FileOptions, ImageFile};
use crate::lock::Access;
use crate::{Error, Result};

/// What is to change. Nothing does by default.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AmendOptions {
    /// The name of the external data file that is stored in the image; an empty one removes it. No
    /// such file is looked for, and the present one is left alone.
    pub data_file: Option<PathBuf>,
    /// Whether the data file must stay valid as a raw image. It can be set at creation only.
    pub data_file_raw: Option<bool>,
    /// Whether a writer may postpone refcount updates.
    pub lazy_refcounts: Option<bool>,
    /// How the image file is used.
    pub files: FileOptions,
}

/// Changes options of the image at `path`: all that are asked for or, after an error, none.
///
/// Only the sectors of the header that change are written, in one write. It can be torn by a power
/// failure if they are several, as when a longer name moves what follows it.
///
/// # Errors
/// [`Error::Option`] for what the image cannot have, [`Error::HeaderFull`] for a name that is too
/// long for the cluster size; as [`Qcow2::open`](super::Qcow2::open) for an image that cannot be
/// written.
pub fn amend(path: &Path, options: &AmendOptions) -> Result<()> {
    let image = ImageFile::open(path, Access::Write, options.files)?;
    let Found { image, mut header } = Found::new(image, false)?;
    apply(&mut header, options)?;
    let new = header.encode(path)?;
    let mut old = vec![0; new.len()];
    image.read_bytes_at(&mut old, 0)?;
    let changed = |i: &usize| old[*i] != new[*i];
    let (Some(first), Some(last)) = ((0..new.len()).find(changed), (0..new.len()).rfind(changed))
    else {
        return Ok(());
    };
    let sectors = first / 512 * 512..(last / 512 + 1) * 512;
    image.write_bytes_at(&new[sectors.clone()], sectors.start as u64)?;
    image.sync()
}

fn apply(header: &mut Header, options: &AmendOptions) -> Result<()> {
    let wrong = |reason: &str| Err(Error::Option(reason.to_owned()));
    if let Some(name) = &options.data_file {
        if !header.has_data_file() {
            return wrong("data-file can only be set for images that use an external data file");
        }
        let name = name.as_os_str().as_bytes();
        header.extensions.data_file = (!name.is_empty()).then(|| name.to_vec());
    }
    match options.data_file_raw {
        Some(true) if !header.data_file_is_raw() => {
            return wrong("data-file-raw cannot be set on existing images");
        }
        Some(false) => header.autoclear_features &= !autoclear::DATA_FILE_RAW,
        _ => {}
    }
    match options.lazy_refcounts {
        Some(true) if header.version < 3 => {
            return wrong(
                "Lazy refcounts only supported with compatibility level 1.1 and above \
                 (use compat=1.1 or greater)",
            );
        }
        Some(true) => header.compatible_features |= compatible::LAZY_REFCOUNTS,
        Some(false) => header.compatible_features &= !compatible::LAZY_REFCOUNTS,
        None => {}
    }
    // As on any first write, features that this version does not know will not be kept up.
    header.autoclear_features &= autoclear::KNOWN;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::qcow2::header::tests::sample;
    use crate::qcow2::{CreateOptions, create};
    use std::fs;

    fn image(cluster_size: u64) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image");
        let options = CreateOptions {
            size: 1 << 20,
            cluster_size,
            data_file: Some(dir.path().join("data")),
            data_file_raw: true,
            ..CreateOptions::default()
        };
        create(&path, &options).unwrap();
        (dir, path)
    }

    #[test]
    fn all_or_nothing() {
        for cluster_size in [512, 65536] {
            let (_dir, path) = image(cluster_size);
            let before = fs::read(&path).unwrap();
            let name = |len| Some("x".repeat(len).into());
            let too_long = if cluster_size == 512 { 480 } else { 70_000 };
            for options in [
                AmendOptions {
                    data_file: name(too_long),
                    data_file_raw: Some(false),
                    ..AmendOptions::default()
                },
                AmendOptions::default(),
                AmendOptions {
                    data_file_raw: Some(true),
                    ..AmendOptions::default()
                },
            ] {
                let is_change = options.data_file.is_some();
                assert_eq!(amend(&path, &options).is_err(), is_change);
                assert!(fs::read(&path).unwrap() == before);
            }
            let options = AmendOptions {
                data_file: name(300),
                data_file_raw: Some(false),
                lazy_refcounts: Some(true),
                ..AmendOptions::default()
            };
            amend(&path, &options).unwrap();
            let header = Header::read(
                &*ImageFile::open(&path, Access::Read, FileOptions::default())
                    .unwrap()
                    .storage,
                &path,
            );
            let header = header.unwrap();
            assert_eq!(header.extensions.data_file, Some(vec![b'x'; 300]));
            assert!(!header.data_file_is_raw());
            // Behind the header nothing has changed.
            let cluster = cluster_size as usize;
            assert!(fs::read(&path).unwrap()[cluster..] == before[cluster..]);
            let error = amend(
                &path,
                &AmendOptions {
                    data_file_raw: Some(true),
                    ..options
                },
            );
            assert!(error.unwrap_err().to_string().contains("existing images"));
        }
    }

    #[test]
    fn what_is_not_known_is_kept() {
        let mut header = sample();
        header.unknown_fields = vec![7; 24];
        header.compatible_features = 1 << 9;
        header.extensions.unknown = vec![(77, b"seven".to_vec())];
        let before = header.clone();
        apply(
            &mut header,
            &AmendOptions {
                data_file: Some("other".into()),
                ..AmendOptions::default()
            },
        )
        .unwrap();
        assert_eq!(header.unknown_fields, before.unknown_fields);
        assert_eq!(header.compatible_features, before.compatible_features);
        assert_eq!(header.extensions.unknown, before.extensions.unknown);
        assert_eq!(header.extensions.data_file, Some(b"other".to_vec()));
    }
}
