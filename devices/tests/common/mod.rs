//! Shared by unit tests and integration tests: a disk in memory and a driver's end of a virtqueue.
#![allow(dead_code, reason = "no test uses all of it")]

pub mod disk;
pub mod gate;
pub mod ring;

use vm_memory::{GuestAddress, GuestMemoryMmap};

/// Size of each of the two regions of [`guest_memory`].
pub const REGION: u64 = 1 << 20;

/// Two regions that touch each other; beyond them there is no memory.
pub fn guest_memory() -> GuestMemoryMmap<()> {
    let region = REGION as usize;
    GuestMemoryMmap::from_ranges(&[(GuestAddress(0), region), (GuestAddress(REGION), region)])
        .unwrap()
}
