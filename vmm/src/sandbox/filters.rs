//! Filters of system calls (seccomp), which confine a thread to its role.

use std::collections::BTreeMap;
use std::io;

use seccompiler::{
    BpfProgram, SeccompAction, SeccompFilter, SeccompRule, TargetArch, apply_filter,
};

use super::{Role, calls, install_handler};
use crate::error::{HostContext, Result};

/// Rules for the numbers of system calls. Without a rule, any arguments will do.
pub(super) type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Confines this thread, and those that it will start, to what `role` needs. Entering another role
/// later leaves what both allow.
///
/// A forbidden system call ends the process by SIGSYS, after a line on standard error, unless the
/// process had a handler for that signal before.
///
/// # Errors
/// [`Error::Host`](crate::Error::Host): the system has no such filters.
pub fn enter(role: Role) -> Result<()> {
    install_handler();
    install(role)
        .map_err(io::Error::other)
        .host("filter its own system calls (--no-sandbox does without)")
}

fn install(role: Role) -> std::result::Result<(), seccompiler::Error> {
    // The strictest answer of several filters counts, and that of the last one is stricter than an
    // error. So it lets pass what the first one refuses.
    let mut allowed = calls::allowed(role)?;
    let refused = calls::REFUSED.iter();
    let refused = refused.filter(|call| !allowed.contains_key(call));
    let refused: Rules = refused.map(|call| (*call, vec![])).collect();
    allowed.extend(refused.clone());

    let error = SeccompAction::Errno(libc::ENOSYS as u32);
    for filter in [
        compile(refused, SeccompAction::Allow, error)?,
        compile(allowed, SeccompAction::Trap, SeccompAction::Allow)?,
    ] {
        apply_filter(&filter)?;
    }
    Ok(())
}

/// A filter that answers what `rules` match by `matched`, and everything else by `other`.
fn compile(
    rules: Rules,
    other: SeccompAction,
    matched: SeccompAction,
) -> std::result::Result<BpfProgram, seccompiler::Error> {
    let filter = SeccompFilter::new(rules, other, matched, TargetArch::x86_64)?;
    Ok(filter.try_into()?)
}
