//! The copying itself.

use std::sync::atomic::{AtomicBool, Ordering};

use tandem_block::qcow2::{CompressedCluster, Qcow2};
use tandem_block::{Error, VolatileSlice};

use super::source::{Seen, Sources, Status};
use super::sparse::{Detection, Part, is_zero};
use crate::failure::Failure;
use crate::getopt::Name;
use crate::image::opened::Opened;
use crate::output;
use crate::progress::{Progress, percent};
use crate::rate::Rate;
use crate::workers::{Turn, Workers};

/// Bytes that are copied at once, and more if a cluster has more.
pub const PIECE: usize = 2 << 20;
/// Bytes of a piece that are read and written at once where pieces need not wait for each other: what
/// has been read is still in the processor's near caches then.
pub const STEP: u64 = 256 << 10;
/// Bytes of which the clusters are compressed at once: the first turns come soon.
const COMPRESSED: u64 = 64 << 10;
const SECTOR: u64 = 512;

/// What is copied where, and how.
pub struct Copy<'a> {
    /// For messages.
    pub name: &'a Name,
    /// Where from.
    pub sources: &'a Sources,
    /// Where to: it is at least as large.
    pub target: &'a Opened,
    /// Whether the target reads as zero.
    pub target_is_zero: bool,
    /// Whether all is looked at before anything is copied, which finds what cannot be looked at.
    pub looks_first: bool,
    /// Whether the target has a backing file that shows what that of the source does.
    pub has_backing: bool,
    /// Where that ends, if it is known.
    pub backing_size: Option<u64>,
    /// How zeros are found that are not written; `None` if all are.
    pub sparse: Option<Detection>,
    /// Whether pieces may be copied in steps of [`STEP`]; a limit on the rate is one for whole pieces.
    pub in_steps: bool,
    /// Whether clusters of the target are compressed.
    pub compress: bool,
    /// Whether what cannot be read is left out.
    pub salvage: bool,
    /// Whether nothing is said of that.
    pub quiet: bool,
    /// How fast it may go.
    pub rate: Option<Rate>,
    /// Whether the system is asked to copy, as long as it can.
    pub offload: AtomicBool,
}

/// A part of the disk that is copied in one way.
#[derive(Clone, Copy, Debug)]
struct Piece {
    offset: u64,
    len: u64,
    status: Status,
}

