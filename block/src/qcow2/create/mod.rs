//! Making new images.
//!
//! A new image is laid out in this order, all places being known before anything is written:
//!
//! ```text
//! header │ refcount table │ refcount blocks │ L1 table │ L2 table, its data │ L2 table, its data …
//! ```
//!
//! L2 tables are there only in a preallocated image, data only if it is internal as well.

mod layout;
mod options;

use std::os::unix::fs::FileExt;
use std::path::Path;

pub(super) use layout::Layout;
pub(super) use layout::refcount_clusters;
pub use options::{CreateOptions, DataFileReuse};

use crate::file::{FileOptions, ImageFile};
use crate::lock::Access;
use crate::new_file::NewFile;
use crate::qcow2::policy::is_same_file;
use crate::qcow2::zstd;
use crate::{Error, NewImage, Result};

/// Creates the image `path`, and its data file if there is to be one.
///
/// A file that exists is replaced, and the content of a data file that exists is lost, unless
/// [`CreateOptions::data_file_reuse`] says otherwise; but only once the new ones are complete: on an
/// error both are as they were. (A block device is overwritten in place.)
///
/// # Errors
/// [`Error::Option`] for options that do not go together, and for a data file that may not be
/// replaced, or cannot be kept; [`Error::HeaderFull`] for a name of the data file that is too long for
/// the cluster size; [`Error::Locked`] if another program uses one of the files; [`Error::Io`].
pub fn create(path: &Path, options: &CreateOptions) -> Result<()> {
    create_with(path, options, &mut |_| ())
}

/// As [`create`]; `warn` is told what could not be done and is not needed.
///
/// # Errors
/// As [`create`].
pub fn create_with(
    path: &Path,
    options: &CreateOptions,
    warn: &mut dyn FnMut(String),
) -> Result<()> {
    NewImage::qcow2_with(path, options, warn)?.commit()
}

/// The files of a new image, complete and not in their places.
#[derive(Debug)]
pub(crate) struct NewFiles {
    pub image: NewFile,
    /// The data file, if there is to be one that is new.
    pub data: Option<NewFile>,
    /// The data file that stays as it is: nobody writes to it while this is held.
    pub kept: Option<ImageFile>,
}

/// The new image `path`, and its data file if there is to be one.
pub(crate) fn begin(
    path: &Path,
    options: &CreateOptions,
    warn: &mut dyn FnMut(String),
) -> Result<NewFiles> {
    zstd::check_built(options.compression_type, path)?;
    let layout = Layout::new(options)?;
    let header = layout.header(options).encode(path)?;
    if let Some(data_file) = &options.data_file {
        check_distinct(path, data_file)?;
    }
    let image = NewFile::begin(path)?;
    let (mut kept, mut data) = (None, None);
    match (&options.data_file, options.data_file_reuse) {
        (None, _) => {}
        (Some(name), DataFileReuse::Keep) => kept = Some(keep(name, options.size)?),
        (Some(name), reuse) => {
            let file = NewFile::begin(name)?;
            // One that appears after this look is not replaced either.
            if reuse == DataFileReuse::Refuse && file.exists() {
                let name = name.display();
                return Err(Error::Option(format!(
                    "The data file '{name}' exists already"
                )));
            }
            data = Some(file);
        }
    }
    image.hint(options.hints, warn);
    if let Some(data) = &mut data {
        data.hint(options.hints, warn);
        data.with_data(layout.data_file_len(), options.preallocation)?;
    }
    image.zeroed(layout.file_len)?;
    if layout.mapped && options.data_file.is_none() {
        let len = layout.file_len - layout.first_l2;
        image.preallocate(layout.first_l2, len, options.preallocation)?;
    }
    layout
        .write_tables(image.file())
        .and_then(|()| image.file().write_all_at(&header, 0))
        .map_err(|e| Error::io(path, "write", e))?;
    Ok(NewFiles { image, data, kept })
}

/// Opens a file that is to be the data of a disk of `size` bytes as it is, and keeps others from
/// writing to it.
fn keep(name: &Path, size: u64) -> Result<ImageFile> {
    let file = ImageFile::open(name, Access::Read, FileOptions::default())?;
    let len = file.size()?;
    if len < size.next_multiple_of(512) {
        return Err(Error::Option(format!(
            "The data file '{}' has {len} bytes, and a disk of {size} bytes needs more; it is kept \
             as it is",
            name.display()
        )));
    }
    Ok(file)
}

