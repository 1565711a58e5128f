//! What can go wrong, in words that name the file, the field and the value.

use std::io;
use std::path::{Path, PathBuf};

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// Why an operation on a disk or an image failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A system call on a file failed.
    #[error("could not {action} '{}'{}: {source}", file.display(), at(*offset))]
    Io {
        /// The file, as it was named when it was opened.
        file: PathBuf,
        /// What was being done, as a verb: "open", "read", "sync".
        action: &'static str,
        /// Position in the file in bytes, where the operation has one.
        offset: Option<u64>,
        /// The system's answer.
        source: io::Error,
    },

    /// The file does not begin with a qcow2 header.
    #[error(
        "'{}' is not in qcow2 format (magic is {found:#010x}, expected 0x514649fb)",
        file.display()
    )]
    NotQcow2 {
        /// The file.
        file: PathBuf,
        /// Its first four bytes, big-endian.
        found: u32,
    },

    /// A field of the image has a value that the format forbids.
    #[error("'{}': {reason} ({field} is {value:#x})", file.display())]
    Invalid {
        /// The image.
        file: PathBuf,
        /// Name of the field in the qcow2 specification.
        field: &'static str,
        /// Value of the field.
        value: u64,
        /// What is wrong, in the words that `qemu-img` uses where it has any.
        reason: String,
    },

    /// The image uses a feature that this version does not implement.
    #[error("'{}': Unsupported qcow2 feature(s): {feature}", file.display())]
    Unsupported {
        /// The image.
        file: PathBuf,
        /// Name of the feature.
        feature: String,
    },

    /// Extensions and names take more space than the header's cluster has.
    #[error(
        "'{}': the names and extensions do not fit into the header's cluster of {cluster_size} \
         bytes; use shorter names or a larger cluster size",
        file.display()
    )]
    HeaderFull {
        /// The image.
        file: PathBuf,
        /// Size of a cluster in bytes.
        cluster_size: u64,
    },

    /// Another program uses the file, or another disk in this one.
    #[error(
        "'{}': failed to get {}\"{permission}\" lock; is another process using it?",
        file.display(),
        if *shared { "shared " } else { "" }
    )]
    Locked {
        /// The file.
        file: PathBuf,
        /// Name of the permission in question: "write", "resize" or "consistent read".
        permission: &'static str,
        /// Whether the other one has the permission, which could not be shared with it here.
        /// Otherwise it is the other one who does not share it.
        shared: bool,
    },

    /// The external data file named in an image may not or cannot be used.
    #[error("'{}': {reason} (data-file=PATH decides which file is used)", file.display())]
    DataFile {
        /// The image that names the data file.
        file: PathBuf,
        /// What is wrong, in the words that `qemu-img` uses where it has any.
        reason: String,
    },

    /// The backing file named in an image may not or cannot be used.
    #[error("'{}': Could not open backing file: {reason}", file.display())]
    BackingFile {
        /// The image that names the backing file.
        file: PathBuf,
        /// What is wrong, in the words that `qemu-img` uses where it has any.
        reason: String,
    },

    /// The backing file of an image has been written since the image kept its stamp.
    #[error(
        "'{}': its backing file '{}' has changed ({difference}), so what the image shows would be \
         garbage; if it is a copy that holds the same, 'tandem-img rebase -u -b {} -F {format} {}' says \
         so; otherwise make a new image",
        file.display(),
        base.display(),
        base.display(),
        file.display()
    )]
    BaseChanged {
        /// The image.
        file: PathBuf,
        /// The name of its backing file.
        base: PathBuf,
        /// Name of the backing file's format.
        format: String,
        /// Which file differs in what.
        difference: String,
    },

    /// An earlier sync failed, so nobody can tell what of the writes before it is durable.
    #[error(
        "'{}': an earlier sync failed and may have lost writes; close the disk and check it",
        file.display()
    )]
    SyncFailed {
        /// The file whose sync failed.
        file: PathBuf,
    },

    /// The image has turned out to be damaged, and is written to no more.
    #[error(
        "'{}' is marked as corrupt; close it and repair it: tandem-img check -r all",
        file.display()
    )]
    Corrupt {
        /// The image.
        file: PathBuf,
    },

    /// A writing request to a disk after [`Disk::close`](crate::Disk::close).
    #[error("'{}' has been closed", file.display())]
    Closed {
        /// The image.
        file: PathBuf,
    },

    /// The image of a disk in use could not be kept.
    #[error("'{}' cannot be used any more: {reason}", file.display())]
    Gone {
        /// The image.
        file: PathBuf,
        /// Why.
        reason: String,
    },

    /// An operation that takes time was ended before it was complete.
    #[error("the operation has been cancelled")]
    Cancelled,

    /// A request was broken off by a panic in the middle of a change to what is allocated, and
    /// nothing is written any more that depends on it.
    #[error(
        "a request to the disk was broken off in the middle of a change; close the disk and check it"
    )]
    BrokenOff,

    /// What the caller asks for is not possible: an option of a new image, a size, a name.
    #[error("{0}")]
    Option(String),

    /// The image has no such internal snapshot.
    #[error("'{}' has no snapshot '{}'", file.display(), name.escape_ascii())]
    NoSnapshot {
        /// The image.
        file: PathBuf,
        /// The ID or name that was asked for.
        name: Vec<u8>,
    },

    /// A persistent bitmap is not there, or cannot be what was asked for.
    #[error("'{}': {reason}", file.display())]
    Bitmap {
        /// The image.
        file: PathBuf,
        /// What is wrong, in the words that `qemu-img` uses where it has any.
        reason: String,
    },

    /// A backup could not go on, or what was asked of it makes no sense. The disk is as it would be
    /// without it.
    #[error("{0}")]
    Backup(String),

    /// A request does not lie within the disk.
    #[error("request of {len} bytes at offset {offset} lies outside the disk of {size} bytes")]
    OutOfRange {
        /// First byte of the request.
        offset: u64,
        /// Length of the request in bytes.
        len: u64,
        /// Size of the disk in bytes.
        size: u64,
    },

    /// A writing request on a disk that was opened read-only.
    #[error("the disk is read-only")]
    ReadOnly,
}

