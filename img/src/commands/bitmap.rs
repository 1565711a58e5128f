//! `tandem-img bitmap`

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use clap::Command;
use tandem_block::qcow2::BitmapEditor;
use tandem_block::{FileOptions, ImageFormat};

use crate::common_options::{
    follow, follow_option, format_option, image_opts_option, object_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Image, could_not_open, printable};
use crate::size;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "bitmap",
        "Adds, removes and changes the persistent bitmaps of a qcow2 image",
        "tandem-img bitmap (--add [-g SIZE] | --remove | --clear | --enable | --disable | \
         --merge SOURCE)... [-b SRC_FILE [-F SRC_FMT]] [-f FMT] FILENAME BITMAP",
    )
    .args([
        format_option("the image"),
        flag(
            "add",
            None,
            "Add BITMAP, which follows changes of the disk from now on",
        ),
        value(
            "granularity",
            Some('g'),
            "SIZE",
            "Bytes that a bit stands for, a power of two from 512 to 2G, with --add (default: \
             the cluster size, but 4k to 64k)",
        ),
        flag("remove", None, "Remove BITMAP"),
        flag("clear", None, "Clear all bits of BITMAP"),
        flag("enable", None, "Make BITMAP follow changes of the disk"),
        flag("disable", None, "Make BITMAP leave off following changes"),
        value(
            "merge",
            None,
            "SOURCE",
            "Set the bits in BITMAP that are set in the bitmap SOURCE",
        ),
        value(
            "source-file",
            Some('b'),
            "FILENAME",
            "Another image, which has the bitmaps that are merged",
        ),
        value("source-format", Some('F'), "FMT", "Format of that image"),
        follow_option(),
        object_option(),
        image_opts_option(),
    ])
    .after_help(
        "What is asked for is done in the order of the command line: all of it, or nothing if a \
         part of it fails.\n\
         No other program may use the image meanwhile.\n\n\
         Examples:\n  \
         tandem-img bitmap --add disk.qcow2 monday\n  \
         tandem-img bitmap --disable disk.qcow2 monday\n  \
         tandem-img bitmap --add -g 1M --merge monday --merge tuesday disk.qcow2 week\n  \
         tandem-img bitmap --merge monday -b old.qcow2 -F qcow2 disk.qcow2 week\n  \
         tandem-img bitmap --remove disk.qcow2 monday",
    )
}

/// The options that ask for something to be done.
const ACTIONS: [&str; 6] = ["add", "remove", "clear", "enable", "disable", "merge"];

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let wrong = |text: &str| Err(args.name.error(text));
    let granularity = match args.value("granularity") {
        Some(text) => size::parse_named("granularity", &text.to_string_lossy())
            .map_err(|text| args.name.error(&text))?,
        None => 0,
    };
    let granularity = Some(granularity).filter(|bytes| *bytes > 0);
    let mut actions = args.all().filter(|(id, _)| ACTIONS.contains(id)).peekable();
    if actions.peek().is_none() {
        return wrong(
            "Need at least one of --add, --remove, --clear, --enable, --disable, or --merge",
        );
    }
    if granularity.is_some() && !args.has("add") {
        return wrong("granularity only supported with --add");
    }
    let source = args.value("source-file");
    if args.has("source-format") && source.is_none() {
        return wrong("-F only supported with -b");
    }
    if source.is_some() && !args.has("merge") {
        return wrong("Merge bitmap source file only supported with --merge");
    }
    args.refuse_objects()?;
    let [file, bitmap] = &args.operands[..] else {
        return wrong("Expecting filename and bitmap name");
    };
    let mut target = open(args, &Image::from_operand(args, file, "format")?, false)?;
    let source = match source {
        Some(file) => {
            let image = Image::from_name(args, file, args.value("source-format"), false)?;
            Some(open(args, &image, true)?)
        }
        None => None,
    };
    for (action, value) in actions {
        let done = act(
            &mut target,
            source.as_ref(),
            bitmap,
            action,
            value,
            granularity,
        );
        done.map_err(|reason| {
            let bitmap = printable(bitmap);
            let text = format!("Operation {action} on bitmap {bitmap} failed: {reason}");
            args.name.error(&text)
        })?;
    }
    match target {
        Target::Qcow2(editor) => editor.commit().map_err(|e| args.name.error(&e.reason())),
        Target::Raw(_) => Ok(()),
    }
}

/// An image whose bitmaps are in question.
enum Target<'a> {
    Qcow2(Box<BitmapEditor>),
    /// Which has none.
    Raw(&'a OsStr),
}

/// Opens the image `image` for what is asked of it.
fn open<'a>(args: &Parsed, image: &Image<'a>, read_only: bool) -> Result<Target<'a>, Failure> {
    let opened = |e: tandem_block::Error| args.name.error(&could_not_open(image.name, &e.reason()));
    image.refuse_layers().map_err(|e| args.name.error(&e))?;
    let options = image.options(read_only, follow(args)?, FileOptions::default());
    let options = options.map_err(opened)?;
    if image.format == ImageFormat::Raw {
        if !read_only {
            image.warn_of_guess();
        }
        return Ok(Target::Raw(image.name));
    }
    let editor = BitmapEditor::open(&image.path, &options).map_err(opened)?;
    Ok(Target::Qcow2(Box::new(editor)))
}

/// Does what one option asks for, in memory.
fn act(
    target: &mut Target<'_>,
    source: Option<&Target<'_>>,
    bitmap: &OsStr,
    action: &str,
    value: &OsStr,
    granularity: Option<u64>,
) -> Result<(), String> {
    let missing = |bitmap: &OsStr| format!("Dirty bitmap '{}' not found", printable(bitmap));
    let editor = match target {
        Target::Qcow2(editor) => editor,
        Target::Raw(_) if action != "add" => return Err(missing(bitmap)),
        Target::Raw(_) if bitmap.is_empty() => {
            return Err("Bitmap name cannot be empty".to_owned());
        }
        Target::Raw(_) if granularity.is_some_and(|g| g < 512 || !g.is_power_of_two()) => {
            return Err("Granularity must be power of 2 and at least 512".to_owned());
        }
        Target::Raw(file) => {
            return Err(format!(
                "Can't store persistent bitmaps to {}: Operation not supported",
                printable(file)
            ));
        }
    };
    let name = bitmap.as_bytes();
    let done = match (action, source) {
        ("add", _) => editor.add(name, granularity),
        ("remove", _) => editor.remove(name),
        ("clear", _) => editor.clear(name),
        ("merge", None) => editor.merge(name, value.as_bytes()),
        ("merge", Some(Target::Qcow2(source))) => editor.merge_from(name, source, value.as_bytes()),
        ("merge", Some(Target::Raw(_))) => return Err(missing(value)),
        _ => editor.set_enabled(name, action == "enable"),
    };
    done.map_err(|e| e.reason())
}
