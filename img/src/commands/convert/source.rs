//! What is copied: one disk, or several, one behind the other.

use std::os::fd::BorrowedFd;

use tandem_block::{ExtentKind, Result, VolatileSlice, extent_in_chain};

use crate::image::opened::Opened;

/// How a part of the source is copied.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Status {
    /// It may be anything.
    Data,
    /// It is zero.
    Zero,
    /// The backing file of the target shows it.
    Backing,
}

/// Disks, one behind the other.
pub struct Sources {
    parts: Vec<Part>,
}

struct Part {
    opened: Opened,
    start: u64,
    end: u64,
}

/// A part of a file of the host.
pub struct FileRange<'a> {
    /// The file.
    pub file: BorrowedFd<'a>,
    /// Where it begins.
    pub offset: u64,
    /// Its length.
    pub len: u64,
}

impl Sources {
    /// `disks`, one behind the other; `None` if that is more than a disk can have.
    pub fn new(disks: Vec<Opened>) -> Option<Self> {
        let mut parts: Vec<Part> = Vec::new();
        for opened in disks {
            let start = parts.last().map_or(0, |part| part.end);
            let end = start.checked_add(opened.disk().size())?;
            if end > i64::MAX as u64 {
                return None;
            }
            parts.push(Part { opened, start, end });
        }
        Some(Self { parts })
    }

    /// Size of all in bytes.
    pub fn size(&self) -> u64 {
        self.parts.last().map_or(0, |part| part.end)
    }

    /// The disk, if it is the only one.
    pub fn only(&self) -> Option<&Opened> {
        match &self.parts[..] {
            [part] => Some(&part.opened),
            _ => None,
        }
    }

    /// The first disk; the others are closed.
    pub fn into_first(self) -> Option<Opened> {
        self.parts.into_iter().next().map(|part| part.opened)
    }

    /// The disk that has what lies at `offset`, and as much of the `len` bytes there as it has.
    fn at(&self, offset: u64, len: u64) -> Option<(&Opened, u64, u64)> {
        let part = self.parts.iter().find(|part| offset < part.end)?;
        let len = len.min(part.end - offset);
        Some((&part.opened, offset - part.start, len))
    }

    /// How the bytes from `offset` on are copied: as many of `len` as are copied in one way. With
    /// `only_top`, what a backing file has is shown by the target's.
    pub fn status(&self, offset: u64, len: u64, only_top: bool) -> Result<(Status, u64)> {
        let Some((opened, offset, len)) = self.at(offset, len) else {
            return Ok((Status::Zero, len));
        };
        let disk = opened.disk();
        if only_top {
            let extent = disk.extent(offset, len)?;
            let below = disk.backing().map_or(0, |backing| backing.size());
            if extent.kind == ExtentKind::Unallocated && offset < below {
                return Ok((Status::Backing, extent.len.min(below - offset)));
            }
            return Ok((status_of(extent.kind), extent.len));
        }
        let (_, extent) = extent_in_chain(disk, offset, len)?;
        Ok((status_of(extent.kind), extent.len))
    }

    /// Fills `buffer` with what lies at `offset`.
    pub fn read(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        let mut done = 0;
        while let Some((opened, at, len)) =
            self.at(offset + done as u64, (buffer.len() - done) as u64)
            && len > 0
        {
            let piece = &mut buffer[done..done + len as usize];
            let slice = VolatileSlice::from(&mut *piece);
            opened.disk().read_at(&[slice], at)?;
            done += piece.len();
        }
        Ok(())
    }

    /// Where data at `offset` lies in a file of the host, and how many of the `len` bytes do, if the
    /// system can copy them.
    pub fn file_range(&self, offset: u64, len: u64) -> Result<Option<FileRange<'_>>> {
        let Some((opened, offset, len)) = self.at(offset, len) else {
            return Ok(None);
        };
        let mut disk = opened.disk();
        if let (Opened::Raw(_), Some(file)) = (opened, disk.host_file()) {
            return Ok(Some(FileRange { file, offset, len }));
        }
        let (depth, extent) = extent_in_chain(disk, offset, len)?;
        for _ in 0..depth {
            match disk.backing() {
                Some(backing) => disk = backing,
                None => return Ok(None),
            }
        }
        let (ExtentKind::Data, Some(offset), Some(file)) =
            (extent.kind, extent.offset, disk.host_file())
        else {
            return Ok(None);
        };
        Ok(Some(FileRange {
            file,
            offset,
            len: extent.len,
        }))
    }
}

fn status_of(kind: ExtentKind) -> Status {
    match kind {
        ExtentKind::Data | ExtentKind::Compressed => Status::Data,
        ExtentKind::Zero | ExtentKind::Unallocated => Status::Zero,
    }
}