/// Refuses a data file that is the image, or would be once both are created.
fn check_distinct(image: &Path, data_file: &Path) -> Result<()> {
    let place = |path: &Path| {
        let parent = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        Some((parent.canonicalize().ok()?, path.file_name()?.to_owned()))
    };
    let same_place = place(image).is_some_and(|image| place(data_file) == Some(image));
    if same_place || is_same_file(image, data_file) {
        return Err(Error::Option(format!(
            "'{}' is the image itself and cannot be its data file",
            data_file.display()
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Preallocation;
    use std::fs;

    fn options(size: u64) -> CreateOptions {
        CreateOptions {
            size,
            ..CreateOptions::default()
        }
    }

    #[test]
    fn refused_options_leave_no_file() {
        let dir = tempfile::tempdir().unwrap();
        let (image, data) = (dir.path().join("image"), dir.path().join("data"));
        let base = options(1 << 20);
        let with_data = CreateOptions {
            data_file: Some(data.clone()),
            ..base.clone()
        };
        let refused = [
            (
                CreateOptions {
                    cluster_size: 3000,
                    ..with_data.clone()
                },
                "Cluster size",
            ),
            (
                CreateOptions {
                    cluster_size: 4 << 20,
                    ..with_data.clone()
                },
                "Cluster size",
            ),
            (
                CreateOptions {
                    version: 2,
                    ..with_data.clone()
                },
                "External data files",
            ),
            (
                CreateOptions {
                    version: 2,
                    lazy_refcounts: true,
                    ..base.clone()
                },
                "Lazy refcounts",
            ),
            (
                CreateOptions {
                    version: 4,
                    ..base.clone()
                },
                "version",
            ),
            (
                CreateOptions {
                    data_file_raw: true,
                    ..base.clone()
                },
                "data-file-raw requires",
            ),
            (
                CreateOptions {
                    size: u64::MAX,
                    ..base.clone()
                },
                "too large",
            ),
            (
                CreateOptions {
                    size: 1 << 52,
                    ..base.clone()
                },
                "too large",
            ),
            (
                CreateOptions {
                    size: 1 << 60,
                    cluster_size: 2 << 20,
                    ..with_data
                },
                "too large",
            ),
            (
                CreateOptions {
                    data_file: Some(image.clone()),
                    ..base.clone()
                },
                "image itself",
            ),
            (
                CreateOptions {
                    data_file: Some(dir.path().join("x".repeat(600))),
                    cluster_size: 512,
                    ..base
                },
                "do not fit",
            ),
        ];
        for (options, message) in refused {
            let error = create(&image, &options).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0, "{message}");
        }
    }

    #[test]
    fn a_failure_keeps_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let (image, data) = (dir.path().join("image"), dir.path().join("data"));
        fs::write(&image, "old image").unwrap();
        fs::write(&data, "old data").unwrap();
        fs::hard_link(&image, dir.path().join("hard")).unwrap();
        std::os::unix::fs::symlink("image", dir.path().join("soft")).unwrap();
        for name in ["hard", "soft", "./image", "image", "missing/data", "."] {
            let options = CreateOptions {
                data_file: Some(dir.path().join(name)),
                ..options(1 << 20)
            };
            assert!(create(&image, &options).is_err(), "{name}");
        }
        let options = CreateOptions {
            data_file: Some(data.clone()),
            cluster_size: 2 << 20,
            preallocation: Preallocation::Falloc,
            ..options(1 << 55)
        };
        assert!(create(&image, &options).is_err());
        assert_eq!(fs::read(&image).unwrap(), b"old image");
        assert_eq!(fs::read(&data).unwrap(), b"old data");
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 4);
    }

    #[test]
    fn every_kind_can_be_created_and_opened() {
        let dir = tempfile::tempdir().unwrap();
        let image = dir.path().join("image");
        for size in [0, 100_000] {
            for cluster_bits in [9, 16, 21] {
                for (data_file, data_file_raw) in [(false, false), (true, false), (true, true)] {
                    for preallocation in [
                        Preallocation::Off,
                        Preallocation::Metadata,
                        Preallocation::Falloc,
                        Preallocation::Full,
                    ] {
                        let options = CreateOptions {
                            cluster_size: 1 << cluster_bits,
                            data_file: data_file.then(|| dir.path().join("data")),
                            data_file_raw,
                            preallocation,
                            ..options(size)
                        };
                        create(&image, &options).unwrap();
                        let report =
                            super::super::check(&image, &Default::default(), &mut |finding| {
                                panic!("{options:?}: {}", finding.text);
                            })
                            .unwrap();
                        let mapped = data_file_raw || preallocation != Preallocation::Off;
                        let expected = if mapped { report.total_clusters } else { 0 };
                        assert_eq!(report.allocated_clusters, expected, "{options:?}");
                    }
                }
            }
        }
    }

    #[test]
    fn a_success_makes_the_data_file_anew() {
        let dir = tempfile::tempdir().unwrap();
        let (image, data) = (dir.path().join("image"), dir.path().join("data"));
        fs::write(&data, [1; 5000]).unwrap();
        let options = CreateOptions {
            data_file: Some(data.clone()),
            ..options(1000)
        };
        create(&image, &options).unwrap();
        assert_eq!(fs::read(&data).unwrap(), [0; 1024]);
    }
}
