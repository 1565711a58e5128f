//! From a file name on the command line to an image of a known format.

mod blkdebug;
pub mod chain;
mod format;
mod layers;
mod node_options;
pub mod opened;
pub mod opts;
pub mod pseudo;

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fs::Metadata;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

use tandem_block::qcow2::{Backing, Follow, Info, OpenOptions, backing_path};
use tandem_block::{Disk, FileOptions, FileStorage, ImageFormat, Locking, Storage};

use crate::failure::Failure;
use crate::getopt::{Name, Parsed};
use crate::output;
use format::probe;
use opened::Opened;
use opts::{Described, ImageOpts, With};

pub use format::{PROBED, format_of};

/// What is said of bitmaps that a program has not kept up to date.
const STALE_BITMAPS: &str = "a program lacking bitmap support modified this file, so all bitmaps are \
                             now considered inconsistent";
const STALE_BITMAPS_V2: &str = "This qcow2 v2 image contains bitmaps, but they may have been modified \
                                by a program without persistent bitmap support; so now they must all \
                                be considered inconsistent";

/// Tells the user of bitmaps in an image that are worthless.
pub fn warn_of_stale_bitmaps(info: &Info, program: &Name) {
    if !info.stale_bitmaps {
        return;
    }
    let text = match info.version {
        2 => STALE_BITMAPS_V2,
        _ => STALE_BITMAPS,
    };
    let warning = program.text(&format!("warning: {text}"));
    // Without an end of the line, as in QEMU.
    output::complain(&format!(
        "{warning}\nSome clusters may be leaked, run 'qemu-img check -r' on the image file to fix."
    ));
}

/// The local file that a name on the command line means.
///
/// # Errors
/// The text about a protocol other than `file:`.
pub fn local_path(name: &OsStr) -> Result<&Path, String> {
    let bytes = name.as_bytes();
    let end = bytes.iter().position(|byte| b":/".contains(byte));
    match end.filter(|&end| bytes[end] == b':') {
        None => Ok(Path::new(name)),
        Some(end) if &bytes[..end] == b"file" => {
            Ok(Path::new(OsStr::from_bytes(&bytes[end + 1..])))
        }
        Some(end) => {
            let protocol = String::from_utf8_lossy(&bytes[..end]);
            Err(format!("Unknown protocol '{protocol}'"))
        }
    }
}

/// An image that exists.
#[derive(Debug)]
pub struct Image<'a> {
    /// Its name, or the options that describe it, as they were given.
    pub name: &'a OsStr,
    /// The file.
    pub path: Cow<'a, Path>,
    /// Its format.
    pub format: ImageFormat,
    /// Whether the format was found out by what the file begins with.
    pub probed: bool,
    /// Whether it was described as a file, which has no format.
    pub is_protocol: bool,
    /// The options that describe it.
    pub described: ImageOpts,
    /// What they say of how it is opened.
    pub with: With,
    /// What the file system says of it.
    pub metadata: Metadata,
    /// Length in bytes.
    pub len: u64,
}

impl<'a> Image<'a> {
    /// Looks at the only operand of a subcommand, whose option `format` may say what it is.
    pub fn from_args(args: &'a Parsed) -> Result<Self, Failure> {
        let [name] = &args.operands[..] else {
            return Err(args.name.usage("Expecting one image file name"));
        };
        let image = Self::from_operand(args, name, "format")?;
        image.refuse_layers().map_err(|e| args.name.error(&e))?;
        Ok(image)
    }

    /// Fails if it is more than a file with its format, of which the file alone would be looked at.
    pub fn refuse_layers(&self) -> Result<(), String> {
        match self.with.is_layered() {
            true => Err(could_not_open(
                self.name,
                "Disks on top of others, parts of disks and blkdebug are not supported here",
            )),
            false => Ok(()),
        }
    }

    /// Looks at the operand `name`, whose format the option `format` may say; with `--image-opts`
    /// it is a list of options.
    pub fn from_operand(args: &Parsed, name: &'a OsStr, format: &str) -> Result<Self, Failure> {
        Self::from_name(args, name, args.value(format), args.has("image-opts"))
    }

