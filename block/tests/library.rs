//! What users of this crate rely on, beside what disks do.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

use std::fmt::Debug;
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

use tandem_block::qcow2::{
    Base, BitmapEditor, CompressionType, CreateOptions, OpenOptions, Qcow2, create,
};
use tandem_block::{Backup, Error, ImageFormat, LiveDisk, Raw, Result};

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

/// Disks go from thread to thread, and a test of the user's can show what it has opened by mistake.
#[test]
fn disks_can_be_shared_and_shown() {
    fn is_shared<T: Send + Sync>() {}
    fn is_shown<T: Debug>() {}
    is_shared::<Backup>();
    is_shared::<Error>();
    is_shared::<LiveDisk>();
    is_shown::<BitmapEditor>();
    is_shown::<LiveDisk>();
    is_shown::<Raw>();

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    create(&path, &CreateOptions::default()).unwrap();
    let base = Base::open(&path, ImageFormat::Qcow2, &OpenOptions::default());
    assert!(format!("{base:?}").contains("/image"));
    drop(base);
    let disk = Qcow2::open(&path, &OpenOptions::default());
    assert!(format!("{disk:?}").contains("/image"));
}
