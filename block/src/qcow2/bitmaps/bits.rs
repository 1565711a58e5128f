//! The bits of a bitmap in memory.

use std::sync::OnceLock;

use super::directory::MAX_BITMAP_SIZE;
use crate::qcow2::words::Words;
use crate::sync::atomic::{AtomicU64, Ordering};

/// Bits in a word.
const WORD_BITS: u64 = u64::BITS as u64;
/// Words that are made room for at once.
const PART: usize = 1 << 20;

/// As many bits as a bitmap can have, all of them zero at first. An empty one takes some 1.5 KiB, and
/// one that is in use memory for the parts of the disk that have changed.
pub(super) struct Bits(Box<[OnceLock<Words>]>);

impl Bits {
    pub fn new() -> Self {
        let parts = (MAX_BITMAP_SIZE / 8) as usize / PART;
        Self((0..parts).map(|_| OnceLock::new()).collect())
    }

    /// The word at `index`, unless it is zero for sure.
    pub fn get(&self, index: usize) -> Option<&AtomicU64> {
        self.0.get(index / PART)?.get()?.get(index % PART)
    }

    /// Sets the bits of `mask` in the word at `index`.
    pub fn set(&self, index: usize, mask: u64) {
        let part = self.0[index / PART].get_or_init(|| Words::new(PART));
        let word = part.make(index % PART);
        // Most of what is written was written before.
        if word.load(Ordering::Relaxed) & mask != mask {
            word.fetch_or(mask, Ordering::Relaxed);
        }
    }

    /// Sets the bits from `first` to `last`.
    pub fn set_range(&self, first: u64, last: u64) {
        for word in first / WORD_BITS..=last / WORD_BITS {
            let start = first.max(word * WORD_BITS) % WORD_BITS;
            let end = last.min(word * WORD_BITS + WORD_BITS - 1) % WORD_BITS;
            self.set(
                word as usize,
                u64::MAX >> (WORD_BITS - 1 - end) & u64::MAX << start,
            );
        }
    }

    /// Clears the bits behind the first `count`.
    pub fn truncate(&self, count: u64) {
        let (first, rest) = ((count / WORD_BITS) as usize, count % WORD_BITS);
        for (part, words) in self.0.iter().enumerate() {
            let indices = words.get().into_iter().flat_map(Words::indices);
            for index in indices.map(|index| part * PART + index) {
                if index >= first
                    && let Some(word) = self.get(index)
                {
                    let kept = if index == first { (1 << rest) - 1 } else { 0 };
                    word.fetch_and(kept, Ordering::Relaxed);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn set(bits: &Bits, words: usize) -> Vec<u64> {
        let word = |index| {
            bits.get(index)
                .map_or(0, |word| word.load(Ordering::Relaxed))
        };
        let bit = |bit: &u64| word((bit / WORD_BITS) as usize) >> (bit % WORD_BITS) & 1 == 1;
        (0..words as u64 * WORD_BITS).filter(bit).collect()
    }

    #[test]
    fn ranges_of_bits() {
        let bits = Bits::new();
        bits.set_range(62, 65);
        bits.set_range(3, 3);
        assert_eq!(set(&bits, 3), [3, 62, 63, 64, 65]);
        bits.set_range(128, 191);
        assert_eq!(set(&bits, 3).len(), 5 + 64);
        bits.truncate(64);
        assert_eq!(set(&bits, 3), [3, 62, 63]);
        bits.truncate(63);
        assert_eq!(set(&bits, 3), [3, 62]);
        let last = MAX_BITMAP_SIZE * 8 - 1;
        bits.set_range(last, last);
        assert!(bits.get(PART).is_none());
        bits.truncate(0);
        assert!(set(&bits, 3).is_empty());
        let word = bits.get((last / WORD_BITS) as usize).unwrap();
        assert_eq!(word.load(Ordering::Relaxed), 0);
    }
}