    /// Looks at the image `name`, of which `format` may say what it is, or which is a list of options.
    pub fn from_name(
        args: &Parsed,
        name: &'a OsStr,
        format: Option<&OsStr>,
        is_list: bool,
    ) -> Result<Self, Failure> {
        let opened = |reason: String| args.name.error(&could_not_open(name, &reason));
        let image = if is_list {
            if format.is_some() {
                let text = "--image-opts and --format are mutually exclusive";
                return Err(args.name.error(text));
            }
            let list = name.to_str().ok_or("Option list is not UTF-8".to_owned());
            let warn = |text: &str| output::complain_line(&args.name.text(text));
            let list = list.and_then(|list| ImageOpts::from_list(list, warn));
            let list = list.map_err(|text| args.name.error(&text))?;
            list.describe(None)
                .and_then(|image| Self::look_described(name, image))
        } else {
            Self::look(name, format)
        };
        let image = image.map_err(opened)?;
        if image.format == ImageFormat::Qcow2
            && let Ok(info) = Info::read_with(&image.path, Locking::Off)
        {
            warn_of_stale_bitmaps(&info, &args.name);
        }
        if args.has("force-share") && image.with.contradicts_force_share() {
            return Err(args
                .name
                .error("--force-share/-U conflicts with image options"));
        }
        Ok(image)
    }

    /// How the image is opened as qcow2; names in it may lead where `follow` says.
    ///
    /// # Errors
    /// Why it cannot be opened so.
    pub fn options(
        &self,
        read_only: bool,
        follow: Follow,
        files: FileOptions,
    ) -> tandem_block::Result<OpenOptions> {
        let mut options = OpenOptions {
            read_only,
            follow,
            files,
            mark_zeroes: true,
            ..OpenOptions::default()
        };
        let applied = self.with.apply(&mut options);
        applied.map_err(tandem_block::Error::Option)?;
        Ok(options)
    }

    /// Warns, as QEMU does before it writes, of a raw image that nobody has said to be one.
    pub fn warn_of_guess(&self) {
        if self.format == ImageFormat::Raw && self.probed {
            output::complain(&guessed_raw(self.path.as_os_str()));
        }
    }

    /// Opens it as a disk; names in it may lead where `follow` says.
    pub fn open(
        &self,
        read_only: bool,
        follow: Follow,
        files: FileOptions,
    ) -> tandem_block::Result<Box<dyn Disk>> {
        let options = self.options(read_only, follow, files)?;
        Ok(Opened::open(self, &options)?.into_disk())
    }

    /// Names of the files that hold the guest's data: of the image, and of those below it.
    ///
    /// # Errors
    /// What keeps one of them from being opened.
    pub fn data_names(&self) -> tandem_block::Result<Vec<String>> {
        let mut names = Vec::new();
        let mut next = (self.format == ImageFormat::Qcow2).then(|| self.path.to_path_buf());
        let mut last = self.path.to_path_buf();
        // Of the image itself, its options may say more than its header.
        let mut data_file = self.with.data_file.clone();
        let mut backing = self.with.backing.clone();
        while let Some(path) = next.take() {
            let info = Info::read_with(&path, Locking::Off)?;
            let name = info
                .data_file
                .map(|name| PathBuf::from(OsString::from_vec(name)));
            let holder = data_file.take().or(name).unwrap_or_else(|| path.clone());
            names.push(holder.to_string_lossy().into_owned());
            let named_qcow2 = info.backing_format.as_deref() == Some(b"qcow2");
            let is_qcow2 = match (std::mem::take(&mut backing), info.backing_file) {
                (Backing::Nothing, _) | (Backing::Named, None) => return Ok(names),
                (Backing::File { path, format }, _) => {
                    last = path;
                    format.map_or(named_qcow2, |format| format == ImageFormat::Qcow2)
                }
                (Backing::Named, Some(name)) => {
                    last = backing_path(&path, &name).unwrap_or_default();
                    named_qcow2
                }
                (Backing::NamedAs(_), None) => return Ok(names),
                (Backing::NamedAs(format), Some(name)) => {
                    last = backing_path(&path, &name).unwrap_or_default();
                    format == ImageFormat::Qcow2
                }
            };
            next = is_qcow2.then(|| last.clone());
        }
        names.push(last.to_string_lossy().into_owned());
        Ok(names)
    }

