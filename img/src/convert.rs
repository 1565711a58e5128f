//! `tandem-img convert`

use std::ffi::OsStr;
use std::num::NonZero;

use clap::Command;
use tandem_block::qcow2::{CompressedCluster, Follow, OpenOptions, Qcow2};
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
/// Clusters that a thread compresses at a time.
const CLUSTERS_PER_THREAD: usize = 8;
/// Zeros of this many bytes, at a multiple of it, are not written.
const SPARSE: usize = 4096;

/// Definition of the subcommand.
pub fn command() -> Command {
    Command::new("convert")
        .about("Copies a disk into a new image")
        .disable_help_flag(true)
        .override_usage(
            "tandem-img convert [-f FMT] [-O FMT] [-o OPTIONS] [-c] [-q] [-t MODE] [-T MODE] [-U] \
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
            flag(
                "compress",
                Some('c'),
                "Compress the clusters of the new qcow2 image (deflate, or as -o compression_type says)",
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
             tandem-img convert -c -O qcow2 -o compression_type=zstd disk.raw small.qcow2\n  \
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
    let compressed = args.has("compress");
    let created = create::create_copy(format, path, from.size(), &list, compressed);
    created.map_err(|e| {
        let (target, format) = (target.display(), format.name());
        args.name
            .error(&format!("{target}: error while converting {format}: {e}"))
    })?;
    let name = OsStr::new(format.name());
    let new = Image::look(target, Some(name)).map_err(|e| opened(target, &e))?;
    if compressed {
        let options = OpenOptions {
            follow: Follow::Anywhere,
            files,
            ..OpenOptions::default()
        };
        let to = Qcow2::open(&new.path, &options).map_err(|e| opened(target, &e.reason()))?;
        return copy_compressed(&*from, &to).map_err(|e| args.name.error(&e.to_string()));
    }
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

/// Copies all of `from` to `to`, a new disk that is as large, in compressed clusters.
fn copy_compressed(from: &dyn Disk, to: &Qcow2) -> tandem_block::Result<()> {
    let threads = std::thread::available_parallelism().map_or(1, NonZero::get);
    let (size, cluster_size) = (from.size(), to.cluster_size());
    let mut at = 0;
    while at < size {
        let mut clusters = Vec::new();
        while at < size && clusters.len() < threads * CLUSTERS_PER_THREAD {
            let (_, extent) = extent_in_chain(from, at, size - at)?;
            let end = match at + extent.len {
                end if end == size => end,
                end => end / cluster_size * cluster_size,
            };
            if matches!(extent.kind, ExtentKind::Zero | ExtentKind::Unallocated) && end > at {
                at = end;
                continue;
            }
            let mut data = vec![0; cluster_size.min(size - at) as usize];
            from.read_at(&[VolatileSlice::from(&mut data[..])], at)?;
            clusters.push((at, data));
            at += cluster_size;
        }
        for (offset, cluster) in compress(to, clusters, threads)? {
            to.write_compressed(cluster, offset)?;
        }
    }
    to.flush()
}

/// Compresses `clusters` for `disk`, with so many threads.
fn compress(
    disk: &Qcow2,
    clusters: Vec<(u64, Vec<u8>)>,
    threads: usize,
) -> tandem_block::Result<Vec<(u64, CompressedCluster)>> {
    let per_thread = clusters.len().div_ceil(threads).max(1);
    let mut clusters = clusters.into_iter();
    let mut parts = Vec::new();
    while clusters.len() > 0 {
        parts.push(clusters.by_ref().take(per_thread).collect::<Vec<_>>());
    }
    let pack = |part: Vec<(u64, Vec<u8>)>| {
        let packed = part.into_iter();
        packed
            .map(|(offset, data)| Ok((offset, disk.compress(data)?)))
            .collect::<tandem_block::Result<Vec<_>>>()
    };
    std::thread::scope(|scope| {
        let running: Vec<_> = parts
            .into_iter()
            .map(|part| scope.spawn(move || pack(part)))
            .collect();
        let mut packed = Vec::new();
        for thread in running {
            match thread.join() {
                Ok(part) => packed.extend(part?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(packed)
    })
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
