//! From the buffers of a descriptor chain to an operation on the disk (virtio 1.3, section 5.2.6).

use tandem_block::Error;
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD,
    VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
    VIRTIO_BLK_T_WRITE_ZEROES, VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP,
};
use vm_memory::VolatileSlice;

use super::config::{MAX_DISCARD_SECTORS, MAX_SEGMENTS, MAX_WRITE_ZEROES_SECTORS, SECTOR_SIZE};
use super::features;
use crate::virtio::buffers::Buffers;

/// Bytes of the serial number.
pub(super) const ID_LEN: u64 = 20;

/// Bytes of one `struct virtio_blk_discard_write_zeroes`.
const SEGMENT_SIZE: u64 = 16;

/// What a request asks for. Offsets and lengths are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Into the writable buffers.
    Read {
        offset: u64,
        len: u64,
    },
    /// Out of the readable buffers.
    Write {
        offset: u64,
        len: u64,
    },
    Flush,
    /// Into the writable buffers.
    GetId,
    /// Of the segments that have been read.
    Discard,
    /// Of the segments that have been read.
    WriteZeroes,
}

/// A range to be discarded or zeroed, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Segment {
    pub offset: u64,
    pub len: u64,
    /// The space of the range may be released.
    pub unmap: bool,
}

/// What of the disk and of the negotiation decides whether a request makes sense.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rules {
    /// Features that the driver has accepted.
    pub features: u64,
    pub read_only: bool,
}

/// Value of the status byte.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Status {
    Ok = VIRTIO_BLK_S_OK as u8,
    IoErr = VIRTIO_BLK_S_IOERR as u8,
    Unsupp = VIRTIO_BLK_S_UNSUPP as u8,
}

/// Why a request failed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("the request has no writable byte for its status")]
    NoStatusByte,
    #[error("a buffer of the request lies outside guest memory")]
    Unmapped,
    #[error("the request is shorter than its header")]
    ShortHeader,
    #[error("request type {0} is unknown or has not been negotiated")]
    UnknownType(u32),
    #[error("the request writes to a read-only disk")]
    ReadOnly,
    #[error("the request has data in the wrong direction")]
    WrongDirection,
    #[error("the length of {0} bytes is not a multiple of the sector size")]
    PartialSector(u64),
    #[error("sector {0} is out of the range of byte offsets")]
    SectorOverflow(u64),
    #[error("the buffer for the serial number has only {0} bytes")]
    ShortIdBuffer(u64),
    #[error("{0} bytes are not a list of 1 to {MAX_SEGMENTS} segments")]
    SegmentList(u64),
    #[error("a segment has the flags {0:#x}, which its request cannot have")]
    SegmentFlags(u32),
    #[error("a segment has {0} sectors, more than the device takes")]
    SegmentTooLong(u32),
    #[error(transparent)]
    Disk(#[from] Error),
    #[error("internal error: the disk panicked")]
    Panicked,
}

impl RequestError {
    /// The status that the driver gets. "Unsupported" is for what it must not expect to work at
    /// all; it may retry or report anything else.
    pub(super) fn status(&self) -> Status {
        match self {
            Self::UnknownType(_) | Self::SegmentFlags(_) => Status::Unsupp,
            Self::NoStatusByte
            | Self::Unmapped
            | Self::ShortHeader
            | Self::ReadOnly
            | Self::WrongDirection
            | Self::PartialSector(_)
            | Self::SectorOverflow(_)
            | Self::ShortIdBuffer(_)
            | Self::SegmentList(_)
            | Self::SegmentTooLong(_)
            | Self::Disk(_)
            | Self::Panicked => Status::IoErr,
        }
    }
}

/// The fields of `struct virtio_blk_req` before its data.
struct Header {
    kind: u32,
    sector: u64,
}

