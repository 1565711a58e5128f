//! The program `tandem`.

mod completions;
mod config_file;
mod control;
mod disk_keys;
mod man;
mod run;
mod sandbox;
mod serve;

use std::ffi::OsString;
use std::fmt::Display;
use std::io::{self, Write};
use std::process::ExitCode;

use clap::{ArgMatches, CommandFactory, FromArgMatches, Parser, Subcommand};
use tandem_vmm::{Error, ExitReason, Result, signals};

use completions::Completions;
use control::Control;
use man::Man;
use run::Run;
use serve::Serve;

/// Runs Linux guests whose disks are qcow2 images, and offers such disks to other machines
#[derive(Parser)]
#[command(name = "tandem", version, arg_required_else_help = true, after_help = EXAMPLES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  tandem run --kernel vmlinuz --initrd initrd.img --disk image.qcow2
  tandem run --config machine.toml
  tandem serve --socket disk.sock --disk image.qcow2
  tandem man run | man -l -

tandem COMMAND --help tells everything about a command.";

#[derive(Subcommand)]
enum Command {
    /// Run a guest until it powers off
    Run(Box<Run>),
    /// Offer a disk to other virtual machine monitors (vhost-user-blk)
    Serve(Box<Serve>),
    Control(Control),
    /// Print a script that makes a shell complete command lines of this program
    Completions(Completions),
    /// Print a manual page: of this program, or of one of its commands
    Man(Man),
}

/// The exit status for what went wrong, where 1 may be that of the guest.
const NOT_THE_GUESTS: u8 = 125;

fn main() -> ExitCode {
    let matches = match matches(std::env::args_os().collect()) {
        Ok(matches) => matches,
        Err(error) => {
            complain(&error);
            return ExitCode::from(2);
        }
    };
    let cli = Cli::from_arg_matches(&matches).unwrap_or_else(|error| error.exit());
    match cli.command {
        Command::Run(run) if run.print_config => match print_config(&matches, &run) {
            Ok(()) => ExitCode::SUCCESS,
            Err(error) => {
                complain(&error);
                ExitCode::from(2)
            }
        },
        Command::Run(run) => {
            let failure = if run.exit_port { NOT_THE_GUESTS } else { 1 };
            let is_told = run.exit_port;
            match run.execute() {
                Ok(ExitReason::Exit(status)) => ExitCode::from(status),
                Ok(reason) if is_told && !matches!(reason, ExitReason::Signal(_)) => {
                    complain(&"the machine has ended without an exit status of the guest");
                    ExitCode::from(failure)
                }
                outcome => status(outcome, failure),
            }
        }
        Command::Serve(serve) => status(serve.execute(), 1),
        Command::Control(control) => control.execute(),
        Command::Completions(completions) => completions.print(),
        Command::Man(man) => man.print(),
    }
}

/// The arguments, and those of the file that they name.
fn matches(arguments: Vec<OsString>) -> std::result::Result<ArgMatches, config_file::Error> {
    let command = Cli::command();
    let of_file = match arguments.split_at_checked(2) {
        Some(([_, name], options)) if name == run::NAME => {
            config_file::arguments(&run::command(), options)?
        }
        _ => vec![],
    };
    let matches = command.try_get_matches_from([arguments, of_file].concat());
    Ok(matches.unwrap_or_else(|error| error.exit()))
}

fn print_config(
    matches: &ArgMatches,
    run: &Run,
) -> std::result::Result<(), Box<dyn std::error::Error>> {
    run.machine().validate()?;
    let (_, given) = matches.subcommand().ok_or("no command")?;
    print(config_file::print(&run::command(), given)?.as_bytes());
    Ok(())
}

fn status(outcome: Result<ExitReason>, failure: u8) -> ExitCode {
    match outcome {
        Ok(ExitReason::Signal(number)) => {
            signals::die_of(number);
            ExitCode::from(128 + number as u8)
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            complain(&error);
            match error {
                Error::Config(_) => ExitCode::from(2),
                _ => ExitCode::from(failure),
            }
        }
    }
}

fn complain(text: &dyn Display) {
    let _ = writeln!(io::stderr(), "tandem: {text}");
}

/// Prints to standard output, whose reader may have gone.
fn print(text: &[u8]) -> ExitCode {
    match io::stdout().write_all(text) {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) => ExitCode::FAILURE,
    }
}
