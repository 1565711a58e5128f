//! The subcommands of `tandem-img`: each has a module with its definition, and what it does.

mod amend;
mod backup;
mod bench;
mod bitmap;
mod check;
mod commit;
mod compare;
mod completions;
pub mod convert;
mod create;
mod dd;
pub mod info;
mod man;
mod map;
mod measure;
mod rebase;
mod resize;
mod restore;
mod snapshot;

use clap::Command;

use crate::failure::Failure;
use crate::getopt::Parsed;

/// A subcommand: its definition, and what it does with its arguments.
type Subcommand = (fn() -> Command, fn(&Parsed) -> Result<(), Failure>);

/// All of them, in the order in which the help lists them.
pub(crate) const SUBCOMMANDS: &[Subcommand] = &[
    (amend::command, amend::run),
    (backup::command, backup::run),
    (bench::command, bench::run),
    (bitmap::command, bitmap::run),
    (check::command, check::run),
    (compare::command, compare::run),
    (commit::command, commit::run),
    (completions::command, completions::run),
    (convert::command, convert::run),
    (create::command, create::run),
    (dd::command, dd::run),
    (info::command, info::run),
    (man::command, man::run),
    (map::command, map::run),
    (measure::command, measure::run),
    (rebase::command, rebase::run),
    (resize::command, resize::run),
    (restore::command, restore::run),
    (snapshot::command, snapshot::run),
];
