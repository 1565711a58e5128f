//! `tandem-img man`

use std::io;

use clap::Command;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, roman};

use crate::failure::Failure;
use crate::getopt::{self, Parsed};
use crate::output;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "man",
        "Prints a manual page: of this program, of one of its commands, or of tandem-io",
        "tandem-img man [COMMAND|tandem-io]",
    )
    .after_help(
        "Examples:\n  \
         tandem-img man create | man -l -\n  \
         tandem-img man > /usr/local/share/man/man1/tandem-img.1",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let program = crate::program::command();
    let command = match &args.operands[..] {
        [] => program,
        [name] if name == "tandem-io" => crate::io::program(),
        [name] => {
            let found = name.to_str().and_then(|name| program.find_subcommand(name));
            let unknown = || {
                let text = format!("Command not found: {}", name.display());
                args.name.usage(&text)
            };
            let found = found.ok_or_else(unknown)?.clone();
            let name = format!("tandem-img-{}", found.get_name());
            found.name(name)
        }
        _ => return Err(args.name.usage("Expecting one command")),
    };
    let page = page(command).map_err(|e| args.name.error(&e.to_string()))?;
    output::print(&String::from_utf8_lossy(&page));
    Ok(())
}

/// The page about `command` in roff.
fn page(mut command: Command) -> io::Result<Vec<u8>> {
    let usage = command.render_usage().to_string();
    let notes = command.get_after_help().map(ToString::to_string);
    let has_commands = command.has_subcommands();
    let man = Man::new(command);
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

/// The ways to use a command, each on a line of its own.
fn synopsis(usage: &str) -> Roff {
    let mut roff = Roff::new();
    roff.control("SH", ["SYNOPSIS"]);
    roff.control("nh", []).control("ad", ["l"]);
    for way in usage.trim_start_matches("Usage:").lines() {
        roff.text([roman(way.trim())]).control("br", []);
    }
    roff.control("ad", []).control("hy", []);
    roff
}

/// What stands below the options in the help: text, and examples, whose lines are kept.
fn sections(notes: &str) -> Roff {
    let mut roff = Roff::new();
    let mut section = "";
    for paragraph in notes.split("\n\n") {
        let (title, body) = match paragraph.strip_prefix("Examples:\n") {
            Some(body) => ("EXAMPLES", body),
            None => ("NOTES", paragraph),
        };
        if title == section {
            roff.control("PP", []);
        } else {
            roff.control("SH", [title]);
            section = title;
        }
        for line in body.lines() {
            match line.strip_prefix("  ") {
                Some(line) => {
                    roff.control("nf", []).text([roman(line)]);
                    roff.control("fi", []);
                }
                None => {
                    roff.text([roman(line)]);
                }
            }
        }
    }
    roff
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn examples_keep_their_lines() {
        let text = synopsis("Usage: a b\n       a c").to_roff();
        let ways = "a b\n.br\na c\n.br\n";
        assert_eq!(text, format!(".SH SYNOPSIS\n.nh\n.ad l\n{ways}.ad\n.hy\n"));
        let text = sections("One.\n\nTwo.\n\nExamples:\n  a\n  b").to_roff();
        assert_eq!(
            text,
            ".SH NOTES\nOne.\n.PP\nTwo.\n.SH EXAMPLES\n.nf\na\n.fi\n.nf\nb\n.fi\n"
        );
    }
}
