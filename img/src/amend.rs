//! `tandem-img amend`

use std::path::PathBuf;

use clap::Command;
use tandem_block::FileOptions;
use tandem_block::qcow2::{self, AmendOptions};

use crate::create;
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Format, Image, cache, cache_option, could_not_open};
use crate::options::{self, Definition, Kind, Options};
use crate::output;

/// Definition of the subcommand.
pub fn command() -> Command {
    Command::new("amend")
        .about("Changes options of an image")
        .disable_help_flag(true)
        .override_usage("tandem-img amend -o OPTIONS [-f FMT] [-p] [-q] [-t MODE] FILENAME")
        .args([
            getopt::help(),
            value(
                "format",
                Some('f'),
                "FMT",
                "Format of the image: qcow2 (default: told by its first bytes)",
            ),
            value(
                "options",
                Some('o'),
                "OPTIONS",
                "Options to change: NAME=VALUE,... (`-f qcow2 -o help` lists them)",
            ),
            flag("progress", Some('p'), "Show progress"),
            flag("quiet", Some('q'), "Print nothing but errors"),
            cache_option("cache", 't', "the image"),
            flag("force", None, "Not supported yet").hide(true),
            value("object", None, "DEFINITION", "Not supported yet").hide(true),
            flag("image-opts", None, "Not supported yet").hide(true),
        ])
        .after_help(
            "All that is asked for is changed, or nothing. The data file that an image names is not \
             moved, and the one that it is to name not looked for.\n\n\
             Examples:\n  \
             tandem-img amend -o data_file=moved.raw disk.qcow2\n  \
             tandem-img amend -o data_file_raw=off disk.qcow2",
        )
}

const fn option(name: &'static str, kind: Kind, help: &'static str) -> Definition {
    Definition {
        name,
        kind,
        default: None,
        help,
    }
}

/// The options of qcow2 that QEMU can change.
const QCOW2: &[Definition] = &[
    option("backing_file", Kind::Text, ""),
    option("backing_fmt", Kind::Text, ""),
    option("compat", Kind::Text, ""),
    option(
        "data_file",
        Kind::Text,
        "File name of an external data file",
    ),
    option(
        "data_file_raw",
        Kind::Switch,
        "The external data file must stay valid as a raw image",
    ),
    option("encrypt.iter-time", Kind::Number, ""),
    option("encrypt.keyslot", Kind::Number, ""),
    option("encrypt.new-secret", Kind::Text, ""),
    option("encrypt.old-secret", Kind::Text, ""),
    option("encrypt.state", Kind::Text, ""),
    option("lazy_refcounts", Kind::Switch, "Postpone refcount updates"),
    option("refcount_bits", Kind::Number, ""),
    option("size", Kind::Size, ""),
];

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let list = create::option_list(args)?;
    if list.is_empty() {
        return Err(args.name.usage("Must specify options (-o)"));
    }
    let is_qcow2 = args.value("format").is_some_and(|format| format == "qcow2");
    if options::asks_for_help(&list) && is_qcow2 {
        let text = options::describe(QCOW2);
        output::print(&format!("Amend options for 'qcow2':\n{text}"));
        return Ok(());
    }
    let files = FileOptions {
        cache: cache(args, "cache")?,
        ..FileOptions::default()
    };
    args.refuse(&["force", "object", "image-opts"])?;
    if args.operands.len() != 1 {
        return Err(args.name.error("Expecting one image file name"));
    }
    let image = Image::from_args(args)?;
    if image.format == Format::Raw {
        let text = "Format driver 'raw' does not support option amendment";
        return Err(args.name.error(text));
    }
    let mut options = Options::new(QCOW2);
    options.parse(&list).map_err(|text| {
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
    let switch = |name| options.get(name).map(|_| options.is_on(name));
    let changes = AmendOptions {
        data_file: options.text("data_file").map(PathBuf::from),
        data_file_raw: switch("data_file_raw"),
        lazy_refcounts: switch("lazy_refcounts"),
        files,
    };
    let progress = args.has("progress") && !args.has("quiet");
    if progress {
        output::print("    (0.00/100%)\r");
    }
    qcow2::amend(&image.path, &changes).map_err(|e| match e {
        tandem_block::Error::Option(text) => args.name.error(&text),
        other => args
            .name
            .error(&could_not_open(image.name, &other.reason())),
    })?;
    if progress {
        output::print("    (100.00/100%)\r\n");
    }
    Ok(())
}
