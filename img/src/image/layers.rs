//! Disks that are more than a file with its format: a raw disk that shows a part of what is below it, an
//! image in what another disk shows, and files that fail when they are told to.

use std::io;
use std::path::Path;

use tandem_block::qcow2::{Info, OpenOptions, Qcow2};
use tandem_block::{
    Disk, Error, Extent, ImageFormat, Limits, Preallocation, Raw, Result, Storage, VolatileSlice,
    extent_in_chain,
};

use crate::image::blkdebug::{Faulty, Rules, Start};
use crate::image::opened::Opened;
use crate::image::opts::{Described, With};

/// The part of what is below that a raw disk shows.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Window {
    /// Where it begins.
    pub offset: u64,
    /// Its length; all that follows if it is `None`.
    pub size: Option<u64>,
}

/// Opens the disk in `path`, or in what is below it, as `with` says.
pub fn open(
    format: ImageFormat,
    path: &Path,
    with: &With,
    options: &OpenOptions,
) -> Result<(Opened, Option<Info>)> {
    let read_only = options.read_only;
    let mut starts = Vec::new();
    let mut file_of = |path: &Path, rules: &Option<Rules>| -> Result<Option<Box<dyn Storage>>> {
        let Some(rules) = rules else { return Ok(None) };
        let file = options.files.open(path, read_only)?;
        let (file, start): (Faulty, Start) = Faulty::new(file, rules.clone());
        starts.push(start);
        Ok(Some(Box::new(file)))
    };
    let below = match &with.below {
        Some(described) => Some(open_described(described, options)?.into_disk()),
        None => None,
    };
    let opened = match format {
        ImageFormat::Raw => {
            let disk = match (below, file_of(path, &with.rules)?) {
                (Some(disk), _) => disk,
                (None, Some(file)) => Box::new(Raw::with_storage(path, file, read_only)?),
                (None, None) => Box::new(Raw::open_with(path, read_only, options.files)?),
            };
            (
                Opened::Other(Box::new(Part::new(disk, &with.window)?)),
                None,
            )
        }
        ImageFormat::Qcow2 => {
            let file = match below {
                Some(disk) => Some(Box::new(Content(disk)) as Box<dyn Storage>),
                None => file_of(path, &with.rules)?,
            };
            let file = match file {
                Some(file) => file,
                None => options.files.open(path, read_only)?,
            };
            let info = Info::read_storage(path, &*file)?;
            let data = match &with.data_file {
                Some(name) => file_of(name, &with.data_rules)?.map(|file| (&**name, file)),
                None => None,
            };
            let qcow2 = Qcow2::open_storage(path, file, data, options)?;
            (Opened::Qcow2(Box::new(qcow2)), Some(info))
        }
    };
    starts.iter().for_each(Start::start);
    Ok(opened)
}

/// Opens what is below a disk that is opened with `above`.
fn open_described(described: &Described, above: &OpenOptions) -> Result<Opened> {
    let mut options = OpenOptions {
        read_only: above.read_only,
        follow: above.follow,
        files: above.files,
        ..OpenOptions::default()
    };
    described.with.apply(&mut options).map_err(Error::Option)?;
    let format = described.format.unwrap_or(ImageFormat::Raw);
    Opened::open_file(format, &described.path, &described.with, &options)
}

/// A part of a disk, or all of it.
struct Part {
    disk: Box<dyn Disk>,
    offset: u64,
    /// All that follows if it is `None`, whatever becomes of the disk's size.
    size: Option<u64>,
}

