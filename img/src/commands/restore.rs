//! `tandem-img restore`

use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::{self, BufReader, Read};

use clap::Command;
use tandem_block::backup_stream::{Header, StreamError, StreamReader};
use tandem_block::qcow2::{CreateOptions, OpenOptions};
use tandem_block::{
    BackupId, CacheMode, ChunkExtent, Disk, Error, FileOptions, ImageFormat, NewImage,
    Preallocation, VolatileSlice,
};

use crate::common_options::{follow, follow_option, new_format, progress_option, quiet_option};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Image, local_path};
use crate::output;
use crate::progress::Progress;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "restore",
        "Makes a disk of streams that `backup` has written",
        "tandem-img restore [-O FMT] [-n] [-p] [-q] STREAM [STREAM2 ...] TARGET",
    )
    .args([
        value("output-format", Some('O'), "FMT", "Format of TARGET: raw (default) or qcow2"),
        flag("no-create", Some('n'), "Apply increments to a TARGET that holds the backup before them"),
        progress_option(),
        quiet_option(),
        follow_option(),
    ])
    .after_help(
        "The first stream is a full backup, and each of the others goes on from the one before. A stream \
         that was cut off is followed by that with which it goes on; - is standard input, and a file may \
         have several streams, one behind the other.\n\
         TARGET takes its name, and the place of a file that is there, when it is complete and on disk. \
         With -n, files are read to their end before anything is written.\n\n\
         Examples:\n  \
         tandem-img restore full.stream monday.stream tuesday.stream disk.raw\n  \
         tandem-img restore -O qcow2 full.stream disk.qcow2\n  \
         ssh host cat full.stream | tandem-img restore - disk.raw\n  \
         tandem-img restore -n wednesday.stream disk.raw",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let error = |reason: String| args.name.error(&reason);
    let Some((target, streams)) = args
        .operands
        .split_last()
        .filter(|(_, rest)| !rest.is_empty())
    else {
        return Err(args.name.usage("Expecting streams and a target"));
    };
    let format = new_format(args, "output-format").map_err(error)?;
    let exists = args.has("no-create");
    let progress = Progress::new(args);
    if exists {
        // Once something is written, the disk is neither the old one nor the new one.
        let files = streams.iter().filter(|name| *name != "-").cloned();
        let files = Vec::from_iter(files);
        if files.len() == streams.len() {
            apply(args, &files, true, &mut Nothing, None).map_err(error)?;
        }
        let mut disk = Made::existing(args, target, format).map_err(error)?;
        apply(args, streams, true, &mut disk, Some(&progress)).map_err(error)?;
        disk.finish(target).map_err(error)?;
    } else {
        let mut made = New {
            name: target,
            format,
            made: None,
        };
        apply(args, streams, false, &mut made, Some(&progress)).map_err(error)?;
        made.finish().map_err(error)?;
    }
    progress.set_percent(100.0);
    Ok(())
}

/// What streams are applied to.
trait Sink {
    /// A backup of a disk of `size` bytes begins.
    fn begin(&mut self, size: u64) -> Result<(), String>;

    /// Writes what a record has. `is_first` if it is of a full backup, before which there is nothing.
    fn write(&mut self, extent: ChunkExtent, data: &mut [u8], is_first: bool)
    -> Result<(), String>;
}

/// Streams are only looked at.
struct Nothing;

impl Sink for Nothing {
    fn begin(&mut self, _: u64) -> Result<(), String> {
        Ok(())
    }

    fn write(&mut self, _: ChunkExtent, _: &mut [u8], _: bool) -> Result<(), String> {
        Ok(())
    }
}

/// A disk that is there, or has been made.
struct Made {
    disk: Box<dyn Disk>,
    new: Option<NewImage>,
    /// It reads as zero where nothing has been written.
    is_zero: bool,
}

