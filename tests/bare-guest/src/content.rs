//! What the guest writes to its disks, for the guest and for the test that looks at the files
//! afterwards.

use core::ops::Range;

/// Bytes of a sector.
pub const SECTOR_SIZE: usize = 512;

/// Sectors of a stripe. Every other stripe is never written. Stripes are not aligned to clusters, so
/// that there are clusters of which a part is written.
pub const STRIPE: u64 = 300;

/// Whether the guest writes this sector.
pub fn is_written(sector: u64) -> bool {
    (sector / STRIPE).is_multiple_of(2)
}

/// Fills `data`, whole sectors from `sector` on, with bytes that depend on their place and on
/// `seed`.
pub fn fill(data: &mut [u8], sector: u64, seed: u64) {
    for (word, number) in data.chunks_exact_mut(8).zip(sector * 64..) {
        // splitmix64
        let mut hash = (number ^ seed << 40).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        hash = (hash ^ hash >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        hash = (hash ^ hash >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        word.copy_from_slice(&(hash ^ hash >> 31).to_le_bytes());
    }
}

/// Writes that are in flight together in the case `stamps`.
const BATCH: u64 = 8;

/// Most sectors of such a write.
const MOST: u64 = 64;

/// The writes of batch `number` after start `start` on a disk of so many sectors: the sectors of each,
/// which do not overlap, and the seed of all.
pub fn batch(start: u64, number: u64, sectors: u64) -> (impl Iterator<Item = Range<u64>>, u64) {
    let seed = start << 14 | number;
    let part = sectors / BATCH;
    let writes = (0..BATCH).map(move |index| {
        let mut random = [0; 16];
        fill(&mut random, index, seed);
        let [at, count] =
            [0, 8].map(|at| u64::from(u16::from_le_bytes([random[at], random[at + 1]])));
        let begin = index * part + at % (part - MOST);
        begin..begin + 1 + count % MOST
    });
    (writes, seed)
}

/// What `data`, whole sectors from `sector` on, holds in the end on disk number `disk`.
pub fn expect(data: &mut [u8], sector: u64, disk: usize) {
    for (data, sector) in data.chunks_exact_mut(SECTOR_SIZE).zip(sector..) {
        if is_written(sector) {
            fill(data, sector, disk as u64);
        } else {
            data.fill(0);
        }
    }
}
