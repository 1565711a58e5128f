//! `tandem-img create`

mod definitions;

use std::ffi::OsStr;
use std::io;
use std::path::Path;

use clap::Command;
use tandem_block::qcow2::{
    self, CompressionType, CreateOptions, DataFileLayout, DataFileReuse, Follow,
};
use tandem_block::{
    Disk, Error, FileHints, FileOptions, ImageFormat, Locking, NewImage, Preallocation, Stamp,
};

use crate::common_options::{new_format, object_option, quiet_option};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Image, could_not_open, local_path};
use crate::options::{self, Options, Value};
use crate::output;
use crate::size;
use definitions::refuse_encryption;

pub use definitions::{definitions, help, is_qcow2_option, version};

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "create",
        "Creates a disk image, and its data file if it is to have one",
        "tandem-img create [-f FMT] [-b BACKING -F FMT] [-u] [-o OPTIONS] [-q] FILENAME [SIZE]",
    )
    .args([
        quiet_option(),
        object_option(),
        value(
            "format",
            Some('f'),
            "FMT",
            "Format of the image: raw (default) or qcow2",
        ),
        value(
            "options",
            Some('o'),
            "OPTIONS",
            "Options of the format: NAME=VALUE,... (`-o help` lists them)",
        ),
        flag(
            "backing-unsafe",
            Some('u'),
            "Do not open the backing file: it need not exist",
        ),
        value(
            "backing",
            Some('b'),
            "FILENAME",
            "Backing file, which shows where the image has nothing",
        ),
        value("backing-format", Some('F'), "FMT", "Format of the backing file"),
    ])
    .after_help(
        "SIZE is in bytes, or with a suffix k, M, G, T, P or E (powers of 1024).\n\
         Files that exist are replaced, a data file as well, once the new ones are complete.\n\
         With data_file_reuse=keep a raw disk or block device becomes the data of the new disk as \
         it is, and is not written; SIZE may be less than it has. data_file_reuse=refuse fails if \
         the data file exists.\n\
         With base_stamp=on the image keeps what the files of its backing file are like, and is \
         refused once they have been written.\n\n\
         Examples:\n  \
         tandem-img create -f qcow2 disk.qcow2 20G\n  \
         tandem-img create -f qcow2 -o data_file=disk.raw,data_file_raw=on disk.qcow2 20G\n  \
         tandem-img create -f qcow2 -o data_file=old.raw,data_file_raw=on,data_file_reuse=keep disk.qcow2\n  \
         tandem-img create -f qcow2 -b base.qcow2 -F qcow2 overlay.qcow2\n  \
         tandem-img create -f qcow2 -o cluster_size=2M,preallocation=falloc disk.qcow2 20G\n  \
         tandem-img create -f raw disk.raw 20G",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let list = option_list(args)?;
    let operands = args.operands.split_first();
    if options::asks_for_help(&list) {
        let format = new_format(args, "format").map_err(|reason| args.name.error(&reason))?;
        if let Some((file, _)) = operands {
            local_path(file).map_err(|reason| args.name.error(&reason))?;
        }
        output::print(&help(format, operands.is_some()));
        return Ok(());
    }
    let Some((file, rest)) = operands else {
        return Err(args.name.usage("Expecting image file name"));
    };
    let size = match rest.first() {
        Some(text) => Some(
            size::parse_named("image size", &text.to_string_lossy())
                .map_err(|e| args.name.error(&e))?,
        ),
        None => None,
    };
    if let Some(extra) = rest.get(1) {
        let text = format!("Unexpected argument: {}", extra.display());
        return Err(args.name.usage(&text));
    }
    args.refuse_objects()?;
    create(args, file, size, &list)
        .map_err(|reason| args.name.error(&format!("{}: {reason}", file.display())))
}

/// The lists of options of a command line, in one.
pub fn option_list(args: &Parsed) -> Result<String, Failure> {
    let mut list = Vec::new();
    for item in args.values("options") {
        // Another spelling of the name would be another file.
        let Some(item) = item.to_str() else {
            let text = format!("Option list is not UTF-8: {}", item.display());
            return Err(args.name.error(&text));
        };
        if !options::is_list(item) {
            return Err(args.name.error(&format!("Invalid option list: {item}")));
        }
        list.push(item);
    }
    Ok(list.join(","))
}

