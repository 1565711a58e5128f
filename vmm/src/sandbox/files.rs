//! Files: what is open stays so, and nothing else can be opened but where that was allowed before.

use std::error::Error as StdError;
use std::io;
use std::iter::successors;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use landlock::{
    ABI, Access, AccessFs, AccessNet, BitFlags, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreated, RulesetCreatedAttr, RulesetError, RulesetStatus, Scope,
};

use crate::error::{Error, HostContext, Result};

/// What is controlled is what Linux 6.12 can: files, TCP, signals and abstract sockets.
const KNOWN: ABI = ABI::V6;

/// What may be done to files that are not open.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct FileRules {
    /// Below these directories files may be read, written, made, renamed and removed.
    pub directories: Vec<PathBuf>,
    /// A socket to be removed at the end, with whose directory that is possible for any file in it.
    pub socket: Option<PathBuf>,
}

/// Some thread of this process is kept from files.
static IS_CONFINED: AtomicBool = AtomicBool::new(false);

/// What of the rules is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Enforced {
    /// Everything.
    All,
    /// Files, but not the rest, which filters of system calls exclude as well: this Linux is older
    /// than 6.12.
    Files,
    /// Nothing: this Linux has no Landlock, or it has been turned off.
    Nothing,
}

/// Keeps this thread, and those that it will start, from files that are not open yet, but for those
/// that `rules` allow; from TCP; and from signals and abstract sockets of other processes.
///
/// # Errors
/// [`Error::File`] for a directory that cannot be used; [`Error::Host`].
pub fn confine_files(rules: &FileRules) -> Result<Enforced> {
    let mut ruleset = ruleset()
        .map_err(io::Error::other)
        .host("make rules for files (--no-sandbox does without)")?;
    for directory in &rules.directories {
        ruleset = allow(ruleset, directory, below_directory())?;
    }
    if let Some(socket) = &rules.socket {
        let parent = socket.parent().filter(|path| !path.as_os_str().is_empty());
        let parent = parent.unwrap_or(Path::new("."));
        ruleset = allow(ruleset, parent, AccessFs::RemoveFile.into())?;
    }
    let status = ruleset.restrict_self();
    let status = status
        .map_err(io::Error::other)
        .host("confine itself to its files (--no-sandbox does without)")?;
    let enforced = match status.ruleset {
        RulesetStatus::FullyEnforced => Enforced::All,
        RulesetStatus::PartiallyEnforced => Enforced::Files,
        RulesetStatus::NotEnforced => Enforced::Nothing,
    };
    IS_CONFINED.fetch_or(enforced != Enforced::Nothing, Ordering::Relaxed);
    Ok(enforced)
}

/// How the system calls `EACCES`.
const DENIED: &str = "Permission denied";

/// What a message about `error` is to end with, if that may be due to [`confine_files`].
pub(crate) fn hint(error: &(dyn StdError + 'static)) -> &'static str {
    let mut causes = successors(Some(error), |error| (**error).source());
    let is_refused = causes.any(|cause| cause.downcast_ref().is_some_and(is_refusal));
    // Of an image that is below another one, the message tells in words alone.
    let is_told = error.to_string().contains(DENIED);
    match (is_refused || is_told) && IS_CONFINED.load(Ordering::Relaxed) {
        true => "; the sandbox allows only files below the directories of --allow-dir",
        false => "",
    }
}

/// Whether `error`, of a file that was to be opened, made, renamed or removed, may be due to
/// [`confine_files`].
pub fn is_refusal(error: &io::Error) -> bool {
    // Renames from one directory to another are answered by the latter.
    matches!(error.raw_os_error(), Some(libc::EACCES | libc::EXDEV))
}

fn ruleset() -> std::result::Result<RulesetCreated, RulesetError> {
    Ruleset::default()
        .handle_access(AccessFs::from_all(KNOWN))?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()
}

/// No programs, devices, pipes, sockets or links.
fn below_directory() -> BitFlags<AccessFs> {
    AccessFs::ReadFile
        | AccessFs::ReadDir
        | AccessFs::WriteFile
        | AccessFs::Truncate
        | AccessFs::MakeReg
        | AccessFs::RemoveFile
        | AccessFs::Refer
}

fn allow(
    ruleset: RulesetCreated,
    directory: &Path,
    access: BitFlags<AccessFs>,
) -> Result<RulesetCreated> {
    let failed = |source| Error::File {
        file: directory.to_owned(),
        action: "leave open the directory",
        source,
    };
    if !directory.metadata().map_err(failed)?.is_dir() {
        return Err(failed(io::ErrorKind::NotADirectory.into()));
    }
    let opened = PathFd::new(directory).map_err(|e| failed(io::Error::other(e)))?;
    let rule = PathBeneath::new(opened, access);
    ruleset
        .add_rule(rule)
        .map_err(|e| failed(io::Error::other(e)))
}
