//! What depends on the cargo features that this crate is built with.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use tandem_block::qcow2::{CompressionType, CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{Error, Result};

/// Whether an operation succeeded, where the only reason not to is that there is no zstd.
fn is_done<T>(result: Result<T>) -> bool {
    match result {
        Ok(_) => true,
        Err(Error::Unsupported { feature, .. }) => {
            assert!(feature.contains("its feature zstd"), "{feature}");
            false
        }
        Err(error) => panic!("{error}"),
    }
}

/// Without zstd, images that need it are refused by name, before anything is made or changed.
#[test]
fn images_of_type_zstd_need_zstd() {
    let has_zstd = cfg!(feature = "zstd");
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let mut options = CreateOptions {
        size: 1 << 20,
        compression_type: CompressionType::Zstd,
        ..CreateOptions::default()
    };
    assert_eq!(is_done(create(&path, &options)), has_zstd);
    assert_eq!(fs::exists(&path).unwrap(), has_zstd);

    // As another program makes one: the type stands in the header, and a bit that says so.
    options.compression_type = CompressionType::Deflate;
    create(&path, &options).unwrap();
    let file = File::options().write(true).open(&path).unwrap();
    file.write_all_at(&[8], 79).unwrap();
    file.write_all_at(&[1], 104).unwrap();
    let before = fs::read(&path).unwrap();
    assert_eq!(
        is_done(Qcow2::open(&path, &OpenOptions::default())),
        has_zstd
    );
    assert!(fs::read(&path).unwrap() == before);
}
