//! A split virtqueue in use, with the checks that `virtio_queue` leaves to devices.

use std::sync::atomic::{Ordering, fence};

use virtio_bindings::bindings::virtio_ring::VRING_AVAIL_F_NO_INTERRUPT;
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, VolatileMemory};

use super::buffers::Buffers;
use super::chain::Chain;
use super::regions::Regions;
use crate::GuestMemory;

/// Where the index is in the available ring, where its entries begin, and how long one is (virtio
/// 1.3, section 2.7.6).
const AVAIL_INDEX: u64 = 2;
const AVAIL_HEADER_SIZE: u64 = 4;
const AVAIL_ENTRY_SIZE: u64 = 2;
/// Where the index is in the used ring, where its entries begin, and how long one is (section
/// 2.7.8).
const USED_INDEX: u64 = 2;
const USED_HEADER_SIZE: u64 = 4;
const USED_ENTRY_SIZE: u64 = 8;

/// How a driver has broken a queue. There is no way on but a reset of the device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(super) enum RingError {
    #[error("a ring does not lie in guest memory")]
    Unmapped,
    #[error("the available index is further ahead than the queue is long")]
    AvailIndex,
    #[error("the available ring names descriptor {0}, which does not exist")]
    HeadIndex(u16),
    #[error("the available ring names descriptor {0}, whose chain has not been answered")]
    HeadInUse(u16),
    #[error(
        "a descriptor chain leads out of its table, loops, is longer than 2^32 bytes, \
         or has a bad indirect table"
    )]
    BrokenChain,
    #[error(
        "a descriptor chain has more than {} descriptors",
        super::buffers::MAX_DESCRIPTORS
    )]
    TooManyDescriptors,
    #[error("a descriptor chain has a readable buffer after a writable one")]
    ReadableAfterWritable,
}

/// A queue that a device serves. One thread owns it.
pub(super) struct ActiveQueue<'m> {
    regions: Regions<'m>,
    queue: Queue,
    /// The available index that has been seen last: what lies before it can be taken.
    seen: u16,
    /// Which heads have been taken and not completed: a driver may not offer them again meanwhile.
    taken: Vec<bool>,
    /// The used index that the driver has been shown.
    published: u16,
    /// The used index at the last decision about an interrupt.
    signalled: u16,
}

impl<'m> ActiveQueue<'m> {
    /// `queue` is ready and lies in `mem`.
    pub(super) fn new(mem: &'m GuestMemory, queue: Queue) -> Self {
        Self {
            regions: Regions::new(mem),
            seen: queue.next_avail(),
            taken: vec![false; queue.size().into()],
            published: queue.next_used(),
            signalled: queue.next_used(),
            queue,
        }
    }

    /// The queue, to be served later from where this one has come to.
    pub(super) fn into_inner(self) -> Queue {
        self.queue
    }

    /// Looks how many chains the driver has made available that have not been taken.
    pub(super) fn available(&mut self) -> Result<u16, RingError> {
        let seen = self.load_avail(AVAIL_INDEX, Ordering::Acquire)?;
        let count = seen.wrapping_sub(self.queue.next_avail());
        if count > self.queue.size() {
            return Err(RingError::AvailIndex);
        }
        self.seen = seen;
        Ok(count)
    }

    /// Takes the next of the chains that were [`available`](Self::available), loads its buffers, and
    /// returns the index to [`complete`](Self::complete) it with. `None` if there is none.
    pub(super) fn take(&mut self, buffers: &mut Buffers<'m>) -> Result<Option<u16>, RingError> {
        let next = self.queue.next_avail();
        if next == self.seen {
            return Ok(None);
        }
        let (size, table) = (self.queue.size(), self.queue.desc_table());
        let offset = AVAIL_HEADER_SIZE + AVAIL_ENTRY_SIZE * u64::from(next % size);
        let head = self.load_avail(offset, Ordering::Relaxed)?;
        self.queue.set_next_avail(next.wrapping_add(1));
        match self.taken.get_mut(usize::from(head)) {
            None => return Err(RingError::HeadIndex(head)),
            Some(true) => return Err(RingError::HeadInUse(head)),
            Some(taken) => *taken = true,
        }
        let chain = Chain::new(&self.regions, table, size, head);
        buffers.load(&self.regions, chain)?;
        Ok(Some(head))
    }

