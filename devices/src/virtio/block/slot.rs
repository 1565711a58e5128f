//! One request of the driver, from its chain to its answer.

use std::time::Instant;

use vm_memory::VolatileSlice;

use super::request::{Operation, RequestError, Rules, Segment, Status, total_len};
use crate::virtio::buffers::Buffers;

/// Requests on their way through the device. They are boxed because they go from list to list, and
/// used again and again so that nothing is allocated while a queue runs.
#[allow(clippy::vec_box, reason = "told above")]
pub(super) type Slots<'m> = Vec<Box<Slot<'m>>>;

/// Requests for adjacent sectors are carried out as one while they have at most so many bytes. More
/// gains nothing, and all of them are answered together.
const MAX_JOINED_BYTES: u64 = 1 << 20;
/// And while they have at most so many buffers, which [`tandem_block`] hands to one system call.
const MAX_JOINED_BUFFERS: usize = 128;

/// A place for one request at a time.
pub(super) struct Slot<'m> {
    /// Where its chain begins.
    pub head: u16,
    pub buffers: Buffers<'m>,
    pub segments: Vec<Segment>,
    /// What it asks for; `None` if it makes no sense.
    pub operation: Option<Operation>,
    /// How it has ended: how many bytes have been written from the start of the writable buffers.
    pub result: Result<u64, RequestError>,
    /// When it was taken from the queue.
    pub taken: Instant,
    /// Requests that continue this one on the disk, and are carried out together with it.
    pub joined: Slots<'m>,
    /// Bytes and buffers of this one and all that have joined it.
    joined_bytes: u64,
    joined_buffers: usize,
}

impl<'m> Slot<'m> {
    pub(super) fn new(now: Instant) -> Self {
        Self {
            head: 0,
            buffers: Buffers::new(),
            segments: Vec::new(),
            operation: None,
            result: Ok(0),
            taken: now,
            joined: Vec::new(),
            joined_bytes: 0,
            joined_buffers: 0,
        }
    }

    /// Takes in the chain that `buffers` have been loaded with.
    pub(super) fn parse(&mut self, head: u16, rules: &Rules, now: Instant) {
        self.head = head;
        self.taken = now;
        let status = self.buffers.split_status();
        let status = status.ok_or(RequestError::NoStatusByte);
        let operation = status.and_then(|()| rules.parse(&mut self.buffers, &mut self.segments));
        (self.operation, self.result) = match operation {
            Ok(operation) => (Some(operation), Ok(0)),
            Err(error) => (None, Err(error)),
        };
        self.joined_bytes = self.bytes();
        self.joined_buffers = self.data().len();
    }

    /// The buffers that the operation transfers to or from.
    pub(super) fn data(&self) -> &[VolatileSlice<'m>] {
        match self.operation {
            Some(Operation::Read { .. } | Operation::GetId) => self.buffers.writable(),
            Some(Operation::Write { .. }) => self.buffers.readable(),
            _ => &[],
        }
    }

    /// Offset and length on the disk of what is read or written.
    fn transfer(&self) -> Option<(u64, u64)> {
        match self.operation {
            Some(Operation::Read { offset, len } | Operation::Write { offset, len }) => {
                Some((offset, len))
            }
            _ => None,
        }
    }

    /// Bytes that are read or written.
    pub(super) fn bytes(&self) -> u64 {
        self.transfer().map_or(0, |(_, len)| len)
    }

    /// Bytes that count against the limit on the rate: zeros, too, as they may have to be written.
    pub(super) fn charged_bytes(&self) -> u64 {
        match self.operation {
            Some(Operation::WriteZeroes) => self.segments.iter().map(|segment| segment.len).sum(),
            _ => self.bytes(),
        }
    }

    /// Has `next` carried out in one with this request, if it continues it; else returns it.
    pub(super) fn join(&mut self, next: Box<Slot<'m>>) -> Option<Box<Slot<'m>>> {
        let bytes = self.joined_bytes.saturating_add(next.joined_bytes);
        let buffers = self.joined_buffers + next.joined_buffers;
        let same_kind = matches!(
            (self.operation, next.operation),
            (Some(Operation::Read { .. }), Some(Operation::Read { .. }))
                | (Some(Operation::Write { .. }), Some(Operation::Write { .. }))
        );
        let end = self
            .transfer()
            .and_then(|(offset, _)| offset.checked_add(self.joined_bytes));
        let continues = same_kind && end == next.transfer().map(|(offset, _)| offset);
        if !continues || bytes > MAX_JOINED_BYTES || buffers > MAX_JOINED_BUFFERS {
            return Some(next);
        }
        self.joined_bytes = bytes;
        self.joined_buffers = buffers;
        self.joined.push(next);
        None
    }

    /// Writes the status. Returns how many bytes have been written from the start of the writable
    /// buffers on: what the driver is told.
    pub(super) fn answer(&mut self) -> u32 {
        let (code, written) = match &self.result {
            Ok(written) => (Status::Ok, *written),
            Err(error) => (error.status(), 0),
        };
        if !self.buffers.write_status(code as u8) {
            return 0;
        }
        // The status counts only where no gap lies before it (virtio 1.3, section 2.7.8.2).
        let is_contiguous =
            written == total_len(self.buffers.writable()) && !self.buffers.is_unmapped();
        // A chain has less than 2^32 bytes.
        u32::try_from(written + u64::from(is_contiguous)).unwrap_or(0)
    }
}
