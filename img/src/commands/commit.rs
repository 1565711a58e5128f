//! `tandem-img commit`

use clap::Command;
use tandem_block::qcow2::Commit;
use tandem_block::{Error, ImageFormat};

use crate::common_options::{
    cache_option, files, follow, follow_option, format_option, image_opts_option, object_option,
    progress_option, quiet_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::chain;
use crate::image::{Image, could_not_open};
use crate::output;
use crate::progress::Progress;
use crate::rate::Rate;
use crate::size;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "commit",
        "Writes the data of an image to its backing file",
        "tandem-img commit [-f FMT | --image-opts] [-t MODE] [-b BASE] [-r RATE] [-d] [-p] [-q] FILENAME",
    )
    .args([
        format_option("the image"),
        cache_option("cache", 't', "the images"),
        value(
            "base",
            Some('b'),
            "BASE",
            "The image below it that takes up the data of all images above (default: its backing \
             file); implies -d",
        ),
        flag("drop", Some('d'), "Leave the data in the image, too"),
        progress_option(),
        quiet_option(),
        value(
            "rate",
            Some('r'),
            "RATE",
            "Bytes to write in a second at most, with a suffix or without (default: no limit)",
        ),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "The backing file becomes as large as the image, if that is larger, and the image is \
         emptied once all is on disk. Other images on the same backing file become invalid.\n\n\
         Examples:\n  \
         tandem-img commit overlay.qcow2\n  \
         tandem-img commit -d -p -r 100M overlay.qcow2\n  \
         tandem-img commit -b base.raw overlay.qcow2",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let rate = match args.value("rate") {
        Some(rate) => size::parse_named("rate limit", &rate.to_string_lossy())
            .map_err(|text| args.name.error(&text))?,
        None => 0,
    };
    if args.operands.len() != 1 {
        return Err(args.name.usage("Expecting one image file name"));
    }
    let follow = follow(args)?;
    let files = files(args)?;
    args.refuse_objects()?;
    let image = Image::from_args(args)?;
    image.warn_of_guess();
    let chain = match image.format {
        ImageFormat::Raw => Vec::new(),
        ImageFormat::Qcow2 => chain::below(&image.path),
    };
    let between = match args.value("base") {
        Some(base) => chain::find(&chain, base).ok_or_else(|| {
            let (base, name) = (base.display(), image.name.display());
            format!("Did not find '{base}' in the backing chain of '{name}'")
        }),
        None if chain.is_empty() => Err("Image does not have a backing file".to_owned()),
        None => Ok(0),
    };
    let opened = |e: Error| match &e {
        Error::Locked { file, .. } if **file != *image.path => args.name.error(&e.reason()),
        e => args.name.error(&could_not_open(image.name, &e.reason())),
    };
    let options = image.options(false, follow, files).map_err(opened)?;
    let (progress, commit) = match between {
        Ok(between) => {
            let commit = Commit::open(&image.path, between, &options).map_err(opened)?;
            (Progress::new(args), commit)
        }
        Err(text) => {
            drop(image.open(false, follow, files).map_err(opened)?);
            drop(Progress::new(args));
            return Err(args.name.error(&text));
        }
    };
    let failed = |e: Error| {
        let text = format!("Block job failed: {}", e.reason());
        args.name.error(&text)
    };
    let rate = (rate > 0).then(|| Rate::new(rate));
    let mut last = 0;
    commit
        .copy(&mut |done, total| {
            progress.set(done, total);
            if let Some(rate) = &rate {
                rate.wait(done - last);
            }
            last = done;
        })
        .map_err(failed)?;
    let empties = !args.has("drop") && !args.has("base");
    commit.finish(empties).map_err(failed)?;
    drop(progress);
    if !args.has("quiet") {
        output::print("Image committed.\n");
    }
    Ok(())
}