    /// Puts the chain that began at `head`, with `written` bytes written into its buffers, into the
    /// used ring. The driver sees it after the next [`publish`](Self::publish).
    pub(super) fn complete(&mut self, head: u16, written: u32) -> Result<(), RingError> {
        // Chains that have been taken are at most as many as the ring has entries, so none is
        // overwritten that the driver has not been shown.
        let next = self.queue.next_used();
        let index = u64::from(next % self.queue.size());
        let addr = self.used_ring(USED_HEADER_SIZE + index * USED_ENTRY_SIZE)?;
        let entry = (u64::from(head) | u64::from(written) << 32).to_le();
        match self.regions.within_one(addr.0, size_of_val(&entry)) {
            Some(slice) => slice.get_ref(0).map(|place| place.store(entry)).ok(),
            None => self.regions.all().write_obj(entry, addr).ok(),
        }
        .ok_or(RingError::Unmapped)?;
        self.queue.set_next_used(next.wrapping_add(1));
        if let Some(taken) = self.taken.get_mut(usize::from(head)) {
            *taken = false;
        }
        Ok(())
    }

    /// Shows the driver what has been completed. Returns whether that is anything new.
    pub(super) fn publish(&mut self) -> Result<bool, RingError> {
        let next = self.queue.next_used();
        if next == self.published {
            return Ok(false);
        }
        let addr = self.used_ring(USED_INDEX)?;
        let mem = self.regions.all();
        mem.store(next.to_le(), addr, Ordering::Release)
            .map_err(|_| RingError::Unmapped)?;
        self.published = next;
        Ok(true)
    }

    /// Asks the driver not to ring the doorbell.
    pub(super) fn disable_doorbell(&mut self) -> Result<(), RingError> {
        self.queue
            .disable_notification(self.regions.all())
            .map_err(|_| RingError::Unmapped)
    }

    /// Asks the driver to ring the doorbell for the next chain. Returns whether chains have become
    /// available already, for which it may not ring.
    pub(super) fn enable_doorbell(&mut self) -> Result<bool, RingError> {
        self.queue
            .enable_notification(self.regions.all())
            .map_err(|_| RingError::Unmapped)
    }

