//! Carrying out requests on the disk.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tandem_block::{Disk, Error};
use vm_memory::VolatileSlice;

use super::request::{ID_LEN, Operation, RequestError, Rules, Segment};
use super::slot::Slot;
use super::{Serial, features};

/// What requests act on.
pub(super) struct Target {
    pub rules: Rules,
    disk: Arc<dyn Disk>,
    id: [u8; ID_LEN as usize],
    has_write_cache: bool,
    /// The driver's choice between write-back and write-through.
    writeback: Arc<AtomicBool>,
}

/// A list of buffers that is filled anew for each call.
pub(super) type Gather<'m> = Vec<VolatileSlice<'m>>;

impl Target {
    /// For a driver that has accepted `features`.
    pub(super) fn new(
        disk: Arc<dyn Disk>,
        serial: Option<Serial>,
        writeback: Arc<AtomicBool>,
        features: u64,
    ) -> Self {
        let limits = disk.limits();
        Self {
            rules: Rules {
                features,
                read_only: limits.read_only,
            },
            id: serial.map_or([0; ID_LEN as usize], Serial::bytes),
            has_write_cache: limits.write_cache,
            writeback,
            disk,
        }
    }

    /// Carries out the request, and those that have joined it, if that does not have to wait for a
    /// device. Returns whether it has; the result may be an error.
    pub(super) fn try_now<'m>(&self, slot: &mut Slot<'m>, gather: &mut Gather<'m>) -> bool {
        let done = match slot.operation {
            None => return true,
            Some(Operation::GetId) => {
                write_front(slot.data(), &self.id);
                slot.result = Ok(ID_LEN);
                return true;
            }
            Some(Operation::Read { offset, .. }) => {
                self.disk.try_read_at(all_data(slot, gather), offset)
            }
            Some(Operation::Write { offset, .. }) if !self.is_write_through() => {
                let done = self.disk.try_write_at(all_data(slot, gather), offset);
                // Where the driver has switched meanwhile, the flush of the switch may have come
                // before the write.
                done.map(|done| done && !self.is_write_through())
            }
            Some(_) => return false,
        };
        match done {
            Ok(true) => succeed(slot),
            Ok(false) => return false,
            // Which of them has failed remains to be seen.
            Err(_) if !slot.joined.is_empty() => return false,
            Err(error) => slot.result = Err(error.into()),
        }
        true
    }

    /// Carries out the request, and those that have joined it, however long that takes.
    pub(super) fn carry_out<'m>(&self, slot: &mut Slot<'m>, gather: &mut Gather<'m>) {
        match self.perform(slot, gather) {
            Ok(()) => succeed(slot),
            Err(error) if slot.joined.is_empty() => slot.result = Err(error),
            Err(_) => {
                // Each has a result of its own.
                let mut joined = std::mem::take(&mut slot.joined);
                self.carry_out(slot, gather);
                for slot in &mut joined {
                    self.carry_out(slot, gather);
                }
                slot.joined = joined;
            }
        }
    }

    fn perform<'m>(&self, slot: &Slot<'m>, gather: &mut Gather<'m>) -> Result<(), RequestError> {
        match slot.operation {
            None | Some(Operation::GetId) => {}
            Some(Operation::Read { offset, .. }) => {
                self.disk.read_at(all_data(slot, gather), offset)?;
            }
            Some(Operation::Write { offset, .. }) => {
                self.disk.write_at(all_data(slot, gather), offset)?;
                self.settle()?;
            }
            Some(Operation::Flush) => self.disk.flush()?,
            Some(Operation::Discard) => {
                self.check_segments(slot)?;
                for segment in &slot.segments {
                    self.disk.discard(segment.offset, segment.len)?;
                }
            }
            Some(Operation::WriteZeroes) => {
                self.check_segments(slot)?;
                for segment in &slot.segments {
                    let (offset, len) = (segment.offset, segment.len);
                    self.disk.write_zeroes(offset, len, segment.unmap)?;
                }
                self.settle()?;
            }
        }
        Ok(())
    }

    /// A request for segments of which one does not lie within the disk has no effect at all.
    fn check_segments(&self, slot: &Slot<'_>) -> Result<(), RequestError> {
        let size = self.disk.size();
        for &Segment { offset, len, .. } in &slot.segments {
            if offset.checked_add(len).is_none_or(|end| end > size) {
                return Err(Error::OutOfRange { offset, len, size }.into());
            }
        }
        Ok(())
    }

    /// Makes what has been written durable, if the driver takes it for that (virtio 1.3, section
    /// 5.2.6.2).
    fn settle(&self) -> Result<(), RequestError> {
        if self.is_write_through() {
            self.disk.flush()?;
        }
        Ok(())
    }

    /// Whether completed writes must be durable, and the disk does not make them so by itself: the
    /// driver cannot flush, or has chosen this.
    fn is_write_through(&self) -> bool {
        let can_flush = self.rules.has(features::FLUSH);
        let can_choose = self.rules.has(features::CONFIG_WCE);
        let has_chosen = can_choose && !self.writeback.load(Ordering::SeqCst);
        self.has_write_cache && (!can_flush || has_chosen)
    }
}

/// The buffers of the request and of those that have joined it.
fn all_data<'a, 'm>(slot: &'a Slot<'m>, gather: &'a mut Gather<'m>) -> &'a [VolatileSlice<'m>] {
    if slot.joined.is_empty() {
        return slot.data();
    }
    gather.clear();
    gather.extend_from_slice(slot.data());
    for slot in &slot.joined {
        gather.extend_from_slice(slot.data());
    }
    gather
}

fn succeed(slot: &mut Slot<'_>) {
    slot.result = Ok(match slot.operation {
        Some(Operation::Read { len, .. }) => len,
        _ => 0,
    });
    slot.joined.iter_mut().for_each(|slot| succeed(slot));
}

/// Writes `bytes` to the start of `slices`, which are at least as long.
fn write_front(slices: &[VolatileSlice<'_>], mut bytes: &[u8]) {
    for slice in slices {
        let (now, later) = bytes.split_at(slice.len().min(bytes.len()));
        slice.copy_from(now);
        bytes = later;
    }
}
