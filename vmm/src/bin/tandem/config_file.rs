//! `--config FILE` and `--print-config`: the options of `tandem run` in a TOML file.
//!
//! A key is the name of an option, and its value what would follow the option on the command line. So
//! a file is turned into arguments, which are read like those of the command line.

use std::any::TypeId;
use std::ffi::{OsStr, OsString};
use std::fmt::Write;
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use clap::parser::ValueSource;
use clap::{Arg, ArgAction, ArgMatches, Command};
use tandem_vmm::DiskConfig;
use tandem_vmm::config::{Error as ConfigError, split_commas};
use toml::Value;
use toml::de::{DeTable, DeValue};

/// More than any machine needs.
const MAX_SIZE: u64 = 1 << 20;
/// What a file cannot hold.
const ELSEWHERE: [&str; 3] = ["config", "print-config", "help"];
/// The option that may be written as a table of its keys, and the key of the path then.
const DISK: &str = "disk";
const DISK_PATH: &str = "path";

/// What is wrong with a file, or cannot be written into one.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file cannot be read.
    #[error("could not read '{file}': {source}")]
    Read {
        /// The file.
        file: String,
        /// Why.
        source: std::io::Error,
    },
    /// The file has a mistake.
    #[error("'{file}', line {line}: {reason}")]
    Line {
        /// The file.
        file: String,
        /// Number of the line.
        line: usize,
        /// What is wrong there.
        reason: String,
    },
    /// A value has no place in a file of text.
    #[error("--{0}: the value is not UTF-8, which a file of options has to be")]
    NotUtf8(String),
}

/// A mistake at a place of the file.
struct Mistake(Range<usize>, String);

/// The arguments that the file stands for which the options of `command` in `given` name, without
/// those that are there. None, if they name no file.
pub fn arguments(command: &Command, given: &[OsString]) -> Result<Vec<OsString>, Error> {
    let named = command.get_arguments().filter(|a| a.get_long().is_some());
    let all = Command::new("tandem").no_binary_name(true);
    let all = all.args(named.map(alone));
    // What is wrong with them is said when all are there.
    let Ok(given) = all.try_get_matches_from(given) else {
        return Ok(vec![]);
    };
    match given.get_one::<PathBuf>("config") {
        None => Ok(vec![]),
        Some(file) => read_arguments(file, command, &given),
    }
}

fn read_arguments(
    file: &Path,
    command: &Command,
    given: &ArgMatches,
) -> Result<Vec<OsString>, Error> {
    let name = || file.display().to_string();
    let text = read(file).map_err(|source| Error::Read {
        file: name(),
        source,
    })?;
    translate(&text, command, given).map_err(|Mistake(place, reason)| Error::Line {
        file: name(),
        line: 1 + text
            .bytes()
            .take(place.start)
            .filter(|b| *b == b'\n')
            .count(),
        reason,
    })
}

fn read(file: &Path) -> std::io::Result<String> {
    let mut text = String::new();
    let mut file = File::open(file)?.take(MAX_SIZE + 1);
    file.read_to_string(&mut text)?;
    if text.len() as u64 > MAX_SIZE {
        return Err(std::io::Error::other("it is larger than 1 MiB"));
    }
    Ok(text)
}

fn translate(text: &str, command: &Command, given: &ArgMatches) -> Result<Vec<OsString>, Mistake> {
    let table = DeTable::parse(text).map_err(|error| {
        let reason = error.message().lines().collect::<Vec<_>>().join("; ");
        Mistake(error.span().unwrap_or_default(), reason)
    })?;
    let mut arguments = Vec::new();
    for (key, value) in table.into_inner() {
        let option = options(command).find(|option| option.get_long() == Some(key.get_ref()));
        let Some(option) = option else {
            let known: Vec<_> = options(command).filter_map(Arg::get_long).collect();
            let reason = format!(
                "unknown key '{}'; known are {}",
                key.get_ref(),
                known.join(", ")
            );
            return Err(Mistake(key.span(), reason));
        };
        let values = match (option.get_action(), value.get_ref()) {
            (ArgAction::Append, DeValue::Array(values)) => values.iter().collect(),
            _ => vec![&value],
        };
        let is_overridden =
            given.value_source(option.get_id().as_str()) == Some(ValueSource::CommandLine);
        for value in values {
            let argument = format!("--{}={}", key.get_ref(), argument(&key, value)?);
            check(option, &argument).map_err(|reason| Mistake(value.span(), reason))?;
            if !is_overridden {
                arguments.push(argument.into());
            }
        }
    }
    Ok(arguments)
}

type Key<'a> = toml::Spanned<std::borrow::Cow<'a, str>>;
type Spanned<'a> = toml::Spanned<DeValue<'a>>;

