//! Options that several subcommands have, and what they say.

use std::ffi::OsStr;

use clap::Arg;
use tandem_block::qcow2::Follow;
use tandem_block::{CacheMode, FileOptions, ImageFormat, Locking};

use crate::failure::Failure;
use crate::getopt::{Parsed, flag, value};

/// Definition of the option that tells the format of `what`.
pub fn format_option(what: &str) -> Arg {
    let help = format!("Format of {what}: qcow2 or raw (default: told by its first bytes)");
    value("format", Some('f'), "FMT", "").help(help)
}

/// The format of a new image, which the option `id` tells; without that it is raw.
pub fn new_format(args: &Parsed, id: &str) -> Result<ImageFormat, String> {
    let name = args.value(id).unwrap_or(OsStr::new("raw"));
    let name = name.to_string_lossy();
    ImageFormat::from_name(&name).ok_or_else(|| format!("Unknown file format '{name}'"))
}

/// Definition of the option that shows how far the work has come.
pub fn progress_option() -> Arg {
    flag("progress", Some('p'), "Show progress")
}

/// Definition of the option without which more is printed than errors.
pub fn quiet_option() -> Arg {
    flag("quiet", Some('q'), "Print nothing but errors")
}

/// Definition of the option for [`Output`](crate::output::Output).
pub fn output_option() -> Arg {
    value("output", None, "human|json", "How to print the result")
}

/// Definition of the option that makes file names lists of options.
pub fn image_opts_option() -> Arg {
    flag(
        "image-opts",
        None,
        "FILENAME is a list of options: driver=FMT,file.filename=NAME,...",
    )
}

/// Definition of QEMU's option for objects, which there are none of.
pub fn object_option() -> Arg {
    value("object", None, "DEFINITION", "Not supported").hide(true)
}

/// Definition of the option that says where names in an image may lead.
pub fn follow_option() -> Arg {
    let names = listed(Follow::ALL, Follow::name);
    let help = format!("Where names of other files in the image may lead: {names}");
    value("follow", None, "WHERE", "").help(help)
}

/// What that option says.
pub fn follow(args: &Parsed) -> Result<Follow, Failure> {
    let Some(given) = args.value("follow").map(OsStr::to_string_lossy) else {
        return Ok(Follow::default());
    };
    Follow::from_name(&given).ok_or_else(|| {
        args.name.usage(&format!(
            "--follow expects 'image-directory', 'anywhere' or 'nothing' not '{given}'"
        ))
    })
}

/// The names of `all`, of which the first is the default.
fn listed<T: Copy>(all: &[T], name: fn(T) -> &'static str) -> String {
    let names: Vec<_> = all.iter().map(|choice| name(*choice)).collect();
    names.join(", ").replacen(',', " (default),", 1)
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
    let modes = listed(CacheMode::ALL, CacheMode::name);
    let help = format!("Cache mode of {what}: {modes}");
    value(id, Some(letter), "MODE", "").help(help)
}

/// How the files of an image that is written are used.
pub fn files(args: &Parsed) -> Result<FileOptions, Failure> {
    Ok(FileOptions {
        cache: cache(args, "cache")?,
        ..FileOptions::default()
    })
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
