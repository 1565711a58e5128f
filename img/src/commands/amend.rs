//! `tandem-img amend`

use std::path::PathBuf;
use std::sync::LazyLock;

use clap::Command;
use tandem_block::qcow2::{self, AmendOptions};
use tandem_block::{Error, ImageFormat};

use crate::commands::create;
use crate::common_options::{
    cache_option, files, follow, follow_option, format_option, image_opts_option, object_option,
    progress_option, quiet_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Image, could_not_open};
use crate::options::{self, Definition, Kind, Options};
use crate::output;
use crate::progress::Progress;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "amend",
        "Changes options of an image",
        "tandem-img amend -o OPTIONS [-f FMT | --image-opts] [-p] [-q] [-t MODE] FILENAME",
    )
    .args([
        format_option("the image"),
        value(
            "options",
            Some('o'),
            "OPTIONS",
            "Options to change: NAME=VALUE,... (`-f qcow2 -o help` lists them)",
        ),
        progress_option(),
        quiet_option(),
        cache_option("cache", 't', "the image"),
        flag(
            "force",
            None,
            "Allow operations on encryption that could lose data",
        )
        .hide(true),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "All that is asked for is changed, or nothing. The data file that an image names is not \
         moved, and the one that it is to name not looked for. A smaller size cuts off the rest \
         without a question.\n\n\
         Examples:\n  \
         tandem-img amend -o data_file=moved.raw disk.qcow2\n  \
         tandem-img amend -o data_file_raw=off disk.qcow2\n  \
         tandem-img amend -o compat=0.10 old.qcow2\n  \
         tandem-img amend -o refcount_bits=8,lazy_refcounts=on disk.qcow2\n  \
         tandem-img amend -f qcow2 -o help",
    )
}

/// The options of new images that can be changed, or must be what they are.
const OF_CREATION: [&str; 9] = [
    "backing_file",
    "backing_fmt",
    "compat",
    "data_file",
    "data_file_raw",
    "encrypt.iter-time",
    "lazy_refcounts",
    "refcount_bits",
    "size",
];

const fn option(name: &'static str, kind: Kind, help: &'static str) -> Definition {
    Definition {
        name,
        kind,
        default: None,
        help,
    }
}

/// Options that only images that exist have.
const OWN: [Definition; 4] = [
    option(
        "encrypt.keyslot",
        Kind::Number,
        "Select a single keyslot to modify explicitly",
    ),
    option(
        "encrypt.new-secret",
        Kind::Text,
        "New secret to set in the matching keyslots. Empty string to erase",
    ),
    option(
        "encrypt.old-secret",
        Kind::Text,
        "Select all keyslots that match this password",
    ),
    option(
        "encrypt.state",
        Kind::Text,
        "Select new state of affected keyslots (active/inactive)",
    ),
];

/// The options of qcow2. None has a default: what is not told stays as it is.
static QCOW2: LazyLock<Vec<Definition>> = LazyLock::new(|| {
    let created = create::definitions(ImageFormat::Qcow2).iter();
    let kept = created.filter(|definition| OF_CREATION.contains(&definition.name));
    let kept = kept.map(|definition| Definition {
        default: None,
        ..*definition
    });
    kept.chain(OWN).collect()
});

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let list = create::option_list(args)?;
    if list.is_empty() {
        return Err(args.name.usage("Must specify options (-o)"));
    }
    let asks_for_help = options::asks_for_help(&list);
    if let Some(format) = args.value("format").filter(|_| asks_for_help) {
        let name = format.to_string_lossy();
        let format = ImageFormat::from_name(&name)
            .ok_or_else(|| args.name.error(&format!("Unknown file format '{name}'")))?;
        return help(args, format);
    }
    if args.operands.len() != 1 {
        return Err(args.name.error("Expecting one image file name"));
    }
    let files = files(args)?;
    args.refuse_objects()?;
    let image = Image::from_args(args)?;
    image.warn_of_guess();
    if asks_for_help || image.format == ImageFormat::Raw {
        return help(args, image.format);
    }
    let opened = |e: Error| args.name.error(&could_not_open(image.name, &e.reason()));
    let changes = AmendOptions {
        open: image.options(false, follow(args)?, files).map_err(opened)?,
        ..changes(args, &list)?
    };
    let progress = Progress::new(args);
    let show = &mut |done, total| {
        // All of it is done when the header has changed.
        if done < total {
            progress.set(done, total);
        }
    };
    qcow2::amend(&image.path, &changes, show).map_err(|e| match e {
        Error::Option(text) => args.name.error(&text),
        Error::HeaderFull { .. } => {
            let text = "Failed to update the image header: No space left on device";
            args.name.error(text)
        }
        other => opened(other),
    })?;
    progress.set(1, 1);
    Ok(())
}

fn help(args: &Parsed, format: ImageFormat) -> Result<(), Failure> {
    if format == ImageFormat::Raw {
        let text = "Format driver 'raw' does not support option amendment";
        return Err(args.name.error(text));
    }
    let text = options::describe(&QCOW2);
    output::print(&format!("Amend options for 'qcow2':\n{text}"));
    Ok(())
}

/// What `list` asks for.
fn changes(args: &Parsed, list: &str) -> Result<AmendOptions, Failure> {
    let mut options = Options::new(&QCOW2);
    options.parse(list).map_err(|text| {
        let is_creation = text
            .strip_prefix("Invalid parameter '")
            .and_then(|rest| rest.strip_suffix('\''))
            .is_some_and(create::is_qcow2_option);
        let hint = if is_creation {
            "\nThis option is only supported for image creation"
        } else {
            ""
        };
        args.name.error(&(text + hint))
    })?;
    let mut names = QCOW2.iter().map(|definition| definition.name);
    if names.any(|name| name.starts_with("encrypt.") && options.get(name).is_some()) {
        let text = "Can't amend encryption options - encryption not present";
        return Err(args.name.error(text));
    }
    let version = options.text("compat").map(|level| {
        let unknown = || format!("Unknown compatibility level {level}");
        create::version(level).ok_or_else(|| args.name.error(&unknown()))
    });
    let switch = |name| options.get(name).map(|_| options.is_on(name));
    let name = |name| options.text(name).map(|text| text.as_bytes().to_owned());
    Ok(AmendOptions {
        version: version.transpose()?,
        size: options.number("size").filter(|size| *size != 0),
        data_file: options.text("data_file").map(PathBuf::from),
        data_file_raw: switch("data_file_raw"),
        lazy_refcounts: switch("lazy_refcounts"),
        refcount_bits: options.number("refcount_bits"),
        backing_file: name("backing_file"),
        backing_format: name("backing_fmt"),
        ..AmendOptions::default()
    })
}
