//! A driver that does one thing at a time with each of its places for a request.
#![allow(dead_code, reason = "no test uses all of it")]

use std::thread;

use tandem_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use crate::common::ring::{Desc, Ring, chain, indirect, readable, writable, write_table};

pub const IN: u32 = 0;
pub const OUT: u32 = 1;
pub const FLUSH: u32 = 4;
pub const GET_ID: u32 = 8;
pub const DISCARD: u32 = 11;
pub const WRITE_ZEROES: u32 = 13;

/// Most bytes of data that a request has.
pub const DATA_LEN: u64 = 0x1000;
/// Guest memory for one request: its descriptors, header and status, then its data.
const PLACE_LEN: u64 = DATA + DATA_LEN;
const HEADER: u64 = 0x200;
const STATUS: u64 = 0x210;
const DATA: u64 = 0x280;
/// What status bytes hold before they are written.
pub const NO_STATUS: u8 = 0xee;

/// A queue, and as many places for requests as it has entries.
pub struct Driver {
    mem: GuestMemory,
    pub ring: Ring,
    base: u64,
    /// The next entry of the used ring to look at.
    next_used: u16,
}

impl Driver {
    /// Bytes of guest memory that a driver of a queue of `size` entries takes.
    pub fn memory_len(size: u16) -> u64 {
        0x3000 + u64::from(size) * PLACE_LEN
    }

    /// At `base`, where memory is zero.
    pub fn new(mem: &GuestMemory, base: u64, size: u16) -> Self {
        Self {
            mem: mem.clone(),
            ring: Ring::new(mem, base, size),
            base: base + 0x3000,
            next_used: 0,
        }
    }

    /// Puts a request of `len` bytes of data into place `n`. It is offered with `n` as its head.
    pub fn put(&self, n: u16, kind: u32, sector: u64, len: u32) {
        let place = self.place(n);
        let data = match kind {
            IN | GET_ID => writable(place + DATA, len),
            _ => readable(place + DATA, len),
        };
        self.put_buffers(n, kind, sector, &[data]);
    }

    /// Puts a request with these buffers into place `n`.
    pub fn put_buffers(&self, n: u16, kind: u32, sector: u64, buffers: &[Desc]) {
        let place = self.place(n);
        let write = |at: u64, bytes: &[u8]| {
            let addr = GuestAddress(place + at);
            self.mem.write_slice(bytes, addr).unwrap();
        };
        write(HEADER, &kind.to_le_bytes());
        write(HEADER + 8, &sector.to_le_bytes());
        write(STATUS, &[NO_STATUS]);
        let mut descs = vec![readable(place + HEADER, 16)];
        descs.extend(buffers.iter().filter(|desc| desc.len > 0));
        descs.push(writable(place + STATUS, 1));
        write_table(&self.mem, place, 0, &chain(0, &descs));
        let table = indirect(place, 16 * descs.len() as u32);
        write_table(&self.mem, self.ring.table, n, &[table]);
    }

    /// Offers what lies in these places, all at once.
    pub fn offer(&mut self, places: &[u16]) {
        self.ring.offer_all(places);
    }

    /// What has been answered since the last call: place and used length, in the order of the ring.
    pub fn take_used(&mut self) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        while self.next_used != self.ring.used_idx() {
            let (head, len) = self.ring.used(self.next_used);
            self.next_used = self.next_used.wrapping_add(1);
            used.push((head as u16, len));
        }
        used
    }

    /// Waits for `count` answers.
    pub fn wait_for_used(&mut self, count: usize) -> Vec<(u16, u32)> {
        let mut used = Vec::new();
        while used.len() < count {
            used.extend(self.take_used());
            thread::yield_now();
        }
        assert_eq!(used.len(), count, "more than that");
        used
    }

    pub fn status(&self, n: u16) -> u8 {
        let addr = GuestAddress(self.place(n) + STATUS);
        self.mem.read_obj(addr).unwrap()
    }

    pub fn data(&self, n: u16, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        let addr = GuestAddress(self.data_addr(n));
        self.mem.read_slice(&mut data, addr).unwrap();
        data
    }

    pub fn set_data(&self, n: u16, data: &[u8]) {
        let addr = GuestAddress(self.data_addr(n));
        self.mem.write_slice(data, addr).unwrap();
    }

    pub fn data_addr(&self, n: u16) -> u64 {
        self.place(n) + DATA
    }

    fn place(&self, n: u16) -> u64 {
        self.base + u64::from(n) * PLACE_LEN
    }
}
