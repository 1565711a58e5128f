//! Standard output and standard error.

use std::io::{IsTerminal, Write};
use std::process::ExitCode;
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde::Serialize;

use crate::failure::Failure;
use crate::getopt::Parsed;
use crate::{hints, json};

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

/// Bytes of text that are kept.
const KEPT: usize = 4096;

/// Text that is kept back, if any is to be.
static PENDING: Mutex<Option<Vec<u8>>> = Mutex::new(None);

fn pending() -> MutexGuard<'static, Option<Vec<u8>>> {
    // A panic leaves a part of the text at worst.
    PENDING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs `program`, and prints what it prints once that is enough, or the end has come, unless standard
/// output is a terminal: so does the C library, and who reads standard error in the same pipe finds
/// both in the order of `qemu-img`.
pub fn collected(program: impl FnOnce() -> ExitCode) -> ExitCode {
    if !std::io::stdout().is_terminal() {
        *pending() = Some(Vec::new());
    }
    let status = program();
    print_now("");
    status
}

/// Prints `text`. A reader that has gone away wants no more of it, which is no error.
pub fn print(text: &str) {
    let mut pending = pending();
    let Some(kept) = &mut *pending else {
        let _ = std::io::stdout().write_all(text.as_bytes());
        return;
    };
    kept.extend_from_slice(text.as_bytes());
    if kept.len() >= KEPT {
        let _ = std::io::stdout().write_all(kept);
        kept.clear();
    }
}

/// As [`print()`], for text that must not wait.
pub fn print_now(text: &str) {
    print(text);
    if let Some(kept) = &mut *pending() {
        let _ = std::io::stdout().write_all(kept);
        kept.clear();
    }
    let _ = std::io::stdout().flush();
}

/// Prints `text` on standard error. Work goes on where nobody can read it, as in QEMU's programs.
pub fn complain(text: &str) {
    let _ = std::io::stderr().write_all(text.as_bytes());
}

/// As [`complain`], of an error; on a terminal with what may help.
pub fn complain_of(error: &str) {
    complain(error);
    if std::io::stderr().is_terminal()
        && let Some(hint) = hints::of(error)
    {
        complain_line(&hint);
    }
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