impl Part {
    fn new(disk: Box<dyn Disk>, window: &Window) -> Result<Self> {
        let real = disk.size();
        let &Window { offset, size } = window;
        let wrong = |reason| Err(Error::Option(reason));
        if offset > real {
            return wrong(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({real})"
            ));
        }
        if let Some(size) = size {
            if real - offset < size {
                return wrong(format!(
                    "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to \
                     the  actual size of the containing file ({real})"
                ));
            }
            if !size.is_multiple_of(512) {
                return wrong("Specified size is not multiple of 512".to_owned());
            }
        }
        Ok(Self { disk, offset, size })
    }

    /// Where `len` bytes at `offset` lie in the disk.
    fn place(&self, offset: u64, len: u64) -> Result<u64> {
        let size = self.size();
        match offset.checked_add(len) {
            Some(end) if end <= size => Ok(self.offset + offset),
            _ => Err(Error::OutOfRange { offset, len, size }),
        }
    }
}

impl Disk for Part {
    fn size(&self) -> u64 {
        let rest = self.disk.size().saturating_sub(self.offset);
        // A disk is made of sectors.
        self.size.unwrap_or(rest - rest % 512).min(rest)
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.disk.read_at(bufs, self.place(offset, len(bufs))?)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.disk.write_at(bufs, self.place(offset, len(bufs))?)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        let at = self.place(offset, len)?;
        self.disk.write_zeroes(at, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        let at = self.place(offset, len)?;
        self.disk.discard(at, len)
    }

    fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
        let at = self.place(offset, len)?;
        // What the disks below that one have counts as its own, and which file it is in cannot be told
        // from here.
        let (_, extent) = extent_in_chain(&*self.disk, at, len)?;
        Ok(Extent {
            offset: None,
            ..extent
        })
    }

    fn resize(&self, size: u64) -> Result<()> {
        if self.size.is_some() {
            return Err(Error::Option(
                "Cannot resize fixed-size raw disks".to_owned(),
            ));
        }
        let size = size.checked_add(self.offset);
        let size = size
            .ok_or_else(|| Error::Option("Disk size too large for the chosen offset".to_owned()))?;
        self.disk.resize(size)
    }

    fn resize_preallocated(&self, size: u64, preallocation: Preallocation) -> Result<()> {
        match preallocation {
            Preallocation::Off => self.resize(size),
            _ => Err(Error::Option(
                "A part of a disk cannot be preallocated".to_owned(),
            )),
        }
    }

    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }

    fn close(&self) -> Result<()> {
        self.disk.close()
    }
}

fn len(bufs: &[VolatileSlice<'_>]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

/// What a disk shows, as a file that has its length.
struct Content(Box<dyn Disk>);

impl std::fmt::Debug for Content {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Content({} bytes)", self.0.size())
    }
}

/// The system's error for one of a disk.
fn io_error(error: Error) -> io::Error {
    match error {
        Error::Io { source, .. } => source,
        Error::OutOfRange { .. } => io::ErrorKind::StorageFull.into(),
        error => io::Error::other(error.reason()),
    }
}

impl Content {
    /// How many of `len` bytes at `offset` lie within the disk.
    fn within(&self, offset: u64, len: u64) -> u64 {
        len.min(self.0.size().saturating_sub(offset))
    }
}

impl Storage for Content {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        for buf in bufs {
            let stored = self.within(offset, buf.len() as u64) as usize;
            let (first, rest) = buf
                .split_at(stored)
                .map_err(|e| io::Error::other(e.to_string()))?;
            self.0.read_at(&[first], offset).map_err(io_error)?;
            rest.copy_from(&vec![0; rest.len()]);
            offset += buf.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.0.write_at(bufs, offset).map_err(io_error)
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Storage::read_at(self, &[VolatileSlice::from(buf)], offset)
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut copy = buf.to_vec();
        Storage::write_at(self, &[VolatileSlice::from(&mut copy[..])], offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let len = self.within(offset, len);
        self.0.write_zeroes(offset, len, unmap).map_err(io_error)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let len = self.within(offset, len);
        self.0.discard(offset, len).map_err(io_error)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.0.size()).then_some(offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.0.flush().map_err(io_error)
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.0.size())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        match len > self.0.size() {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn capacity(&self) -> io::Result<Option<u64>> {
        self.size().map(Some)
    }
}
