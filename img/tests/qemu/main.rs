//! The same command lines for `tandem-img` and for the `qemu-img` that is installed: equal
//! output, messages, exit status and images.
//!
//! Where the two differ on purpose, the test says how, and README.md tells the user.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod amend;
mod backing;
mod chain;
mod check;
mod convert;
mod create;
mod damage;
mod data_file_reuse;
mod image_opts;
mod info;
mod locks;
mod map;
mod plot;
mod resize;
mod run;
mod shell;
mod snapshot;
