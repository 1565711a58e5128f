//! The program `tandem`.

mod run;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tandem_vmm::{Error, ExitReason, signals};

use run::Run;

/// Runs Linux guests whose disks are qcow2 images.
#[derive(Parser)]
#[command(version, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Run a guest until it powers off
    Run(Run),
}

fn main() -> ExitCode {
    let Command::Run(run) = Cli::parse().command;
    match run.execute() {
        Ok(ExitReason::Signal(number)) => {
            signals::die_of(number);
            ExitCode::from(128 + number as u8)
        }
        Ok(_) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "tandem: {error}");
            match error {
                Error::Config(_) => ExitCode::from(2),
                _ => ExitCode::FAILURE,
            }
        }
    }
}
