//! Requests: what they do, and where they go.

use crate::clock::Clock;
use crate::target::Target;

/// What requests do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Work {
    Read,
    Write,
    /// Reads that do not wait, where the target can tell.
    TryRead,
    TryWrite,
    /// A read, a write, a read, a write….
    Mixed,
}

impl Work {
    /// Carries out request `number` of `buffer`'s length.
    #[inline(always)]
    pub fn request(self, target: &dyn Target, buffer: &mut [u8], at: u64, number: usize) {
        match self {
            Self::Read => target.read(buffer, at),
            Self::Write => target.write(buffer, at),
            Self::TryRead => target.try_read(buffer, at),
            Self::TryWrite => target.try_write(buffer, at),
            Self::Mixed if number.is_multiple_of(2) => target.read(buffer, at),
            Self::Mixed => target.write(buffer, at),
        }
    }

    /// What a request to each of `offsets` takes, in nanoseconds of `clock`.
    pub fn time(
        self,
        clock: Clock,
        target: &dyn Target,
        buffer: &mut [u8],
        offsets: &[u64],
    ) -> f64 {
        let before = clock();
        self.carry_out(target, buffer, offsets);
        (clock() - before) / offsets.len() as f64
    }

    /// Sends a request to each of `offsets`. Instructions are counted from here on, so this is a
    /// function of its own.
    #[inline(never)]
    pub fn carry_out(self, target: &dyn Target, buffer: &mut [u8], offsets: &[u64]) {
        for (number, at) in offsets.iter().enumerate() {
            self.request(target, buffer, *at, number);
        }
    }
}

/// Random numbers, the same each time.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    pub fn below(&mut self, end: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 >> 11) % end
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i as u64 + 1) as usize);
        }
    }
}

/// All multiples of `step` below `size`.
pub fn in_order(size: u64, step: u64) -> Vec<u64> {
    (0..size / step).map(|i| i * step).collect()
}

/// The same, shuffled.
pub fn shuffled(size: u64, step: u64) -> Vec<u64> {
    let mut offsets = in_order(size, step);
    Random::new(1).shuffle(&mut offsets);
    offsets
}

/// The `number`th piece of `offsets` of `length`; from the start again behind the last whole one.
pub fn piece(offsets: &[u64], length: usize, number: usize) -> &[u64] {
    let start = number % (offsets.len() / length) * length;
    &offsets[start..start + length]
}

/// Memory that begins at a page.
pub struct Buffer {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Buffer {
    pub fn new(length: usize) -> Self {
        let bytes = vec![0x5a; length + 4096];
        let start = bytes.as_ptr().align_offset(4096);
        Self {
            bytes,
            start,
            length,
        }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}

/// Writes something everywhere.
pub fn fill(target: &dyn Target, size: u64) {
    let mut buffer = Buffer::new(1 << 20);
    for at in in_order(size, 1 << 20) {
        target.write(buffer.bytes(), at);
    }
    target.flush();
}