    /// Length of the raw data file of a qcow2 image, as far as its name can be followed.
    pub fn raw_data_file_len(&self) -> Option<u64> {
        Some(self.raw_data_file()?.len())
    }

    fn raw_data_file(&self) -> Option<Metadata> {
        let info = Info::read_with(&self.path, Locking::Off).ok()?;
        let name = info.data_file.filter(|_| info.data_file_raw)?;
        if let Some(path) = &self.with.data_file {
            return path.metadata().ok();
        }
        let directory = self.path.parent().unwrap_or(Path::new(""));
        directory.join(OsStr::from_bytes(&name)).metadata().ok()
    }

    /// Looks at the file `name`, of which `format` may say what it is.
    ///
    /// # Errors
    /// The reason why it cannot be opened.
    pub fn look(name: &'a OsStr, format: Option<&OsStr>) -> Result<Self, String> {
        let mut options = ImageOpts::default();
        if pseudo::add_name(&mut options, name, format)? {
            return Self::look_described(name, options.describe(format)?);
        }
        let given = format.map(OsStr::to_string_lossy);
        let given = match given.as_deref() {
            None => None,
            Some(format) => Some(
                ImageFormat::from_name(format)
                    .ok_or_else(|| format!("Unknown driver '{format}'"))?,
            ),
        };
        let path = local_path(name)?;
        if path.as_os_str().is_empty() {
            return Err("The 'file' block driver requires a file name".to_owned());
        }
        // What is left of `file:a:b` is a file, and its name must not look like another protocol's.
        let path = match path != Path::new(name) && local_path(path.as_os_str()).is_err() {
            true => Cow::Owned(Path::new("./").join(path)),
            false => path.into(),
        };
        Self::look_at(name, path, given)
    }

    /// Looks at an image that is described by options, `name`.
    ///
    /// # Errors
    /// The reason why it cannot be opened.
    pub fn look_described(name: &'a OsStr, image: Described) -> Result<Self, String> {
        let found = Self::look_at(name, image.path.into(), image.format)?;
        image.options.finish(found.format)?;
        Ok(Self {
            is_protocol: image.is_protocol,
            with: image.with,
            described: image.options,
            ..found
        })
    }

    /// Looks at the file `path`, called `name`, of the format that is `given`.
    ///
    /// # Errors
    /// The reason why it cannot be opened.
    pub fn look_at(
        name: &'a OsStr,
        path: Cow<'a, Path>,
        given: Option<ImageFormat>,
    ) -> Result<Self, String> {
        let io_error = |error| {
            let file = path.to_path_buf();
            let (action, offset) = ("open", None);
            tandem_block::Error::Io {
                file,
                action,
                offset,
                source: error,
            }
            .reason()
        };
        let metadata = path.metadata().map_err(io_error)?;
        if !metadata.is_file() && !metadata.file_type().is_block_device() {
            let path = path.display();
            return Err(format!(
                "'file' driver requires '{path}' to be a regular file"
            ));
        }
        let file = FileStorage::open(&path, true).map_err(io_error)?;
        let len = file.size().map_err(io_error)?;
        let format = match given {
            Some(format) => format,
            None => probe(&file).map_err(io_error)??,
        };
        Ok(Self {
            name,
            path,
            format,
            probed: given.is_none(),
            is_protocol: false,
            described: ImageOpts::default(),
            with: With::default(),
            metadata,
            len,
        })
    }
}

/// The text about an image that could not be opened.
pub fn could_not_open(name: &OsStr, reason: &str) -> String {
    format!("Could not open '{}': {reason}", name.display())
}

/// A name for a terminal: an image must not be able to send it control sequences.
pub fn printable(name: &OsStr) -> String {
    name.to_string_lossy()
        .chars()
        .map(|c| match c {
            '\t' => c.to_string(),
            c if c.is_control() => c.escape_default().to_string(),
            c => c.to_string(),
        })
        .collect()
}

/// The warning that the image called `name` is taken for raw, without anybody having said so.
pub fn guessed_raw(name: &OsStr) -> String {
    format!(
        "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
         Automatically detecting the format is dangerous for raw images, write operations on \
         block 0 will be restricted.\n         \
         Specify the 'raw' format explicitly to remove the restrictions.\n",
        name.display()
    )
}
