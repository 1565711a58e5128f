//! Images that the user describes by options: `--image-opts driver=qcow2,file.filename=NAME` and
//! `json:{"driver": "qcow2", "file": {"filename": "NAME"}}`.
//!
//! Names that stand in an image are never read so.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::path::PathBuf;

use tandem_block::qcow2::{Backing, OpenOptions};
use tandem_block::{CacheMode, ImageFormat, Locking};

use crate::image::blkdebug::Rules;
use crate::image::layers::Window;
use crate::image::node_options::{FILE, GENERIC, QCOW2, RAW, check, is_on};
use crate::options;
use crate::size;

/// What options say of an image.
#[derive(Clone, Debug, Default)]
pub struct Described {
    /// Its format.
    pub format: Option<ImageFormat>,
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
    /// The disk whose content is the image, in place of a file's.
    pub below: Option<Box<Described>>,
    /// The part of what is below that a raw disk shows.
    pub window: Window,
    /// What is written is compressed.
    pub compress: bool,
    /// A range is zeroed in units of so many bytes; zeros are written to what is left of it.
    pub zero_unit: Option<u64>,
    /// When the file fails.
    pub rules: Option<Rules>,
    /// When the data file fails.
    pub data_rules: Option<Rules>,
    read_only: bool,
    force_share: Option<bool>,
    no_locks: bool,
    direct: Option<bool>,
    no_flush: bool,
    l2_cache_size: Option<usize>,
    l2_cache_entry_size: Option<u64>,
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

    /// The options that are called so, with these values.
    pub fn from_pairs(pairs: impl IntoIterator<Item = (String, String)>) -> Self {
        Self(pairs.into_iter().collect())
    }

    /// Sets the option `name`, unless it is set.
    pub fn add(&mut self, name: String, value: String) {
        self.0.entry(name).or_insert(value);
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
        match driver.as_deref() {
            Some(driver @ ("file" | "host_device")) => {
                let file = Child::from(self.file(driver)?);
                return Ok(Described::file(file, self.with()?));
            }
            Some("blkdebug") => {
                let child = self.debugged()?;
                return Ok(match child.disk {
                    Some(mut disk) => {
                        disk.with.zero_unit = child.zero_unit;
                        *disk
                    }
                    None => Described::file(child, self.with()?),
                });
            }
            Some("compress") => return self.compressed(),
            _ => {}
        }
        let format = match &driver {
            Some(name) => Some(
                ImageFormat::from_name(name).ok_or_else(|| format!("Unknown driver '{name}'"))?,
            ),
            None => None,
        };
        let child = self.child("file")?.ok_or(match driver {
            None => "Must specify either driver or file",
            Some(_) => NO_FILE,
        })?;
        if format.is_none() && child.disk.is_some() {
            return Err("The format of a disk on top of another must be specified".to_owned());
        }
        let data = self.child("data-file")?.unwrap_or_default();
        if data.disk.is_some() {
            return Err("A data file must be a file".to_owned());
        }
        let with = With {
            data_file: Some(data.path).filter(|path| !path.as_os_str().is_empty()),
            data_rules: data.rules,
            backing: self.backing()?,
            no_locks: child.no_locks,
            rules: child.rules,
            below: child.disk,
            window: match format {
                Some(ImageFormat::Raw) => self.window()?,
                _ => Window::default(),
            },
            ..self.with()?
        };
        Ok(Described {
            format,
            is_protocol: false,
            path: child.path,
            with,
            options: self,
        })
    }

    /// The disk below a filter that compresses what is written.
    fn compressed(&self) -> Result<Described, String> {
        let disk = self.child("file")?.and_then(|child| child.disk);
        let mut disk = *disk.ok_or(NO_FILE)?;
        disk.with.compress = true;
        Ok(disk)
    }

