//! `tandem man`.

use std::io;
use std::process::ExitCode;

use clap::{Args, Command, CommandFactory};
use clap_mangen::Man as Page;

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
    page.extend(synopsis(&usage).into_bytes());
    if has_commands {
        man.render_subcommands_section(&mut page)?;
    } else {
        man.render_options_section(&mut page)?;
    }
    page.extend(sections(&notes.unwrap_or_default()).into_bytes());
    Ok(page)
}

fn synopsis(usage: &str) -> String {
    let usage = escape(usage.trim_start_matches("Usage:").trim());
    format!(".SH SYNOPSIS\n.nh\n.ad l\n{usage}\n.ad\n.hy\n")
}

/// What stands below the options in the help: a title at the margin begins a section, and lines below
/// it are kept as they are.
fn sections(notes: &str) -> String {
    let mut text = String::new();
    let mut is_kept = false;
    for line in notes.lines() {
        let title = line.strip_suffix(':').filter(|line| !line.starts_with(' '));
        let keep = title.is_none() && line.starts_with(' ') || line.is_empty() && is_kept;
        if keep != is_kept {
            text += if keep { ".nf\n" } else { ".fi\n" };
            is_kept = keep;
        }
        match title {
            Some(title) => text += &format!(".SH {}\n", escape(&title.to_uppercase())),
            None if line.is_empty() && !keep => text += ".PP\n",
            None => text += &format!("{}\n", escape(line.strip_prefix("  ").unwrap_or(line))),
        }
    }
    if is_kept {
        text += ".fi\n";
    }
    text
}

/// `text` with nothing that roff takes for a command; what a shell is to get stays ASCII.
fn escape(text: &str) -> String {
    let text = text
        .replace('\\', "\\e")
        .replace('-', "\\-")
        .replace('\'', "\\(aq");
    match text.starts_with('.') {
        true => format!("\\&{text}"),
        false => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn titles_begin_sections_and_their_lines_are_kept() {
        let notes = "Root disk:\n  a -b\n\n  .c\nExamples:\n    d\n\nEnd.";
        let expected =
            ".SH ROOT DISK\n.nf\na \\-b\n\n\\&.c\n.fi\n.SH EXAMPLES\n.nf\n  d\n\n.fi\nEnd.\n";
        assert_eq!(sections(notes), expected);
        assert_eq!(escape("'\\"), "\\(aq\\e");
    }
}
