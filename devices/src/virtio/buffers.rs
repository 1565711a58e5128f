//! The buffers of one descriptor chain, as two streams of bytes.

use vm_memory::{ByteValued, Bytes, GuestAddress, VolatileMemory, VolatileSlice};

use super::chain::Chain;
use super::queue::RingError;
use super::regions::Regions;

/// Descriptors that a chain may have, wherever its table lies. More than any honest driver needs
/// (the largest queue has 256 entries), and a bound on what one request can make us hold.
pub(super) const MAX_DESCRIPTORS: usize = 256;

/// What a driver passed with one descriptor chain: bytes that the device may read, then bytes that
/// it may write. How the driver cut them into descriptors means nothing (virtio 1.3, section
/// 2.7.4.1).
///
/// One value serves all requests of a queue, so that its lists are allocated once.
pub(super) struct Buffers<'m> {
    readable: Stream<'m>,
    writable: Stream<'m>,
    /// Where the answer goes. Kept apart so that nothing can write to it as data.
    status: Option<VolatileSlice<'m>>,
    is_unmapped: bool,
    is_end_unmapped: bool,
}

// SAFETY: what is not `Send` in here are pointers into guest memory, which stays mapped for `'m`
// wherever they go. That memory belongs to no thread: `GuestMemory` itself, of which any thread can
// get the same slices, is `Send` and `Sync`. It is only accessed as volatile memory that the guest
// changes at any time anyway, so another thread that does so too makes no difference.
unsafe impl Send for Buffers<'_> {}

/// A list of slices without empty ones, consumed from the front.
struct Stream<'m> {
    slices: Vec<VolatileSlice<'m>>,
    start: usize,
}

impl<'m> Buffers<'m> {
    pub(super) fn new() -> Self {
        Self {
            readable: Stream::new(),
            writable: Stream::new(),
            status: None,
            is_unmapped: false,
            is_end_unmapped: false,
        }
    }

    /// Takes in the descriptors of `chain`.
    ///
    /// # Errors
    /// The chain is broken in a way that leaves it unclear which buffers the driver meant.
    pub(super) fn load(
        &mut self,
        regions: &Regions<'m>,
        chain: Chain<'_, 'm>,
    ) -> Result<(), RingError> {
        self.clear();
        let mut count = 0;
        let mut seen_writable = false;
        for desc in chain {
            let desc = desc?;
            count += 1;
            if count > MAX_DESCRIPTORS {
                return Err(RingError::TooManyDescriptors);
            }
            if desc.is_write_only() {
                seen_writable = true;
            } else if seen_writable {
                return Err(RingError::ReadableAfterWritable);
            }
            self.push(regions, desc.addr(), desc.len(), desc.is_write_only());
        }
        Ok(())
    }

    /// Whether a buffer lies outside guest memory; it is then in neither stream.
    pub(super) fn is_unmapped(&self) -> bool {
        self.is_unmapped
    }

    /// Cuts off the last byte that the device may write, for [`write_status`](Self::write_status).
    /// `None` if there is none, or if it lies outside guest memory.
    pub(super) fn split_status(&mut self) -> Option<()> {
        if self.is_end_unmapped {
            return None;
        }
        let last = self.writable.slices.pop()?;
        let (rest, byte) = last.split_at(last.len().checked_sub(1)?).ok()?;
        if !rest.is_empty() {
            self.writable.slices.push(rest);
        }
        self.status = Some(byte);
        Some(())
    }

    /// Writes the byte that has been split off. Returns whether there is one.
    pub(super) fn write_status(&self, status: u8) -> bool {
        if let Some(byte) = &self.status {
            byte.copy_from(&[status]);
        }
        self.status.is_some()
    }

    /// Reads and consumes a value. `None` if there are not as many bytes.
    pub(super) fn read_front<T: ByteValued>(&mut self) -> Option<T> {
        self.readable.take_front()
    }

    /// What remains to be read.
    pub(super) fn readable(&self) -> &[VolatileSlice<'m>] {
        self.readable.rest()
    }

    /// What may be written.
    pub(super) fn writable(&self) -> &[VolatileSlice<'m>] {
        self.writable.rest()
    }

    fn clear(&mut self) {
        self.readable.clear();
        self.writable.clear();
        self.status = None;
        self.is_unmapped = false;
        self.is_end_unmapped = false;
    }

    fn push(&mut self, regions: &Regions<'m>, addr: GuestAddress, len: u32, is_writable: bool) {
        if len == 0 {
            return;
        }
        let stream = if is_writable {
            &mut self.writable
        } else {
            &mut self.readable
        };
        let is_mapped = regions.push(addr, len, &mut stream.slices);
        self.is_unmapped |= !is_mapped;
        self.is_end_unmapped = is_writable && !is_mapped;
    }
}

impl<'m> Stream<'m> {
    fn new() -> Self {
        Self {
            slices: Vec::new(),
            start: 0,
        }
    }

    fn clear(&mut self) {
        self.slices.clear();
        self.start = 0;
    }

    fn rest(&self) -> &[VolatileSlice<'m>] {
        &self.slices[self.start..]
    }

    fn take_front<T: ByteValued>(&mut self) -> Option<T> {
        // Nearly always it is a buffer of its own.
        if let Some(first) = self.slices.get(self.start)
            && first.len() == size_of::<T>()
        {
            self.start += 1;
            return Some(first.get_ref(0).ok()?.load());
        }
        let mut value = T::zeroed();
        let mut bytes = value.as_mut_slice();
        while !bytes.is_empty() {
            let first = self.slices.get_mut(self.start)?;
            let n = first.len().min(bytes.len());
            let (now, later) = bytes.split_at_mut(n);
            first.read_slice(now, 0).ok()?;
            *first = first.offset(n).ok()?;
            if first.is_empty() {
                self.start += 1;
            }
            bytes = later;
        }
        Some(value)
    }
}
