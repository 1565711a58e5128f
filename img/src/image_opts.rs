//! Images that the user describes by options: `--image-opts driver=qcow2,file.filename=NAME` and
//! `json:{"driver": "qcow2", "file": {"filename": "NAME"}}`.
//!
//! Names that stand in an image are never read so.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;

use serde_json::Value;
use tandem_block::qcow2::{Backing, BackingFormat, OpenOptions};
use tandem_block::{CacheMode, Locking};

use crate::image::Format;
use crate::json::double_quoted;
use crate::options;
use crate::size;

/// What options say of an image.
#[derive(Clone, Debug, Default)]
pub struct Described {
    /// Its format.
    pub format: Option<Format>,
    /// Whether it is the bare file, which has no format.
    pub is_protocol: bool,
    /// The file.
    pub path: PathBuf,
    /// How it is opened.
    pub with: With,
    /// All that was said, of which a part has a meaning for one format only.
    pub options: ImageOpts,
}

/// How an image is opened.
#[derive(Clone, Debug, Default)]
pub struct With {
    /// Its data file, in place of the one that it names.
    pub data_file: Option<PathBuf>,
    /// What is below it, in place of what it names.
    pub backing: Backing,
    read_only: bool,
    force_share: Option<bool>,
    no_locks: bool,
    direct: Option<bool>,
    no_flush: bool,
    l2_cache_size: Option<usize>,
}

/// Values that an option may have, and what to say of others.
enum Values {
    Any,
    Switch,
    Size,
    Number,
    OneOf(&'static [&'static str], fn(&str) -> String),
}

/// Options of every image and file.
const GENERIC: &[(&str, Values)] = &[
    ("auto-read-only", Values::Switch),
    ("cache.direct", Values::Switch),
    ("cache.no-flush", Values::Switch),
    (
        "detect-zeroes",
        Values::OneOf(&["off", "on", "unmap"], invalid),
    ),
    (
        "discard",
        Values::OneOf(&["ignore", "off", "unmap", "on"], |_| {
            "Invalid discard option".to_owned()
        }),
    ),
    ("force-share", Values::Switch),
    ("node-name", Values::Any),
    ("read-only", Values::Switch),
];

/// Options of files.
const FILE: &[(&str, Values)] = &[
    (
        "aio",
        Values::OneOf(&["threads", "native", "io_uring"], invalid),
    ),
    ("locking", Values::OneOf(&["auto", "on", "off"], invalid)),
];

/// Options of qcow2 images.
const QCOW2: &[(&str, Values)] = &[
    ("cache-clean-interval", Values::Number),
    ("cache-size", Values::Size),
    ("discard-no-unref", Values::Switch),
    ("l2-cache-entry-size", Values::Size),
    ("l2-cache-size", Values::Size),
    ("lazy-refcounts", Values::Switch),
    ("overlap-check", OVERLAP_CHECK),
    ("overlap-check.active-l1", Values::Switch),
    ("overlap-check.active-l2", Values::Switch),
    ("overlap-check.bitmap-directory", Values::Switch),
    ("overlap-check.inactive-l1", Values::Switch),
    ("overlap-check.inactive-l2", Values::Switch),
    ("overlap-check.main-header", Values::Switch),
    ("overlap-check.refcount-block", Values::Switch),
    ("overlap-check.refcount-table", Values::Switch),
    ("overlap-check.snapshot-table", Values::Switch),
    ("overlap-check.template", OVERLAP_CHECK),
    ("pass-discard-other", Values::Switch),
    ("pass-discard-request", Values::Switch),
    ("pass-discard-snapshot", Values::Switch),
    ("refcount-cache-size", Values::Size),
];

const OVERLAP_CHECK: Values = Values::OneOf(&["none", "constant", "cached", "all"], |value| {
    format!(
        "Unsupported value '{value}' for qcow2 option 'overlap-check'. Allowed are any of the \
         following: none, constant, cached, all"
    )
});

fn invalid(value: &str) -> String {
    format!("invalid parameter value: {value}")
}

/// Options and their values, by name.
#[derive(Clone, Debug, Default)]
pub struct ImageOpts(BTreeMap<String, String>);

