//! What is to be opened, and how.

use std::ffi::{OsStr, OsString};
use std::path::PathBuf;

use tandem_block::qcow2::{BackingFormat, Follow, OpenOptions};
use tandem_block::{CacheMode, FileOptions, Locking};

use crate::getopt::Name;
use crate::options::{self, Definition, Kind, Value};
use crate::output;

/// An image to open.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name, unless `file` has it.
    pub name: Option<OsString>,
    /// The value of `file.filename`.
    pub file: Option<OsString>,
    /// The value of `driver`.
    pub format: Option<String>,
    /// Not to be written, as flags tell.
    pub read_only: bool,
    /// The value of `read-only`.
    pub node_read_only: Option<bool>,
    /// Below a temporary image that takes the writes.
    pub snapshot: bool,
    /// What is read from a backing file is kept.
    pub copy_on_read: bool,
    /// Others may write to it.
    pub force_share: bool,
    /// The value of `file.locking`.
    pub is_locked: bool,
    /// The cache mode.
    pub cache: CacheMode,
    /// The system's own asynchronous I/O is asked for.
    pub native_aio: bool,
    /// Space that is discarded is given back.
    pub unmap: bool,
    /// What a qcow2 image is opened with besides.
    pub qcow2: OpenOptions,
    /// Names of options that nobody knows.
    pub unknown: Vec<String>,
}

/// A flag of the program and of `open` that has a wrong value.
pub type Wrong = String;

impl Request {
    /// Nothing yet; names in an image may lead where `follow` says.
    pub fn new(follow: Follow) -> Self {
        Self {
            name: None,
            file: None,
            format: None,
            read_only: false,
            node_read_only: None,
            snapshot: false,
            copy_on_read: false,
            force_share: false,
            is_locked: true,
            cache: CacheMode::Writethrough,
            native_aio: false,
            unmap: true,
            qcow2: OpenOptions {
                follow,
                ..OpenOptions::default()
            },
            unknown: Vec::new(),
        }
    }

    /// Takes the flag `letter`, which the program and `open` have in common.
    pub fn flag(&mut self, letter: char, value: &str) -> Result<(), Wrong> {
        let wrong = |what: &str| format!("Invalid {what} option: {value}");
        match letter {
            'r' => self.read_only = true,
            's' => self.snapshot = true,
            'C' => self.copy_on_read = true,
            'U' => self.force_share = true,
            'k' => self.native_aio = true,
            'n' => self.cache = CacheMode::None,
            'i' => match value {
                "threads" | "io_uring" => {}
                "native" => self.native_aio = true,
                _ => return Err(wrong("aio")),
            },
            't' => self.cache = CacheMode::from_name(value).ok_or_else(|| wrong("cache"))?,
            'd' => self.unmap = is_unmap(value).ok_or_else(|| wrong("discard"))?,
            _ => {}
        }
        Ok(())
    }

    /// Takes the options of a list, as [`pairs`] has split it.
    ///
    /// # Errors
    /// The message about a wrong value.
    pub fn set(&mut self, pairs: &[(String, String)]) -> Result<(), Wrong> {
        for (key, text) in pairs {
            let text = text.as_str();
            match key.as_str() {
                "driver" => self.format = Some(text.to_owned()),
                "file.filename" => self.file = Some(text.into()),
                "file.driver" | "data-file.driver" | "backing.file.driver" => match text {
                    "file" | "host_device" => {}
                    other => return Err(unknown_driver(other)),
                },
                "file.locking" | "data-file.locking" => match text {
                    "on" | "auto" => {}
                    "off" => self.is_locked = false,
                    _ => {
                        let name = key.rsplit('.').next().unwrap_or(key);
                        return Err(format!("Parameter '{name}' does not accept value '{text}'"));
                    }
                },
                "read-only" => self.node_read_only = Some(switch("read-only", text)?),
                "force-share" => self.force_share |= switch("force-share", text)?,
                "cache.direct" => {
                    let direct = switch("cache.direct", text)?;
                    self.cache = cache_mode(direct, is_write_through(self.cache));
                }
                "cache.no-flush" if switch("cache.no-flush", text)? => {
                    self.cache = CacheMode::Unsafe;
                }
                "discard" => {
                    self.unmap = is_unmap(text).ok_or("Invalid discard option")?;
                }
                "data-file.filename" => self.qcow2.data_file = Some(PathBuf::from(text)),
                "backing.driver" => {
                    let format = BackingFormat::from_name(text.as_bytes());
                    self.qcow2.backing_format = Some(format.ok_or_else(|| unknown_driver(text))?);
                }
                "l2-cache-size" => {
                    let size = size("l2-cache-size", text)?;
                    self.qcow2.l2_cache_size = usize::try_from(size).unwrap_or(usize::MAX);
                }
                // These promise less than what is done anyway, or tune what there is not.
                "lazy-refcounts" => drop(switch("lazy-refcounts", text)?),
                "cache-size" => drop(size("cache-size", text)?),
                "refcount-cache-size" => drop(size("refcount-cache-size", text)?),
                "cache.no-flush" | "overlap-check" => {}
                other => self.unknown.push(other.to_owned()),
            }
        }
        Ok(())
    }

