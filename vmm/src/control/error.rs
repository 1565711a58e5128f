//! Why an operation on a VM failed.

use std::io;
use std::path::{Path, PathBuf};

use crate::sandbox::hint;

/// Why an operation on a VM failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ControlError {
    /// There is no such disk.
    #[error("there is no disk {0}")]
    NoSuchDisk(String),

    /// There is no such backup, or it has ended.
    #[error("there is no backup {0}")]
    NoSuchBackup(tandem_block::BackupId),

    /// The VM has ended, or is about to.
    #[error("the VM has ended")]
    Ended,

    /// A disk would become smaller.
    #[error(
        "{size} bytes are less than the {present} that the disk has, and what lies behind would be \
         lost: say so with \"shrink\": true"
    )]
    WouldShrink {
        /// The size that was asked for.
        size: u64,
        /// The size that the disk has.
        present: u64,
    },

    /// The disk has no size to take over.
    #[error(
        "there is no block device below this disk that could tell its size: say what it shall be"
    )]
    NeedsSize,

    /// The disk could not do it.
    #[error("{}{source}{}", named(path, source), hint(source))]
    Disk {
        /// The image.
        path: PathBuf,
        /// Why.
        source: tandem_block::Error,
    },

    /// A job is under way on the disk.
    #[error("job {job} is under way on disk {disk}: wait for its end, or have it cancelled")]
    Busy {
        /// What the guest calls the disk.
        disk: String,
        /// The job.
        job: u64,
    },

    /// There is no such job.
    #[error("there is no job {0}")]
    NoSuchJob(u64),

    /// A mistake in this program has ended a job.
    #[error("a mistake in this program has ended the job on disk {disk}: {message}")]
    Panic {
        /// What the guest calls the disk.
        disk: String,
        /// What the panic said.
        message: String,
    },

    /// The host could not do it.
    #[error("could not {action}: {source}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },
}

impl ControlError {
    /// A word for programs to tell errors by.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::NoSuchDisk(_) => "no-such-disk",
            Self::NoSuchJob(_) => "no-such-job",
            Self::Busy { .. } => "busy",
            Self::NoSuchBackup(_) => "no-such-backup",
            Self::Ended => "ended",
            Self::WouldShrink { .. } => "would-shrink",
            Self::NeedsSize => "needs-size",
            Self::Disk {
                source: tandem_block::Error::Backup(_),
                ..
            } => "backup",
            Self::Disk { .. } => "disk",
            Self::Host { .. } => "host",
            Self::Panic { .. } => "panic",
        }
    }
}

/// What a message about `error` of the image at `path` begins with, unless it names the image anyway.
fn named(path: &Path, error: &tandem_block::Error) -> String {
    let image = format!("'{}'", path.display());
    match error.to_string().contains(&image) {
        true => String::new(),
        false => format!("disk {image}: "),
    }
}