impl ImageOpts {
    /// Options as `--image-opts` has them; `warn` is told what is going out of use.
    ///
    /// # Errors
    /// The message of QEMU.
    pub fn from_list(list: &str, warn: impl Fn(&str)) -> Result<Self, String> {
        let mut values = BTreeMap::new();
        for (i, item) in options::split(list).into_iter().enumerate() {
            let (name, value) = match item.split_once('=') {
                Some(pair) => pair,
                None if list.is_empty() => break,
                None if i == 0 => ("file", &*item),
                None => {
                    let (name, value) = match item.strip_prefix("no") {
                        Some(name) => (name, "off"),
                        None => (&*item, "on"),
                    };
                    if item != "help" && item != "?" {
                        warn(&format!(
                            "warning: short-form boolean option '{item}' deprecated\n\
                             Please use {name}={value} instead"
                        ));
                    }
                    (name, value)
                }
            };
            values.insert(name.to_owned(), value.to_owned());
        }
        match values.get("id") {
            Some(id) if !is_identifier(id) => Err(
                "Parameter 'id' expects an identifier\nIdentifiers consist of letters, digits, \
                 '-', '.', '_', starting with a letter."
                    .to_owned(),
            ),
            _ => Ok(Self(values)),
        }
    }

    /// Options in JSON.
    ///
    /// # Errors
    /// The message of QEMU.
    pub fn from_json(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() {
            return Err("Could not parse the JSON options: Expecting a JSON value".to_owned());
        }
        let value: Value = serde_json::from_str(&double_quoted(text)).map_err(|e| {
            let reason = match (
                e.is_eof(),
                text.split(['{', '}', '[', ']', ',', ':']).next(),
            ) {
                (true, _) => "premature EOI".to_owned(),
                (_, Some(word)) if word.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                    format!("invalid keyword '{word}'")
                }
                _ => e.to_string(),
            };
            format!("Could not parse the JSON options: JSON parse error, {reason}")
        })?;
        if !value.is_object() {
            return Err("Invalid JSON object given".to_owned());
        }
        let mut values = BTreeMap::new();
        flatten("", &value, &mut values);
        Ok(Self(values))
    }

    /// What the options say; `format` is what another one says of the format.
    ///
    /// # Errors
    /// The message of QEMU.
    pub fn describe(self, format: Option<&OsStr>) -> Result<Described, String> {
        let driver = match (format, self.get("driver")) {
            (Some(format), _) => Some(format.to_string_lossy().into_owned()),
            (None, driver) => driver.map(str::to_owned),
        };
        if let Some(driver @ ("file" | "host_device")) = driver.as_deref() {
            return Ok(Described {
                format: Some(Format::Raw),
                is_protocol: true,
                path: self.file(driver)?,
                with: self.with()?,
                options: Self::default(),
            });
        }
        let format = match &driver {
            Some(name) => {
                Some(Format::from_name(name).ok_or_else(|| format!("Unknown driver '{name}'"))?)
            }
            None => None,
        };
        let (path, of_file) = self.child("file")?.ok_or(match driver {
            None => "Must specify either driver or file",
            Some(_) => NO_FILE,
        })?;
        let with = With {
            data_file: self.child("data-file")?.map(|(path, _)| path),
            backing: self.backing()?,
            no_locks: of_file.no_locks,
            ..self.with()?
        };
        Ok(Described {
            format,
            is_protocol: false,
            path,
            with,
            options: self,
        })
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    /// The options that begin with `name` and a dot, without that.
    fn below(&self, name: &str) -> Self {
        let strip = |(key, value): (&String, &String)| {
            let rest = key.strip_prefix(name)?.strip_prefix('.')?;
            Some((rest.to_owned(), value.clone()))
        };
        Self(self.0.iter().filter_map(strip).collect())
    }

    /// The file that the options below `name` describe, and how it is opened.
    fn child(&self, name: &str) -> Result<Option<(PathBuf, With)>, String> {
        if let Some(node) = self.get(name) {
            return Err(no_node(node));
        }
        let child = self.below(name);
        match child.get("driver") {
            _ if child.0.is_empty() => Ok(None),
            // A raw image is its file.
            Some("raw") => {
                child.finish(Format::Raw)?;
                child
                    .child("file")?
                    .ok_or_else(|| NO_FILE.to_owned())
                    .map(Some)
            }
            None if child.get("filename").is_none() => {
                Err("Must specify either driver or file".to_owned())
            }
            None => Ok(Some((child.file("file")?, child.with()?))),
            Some(driver @ ("file" | "host_device")) => {
                Ok(Some((child.file(driver)?, child.with()?)))
            }
            Some(other) => Err(format!("Unknown driver '{other}'")),
        }
    }

    /// The file that these are the options of.
    fn file(&self, driver: &str) -> Result<PathBuf, String> {
        let name = self.get("filename").filter(|name| !name.is_empty());
        let name = name.ok_or("The 'file' block driver requires a file name")?;
        check(&self.0, GENERIC)?;
        check(&self.0, FILE)?;
        let is_known = |name: &str| {
            let known = GENERIC.iter().chain(FILE).map(|(known, _)| *known);
            known
                .chain(["driver", "filename"])
                .any(|known| known == name)
        };
        match self.0.keys().rfind(|name| !is_known(name)) {
            Some(name) => Err(format!(
                "Block protocol '{driver}' doesn't support the option '{name}'"
            )),
            None => Ok(name.into()),
        }
    }

    /// What is to be below the image.
    fn backing(&self) -> Result<Backing, String> {
        let failed = |reason: String| format!("Could not open backing file: {reason}");
        match self.get("backing") {
            Some("") => return Ok(Backing::Nothing),
            Some(node) => return Err(failed(no_node(node))),
            None => {}
        }
        let below = self.below("backing");
        if below.0.is_empty() {
            return Ok(Backing::Named);
        }
        let format = match below.get("driver") {
            None => None,
            Some(name) => Some(
                BackingFormat::from_name(name.as_bytes())
                    .ok_or_else(|| failed(format!("Unknown driver '{name}'")))?,
            ),
        };
        let file = below.child("file").map_err(failed)?;
        below.with().map_err(failed)?;
        let finished = below.finish(match format {
            Some(BackingFormat::Raw) => Format::Raw,
            _ => Format::Qcow2,
        });
        finished.map_err(failed)?;
        match file {
            Some((path, _)) => Ok(Backing::File { path, format }),
            None => Err("'backing' options are not supported without 'backing.file'".to_owned()),
        }
    }

    /// What the options say that every image has, and those of qcow2.
    fn with(&self) -> Result<With, String> {
        check(&self.0, GENERIC)?;
        check(&self.0, QCOW2)?;
        let is_on = |name: &str| self.0.get(name).map(|value| is_on(value) == Some(true));
        let is = |name: &str, value: &str| self.0.get(name).is_some_and(|found| found == value);
        let unmaps = is("discard", "unmap") || is("discard", "on");
        if is("detect-zeroes", "unmap") && !unmaps {
            return Err(
                "setting detect-zeroes to unmap is not allowed without setting discard \
                        operation to unmap"
                    .to_owned(),
            );
        }
        if is("aio", "native") && is_on("cache.direct") != Some(true) {
            return Err(
                "aio=native was specified, but it requires cache.direct=on, which was \
                        not specified."
                    .to_owned(),
            );
        }
        Ok(With {
            read_only: is_on("read-only") == Some(true),
            force_share: is_on("force-share"),
            no_locks: is("locking", "off"),
            direct: is_on("cache.direct"),
            no_flush: is_on("cache.no-flush") == Some(true),
            l2_cache_size: self.l2_cache_size()?,
            ..With::default()
        })
    }

    /// Bytes for the cache of L2 tables.
    fn l2_cache_size(&self) -> Result<Option<usize>, String> {
        let size = |name: &str| size::parse(self.0.get(name)?).ok();
        let (all, l2, refcounts) = (
            size("cache-size"),
            size("l2-cache-size"),
            size("refcount-cache-size"),
        );
        let wrong = |reason: &str| Err(reason.to_owned());
        match (all, l2, refcounts) {
            (Some(_), Some(_), Some(_)) => wrong(
                "cache-size, l2-cache-size and refcount-cache-size may not be set at the same time",
            ),
            (Some(all), Some(l2), _) if l2 > all => {
                wrong("l2-cache-size may not exceed cache-size")
            }
            (Some(all), _, Some(refcounts)) if refcounts > all => {
                wrong("refcount-cache-size may not exceed cache-size")
            }
            (all, l2, refcounts) => Ok(l2
                .or(all.map(|all| all - refcounts.unwrap_or(0)))
                .map(|bytes| usize::try_from(bytes).unwrap_or(usize::MAX))),
        }
    }

    /// Refuses what no image of the format has.
    pub fn finish(&self, format: Format) -> Result<(), String> {
        let (own, nodes): (&[_], &[_]) = match format {
            Format::Raw => (&[], &["file"]),
            Format::Qcow2 => (QCOW2, &["file", "data-file", "backing"]),
        };
        let is_known = |name: &str| {
            let node = name.split('.').next().unwrap_or_default();
            let mut known = GENERIC.iter().chain(own).map(|(known, _)| *known);
            name == "driver" || nodes.contains(&node) || known.any(|known| known == name)
        };
        let Some(name) = self.0.keys().rfind(|name| !is_known(name)) else {
            return Ok(());
        };
        let exists = match format {
            Format::Raw => name == "offset" || name == "size",
            Format::Qcow2 => name.starts_with("encrypt."),
        };
        Err(if exists {
            format!("Option '{name}' is not supported")
        } else {
            unsupported(format, name)
        })
    }

    /// Refuses what is for an image's backing file, which is not opened.
    pub fn refuse_backing(&self, format: Format) -> Result<(), String> {
        match self.0.keys().find(|name| name.starts_with("backing.")) {
            Some(name) => Err(unsupported(format, name)),
            None => Ok(()),
        }
    }
}

