//! From a file name on the command line to an image of a known format.

use std::ffi::OsStr;
use std::fs::Metadata;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;

use clap::Arg;
use tandem_block::qcow2::{Follow, Info, OpenOptions, Qcow2, backing_path};
use tandem_block::{CacheMode, Disk, FileOptions, FileStorage, Locking, Raw, Storage};

use crate::failure::Failure;
use crate::getopt::{Parsed, flag, value};

/// The formats that there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// The file is the disk.
    Raw,
    /// qcow2.
    Qcow2,
}

impl Format {
    /// The format called `name`.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "raw" => Some(Self::Raw),
            "qcow2" => Some(Self::Qcow2),
            _ => None,
        }
    }

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
        }
    }
}

/// Formats that are recognised in order to be refused: what they begin with.
const FOREIGN: [(&[u8], &str); 8] = [
    (b"QFI\xfb\0\0\0\x01", "qcow"),
    (b"QED\0", "qed"),
    (b"KDMV", "vmdk"),
    (b"COWD", "vmdk"),
    (b"conectix", "vpc"),
    (b"vhdxfile", "vhdx"),
    (b"WithoutFreeSpace", "parallels"),
    (b"LUKS\xba\xbe", "luks"),
];

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
    /// Its name as it was given.
    pub name: &'a OsStr,
    /// The file.
    pub path: &'a Path,
    /// Its format.
    pub format: Format,
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
        Self::look(name, args.value("format"))
            .map_err(|reason| args.name.error(&could_not_open(name, &reason)))
    }

    /// Warns, as QEMU does before it writes, of a raw image that nobody has said to be one.
    pub fn warn_of_guess(&self, args: &Parsed) {
        if self.format == Format::Raw && !args.has("format") {
            eprint!(
                "WARNING: Image format was not specified for '{}' and probing guessed raw.\n         \
                 Automatically detecting the format is dangerous for raw images, write operations on \
                 block 0 will be restricted.\n         \
                 Specify the 'raw' format explicitly to remove the restrictions.\n",
                self.name.display()
            );
        }
    }

    /// Opens it as a disk; names in it may lead where `follow` says.
    pub fn open(
        &self,
        read_only: bool,
        follow: Follow,
        files: FileOptions,
    ) -> tandem_block::Result<Box<dyn Disk>> {
        Ok(match self.format {
            Format::Raw => Box::new(Raw::open_with(self.path, read_only, files)?),
            Format::Qcow2 => {
                let options = OpenOptions {
                    read_only,
                    follow,
                    files,
                    ..OpenOptions::default()
                };
                Box::new(Qcow2::open(self.path, &options)?)
            }
        })
    }

    /// Names of the files that hold the guest's data: of the image, and of those below it.
    ///
    /// # Errors
    /// What keeps one of them from being opened.
    pub fn data_names(&self) -> tandem_block::Result<Vec<String>> {
        let mut names = Vec::new();
        let mut next = (self.format == Format::Qcow2).then(|| self.path.to_owned());
        let mut last = self.path.to_owned();
        while let Some(path) = next.take() {
            let info = Info::read_with(&path, Locking::Off)?;
            names.push(match info.data_file {
                Some(name) => String::from_utf8_lossy(&name).into_owned(),
                None => path.to_string_lossy().into_owned(),
            });
            let Some(name) = info.backing_file else {
                return Ok(names);
            };
            last = backing_path(&path, &name).unwrap_or_default();
            if info.backing_format.as_deref() == Some(b"qcow2") {
                next = Some(last.clone());
            }
        }
        names.push(last.to_string_lossy().into_owned());
        Ok(names)
    }

    /// Whether a new image shows what was there before: on a block device that is the disk.
    pub fn may_hold_other_data(&self) -> bool {
        let is_device = |metadata: &Metadata| metadata.file_type().is_block_device();
        match self.format {
            Format::Raw => is_device(&self.metadata),
            Format::Qcow2 => self.raw_data_file().is_some_and(|m| is_device(&m)),
        }
    }

    /// Length of the raw data file of a qcow2 image, as far as its name can be followed.
    pub fn raw_data_file_len(&self) -> Option<u64> {
        Some(self.raw_data_file()?.len())
    }

    fn raw_data_file(&self) -> Option<Metadata> {
        let info = Info::read_with(self.path, Locking::Off).ok()?;
        let name = info.data_file.filter(|_| info.data_file_raw)?;
        let directory = self.path.parent().unwrap_or(Path::new(""));
        directory.join(OsStr::from_bytes(&name)).metadata().ok()
    }

    /// Looks at the file `name`, of which `format` may say what it is.
    ///
    /// # Errors
    /// The reason why it cannot be opened.
    pub fn look(name: &'a OsStr, format: Option<&OsStr>) -> Result<Self, String> {
        let given = format.map(OsStr::to_string_lossy);
        let given = match given.as_deref() {
            None => None,
            Some(format) => Some(
                Format::from_name(format).ok_or_else(|| format!("Unknown driver '{format}'"))?,
            ),
        };
        let path = local_path(name)?;
        if path.as_os_str().is_empty() {
            return Err("The 'file' block driver requires a file name".to_owned());
        }
        let io_error = |error| {
            let file = path.to_owned();
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
        let file = FileStorage::open(path, true).map_err(io_error)?;
        let len = file.size().map_err(io_error)?;
        let format = match given {
            Some(format) => format,
            None => probe(&file).map_err(io_error)??,
        };
        Ok(Self {
            name,
            path,
            format,
            metadata,
            len,
        })
    }
}

