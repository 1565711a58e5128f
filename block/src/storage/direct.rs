//! Files whose data goes past the page cache (`O_DIRECT`).
//!
//! The system moves such data between the caller's memory and the device as it is, so offset,
//! length and memory must be aligned. Requests that are go straight through. For the others there is
//! a bounce buffer, and of a block that is written in part, the rest is read first and written back.
//!
//! The block at the end of a file whose length is not aligned is written through the page cache:
//! written as a whole it would make the file longer than anybody has asked for.

use std::fs::{File, OpenOptions};
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::fs::{FileExt, OpenOptionsExt};

use rustix::fs::{AtFlags, StatxFlags};
use vm_memory::VolatileSlice;

use super::units::{PAGE, Units};
use super::vectored::{self, Direction};
use crate::buffers::Buffers;
use crate::disk::total_len;
use crate::writers::Writers;
use crate::{FileStamp, FileStorage, Storage};

/// Most bytes in a bounce buffer.
const BOUNCE: u64 = 1 << 20;

/// Alignment that is tried first where the system does not tell, and what is tried last.
const PROBED: Range<u32> = 12..17;

/// A [`FileStorage`] whose reads and writes go past the page cache.
#[derive(Debug)]
pub(crate) struct Direct {
    /// For everything but data.
    file: FileStorage,
    /// The same file, opened with `O_DIRECT`.
    direct: File,
    alignment: Alignment,
    writers: Writers,
}

/// What direct requests must be multiples of, in bytes: powers of two.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alignment {
    /// Address of each buffer.
    memory: usize,
    /// Offset, and length of each buffer.
    block: u64,
}

impl Direct {
    /// Opens `file` a second time.
    ///
    /// # Errors
    /// The system's, among them that the file system cannot do this.
    pub fn new(file: FileStorage, read_only: bool) -> io::Result<Self> {
        let unsupported = || {
            let text = "filesystem does not support O_DIRECT";
            io::Error::new(io::ErrorKind::Unsupported, text)
        };
        let direct = OpenOptions::new()
            .read(true)
            .write(!read_only)
            .custom_flags(libc::O_DIRECT | libc::O_NONBLOCK)
            .open(format!("/proc/self/fd/{}", file.file().as_raw_fd()));
        let direct = direct.map_err(|e| match e.kind() {
            io::ErrorKind::InvalidInput => unsupported(),
            _ => e,
        })?;
        let alignment = match Alignment::told(&direct) {
            Some(alignment) => alignment,
            None => Alignment::probe(&direct)?,
        };
        if alignment.block == 0 {
            return Err(unsupported());
        }
        Ok(Self {
            file,
            direct,
            alignment,
            writers: Writers::default(),
        })
    }