fn unsupported(format: Format, name: &str) -> String {
    let format = format.name();
    format!("Block format '{format}' does not support the option '{name}'")
}

impl With {
    /// Whether it contradicts the option `-U`.
    pub fn contradicts_force_share(&self) -> bool {
        self.force_share == Some(false)
    }

    /// Puts it into `options`, which come from other arguments.
    ///
    /// # Errors
    /// Why an image cannot be opened so.
    pub fn apply(&self, options: &mut OpenOptions) -> Result<(), String> {
        let files = &mut options.files;
        if self.no_locks {
            files.locking = Locking::Off;
        } else if self.force_share == Some(true) {
            files.locking = Locking::ForceShare;
        }
        if !options.read_only {
            if self.read_only {
                return Err("Block node is read-only".to_owned());
            }
            if files.locking == Locking::ForceShare {
                return Err("force-share=on can only be used with read-only images".to_owned());
            }
        }
        files.cache = match (files.cache, self.direct) {
            _ if self.no_flush => CacheMode::Unsafe,
            (CacheMode::Writeback, Some(true)) => CacheMode::None,
            (CacheMode::Writethrough, Some(true)) => CacheMode::Directsync,
            (CacheMode::None, Some(false)) => CacheMode::Writeback,
            (CacheMode::Directsync, Some(false)) => CacheMode::Writethrough,
            (mode, _) => mode,
        };
        if let Some(size) = self.l2_cache_size {
            options.l2_cache_size = size;
        }
        options.data_file.clone_from(&self.data_file);
        options.backing.clone_from(&self.backing);
        Ok(())
    }
}