impl Error {
    /// What went wrong, in the words of QEMU's programs where they have any.
    ///
    /// They leave out the image, which stands before the text in their messages, and the field,
    /// which they do not tell; the error's [`Display`](std::fmt::Display) text has both.
    pub fn reason(&self) -> String {
        match self {
            Self::Io {
                file,
                action,
                source,
                ..
            } => format!(
                "Could not {action} '{}': {}",
                file.display(),
                system_text(source)
            ),
            Self::Locked {
                file,
                permission,
                shared,
            } => format!(
                "Failed to get {}\"{permission}\" lock\nIs another process using the image [{}]?",
                if *shared { "shared " } else { "" },
                file.display()
            ),
            Self::NotQcow2 { .. } => "Image is not in qcow2 format".to_owned(),
            Self::Invalid { reason, .. }
            | Self::DataFile { reason, .. }
            | Self::Bitmap { reason, .. } => reason.clone(),
            Self::Unsupported { feature, .. } => {
                format!("Unsupported qcow2 feature(s): {feature}")
            }
            Self::BackingFile { reason, .. } => format!("Could not open backing file: {reason}"),
            Self::BaseChanged { file, .. } => {
                let text = self.to_string();
                let image = format!("'{}': its ", file.display());
                text.strip_prefix(&image).unwrap_or(&text).to_owned()
            }
            Self::HeaderFull { .. } => {
                "Could not update qcow2 header: No space left on device".to_owned()
            }
            Self::NoSnapshot { .. } => "snapshot not found".to_owned(),
            other => other.to_string(),
        }
    }

    /// The system's answer alone if that is what went wrong, else [`reason`](Self::reason).
    pub fn cause(&self) -> String {
        match self {
            Self::Io { source, .. } => system_text(source),
            other => other.reason(),
        }
    }

    /// What it comes down to in the standard library's terms, for those who have one kind of error.
    pub fn kind(&self) -> io::ErrorKind {
        match self {
            Self::Io { source, .. } => source.kind(),
            Self::NotQcow2 { .. } | Self::Invalid { .. } | Self::Corrupt { .. } => {
                io::ErrorKind::InvalidData
            }
            Self::Unsupported { .. } => io::ErrorKind::Unsupported,
            Self::Locked { .. } => io::ErrorKind::ResourceBusy,
            Self::Option(_) | Self::HeaderFull { .. } | Self::OutOfRange { .. } => {
                io::ErrorKind::InvalidInput
            }
            Self::NoSnapshot { .. } => io::ErrorKind::NotFound,
            Self::ReadOnly => io::ErrorKind::ReadOnlyFilesystem,
            _ => io::ErrorKind::Other,
        }
    }

    /// Whether there is no space left where something was to be written.
    pub(crate) fn is_no_space(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::StorageFull)
    }

    /// An [`Error::Invalid`].
    pub(crate) fn invalid(
        file: &Path,
        field: &'static str,
        value: u64,
        reason: impl Into<String>,
    ) -> Self {
        Self::Invalid {
            file: file.to_owned(),
            field,
            value,
            reason: reason.into(),
        }
    }

    /// An [`Error::Unsupported`].
    pub(crate) fn unsupported(file: &Path, feature: &str) -> Self {
        Self::Unsupported {
            file: file.to_owned(),
            feature: feature.to_owned(),
        }
    }

    /// An [`Error::Io`] for `action` on `file`.
    pub(crate) fn io(file: &Path, action: &'static str, source: io::Error) -> Self {
        Self::Io {
            file: file.to_owned(),
            action,
            offset: None,
            source,
        }
    }

    /// An [`Error::Io`] for `action` at `offset` of `file`.
    pub(crate) fn io_at(file: &Path, action: &'static str, offset: u64, source: io::Error) -> Self {
        Self::Io {
            file: file.to_owned(),
            action,
            offset: Some(offset),
            source,
        }
    }
}

/// For programs that have but `io::Error`: of that [`kind`](Error::kind), with this error inside.
impl From<Error> for io::Error {
    fn from(error: Error) -> Self {
        Self::new(error.kind(), error)
    }
}

/// The system's text for an error, without the number that the standard library adds.
pub(crate) fn system_text(error: &io::Error) -> String {
    let text = error.to_string();
    match text.split_once(" (os error ") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}

fn at(offset: Option<u64>) -> String {
    offset.map_or_else(String::new, |o| format!(" at offset {o:#x}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn becomes_an_error_of_the_standard_library() {
        let file = Path::new("disk.qcow2");
        let full = Error::io_at(file, "write", 512, io::ErrorKind::StorageFull.into());
        let locked = Error::Locked {
            file: file.to_owned(),
            permission: "write",
            shared: false,
        };
        for (error, kind) in [
            (full, io::ErrorKind::StorageFull),
            (locked, io::ErrorKind::ResourceBusy),
            (Error::ReadOnly, io::ErrorKind::ReadOnlyFilesystem),
            (
                Error::invalid(file, "size", 1, "wrong"),
                io::ErrorKind::InvalidData,
            ),
            (Error::unsupported(file, "zstd"), io::ErrorKind::Unsupported),
        ] {
            let text = error.to_string();
            let error = io::Error::from(error);
            assert_eq!((error.kind(), error.to_string()), (kind, text));
            assert!(error.downcast::<Error>().is_ok());
        }
    }
}