    fn transfer(
        &self,
        bufs: &[VolatileSlice<'_>],
        offset: u64,
        direction: Direction,
    ) -> io::Result<()> {
        let unit = self.alignment.block;
        vectored::transfer(self.direct.as_fd(), bufs, offset, unit, direction)
    }

    fn bounce(&self, len: u64) -> Bounce {
        // Of limited length, see the callers.
        Bounce::new(len as usize, self.alignment.memory)
    }

    /// Fills `bufs` by way of a bounce buffer.
    fn read_bounced(&self, bufs: &[VolatileSlice<'_>], range: Range<u64>) -> io::Result<()> {
        let whole = widened(&range, self.alignment.block)?;
        let mut bounce = self.bounce((whole.end - whole.start).min(BOUNCE));
        let mut buffers = Buffers::new(bufs);
        let mut at = whole.start;
        while at < whole.end {
            let bytes = bounce.bytes((whole.end - at).min(BOUNCE));
            let end = at + bytes.len() as u64;
            self.transfer(&[VolatileSlice::from(&mut *bytes)], at, Direction::Read)?;
            let wanted = range.start.max(at)..range.end.min(end);
            let bytes = &bytes[(wanted.start - at) as usize..];
            buffers.take(wanted.end - wanted.start, |piece, distance| {
                copy_to(piece, &bytes[distance as usize..]);
                Ok::<_, io::Error>(())
            })?;
            at = end;
        }
        Ok(())
    }

    /// Writes `bufs` by way of a bounce buffer.
    fn write_bounced(&self, bufs: &[VolatileSlice<'_>], range: Range<u64>) -> io::Result<()> {
        let block = self.alignment.block;
        let start = widened(&(range.start..range.start), block)?
            .end
            .min(range.end);
        let end = (range.end - range.end % block).max(start);
        let is_whole = (start, end) == (range.start, range.end);
        let _writing = if is_whole {
            self.writers.share(range.clone())
        } else {
            self.writers
                .exclude(widened(&range, block.max(PAGE.into()))?)
        };
        let mut buffers = Buffers::new(bufs);
        buffers.take(start - range.start, |piece, distance| {
            self.write_part_of_block(piece, range.start + distance)
        })?;
        let mut bounce = self.bounce((end - start).min(BOUNCE));
        let mut at = start;
        while at < end {
            let bytes = bounce.bytes((end - at).min(BOUNCE));
            buffers.take(bytes.len() as u64, |piece, distance| {
                copy_from(piece, &mut bytes[distance as usize..]);
                Ok::<_, io::Error>(())
            })?;
            let len = bytes.len() as u64;
            self.transfer(&[VolatileSlice::from(bytes)], at, Direction::Write)?;
            at += len;
        }
        buffers.take(range.end - end, |piece, distance| {
            self.write_part_of_block(piece, end + distance)
        })
    }

    /// Writes `piece`, which lies within one block, while nobody else writes there.
    fn write_part_of_block(&self, piece: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let block = self.alignment.block;
        let start = offset - offset % block;
        let is_at_end = start.checked_add(block).is_none_or(|end| {
            // If the length is not known, the page cache does it right in any case.
            self.file.size().map_or(true, |size| end > size)
        });
        if is_at_end {
            return self.file.write_at(piece, offset);
        }
        let mut bounce = self.bounce(block);
        let bytes = bounce.bytes(block);
        self.transfer(&[VolatileSlice::from(&mut *bytes)], start, Direction::Read)?;
        copy_from(piece, &mut bytes[(offset - start) as usize..]);
        self.transfer(&[VolatileSlice::from(bytes)], start, Direction::Write)
    }

    /// Keeps writers off the pages of a range.
    fn exclude(&self, offset: u64, len: u64) -> io::Result<crate::writers::Writing<'_>> {
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let range = widened(&(offset..end), self.alignment.block.max(PAGE.into()))?;
        Ok(self.writers.exclude(range))
    }
}

impl Storage for Direct {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        if self.alignment.fits(bufs, offset) {
            return self.transfer(bufs, offset, Direction::Read);
        }
        self.read_bounced(bufs, range_of(bufs, offset)?)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let range = range_of(bufs, offset)?;
        if self.alignment.fits(bufs, offset) {
            let _writing = self.writers.share(range);
            return self.transfer(bufs, offset, Direction::Write);
        }
        self.write_bounced(bufs, range)
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.read_at(&[VolatileSlice::from(buf)], offset)
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut bounce = self.bounce(buf.len() as u64);
        let bytes = bounce.bytes(buf.len() as u64);
        bytes.copy_from_slice(buf);
        self.write_at(&[VolatileSlice::from(bytes)], offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        let _writing = self.exclude(offset, len)?;
        self.file.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        let _writing = self.exclude(offset, len)?;
        self.file.discard(offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.file.next_hole(offset)
    }

    /// What has been written either way.
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let _writing = self.writers.exclude(0..u64::MAX);
        self.file.set_len(len)
    }

    fn capacity(&self) -> io::Result<Option<u64>> {
        self.file.capacity()
    }

    fn locked(&self) -> Option<BorrowedFd<'_>> {
        self.file.locked()
    }

    fn stamp(&self) -> io::Result<Option<FileStamp>> {
        self.file.stamp()
    }

    fn sync_stamp(&self) -> io::Result<()> {
        self.file.sync_stamp()
    }

    fn renew_stamp(&self) -> io::Result<()> {
        self.file.renew_stamp()
    }

    fn units(&self) -> Units {
        let units = self.file.units();
        // A smaller write reads the rest of its block.
        let block = u32::try_from(self.alignment.block).unwrap_or(units.physical_block);
        Units {
            physical_block: units.physical_block.max(block),
            ..units
        }
    }
}

impl Alignment {
    /// What the system tells of `file`, if it knows (Linux 6.1); zeros if there is no direct I/O.
    fn told(file: &File) -> Option<Self> {
        let stat = rustix::fs::statx(file, "", AtFlags::EMPTY_PATH, StatxFlags::DIOALIGN).ok()?;
        let is_told = stat.stx_mask & StatxFlags::DIOALIGN.bits() != 0;
        is_told.then_some(Self {
            memory: stat.stx_dio_mem_align as usize,
            block: stat.stx_dio_offset_align.into(),
        })
    }

