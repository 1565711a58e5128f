//! `tandem-img convert`

mod bitmaps;
mod copy;
mod request;
mod source;
mod sparse;
mod target;

use std::ffi::{OsStr, OsString};

use clap::Command;
use tandem_block::qcow2::{BitmapInfo, DataFileLayout, OpenOptions, SnapshotName};
use tandem_block::{Error, FileOptions, ImageFormat, NewImage};

use crate::commands::create;
use crate::common_options::{
    cache, cache_option, follow, follow_option, force_share_option, format_option,
    image_opts_option, locking, new_format, object_option, progress_option, quiet_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::opened::Opened;
use crate::image::{Image, could_not_open};
use crate::options;
use crate::output;
use crate::progress::Progress;
use crate::rate::Rate;
use crate::workers::{self, Workers};
use copy::Copy;
use request::Request;
use source::Sources;
use sparse::Detection;
use target::{Plan, Target};

/// Most threads, unless `-m` says how many.
const MAX_THREADS: usize = 8;

/// Definition of the subcommand.
pub fn command() -> Command {
    let source = [
        format_option("the source"),
        value(
            "snapshot",
            Some('l'),
            "SNAPSHOT",
            "Copy an internal snapshot: its ID or name, or snapshot.id=ID,snapshot.name=NAME",
        ),
        cache_option("source-cache", 'T', "the source"),
        force_share_option(),
        follow_option(),
        image_opts_option(),
    ];
    let target = [
        value(
            "output-format",
            Some('O'),
            "FMT",
            "Format of the target: raw (default) or qcow2",
        ),
        value(
            "options",
            Some('o'),
            "OPTIONS",
            "Options of the target, as for `create` (`-o help` lists them)",
        ),
        value(
            "backing",
            Some('B'),
            "FILENAME",
            "Backing file of the target; what the source's backing file has is not copied",
        ),
        value(
            "backing-format",
            Some('F'),
            "FMT",
            "Format of that backing file",
        ),
        flag(
            "compress",
            Some('c'),
            "Compress the clusters of the target (deflate, or as -o compression_type says)",
        ),
        flag(
            "no-create",
            Some('n'),
            "Write to a target that exists, and is large enough",
        ),
        flag(
            "target-image-opts",
            None,
            "The target of -n is a list of options, as those of --image-opts",
        ),
        flag(
            "target-is-zero",
            None,
            "The target of -n reads as zero: what is zero in the source is not written",
        ),
        cache_option("cache", 't', "the target"),
    ];
    let way = [
        value(
            "sparse-size",
            Some('S'),
            "SIZE",
            "Do not write zeros of SIZE bytes (default 4k; 0: write all zeros)",
        ),
        value(
            "coroutines",
            Some('m'),
            "NUMBER",
            "Copy up to NUMBER pieces at once: 1 to 16",
        ),
        flag(
            "out-of-order",
            Some('W'),
            "Write pieces in any order, as is done anyway where each cluster has its place",
        ),
        value(
            "rate-limit",
            Some('r'),
            "RATE",
            "Write no more than RATE bytes per second",
        ),
        flag(
            "copy-offload",
            Some('C'),
            "Let the system copy from file to file, without a look at the data, where it can",
        ),
        flag(
            "salvage",
            None,
            "Go on where the source cannot be read, with zeros",
        ),
        flag("bitmaps", None, "Copy the persistent bitmaps, too"),
        flag(
            "skip-broken-bitmaps",
            None,
            "Leave out bitmaps that are not what they should be",
        ),
        progress_option(),
        quiet_option(),
        object_option(),
    ];
    getopt::command(
        "convert",
        "Copies disks, one behind the other, into a new image or one that exists",
        "tandem-img convert [-f FMT] [-O FMT] [-o OPTIONS] [-B BACKING -F FMT] [-l SNAPSHOT] [-c] \
         [-n [--target-is-zero]] [-S SIZE] [-m NUMBER] [-W] [-r RATE] [-C] [--salvage] \
         [--bitmaps [--skip-broken-bitmaps]] [-p] [-q] [-t MODE] [-T MODE] [-U] \
         FILENAME [FILENAME2 ...] OUTPUT",
    )
    .args(source)
    .args(target)
    .args(way)
    .after_help(
        "What reads as zero takes no space in the target. A new target takes its name, and the place of \
         a file that is there, when it is complete and on disk.\n\n\
         Examples:\n  \
         tandem-img convert -O qcow2 -o data_file=d.raw,data_file_raw=on disk.raw disk.qcow2\n  \
         tandem-img convert -O qcow2 -o data_file=d.data,data_file_layout=packed a.qcow2 b.qcow2\n  \
         tandem-img convert -c -O qcow2 -o compression_type=zstd disk.raw small.qcow2\n  \
         tandem-img convert -p -O qcow2 -B base.qcow2 -F qcow2 overlay.qcow2 copy.qcow2\n  \
         tandem-img convert -l before-upgrade disk.qcow2 old.raw\n  \
         tandem-img convert -n -O raw disk.qcow2 /dev/vg/disk",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let request = Request::from_args(args)?;
    let (target, sources) = match args.operands.split_last() {
        Some((target, sources)) if !sources.is_empty() => (Some(target), sources),
        _ => (None, &[][..]),
    };
    if options::asks_for_help(&request.options) {
        let format =
            new_format(args, "output-format").map_err(|reason| args.name.error(&reason))?;
        output::print(&create::help(format, target.is_some()));
        return Ok(());
    }
    let Some(target) = target else {
        return Err(args.name.error("Must specify image file name"));
    };
    args.refuse_objects()?;
    let source_files = FileOptions {
        cache: cache(args, "source-cache")?,
        locking: locking(args),
    };
    let progress = Progress::new(args);
    let sources = open_sources(args, &request, sources, source_files)?;
    convert(args, &request, sources, target, &progress)?;
    progress.set_percent(100.0);
    Ok(())
}

fn open_sources(
    args: &Parsed,
    request: &Request,
    names: &[OsString],
    files: FileOptions,
) -> Result<Vec<Opened>, Failure> {
    let is_ambiguous =
        names.len() > 1 && matches!(request.snapshot, Some(SnapshotName::IdOrName(_)));
    // It is the first one's.
    let mut snapshot = request.snapshot.clone().filter(|_| !is_ambiguous);
    let mut opened = Vec::new();
    for name in names {
        opened.push(open_source(args, name, files, snapshot.take())?);
    }
    if is_ambiguous {
        let reason = "No support for concatenating multiple snapshot";
        return Err(args.name.error(reason));
    }
    Ok(opened)
}

fn open_source(
    args: &Parsed,
    name: &OsStr,
    files: FileOptions,
    snapshot: Option<SnapshotName>,
) -> Result<Opened, Failure> {
    let failed = |reason: &str| args.name.error(&could_not_open(name, reason));
    let not_loaded = |reason: &str| {
        let text = format!("Failed to load snapshot: {reason}");
        args.name.error(&text)
    };
    let image = Image::from_operand(args, name, "format")?;
    let options = image.options(true, follow(args)?, files);
    let options = OpenOptions {
        snapshot,
        ..options.map_err(|e| failed(&e.reason()))?
    };
    let opened = Opened::open(&image, &options).map_err(|error| match error {
        Error::NoSnapshot { .. } => not_loaded("Can't find snapshot"),
        error => failed(&error.reason()),
    })?;
    if image.format == ImageFormat::Raw && options.snapshot.is_some() {
        return Err(not_loaded(
            "Block format 'raw' used by device '' does not support temporarily loading internal \
             snapshots",
        ));
    }
    Ok(opened)
}

/// Copies `sources` to the image called `target`.
fn convert(
    args: &Parsed,
    request: &Request,
    sources: Vec<Opened>,
    target: &OsStr,
    progress: &Progress,
) -> Result<(), Failure> {
    let too_large = || {
        args.name
            .error("The sources together are too large for a disk")
    };
    let sources = Sources::new(sources).ok_or_else(too_large)?;
    let plan = match args.has("no-create") {
        true => None,
        false => Some(Plan::new(args, request, target, sources.size())?),
    };
    let has_backing = match &plan {
        Some(plan) => plan.has_backing(),
        None => args.has("backing"),
    };
    check_backing(args, plan.as_ref(), has_backing, sources.only().is_none())?;
    if let Some(plan) = plan.as_ref().filter(|_| args.has("compress")) {
        plan.check_compressible()
            .map_err(|reason| args.name.error(reason))?;
    }
    let bitmaps = bitmaps_to_copy(args, &sources, plan.as_ref())?;
    let made = match plan {
        Some(plan) => plan.make(args)?,
        None => existing(args, target, sources.size())?,
    };
    let sparse = (request.sparse > 0).then(|| Detection::new(request.sparse));
    let copy = Copy {
        name: &args.name,
        sources: &sources,
        target: &made.opened,
        // All zeros are written to a new image if that is what is wanted.
        target_is_zero: made.is_zero && (sparse.is_some() || args.has("no-create")),
        // A target that is there stays as it is then; and a salvage tells of it before.
        looks_first: args.has("no-create") || args.has("salvage"),
        has_backing,
        backing_size: made.backing_size,
        sparse,
        in_steps: may_step(&made.opened) && request.rate == 0 && !args.has("compress"),
        compress: args.has("compress"),
        salvage: args.has("salvage"),
        quiet: args.has("quiet"),
        rate: (request.rate > 0).then(|| Rate::new(request.rate)),
        offload: args.has("copy-offload").into(),
    };
    copy.run(workers(args, request, &made.opened), progress)?;
    finish(args, bitmaps.as_deref(), sources, made, target)
}

/// Copies `bitmaps`, closes the disks, and gives a new image its name.
fn finish(
    args: &Parsed,
    bitmaps: Option<&[BitmapInfo]>,
    sources: Sources,
    made: Target,
    target: &OsStr,
) -> Result<(), Failure> {
    let failed = |e: Error| {
        let (name, reason) = (target.display(), e.reason());
        args.name
            .error(&format!("Could not finish '{name}': {reason}"))
    };
    let (opened, new) = made.into_parts();
    match (bitmaps, sources.into_first()) {
        (Some(bitmaps), Some(source)) => bitmaps::copy(args, bitmaps, source, opened)?,
        _ => {
            opened.disk().close().map_err(failed)?;
            drop(opened);
        }
    }
    new.map_or(Ok(()), NewImage::commit).map_err(failed)
}

/// The bitmaps that are copied, if any are to be.
fn bitmaps_to_copy(
    args: &Parsed,
    sources: &Sources,
    plan: Option<&Plan<'_>>,
) -> Result<Option<Vec<BitmapInfo>>, Failure> {
    if !args.has("bitmaps") {
        return Ok(None);
    }
    let source = sources.only().ok_or_else(|| {
        args.name
            .error("Copying bitmaps only possible with single source")
    })?;
    let bitmaps = bitmaps::to_copy(args, source)?;
    if let Some(plan) = plan.filter(|plan| !plan.can_have_bitmaps()) {
        return Err(bitmaps::unsupported(args, plan.format().name()));
    }
    Ok(Some(bitmaps))
}

/// Refuses a backing file of the target where there cannot be one.
fn check_backing(
    args: &Parsed,
    plan: Option<&Plan<'_>>,
    has_backing: bool,
    is_joined: bool,
) -> Result<(), Failure> {
    let reason = if has_backing && args.has("target-is-zero") {
        "Cannot use --target-is-zero when the destination image has a backing file"
    } else if is_joined && has_backing {
        "Having a backing file for the target makes no sense when concatenating multiple input \
         images"
    } else if plan.is_some_and(|plan| plan.has_backing() && !plan.has_backing_format()) {
        "Use of backing file requires explicit backing format"
    } else {
        return Ok(());
    };
    Err(args.name.error(reason))
}

/// The target that is there, which must have room for `size` bytes.
fn existing(args: &Parsed, name: &OsStr, size: u64) -> Result<Target, Failure> {
    let target = Target::existing(args, name)?;
    if args.has("bitmaps") && !target.can_have_bitmaps() {
        return Err(bitmaps::unsupported(args, target.opened.format().name()));
    }
    let reason = if args.has("compress") && target.opened.format() == ImageFormat::Raw {
        "Compression not supported for this file format"
    } else if target.opened.disk().size() < size {
        "output file is smaller than input file"
    } else {
        return Ok(target);
    };
    Err(args.name.error(reason))
}

fn workers(args: &Parsed, request: &Request, target: &Opened) -> Workers {
    let cluster = match target {
        Opened::Qcow2(disk) if args.has("compress") => disk.cluster_size() as usize,
        _ => 0,
    };
    let threads = match request.coroutines {
        Some(number) => number as usize,
        None => workers::threads(MAX_THREADS),
    };
    Workers {
        threads,
        buffer: copy::PIECE.max(cluster),
        in_order: !args.has("out-of-order") && !has_places(target),
    }
}

/// Whether each cluster has its place in advance, so that the order of writes does not matter.
fn has_places(target: &Opened) -> bool {
    match target {
        Opened::Raw(_) => true,
        Opened::Qcow2(disk) => {
            let layout = disk.data_file().map(|file| file.layout);
            layout == Some(DataFileLayout::Standard)
        }
        Opened::Other(_) => false,
    }
}

/// Whether pieces may be copied in steps: not if that makes parts of new clusters.
fn may_step(target: &Opened) -> bool {
    let has_whole_clusters = match target {
        Opened::Qcow2(disk) => copy::STEP.is_multiple_of(disk.cluster_size()),
        Opened::Raw(_) | Opened::Other(_) => true,
    };
    has_places(target) && has_whole_clusters
}

#[cfg(test)]
mod tests {
    use tandem_block::qcow2::{CreateOptions, Qcow2, create};

    use super::*;

    /// What the allocator places is written in order, and the rest by all threads at once.
    #[test]
    fn standard_data_files_have_places_for_clusters() {
        let dir = tempfile::tempdir().unwrap();
        let has_places = |name: &str, options: CreateOptions| {
            let path = dir.path().join(name);
            let data_file = options.data_file.map(|name| dir.path().join(name));
            let options = CreateOptions {
                size: 1 << 20,
                data_file,
                ..options
            };
            create(&path, &options).unwrap();
            let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
            super::has_places(&Opened::Qcow2(Box::new(disk)))
        };
        let external = |name: &str, layout, data_file_raw| CreateOptions {
            data_file: Some(name.into()),
            data_file_layout: layout,
            data_file_raw,
            ..CreateOptions::default()
        };
        assert!(!has_places("internal", CreateOptions::default()));
        let (standard, packed) = (DataFileLayout::Standard, DataFileLayout::Packed);
        assert!(!has_places("packed", external("a", packed, false)));
        assert!(has_places("external", external("b", standard, false)));
        assert!(has_places("raw", external("c", standard, true)));
    }
}