/// Does the work, or tells the reason why not.
fn create(args: &Parsed, file: &OsStr, size: Option<u64>, list: &str) -> Result<(), String> {
    let format = new_format(args, "format")?;
    let path = local_path(file)?;
    let mut options = Options::new(definitions(format));
    if !list.is_empty() {
        options.parse(list)?;
    }
    refuse_encryption(&options)?;
    match (size, options.number("size")) {
        (Some(_), Some(_)) => return Err("The image size must be specified only once".to_owned()),
        (Some(size), None) => options.set("size", Value::Number(size)),
        (None, _) => {}
    }
    set_backing(args, format, &mut options)?;
    let backing = check_backing(file, &mut options, args.has("backing-unsafe"))?;
    set_size_of_kept(&mut options)?;
    if options.number("size").is_none() {
        return Err("Image creation needs a size parameter".to_owned());
    }
    if !args.has("quiet") {
        output::print_now(&format!(
            "Formatting '{}', fmt={}{}\n",
            file.display(),
            format.name(),
            options.shown()
        ));
    }
    let mut warn = |text| output::complain_line(&args.name.text(&format!("warning: {text}")));
    // Its locks keep the new files off those that it consists of.
    begin(format, path, &options, backing.as_deref(), &mut warn)?
        .commit()
        .map_err(|error| reason(&error, format))
}

/// The options of an image for a copy of a disk of `size` bytes: those of `list`, and the backing file
/// that `args` tell.
pub fn copy_options(
    args: &Parsed,
    format: ImageFormat,
    list: &str,
    size: u64,
) -> Result<Options, String> {
    let mut options = Options::new(definitions(format));
    if !list.is_empty() {
        options.parse(list)?;
    }
    refuse_encryption(&options)?;
    if options.text("data_file_reuse") == Some("keep") {
        return Err("data_file_reuse=keep is for images that are not written to".to_owned());
    }
    options.set("size", Value::Number(size));
    set_backing(args, format, &mut options)?;
    Ok(options)
}

/// A new image with `options`, on `backing`, that has not taken its name yet; `warn` is told what could
/// not be done and is not needed.
pub fn begin(
    format: ImageFormat,
    path: &Path,
    options: &Options,
    backing: Option<&dyn Disk>,
    warn: &mut dyn FnMut(String),
) -> Result<NewImage, String> {
    let size = options.number("size").unwrap_or_default();
    let preallocation = preallocation(options)?;
    let hints = FileHints {
        nocow: options.is_on("nocow"),
        extent_size: u32::try_from(options.number("extent_size_hint").unwrap_or(0))
            .map_err(|_| "Extent size hint is too large")?,
    };
    let new = match format {
        ImageFormat::Raw => NewImage::raw_with(path, size, preallocation, hints, warn),
        ImageFormat::Qcow2 => {
            let options = CreateOptions {
                hints,
                base_stamp: base_stamp(options, backing)?,
                ..qcow2_options(size, preallocation, options)?
            };
            NewImage::qcow2_with(path, &options, warn)
        }
    };
    new.map_err(|error| reason(&error, format))
}

/// The stamp of `backing` that a new image is to keep.
fn base_stamp(options: &Options, backing: Option<&dyn Disk>) -> Result<Option<Stamp>, String> {
    match backing {
        _ if !options.is_on("base_stamp") => Ok(None),
        None => Err("base_stamp=on requires a backing file that is opened".to_owned()),
        Some(disk) => match Stamp::of(disk).map_err(|e| e.reason())? {
            None => Err("base_stamp=on requires a backing file that is in files".to_owned()),
            stamp => Ok(stamp),
        },
    }
}

/// A disk whose data is there already has its size, unless another is given.
fn set_size_of_kept(options: &mut Options) -> Result<(), String> {
    let Some(name) = options.text("data_file") else {
        return Ok(());
    };
    if options.text("data_file_reuse") != Some("keep") || options.number("size").is_some() {
        return Ok(());
    }
    let len = Image::look(OsStr::new(name), Some(OsStr::new("raw")))?.len;
    if !len.is_multiple_of(512) {
        return Err(format!(
            "The data file '{name}' has {len} bytes, which is no multiple of 512; SIZE tells how \
             much of it is the disk"
        ));
    }
    options.set("size", Value::Number(len));
    Ok(())
}

/// Puts what `-b` and `-F` say into `options`.
fn set_backing(args: &Parsed, format: ImageFormat, options: &mut Options) -> Result<(), String> {
    for (id, name, what) in [
        ("backing", "backing_file", "Backing file"),
        ("backing-format", "backing_fmt", "Backing file format"),
    ] {
        let Some(value) = args.value(id) else {
            continue;
        };
        if format == ImageFormat::Raw {
            return Err(format!("{what} not supported for file format 'raw'"));
        }
        let text = value.to_str().ok_or("A name is not UTF-8")?;
        options.set(name, Value::Text(text.to_owned()));
    }
    Ok(())
}