/// The options that a file can hold.
fn options(command: &Command) -> impl Iterator<Item = &Arg> {
    let options = command.get_arguments();
    options.filter(|option| {
        option
            .get_long()
            .is_some_and(|name| !ELSEWHERE.contains(&name))
    })
}

/// What stands for `value` behind the option `key`.
fn argument(key: &Key<'_>, value: &Spanned<'_>) -> Result<String, Mistake> {
    match (key.get_ref().as_ref(), value.get_ref()) {
        (DISK, DeValue::Table(keys)) => disk(keys, value.span()),
        (name, value_of) => scalar(value_of).ok_or_else(|| {
            let kind = value_of.type_str();
            Mistake(value.span(), format!("key '{name}' takes no {kind}"))
        }),
    }
}

fn scalar(value: &DeValue<'_>) -> Option<String> {
    match value {
        DeValue::String(text) => Some(text.to_string()),
        DeValue::Integer(number) if number.radix() == 10 => Some(number.as_str().to_owned()),
        DeValue::Boolean(value) => Some(value.to_string()),
        _ => None,
    }
}

/// A disk whose keys are those of `--disk`, and its path.
fn disk(keys: &DeTable<'_>, place: Range<usize>) -> Result<String, Mistake> {
    let mut path = None;
    let mut rest = String::new();
    for (key, value) in keys {
        let name = key.get_ref();
        let text = match value.get_ref() {
            DeValue::Boolean(is_on) => Some(if *is_on { "on" } else { "off" }.to_owned()),
            value => scalar(value),
        };
        let text = text.ok_or_else(|| {
            let kind = value.get_ref().type_str();
            Mistake(value.span(), format!("disk key '{name}' takes no {kind}"))
        })?;
        let text = text.replace(',', ",,");
        if name == DISK_PATH {
            path = Some(text);
            continue;
        }
        let is_name = name
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
        let pair = format!(",{name}={text}");
        let alone = match is_name {
            true => DiskConfig::parse(format!("x{pair}").as_ref()).err(),
            false => Some(ConfigError::DiskKey(name.to_string())),
        };
        match alone {
            // Others may be due to what the keys are together.
            Some(
                error @ (ConfigError::DiskKey(_)
                | ConfigError::DiskValue { .. }
                | ConfigError::DiskSerial(_)),
            ) => return Err(Mistake(key.span(), error.to_string())),
            _ => rest += &pair,
        }
    }
    let path = path.filter(|path| !path.is_empty());
    let path = path.ok_or_else(|| Mistake(place, "a disk needs a 'path'".to_owned()))?;
    Ok(path + &rest)
}

/// Whether the option takes `argument`, which is one of it.
fn check(option: &Arg, argument: &str) -> Result<(), String> {
    let command = Command::new("tandem").no_binary_name(true);
    let command = command.disable_help_flag(true).arg(alone(option));
    match command.try_get_matches_from([argument]) {
        Ok(_) => Ok(()),
        Err(error) => {
            let text = error.to_string();
            let first = text.lines().next().unwrap_or_default();
            Err(first.trim_start_matches("error: ").to_owned())
        }
    }
}

/// The option without what it needs others for, and without a value that it has by itself.
fn alone(option: &Arg) -> Arg {
    let values = usize::from(option.get_action().takes_values());
    Arg::new(option.get_id().clone())
        .long(option.get_long().unwrap_or_default().to_owned())
        .action(option.get_action().clone())
        .value_parser(option.get_value_parser().clone())
        .num_args(option.get_num_args().unwrap_or(values.into()))
        .require_equals(option.is_require_equals_set())
        .allow_hyphen_values(option.is_allow_hyphen_values_set())
}

/// The options of this machine as a file.
pub fn print(command: &Command, given: &ArgMatches) -> Result<String, Error> {
    let mut lines = String::new();
    let mut tables = String::new();
    for option in options(command) {
        let id = option.get_id().as_str();
        if given.value_source(id) != Some(ValueSource::CommandLine) {
            continue;
        }
        let name = option.get_long().unwrap_or_default();
        let values = given.get_raw(id).into_iter().flatten();
        let is_list = matches!(option.get_action(), ArgAction::Append);
        let mut list = Vec::new();
        for value in values {
            if name == DISK {
                tables += &disk_table(value)?;
                continue;
            }
            let text = utf8(name, value)?;
            list.push(match is_plain(option) {
                true => text.to_owned(),
                false => quoted(text),
            });
        }
        match (is_list, list.last()) {
            (_, None) => {}
            (true, _) => lines += &format!("{name} = [{}]\n", list.join(", ")),
            (false, Some(value)) => lines += &format!("{name} = {value}\n"),
        }
    }
    Ok(lines + &tables)
}