impl Made {
    fn existing(args: &Parsed, name: &OsString, format: ImageFormat) -> Result<Self, String> {
        let image = Image::look(name, Some(OsStr::new(format.name())))
            .map_err(|reason| crate::image::could_not_open(name, &reason))?;
        let follow = follow(args).map_err(|failure| failure.message)?;
        let disk = image.open(false, follow, FileOptions::default());
        let disk = disk.map_err(|e| crate::image::could_not_open(name, &e.reason()))?;
        Ok(Self {
            disk,
            new: None,
            is_zero: false,
        })
    }

    fn create(name: &OsStr, format: ImageFormat, size: u64) -> Result<Self, String> {
        let failed = |e: Error| format!("Could not create '{}': {}", name.display(), e.reason());
        let path = local_path(name)?;
        let options = CreateOptions {
            size,
            ..CreateOptions::default()
        };
        let mut new = match format {
            ImageFormat::Raw => NewImage::raw(path, size, Preallocation::Off),
            ImageFormat::Qcow2 => NewImage::qcow2(path, &options),
        }
        .map_err(failed)?;
        let open = OpenOptions {
            files: FileOptions {
                cache: CacheMode::Unsafe,
                ..FileOptions::default()
            },
            ..OpenOptions::default()
        };
        let disk: Box<dyn Disk> = match format {
            ImageFormat::Raw => Box::new(new.open_raw(CacheMode::Unsafe).map_err(failed)?),
            ImageFormat::Qcow2 => Box::new(new.open_qcow2(&open, None).map_err(failed)?),
        };
        Ok(Self {
            disk,
            is_zero: new.reads_zero(),
            new: Some(new),
        })
    }

    fn finish(self, name: &OsStr) -> Result<(), String> {
        let closed = self.disk.close();
        drop(self.disk);
        let done = closed.and_then(|()| self.new.map_or(Ok(()), NewImage::commit));
        done.map_err(|e| format!("Could not finish '{}': {}", name.display(), e.reason()))
    }
}

impl Sink for Made {
    fn begin(&mut self, size: u64) -> Result<(), String> {
        match self.disk.size() == size {
            true => Ok(()),
            false => self.disk.resize(size).map_err(|e| e.reason()),
        }
    }

    fn write(
        &mut self,
        extent: ChunkExtent,
        data: &mut [u8],
        is_first: bool,
    ) -> Result<(), String> {
        let written = match extent.is_zero {
            true if is_first && self.is_zero => Ok(()),
            true => self.disk.write_zeroes(extent.offset, extent.len, true),
            false => self
                .disk
                .write_at(&[VolatileSlice::from(data)], extent.offset),
        };
        written.map_err(|e| {
            format!(
                "error while writing at byte {}: {}",
                extent.offset,
                e.cause()
            )
        })
    }
}

/// A disk that is made once it is known how large it is.
struct New<'a> {
    name: &'a OsStr,
    format: ImageFormat,
    made: Option<Made>,
}

impl New<'_> {
    fn finish(self) -> Result<(), String> {
        self.made.map_or(Ok(()), |made| made.finish(self.name))
    }
}

impl Sink for New<'_> {
    fn begin(&mut self, size: u64) -> Result<(), String> {
        match &mut self.made {
            Some(made) => made.begin(size),
            None => {
                self.made = Some(Made::create(self.name, self.format, size)?);
                Ok(())
            }
        }
    }

    fn write(
        &mut self,
        extent: ChunkExtent,
        data: &mut [u8],
        is_first: bool,
    ) -> Result<(), String> {
        match &mut self.made {
            Some(made) => made.write(extent, data, is_first),
            None => Ok(()),
        }
    }
}

/// The backup that has been applied last.
struct Applied {
    id: BackupId,
    size: u64,
    /// Up to where.
    good: u64,
    /// The stream that it was in.
    name: OsString,
}

