//! `tandem-img convert`

use std::ffi::OsStr;

use clap::Command;
use tandem_block::qcow2::Follow;
use tandem_block::{Disk, ExtentKind, FileOptions, extent_in_chain};
use vm_memory::VolatileSlice;

use crate::create;
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{
    Format, Image, cache, cache_option, could_not_open, follow, follow_option, force_share_option,
    local_path, locking,
};

/// Bytes that are copied at once.
const PIECE: usize = 2 << 20;
/// Zeros of this many bytes, at a multiple of it, are not written.
const SPARSE: usize = 4096;

/// Definition of the subcommand.
pub fn command() -> Command {
    Command::new("convert")
        .about("Copies a disk into a new image")
        .disable_help_flag(true)
        .override_usage(
            "tandem-img convert [-f FMT] [-O FMT] [-o OPTIONS] [-q] [-t MODE] [-T MODE] [-U] \
             FILENAME OUTPUT",
        )
        .args([
            getopt::help(),
            flag("quiet", Some('q'), "Print nothing but errors"),
            value(
                "format",
                Some('f'),
                "FMT",
                "Format of the image: qcow2 or raw (default: told by its first bytes)",
            ),
            value(
                "output-format",
                Some('O'),
                "FMT",
                "Format of the new image: raw (default) or qcow2",
            ),
            value(
                "options",
                Some('o'),
                "OPTIONS",
                "Options of the new image, as for `create`",
            ),
            cache_option("cache", 't', "the new image"),
            cache_option("source-cache", 'T', "the image that is read"),
            force_share_option(),
            follow_option(),
        ])
        .after_help(
            "What reads as zero takes no space in the new image.\n\n\
             Examples:\n  \
             tandem-img convert -O qcow2 -o data_file=d.raw,data_file_raw=on disk.raw disk.qcow2\n  \
             tandem-img convert -O qcow2 -o data_file=d.data,data_file_layout=packed a.qcow2 b.qcow2\n  \
             tandem-img convert b.qcow2 disk.raw",
        )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let [source, target] = &args.operands[..] else {
        return Err(args.name.usage("Must specify image file name"));
    };
    let list = create::option_list(args)?;
    let format = args
        .value("output-format")
        .unwrap_or(OsStr::new("raw"))
        .to_string_lossy();
    let format = Format::from_name(&format)
        .ok_or_else(|| args.name.error(&format!("Unknown file format '{format}'")))?;
    let source_files = FileOptions {
        cache: cache(args, "source-cache")?,
        locking: locking(args),
    };
    let files = FileOptions {
        cache: cache(args, "cache")?,
        ..FileOptions::default()
    };
    let opened = |name: &OsStr, reason: &str| args.name.error(&could_not_open(name, reason));
    let image = Image::look(source, args.value("format")).map_err(|e| opened(source, &e))?;
    let follow = follow(args)?;
    let from = image
        .open(true, follow, source_files)
        .map_err(|e| opened(source, &e.reason()))?;
    let path = local_path(target).map_err(|e| opened(target, &e))?;
    let created = create::create_copy(format, path, from.size(), &list);
    created.map_err(|e| {
        let (target, format) = (target.display(), format.name());
        args.name
            .error(&format!("{target}: error while converting {format}: {e}"))
    })?;
    let name = OsStr::new(format.name());
    let new = Image::look(target, Some(name)).map_err(|e| opened(target, &e))?;
    let to = new
        .open(false, Follow::Anywhere, files)
        .map_err(|e| opened(target, &e.reason()))?;
    let is_zero = !new.may_hold_other_data();
    copy(&*from, &*to, is_zero).map_err(|e| args.name.error(&e.to_string()))
}

/// Copies all of `from` to `to`, which is as large, and all zeros if `is_zero`.
fn copy(from: &dyn Disk, to: &dyn Disk, is_zero: bool) -> tandem_block::Result<()> {
    let size = from.size();
    if !is_zero {
        to.write_zeroes(0, size, true)?;
    }
    let mut buffer = vec![0; PIECE];
    let mut at = 0;
    while at < size {
        let (_, extent) = extent_in_chain(from, at, size - at)?;
        let end = at + extent.len;
        if matches!(extent.kind, ExtentKind::Data | ExtentKind::Compressed) {
            while at < end {
                let piece = &mut buffer[..PIECE.min((end - at) as usize)];
                from.read_at(&[VolatileSlice::from(&mut *piece)], at)?;
                write_data(to, piece, at)?;
                at += piece.len() as u64;
            }
        }
        at = end;
    }
    to.flush()
}

/// Writes what of `piece` is not zero at `offset`.
fn write_data(to: &dyn Disk, piece: &mut [u8], offset: u64) -> tandem_block::Result<()> {
    let is_zero = |block: &[u8]| block.iter().all(|byte| *byte == 0);
    let mut at = 0;
    while at < piece.len() {
        let rest = &piece[at..];
        let zeros = rest.chunks(SPARSE).take_while(|block| is_zero(block));
        at += zeros.map(<[u8]>::len).sum::<usize>();
        let rest = &piece[at..];
        let data = rest.chunks(SPARSE).take_while(|block| !is_zero(block));
        let len = data.map(<[u8]>::len).sum::<usize>();
        if len > 0 {
            let slice = VolatileSlice::from(&mut piece[at..at + len]);
            to.write_at(&[slice], offset + at as u64)?;
            at += len;
        }
    }
    Ok(())
}
