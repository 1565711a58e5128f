//! How a run of the program fails.

/// The text for standard error, complete with the program's name and newlines, and the status.
#[derive(Debug, PartialEq, Eq)]
pub struct Failure {
    /// Printed as it is.
    pub message: String,
    /// Exit status.
    pub status: u8,
}
