//! Command lines as the C library's `getopt_long` reads them, and `qemu-img` with it.
//!
//! Which options there are is told by a [`clap::Command`]; clap's own parser has other rules and
//! other messages: options may follow file names here, long names may be cut short, and the first
//! mistake ends the reading.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::Path;

use clap::{Arg, ArgAction, Command};

use crate::failure::Failure;

/// The name by which the program was called.
#[derive(Clone, Debug)]
pub struct Name {
    called: String,
    base: String,
    hints: bool,
}

impl Name {
    /// `argument` is the program's first argument: its name or path.
    pub fn new(argument: OsString) -> Self {
        let base = Path::new(&argument).file_name().unwrap_or(&argument);
        Self {
            base: base.to_string_lossy().into_owned(),
            called: argument.to_string_lossy().into_owned(),
            hints: true,
        }
    }

    /// For a program whose messages give no hint at the help, because it prints the help.
    pub fn without_hints(argument: OsString) -> Self {
        Self {
            hints: false,
            ..Self::new(argument)
        }
    }

    /// The program's name without its directory.
    pub fn base(&self) -> &str {
        &self.base
    }

    /// `text` after the program's name.
    pub fn text(&self, text: &str) -> String {
        format!("{}: {text}", self.base)
    }

    /// A failure with `text` after the program's name.
    pub fn error(&self, text: &str) -> Failure {
        Failure {
            message: self.text(text) + "\n",
            status: 1,
        }
    }

    /// [`error`](Name::error) with a hint at the help.
    pub fn usage(&self, text: &str) -> Failure {
        self.with_hint(self.error(text))
    }

    /// [`usage`](Name::usage) with the program's name as it was called, as `getopt` has it.
    pub fn usage_as_called(&self, text: &str) -> Failure {
        self.with_hint(Failure {
            message: format!("{}: {text}\n", self.called),
            status: 1,
        })
    }

    fn with_hint(&self, mut failure: Failure) -> Failure {
        if self.hints {
            failure.message += &format!("Try '{} --help' for more info\n", self.called);
        }
        failure
    }

    fn subcommand(&self, name: &str) -> Self {
        Self {
            base: self.base.clone(),
            called: format!("{} {name}", self.called),
            hints: self.hints,
        }
    }
}

/// What a command line asks for.
pub enum Outcome {
    /// The help, which is this text.
    Help(String),
    /// To run the subcommand.
    Run(Parsed),
}

/// The arguments of a subcommand.
#[derive(Debug)]
pub struct Parsed {
    /// For messages.
    pub name: Name,
    /// File names and the like, in order.
    pub operands: Vec<OsString>,
    options: Vec<(String, OsString)>,
}

impl Parsed {
    /// Whether the option without a value is there.
    pub fn has(&self, id: &str) -> bool {
        self.options.iter().any(|(found, _)| found == id)
    }

    /// How often the option is there.
    pub fn count(&self, id: &str) -> usize {
        self.options.iter().filter(|(found, _)| found == id).count()
    }

    /// The last value of an option.
    pub fn value(&self, id: &str) -> Option<&OsStr> {
        let (_, value) = self.options.iter().rfind(|(found, _)| found == id)?;
        Some(value)
    }

    /// All values of an option, in order.
    pub fn values<'a>(&'a self, id: &'a str) -> impl Iterator<Item = &'a OsStr> {
        self.options
            .iter()
            .filter(move |(found, _)| found == id)
            .map(|(_, value)| value.as_os_str())
    }

    /// All options with their values, in order.
    pub fn all(&self) -> impl Iterator<Item = (&str, &OsStr)> {
        self.options
            .iter()
            .map(|(id, value)| (id.as_str(), value.as_os_str()))
    }

    /// Fails if there is the option `object`, which QEMU has.
    pub fn refuse_objects(&self) -> Result<(), Failure> {
        if !self.has("object") {
            return Ok(());
        }
        let text = "Option '--object' is not supported: the secrets that objects hold are for \
                    encrypted images, which are not supported";
        Err(self.name.error(text))
    }
}

/// Reads `args` as the arguments of `command`. With `reads_sizes`, a number behind the first operand
/// is one, too, even if it begins with a dash.
pub fn parse(
    command: Command,
    name: &Name,
    args: &[OsString],
    reads_sizes: bool,
) -> Result<Outcome, Failure> {
    let name = name.subcommand(command.get_name());
    read(command, &name, args, reads_sizes)
}

/// Reads `args` as the arguments of `command`, which is a program of its own.
pub fn parse_program(command: Command, name: &Name, args: &[OsString]) -> Result<Outcome, Failure> {
    read(command, name, args, false)
}

