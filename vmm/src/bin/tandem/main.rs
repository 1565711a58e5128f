//! The program `tandem`.

mod control;
mod disk_keys;
mod run;
mod sandbox;
mod serve;

use std::io::{self, Write};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use tandem_vmm::{Error, ExitReason, signals};

use control::Control;
use run::Run;
use serve::Serve;

/// Runs Linux guests whose disks are qcow2 images, and offers such disks to other machines
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
    /// Offer a disk to other virtual machine monitors (vhost-user-blk)
    Serve(Serve),
    Control(Control),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Run(run) => run.execute(),
        Command::Serve(serve) => serve.execute(),
        Command::Control(control) => return control.execute(),
    };
    match outcome {
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
