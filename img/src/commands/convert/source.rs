//! What is copied: one disk, or several, one behind the other.

use std::ops::Range;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};

use rustix::fs::{SeekFrom, fstat, seek};
use rustix::io::Errno;
use tandem_block::{Disk, Extent, ExtentKind, Result, VolatileSlice, extent_in_chain};

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

/// What was seen last of the sources. It is not asked for again: finding the end of a part takes the
/// longer the farther that is.
#[derive(Default)]
pub struct Seen {
    /// How a range of the sources is stored, and by which disk of its chain.
    extent: Option<(Range<u64>, usize, Extent)>,
    /// Where there is data in a file that has that of an image, and which: clusters that are there may
    /// lie in holes.
    data: Option<(RawFd, Range<u64>)>,
}

impl Seen {
    /// How the bytes from `offset` on are stored, up to `len`, as `find` tells.
    fn extent(
        &mut self,
        offset: u64,
        len: u64,
        find: impl FnOnce() -> Result<(usize, Extent)>,
    ) -> Result<(usize, Extent)> {
        let is_there = |(range, ..): &&(Range<u64>, usize, Extent)| range.contains(&offset);
        if let Some((range, depth, extent)) = self.extent.as_ref().filter(is_there) {
            let skip = offset - range.start;
            let extent = Extent {
                len: len.min(range.end - offset),
                offset: extent.offset.map(|at| at + skip),
                ..*extent
            };
            return Ok((*depth, extent));
        }
        let (depth, extent) = find()?;
        self.extent = Some((offset..offset + extent.len, depth, extent));
        Ok((depth, extent))
    }

