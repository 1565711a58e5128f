//! The bits of a bitmap in memory.

use std::ops::Range;
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

    /// Sets the bits, each for a power of two of bytes of a disk of `size` bytes, of all bytes that have
    /// a bit in `source`, where each is for another power of two.
    pub fn merge(&self, granularity_bits: u8, source: &Self, source_bits: u8, size: u64) {
        for run in source.runs(0) {
            let (start, end) = (run.start << source_bits, run.end << source_bits);
            if start < size {
                let last = end.min(size) - 1;
                self.set_range(start >> granularity_bits, last >> granularity_bits);
            }
        }
    }

    /// Clears the bits behind the first `count`.
    pub fn truncate(&self, count: u64) {
        let (first, rest) = ((count / WORD_BITS) as usize, count % WORD_BITS);
        for (index, word) in self.words(first) {
            let kept = if index == first { (1 << rest) - 1 } else { 0 };
            word.fetch_and(kept, Ordering::Relaxed);
        }
    }

    /// The words from index `first` on that may be other than zero, with their indices.
    fn words(&self, first: usize) -> impl Iterator<Item = (usize, &AtomicU64)> {
        let parts = self.0.iter().enumerate().skip(first / PART);
        parts.flat_map(move |(part, words)| {
            let from = first.saturating_sub(part * PART);
            let words = words.get().into_iter();
            let pairs = words.flat_map(move |words| {
                let indices = words.indices(from);
                indices.map(move |index| (index, words.get(index)))
            });
            pairs.filter_map(move |(index, word)| Some((part * PART + index, word?)))
        })
    }

    /// The runs of bits that are set, from bit `first` on, in order; those of a word end with it.
    pub fn runs(&self, first: u64) -> impl Iterator<Item = Range<u64>> {
        let (first, skipped) = ((first / WORD_BITS) as usize, first % WORD_BITS);
        self.words(first).flat_map(move |(index, word)| {
            let start = index as u64 * WORD_BITS;
            let mut value = word.load(Ordering::Relaxed);
            if index == first {
                value &= u64::MAX << skipped;
            }
            runs(value).map(move |run| start + u64::from(run.start)..start + u64::from(run.end))
        })
    }
}

impl Default for Bits {
    fn default() -> Self {
        Self::new()
    }
}

/// A copy of what is set, as far as it is set when its word is looked at.
impl Clone for Bits {
    fn clone(&self) -> Self {
        let copy = Self::new();
        for (index, word) in self.words(0) {
            match word.load(Ordering::Relaxed) {
                0 => {}
                value => copy.set(index, value),
            }
        }
        copy
    }
}

/// The runs of ones in `value`.
fn runs(value: u64) -> impl Iterator<Item = Range<u32>> {
    let mut from = 0;
    std::iter::from_fn(move || {
        let rest = value.checked_shr(from).filter(|rest| *rest != 0)?;
        let start = from + rest.trailing_zeros();
        from = start + (value >> start).trailing_ones();
        Some(start..from)
    })
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

    #[test]
    fn merging() {
        let (coarse, fine) = (Bits::new(), Bits::new());
        coarse.set_range(0, 0);
        coarse.set_range(2, 3);
        fine.merge(12, &coarse, 13, (5 << 12) + 1);
        assert_eq!(set(&fine, 1), [0, 1, 4, 5]);
        let back = Bits::new();
        back.set_range(1, 1);
        back.merge(13, &fine, 12, 1 << 20);
        assert_eq!(set(&back, 1), [0, 1, 2]);
    }

    #[test]
    fn runs_of_ones() {
        let all = |value| Vec::from_iter(runs(value).map(|run| (run.start, run.end)));
        assert_eq!(all(0), []);
        assert_eq!(all(u64::MAX), [(0, 64)]);
        assert_eq!(all(0b110_0101), [(0, 1), (2, 3), (5, 7)]);
        assert_eq!(all(1 << 63 | 1), [(0, 1), (63, 64)]);
        let bits = Bits::new();
        let far = PART as u64 * WORD_BITS;
        bits.set_range(60, 70);
        bits.set_range(far, far);
        let runs = Vec::from_iter(bits.runs(0).map(|run| (run.start, run.end)));
        assert_eq!(runs, [(60, 64), (64, 71), (far, far + 1)]);
        let from = |first| bits.clone().runs(first).map(|run| run.start).next();
        assert_eq!(from(62), Some(62));
        assert_eq!(from(64), Some(64));
        assert_eq!(from(71), Some(far));
        assert_eq!(from(far + 1), None);
    }
}
