//! The same command lines for `tandem-img` and for the `qemu-img` that is installed: equal
//! output, messages, exit status and images.
//!
//! Where the two differ on purpose, the test says how, and docs/differences.md tells the user.
#![expect(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test that cannot go on has failed"
)]

mod amend;
mod backing;
mod backup;
mod backup_of_running;
mod bench;
mod bitmap;
mod chain;
mod chains;
mod check;
mod commit;
mod compare;
mod convert;
mod convert_interrupted;
mod convert_options;
mod create;
mod damage;
mod data_file_reuse;
mod dd;
mod forks;
mod image_opts;
mod info;
mod io;
mod killed;
mod layers;
mod locks;
mod map;
mod measure;
mod plot;
mod rebase;
mod resize;
mod run;
mod shell;
mod signals;
mod snapshot;
mod streams;