    /// Whether `offset` of `file` is in a hole, and how many of the `len` bytes there are as that one.
    /// What lies behind the end of the file is called data.
    fn look(&mut self, file: BorrowedFd<'_>, offset: u64, len: u64) -> (bool, u64) {
        let is_there =
            |(fd, range): &&(RawFd, Range<u64>)| *fd == file.as_raw_fd() && range.contains(&offset);
        if let Some((_, range)) = self.data.as_ref().filter(is_there) {
            return (false, len.min(range.end - offset));
        }
        let next = match seek(file, SeekFrom::Data(offset)) {
            // There is none up to the end.
            Err(Errno::NXIO) => fstat(file).map_or(0, |stat| stat.st_size.unsigned_abs()),
            next => next.unwrap_or(offset),
        };
        if next > offset {
            return (true, len.min(next - offset));
        }
        let end = seek(file, SeekFrom::Hole(offset)).unwrap_or(u64::MAX);
        // Another program may have cut the file meanwhile.
        let end = end.max(offset.saturating_add(1));
        self.data = Some((file.as_raw_fd(), offset..end));
        (false, len.min(end - offset))
    }
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
    pub fn status(
        &self,
        offset: u64,
        len: u64,
        only_top: bool,
        seen: &mut Seen,
    ) -> Result<(Status, u64)> {
        let start = offset;
        let Some((opened, offset, len)) = self.at(offset, len) else {
            return Ok((Status::Zero, len));
        };
        let disk = opened.disk();
        let (depth, mut extent) = seen.extent(start, len, || match only_top {
            true => Ok((0, disk.extent(offset, len)?)),
            false => extent_in_chain(disk, offset, len),
        })?;
        let below = disk.backing().map_or(0, |backing| backing.size());
        if only_top && extent.kind == ExtentKind::Unallocated && offset < below {
            return Ok((Status::Backing, extent.len.min(below - offset)));
        }
        if let (Opened::Qcow2(_), ExtentKind::Data, Some(at), Some(file)) =
            (opened, extent.kind, extent.offset, file_at(disk, depth))
        {
            let (is_hole, len) = seen.look(file, at, extent.len);
            extent.len = len;
            if is_hole {
                extent.kind = ExtentKind::Zero;
            }
        }
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
        let disk = opened.disk();
        if let (Opened::Raw(_), Some(file)) = (opened, disk.host_file()) {
            return Ok(Some(FileRange { file, offset, len }));
        }
        let (depth, extent) = extent_in_chain(disk, offset, len)?;
        let (ExtentKind::Data, Some(offset), Some(file)) =
            (extent.kind, extent.offset, file_at(disk, depth))
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

/// The file that has the data of the disk `depth` steps below `disk` in its chain.
fn file_at(mut disk: &dyn Disk, depth: usize) -> Option<BorrowedFd<'_>> {
    for _ in 0..depth {
        disk = disk.backing()?;
    }
    disk.host_file()
}

fn status_of(kind: ExtentKind) -> Status {
    match kind {
        ExtentKind::Data | ExtentKind::Compressed => Status::Data,
        ExtentKind::Zero | ExtentKind::Unallocated => Status::Zero,
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::fd::AsFd;
    use std::os::unix::fs::FileExt;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    use tandem_block::{Error, Limits};

    use super::*;

    const PART: u64 = 1 << 20;

    /// A file of four parts, of which those in `data` have data.
    fn file(data: &[u64]) -> File {
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * PART).unwrap();
        for part in data {
            file.write_all_at(&vec![1; PART as usize], part * PART)
                .unwrap();
        }
        file
    }

    #[test]
    fn holes_are_told_from_data() {
        let file = file(&[1, 2]);
        let mut seen = Seen::default();
        let mut look = |at, len| seen.look(file.as_fd(), at, len);
        assert_eq!(look(0, 4 * PART), (true, PART));
        assert_eq!(look(PART - 512, 512), (true, 512));
        assert_eq!(look(PART, 3 * PART), (false, 2 * PART));
        assert_eq!(look(2 * PART + 1, 3), (false, 3));
        assert_eq!(look(3 * PART, 2 * PART), (true, PART));
        // Behind the end.
        assert_eq!(look(4 * PART, PART), (false, PART));
        assert_eq!(look(9 * PART, PART), (false, PART));
        assert_eq!(look(0, PART), (true, PART));
    }

    #[test]
    fn what_was_seen_of_one_file_tells_nothing_of_another() {
        let (full, empty) = (file(&[0, 1, 2, 3]), file(&[3]));
        let mut seen = Seen::default();
        assert_eq!(seen.look(full.as_fd(), 0, PART), (false, PART));
        assert_eq!(seen.look(empty.as_fd(), 0, PART), (true, PART));
    }

    /// 1 TiB of data, and as much of zeros, of which it is counted how often they are asked for.
    struct Counted(Arc<AtomicU64>);

    const HALF: u64 = 1 << 40;

    impl Disk for Counted {
        fn size(&self) -> u64 {
            2 * HALF
        }

        fn limits(&self) -> Limits {
            Limits::new(512, true)
        }

        fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
            Err(Error::ReadOnly)
        }

        fn write_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
            Err(Error::ReadOnly)
        }

        fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Result<()> {
            Err(Error::ReadOnly)
        }

        fn discard(&self, _: u64, _: u64) -> Result<()> {
            Err(Error::ReadOnly)
        }

        fn flush(&self) -> Result<()> {
            Ok(())
        }

        fn extent(&self, offset: u64, len: u64) -> Result<Extent> {
            self.0.fetch_add(1, Ordering::Relaxed);
            let (kind, end) = match offset < HALF {
                true => (ExtentKind::Data, HALF),
                false => (ExtentKind::Zero, 2 * HALF),
            };
            Ok(Extent {
                len: len.min(end - offset),
                kind,
                offset: Some(offset),
            })
        }
    }

    /// Whoever goes on piece by piece does not have the end of a part found again for each.
    #[test]
    fn each_part_is_asked_for_once() {
        let count = Arc::new(AtomicU64::new(0));
        let disk = || Opened::Other(Box::new(Counted(count.clone())));
        let sources = Sources::new(vec![disk(), disk()]).unwrap();
        let (mut seen, mut at) = (Seen::default(), 0);
        while at < sources.size() {
            let len = (1 << 30).min(sources.size() - at);
            let left = sources.size() - at;
            let (status, found) = sources.status(at, left, false, &mut seen).unwrap();
            let is_data = at % (2 * HALF) < HALF;
            assert_eq!(status == Status::Data, is_data, "{at}");
            assert_eq!(found, HALF - at % HALF, "{at}");
            at += len;
        }
        assert_eq!(count.load(Ordering::Relaxed), 4);
    }
}
