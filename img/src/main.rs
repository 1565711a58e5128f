//! `tandem-img`: creates, inspects and checks disk images, in the language of `qemu-img`.
//!
//! Arguments, texts, JSON and exit statuses are those of `qemu-img` 10, and messages begin with
//! the name that the program was called by, so that a link called `qemu-img` behaves like one.
#![deny(missing_docs)]

mod amend;
mod check;
mod completions;
mod convert;
mod create;
mod create_options;
mod failure;
mod getopt;
mod image;
mod image_opts;
mod info;
mod json;
mod man;
mod map;
mod options;
mod output;
mod plot;
mod progress;
mod resize;
mod size;
mod snapshot;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Command;
use failure::Failure;
use getopt::{Name, Parsed};

/// A subcommand: its definition, and what it does with its arguments.
struct Subcommand {
    command: fn() -> Command,
    run: fn(&Parsed) -> Result<(), Failure>,
}

const SUBCOMMANDS: &[Subcommand] = &[
    Subcommand {
        command: amend::command,
        run: amend::run,
    },
    Subcommand {
        command: check::command,
        run: check::run,
    },
    Subcommand {
        command: completions::command,
        run: completions::run,
    },
    Subcommand {
        command: convert::command,
        run: convert::run,
    },
    Subcommand {
        command: create::command,
        run: create::run,
    },
    Subcommand {
        command: info::command,
        run: info::run,
    },
    Subcommand {
        command: man::command,
        run: man::run,
    },
    Subcommand {
        command: map::command,
        run: map::run,
    },
    Subcommand {
        command: resize::command,
        run: resize::run,
    },
    Subcommand {
        command: snapshot::command,
        run: snapshot::run,
    },
];

/// What `qemu-img` can do besides and this program cannot yet.
const MISSING: &[&str] = &[
    "bench", "bitmap", "commit", "compare", "dd", "measure", "rebase",
];

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = Name::new(args.next().unwrap_or_else(|| "tandem-img".into()));
    match run(&name, args.collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            eprint!("{}", failure.message);
            ExitCode::from(failure.status)
        }
    }
}

fn command() -> Command {
    Command::new("tandem-img")
        .about("Creates, inspects, checks and resizes disk images, in the language of qemu-img")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .subcommands(SUBCOMMANDS.iter().map(|subcommand| (subcommand.command)()))
        .after_help(
            "Run `tandem-img COMMAND --help` for the options of a command.\n\n\
             Examples:\n  \
             tandem-img create -f qcow2 disk.qcow2 20G\n  \
             tandem-img create -f qcow2 -o data_file=disk.raw,data_file_raw=on disk.qcow2 20G\n  \
             tandem-img info --output=json disk.qcow2\n  \
             tandem-img check disk.qcow2\n  \
             tandem-img map disk.qcow2\n  \
             tandem-img resize disk.qcow2 +10G\n  \
             tandem-img snapshot -c before-upgrade disk.qcow2",
        )
}

fn run(name: &Name, args: Vec<OsString>) -> Result<(), Failure> {
    let Some((first, rest)) = args.split_first() else {
        return Err(name.usage("Not enough arguments"));
    };
    let first = first.to_string_lossy();
    match &*first {
        "-h" | "--help" => {
            output::print(&command().render_help().to_string());
            return Ok(());
        }
        "-V" | "--version" => {
            output::print(&format!(
                "tandem-img version {}\n",
                env!("CARGO_PKG_VERSION")
            ));
            return Ok(());
        }
        _ => {}
    }
    if let Some(option) = first.strip_prefix("--") {
        return Err(name.usage_as_called(&format!("unrecognized option '--{option}'")));
    }
    if let Some(letter) = first.strip_prefix('-').and_then(|rest| rest.chars().next()) {
        return Err(name.usage_as_called(&format!("invalid option -- '{letter}'")));
    }
    for subcommand in SUBCOMMANDS {
        let command = (subcommand.command)();
        if command.get_name() == first {
            let (rest, last) = match &*first {
                "resize" => resize::split_size(rest),
                _ => (rest, None),
            };
            return match getopt::parse(command, name, rest)? {
                getopt::Outcome::Help(text) => {
                    output::print(&text);
                    Ok(())
                }
                getopt::Outcome::Run(mut parsed) => {
                    parsed.last = last.map(Into::into);
                    (subcommand.run)(&parsed)
                }
            };
        }
    }
    if MISSING.contains(&&*first) {
        return Err(name.error(&format!("Command not supported yet: {first}")));
    }
    Err(name.usage(&format!("Command not found: {first}")))
}
