//! `tandem-img measure`

use std::ffi::OsStr;

use clap::Command;
use serde::Serialize;
use tandem_block::qcow2::{self, Info, SnapshotName};
use tandem_block::{Disk, Error, ExtentKind, FileOptions, ImageFormat, sparse_extent_in_chain};

use crate::commands::create;
use crate::commands::snapshot;
use crate::common_options::{
    follow, follow_option, force_share_option, format_option, image_opts_option, locking,
    new_format, object_option, output_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, value};
use crate::image::opened::Opened;
use crate::image::{Image, could_not_open};
use crate::options::Options;
use crate::output::{self, Output};
use crate::size;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "measure",
        "Tells how large the file of a new image will be",
        "tandem-img measure [-O FMT] [-o OPTIONS] [--output human|json] \
         (--size SIZE | [-f FMT] [-l SNAPSHOT] [-U] FILENAME)",
    )
    .args([
        value(
            "target-format",
            Some('O'),
            "FMT",
            "Format of the new image: raw (default) or qcow2",
        ),
        format_option("the image that is to be copied"),
        image_opts_option(),
        value(
            "options",
            Some('o'),
            "OPTIONS",
            "Options of the new image, as for `create`",
        ),
        value(
            "snapshot",
            Some('l'),
            "SNAPSHOT",
            "Measure the disk of this snapshot inside the image: an ID or name, or \
             snapshot.id=ID,snapshot.name=NAME",
        ),
        object_option(),
        output_option(),
        value("size", None, "SIZE", "Size of the new disk, which is empty"),
        force_share_option(),
        follow_option(),
    ])
    .after_help(
        "The required size is that of the file with the data that there is, the full one that \
         with data everywhere; what persistent bitmaps would take is told apart.\n\
         As in qemu-img, an external data file makes no difference: what would lie in it is \
         counted.\n\n\
         Examples:\n  \
         tandem-img measure -O qcow2 --size 20G\n  \
         tandem-img measure -O qcow2 -o cluster_size=2M disk.raw\n  \
         tandem-img measure --output=json -O qcow2 -l before-upgrade disk.qcow2",
    )
}

/// The result, as programs read it.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Sizes {
    #[serde(skip_serializing_if = "Option::is_none")]
    bitmaps: Option<u64>,
    required: u64,
    fully_allocated: u64,
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let fail = |text: &str| Err(args.name.error(text));
    let request = Request::from_args(args)?;
    let file = match &args.operands[..] {
        [] => None,
        [file] => Some(file),
        _ => return fail("At most one filename argument is allowed."),
    };
    let needs_file = ["image-opts", "format", "snapshot"];
    if file.is_none() && needs_file.iter().any(|id| args.has(id)) {
        return fail("--image-opts, -f, and -l require a filename argument.");
    }
    let size = match (file, request.size) {
        (Some(_), Some(_)) => return fail("--size N cannot be used together with a filename."),
        (None, None) => return fail("Either --size N or one filename must be specified."),
        (_, size) => size,
    };
    args.refuse_objects()?;
    let source = match file {
        Some(file) => Some(Source::open(args, file, request.snapshot)?),
        None => None,
    };
    let format = new_format(args, "target-format").map_err(|reason| args.name.error(&reason))?;
    let mut options = Options::new(create::definitions(format));
    if !request.list.is_empty() {
        options.parse(&request.list).map_err(|reason| {
            let name = format.name();
            let last = format!("Invalid options for file format '{name}'");
            let mut failure = args.name.error(&reason);
            failure.message += &args.name.error(&last).message;
            failure
        })?;
    }
    let size = match &source {
        Some(source) => source.size,
        None => size.unwrap_or_default(),
    };
    let sizes = match format {
        ImageFormat::Raw => {
            let required = size.next_multiple_of(512);
            Ok(Sizes {
                bitmaps: None,
                required,
                fully_allocated: required,
            })
        }
        ImageFormat::Qcow2 => qcow2_sizes(size, source.as_ref(), &options),
    };
    let sizes = sizes.map_err(|reason| args.name.error(&reason))?;
    match request.output {
        Output::Human => output::print(&human(&sizes)),
        Output::Json => output::print_json(&sizes),
    }
    Ok(())
}

fn human(sizes: &Sizes) -> String {
    let mut text = format!(
        "required size: {}\nfully allocated size: {}\n",
        sizes.required, sizes.fully_allocated
    );
    if let Some(bitmaps) = sizes.bitmaps {
        text += &format!("bitmaps size: {bitmaps}\n");
    }
    text
}

/// Values of options, the first mistake in which counts.
struct Request {
    list: String,
    snapshot: Option<SnapshotName>,
    output: Output,
    size: Option<u64>,
}

impl Request {
    fn from_args(args: &Parsed) -> Result<Self, Failure> {
        let mut size = None;
        let mut snapshot = None;
        for (id, value) in args.all() {
            match id {
                "size" => {
                    let parsed = size::parse_named("image size", &value.to_string_lossy());
                    size = Some(parsed.map_err(|reason| args.name.error(&reason))?);
                }
                "snapshot" => snapshot = Some(snapshot::selected(args, value)?),
                _ => {}
            }
        }
        Ok(Self {
            list: create::option_list(args)?,
            output: Output::from_args(args)?,
            snapshot,
            size,
        })
    }
}

