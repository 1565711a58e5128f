//! In place of the sandbox, where this crate is built without the feature `sandbox`.
//! [`Config::validate`](crate::Config::validate) refuses to have threads confined then.

use std::error::Error;
use std::io;

use super::Role;
use crate::error::{HostContext, Result};

/// Fails.
pub(crate) fn enter(_: Role) -> Result<()> {
    Err(io::Error::from(io::ErrorKind::Unsupported)).host("filter its own system calls")
}

/// No error is due to what is not there.
pub(crate) fn hint(_: &(dyn Error + 'static)) -> &'static str {
    ""
}

/// There is nothing to be told.
pub(crate) fn install_handler() {}
