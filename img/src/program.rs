//! The program `tandem-img`: its subcommands, and what they have in common.
//!
//! Arguments, texts, JSON and exit statuses are those of `qemu-img` 10, and messages begin with
//! the name that the program was called by, so that a link called `qemu-img` behaves like one.

use std::ffi::OsString;
use std::process::ExitCode;

use clap::Command;

use crate::commands::SUBCOMMANDS;
use crate::failure::Failure;
use crate::getopt::{self, Name};
use crate::output;

/// Runs the program with the arguments of this process.
pub fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let name = Name::new(args.next().unwrap_or_else(|| "tandem-img".into()));
    match run(&name, args.collect()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            output::complain_of(&failure.message);
            ExitCode::from(failure.status)
        }
    }
}

/// The definition of the program.
pub fn command() -> Command {
    Command::new("tandem-img")
        .about("Creates, inspects, checks and resizes disk images, in the language of qemu-img")
        .version(env!("CARGO_PKG_VERSION"))
        .disable_help_subcommand(true)
        .subcommands(SUBCOMMANDS.iter().map(|(command, _)| command()))
        .after_help(
            "Run `tandem-img COMMAND --help` for the options of a command.\n\n\
             Examples:\n  \
             tandem-img create -f qcow2 disk.qcow2 20G\n  \
             tandem-img create -f qcow2 -o data_file=disk.raw,data_file_raw=on disk.qcow2 20G\n  \
             tandem-img info --output=json disk.qcow2\n  \
             tandem-img check disk.qcow2\n  \
             tandem-img map disk.qcow2\n  \
             tandem-img resize disk.qcow2 +10G\n  \
             tandem-img snapshot -c before-upgrade disk.qcow2\n  \
             tandem-img bitmap --add disk.qcow2 monday\n  \
             tandem-img backup --control vm.sock --track b vda full.qcow2",
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
    for (command, run) in SUBCOMMANDS {
        let command = command();
        if command.get_name() == first {
            return match getopt::parse(command, name, rest, first == "resize")? {
                getopt::Outcome::Help(text) => {
                    output::print(&text);
                    Ok(())
                }
                getopt::Outcome::Run(parsed) => run(&parsed),
            };
        }
    }
    Err(name.usage(&format!("Command not found: {first}")))
}