/// Definition of the option that says where names in an image may lead.
pub fn follow_option() -> Arg {
    value(
        "follow",
        None,
        "WHERE",
        "Where names of other files in the image may lead: image-directory (default), anywhere, nothing",
    )
}

/// What that option says.
pub fn follow(args: &Parsed) -> Result<Follow, Failure> {
    let given = args.value("follow").map(OsStr::to_string_lossy);
    match given.as_deref() {
        None | Some("image-directory") => Ok(Follow::ImageDirectory),
        Some("anywhere") => Ok(Follow::Anywhere),
        Some("nothing") => Ok(Follow::Nothing),
        Some(other) => Err(args.name.usage(&format!(
            "--follow expects 'image-directory', 'anywhere' or 'nothing' not '{other}'"
        ))),
    }
}

/// Definition of the option that reads an image which another program may be writing.
pub fn force_share_option() -> Arg {
    flag(
        "force-share",
        Some('U'),
        "Read the image even if another program writes to it; what is read may be inconsistent",
    )
}

/// What that option says.
pub fn locking(args: &Parsed) -> Locking {
    if args.has("force-share") {
        Locking::ForceShare
    } else {
        Locking::On
    }
}

/// Definition of the option `id`, called `letter`, that tells the cache mode of `what`.
pub fn cache_option(id: &'static str, letter: char, what: &str) -> Arg {
    let help = format!(
        "Cache mode of {what}: writeback (default), none, writethrough, directsync, unsafe"
    );
    value(id, Some(letter), "MODE", "").help(help)
}

/// What that option says.
pub fn cache(args: &Parsed, id: &str) -> Result<CacheMode, Failure> {
    let Some(given) = args.value(id) else {
        return Ok(CacheMode::default());
    };
    let name = given.to_string_lossy();
    CacheMode::from_name(&name).ok_or_else(|| {
        let source = if id == "cache" { "" } else { "source " };
        args.name
            .error(&format!("Invalid {source}cache option: {name}"))
    })
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

/// Tells the format by what the file begins with; what is not known is raw.
fn probe(file: &FileStorage) -> std::io::Result<Result<Format, String>> {
    let mut start = [0; 16];
    file.read_bytes_at(&mut start, 0)?;
    let foreign = FOREIGN.iter().find(|(magic, _)| start.starts_with(magic));
    Ok(match foreign {
        Some((_, name)) => Err(format!("Unknown driver '{name}'")),
        None if start.starts_with(b"QFI\xfb") && start[4..8] >= [0, 0, 0, 2][..] => {
            Ok(Format::Qcow2)
        }
        None => Ok(Format::Raw),
    })
}