/// Whether its values are numbers or booleans in TOML as well.
fn is_plain(option: &Arg) -> bool {
    let kind = option.get_value_parser().type_id();
    let plain = [TypeId::of::<bool>(), TypeId::of::<u8>()];
    plain.iter().any(|plain| kind == *plain) || option.get_id() == "metrics_interval"
}

fn disk_table(text: &OsStr) -> Result<String, Error> {
    let mut table = format!("\n[[{DISK}]]\n");
    let parts = split_commas(text.as_bytes());
    for (index, part) in parts.iter().enumerate() {
        let part = utf8(DISK, OsStr::from_bytes(part))?;
        let pair = match index {
            0 => (DISK_PATH, part),
            // It has been read as a disk, whose other parts all are keys with values.
            _ => part.split_once('=').unwrap_or((part, "")),
        };
        // Writing to a string does not fail.
        let _ = writeln!(table, "{} = {}", pair.0, quoted(pair.1));
    }
    Ok(table)
}

fn utf8<'a>(name: &str, text: &'a OsStr) -> Result<&'a str, Error> {
    text.to_str().ok_or_else(|| Error::NotUtf8(name.to_owned()))
}

fn quoted(text: &str) -> String {
    Value::from(text).to_string()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "what fails here fails the test")]
mod tests {
    use std::collections::BTreeMap;

    use clap::FromArgMatches;
    use proptest::prelude::*;

    use super::*;
    use crate::run::{self, Run};

    fn matches(arguments: &[OsString]) -> ArgMatches {
        let command = run::command().no_binary_name(true);
        command.try_get_matches_from(arguments).unwrap()
    }

    fn of_text(text: &str, given: &[&str]) -> Result<Vec<OsString>, String> {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("f");
        std::fs::write(&file, text).unwrap();
        let mut given: Vec<OsString> = given.iter().map(Into::into).collect();
        given.extend(["--config".into(), file.clone().into()]);
        let found = arguments(&run::command(), &given);
        let directory = format!("{}/", dir.path().display());
        found.map_err(|error| error.to_string().replace(&directory, ""))
    }

    #[test]
    fn a_file_is_arguments() {
        let text = r#"
            cpus = 2
            kernel = "k"
            no-sandbox = true
            allow-dir = ["a", "b"]
            disk = ["x,,y", { path = "p,q", readonly = true, "iops" = 5, serial = "s" }]
        "#;
        let all = [
            "--allow-dir=a",
            "--allow-dir=b",
            "--cpus=2",
            "--disk=x,,y",
            "--disk=p,,q,iops=5,readonly=on,serial=s",
            "--kernel=k",
            "--no-sandbox=true",
        ];
        assert_eq!(of_text(text, &[]).unwrap(), all);
        // What the command line has counts, though a part of it needs what only the file has.
        let given = [
            "--disk",
            "z",
            "--cpus=3",
            "--no-sandbox",
            "--metrics-interval=5",
        ];
        assert_eq!(
            of_text(text, &given).unwrap(),
            ["--allow-dir=a", "--allow-dir=b", "--kernel=k"]
        );
        let table = "[[disk]]\npath = 'a'\n[[disk]]\npath = 'b'";
        assert_eq!(of_text(table, &[]).unwrap(), ["--disk=a", "--disk=b"]);
    }

    #[test]
    fn mistakes_are_told_with_their_lines() {
        for (text, message) in [
            (
                "cpus = 1\nmemroy = '1G'",
                "'f', line 2: unknown key 'memroy'; known are kernel, initrd, ",
            ),
            (
                "\n\nmemory = '1'",
                "'f', line 3: invalid value '1' for '--memory",
            ),
            ("cpus = 1\ncpus = 2", "'f', line 2: duplicate key"),
            ("cpus = ", "'f', line 1: "),
            ("cpus = 1.5", "'f', line 1: key 'cpus' takes no float"),
            ("cpus = [1, 2]", "'f', line 1: key 'cpus' takes no array"),
            ("config = 'f'", "'f', line 1: unknown key 'config'"),
            (
                "kernel = { a = 1 }",
                "'f', line 1: key 'kernel' takes no table",
            ),
            (
                "[[disk]]\npath = 'a'\n\naoi = 'x'",
                "'f', line 4: unknown disk key 'aoi'; known are",
            ),
            (
                "[[disk]]\npath = 'a'\nqueues = 99",
                "'f', line 3: disk key queues: '99' is not",
            ),
            (
                "[[disk]]\npath = 'a'\n'b,c' = '1'",
                "'f', line 3: unknown disk key 'b,c'",
            ),
            (
                "[[disk]]\npath = 'a'\nserial = []",
                "'f', line 3: disk key 'serial' takes no array",
            ),
            (
                "\n[[disk]]\nserial = 'a'",
                "'f', line 2: a disk needs a 'path'",
            ),
            ("disk = ['a', 'b,c']", "'f', line 1: invalid value 'b,c'"),
            (
                "[[disk]]\npath = 'a'\nbw-burst = '1M'",
                "'f', line 1: invalid value",
            ),
        ] {
            let error = of_text(text, &[]).unwrap_err();
            assert!(error.starts_with(message), "{text}: {error}");
            assert_eq!(error.lines().count(), 1, "{error}");
        }
        let error = of_text(&" ".repeat(2 << 20), &[]).unwrap_err();
        assert_eq!(error, "could not read 'f': it is larger than 1 MiB");
    }

