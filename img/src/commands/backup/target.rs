//! Where a backup goes.

use std::collections::VecDeque;
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{Errno, ioctl_fionread};
use tandem_block::backup_stream::{Header, StreamReader, StreamWriter};
use tandem_block::qcow2::{CreateOptions, OpenOptions};
use tandem_block::{
    CacheMode, ChunkExtent, Disk, Error, FileOptions, Limits, NewImage, Preallocation, Raw,
    VolatileSlice,
};

use super::request::{Kind, Request};
use super::source::Info;
use crate::image::local_path;

/// Bytes of a stream that may be lost on their way when it is cut off, in pipes and connections: the backup
/// keeps what they tell.
const ON_THE_WAY: u64 = 64 << 20;

/// How long to wait for the reader of a pipe before signals are looked for.
const MOMENT: Timespec = Timespec {
    tv_sec: 0,
    tv_nsec: 5_000_000,
};

/// What a backup is written to.
pub trait Target {
    /// Writes what lies behind all that has been written. `data` is that of the extent, unless it is zero.
    ///
    /// # Errors
    /// Those of the file.
    fn write(&mut self, extent: ChunkExtent, data: &mut [u8]) -> Result<(), String>;

    /// Everything below offset `next` has been written. Below which offset nothing is needed again?
    fn has(&mut self, next: u64) -> u64;

    /// Ends the writing.
    ///
    /// # Errors
    /// Those of the file.
    fn complete(&mut self) -> Result<(), String>;

    /// Whether all that has been written has come to its reader, for which this waits a moment.
    ///
    /// # Errors
    /// The reader has gone without it.
    fn has_arrived(&mut self) -> Result<bool, String> {
        Ok(true)
    }

    /// Gives it its name.
    ///
    /// # Errors
    /// Those of the file system.
    fn commit(self: Box<Self>) -> Result<(), String>;

    /// Whether what has been written stays when the rest does not follow, and the rest may follow later.
    fn is_resumable(&self) -> bool {
        false
    }
}

/// The target called `name`, for a backup of `info` from offset `start` on.
///
/// # Errors
/// Why there can be none.
pub fn make(
    request: &Request<'_>,
    name: &OsStr,
    info: &Info,
    start: u64,
) -> Result<Box<dyn Target>, String> {
    if request.kind == Kind::Stream {
        return stream(request, name, info, start);
    }
    let failed = |e: Error| format!("Could not create '{}': {}", name.display(), e.reason());
    let path = local_path(name)?;
    if request.exists {
        return existing(path, info.size);
    }
    if request.kind == Kind::Raw {
        let mut new = NewImage::raw(path, info.size, Preallocation::Off).map_err(failed)?;
        let disk = new.open_raw(CacheMode::Unsafe).map_err(failed)?;
        return Ok(Box::new(Image {
            needs_zeros: !new.reads_zero(),
            disk: Some(Box::new(disk)),
            new: Some(new),
        }));
    }
    let options = CreateOptions {
        size: info.size,
        // A cluster is in the backup in whole or not at all.
        cluster_size: info.granularity,
        backing_file: request.backing.map(PathBuf::from),
        backing_format: request.backing_format,
        ..CreateOptions::default()
    };
    let mut new = NewImage::qcow2(path, &options).map_err(failed)?;
    let open = OpenOptions {
        mark_zeroes: true,
        files: FileOptions {
            cache: CacheMode::Unsafe,
            ..FileOptions::default()
        },
        ..OpenOptions::default()
    };
    let backing = request
        .backing
        .map(|_| Arc::new(Unread(info.size)) as Arc<dyn Disk>);
    let disk = new.open_qcow2(&open, backing).map_err(failed)?;
    Ok(Box::new(Image {
        needs_zeros: info.is_incremental || request.backing.is_some(),
        disk: Some(Box::new(disk)),
        new: Some(new),
    }))
}

