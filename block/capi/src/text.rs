//! Texts and flags that come from C.

use std::ffi::{CStr, OsStr, c_char};
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use crate::error::{Failure, argument};

/// The path that `text` points to, if it is not null.
///
/// # Safety
/// `text` is null, or points to a text that ends with a NUL and does not change meanwhile.
pub(crate) unsafe fn optional_path(
    text: *const c_char,
    name: &str,
) -> Result<Option<PathBuf>, Failure> {
    if text.is_null() {
        return Ok(None);
    }
    // SAFETY: the caller promises it, and the bytes are copied before this returns.
    let bytes = unsafe { CStr::from_ptr(text) }.to_bytes();
    if bytes.is_empty() {
        return argument(format!("{name} is empty"));
    }
    Ok(Some(OsStr::from_bytes(bytes).into()))
}

/// The path that `text` points to.
///
/// # Safety
/// As of [`optional_path`].
pub(crate) unsafe fn required_path(text: *const c_char, name: &str) -> Result<PathBuf, Failure> {
    // SAFETY: the caller promises it.
    match unsafe { optional_path(text, name) }? {
        Some(path) => Ok(path),
        None => argument(format!("{name} is NULL")),
    }
}

/// Refuses bits of `flags` that are not among `known`, and those reserved for later versions.
pub(crate) fn check_bits(flags: u32, known: u32, reserved: &[u64]) -> Result<(), Failure> {
    if flags & !known != 0 {
        return argument(format!("flags is {flags:#x}; known are {known:#x}"));
    }
    match reserved.iter().find(|word| **word != 0) {
        Some(word) => argument(format!("reserved holds {word:#x}; it must be all zeros")),
        None => Ok(()),
    }
}