    #[test]
    fn what_is_not_text_has_no_file() {
        let kernel = OsStr::from_bytes(b"--kernel=\xff").to_owned();
        let error = print(&run::command(), &matches(&[kernel])).unwrap_err();
        assert_eq!(
            error.to_string(),
            "--kernel: the value is not UTF-8, which a file of options has to be"
        );
    }

    /// A value of each option, or none.
    fn values() -> impl Strategy<Value = Vec<String>> {
        let text = "[ -~\\n\\t\u{e9}\u{1f600}]{1,12}";
        let path = text.prop_map(|text: String| text.replace(',', ",,"));
        let disk = (path, prop::option::of(0..3usize), any::<bool>()).prop_map(
            |(path, cache, read_only)| {
                let caches = ["none", "unsafe", "directsync"];
                let cache = cache.map_or(String::new(), |at| format!(",cache={}", caches[at]));
                let mode = if read_only { "on" } else { "off" };
                format!("--disk={path}{cache},readonly={mode}")
            },
        );
        let one = |name: &'static str, value: BoxedStrategy<String>| {
            let option = value.prop_map(move |value| format!("--{name}={value}"));
            prop::collection::vec(option, 0..2).boxed()
        };
        let text = || text.boxed();
        (
            text().prop_map(|value| vec![format!("--kernel={value}")]),
            one("initrd", text()),
            one("cmdline", text()),
            one("cpus", (1..=32u8).prop_map(|n| n.to_string()).boxed()),
            one("memory", (2..9000u32).prop_map(|n| format!("{n}M")).boxed()),
            one(
                "serial",
                text().prop_map(|path| format!("file={path}")).boxed(),
            ),
            one("output", (0..99).prop_map(|n| format!("fd={n}")).boxed()),
            one(
                "exit-port",
                any::<bool>().prop_map(|b| b.to_string()).boxed(),
            ),
            one(
                "no-sandbox",
                any::<bool>().prop_map(|b| b.to_string()).boxed(),
            ),
            prop::collection::vec(disk, 0..4),
        )
            .prop_map(|(a, b, c, d, e, f, g, h, i, j)| [a, b, c, d, e, f, g, h, i, j].concat())
    }

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn what_is_printed_is_the_same_machine(options in values()) {
            let options: Vec<OsString> = options.iter().map(Into::into).collect();
            let given = matches(&options);
            let text = print(&run::command(), &given).unwrap();
            let read = matches(&of_text(&text, &[]).unwrap());
            let run = |matches: &ArgMatches| Run::from_arg_matches(matches).unwrap();
            prop_assert_eq!(run(&read), run(&given), "{}", text);
            prop_assert_eq!(run(&read).machine(), run(&given).machine());
        }
    }

    #[test]
    fn every_option_has_a_key() {
        let command = run::command();
        let examples: BTreeMap<_, _> = [
            ("kernel", "'k'"),
            ("initrd", "'i'"),
            ("cmdline", "'-x'"),
            ("memory", "'1G'"),
            ("cpus", "2"),
            ("disk", "['d']"),
            ("serial", "'none'"),
            ("output", "'stdout'"),
            ("exit-port", "true"),
            ("metrics", "'m'"),
            ("metrics-interval", "0"),
            ("control", "'c'"),
            ("allow-dir", "['a']"),
            ("no-sandbox", "true"),
        ]
        .into();
        let names: Vec<_> = options(&command).filter_map(Arg::get_long).collect();
        assert_eq!(names.len(), examples.len());
        let text: String = names
            .iter()
            .map(|name| format!("{name} = {}\n", examples[name]))
            .collect();
        let first = matches(&of_text(&text, &[]).unwrap());
        let again = print(&command, &first).unwrap();
        let second = matches(&of_text(&again, &[]).unwrap());
        let run = |matches: &ArgMatches| Run::from_arg_matches(matches).unwrap();
        assert_eq!(run(&first), run(&second));
        assert_eq!(
            again.lines().filter(|line| line.contains('=')).count(),
            examples.len()
        );
    }
}
