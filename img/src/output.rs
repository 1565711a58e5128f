//! Standard output and standard error.

use std::io::Write;

use serde::Serialize;

use crate::failure::Failure;
use crate::getopt::Parsed;
use crate::json;

/// How results are printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Output {
    /// For people.
    Human,
    /// For programs.
    Json,
}

impl Output {
    /// The choice made with `--output`.
    pub fn from_args(args: &Parsed) -> Result<Self, Failure> {
        match args
            .value("output")
            .map(|value| value.to_string_lossy())
            .as_deref()
        {
            None | Some("human") => Ok(Self::Human),
            Some("json") => Ok(Self::Json),
            Some(other) => Err(args
                .name
                .usage(&format!("--output expects 'human' or 'json' not '{other}'"))),
        }
    }
}

/// Prints `text`. A reader that has gone away wants no more of it, which is no error.
pub fn print(text: &str) {
    let _ = std::io::stdout().write_all(text.as_bytes());
}

/// As [`print`], for text that does not end with a line.
pub fn print_now(text: &str) {
    print(text);
    let _ = std::io::stdout().flush();
}

/// Prints `text` on standard error. Work goes on where nobody can read it, as in QEMU's programs.
pub fn complain(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// As [`complain`], and ends the line.
pub fn complain_line(text: &str) {
    complain(&format!("{text}\n"));
}

/// Prints `value` as JSON.
pub fn print_json(value: &impl Serialize) {
    // Only maps with keys that are no strings cannot be serialized, and there are none.
    print(&json::to_string(value).unwrap_or_default());
}
