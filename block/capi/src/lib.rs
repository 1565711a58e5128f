//! `tandem-block` for programs in C. The functions are described in `include/tandem.h`, which is made of
//! this crate by cbindgen (`tests/header.rs`).
//!
//! No panic leaves a function, and no state is kept but that of the disks.
#![deny(missing_docs)]
#![allow(non_camel_case_types, reason = "the names are those of C")]
#![allow(clippy::missing_safety_doc, reason = "told once, in the header")]

mod create;
mod disk;
mod error;
mod text;

pub use create::{tandem_create, tandem_create_options};
pub use disk::{
    tandem_close, tandem_discard, tandem_disk, tandem_flush, tandem_get_info, tandem_info,
    tandem_open, tandem_open_options, tandem_read, tandem_resize, tandem_write,
    tandem_write_zeroes,
};
pub use error::{tandem_error, tandem_status};

/// The image is in qcow2 format.
pub const TANDEM_FORMAT_QCOW2: u32 = 0;
/// The file or block device is the disk.
pub const TANDEM_FORMAT_RAW: u32 = 1;

/// Open: no file is ever written.
pub const TANDEM_OPEN_READ_ONLY: u32 = 1;
/// Open: the names in the image, and in those below it, are followed to any file. Otherwise they are
/// only followed to files in the image's own directory and below it.
pub const TANDEM_OPEN_FOLLOW_ANYWHERE: u32 = 2;
/// Open: an image that names another file is refused, but for a data file that the options name.
pub const TANDEM_OPEN_FOLLOW_NOTHING: u32 = 4;
/// Open: the files are not locked; somebody else sees to it that the disk has one user.
pub const TANDEM_OPEN_NO_LOCKS: u32 = 8;
/// Open: data goes past the host's page cache (O_DIRECT).
pub const TANDEM_OPEN_DIRECT: u32 = 16;
/// Open: a write is durable when it completes, without a flush.
pub const TANDEM_OPEN_WRITE_THROUGH: u32 = 32;

/// Create: the data file is a valid raw image of the disk at all times.
pub const TANDEM_CREATE_DATA_FILE_RAW: u32 = 1;
/// Create: a data file that is there becomes the data of the disk as it is. For raw data files.
pub const TANDEM_CREATE_KEEP_DATA_FILE: u32 = 2;

/// Version of this library, such as "0.1.0".
#[unsafe(no_mangle)]
pub extern "C" fn tandem_version() -> *const std::ffi::c_char {
    concat!(env!("CARGO_PKG_VERSION"), "\0").as_ptr().cast()
}
