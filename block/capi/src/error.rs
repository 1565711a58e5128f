//! Errors as C has them: a status, and a structure of the caller's for the text.

use std::ffi::c_char;
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};

use tandem_block::Error;

/// What has become of a call.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum tandem_status {
    /// It has done what it was asked to.
    Ok = 0,
    /// An argument, or a field of a structure, makes no sense.
    InvalidArgument = 1,
    /// The system has refused something: `os_error` tells how.
    Io = 2,
    /// The file does not begin as a qcow2 image does.
    NotQcow2 = 3,
    /// The image breaks the rules of its format.
    InvalidImage = 4,
    /// The image uses a feature that this library does not know, or is built without.
    Unsupported = 5,
    /// Another program uses the file, or another disk of this one.
    Locked = 6,
    /// The data file that the image names may not or cannot be used.
    DataFile = 7,
    /// The backing file that the image names may not or cannot be used, or has changed.
    BackingFile = 8,
    /// The request does not lie within the disk.
    OutOfRange = 9,
    /// The disk has been opened read-only.
    ReadOnly = 10,
    /// A sync has failed, now or earlier: what was written since the last one that succeeded may be lost.
    NotDurable = 11,
    /// The image has turned out to be damaged. It is not written any more.
    Corrupt = 12,
    /// An option or a size is not possible.
    Option = 13,
    /// Something else; the message tells what.
    Other = 14,
    /// An error in this library.
    Internal = 15,
}

/// What has gone wrong. Nothing in it is to be released.
#[repr(C)]
pub struct tandem_error {
    /// What the function has returned, too.
    pub status: tandem_status,
    /// The `errno` of a system call that has failed, or 0.
    pub os_error: i32,
    /// One sentence that names the file, the field and the value; empty on success. One that is too long
    /// is cut off at the end of a character.
    pub message: [c_char; 4088],
}

/// Why a call fails.
#[derive(Debug)]
pub(crate) enum Failure {
    Argument(String),
    Disk(Error),
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Disk(error)
    }
}

/// A [`Failure::Argument`].
pub(crate) fn argument<T>(reason: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::Argument(reason.into()))
}

/// Carries out `body`, and tells its outcome in `error` as well, unless that is null.
///
/// # Safety
/// `error` is null, or there is memory for a [`tandem_error`] of which nobody else has a part meanwhile.
pub(crate) unsafe fn report(
    error: *mut tandem_error,
    body: impl FnOnce() -> Result<(), Failure>,
) -> tandem_status {
    // What a disk has done in part when a panic unwinds, it knows itself.
    let outcome = catch_unwind(AssertUnwindSafe(body));
    let (status, os_error, message) = match outcome {
        Ok(Ok(())) => (tandem_status::Ok, 0, String::new()),
        Ok(Err(Failure::Argument(reason))) => (tandem_status::InvalidArgument, 0, reason),
        Ok(Err(Failure::Disk(error))) => (status_of(&error), os_error(&error), error.to_string()),
        Err(payload) => {
            // What a payload does when it is dropped may be to panic.
            std::mem::forget(payload);
            let reason = "internal error: a panic; close the disk and check it";
            (tandem_status::Internal, 0, reason.to_owned())
        }
    };
    if !error.is_null() {
        // SAFETY: as the caller of this function promises. Any bytes make these fields.
        unsafe {
            (&raw mut (*error).status).write(status);
            (&raw mut (*error).os_error).write(os_error);
            put_message(&raw mut (*error).message, &message);
        }
    }
    status
}

/// Writes as many characters of `text` as there is room for, and a NUL.
///
/// # Safety
/// There is memory behind `to`.
unsafe fn put_message<const N: usize>(to: *mut [c_char; N], text: &str) {
    let mut len = text.len().min(N - 1);
    while !text.is_char_boundary(len) {
        len -= 1;
    }
    let to = to.cast::<u8>();
    // SAFETY: `len` bytes and a NUL are at most N, and the caller's memory is no part of `text`.
    unsafe {
        to.copy_from_nonoverlapping(text.as_ptr(), len);
        to.add(len).write(0);
    }
}

fn status_of(error: &Error) -> tandem_status {
    match error {
        Error::Io { action: "sync", .. } | Error::SyncFailed { .. } => tandem_status::NotDurable,
        Error::Io { .. } => tandem_status::Io,
        Error::NotQcow2 { .. } => tandem_status::NotQcow2,
        Error::Invalid { .. } => tandem_status::InvalidImage,
        Error::Unsupported { .. } => tandem_status::Unsupported,
        Error::Locked { .. } => tandem_status::Locked,
        Error::DataFile { .. } => tandem_status::DataFile,
        Error::BackingFile { .. } | Error::BaseChanged { .. } => tandem_status::BackingFile,
        Error::OutOfRange { .. } => tandem_status::OutOfRange,
        Error::ReadOnly => tandem_status::ReadOnly,
        Error::Corrupt { .. } => tandem_status::Corrupt,
        Error::Option(_) | Error::HeaderFull { .. } => tandem_status::Option,
        _ => tandem_status::Other,
    }
}

fn os_error(error: &Error) -> i32 {
    match error {
        Error::Io { source, .. } => io::Error::raw_os_error(source).unwrap_or(0),
        _ => 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;
    use std::mem::MaybeUninit;

    fn outcome(body: impl FnOnce() -> Result<(), Failure>) -> (tandem_status, String) {
        let mut error = MaybeUninit::uninit();
        // SAFETY: there is memory, and `report` fills every field that is looked at.
        unsafe {
            let status = report(error.as_mut_ptr(), body);
            let error = error.assume_init();
            assert_eq!(error.status, status);
            let text = CStr::from_ptr(error.message.as_ptr());
            (status, text.to_str().unwrap().to_owned())
        }
    }

    #[test]
    fn no_panic_gets_out() {
        let (status, text) = outcome(|| panic!("a panic of this test"));
        assert_eq!(status, tandem_status::Internal);
        assert!(text.starts_with("internal error"), "{text}");
        // SAFETY: there is no structure.
        let status = unsafe { report(std::ptr::null_mut(), || Err(Error::ReadOnly.into())) };
        assert_eq!(status, tandem_status::ReadOnly);
    }

    #[test]
    fn long_messages_are_cut_at_a_character() {
        assert_eq!(outcome(|| Ok(())), (tandem_status::Ok, String::new()));
        for (text, len) in [("x".repeat(4087), 4087), ("x".repeat(4088), 4087)] {
            let (_, told) = outcome(|| argument(text.clone()));
            assert_eq!(told, text[..len]);
        }
        let (_, told) = outcome(|| argument("\u{fc}".repeat(3000)));
        assert_eq!(told, "\u{fc}".repeat(2043));
    }
}