/// An image that is to be copied.
struct Source {
    disk: Opened,
    /// Of the disk, whatever it was when the snapshot was taken.
    size: u64,
    /// What the header says of a qcow2 image.
    info: Option<Info>,
}

impl Source {
    fn open(args: &Parsed, file: &OsStr, snapshot: Option<SnapshotName>) -> Result<Self, Failure> {
        let opened = |reason: &str| args.name.error(&could_not_open(file, reason));
        let no_snapshot = |reason: &str| {
            let text = format!("Failed to load snapshot: {reason}");
            args.name.error(&text)
        };
        let image = Image::from_operand(args, file, "format")?;
        let files = FileOptions {
            locking: locking(args),
            ..FileOptions::default()
        };
        let options = image.options(true, follow(args)?, files);
        let mut options = options.map_err(|e| opened(&e.reason()))?;
        options.snapshot = snapshot;
        let (disk, info) =
            Opened::open_with_info(&image, &options).map_err(|error| match error {
                Error::NoSnapshot { .. } => no_snapshot("Can't find snapshot"),
                other => opened(&other.reason()),
            })?;
        if info.is_none() && options.snapshot.is_some() {
            return Err(no_snapshot(
                "Block format 'raw' used by device '' does not support temporarily loading internal \
                 snapshots",
            ));
        }
        let size = match &info {
            Some(info) => info.size,
            None => disk.disk().size(),
        };
        Ok(Self { disk, size, info })
    }
}

/// Bytes of the clusters of `cluster_size` bytes that have data among the first `size` bytes of `disk`.
fn data_size(disk: &dyn Disk, size: u64, cluster_size: u64) -> tandem_block::Result<u64> {
    let size = size.min(disk.size());
    let (mut at, mut sum) = (0, 0);
    while at < size {
        let (_, extent) = sparse_extent_in_chain(disk, at, size - at)?;
        let mut end = at + extent.len;
        if matches!(extent.kind, ExtentKind::Data | ExtentKind::Compressed) {
            end = end.next_multiple_of(cluster_size);
            sum += end - at / cluster_size * cluster_size;
        }
        at = end;
    }
    Ok(sum)
}

/// The sizes of a qcow2 image with `options` for a disk of `size` bytes, or a copy of `source`.
fn qcow2_sizes(size: u64, source: Option<&Source>, options: &Options) -> Result<Sizes, String> {
    let target = Target::new(options)?;
    let full = qcow2::full_size(
        size,
        target.cluster_size,
        target.refcount_bits,
        target.extended_l2,
    );
    let full = full.ok_or("The image size is too large (try using a larger cluster size)")?;
    let all = size.next_multiple_of(target.cluster_size);
    let data = match source {
        _ if target.preallocated => all,
        None => 0,
        // It may show anything, and have nothing in common with the source.
        Some(_) if options.text("backing_file").is_some() => all,
        Some(source) => data_size(source.disk.disk(), size, target.cluster_size)
            .map_err(|e| format!("Unable to get block status: {}", e.cause()))?,
    };
    let info = source.and_then(|source| source.info.as_ref());
    let info = info.filter(|info| info.version >= 3 && target.version >= 3);
    Ok(Sizes {
        bitmaps: info
            .map(|info| qcow2::bitmaps_size(&info.bitmaps, info.size, target.cluster_size)),
        required: full - all + data,
        fully_allocated: full,
    })
}

/// What decides about the size of a new image.
struct Target {
    cluster_size: u64,
    extended_l2: bool,
    version: u32,
    refcount_bits: u32,
    preallocated: bool,
}

impl Target {
    /// Reads and checks `options` in QEMU's order.
    fn new(options: &Options) -> Result<Self, String> {
        let wrong = |reason: &str| Err(reason.to_owned());
        let cluster_size = options.number("cluster_size").unwrap_or_default();
        let extended_l2 = options.is_on("extended_l2");
        if !cluster_size.is_power_of_two() || !(512..=2 << 20).contains(&cluster_size) {
            return wrong("Cluster size must be a power of two between 512 and 2048k");
        }
        if extended_l2 && cluster_size < 16384 {
            return wrong(
                "Extended L2 entries are only supported with cluster sizes of at least 16384 bytes",
            );
        }
        let version = match options.text("compat") {
            None | Some("1.1") => 3,
            Some("0.10") => 2,
            Some(other) => return Err(format!("Invalid compatibility level: '{other}'")),
        };
        let refcount_bits = options.number("refcount_bits").unwrap_or_default();
        if !refcount_bits.is_power_of_two() || refcount_bits > 64 {
            return wrong("Refcount width must be a power of two and may not exceed 64 bits");
        }
        if version < 3 && refcount_bits != 16 {
            return wrong(
                "Different refcount widths than 16 bits require compatibility level 1.1 or above \
                 (use compat=1.1 or greater)",
            );
        }
        let preallocated = match options.text("preallocation") {
            None | Some("off" | "metadata") => false,
            Some("falloc" | "full") => true,
            Some(other) => return Err(format!("invalid parameter value: {other}")),
        };
        Ok(Self {
            cluster_size,
            extended_l2,
            version,
            refcount_bits: refcount_bits as u32,
            preallocated,
        })
    }
}