const NO_FILE: &str = "A block device must be specified for \"file\"";

fn no_node(name: &str) -> String {
    format!("Cannot find device='{name}' nor node-name='{name}'")
}

/// Refuses wrong values of the options that are `known`.
fn check(values: &BTreeMap<String, String>, known: &[(&str, Values)]) -> Result<(), String> {
    for (name, allowed) in known {
        let Some(value) = values.get(*name) else {
            continue;
        };
        match allowed {
            Values::Any => {}
            Values::Switch if is_on(value).is_some() => {}
            Values::Switch => return Err(format!("Parameter '{name}' expects 'on' or 'off'")),
            Values::Size => {
                size::parse(value).map_err(|wrong| wrong.message(name, value))?;
            }
            Values::Number => {
                let is_number = size::c_number(value).is_some_and(|(_, amount)| amount.is_some());
                let text = || format!("Parameter '{name}' expects a number");
                is_number.then_some(()).ok_or_else(text)?;
            }
            Values::OneOf(names, _) if names.contains(&&**value) => {}
            Values::OneOf(_, message) => return Err(message(value)),
        }
    }
    Ok(())
}

fn is_on(value: &str) -> Option<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}

fn is_identifier(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}

/// Adds what `value` holds, under names with dots.
fn flatten(name: &str, value: &Value, values: &mut BTreeMap<String, String>) {
    let below = |key: &str| match name {
        "" => key.to_owned(),
        name => format!("{name}.{key}"),
    };
    let text = match value {
        Value::Object(map) => {
            return map
                .iter()
                .for_each(|(key, value)| flatten(&below(key), value, values));
        }
        Value::Array(items) => {
            let items = items.iter().enumerate();
            return items.for_each(|(i, value)| flatten(&below(&i.to_string()), value, values));
        }
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::Null => String::new(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
    };
    values.insert(name.to_owned(), text);
}