    /// How the files are used.
    pub fn files(&self) -> FileOptions {
        FileOptions {
            locking: match (self.force_share, self.is_locked) {
                (true, _) => Locking::ForceShare,
                (false, true) => Locking::On,
                (false, false) => Locking::Off,
            },
            cache: self.cache,
        }
    }

    /// Whether the image is open for reading only, whatever the flags say.
    pub fn is_read_only(&self) -> bool {
        self.node_read_only.unwrap_or(self.read_only)
    }
}

/// Splits a list of options into names and values. A name without a value is warned of in the
/// `name` of the program.
pub fn pairs(list: &str, name: &Name) -> Vec<(String, String)> {
    let items = options::split(list);
    let items = items.iter().filter(|item| !item.is_empty());
    items
        .map(|item| match item.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => {
                let (key, value) = match item.strip_prefix("no") {
                    Some(key) if !key.is_empty() => (key, "off"),
                    _ => (item.as_str(), "on"),
                };
                let warning = format!(
                    "warning: short-form boolean option '{item}' deprecated\n\
                     Please use {key}={value} instead"
                );
                output::complain_line(&name.text(&warning));
                (key.to_owned(), value.to_owned())
            }
        })
        .collect()
}

/// The text about a format that is not supported.
fn unknown_driver(name: &str) -> String {
    format!("Unknown driver '{name}'")
}

/// Whether a discard mode gives space back.
fn is_unmap(mode: &str) -> Option<bool> {
    match mode {
        "unmap" | "on" => Some(true),
        "ignore" | "off" => Some(false),
        _ => None,
    }
}

fn is_write_through(cache: CacheMode) -> bool {
    matches!(cache, CacheMode::Writethrough | CacheMode::Directsync)
}

fn cache_mode(is_direct: bool, is_write_through: bool) -> CacheMode {
    match (is_direct, is_write_through) {
        (false, false) => CacheMode::Writeback,
        (false, true) => CacheMode::Writethrough,
        (true, false) => CacheMode::None,
        (true, true) => CacheMode::Directsync,
    }
}

/// Whether data goes past the page cache.
pub fn is_direct(cache: CacheMode) -> bool {
    matches!(cache, CacheMode::None | CacheMode::Directsync)
}

fn switch(name: &'static str, text: &str) -> Result<bool, Wrong> {
    let value = options::parse_value(&definition(name, Kind::Switch), text)?;
    Ok(value == Value::Switch(true))
}

fn size(name: &'static str, text: &str) -> Result<u64, Wrong> {
    match options::parse_value(&definition(name, Kind::Size), text)? {
        Value::Number(size) => Ok(size),
        _ => Ok(0),
    }
}

fn definition(name: &'static str, kind: Kind) -> Definition {
    Definition {
        name,
        kind,
        default: None,
        help: "",
    }
}

/// The file that `request` means.
///
/// # Errors
/// The message if it means none, or two.
pub fn file_of(request: &Request) -> Result<&OsStr, Wrong> {
    match (&request.name, &request.file) {
        (Some(name), None) | (None, Some(name)) => Ok(name),
        (Some(_), Some(_)) => {
            Err("Can't specify 'file' and 'filename' options at the same time".to_owned())
        }
        (None, None) if request.format.is_some() => {
            Err("A block device must be specified for \"file\"".to_owned())
        }
        (None, None) => Err("Must specify either driver or file".to_owned()),
    }
}