impl Copy<'_> {
    /// Copies everything.
    pub fn run(&self, workers: Workers, progress: &Progress) -> Result<(), Failure> {
        let mut total = match self.looks_first {
            true => Some(self.total()?),
            false => None,
        };
        let mut pieces = Pieces::new(self);
        let mut done = 0;
        let next = || {
            let piece = pieces.next()?;
            let len = piece.map_or(0, |piece| self.transferred(piece));
            done += len;
            if len > 0 && progress.is_watched() {
                let total = match total {
                    Some(total) => total,
                    None => *total.insert(self.total()?),
                };
                progress.set_percent(percent(done, total));
            }
            Ok(piece)
        };
        workers.run(next, |piece, buffer, turn| {
            self.copy(piece, &mut buffer[..], turn)
        })?;
        self.target.disk().flush().map_err(|e| {
            self.name
                .error(&format!("error while writing: {}", e.cause()))
        })
    }

    /// Bytes of all pieces that are read or written.
    fn total(&self) -> Result<u64, Failure> {
        let mut total = 0;
        let mut pieces = Pieces::new(self);
        while let Some(piece) = pieces.next()? {
            total += self.transferred(piece);
        }
        Ok(total)
    }

    /// Bytes of `piece` that are read or written.
    fn transferred(&self, piece: Piece) -> u64 {
        match piece.status {
            Status::Data => piece.len,
            Status::Zero if self.sparse.is_none() => piece.len,
            Status::Zero | Status::Backing => 0,
        }
    }

    fn copy(&self, piece: Piece, buffer: &mut [u8], turn: &Turn<'_>) -> Result<(), Failure> {
        match piece.status {
            Status::Backing => return Ok(()),
            Status::Zero if self.sparse.is_some() => {
                let write = || self.write_zeroes(piece.offset, piece.len);
                return self.in_turn(piece, turn, write);
            }
            Status::Data if self.offload.load(Ordering::Relaxed) => {
                let mut is_copied = false;
                self.in_turn(piece, turn, || {
                    is_copied = self.offload(piece)?;
                    Ok(())
                })?;
                if is_copied {
                    return Ok(());
                }
                self.offload.store(false, Ordering::Relaxed);
            }
            Status::Zero | Status::Data => {}
        }
        let step = match self.in_steps && self.sparse.is_none_or(|sparse| sparse.divides(STEP)) {
            true => STEP,
            false => u64::MAX,
        };
        let (mut at, end) = (piece.offset, piece.offset + piece.len);
        while at < end {
            let next = end.min((at / step).saturating_add(1).saturating_mul(step));
            self.copy_step(piece, at, &mut buffer[..(next - at) as usize], turn)?;
            at = next;
        }
        Ok(())
    }

    /// Copies what of `piece` lies at `offset` and fits into `buffer`.
    fn copy_step(
        &self,
        piece: Piece,
        offset: u64,
        buffer: &mut [u8],
        turn: &Turn<'_>,
    ) -> Result<(), Failure> {
        match piece.status {
            Status::Data => self.read(piece, buffer, offset)?,
            _ => buffer.fill(0),
        }
        match self.target {
            Opened::Qcow2(disk) if self.compress => {
                let clusters = self.compress(disk, buffer, offset);
                let clusters = clusters.map_err(|e| self.write_error(piece, &e))?;
                self.in_turn(piece, turn, || self.write_compressed(disk, clusters))
            }
            _ => self.in_turn(piece, turn, || self.write_data(buffer, offset)),
        }
    }

    /// Does `write` for `piece` after all that come before it.
    fn in_turn(
        &self,
        piece: Piece,
        turn: &Turn<'_>,
        write: impl FnOnce() -> tandem_block::Result<()>,
    ) -> Result<(), Failure> {
        if !turn.wait() {
            return Ok(());
        }
        write().map_err(|e| self.write_error(piece, &e))
    }

    fn write_error(&self, piece: Piece, error: &Error) -> Failure {
        let (offset, cause) = (piece.offset, error.cause());
        self.name
            .error(&format!("error while writing at byte {offset}: {cause}"))
    }

    /// Reads what of `piece` lies at `offset`. In a salvage, sectors that cannot be read become zero.
    fn read(&self, piece: Piece, buffer: &mut [u8], offset: u64) -> Result<(), Failure> {
        match self.sources.read(buffer, offset) {
            Err(_) if self.salvage => {}
            Err(error) => {
                let (start, cause) = (piece.offset, error.cause());
                let text = format!("error while reading at byte {start}: {cause}");
                return Err(self.name.error(&text));
            }
            Ok(()) => return Ok(()),
        }
        let offsets = (offset..).step_by(SECTOR as usize);
        for (sector, offset) in buffer.chunks_mut(SECTOR as usize).zip(offsets) {
            if let Err(error) = self.sources.read(sector, offset) {
                sector.fill(0);
                self.warn(&format!("error while reading offset {offset}"), &error);
            }
        }
        Ok(())
    }

    fn warn(&self, text: &str, error: &Error) {
        if !self.quiet {
            let text = format!("warning: {text}: {}", error.cause());
            output::complain_line(&self.name.text(&text));
        }
    }

    /// Has the system copy all of `piece`. Whether it could.
    fn offload(&self, piece: Piece) -> tandem_block::Result<bool> {
        let mut done = 0;
        while done < piece.len {
            let at = piece.offset + done;
            let Some(from) = self.sources.file_range(at, piece.len - done)? else {
                return Ok(false);
            };
            self.limit(from.len);
            let target = self.target.disk();
            if !target.copy_from(from.file, from.offset, at, from.len)? {
                return Ok(false);
            }
            done += from.len;
        }
        Ok(true)
    }

    /// Writes what of `bytes` is not zero at `offset`.
    fn write_data(&self, bytes: &mut [u8], offset: u64) -> tandem_block::Result<()> {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &mut bytes[at..];
            let start = offset + at as u64;
            let part = match self.sparse {
                Some(detection) => detection.first(rest, start),
                None => Part::Data(rest.len()),
            };
            at += match part {
                Part::Data(len) => {
                    self.limit(len as u64);
                    let slice = VolatileSlice::from(&mut rest[..len]);
                    self.target.disk().write_at(&[slice], start)?;
                    len
                }
                Part::Zero(len) => {
                    self.write_zeroes(start, len as u64)?;
                    len
                }
            };
        }
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> tandem_block::Result<()> {
        if self.target_is_zero {
            return Ok(());
        }
        self.limit(len);
        self.target.disk().write_zeroes(offset, len, true)
    }

    /// The clusters of `bytes`, which lie at `offset`, compressed for `disk`.
    fn compress(
        &self,
        disk: &Qcow2,
        bytes: &[u8],
        offset: u64,
    ) -> tandem_block::Result<Vec<Cluster>> {
        let cluster_size = disk.cluster_size() as usize;
        let offsets = (offset..).step_by(cluster_size);
        let clusters = bytes.chunks(cluster_size).zip(offsets);
        let compress = |(bytes, offset): (&[u8], u64)| {
            let data = match self.sparse.is_some() && is_zero(bytes) {
                true => None,
                false => Some(disk.compress(bytes.to_vec())?),
            };
            let len = bytes.len() as u64;
            Ok(Cluster { offset, len, data })
        };
        clusters.map(compress).collect()
    }

    fn write_compressed(&self, disk: &Qcow2, clusters: Vec<Cluster>) -> tandem_block::Result<()> {
        for cluster in clusters {
            match cluster.data {
                Some(data) => {
                    self.limit(cluster.len);
                    disk.write_compressed(data, cluster.offset)?;
                }
                None => self.write_zeroes(cluster.offset, cluster.len)?,
            }
        }
        Ok(())
    }

    fn limit(&self, bytes: u64) {
        if let Some(rate) = &self.rate {
            rate.wait(bytes);
        }
    }
}

