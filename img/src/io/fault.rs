//! Errors of requests, in the system's words.

use rustix::io::Errno;
use tandem_block::Error;

use super::failed::Failed;

/// Why a request failed.
#[derive(Debug)]
pub struct Fault {
    errno: Errno,
    /// What the system's words do not tell.
    detail: Option<String>,
}

impl Fault {
    /// The system's words.
    pub fn text(&self) -> String {
        system_text(self.errno)
    }

    /// The failure of a command that does `what`.
    pub fn failed(self, what: &str) -> Failed {
        let text = self.text();
        let detail = self.detail.map(|detail| detail + "\n");
        Failed {
            message: detail.unwrap_or_default(),
            ..Failed::output(&format!("{what} failed: {text}"))
        }
    }
}

impl From<Errno> for Fault {
    fn from(errno: Errno) -> Self {
        Self {
            errno,
            detail: None,
        }
    }
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        let detail = Some(error.to_string());
        match error {
            Error::Io { source, .. } => match Errno::from_io_error(&source) {
                Some(errno) => errno.into(),
                None => Self {
                    errno: Errno::IO,
                    detail,
                },
            },
            Error::OutOfRange { .. } => Errno::IO.into(),
            Error::ReadOnly => Errno::ACCESS.into(),
            Error::Option(_) => Self {
                errno: Errno::INVAL,
                detail,
            },
            _ => Self {
                errno: Errno::IO,
                detail,
            },
        }
    }
}

/// The system's text for an error, without its number.
pub fn system_text(errno: Errno) -> String {
    let text = std::io::Error::from(errno).to_string();
    match text.split_once(" (os error ") {
        Some((text, _)) => text.to_owned(),
        None => text,
    }
}
