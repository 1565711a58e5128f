//! `tandem-img rebase`

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use clap::Command;
use tandem_block::qcow2::{
    Backing, BackingName, Info, NewBacking, OpenOptions, Qcow2, backing_path, set_backing_name,
    stamp_base,
};
use tandem_block::{CacheMode, Disk, Error, FileOptions, ImageFormat, Locking};

use crate::common_options::{
    cache, cache_option, files, follow, follow_option, format_option, image_opts_option, locking,
    object_option, progress_option, quiet_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::chain;
use crate::image::{Image, could_not_open};
use crate::output;
use crate::progress::Progress;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "rebase",
        "Puts an image on top of another backing file",
        "tandem-img rebase [-f FMT | --image-opts] [-t MODE] [-T MODE] [-U] [-p] [-q] [-u] [-c] -b BACKING_FILE \
         [-F BACKING_FMT] FILENAME",
    )
    .args([
        format_option("the image"),
        value(
            "backing",
            Some('b'),
            "BACKING_FILE",
            "The new backing file; '' for none. A relative name is relative to the image",
        ),
        value("backing-format", Some('F'), "BACKING_FMT", "Its format: qcow2 or raw"),
        flag(
            "backing-unsafe",
            Some('u'),
            "Only change the name in the image, for a backing file that has moved; neither it nor \
             the old one need exist",
        ),
        flag(
            "compress",
            Some('c'),
            "Compress what the image takes up (not with an external data file)",
        ),
        cache_option("cache", 't', "the image"),
        cache_option("backing-cache", 'T', "the new backing file"),
        flag(
            "force-share",
            Some('U'),
            "Read the new backing file even if another program writes to it",
        ),
        progress_option(),
        quiet_option(),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "The disk reads the same as before: where the two backing files differ and the image has \
         nothing, it takes up what the old one shows. With -u it reads as whatever is there.\n\n\
         Examples:\n  \
         tandem-img rebase -b base-2.qcow2 -F qcow2 overlay.qcow2\n  \
         tandem-img rebase -b '' overlay.qcow2\n  \
         tandem-img rebase -u -b moved/base.raw -F raw overlay.qcow2",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    if args.operands.len() != 1 {
        return Err(args.name.usage("Expecting one image file name"));
    }
    let is_unsafe = args.has("backing-unsafe");
    if !is_unsafe && !args.has("backing") {
        let text = "Must specify backing file (-b) or use unsafe mode (-u)";
        return Err(args.name.usage(text));
    }
    let progress = Progress::new(args);
    let files = files(args)?;
    let source_cache = cache(args, "backing-cache")?;
    args.refuse_objects()?;
    let image = Image::from_args(args)?;
    image.warn_of_guess();
    match image.format {
        ImageFormat::Raw => rebase_raw(args, &image, source_cache),
        ImageFormat::Qcow2 if is_unsafe => rename(args, &image, files),
        ImageFormat::Qcow2 => rebase(args, &image, files, source_cache, &progress),
    }?;
    progress.set(1, 1);
    Ok(())
}

/// A raw image has no backing file.
fn rebase_raw(args: &Parsed, image: &Image<'_>, cache: CacheMode) -> Result<(), Failure> {
    if args.has("compress") {
        let text = "Compression not supported for this file format";
        return Err(args.name.error(text));
    }
    let format = new_format(args)?;
    if !args.has("backing-unsafe") {
        open_new(args, image, format, cache)?;
    }
    new_name(args)?;
    Err(cannot_change(args, "Operation not supported"))
}

/// Changes the name alone.
fn rename(args: &Parsed, image: &Image<'_>, files: FileOptions) -> Result<(), Failure> {
    new_format(args)?;
    let name = new_name(args)?;
    let info = Info::read_with(&image.path, Locking::Off);
    let keeps_stamp = info.is_ok_and(|info| info.base_stamp.is_some());
    set_backing_name(&image.path, name.as_ref(), files).map_err(|e| match e {
        Error::HeaderFull { .. } | Error::Option(_) => cannot_change(args, &reason(&e)),
        e => args.name.error(&could_not_open(image.name, &e.reason())),
    })?;
    if !keeps_stamp || name.is_none() {
        return Ok(());
    }
    let options = OpenOptions {
        follow: follow(args)?,
        files,
        ..OpenOptions::default()
    };
    if let Err(e) = stamp_base(&image.path, &options) {
        let reason = e.reason();
        let text = format!("warning: The image keeps no stamp of its backing file now: {reason}");
        output::complain_line(&args.name.text(&text));
    }
    Ok(())
}

fn rebase(
    args: &Parsed,
    image: &Image<'_>,
    files: FileOptions,
    source_cache: CacheMode,
    progress: &Progress,
) -> Result<(), Failure> {
    let opened = |e: Error| args.name.error(&could_not_open(image.name, &e.reason()));
    let options = image.options(false, follow(args)?, files).map_err(opened)?;
    let disk = Qcow2::open(&image.path, &options).map_err(opened)?;
    let format = new_format(args)?;
    let shared = shared(args, image, format);
    let other = match shared {
        Some(_) => None,
        None => open_new(args, image, format, source_cache)?,
    };
    let name = new_name(args)?;
    disk.check_backing_name(name.as_ref())
        .map_err(|e| cannot_change(args, &reason(&e)))?;
    let compress = args.has("compress");
    let has_data_file =
        || Info::read_with(&image.path, Locking::Off).is_ok_and(|i| i.has_data_file);
    if compress && has_data_file() {
        let text = "Error while writing to COW image: Operation not supported";
        return Err(args.name.error(text));
    }
    let new = match (shared, &other) {
        (Some(depth), _) => NewBacking::Below(depth),
        (None, Some(disk)) => NewBacking::Other(&**disk),
        (None, None) => NewBacking::Nothing,
    };
    let done = disk.rebase(name.as_ref(), new, compress, &mut |done, total| {
        progress.set(done, total);
    });
    done.map_err(|e| args.name.error(&e.reason()))
}

/// What `-F` says.
fn new_format(args: &Parsed) -> Result<Option<ImageFormat>, Failure> {
    let Some(name) = args.value("backing-format") else {
        return Ok(None);
    };
    match ImageFormat::from_header(name.as_bytes()) {
        Some(format) => Ok(Some(format)),
        None => {
            let text = format!("Invalid format name: '{}'", name.display());
            Err(args.name.error(&text))
        }
    }
}

/// The name that the image is to have for its backing file.
fn new_name(args: &Parsed) -> Result<Option<BackingName>, Failure> {
    match (new_file(args), args.value("backing-format")) {
        (None, _) => Ok(None),
        (Some(_), None) => Err(cannot_change(args, "backing format must be specified")),
        (Some(file), Some(format)) => Ok(Some(BackingName {
            file: file.as_bytes().to_owned(),
            format: format.as_bytes().to_owned(),
        })),
    }
}

/// The new backing file, if there is to be one.
fn new_file(args: &Parsed) -> Option<&OsStr> {
    args.value("backing").filter(|file| !file.is_empty())
}

/// Which of the images below `image` the new backing file is.
fn shared(args: &Parsed, image: &Image<'_>, format: Option<ImageFormat>) -> Option<usize> {
    let path = backing_path(&image.path, new_file(args)?.as_bytes()).ok()?;
    if image.with.backing != Backing::Named {
        return None;
    }
    chain::below(&image.path)
        .iter()
        .position(|below| chain::is_same(&below.path, &path) && below.format == format)
}

/// Opens the new backing file, if there is to be one. Without a format, it is only looked for.
fn open_new(
    args: &Parsed,
    image: &Image<'_>,
    format: Option<ImageFormat>,
    cache: CacheMode,
) -> Result<Option<Box<dyn Disk>>, Failure> {
    let Some(file) = new_file(args) else {
        return Ok(None);
    };
    let follow = follow(args)?;
    let files = FileOptions {
        cache,
        locking: locking(args),
    };
    let open = |path: &Path| {
        let format = format.map(|format| OsStr::new(format.name()));
        let new = Image::look(path.as_os_str(), format)?;
        match format {
            Some(_) => new.open(true, follow, files).map(Some),
            None => return Ok(None),
        }
        .map_err(|e| e.reason())
    };
    let opened = backing_path(&image.path, file.as_bytes()).and_then(|path| open(&path));
    opened.map_err(|reason| {
        let file = file.display();
        let text = format!("Could not open new backing file '{file}': {reason}");
        args.name.error(&text)
    })
}

fn reason(error: &Error) -> String {
    match error {
        Error::HeaderFull { .. } => "No space left in the file header".to_owned(),
        error => error.reason(),
    }
}

fn cannot_change(args: &Parsed, reason: &str) -> Failure {
    let file = args.value("backing").unwrap_or(OsStr::new("(null)"));
    let file = file.display();
    let text = format!("Could not change the backing file to '{file}': {reason}");
    args.name.error(&text)
}
