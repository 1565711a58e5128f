//! A virtqueue seen from a driver that may break any rule.

use std::sync::atomic::Ordering;

use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};

pub const NEXT: u16 = 1;
pub const WRITE: u16 = 2;
pub const INDIRECT: u16 = 4;

/// `struct virtq_desc`.
#[derive(Clone, Copy, Debug)]
pub struct Desc {
    pub addr: u64,
    pub len: u32,
    pub flags: u16,
    pub next: u16,
}

/// A buffer that the device reads.
pub fn readable(addr: u64, len: u32) -> Desc {
    let (flags, next) = (0, 0);
    Desc {
        addr,
        len,
        flags,
        next,
    }
}

/// A buffer that the device writes.
pub fn writable(addr: u64, len: u32) -> Desc {
    Desc {
        flags: WRITE,
        ..readable(addr, len)
    }
}

/// A table of descriptors elsewhere.
pub fn indirect(addr: u64, len: u32) -> Desc {
    Desc {
        flags: INDIRECT,
        ..readable(addr, len)
    }
}

/// Links `descs` into a chain that lies at index `first` of its table.
pub fn chain(first: u16, descs: &[Desc]) -> Vec<Desc> {
    let mut chain = descs.to_vec();
    let last = chain.len() - 1;
    for (i, desc) in chain[..last].iter_mut().enumerate() {
        desc.flags |= NEXT;
        desc.next = first + i as u16 + 1;
    }
    chain
}

/// Writes `descs` into the table at `table`, from index `first` on.
pub fn write_table(mem: &GuestMemoryMmap<()>, table: u64, first: u16, descs: &[Desc]) {
    for (i, desc) in descs.iter().enumerate() {
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&desc.addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&desc.len.to_le_bytes());
        bytes[12..14].copy_from_slice(&desc.flags.to_le_bytes());
        bytes[14..].copy_from_slice(&desc.next.to_le_bytes());
        let addr = table + 16 * (u64::from(first) + i as u64);
        mem.write_slice(&bytes, GuestAddress(addr)).unwrap();
    }
}

pub struct Ring {
    mem: GuestMemoryMmap<()>,
    pub size: u16,
    pub table: u64,
    pub avail: u64,
    pub used: u64,
    next_avail: u16,
}

impl Ring {
    /// A queue of up to 256 entries in three pages at `base`, which are zero.
    pub fn new(mem: &GuestMemoryMmap<()>, base: u64, size: u16) -> Self {
        Self {
            mem: mem.clone(),
            size,
            table: base,
            avail: base + 0x1000,
            used: base + 0x2000,
            next_avail: 0,
        }
    }

    /// The queue as the transport hands it to a device.
    pub fn queue(&self, event_idx: bool) -> Queue {
        let mut queue = Queue::new(self.size).unwrap();
        let address = |a| GuestAddress(a);
        queue
            .try_set_desc_table_address(address(self.table))
            .unwrap();
        queue
            .try_set_avail_ring_address(address(self.avail))
            .unwrap();
        queue.try_set_used_ring_address(address(self.used)).unwrap();
        queue.set_event_idx(event_idx);
        queue.set_ready(true);
        queue
    }

    /// Puts `descs`, linked, at the start of the table and makes them available.
    pub fn offer_chain(&mut self, descs: &[Desc]) {
        write_table(&self.mem, self.table, 0, &chain(0, descs));
        self.offer(0);
    }

    /// Makes the chain that begins at `head` available.
    pub fn offer(&mut self, head: u16) {
        self.offer_all(&[head]);
    }

    /// Makes the chains that begin at `heads` available, all at once.
    pub fn offer_all(&mut self, heads: &[u16]) {
        self.offer_beyond(heads, 0);
    }

    /// As [`offer_all`](Self::offer_all), with an available index that is too far ahead by `excess`.
    pub fn offer_beyond(&mut self, heads: &[u16], excess: u16) {
        for (n, &head) in (0..).zip(heads) {
            let slot = u64::from(self.next_avail.wrapping_add(n) % self.size);
            self.store(self.avail + 4 + 2 * slot, head);
        }
        let offered = (heads.len() as u16).wrapping_add(excess);
        self.set_avail_idx(self.next_avail.wrapping_add(offered));
    }

    pub fn set_avail_idx(&mut self, index: u16) {
        self.next_avail = index;
        self.store(self.avail + 2, index);
    }

    /// `VIRTQ_AVAIL_F_NO_INTERRUPT` or nothing.
    pub fn set_avail_flags(&self, flags: u16) {
        self.store(self.avail, flags);
    }

    /// The available index that the driver has shown.
    pub fn avail_idx(&self) -> u16 {
        self.next_avail
    }

    /// The used index after which the driver wants an interrupt.
    pub fn set_used_event(&self, index: u16) {
        self.store(self.avail + 4 + 2 * u64::from(self.size), index);
    }

    pub fn used_idx(&self) -> u16 {
        let addr = GuestAddress(self.used + 2);
        self.mem.load(addr, Ordering::Acquire).unwrap()
    }

    /// `VIRTQ_USED_F_NO_NOTIFY` or nothing.
    pub fn used_flags(&self) -> u16 {
        let addr = GuestAddress(self.used);
        self.mem.load(addr, Ordering::Acquire).unwrap()
    }

    /// Head index and length of entry `index` of the used ring.
    pub fn used(&self, index: u16) -> (u32, u32) {
        let addr = self.used + 4 + 8 * u64::from(index % self.size);
        let entry: u64 = self.mem.read_obj(GuestAddress(addr)).unwrap();
        (entry as u32, (entry >> 32) as u32)
    }

    fn store(&self, addr: u64, value: u16) {
        self.mem
            .store(value, GuestAddress(addr), Ordering::Release)
            .unwrap();
    }
}