/// A cluster of the target.
struct Cluster {
    offset: u64,
    len: u64,
    /// `None` if it is zero, and that is not to be stored.
    data: Option<CompressedCluster>,
}

/// The pieces of a copy, in order.
struct Pieces<'a> {
    copy: &'a Copy<'a>,
    offset: u64,
    /// How it goes on from `offset` on, up to `end`.
    status: Status,
    end: u64,
    seen: Seen,
}

impl<'a> Pieces<'a> {
    fn new(copy: &'a Copy<'a>) -> Self {
        Self {
            copy,
            offset: 0,
            status: Status::Zero,
            end: 0,
            seen: Seen::default(),
        }
    }

    fn next(&mut self) -> Result<Option<Piece>, Failure> {
        let size = self.copy.sources.size();
        if self.offset >= size {
            return Ok(None);
        }
        if self.end <= self.offset {
            self.look(size - self.offset)?;
        }
        let mut len = self.end - self.offset;
        let mut status = self.status;
        if status == Status::Data || self.copy.sparse.is_none() && status == Status::Zero {
            len = len.min(PIECE as u64);
        }
        if let (Opened::Qcow2(disk), true) = (self.copy.target, self.copy.compress) {
            // Only whole clusters can be compressed.
            let cluster = disk.cluster_size();
            if len < cluster {
                len = cluster.min(size - self.offset);
                status = Status::Data;
            } else if status == Status::Data {
                len = len.min(cluster.max(COMPRESSED));
            }
            len -= len % cluster.min(len);
        }
        let offset = self.offset;
        self.offset += len;
        Ok(Some(Piece {
            offset,
            len,
            status,
        }))
    }

    /// Finds out how it goes on, for up to `len` bytes.
    fn look(&mut self, mut len: u64) -> Result<(), Failure> {
        let (copy, offset) = (self.copy, self.offset);
        let is_behind = copy.backing_size.is_some_and(|end| offset >= end);
        if let Some(end) = copy.backing_size.filter(|end| offset < *end) {
            // Behind it, what is zero need not be written.
            len = len.min(end - offset);
        }
        let (status, len) = loop {
            let found = copy
                .sources
                .status(offset, len, copy.has_backing, &mut self.seen);
            match found {
                Ok(found) => break found,
                Err(error) if !copy.salvage => {
                    let cause = error.cause();
                    let text =
                        format!("error while reading block status at offset {offset}: {cause}");
                    return Err(copy.name.error(&text));
                }
                Err(error) if len <= SECTOR => {
                    let text = format!("error while reading block status at offset {offset}");
                    copy.warn(&text, &error);
                    break (Status::Data, len);
                }
                Err(_) => len = (len / 4).next_multiple_of(SECTOR),
            }
        };
        self.status = match status {
            Status::Zero if is_behind => Status::Backing,
            other => other,
        };
        self.end = offset + len;
        Ok(())
    }
}