/// Applies the streams called `names` to `sink`.
fn apply(
    args: &Parsed,
    names: &[OsString],
    exists: bool,
    sink: &mut dyn Sink,
    progress: Option<&Progress>,
) -> Result<(), String> {
    let mut last: Option<Applied> = None;
    for name in names {
        let failed = |reason: String| format!("'{}': {reason}", name.display());
        let from: Box<dyn Read> = match name == "-" {
            true => Box::new(io::stdin().lock()),
            false => Box::new(File::open(name).map_err(|e| failed(e.to_string()))?),
        };
        let mut from = BufReader::new(from);
        let mut has_any = false;
        while let Some(mut reader) =
            StreamReader::new(&mut from).map_err(|e| failed(e.to_string()))?
        {
            has_any = true;
            follows(args, last.as_ref(), reader.header(), exists).map_err(failed)?;
            let outcome = apply_one(&mut reader, sink, progress);
            let header = reader.header();
            last = Some(Applied {
                id: header.id,
                size: header.size,
                good: reader.good(),
                name: name.clone(),
            });
            match outcome {
                Ok(()) => {}
                // What follows may go on with it.
                Err(Broken::Stream(StreamError::Truncated { .. })) => break,
                Err(Broken::Stream(error)) => return Err(failed(error.to_string())),
                Err(Broken::Sink(reason)) => return Err(reason),
            }
        }
        if !has_any {
            return Err(failed("there is no stream in it".to_owned()));
        }
    }
    match last {
        Some(last) => last.check_whole(),
        None => Ok(()),
    }
}

impl Applied {
    fn check_whole(&self) -> Result<(), String> {
        match self.good == self.size {
            true => Ok(()),
            false => Err(format!(
                "'{}': {}",
                self.name.display(),
                StreamError::Truncated { good: self.good }
            )),
        }
    }
}

/// Fails unless the stream of `header` goes on from the backup before it.
fn follows(
    args: &Parsed,
    last: Option<&Applied>,
    header: &Header,
    exists: bool,
) -> Result<(), String> {
    let id = header.id;
    if let Some(last) = last.filter(|last| last.id == id && last.size == header.size) {
        return match header.start <= last.good {
            true => Ok(()),
            false => Err(format!(
                "the stream begins at offset {} of the disk, and the one before is good up to offset {}",
                header.start, last.good
            )),
        };
    }
    if let Some(last) = last {
        last.check_whole()?;
    }
    if header.start > 0 {
        let start = header.start;
        return Err(format!(
            "the stream begins at offset {start} of the disk: one is missing before it"
        ));
    }
    match (last, header.base) {
        (None, _) if header.is_incremental && !exists => Err(
            "this is an increment; the full backup comes first, or -n says that the target holds it"
                .to_owned(),
        ),
        (None, _) => Ok(()),
        (Some(_), _) if !header.is_incremental => {
            Err("this is a full backup, which comes first".to_owned())
        }
        (Some(last), Some(base)) if base != last.id => Err(format!(
            "this goes on from backup {base}, and the one before is {}",
            last.id
        )),
        (Some(_), Some(_)) => Ok(()),
        (Some(_), None) => {
            if !args.has("quiet") {
                let text = "warning: it is not known which backup an increment goes on from";
                output::complain_line(&args.name.text(text));
            }
            Ok(())
        }
    }
}

/// Why a stream has not been applied.
enum Broken {
    Stream(StreamError),
    Sink(String),
}

fn apply_one(
    reader: &mut StreamReader<impl Read>,
    sink: &mut dyn Sink,
    progress: Option<&Progress>,
) -> Result<(), Broken> {
    let header = reader.header().clone();
    let is_first = !header.is_incremental && header.start == 0;
    sink.begin(header.size).map_err(Broken::Sink)?;
    let mut end = header.start;
    let mut data = Vec::new();
    loop {
        let extent = reader.next(&mut data).map_err(Broken::Stream)?;
        let offset = extent.map_or(header.size, |extent| extent.offset);
        // What a full backup does not tell is zero.
        if !header.is_incremental && offset > end {
            let gap = ChunkExtent {
                offset: end,
                len: offset - end,
                is_zero: true,
            };
            let written = sink.write(gap, &mut [], is_first);
            written.map_err(Broken::Sink)?;
        }
        let Some(extent) = extent else { return Ok(()) };
        let written = sink.write(extent, &mut data, is_first);
        written.map_err(Broken::Sink)?;
        end = extent.offset + extent.len;
        if let Some(progress) = progress {
            progress.set(end, header.size);
        }
    }
}
