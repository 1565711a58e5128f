//! What the programs `tandem-img` and `tandem-io` are made of. It is no interface for others.
//!
//! | module | what it knows |
//! | --- | --- |
//! | [`commands`] | the subcommands of `tandem-img` |
//! | [`io`] | `tandem-io` |
//! | `image` | from a name on the command line to an open disk |
//! | [`getopt`], `options`, `common_options`, `size` | command lines, lists of options and numbers, as QEMU reads them |
//! | [`output`], `json`, `progress`, `hints`, `failure` | what is printed, and how |
//! | `workers`, `rate` | copying and comparing on several threads, at a limited rate |
#![deny(missing_docs)]
// The macros panic where standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod commands;
mod common_options;
mod failure;
pub mod getopt;
mod hints;
mod image;
pub mod io;
mod json;
mod options;
pub mod output;
pub mod program;
mod progress;
mod rate;
mod size;
mod workers;