impl Rules {
    /// Tells what the request in `buffers`, without its status byte, asks for. Consumes the header
    /// and the list of segments, which goes to `segments`.
    pub(super) fn parse(
        &self,
        buffers: &mut Buffers<'_>,
        segments: &mut Vec<Segment>,
    ) -> Result<Operation, RequestError> {
        if buffers.is_unmapped() {
            return Err(RequestError::Unmapped);
        }
        let header = Header::read(buffers)?;
        let (readable, writable) = (buffers.readable(), buffers.writable());
        match header.kind {
            VIRTIO_BLK_T_IN => {
                expect_none(readable)?;
                let (offset, len) = header.range(writable)?;
                Ok(Operation::Read { offset, len })
            }
            VIRTIO_BLK_T_OUT => {
                self.check_writable()?;
                expect_none(writable)?;
                let (offset, len) = header.range(readable)?;
                Ok(Operation::Write { offset, len })
            }
            VIRTIO_BLK_T_FLUSH if self.has(features::FLUSH) => {
                expect_none(readable)?;
                expect_none(writable)?;
                Ok(Operation::Flush)
            }
            VIRTIO_BLK_T_GET_ID => {
                expect_none(readable)?;
                match total_len(writable) {
                    ID_LEN.. => Ok(Operation::GetId),
                    short => Err(RequestError::ShortIdBuffer(short)),
                }
            }
            VIRTIO_BLK_T_DISCARD if self.has(features::DISCARD) => {
                self.check_writable()?;
                read_segments(buffers, segments, 0, MAX_DISCARD_SECTORS)?;
                Ok(Operation::Discard)
            }
            VIRTIO_BLK_T_WRITE_ZEROES if self.has(features::WRITE_ZEROES) => {
                self.check_writable()?;
                let flags = VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
                read_segments(buffers, segments, flags, MAX_WRITE_ZEROES_SECTORS)?;
                Ok(Operation::WriteZeroes)
            }
            kind => Err(RequestError::UnknownType(kind)),
        }
    }

    pub(super) fn has(&self, feature: u64) -> bool {
        self.features & feature != 0
    }

    fn check_writable(&self) -> Result<(), RequestError> {
        if self.read_only {
            return Err(RequestError::ReadOnly);
        }
        Ok(())
    }
}

impl Header {
    fn read(buffers: &mut Buffers<'_>) -> Result<Self, RequestError> {
        // 32 bits of type, 32 reserved ones, and 64 of the sector.
        let fields = buffers.read_front().map(u128::from_le);
        let fields = fields.ok_or(RequestError::ShortHeader)?;
        Ok(Self {
            kind: fields as u32,
            sector: (fields >> 64) as u64,
        })
    }

    /// Where `data` lies on the disk, in bytes. Whether it lies within is for the disk to say.
    fn range(&self, data: &[VolatileSlice<'_>]) -> Result<(u64, u64), RequestError> {
        let len = total_len(data);
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(RequestError::PartialSector(len));
        }
        Ok((to_bytes(self.sector)?, len))
    }
}

/// Reads the list of segments: once, as the driver can change it at any time.
fn read_segments(
    buffers: &mut Buffers<'_>,
    segments: &mut Vec<Segment>,
    allowed_flags: u32,
    max_sectors: u32,
) -> Result<(), RequestError> {
    expect_none(buffers.writable())?;
    let len = total_len(buffers.readable());
    if !len.is_multiple_of(SEGMENT_SIZE)
        || !(1..=u64::from(MAX_SEGMENTS)).contains(&(len / SEGMENT_SIZE))
    {
        return Err(RequestError::SegmentList(len));
    }
    segments.clear();
    // What is not supported is said before what is too much, whichever segment has it.
    let (mut unsupported, mut unfit) = (Ok(()), Ok(()));
    while let Some(fields) = buffers.read_front().map(u128::from_le) {
        // 64 bits of the first sector, 32 of their number, and 32 of flags.
        let (sector, sectors) = (fields as u64, (fields >> 64) as u32);
        let flags = (fields >> 96) as u32;
        if flags & !allowed_flags != 0 {
            unsupported = Err(RequestError::SegmentFlags(flags));
        }
        if sectors > max_sectors {
            unfit = Err(RequestError::SegmentTooLong(sectors));
        }
        match to_bytes(sector) {
            Ok(offset) => segments.push(Segment {
                offset,
                len: u64::from(sectors) * SECTOR_SIZE,
                unmap: flags & VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP != 0,
            }),
            Err(error) => unfit = Err(error),
        }
    }
    unsupported.and(unfit)
}

fn to_bytes(sector: u64) -> Result<u64, RequestError> {
    sector
        .checked_mul(SECTOR_SIZE)
        .ok_or(RequestError::SectorOverflow(sector))
}

pub(super) fn total_len(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

fn expect_none(slices: &[VolatileSlice<'_>]) -> Result<(), RequestError> {
    if slices.is_empty() {
        Ok(())
    } else {
        Err(RequestError::WrongDirection)
    }
}

#[cfg(test)]
mod tests;