/// The raw disk at `path`, which holds the backup before.
fn existing(path: &Path, size: u64) -> Result<Box<dyn Target>, String> {
    let failed = |e: Error| e.reason();
    let disk = Raw::open(path, false).map_err(failed)?;
    if disk.size() != size {
        disk.resize(size).map_err(failed)?;
    }
    Ok(Box::new(Image {
        needs_zeros: true,
        disk: Some(Box::new(disk)),
        new: None,
    }))
}

/// An image, new or not.
struct Image {
    /// `None` once it is closed.
    disk: Option<Box<dyn Disk>>,
    new: Option<NewImage>,
    /// Whether it does not read as zero where nothing is written.
    needs_zeros: bool,
}

impl Target for Image {
    fn write(&mut self, extent: ChunkExtent, data: &mut [u8]) -> Result<(), String> {
        let Some(disk) = &self.disk else {
            return Ok(());
        };
        let written = match extent.is_zero {
            true if !self.needs_zeros => Ok(()),
            true => disk.write_zeroes(extent.offset, extent.len, true),
            false => disk.write_at(&[VolatileSlice::from(data)], extent.offset),
        };
        written.map_err(|e| e.cause())
    }

    fn has(&mut self, next: u64) -> u64 {
        next
    }

    fn complete(&mut self) -> Result<(), String> {
        let disk = self.disk.take();
        disk.map_or(Ok(()), |disk| disk.close())
            .map_err(|e| e.cause())
    }

    fn commit(self: Box<Self>) -> Result<(), String> {
        self.new
            .map_or(Ok(()), NewImage::commit)
            .map_err(|e| e.reason())
    }
}

/// What is below a new image: it is not looked at, for all that is written are whole clusters.
struct Unread(u64);

impl Disk for Unread {
    fn size(&self) -> u64 {
        self.0
    }

    fn limits(&self) -> Limits {
        Limits::new(512, true)
    }

    fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> tandem_block::Result<()> {
        let reason = "the backing file of a backup is not read".to_owned();
        Err(Error::Option(reason))
    }

