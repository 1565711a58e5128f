//! `tandem-img completions`

use clap::builder::PossibleValuesParser;
use clap::{Arg, Command, ValueHint};
use clap_complete::{Shell, generate};
use tandem_block::qcow2::Follow;
use tandem_block::{CacheMode, ImageFormat, Preallocation};

use crate::failure::Failure;
use crate::getopt::{self, Parsed};
use crate::output;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "completions",
        "Prints a script that makes a shell complete command lines of this program, or of tandem-io",
        "tandem-img completions bash|zsh|fish [tandem-io]",
    )
    .after_help(
        "Examples:\n  \
         tandem-img completions bash > /etc/bash_completion.d/tandem-img\n  \
         tandem-img completions zsh > /usr/local/share/zsh/site-functions/_tandem-img\n  \
         tandem-img completions fish > ~/.config/fish/completions/tandem-img.fish\n  \
         tandem-img completions bash tandem-io > /etc/bash_completion.d/tandem-io",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let (name, is_io) = match &args.operands[..] {
        [name] => (name, false),
        [name, program] if program == IO => (name, true),
        _ => return Err(args.name.usage("Expecting one shell: bash, zsh or fish")),
    };
    let shell = match name.to_str() {
        Some("bash") => Shell::Bash,
        Some("zsh") => Shell::Zsh,
        Some("fish") => Shell::Fish,
        _ => {
            let name = name.display();
            let text = format!("Unknown shell '{name}': it must be bash, zsh or fish");
            return Err(args.name.usage(&text));
        }
    };
    let mut script = Vec::new();
    match is_io {
        true => generate(shell, &mut complete_io(shell), IO, &mut script),
        false => generate(shell, &mut complete(shell), "tandem-img", &mut script),
    }
    let script = String::from_utf8_lossy(&script);
    // The generator spells the hyphen of the program's name in two ways.
    output::print(&script.replace("tandem__subcmd__img__", "tandem__img__"));
    Ok(())
}

/// The other program.
const IO: &str = "tandem-io";

/// What can be completed of `defined`: the options that are not refused, and the values of those that
/// have few.
fn options(defined: &Command) -> impl Iterator<Item = Arg> {
    let visible = defined.get_arguments().filter(|arg| !arg.is_hide_set());
    visible
        .cloned()
        .map(|arg| match &values_of(arg.get_id().as_str())[..] {
            [] if takes_path(arg.get_id().as_str()) => arg.value_hint(ValueHint::AnyPath),
            [] => arg,
            values => arg.value_parser(PossibleValuesParser::new(values)),
        })
}

/// File names. Where there is nothing else, bash completes them by itself.
fn files(shell: Shell) -> Option<Arg> {
    let operands = Arg::new("operands").num_args(0..);
    (shell != Shell::Bash).then(|| operands.value_hint(ValueHint::AnyPath))
}

fn complete_io(shell: Shell) -> Command {
    let program = crate::io::program();
    Command::new(IO)
        .disable_help_flag(true)
        .disable_version_flag(true)
        .args(options(&program))
        .args(files(shell))
}

fn complete(shell: Shell) -> Command {
    let program = crate::program::command();
    let commands = || program.get_subcommands().map(|c| c.get_name().to_owned());
    let complete = |defined: &Command| {
        let operands = Arg::new("operands").num_args(0..);
        let operands = match defined.get_name() {
            "completions" => Some(operands.value_parser(["bash", "zsh", "fish"])),
            "man" => {
                let names = commands().chain([IO.to_owned()]);
                Some(operands.value_parser(PossibleValuesParser::new(names)))
            }
            _ => files(shell),
        };
        Command::new(defined.get_name().to_owned())
            .about(defined.get_about().cloned().unwrap_or_default())
            .disable_help_flag(true)
            .args(options(defined))
            .args(operands)
    };
    Command::new("tandem-img")
        .disable_help_subcommand(true)
        .subcommands(program.get_subcommands().map(complete))
}

/// The values of an option that has few.
fn values_of(id: &str) -> Vec<&'static str> {
    fn names<T: Copy>(all: &[T], name: fn(T) -> &'static str) -> Vec<&'static str> {
        all.iter().map(|choice| name(*choice)).collect()
    }
    match id {
        "format" | "second-format" | "backing-format" | "output-format" | "source-format"
        | "target-format" => names(ImageFormat::ALL, ImageFormat::name),
        "aio" => vec!["threads", "native", "io_uring"],
        "discard" => vec!["unmap", "ignore"],
        "output" => vec!["human", "json"],
        "repair" => vec!["leaks", "all"],
        "follow" => names(Follow::ALL, Follow::name),
        "preallocation" => names(Preallocation::ALL, Preallocation::name),
        "cache" | "source-cache" | "backing-cache" => names(CacheMode::ALL, CacheMode::name),
        _ => vec![],
    }
}

fn takes_path(id: &str) -> bool {
    matches!(id, "backing" | "plot" | "base")
}