    /// What is found out by reading. Where nothing is stored the system may take any alignment, so
    /// small ones are not tried.
    fn probe(file: &File) -> io::Result<Self> {
        let mut refused = io::Error::from(io::ErrorKind::InvalidInput);
        for bits in PROBED {
            let size = 1 << bits;
            match file.read_at(Bounce::new(size, size).bytes(size as u64), 0) {
                Ok(_) => {
                    return Ok(Self {
                        memory: size,
                        block: size as u64,
                    });
                }
                Err(e) if e.kind() == io::ErrorKind::InvalidInput => refused = e,
                Err(e) => return Err(e),
            }
        }
        Err(refused)
    }

    /// Whether the system takes `bufs` at `offset` as they are.
    fn fits(self, bufs: &[VolatileSlice<'_>], offset: u64) -> bool {
        let block = self.block as usize;
        offset.is_multiple_of(self.block)
            && bufs.iter().all(|buf| {
                let address = buf.ptr_guard().as_ptr().addr();
                address.is_multiple_of(self.memory) && buf.len().is_multiple_of(block)
            })
    }
}

/// Aligned memory.
struct Bounce {
    memory: Vec<u8>,
    start: usize,
}

impl Bounce {
    /// `len` bytes at a multiple of `alignment`, which is a power of two.
    fn new(len: usize, alignment: usize) -> Self {
        let memory = vec![0; len + alignment];
        let start = memory.as_ptr().addr().next_multiple_of(alignment) - memory.as_ptr().addr();
        Self { memory, start }
    }

