//! Making images.

use std::ffi::c_char;

use tandem_block::qcow2::{self, CreateOptions, DataFileReuse};
use tandem_block::{ImageFormat, Preallocation, Raw};

use crate::error::{Failure, argument, report};
use crate::text::{check_bits, optional_path, required_path};
use crate::{
    TANDEM_CREATE_DATA_FILE_RAW, TANDEM_CREATE_KEEP_DATA_FILE, TANDEM_FORMAT_QCOW2,
    TANDEM_FORMAT_RAW, tandem_error, tandem_status,
};

/// What a new image is to be like. What is zero is as usual.
#[repr(C)]
pub struct tandem_create_options {
    /// TANDEM_FORMAT_QCOW2 or TANDEM_FORMAT_RAW. A raw disk has none of what follows.
    pub format: u32,
    /// TANDEM_CREATE_..., or'ed together.
    pub flags: u32,
    /// Bytes in a cluster, or 0 for 64 KiB.
    pub cluster_size: u64,
    /// The external data file, as it will stand in the image, or NULL for an image that has its data
    /// itself.
    pub data_file: *const c_char,
    /// The backing file, as it will stand in the image, or NULL. It is not opened.
    pub backing_file: *const c_char,
    /// Format of the backing file, if there is one.
    pub backing_format: u32,
    /// Must be 0.
    pub reserved32: u32,
    /// Must be 0.
    pub reserved: [u64; 4],
}

/// Makes an image for a disk of `size` bytes at `path`. A file that is there is replaced once the new one
/// is complete. `options` may be NULL.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn tandem_create(
    path: *const c_char,
    size: u64,
    options: *const tandem_create_options,
    error: *mut tandem_error,
) -> tandem_status {
    let body = || {
        // SAFETY: the header asks for what these functions do.
        let (path, options) = unsafe {
            (
                required_path(path, "path")?,
                options.as_ref().map(|o| create_options(o)).transpose()?,
            )
        };
        match options {
            Some(None) => Raw::create(&path, size, Preallocation::Off)?,
            Some(Some(options)) => qcow2::create(&path, &CreateOptions { size, ..options })?,
            None => {
                let options = CreateOptions::default();
                qcow2::create(&path, &CreateOptions { size, ..options })?;
            }
        }
        Ok(())
    };
    // SAFETY: the header asks for what this function does.
    unsafe { report(error, body) }
}

/// The options of a qcow2 image, or `None` for a raw disk.
///
/// # Safety
/// The texts are as [`optional_path`] wants them.
unsafe fn create_options(from: &tandem_create_options) -> Result<Option<CreateOptions>, Failure> {
    let known = TANDEM_CREATE_DATA_FILE_RAW | TANDEM_CREATE_KEEP_DATA_FILE;
    check_bits(from.flags, known, &from.reserved)?;
    check_bits(from.reserved32, 0, &[])?;
    // SAFETY: the caller promises it.
    let (data_file, backing_file) = unsafe {
        (
            optional_path(from.data_file, "data_file")?,
            optional_path(from.backing_file, "backing_file")?,
        )
    };
    let backing_format = match from.backing_format {
        TANDEM_FORMAT_QCOW2 => ImageFormat::Qcow2,
        TANDEM_FORMAT_RAW => ImageFormat::Raw,
        other => return argument(format!("backing_format is {other}, which is no format")),
    };
    let mut options = CreateOptions {
        data_file_raw: from.flags & TANDEM_CREATE_DATA_FILE_RAW != 0,
        data_file,
        backing_format: backing_file.is_some().then_some(backing_format),
        backing_file,
        ..CreateOptions::default()
    };
    if from.cluster_size != 0 {
        options.cluster_size = from.cluster_size;
    }
    if from.flags & TANDEM_CREATE_KEEP_DATA_FILE != 0 {
        options.data_file_reuse = DataFileReuse::Keep;
    }
    match from.format {
        TANDEM_FORMAT_QCOW2 => Ok(Some(options)),
        TANDEM_FORMAT_RAW if options == CreateOptions::default() => Ok(None),
        TANDEM_FORMAT_RAW => argument("format is raw, which has no other options"),
        other => argument(format!("format is {other}, which is no format")),
    }
}