fn read(
    command: Command,
    name: &Name,
    args: &[OsString],
    reads_sizes: bool,
) -> Result<Outcome, Failure> {
    let mut reader = Reader {
        name: name.clone(),
        options: command.get_opts().cloned().collect(),
        args: args.iter(),
    };
    let mut parsed = Parsed {
        name: reader.name.clone(),
        operands: Vec::new(),
        options: Vec::new(),
    };
    while let Some(arg) = reader.args.next() {
        let bytes = arg.as_bytes();
        if bytes == b"--" {
            parsed.operands.extend(reader.args.by_ref().cloned());
        } else if let Some(long) = bytes.strip_prefix(b"--") {
            parsed.options.push(reader.long(long)?);
        } else if bytes.len() > 1 && bytes[0] == b'-' {
            reader.short(&bytes[1..], &mut parsed.options)?;
        } else {
            parsed.operands.push(arg.clone());
            if reads_sizes && parsed.operands.len() == 1 {
                parsed.operands.extend(reader.negative_number());
            }
        }
        if parsed.has("help") {
            let text = command
                .bin_name(reader.name.called)
                .render_help()
                .to_string();
            return Ok(Outcome::Help(text));
        }
    }
    Ok(Outcome::Run(parsed))
}

struct Reader<'a> {
    name: Name,
    options: Vec<Arg>,
    args: std::slice::Iter<'a, OsString>,
}

impl Reader<'_> {
    /// Takes the next argument if it is a dash and a digit, and more.
    fn negative_number(&mut self) -> Option<OsString> {
        let next = self.args.as_slice().first()?;
        let digits = next.as_bytes().strip_prefix(b"-")?;
        digits
            .first()?
            .is_ascii_digit()
            .then(|| self.args.next())?
            .cloned()
    }

    /// Reads `--name`, `--name=value` or `--name value`; `bytes` follows the dashes.
    fn long(&mut self, bytes: &[u8]) -> Result<(String, OsString), Failure> {
        let equals = bytes.iter().position(|&byte| byte == b'=');
        let (name, value) = match equals {
            Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
            None => (bytes, None),
        };
        let option = self.find_long(name, bytes)?;
        let long = option.get_long().unwrap_or_default();
        let value = match (takes_value(&option), value) {
            (true, Some(value)) => OsString::from_vec(value.to_vec()),
            (true, None) => self.args.next().cloned().ok_or_else(|| {
                self.name
                    .usage_as_called(&format!("option '--{long}' requires an argument"))
            })?,
            (false, None) => OsString::new(),
            (false, Some(_)) => {
                let text = format!("option '--{long}' doesn't allow an argument");
                return Err(self.name.usage_as_called(&text));
            }
        };
        Ok((option.get_id().to_string(), value))
    }

    /// The option called `name`, or the only one whose name begins so.
    fn find_long(&self, name: &[u8], given: &[u8]) -> Result<Arg, Failure> {
        let long = |option: &&Arg| option.get_long().unwrap_or_default().as_bytes().to_vec();
        if let Some(exact) = self.options.iter().find(|option| long(option) == name) {
            return Ok(exact.clone());
        }
        let found: Vec<_> = self
            .options
            .iter()
            .filter(|option| long(option).starts_with(name))
            .collect();
        let given = String::from_utf8_lossy(given);
        match &found[..] {
            [one] => Ok((*one).clone()),
            [] => Err(self
                .name
                .usage_as_called(&format!("unrecognized option '--{given}'"))),
            many => {
                let names: Vec<_> = many
                    .iter()
                    .filter_map(|option| Some(format!("'--{}'", option.get_long()?)))
                    .collect();
                Err(self.name.usage_as_called(&format!(
                    "option '--{given}' is ambiguous; possibilities: {}",
                    names.join(" ")
                )))
            }
        }
    }

    /// Reads `-abc`, where the last may take a value, in the same or in the next argument.
    fn short(
        &mut self,
        letters: &[u8],
        found: &mut Vec<(String, OsString)>,
    ) -> Result<(), Failure> {
        for (i, &letter) in letters.iter().enumerate() {
            let shown = char::from(letter);
            let option = self
                .options
                .iter()
                .find(|option| option.get_short() == Some(shown))
                .ok_or_else(|| {
                    self.name
                        .usage_as_called(&format!("invalid option -- '{shown}'"))
                })?;
            let id = option.get_id().to_string();
            if !takes_value(option) {
                found.push((id, OsString::new()));
                continue;
            }
            let value = match &letters[i + 1..] {
                [] => self.args.next().cloned().ok_or_else(|| {
                    self.name
                        .usage_as_called(&format!("option requires an argument -- '{shown}'"))
                })?,
                rest => OsString::from_vec(rest.to_vec()),
            };
            found.push((id, value));
            return Ok(());
        }
        Ok(())
    }
}

fn takes_value(option: &Arg) -> bool {
    matches!(option.get_action(), ArgAction::Set | ArgAction::Append)
}

/// An option without a value, for definitions.
pub fn flag(id: &'static str, short: Option<char>, help: &'static str) -> Arg {
    let arg = Arg::new(id).long(id).help(help).action(ArgAction::SetTrue);
    match short {
        Some(short) => arg.short(short),
        None => arg,
    }
}

/// An option with a value, for definitions.
pub fn value(id: &'static str, short: Option<char>, name: &'static str, help: &'static str) -> Arg {
    flag(id, short, help)
        .action(ArgAction::Append)
        .value_name(name)
}

/// A subcommand, with the option that every one has.
pub fn command(name: &'static str, about: &'static str, usage: &'static str) -> Command {
    Command::new(name)
        .about(about)
        .disable_help_flag(true)
        .override_usage(usage)
        .arg(help())
}

/// The option that every subcommand has.
pub fn help() -> Arg {
    flag("help", Some('h'), "Print this help")
}
