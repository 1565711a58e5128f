//! What a driver has written about a queue, before the device uses it.

use virtio_queue::{Error as QueueError, Queue, QueueT};
use vm_memory::{GuestAddress, GuestMemory as _, Permissions};

use crate::GuestMemory;

/// Why a queue cannot be used as the driver has set it up.
#[derive(Debug, thiserror::Error)]
pub(super) enum SetupError {
    #[error("queue size or alignment: {0}")]
    Layout(#[from] QueueError),
    #[error("{part} of {len} bytes at {addr:#x} does not lie in guest memory")]
    Unmapped {
        part: &'static str,
        addr: u64,
        len: u64,
    },
}

/// Registers of one queue. Values are kept as written; [`build`](Self::build) judges them.
#[derive(Debug)]
pub(super) struct QueueSetup {
    pub max_size: u16,
    pub size: u32,
    pub desc_table: u64,
    pub avail_ring: u64,
    pub used_ring: u64,
    /// The driver has finished and the values have been found good.
    pub ready: bool,
    /// The driver has reset the queue while it was using the device, and may set it up anew.
    pub is_reset: bool,
}

impl QueueSetup {
    pub(super) fn new(max_size: u16) -> Self {
        Self {
            max_size,
            size: max_size.into(),
            desc_table: 0,
            avail_ring: 0,
            used_ring: 0,
            ready: false,
            is_reset: false,
        }
    }

    /// The queue as devices use it: not ready, or ready and wholly within `mem`.
    ///
    /// `virtio_queue` has setters and a check of its own, but they write every error of the guest
    /// to the log.
    pub(super) fn build(&self, mem: &GuestMemory, event_idx: bool) -> Result<Queue, SetupError> {
        let mut queue = Queue::new(self.max_size)?;
        if !self.ready {
            return Ok(queue);
        }
        queue.try_set_size(u16::try_from(self.size).map_err(|_| QueueError::InvalidSize)?)?;
        queue.try_set_desc_table_address(GuestAddress(self.desc_table))?;
        queue.try_set_avail_ring_address(GuestAddress(self.avail_ring))?;
        queue.try_set_used_ring_address(GuestAddress(self.used_ring))?;
        let size = u64::from(self.size);
        check(mem, "descriptor table", self.desc_table, 16 * size)?;
        check(mem, "available ring", self.avail_ring, 6 + 2 * size)?;
        check(mem, "used ring", self.used_ring, 6 + 8 * size)?;
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        Ok(queue)
    }
}

fn check(mem: &GuestMemory, part: &'static str, addr: u64, len: u64) -> Result<(), SetupError> {
    // At most 2^20 bytes: fits `usize`.
    if mem.check_range(GuestAddress(addr), len as usize, Permissions::ReadWrite) {
        Ok(())
    } else {
        Err(SetupError::Unmapped { part, addr, len })
    }
}