    /// The first `len` bytes.
    fn bytes(&mut self, len: u64) -> &mut [u8] {
        &mut self.memory[self.start..][..len as usize]
    }
}

/// The bytes of a file that `bufs` at `offset` stand for.
fn range_of(bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<Range<u64>> {
    let end = offset.checked_add(total_len(bufs));
    Ok(offset..end.ok_or(io::ErrorKind::InvalidInput)?)
}

/// The multiples of `unit` that `range` lies in.
fn widened(range: &Range<u64>, unit: u64) -> io::Result<Range<u64>> {
    let end = range.end.checked_next_multiple_of(unit);
    let start = range.start - range.start % unit;
    Ok(start..end.ok_or(io::ErrorKind::InvalidInput)?)
}

/// Fills `piece` from the front of `bytes`.
fn copy_to(piece: &[VolatileSlice<'_>], mut bytes: &[u8]) {
    for part in piece {
        part.copy_from(&bytes[..part.len()]);
        bytes = &bytes[part.len()..];
    }
}

/// Copies `piece` to the front of `bytes`.
fn copy_from(piece: &[VolatileSlice<'_>], mut bytes: &mut [u8]) {
    for part in piece {
        let (now, later) = bytes.split_at_mut(part.len());
        part.copy_to(now);
        bytes = later;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::atomic::{AtomicBool, Ordering};

    /// A file that is used in blocks of `block` bytes at least. Where the file system of temporary
    /// files has no direct I/O, the page cache stands in for it.
    fn direct(block: u64) -> Direct {
        let file = tempfile::tempfile().unwrap();
        let again = || FileStorage::new(file.try_clone().unwrap()).unwrap();
        match Direct::new(again(), false) {
            Ok(direct) => Direct {
                alignment: Alignment {
                    memory: direct.alignment.memory.max(block as usize),
                    block: direct.alignment.block.max(block),
                },
                ..direct
            },
            Err(_) => Direct {
                file: again(),
                direct: file,
                alignment: Alignment {
                    memory: block as usize,
                    block,
                },
                writers: Writers::default(),
            },
        }
    }

    fn filled(len: usize, alignment: usize, shift: usize, byte: u8) -> (Bounce, Range<usize>) {
        let mut memory = Bounce::new(len + shift, alignment);
        memory.bytes((len + shift) as u64).fill(byte);
        (memory, shift..shift + len)
    }

    #[derive(Clone, Debug)]
    enum Op {
        Read,
        /// From memory that begins so far behind an aligned address, in pieces of so many bytes.
        Write(usize, usize),
        Zero(bool),
        SetLen,
    }

    fn ops() -> impl Strategy<Value = Vec<(Op, u64, usize)>> {
        let op = prop_oneof![
            2 => Just(Op::Read),
            4 => (prop_oneof![Just(0usize), 1usize..600], prop_oneof![Just(4096usize), 1usize..5000])
                .prop_map(|(shift, piece)| Op::Write(shift, piece)),
            1 => any::<bool>().prop_map(Op::Zero),
            1 => Just(Op::SetLen),
        ];
        // Any offset and length, whole sectors, or whole blocks.
        let place = (0u64..40_000, 1usize..20_000, 0u32..3).prop_map(|(offset, len, kind)| {
            let unit = [1, 512, 4096][kind as usize];
            (offset / unit * unit, len.next_multiple_of(unit as usize))
        });
        let step = (op, place).prop_map(|(op, (offset, len))| (op, offset, len));
        proptest::collection::vec(step, 1..40)
    }

    fn run(direct: &Direct, ops: &[(Op, u64, usize)]) {
        let mut model: Vec<u8> = Vec::new();
        for (i, (op, offset, len)) in ops.iter().enumerate() {
            let (start, end) = (*offset as usize, *offset as usize + len);
            match op {
                Op::Read => {}
                Op::Write(shift, piece) => {
                    let (mut memory, range) = filled(*len, 4096, *shift, i as u8 + 1);
                    let bytes = &mut memory.bytes(range.end as u64)[range];
                    let bufs: Vec<_> = bytes.chunks_mut(*piece).map(VolatileSlice::from).collect();
                    direct.write_at(&bufs, *offset).unwrap();
                    model.resize(model.len().max(end), 0);
                    model[start..end].fill(i as u8 + 1);
                }
                Op::Zero(unmap) => {
                    direct.write_zeroes(*offset, *len as u64, *unmap).unwrap();
                    let end = end.min(model.len());
                    model[start.min(end)..end].fill(0);
                }
                Op::SetLen => {
                    direct.set_len(*offset).unwrap();
                    model.resize(start, 0);
                }
            }
            assert_eq!(direct.size().unwrap(), model.len() as u64, "{op:?}");
            let mut expected = model.clone();
            expected.resize(expected.len().max(end) + 100, 0);
            let mut back = vec![0xee; expected.len() - start];
            direct.read_bytes_at(&mut back, *offset).unwrap();
            assert!(back == expected[start..], "{op:?} at {offset}, {len}");
        }
        let mut through_cache = vec![0; model.len()];
        direct.file.read_bytes_at(&mut through_cache, 0).unwrap();
        assert!(through_cache == model);
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

        #[test]
        fn any_request_does_what_it_should(ops in ops(), bits in 9u32..=13) {
            run(&direct(1 << bits), &ops);
        }
    }

    #[test]
    fn aligned_requests_go_straight_through() {
        let direct = direct(4096);
        let Alignment { memory, block } = direct.alignment;
        let len = 2 * block as usize;
        let fits = |shift: usize, len: usize, offset: u64| {
            let (mut bounce, range) = filled(len, memory, shift, 1);
            let bytes = &mut bounce.bytes(range.end as u64)[range];
            direct.alignment.fits(&[VolatileSlice::from(bytes)], offset)
        };
        assert!(fits(0, len, block));
        assert!(!fits(8, len, block));
        assert!(!fits(0, len - 512, block));
        assert!(!fits(0, len, block + 512));
    }

    #[test]
    fn parts_of_a_block_do_not_lose_each_other() {
        let direct = &direct(4096);
        direct.set_len(1 << 20).unwrap();
        let done = &AtomicBool::new(false);
        std::thread::scope(|scope| {
            // Each of these writes a sector of its own, and finds it as it left it.
            let threads: Vec<_> = (0..4)
                .map(|thread| {
                    scope.spawn(move || {
                        for i in 0..400u32 {
                            let offset = u64::from(i % 2) * 4096 + thread * 512;
                            let written = [(i as u8) ^ (thread as u8); 512];
                            direct.write_bytes_at(&written, offset).unwrap();
                            let mut back = [0; 512];
                            direct.read_bytes_at(&mut back, offset).unwrap();
                            assert!(back == written, "sector {thread} has lost write {i}");
                        }
                    })
                })
                .collect();
            // This one writes whole blocks, of which another writes the first sector, too.
            scope.spawn(move || {
                let mut i = 0;
                while !done.load(Ordering::Relaxed) {
                    i += 1;
                    let (mut memory, range) = filled(4096, direct.alignment.memory, 0, i as u8);
                    let bytes = &mut memory.bytes(4096)[range];
                    let bufs = [VolatileSlice::from(&mut *bytes)];
                    direct.write_at(&bufs, 16384).unwrap();
                    let mut back = [0; 4096];
                    direct.read_bytes_at(&mut back, 16384).unwrap();
                    let kept = back[512..].iter().all(|byte| *byte == i as u8);
                    assert!(kept, "a block has lost write {i}");
                }
            });
            scope.spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    direct.write_bytes_at(&[1; 512], 16384).unwrap();
                }
            });
            let ended: Vec<_> = threads.into_iter().map(|thread| thread.join()).collect();
            done.store(true, Ordering::Relaxed);
            for end in ended {
                end.unwrap();
            }
        });
        assert_eq!(direct.size().unwrap(), 1 << 20);
    }

    #[test]
    fn the_end_of_a_file_stays_where_it_is() {
        let direct = direct(4096);
        direct.write_bytes_at(&[1; 1536], 0).unwrap();
        assert_eq!(direct.size().unwrap(), 1536);
        direct.write_bytes_at(&[2; 512], 1024).unwrap();
        assert_eq!(direct.size().unwrap(), 1536);
        direct.write_bytes_at(&[3; 512], 8192 + 512).unwrap();
        assert_eq!(direct.size().unwrap(), 8192 + 1024);
        let mut back = [9; 12288];
        direct.read_bytes_at(&mut back, 0).unwrap();
        assert!(back[1024..1536] == [2; 512] && back[8704..9216] == [3; 512]);
        assert!(back[9216..].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn an_alignment_is_found_without_being_told() {
        let file = tempfile::tempfile().unwrap();
        let probed = Alignment::probe(&file).unwrap();
        assert_eq!(
            probed,
            Alignment {
                memory: 4096,
                block: 4096
            }
        );
        if let Some(told) = Alignment::told(&file).filter(|told| told.block > 0) {
            assert!(probed.block.is_multiple_of(told.block));
            assert!(probed.memory.is_multiple_of(told.memory));
        }
    }
}