    /// Whether the driver wants an interrupt for what has been published since the last call
    /// (virtio 1.3, section 2.7.7.2).
    pub(super) fn wants_interrupt(&mut self) -> Result<bool, RingError> {
        let new = self.published;
        let old = std::mem::replace(&mut self.signalled, new);
        // The driver writes its wish, then looks at the used index; we do the reverse.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            let flags = self.load_avail(0, Ordering::Relaxed)?;
            return Ok(flags & VRING_AVAIL_F_NO_INTERRUPT as u16 == 0);
        }
        let end = AVAIL_HEADER_SIZE + AVAIL_ENTRY_SIZE * u64::from(self.queue.size());
        let event = self.load_avail(end, Ordering::Relaxed)?;
        Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
    }

    fn load_avail(&self, offset: u64, order: Ordering) -> Result<u16, RingError> {
        let addr = self.queue.avail_ring().checked_add(offset);
        let value = addr.and_then(|addr| self.regions.load_u16(addr, order));
        value.ok_or(RingError::Unmapped)
    }

    fn used_ring(&self, offset: u64) -> Result<GuestAddress, RingError> {
        let addr = self.queue.used_ring().checked_add(offset);
        addr.map(GuestAddress).ok_or(RingError::Unmapped)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_common::ring::{
        Desc, INDIRECT, NEXT, Ring, chain, indirect, readable, writable, write_table,
    };
    use crate::test_common::{REGION, guest_memory};

    const DATA: u64 = 0x2_0000;
    const TABLE: u64 = 0x3_0000;
    const SIZE: u16 = 16;

    /// What the device makes of a ring that `driver` has filled.
    fn take(driver: impl FnOnce(&GuestMemory, &mut Ring)) -> Result<Option<u16>, RingError> {
        let mem = guest_memory();
        let mut ring = Ring::new(&mem, 0, SIZE);
        driver(&mem, &mut ring);
        next(
            &mut ActiveQueue::new(&mem, ring.queue(false)),
            &mut Buffers::new(),
        )
    }

    /// What the device makes of what has become available.
    fn next<'m>(
        queue: &mut ActiveQueue<'m>,
        buffers: &mut Buffers<'m>,
    ) -> Result<Option<u16>, RingError> {
        queue.available()?;
        queue.take(buffers)
    }

    fn take_chain(descs: &[Desc]) -> Result<Option<u16>, RingError> {
        take(|_, ring| ring.offer_chain(descs))
    }

    /// As [`take_chain`], by way of an indirect table.
    fn take_indirect(descs: &[Desc]) -> Result<Option<u16>, RingError> {
        take(|mem, ring| {
            write_table(mem, TABLE, 0, descs);
            ring.offer_chain(&[indirect(TABLE, 16 * descs.len() as u32)]);
        })
    }

    fn many(count: usize) -> Vec<Desc> {
        chain(0, &vec![readable(DATA, 1); count])
    }

    #[test]
    fn good_chains() {
        assert_eq!(take(|_, _| {}), Ok(None));
        assert_eq!(
            take_chain(&[readable(DATA, 1), writable(DATA, 1)]),
            Ok(Some(0))
        );
        assert_eq!(take_chain(&many(SIZE.into())), Ok(Some(0)));
        assert_eq!(take_indirect(&many(256)), Ok(Some(0)));
    }

    #[test]
    fn direct_descriptors_before_an_indirect_table() {
        let mem = guest_memory();
        let mut ring = Ring::new(&mem, 0, SIZE);
        let table = chain(0, &[readable(DATA, 2), writable(DATA, 3)]);
        write_table(&mem, TABLE, 0, &table);
        ring.offer_chain(&[readable(DATA, 1), indirect(TABLE, 32)]);
        let mut buffers = Buffers::new();
        let mut queue = ActiveQueue::new(&mem, ring.queue(false));
        assert_eq!(next(&mut queue, &mut buffers), Ok(Some(0)));
        let lens = |slices: &[vm_memory::VolatileSlice<'_>]| -> Vec<_> {
            slices.iter().map(|slice| slice.len()).collect()
        };
        assert_eq!(lens(buffers.readable()), [1, 2]);
        assert_eq!(lens(buffers.writable()), [3]);
    }

    #[test]
    fn rings_across_two_regions() {
        let places: [fn(&mut Ring); 3] = [
            |ring| ring.table = REGION - 16,
            |ring| ring.avail = REGION - 4,
            |ring| ring.used = REGION - 8,
        ];
        for place in places {
            let mem = guest_memory();
            let mut ring = Ring::new(&mem, 0, SIZE);
            place(&mut ring);
            ring.offer_chain(&[readable(DATA, 1), writable(DATA, 1)]);
            let mut queue = ActiveQueue::new(&mem, ring.queue(false));
            assert_eq!(next(&mut queue, &mut Buffers::new()), Ok(Some(0)));
            queue.complete(0, 7).unwrap();
            assert_eq!(queue.publish(), Ok(true));
            assert_eq!((ring.used_idx(), ring.used(0)), (1, (0, 7)));
        }
    }

    #[test]
    fn indirect_table_across_two_regions() {
        // Its second descriptor lies in both.
        let table = REGION - 24;
        let result = take(|mem, ring| {
            write_table(mem, table, 0, &many(3));
            ring.offer_chain(&[indirect(table, 48)]);
        });
        assert_eq!(result, Ok(Some(0)));
    }

    #[test]
    fn head_index_beyond_the_table() {
        for head in [SIZE, u16::MAX] {
            assert_eq!(
                take(|_, ring| ring.offer(head)),
                Err(RingError::HeadIndex(head))
            );
        }
    }

    #[test]
    fn head_that_has_not_been_answered() {
        let mem = guest_memory();
        let mut ring = Ring::new(&mem, 0, SIZE);
        let mut queue = ActiveQueue::new(&mem, ring.queue(false));
        let mut buffers = Buffers::new();
        ring.offer_chain(&[readable(DATA, 1)]);
        assert_eq!(next(&mut queue, &mut buffers), Ok(Some(0)));
        queue.complete(0, 0).unwrap();
        ring.offer(0);
        assert_eq!(next(&mut queue, &mut buffers), Ok(Some(0)), "once more");
        ring.offer(0);
        assert_eq!(next(&mut queue, &mut buffers), Err(RingError::HeadInUse(0)));
    }

    #[test]
    fn available_index_too_far_ahead() {
        for index in [SIZE + 1, u16::MAX] {
            let result = take(|_, ring| ring.set_avail_idx(index));
            assert_eq!(result, Err(RingError::AvailIndex));
        }
    }

    #[test]
    fn next_index_beyond_the_table() {
        let mut descs = chain(0, &[readable(DATA, 1), writable(DATA, 1)]);
        descs[0].next = SIZE;
        let result = take(|mem, ring| {
            write_table(mem, ring.table, 0, &descs);
            ring.offer(0);
        });
        assert_eq!(result, Err(RingError::BrokenChain));
        descs[0].next = 2;
        assert_eq!(take_indirect(&descs), Err(RingError::BrokenChain));
    }

    #[test]
    fn loop_in_a_chain() {
        let mut descs = many(SIZE.into());
        descs[SIZE as usize - 1].flags |= NEXT;
        let result = take(|mem, ring| {
            write_table(mem, ring.table, 0, &descs);
            ring.offer(3);
        });
        assert_eq!(result, Err(RingError::BrokenChain));
        assert_eq!(take_indirect(&descs), Err(RingError::BrokenChain));
    }

    #[test]
    fn loop_in_a_long_indirect_table() {
        let mut descs = many(4096);
        descs[1].next = 0;
        assert_eq!(take_indirect(&descs), Err(RingError::TooManyDescriptors));
    }

    #[test]
    fn more_descriptors_than_any_queue_has() {
        assert_eq!(
            take_indirect(&many(257)),
            Err(RingError::TooManyDescriptors)
        );
    }

    #[test]
    fn readable_after_writable() {
        let descs = [readable(DATA, 16), writable(DATA, 512), readable(DATA, 1)];
        assert_eq!(take_chain(&descs), Err(RingError::ReadableAfterWritable));
        // Even where the writable one is empty.
        let descs = [writable(DATA, 0), readable(DATA, 1)];
        assert_eq!(take_chain(&descs), Err(RingError::ReadableAfterWritable));
    }

    #[test]
    fn indirect_table_outside_guest_memory() {
        for addr in [2 * REGION, 2 * REGION - 16, u64::MAX - 15] {
            let result = take(|mem, ring| {
                let first = chain(0, &[readable(DATA, 1), readable(DATA, 1)]);
                if addr < 2 * REGION {
                    write_table(mem, addr, 0, &first[..1]);
                }
                ring.offer_chain(&[indirect(addr, 32)]);
            });
            assert_eq!(result, Err(RingError::BrokenChain), "{addr:#x}");
        }
    }

    #[test]
    fn indirect_table_of_no_or_broken_length() {
        for len in [0, 15, 17, u32::MAX, 16 * 65536] {
            let result = take_chain(&[indirect(TABLE, len)]);
            assert_eq!(result, Err(RingError::BrokenChain), "{len}");
            let result = take_chain(&[readable(DATA, 1), indirect(TABLE, len)]);
            assert_eq!(result, Err(RingError::BrokenChain), "{len}");
        }
    }

    #[test]
    fn indirect_table_in_an_indirect_table() {
        for descs in [
            vec![indirect(TABLE, 16)],
            chain(0, &[readable(DATA, 1), indirect(TABLE + 0x1000, 16)]),
        ] {
            assert_eq!(take_indirect(&descs), Err(RingError::BrokenChain));
        }
    }

    #[test]
    fn more_than_4_gib_in_a_chain() {
        let descs = [readable(DATA, 1), readable(0, u32::MAX), writable(DATA, 1)];
        assert_eq!(take_chain(&descs), Err(RingError::BrokenChain));
    }

    #[test]
    fn indirect_flag_ignores_the_write_flag() {
        let mut table = indirect(TABLE, 16);
        table.flags = INDIRECT | 2;
        let result = take(|mem, ring| {
            write_table(mem, TABLE, 0, &[readable(DATA, 1)]);
            ring.offer_chain(&[table]);
        });
        assert_eq!(result, Ok(Some(0)));
    }

    /// Completes one chain and asks whether an interrupt is due.
    fn interrupt_wanted(event_idx: bool, driver: impl FnOnce(&Ring)) -> bool {
        let mem = guest_memory();
        let mut ring = Ring::new(&mem, 0, SIZE);
        ring.offer_chain(&[writable(DATA, 1)]);
        driver(&ring);
        let mut queue = ActiveQueue::new(&mem, ring.queue(event_idx));
        assert_eq!(queue.available(), Ok(1));
        assert_eq!(queue.take(&mut Buffers::new()), Ok(Some(0)));
        queue.complete(0, 7).unwrap();
        assert_eq!(ring.used_idx(), 0, "not shown yet");
        assert_eq!(queue.publish(), Ok(true));
        assert_eq!(queue.publish(), Ok(false));
        assert_eq!((ring.used_idx(), ring.used(0)), (1, (0, 7)));
        queue.wants_interrupt().unwrap()
    }

    #[test]
    fn interrupt_suppression_by_flag() {
        assert!(interrupt_wanted(false, |_| {}));
        assert!(!interrupt_wanted(false, |ring| ring.set_avail_flags(1)));
        // With the event index the flag has no meaning.
        assert!(interrupt_wanted(true, |ring| ring.set_avail_flags(1)));
    }

    #[test]
    fn interrupt_suppression_by_event_index() {
        assert!(interrupt_wanted(true, |ring| ring.set_used_event(0)));
        assert!(!interrupt_wanted(true, |ring| ring.set_used_event(1)));
        assert!(!interrupt_wanted(true, |ring| ring.set_used_event(u16::MAX)));
    }
}
