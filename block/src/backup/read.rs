//! Reading a backup.

use std::ops::Range;

use vm_memory::VolatileSlice;

use super::protect::{Protection, zero_or_data};
use super::{Backup, Reader};
use crate::granules::Granules;
use crate::ranges::RangeGuard;
use crate::sync::lock;
use crate::{Error, LiveDisk, Result};

/// Most extents of a [`Chunk`].
const MAX_EXTENTS: usize = 4096;
/// Most bytes that are read from the disk at once, which who changes them waits for.
const PIECE: u64 = 512 << 10;
/// Most bytes that are looked at for zeros at once.
const LOOK: u64 = 1 << 30;

/// A part of a backup.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Chunk {
    /// What the backup has, in order. What lies between is not part of it. Read from the beginning of a
    /// granule, with room for one, they are whole granules, but for the end of the disk.
    pub extents: Vec<ChunkExtent>,
    /// Bytes in the buffer: of all extents that are not zero, one behind the other.
    pub bytes: usize,
    /// Where the backup goes on; at its end, the size of the disk.
    pub next: u64,
}

/// Some bytes of a disk, one behind the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ChunkExtent {
    /// Where they begin in the disk.
    pub offset: u64,
    /// How many there are.
    pub len: u64,
    /// They are all zero.
    pub is_zero: bool,
}

impl Chunk {
    /// Adds an extent, or makes the last one longer.
    fn push(&mut self, offset: u64, len: u64, is_zero: bool) {
        match self.extents.last_mut() {
            Some(last) if last.is_zero == is_zero && last.offset + last.len == offset => {
                last.len += len;
            }
            _ => self.extents.push(ChunkExtent {
                offset,
                len,
                is_zero,
            }),
        }
    }
}

impl Backup {
    /// Reads what the backup has from offset `from` on, as much as there is room for in `buffer`, but at
    /// least a byte of the disk, unless `from` is its end.
    ///
    /// # Errors
    /// [`Error::Backup`] if it has failed, there is no room at all, or `from` is not one of the offsets
    /// from what has been released up to the end; [`Error::Io`] and others of the disk. The content of
    /// `buffer` is unspecified then.
    pub fn read(&self, from: u64, buffer: &mut [u8]) -> Result<Chunk> {
        let mut reader = lock(&self.reader);
        self.protection.check()?;
        if !(reader.start..=self.size()).contains(&from) {
            let (start, size) = (reader.start, self.size());
            return Err(Error::Backup(format!(
                "offset {from} is not one of {start}, up to which the backup has been released, to \
                 {size}, its end"
            )));
        }
        if buffer.is_empty() {
            // Whoever asked again and again would not come further.
            let reason = "a backup cannot be read into a buffer of 0 bytes".to_owned();
            return Err(Error::Backup(reason));
        }
        let chunk = self.read_chunk(&reader, from, buffer);
        self.protection.check()?;
        let chunk = chunk?;
        reader.end = reader.end.max(chunk.next);
        Ok(chunk)
    }

    fn read_chunk(&self, reader: &Reader, from: u64, buffer: &mut [u8]) -> Result<Chunk> {
        let mut chunk = Chunk {
            extents: Vec::new(),
            bytes: 0,
            next: from,
        };
        // The disk may end within a granule that it has.
        while chunk.next < self.size()
            && let Some(run) = self.next_run(reader, chunk.next)
        {
            chunk.next = run.start;
            let room = &mut buffer[chunk.bytes..];
            let granule = self.protection.granule_end(run.start + 1) - run.start;
            let is_full = chunk.bytes > 0 && (room.len() as u64) < granule;
            if is_full || chunk.extents.len() >= MAX_EXTENTS {
                return Ok(chunk);
            }
            let (is_zero, len) = self.read_run(run.clone(), room)?;
            chunk.push(run.start, len, is_zero);
            chunk.next += len;
            if !is_zero {
                chunk.bytes += len as usize;
            }
        }
        chunk.next = self.size();
        Ok(chunk)
    }

    /// The next bytes that the backup has from `from` on.
    fn next_run(&self, reader: &Reader, from: u64) -> Option<Range<u64>> {
        let protection = &self.protection;
        let run = reader.wanted.run(protection.granules(from, u64::MAX))?;
        let (start, len) = protection.bytes(&run);
        Some(start.max(from)..start + len)
    }

    /// Reads the beginning of `run`, which the backup has, into `buffer`. Whether it is zero, which needs
    /// no room, and how many bytes are so or have been read.
    fn read_run(&self, run: Range<u64>, buffer: &mut [u8]) -> Result<(bool, u64)> {
        let protection = &*self.protection;
        match protection.read_disk(&self.disk, run.clone(), buffer)? {
            Some(done) => Ok(done),
            None => protection.read_kept(run, buffer),
        }
    }

