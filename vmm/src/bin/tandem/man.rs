//! `tandem man`.

use std::io;
use std::process::ExitCode;

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man as Page;
use clap_mangen::roff::{Roff, roman};

use crate::{Cli, complain, print};

/// Which page.
#[derive(Args)]
#[command(after_help = EXAMPLES)]
pub struct Man {
    /// The command (default: the page of the program)
    #[arg(value_name = "COMMAND")]
    #[arg(value_parser = clap::builder::PossibleValuesParser::new(["run", "serve", "control", "completions", "man"]))]
    command: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  tandem man run | man -l -
  tandem man > /usr/local/share/man/man1/tandem.1";

impl Man {
    /// Prints the page.
    pub fn print(&self) -> ExitCode {
        let program = Cli::command();
        let command = self.command.as_deref();
        let page = match command.and_then(|name| program.find_subcommand(name)) {
            Some(found) => {
                let name = format!("tandem-{}", found.get_name());
                let usage = format!("tandem {}", found.get_name());
                page(found.clone().name(name).bin_name(usage))
            }
            None => page(program),
        };
        match page {
            Ok(page) => print(&page),
            Err(error) => {
                complain(&error);
                ExitCode::FAILURE
            }
        }
    }
}

/// The page about `command` in roff.
fn page(command: Command) -> io::Result<Vec<u8>> {
    // What is said below the options has sections of its own, which are not those of the generator.
    let notes = command
        .get_after_long_help()
        .or(command.get_after_help())
        .map(ToString::to_string);
    let usage = command.clone().render_usage().to_string();
    let has_commands = command.has_subcommands();
    let man = Page::new(command.after_help("").after_long_help(""));
    let mut page = Vec::new();
    man.render_title(&mut page)?;
    man.render_name_section(&mut page)?;
    synopsis(&usage).to_writer(&mut page)?;
    if has_commands {
        man.render_subcommands_section(&mut page)?;
    } else {
        man.render_options_section(&mut page)?;
    }
    sections(&notes.unwrap_or_default()).to_writer(&mut page)?;
    Ok(page)
}

fn synopsis(usage: &str) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]);
    roff.control("nh", []).control("ad", ["l"]);
    roff.text([roman(usage.trim_start_matches("Usage:").trim())]);
    roff.control("ad", []).control("hy", []);
    roff
}

/// What stands below the options in the help: a title at the margin begins a section, and lines below
/// it are kept as they are.
fn sections(notes: &str) -> Roff {
    let mut roff = Roff::new();
    let mut is_kept = false;
    for line in notes.lines() {
        let title = line.strip_suffix(':').filter(|line| !line.starts_with(' '));
        let keep = title.is_none() && line.starts_with(' ') || line.is_empty() && is_kept;
        if keep != is_kept {
            roff.control(if keep { "nf" } else { "fi" }, []);
            is_kept = keep;
        }
        match title {
            Some(title) => roff.control("SH", [&*title.to_uppercase()]),
            None if line.is_empty() && !keep => roff.control("PP", []),
            None => roff.text([roman(line.strip_prefix("  ").unwrap_or(line))]),
        };
    }
    if is_kept {
        roff.control("fi", []);
    }
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_begin_sections_and_their_lines_are_kept() {
        let notes = "Root disk:\n  a -b\n\n  .c\nExamples:\n    d\n\nEnd.";
        let expected =
            ".SH \"ROOT DISK\"\n.nf\na \\-b\n\n\\&.c\n.fi\n.SH EXAMPLES\n.nf\n  d\n\n.fi\nEnd.\n";
        assert_eq!(sections(notes).to_roff(), expected);
    }
}
