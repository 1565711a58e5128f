//! From the buffers of a descriptor chain to a call of the disk and a status (virtio 1.3, section
//! 5.2.6).

use std::sync::Arc;

use tandem_block::{Disk, Error};
use virtio_bindings::bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT,
};
use vm_memory::VolatileSlice;

use super::config::SECTOR_SIZE;
use super::{FEATURE_FLUSH, Serial};
use crate::virtio::buffers::Buffers;

/// What requests act on.
pub(super) struct Target {
    disk: Arc<dyn Disk>,
    id: [u8; 20],
    has_flush: bool,
    /// The driver takes completed writes for durable, and the disk does not make them so.
    flush_writes: bool,
}

/// How a request ended.
#[derive(Debug)]
pub(super) struct Outcome {
    /// Bytes written from the start of the writable buffers on: what the driver is told.
    pub used_len: u32,
    /// Why the request failed.
    pub error: Option<RequestError>,
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
    #[error(transparent)]
    Disk(#[from] Error),
}

impl RequestError {
    /// The status that the driver gets. "Unsupported" is for what it must not expect to work at
    /// all; it may retry or report anything else.
    fn status(&self) -> Status {
        match self {
            Self::UnknownType(_) => Status::Unsupp,
            Self::NoStatusByte
            | Self::Unmapped
            | Self::ShortHeader
            | Self::ReadOnly
            | Self::WrongDirection
            | Self::PartialSector(_)
            | Self::SectorOverflow(_)
            | Self::ShortIdBuffer(_)
            | Self::Disk(_) => Status::IoErr,
        }
    }
}

/// A request that makes sense, though the disk may still refuse it.
#[derive(Debug)]
enum Request<'b, 'm> {
    Read {
        offset: u64,
        data: &'b [VolatileSlice<'m>],
    },
    Write {
        offset: u64,
        data: &'b [VolatileSlice<'m>],
    },
    Flush,
    GetId {
        data: &'b [VolatileSlice<'m>],
    },
}

/// The fields of `struct virtio_blk_req` before its data.
struct Header {
    kind: u32,
    sector: u64,
}

impl Target {
    pub(super) fn new(disk: Arc<dyn Disk>, serial: Option<Serial>, features: u64) -> Self {
        let has_flush = features & FEATURE_FLUSH != 0;
        Self {
            id: serial.map_or([0; 20], Serial::bytes),
            has_flush,
            flush_writes: !has_flush && disk.limits().write_cache,
            disk,
        }
    }

    /// Carries out the request in `buffers` and writes its status.
    pub(super) fn serve(&self, buffers: &mut Buffers<'_>) -> Outcome {
        // Taken away first: nothing below can write to it as data.
        let Some(status) = buffers.split_last_writable() else {
            return Outcome {
                used_len: 0,
                error: Some(RequestError::NoStatusByte),
            };
        };
        let result = self.parse(buffers).and_then(|r| self.execute(&r));
        let (code, written) = match &result {
            Ok(written) => (Status::Ok, *written),
            Err(error) => (error.status(), 0),
        };
        status.copy_from(&[code as u8]);
        // The status counts only where no gap lies before it (virtio 1.3, section 2.7.8.2).
        let is_contiguous = written == len(buffers.writable()) && !buffers.is_unmapped();
        let used_len = written + u64::from(is_contiguous);
        Outcome {
            // A chain has less than 2^32 bytes.
            used_len: u32::try_from(used_len).unwrap_or(0),
            error: result.err(),
        }
    }

    fn parse<'b, 'm>(&self, buffers: &'b mut Buffers<'m>) -> Result<Request<'b, 'm>, RequestError> {
        if buffers.is_unmapped() {
            return Err(RequestError::Unmapped);
        }
        let header = Header::read(buffers)?;
        let (readable, writable) = (buffers.readable(), buffers.writable());
        match header.kind {
            VIRTIO_BLK_T_IN => {
                expect_none(readable)?;
                Ok(Request::Read {
                    offset: header.offset(writable)?,
                    data: writable,
                })
            }
            VIRTIO_BLK_T_OUT => {
                if self.disk.limits().read_only {
                    return Err(RequestError::ReadOnly);
                }
                expect_none(writable)?;
                Ok(Request::Write {
                    offset: header.offset(readable)?,
                    data: readable,
                })
            }
            VIRTIO_BLK_T_FLUSH if self.has_flush => {
                expect_none(readable)?;
                expect_none(writable)?;
                Ok(Request::Flush)
            }
            VIRTIO_BLK_T_GET_ID => {
                expect_none(readable)?;
                match len(writable) {
                    20.. => Ok(Request::GetId { data: writable }),
                    short => Err(RequestError::ShortIdBuffer(short)),
                }
            }
            kind => Err(RequestError::UnknownType(kind)),
        }
    }

    /// Returns how many bytes have been written to the buffers.
    fn execute(&self, request: &Request<'_, '_>) -> Result<u64, RequestError> {
        match *request {
            Request::Read { offset, data } => {
                self.disk.read_at(data, offset)?;
                Ok(len(data))
            }
            Request::Write { offset, data } => {
                self.disk.write_at(data, offset)?;
                // A driver that declined to flush takes completed writes for durable (virtio 1.3,
                // section 5.2.6.2).
                if self.flush_writes {
                    self.disk.flush()?;
                }
                Ok(0)
            }
            Request::Flush => {
                self.disk.flush()?;
                Ok(0)
            }
            Request::GetId { data } => {
                write_front(data, &self.id);
                Ok(self.id.len() as u64)
            }
        }
    }
}

impl Header {
    fn read(buffers: &mut Buffers<'_>) -> Result<Self, RequestError> {
        let mut kind = [0; 4];
        let mut reserved = [0; 4];
        let mut sector = [0; 8];
        buffers
            .read_front(&mut kind)
            .and_then(|()| buffers.read_front(&mut reserved))
            .and_then(|()| buffers.read_front(&mut sector))
            .ok_or(RequestError::ShortHeader)?;
        Ok(Self {
            kind: u32::from_le_bytes(kind),
            sector: u64::from_le_bytes(sector),
        })
    }

    /// Where `data` lies on the disk, in bytes. Whether it lies within is for the disk to say.
    fn offset(&self, data: &[VolatileSlice<'_>]) -> Result<u64, RequestError> {
        let len = len(data);
        if !len.is_multiple_of(SECTOR_SIZE) {
            return Err(RequestError::PartialSector(len));
        }
        self.sector
            .checked_mul(SECTOR_SIZE)
            .ok_or(RequestError::SectorOverflow(self.sector))
    }
}

fn len(slices: &[VolatileSlice<'_>]) -> u64 {
    slices.iter().map(|slice| slice.len() as u64).sum()
}

fn expect_none(slices: &[VolatileSlice<'_>]) -> Result<(), RequestError> {
    if slices.is_empty() {
        Ok(())
    } else {
        Err(RequestError::WrongDirection)
    }
}

/// Writes `bytes` to the start of `slices`, which are at least as long.
fn write_front(slices: &[VolatileSlice<'_>], mut bytes: &[u8]) {
    for slice in slices {
        let (now, later) = bytes.split_at(slice.len().min(bytes.len()));
        slice.copy_from(now);
        bytes = later;
    }
}

#[cfg(test)]
mod tests;
