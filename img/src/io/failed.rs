//! How a command fails.

/// What a failed command has to say. QEMU puts most of it on standard output.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Failed {
    /// Printed on standard output as it is.
    pub output: String,
    /// Printed on standard error as it is.
    pub message: String,
    /// Whether the synopsis of the command follows on standard output.
    pub usage: bool,
}

impl Failed {
    /// A line for standard output.
    pub fn output(line: &str) -> Self {
        Self {
            output: format!("{line}\n"),
            ..Self::default()
        }
    }

    /// A line for standard error.
    pub fn message(line: &str) -> Self {
        Self {
            message: format!("{line}\n"),
            ..Self::default()
        }
    }

    /// The command was called in a way that it cannot be.
    pub fn usage() -> Self {
        Self {
            usage: true,
            ..Self::default()
        }
    }

    /// All has been said.
    pub fn said() -> Self {
        Self::default()
    }
}
