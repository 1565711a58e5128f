//! What is to be opened, and how.

use std::ffi::{OsStr, OsString};

use tandem_block::qcow2::Follow;
use tandem_block::{CacheMode, FileOptions, Locking};

use crate::getopt::Name;
use crate::image::local_path;
use crate::image::opts::{Described, ImageOpts};
use crate::image::pseudo;
use crate::options::{self, Definition, Kind, Value};
use crate::output;

/// An image to open.
#[derive(Clone, Debug)]
pub struct Request {
    /// Its name, unless the options have it.
    pub name: Option<OsString>,
    /// The format that a flag tells.
    pub format: Option<OsString>,
    /// Options and their values.
    pub list: Vec<(String, String)>,
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
    /// The cache mode.
    pub cache: CacheMode,
    /// The system's own asynchronous I/O is asked for.
    pub native_aio: bool,
    /// Space that is discarded is given back.
    pub unmap: bool,
    /// Where names in images may lead.
    pub follow: Follow,
}

/// A flag of the program and of `open` that has a wrong value.
pub type Wrong = String;

impl Request {
    /// Nothing yet; names in an image may lead where `follow` says.
    pub fn new(follow: Follow) -> Self {
        Self {
            name: None,
            format: None,
            list: Vec::new(),
            read_only: false,
            node_read_only: None,
            snapshot: false,
            copy_on_read: false,
            force_share: false,
            cache: CacheMode::Writethrough,
            native_aio: false,
            unmap: true,
            follow,
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
                "read-only" => self.node_read_only = Some(switch("read-only", text)?),
                "auto-read-only" => drop(switch("auto-read-only", text)?),
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
                _ => {}
            }
        }
        // Of those that are there twice, the last one counts.
        self.list.extend_from_slice(pairs);
        Ok(())
    }

    /// What is to be opened.
    ///
    /// # Errors
    /// The message if that is nothing, or two things.
    pub fn describe(&self) -> Result<Described, Wrong> {
        let mut options = ImageOpts::from_pairs(self.list.iter().cloned());
        let format = self.format.as_deref();
        let Some(name) = &self.name else {
            return options.describe(format);
        };
        if pseudo::add_name(&mut options, name, format)? {
            return options.describe(format);
        }
        let driver = format.and_then(OsStr::to_str).or(options.get("driver"));
        let is_file = matches!(driver, Some("file" | "host_device"));
        let key = if is_file { "filename" } else { "file.filename" };
        if options.get(key).is_some() {
            let text = "Can't specify 'file' and 'filename' options at the same time";
            return Err(text.to_owned());
        }
        let path = local_path(name)?.to_owned();
        options.add(key.to_owned(), path.to_string_lossy().into_owned());
        // A name need not be UTF-8.
        Ok(Described {
            path,
            ..options.describe(format)?
        })
    }

    /// How the files are used.
    pub fn files(&self) -> FileOptions {
        FileOptions {
            locking: if self.force_share {
                Locking::ForceShare
            } else {
                Locking::On
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

fn definition(name: &'static str, kind: Kind) -> Definition {
    Definition {
        name,
        kind,
        default: None,
        help: "",
    }
}
