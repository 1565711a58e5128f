//! `tandem completions`.

use std::process::ExitCode;

use clap::{Args, CommandFactory};
use clap_complete::{Shell, generate};

use crate::{Cli, print};

/// For which shell.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Completions {
    /// The shell: bash, zsh or fish
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(["bash", "zsh", "fish"]))]
    shell: String,
}

const EXAMPLES: &str = "\
Examples:
  tandem completions bash > /etc/bash_completion.d/tandem
  tandem completions zsh > /usr/local/share/zsh/site-functions/_tandem
  tandem completions fish > ~/.config/fish/completions/tandem.fish";

impl Completions {
    /// Prints the script.
    pub fn print(&self) -> ExitCode {
        let shell = match &*self.shell {
            "bash" => Shell::Bash,
            "zsh" => Shell::Zsh,
            _ => Shell::Fish,
        };
        let mut script = Vec::new();
        generate(shell, &mut Cli::command(), "tandem", &mut script);
        print(&script)
    }
}
