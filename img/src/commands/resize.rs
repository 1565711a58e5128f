//! `tandem-img resize`

use clap::Command;
use tandem_block::{FileOptions, Preallocation};

use crate::common_options::{
    follow, follow_option, format_option, image_opts_option, object_option, quiet_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Image, could_not_open};
use crate::output;
use crate::size;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "resize",
        "Makes a disk larger or smaller",
        "tandem-img resize [-f FMT | --image-opts] [--preallocation MODE] [--shrink] [-q] \
         FILENAME [+|-]SIZE",
    )
    .args([
        format_option("the image"),
        flag("shrink", None, "Allow the disk to become smaller"),
        quiet_option(),
        value(
            "preallocation",
            None,
            "MODE",
            "What the disk gains gets its space now: off (default), metadata (qcow2: as holes), \
             falloc (reserved), full (written)",
        ),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "SIZE is in bytes, or with a suffix k, M, G, T, P or E (powers of 1024); with + or - it \
         is added or taken away.\n\
         What a disk gains reads as zero. With data_file_raw=on it is what the data file holds \
         there, if that is longer than the disk.\n\n\
         Examples:\n  \
         tandem-img resize disk.qcow2 +10G\n  \
         tandem-img resize --preallocation=falloc disk.qcow2 +10G\n  \
         tandem-img resize --shrink disk.qcow2 20G",
    )
}

/// How the size is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relative {
    No,
    More,
    Less,
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let preallocation = match args.value("preallocation") {
        None => Preallocation::Off,
        Some(name) => {
            let name = name.to_string_lossy();
            let text = || format!("Invalid preallocation mode '{name}'");
            Preallocation::from_name(&name).ok_or_else(|| args.name.error(&text()))?
        }
    };
    let (name, text) = match &args.operands[..] {
        [name, size] => (name, size),
        [] | [_] => return Err(args.name.usage("Expecting image file name and size")),
        _ => return Err(args.name.usage("Extra argument(s) in command line")),
    };
    let text = text.to_string_lossy();
    let (relative, number) = match (text.strip_prefix('+'), text.strip_prefix('-')) {
        (Some(number), _) => (Relative::More, number),
        (_, Some(number)) => (Relative::Less, number),
        _ => (Relative::No, &*text),
    };
    let number =
        size::parse(number).map_err(|wrong| args.name.error(&wrong.message("size", number)))?;
    args.refuse_objects()?;
    let image = Image::from_operand(args, name, "format")?;
    image.warn_of_guess();
    resize(args, &image, relative, number, preallocation)
}

fn resize(
    args: &Parsed,
    image: &Image<'_>,
    relative: Relative,
    number: u64,
    preallocation: Preallocation,
) -> Result<(), Failure> {
    let follow = follow(args)?;
    let disk = image
        .open(false, follow, FileOptions::default())
        .map_err(|e| args.name.error(&could_not_open(image.name, &e.reason())))?;
    let old = disk.size();
    let new = match relative {
        Relative::No => Some(number),
        Relative::More => old.checked_add(number),
        Relative::Less => old.checked_sub(number),
    };
    let new = match new {
        Some(new) if new > 0 && new <= i64::MAX as u64 => new,
        _ => return Err(args.name.error("New image size must be positive")),
    };
    if new <= old && preallocation != Preallocation::Off {
        let text = "Preallocation can only be used for growing images";
        return Err(args.name.error(text));
    }
    if new < old && !args.has("shrink") {
        let mut failure = args
            .name
            .error("Use the --shrink option to perform a shrink operation.");
        failure.message += &args.name.text(
            "warning: Shrinking an image will delete all data beyond the shrunken image's end. \
             Before performing such an operation, make sure there is no important data there.\n",
        );
        return Err(failure);
    }
    if let Some(len) = image.raw_data_file_len()
        && new > old
        && len > old.next_multiple_of(1 << 21)
    {
        output::complain_line(&args.name.text(
            "warning: the raw data file is longer than the disk; what it holds there becomes part of \
             the disk",
        ));
    }
    let resized = disk.resize_preallocated(new, preallocation);
    let resized = resized.and_then(|()| disk.close());
    resized.map_err(|e| args.name.error(&e.reason()))?;
    if !args.has("quiet") {
        output::print("Image resized.\n");
    }
    Ok(())
}