    fn write_at(&self, _: &[VolatileSlice<'_>], _: u64) -> tandem_block::Result<()> {
        Err(Error::ReadOnly)
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> tandem_block::Result<()> {
        Err(Error::ReadOnly)
    }

    fn discard(&self, _: u64, _: u64) -> tandem_block::Result<()> {
        Err(Error::ReadOnly)
    }

    fn flush(&self) -> tandem_block::Result<()> {
        Ok(())
    }
}

/// A stream, in a new file or to standard output.
struct Stream {
    /// `None` once it is whole.
    writer: Option<StreamWriter<File>>,
    /// The pipe in which the end of it still may be.
    pipe: Option<File>,
    new: Option<NewImage>,
    /// Bytes that have been written.
    written: u64,
    /// Offsets below which all has been written, with the bytes that this took, of what may still be on its
    /// way.
    on_the_way: VecDeque<(u64, u64)>,
    /// Below this, nothing is needed again.
    safe: u64,
}

fn stream(
    request: &Request<'_>,
    name: &OsStr,
    info: &Info,
    start: u64,
) -> Result<Box<dyn Target>, String> {
    let base = match request.backing {
        Some(before) => Some(base(before, info)?),
        None => info.base,
    };
    let (file, new) = if name == "-" {
        let stdout = io::stdout();
        if stdout.is_terminal() {
            return Err("a stream is not for a terminal".to_owned());
        }
        let file = stdout.as_fd().try_clone_to_owned();
        (file.map_err(|e| e.to_string())?.into(), None)
    } else {
        let failed = |e: Error| format!("Could not create '{}': {}", name.display(), e.reason());
        let new = NewImage::plain(local_path(name)?).map_err(failed)?;
        (new.file().map_err(failed)?, Some(new))
    };
    let header = Header {
        id: info.id,
        is_incremental: info.is_incremental,
        base,
        size: info.size,
        granularity: info.granularity,
        start,
        bitmap: info.bitmap.clone(),
    };
    let writer = StreamWriter::new(file, &header).map_err(|e| e.to_string())?;
    Ok(Box::new(Stream {
        writer: Some(writer),
        pipe: None,
        new,
        written: 0,
        on_the_way: VecDeque::new(),
        safe: start,
    }))
}

/// Whether all of `pipe` has been read. If it has not, this waits until its reader has gone, or for a moment.
fn is_empty(pipe: &File) -> io::Result<bool> {
    if ioctl_fionread(pipe)? == 0 {
        return Ok(true);
    }
    let is_gone = {
        let mut watched = [PollFd::new(pipe, PollFlags::empty())];
        match poll(&mut watched, Some(&MOMENT)) {
            Ok(_) | Err(Errno::INTR) => watched[0].revents().contains(PollFlags::ERR),
            Err(error) => return Err(error.into()),
        }
    };
    match ioctl_fionread(pipe)? {
        0 => Ok(true),
        _ if is_gone => Err(Errno::PIPE.into()),
        _ => Ok(false),
    }
}

/// The backup in the stream called `name`, which must be that before `info`, as far as that is known.
fn base(name: &OsStr, info: &Info) -> Result<tandem_block::BackupId, String> {
    let failed = |reason: String| format!("'{}': {reason}", name.display());
    let file = File::open(OsStr::from_bytes(name.as_bytes())).map_err(|e| failed(e.to_string()))?;
    let reader = StreamReader::new(file).map_err(|e| failed(e.to_string()))?;
    let reader = reader.ok_or_else(|| failed("the file is empty".to_owned()))?;
    let id = reader.header().id;
    match info.base {
        Some(base) if base != id => Err(failed(format!(
            "this is backup {id}, and bitmap '{}' goes on from {base}",
            info.bitmap.escape_ascii()
        ))),
        _ => Ok(id),
    }
}

impl Target for Stream {
    fn write(&mut self, extent: ChunkExtent, data: &mut [u8]) -> Result<(), String> {
        let Some(writer) = &mut self.writer else {
            return Ok(());
        };
        self.written += data.len() as u64;
        let written = match extent.is_zero {
            true => writer.zeros(extent.offset, extent.len),
            false => writer.data(extent.offset, data),
        };
        written.map_err(|e| e.to_string())
    }

    fn has(&mut self, next: u64) -> u64 {
        if self.new.is_some() {
            return next;
        }
        self.on_the_way.push_back((next, self.written));
        while let Some((offset, written)) = self.on_the_way.front()
            && self.written - written >= ON_THE_WAY
        {
            self.safe = *offset;
            self.on_the_way.pop_front();
        }
        self.safe
    }

    fn complete(&mut self) -> Result<(), String> {
        let Some(writer) = self.writer.take() else {
            return Ok(());
        };
        let failed = |e: io::Error| e.to_string();
        let mut file = writer.finish().map_err(failed)?;
        file.flush().map_err(failed)?;
        if self.new.is_some() {
            // It is synced when it gets its name.
            return Ok(());
        }
        let kind = file.metadata().map_err(failed)?.file_type();
        if kind.is_file() || kind.is_block_device() {
            file.sync_all().map_err(failed)?;
        } else if kind.is_fifo() {
            self.pipe = Some(file);
        }
        Ok(())
    }

    fn has_arrived(&mut self) -> Result<bool, String> {
        let pipe = self.pipe.as_ref().map(is_empty);
        pipe.unwrap_or(Ok(true)).map_err(|e| e.to_string())
    }

    fn commit(self: Box<Self>) -> Result<(), String> {
        self.new
            .map_or(Ok(()), NewImage::commit)
            .map_err(|e| e.reason())
    }

    fn is_resumable(&self) -> bool {
        self.new.is_none()
    }
}