    /// The value of the option `name`.
    pub fn get(&self, name: &str) -> Option<&str> {
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

    /// What the options below `name` describe.
    fn child(&self, name: &str) -> Result<Option<Child>, String> {
        if let Some(node) = self.get(name) {
            return Err(no_node(node));
        }
        let child = self.below(name);
        match child.get("driver") {
            _ if child.0.is_empty() => Ok(None),
            // A raw image is its file.
            Some("raw") if child.window()? == Window::default() => {
                child.finish(ImageFormat::Raw)?;
                child
                    .child("file")?
                    .ok_or_else(|| NO_FILE.to_owned())
                    .map(Some)
            }
            Some("raw" | "qcow2") => {
                let disk = child.describe(None)?;
                disk.options
                    .finish(disk.format.unwrap_or(ImageFormat::Raw))?;
                Ok(Some(Child {
                    path: disk.path.clone(),
                    disk: Some(Box::new(disk)),
                    ..Child::default()
                }))
            }
            Some("blkdebug") => child.debugged().map(Some),
            None if child.get("filename").is_none() => {
                Err("Must specify either driver or file".to_owned())
            }
            Some(driver @ ("file" | "host_device")) => child.named(driver).map(Some),
            None => child.named("file").map(Some),
            Some(other) => Err(format!("Unknown driver '{other}'")),
        }
    }

    /// The file that these are the options of, and how it is opened.
    fn named(&self, driver: &str) -> Result<Child, String> {
        Ok(Child {
            no_locks: self.with()?.no_locks,
            ..self.file(driver)?.into()
        })
    }

    /// What is below `blkdebug`, whose options these are.
    fn debugged(&self) -> Result<Child, String> {
        let of_image = |name: &String| name.starts_with("image.");
        let own = self.0.iter().filter(|(name, _)| !of_image(name));
        check(&self.0, GENERIC)?;
        let is_generic = |name: &str| GENERIC.iter().any(|(known, _)| *known == name);
        let rules = Rules::new(
            own.map(|(name, value)| (name.as_str(), value.as_str()))
                .filter(|(name, _)| *name != "driver" && !is_generic(name)),
        )?;
        let image = self.child("image")?;
        let image = image.ok_or("A block device must be specified for \"image\"")?;
        let size_of = |name: &str| size::parse(self.get(name)?).ok().filter(|size| *size > 0);
        match (rules, &image) {
            (None, _) => Ok(Child {
                zero_unit: size_of("opt-write-zero"),
                ..image
            }),
            (
                rules,
                Child {
                    rules: None,
                    disk: None,
                    ..
                },
            ) => Ok(Child { rules, ..image }),
            _ => Err("Rules of blkdebug are for files only".to_owned()),
        }
    }

    /// The part of what is below that a raw disk shows.
    fn window(&self) -> Result<Window, String> {
        check(&self.0, RAW)?;
        let size = |name: &str| self.0.get(name).and_then(|value| size::parse(value).ok());
        Ok(Window {
            offset: size("offset").unwrap_or(0),
            size: size("size"),
        })
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
                ImageFormat::from_header(name.as_bytes())
                    .ok_or_else(|| failed(format!("Unknown driver '{name}'")))?,
            ),
        };
        let file = below.child("file").map_err(failed)?;
        below.with().map_err(failed)?;
        let finished = below.finish(format.unwrap_or(ImageFormat::Qcow2));
        finished.map_err(failed)?;
        below.refuse_other_content().map_err(failed)?;
        match (file, format) {
            (Some(file), _) if file.disk.is_some() || file.rules.is_some() => {
                Err(failed("A backing file must be a file".to_owned()))
            }
            (Some(file), format) => Ok(Backing::File {
                path: file.path,
                format,
            }),
            (None, Some(format)) => Ok(Backing::NamedAs(format)),
            (None, None) => Ok(Backing::Named),
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
            l2_cache_entry_size: self
                .get("l2-cache-entry-size")
                .and_then(|text| size::parse(text).ok()),
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
    pub fn finish(&self, format: ImageFormat) -> Result<(), String> {
        let (own, nodes): (&[_], &[_]) = match format {
            ImageFormat::Raw => (RAW, &["file"]),
            ImageFormat::Qcow2 => (QCOW2, &["file", "data-file", "backing"]),
        };
        let is_known = |name: &str| {
            let node = name.split('.').next().unwrap_or_default();
            let mut known = GENERIC.iter().chain(own).map(|(known, _)| *known);
            name == "driver" || nodes.contains(&node) || known.any(|known| known == name)
        };
        let Some(name) = self.0.keys().rfind(|name| !is_known(name)) else {
            return Ok(());
        };
        Err(
            if format == ImageFormat::Qcow2 && name.starts_with("encrypt.") {
                format!("Option '{name}' is not supported")
            } else {
                unsupported(format, name)
            },
        )
    }

    /// Refuses what makes a backing file show something else than it does by its name: it is opened by that.
    fn refuse_other_content(&self) -> Result<(), String> {
        let is_other = |name: &&String| {
            let node = name.split('.').next().unwrap_or_default();
            matches!(node, "offset" | "size" | "data-file" | "backing")
        };
        match self.0.keys().find(is_other) {
            Some(name) => Err(format!("Option 'backing.{name}' is not supported")),
            None => Ok(()),
        }
    }

    /// Refuses what is for an image's backing file, which is not opened.
    pub fn refuse_backing(&self, format: ImageFormat) -> Result<(), String> {
        match self.0.keys().find(|name| name.starts_with("backing.")) {
            Some(name) => Err(unsupported(format, name)),
            None => Ok(()),
        }
    }
}

fn unsupported(format: ImageFormat, name: &str) -> String {
    let format = format.name();
    format!("Block format '{format}' does not support the option '{name}'")
}

impl Described {
    /// The bare file `child`.
    fn file(child: Child, with: With) -> Self {
        Self {
            format: Some(ImageFormat::Raw),
            is_protocol: true,
            path: child.path,
            with: With {
                rules: child.rules,
                no_locks: with.no_locks || child.no_locks,
                ..with
            },
            options: ImageOpts::default(),
        }
    }
}

/// What an image lies in: a file, or what a disk shows.
#[derive(Default)]
struct Child {
    path: PathBuf,
    no_locks: bool,
    rules: Option<Rules>,
    disk: Option<Box<Described>>,
    zero_unit: Option<u64>,
}

impl From<PathBuf> for Child {
    fn from(path: PathBuf) -> Self {
        Self {
            path,
            ..Self::default()
        }
    }
}

impl With {
    /// Whether there is more to it than a file with its format.
    pub fn is_layered(&self) -> bool {
        self.below.is_some()
            || self.compress
            || self.window != Window::default()
            || self.rules.is_some()
            || self.data_rules.is_some()
    }

    /// Whether it contradicts the option `-U`.
    pub fn contradicts_force_share(&self) -> bool {
        self.force_share == Some(false)
    }

    /// Refuses what an image with clusters of so many bytes cannot be opened with.
    ///
    /// # Errors
    /// The message of QEMU.
    pub fn check_cluster_size(&self, cluster_size: u64) -> Result<(), String> {
        match self.l2_cache_entry_size {
            Some(size) if !size.is_power_of_two() || !(512..=cluster_size).contains(&size) => {
                Err(format!(
                    "L2 cache entry size must be a power of two between 512 and the cluster size \
                     ({cluster_size})"
                ))
            }
            _ => Ok(()),
        }
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

fn is_identifier(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || "-._".contains(c))
}
