//! What the programs `tandem-img` and `tandem-io` are made of. It is no interface for others.
#![deny(missing_docs)]
// The macros panic where standard error or output cannot be written.
#![deny(clippy::print_stderr, clippy::print_stdout)]

pub mod amend;
pub mod backup;
pub mod bench;
pub mod bitmap;
pub mod chain;
pub mod check;
pub mod commit;
pub mod compare;
pub mod completions;
pub mod convert;
pub mod create;
pub mod create_options;
pub mod dd;
pub mod failure;
pub mod faults;
pub mod getopt;
pub mod hints;
pub mod image;
pub mod image_opts;
pub mod info;
pub mod io;
pub mod json;
pub mod layers;
pub mod man;
pub mod map;
pub mod measure;
pub mod node_options;
pub mod opened;
pub mod options;
pub mod output;
pub mod plot;
pub mod program;
pub mod progress;
pub mod pseudo;
pub mod rate;
pub mod rebase;
pub mod resize;
pub mod restore;
pub mod size;
pub mod snapshot;
pub mod users;
pub mod workers;
