//! Several threads on one disk, as several queues are.

use std::thread;

use tandem_block::Disk;
use vm_memory::VolatileSlice;

use crate::qemu::{Image, KINDS, Kind};

const THREADS: usize = 4;
const SECTOR: usize = 512;

/// A generator of random numbers (xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, n: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 16) as usize % n
    }
}

/// Every thread has its own sectors, which lie between those of the others in the same clusters,
/// and its own range of whole clusters. It knows what they hold, checks it all the time, and
/// leaves it in `model`.
fn work(disk: &dyn Disk, thread: usize, requests: usize, model: &mut [u8]) {
    let sectors = model.len() / SECTOR;
    let shared = sectors / 2;
    let private = (sectors - shared) / THREADS;
    let mut random = Random(0x1234_5678_9abc_def1 ^ (thread as u64) << 32);
    for request in 0..requests {
        let (at, len) = if random.below(3) > 0 {
            let at = random.below(shared / THREADS) * THREADS + thread;
            (at * SECTOR, SECTOR)
        } else {
            let first = random.below(private);
            let count = 1 + random.below((private - first).min(300));
            ((shared + thread * private + first) * SECTOR, count * SECTOR)
        };
        let expected = &mut model[at..at + len];
        match random.below(10) {
            0..=3 => {
                let mut bytes = vec![(request % 255) as u8 + 1; len];
                disk.write_at(&[VolatileSlice::from(&mut bytes[..])], at as u64)
                    .unwrap();
                expected.copy_from_slice(&bytes);
            }
            4 => {
                disk.write_zeroes(at as u64, len as u64, random.below(2) == 0)
                    .unwrap();
                expected.fill(0);
            }
            5 if random.below(3) == 0 => {
                // Whole clusters lose their content; where there are none, nothing changes.
                disk.discard(at as u64, len as u64).unwrap();
                let mut bytes = vec![0; len];
                disk.read_at(&[VolatileSlice::from(&mut bytes[..])], at as u64)
                    .unwrap();
                for (new, old) in bytes.chunks(SECTOR).zip(expected.chunks_mut(SECTOR)) {
                    assert!(new == old || new.iter().all(|b| *b == 0));
                    old.copy_from_slice(new);
                }
            }
            6 if random.below(20) == 0 => disk.flush().unwrap(),
            _ => {
                let mut bytes = vec![0xee; len];
                disk.read_at(&[VolatileSlice::from(&mut bytes[..])], at as u64)
                    .unwrap();
                assert!(
                    bytes == expected,
                    "thread {thread}, request {request}, offset {at:#x}"
                );
            }
        }
    }
}

fn run(kind: Kind, cluster_size: u64, size: u64, requests: usize) {
    let image = Image::create(kind, cluster_size, size);
    let disk = image.open_with_small_cache();
    let mut models = vec![vec![0u8; size as usize]; THREADS];
    thread::scope(|scope| {
        for (thread, model) in models.iter_mut().enumerate() {
            let disk = &disk;
            scope.spawn(move || work(disk, thread, requests, model));
        }
    });
    disk.flush().unwrap();
    drop(disk);
    // No two models have something other than zero in one place.
    let mut whole = models.pop().unwrap();
    for model in models {
        whole
            .iter_mut()
            .zip(model)
            .for_each(|(all, one)| *all |= one);
    }
    image.expect(&whole);
}

#[test]
fn clusters_of_512_bytes() {
    for kind in KINDS {
        run(kind, 512, 4 << 20, 1000);
    }
}

#[test]
fn clusters_of_4_kib() {
    for kind in KINDS {
        run(kind, 4096, 24 << 20, 1000);
    }
}

#[test]
fn clusters_of_64_kib() {
    for kind in KINDS {
        run(kind, 65536, 16 << 20, 1000);
    }
}