/// Opens the backing file that the new image `file` is to have, unless `is_unsafe`; its size is the
/// default.
fn check_backing(
    file: &OsStr,
    options: &mut Options,
    is_unsafe: bool,
) -> Result<Option<Box<dyn Disk>>, String> {
    let Some(name) = options.text("backing_file") else {
        return Ok(None);
    };
    if name.is_empty() {
        return Err("Expected backing file name, got empty string".to_owned());
    }
    if OsStr::new(name) == file {
        return Err(
            "Error: Trying to create an image with the same filename as the backing file"
                .to_owned(),
        );
    }
    const NO_FORMAT: &str = "Backing file specified without backing format";
    let format = options.text("backing_fmt");
    if is_unsafe {
        return format.map(|_| None).ok_or_else(|| NO_FORMAT.to_owned());
    }
    let path = qcow2::backing_path(local_path(file)?, name.as_bytes())?;
    let opened = |reason: String| format!("{reason}\nCould not open backing image.");
    let backing = Image::look(path.as_os_str(), format.map(OsStr::new))
        .map_err(|reason| opened(could_not_open_file(path.as_os_str(), reason)))?;
    if format.is_none() {
        let found = backing.format.name();
        return Err(format!("{NO_FORMAT}\nDetected format of {found}."));
    }
    let open = |locking| {
        let files = FileOptions {
            locking,
            ..FileOptions::default()
        };
        backing.open(true, Follow::default(), files)
    };
    let disk = match open(Locking::On) {
        // That somebody writes to it, who has locked it, may be mended before it is used.
        Err(Error::Locked { .. }) if !options.is_on("base_stamp") => open(Locking::Off),
        other => other,
    };
    let disk = disk.map_err(|e| opened(e.reason()))?;
    if options.number("size").is_none() {
        options.set("size", Value::Number(disk.size()));
    }
    Ok(Some(disk))
}

/// The text for `reason`, which names the file already if it is the system's.
fn could_not_open_file(name: &OsStr, reason: String) -> String {
    if reason.starts_with("Could not open") || reason.starts_with("Unknown driver") {
        reason
    } else {
        could_not_open(name, &reason)
    }
}

fn preallocation(options: &Options) -> Result<Preallocation, String> {
    let name = options.text("preallocation").unwrap_or("off");
    Preallocation::from_name(name).ok_or_else(|| not_accepted("preallocation", name))
}

fn qcow2_options(
    size: u64,
    preallocation: Preallocation,
    options: &Options,
) -> Result<CreateOptions, String> {
    let version = match options.text("compat") {
        None => 3,
        Some(level) => version(level).ok_or_else(|| not_accepted("version", level))?,
    };
    Ok(CreateOptions {
        size,
        version,
        cluster_size: options.number("cluster_size").unwrap_or_default(),
        backing_file: options.text("backing_file").map(Into::into),
        backing_format: match options.text("backing_fmt") {
            Some(name) => Some(
                ImageFormat::from_header(name.as_bytes())
                    .ok_or_else(|| format!("Unknown backing file format '{name}'"))?,
            ),
            None => None,
        },
        data_file: match options.text("data_file") {
            Some(name) => Some(local_path(OsStr::new(name))?.to_owned()),
            None => None,
        },
        data_file_raw: options.is_on("data_file_raw"),
        data_file_layout: match options.text("data_file_layout") {
            None => DataFileLayout::default(),
            Some(name) => DataFileLayout::from_name(name)
                .ok_or_else(|| not_accepted("data-file-layout", name))?,
        },
        data_file_reuse: match options.text("data_file_reuse") {
            None => DataFileReuse::default(),
            Some(name) => DataFileReuse::from_name(name)
                .ok_or_else(|| not_accepted("data-file-reuse", name))?,
        },
        base_stamp: None,
        hints: FileHints::default(),
        preallocation,
        lazy_refcounts: options.is_on("lazy_refcounts"),
        compression_type: match options.text("compression_type") {
            None => CompressionType::default(),
            Some(name) => CompressionType::from_name(name)
                .ok_or_else(|| not_accepted("compression-type", name))?,
        },
        refcount_bits: options
            .number("refcount_bits")
            .and_then(|bits| bits.try_into().ok())
            .unwrap_or(u32::MAX),
        extended_l2: options.is_on("extended_l2"),
    })
}

fn not_accepted(name: &str, value: &str) -> String {
    format!("Parameter '{name}' does not accept value '{value}'")
}

/// Why a disk could not be created, in QEMU's words.
pub fn reason(error: &Error, format: ImageFormat) -> String {
    match error {
        Error::Io { source, .. } if source.kind() == io::ErrorKind::FileTooLarge => match format {
            ImageFormat::Raw => "The image size is too large for file format 'raw'".to_owned(),
            ImageFormat::Qcow2 => "The image size is too large for file format 'qcow2' \
                              (try using a larger cluster size)"
                .to_owned(),
        },
        other => other.reason(),
    }
}