    /// Releases what lies below offset `end`: the reader has it for good.
    ///
    /// # Errors
    /// [`Error::Backup`] if the backup has failed, or has not been read so far.
    pub fn release(&self, end: u64) -> Result<()> {
        let mut reader = lock(&self.reader);
        self.protection.check()?;
        if end > reader.end {
            let read = reader.end;
            return Err(Error::Backup(format!(
                "offset {end} cannot be released: the backup has been read up to offset {read} only"
            )));
        }
        if end <= reader.start {
            return Ok(());
        }
        let protection = &self.protection;
        let whole = match end == protection.size {
            true => end.div_ceil(1 << protection.granule_bits),
            false => end >> protection.granule_bits,
        };
        let granules = reader.start >> protection.granule_bits..whole;
        reader.start = end;
        reader.released += protection.wanted_bytes(&reader.wanted, granules.clone());
        reader.wanted.remove(granules.clone());
        if granules.start < granules.end {
            // Who is keeping one of them has done so then.
            let _held = protection.ranges.lock(granules.clone());
            protection.protected.remove(granules.clone());
            protection.scratch.release_below(granules.end);
        }
        Ok(())
    }
}

impl Protection {
    /// How many bytes those of `granules` have that are in `wanted`.
    pub fn wanted_bytes(&self, wanted: &Granules, granules: Range<u64>) -> u64 {
        let whole = wanted.count(granules.clone()) << self.granule_bits;
        let last = self.size >> self.granule_bits;
        match granules.contains(&last) && wanted.any(last..last + 1) {
            // The disk ends within it.
            true => whole - (((last + 1) << self.granule_bits) - self.size),
            false => whole,
        }
    }

    /// As [`Backup::read_run`], of what is still on the disk; `None` if the beginning is not.
    fn read_disk(
        &self,
        disk: &LiveDisk,
        run: Range<u64>,
        buffer: &mut [u8],
    ) -> Result<Option<(bool, u64)>> {
        let state = disk.shared();
        let disk = state.image.disk();
        let len = (run.end - run.start).min(LOOK);
        let Some((held, len)) = self.hold(run.start, len) else {
            return Ok(None);
        };
        let (is_zero, found) = zero_or_data(disk, run.start, len)?;
        let end = run.start + found;
        // Only whole granules are told as zero: nobody shall have to look for the rest of one.
        let whole = if found == len {
            end
        } else {
            self.granule_start(end)
        };
        if is_zero && whole > run.start {
            return Ok(Some((true, whole - run.start)));
        }
        drop(held);
        let end = self.granule_end(end).min(run.end);
        let len = self.room(run.start, end, buffer.len() as u64);
        let Some((_held, len)) = self.hold(run.start, len) else {
            return Ok(None);
        };
        let bytes = &mut buffer[..len as usize];
        disk.read_at(&[VolatileSlice::from(bytes)], run.start)?;
        Ok(Some((false, len)))
    }

    /// How many of the bytes from `start` to `end` are read at once where there is room for `room`: whole
    /// granules, if there is room for one.
    fn room(&self, start: u64, end: u64, room: u64) -> u64 {
        let most = PIECE.max(1 << self.granule_bits).min(room);
        if end - start <= most {
            return end - start;
        }
        let whole = self.granule_start(start + most);
        if whole > start { whole - start } else { most }
    }

    fn granule_start(&self, offset: u64) -> u64 {
        offset >> self.granule_bits << self.granule_bits
    }

    /// Where the granule ends that has the byte before `offset`, or the disk.
    fn granule_end(&self, offset: u64) -> u64 {
        (offset.div_ceil(1 << self.granule_bits) << self.granule_bits).min(self.size)
    }

    /// Holds the range of `len` bytes at `offset`, and tells how many of them are protected; `None` if the
    /// first one is not.
    fn hold(&self, offset: u64, len: u64) -> Option<(RangeGuard<'_>, u64)> {
        let granules = self.granules(offset, len.max(1));
        let held = self.ranges.lock(granules.clone());
        let run = self.protected.run(granules.clone())?;
        let (start, protected) = self.bytes(&run);
        (run.start == granules.start).then_some((held, len.min(start + protected - offset)))
    }

    /// Reads what has been kept of `run`. As [`Backup::read_run`].
    fn read_kept(&self, run: Range<u64>, buffer: &mut [u8]) -> Result<(bool, u64)> {
        let granule = run.start >> self.granule_bits;
        let (start, len) = self.bytes(&(granule..granule + 1));
        let within = run.start - start;
        let len = len - within;
        if !self.scratch.has(granule) {
            return Ok((true, len));
        }
        let len = len.min(buffer.len() as u64);
        self.scratch
            .read(granule, within, &mut buffer[..len as usize])?;
        Ok((false, len))
    }
}
