//! A bit for each granule of a disk.

use std::ops::Range;

use crate::qcow2::Words;
use crate::sync::atomic::{AtomicU64, Ordering};

const WORD_BITS: u64 = u64::BITS as u64;

/// A set of granules, which are numbered from 0. It takes memory for those parts of the disk in which
/// there was ever one.
pub(crate) struct Granules {
    words: Words,
    count: u64,
}

impl Granules {
    /// None of `count` granules.
    pub fn new(count: u64) -> Self {
        Self {
            words: Words::new(count.div_ceil(WORD_BITS) as usize),
            count,
        }
    }

    /// Adds those of `range`.
    pub fn insert(&self, range: Range<u64>) {
        for (index, mask) in self.masks(range) {
            let word = self.words.make(index);
            // One that is there already leaves the line to all processors.
            if word.load(Ordering::Relaxed) & mask != mask {
                word.fetch_or(mask, Ordering::Relaxed);
            }
        }
    }

    /// Takes all of them out, into a set of their own. Nobody adds any meanwhile.
    pub fn take(&self) -> Self {
        let taken = Self::new(self.count);
        for index in self.words.indices(0) {
            match self.words.make(index).swap(0, Ordering::Relaxed) {
                0 => {}
                word => taken.words.make(index).store(word, Ordering::Relaxed),
            }
        }
        taken
    }

    /// Takes out those of `range`. Whoever finds that they are gone sees what was done before.
    pub fn remove(&self, range: Range<u64>) {
        for (index, mask) in self.masks(range) {
            if let Some(word) = self.words.get(index) {
                word.fetch_and(!mask, Ordering::Release);
            }
        }
    }

    /// Whether there is one in `range`.
    pub fn any(&self, range: Range<u64>) -> bool {
        self.masks(range)
            .any(|(index, mask)| self.word(index) & mask != 0)
    }

    /// How many there are in `range`.
    pub fn count(&self, range: Range<u64>) -> u64 {
        let counts = self
            .masks(range)
            .map(|(index, mask)| (self.word(index) & mask).count_ones());
        counts.map(u64::from).sum()
    }

    /// The first ones in `range` that follow each other.
    pub fn run(&self, range: Range<u64>) -> Option<Range<u64>> {
        let start = self.first(range.clone(), |word| word)?;
        let end = self.first(start..range.end, |word| !word);
        Some(start..end.unwrap_or(range.end))
    }

    /// The first ones in `range` that follow each other and are not in the set.
    pub fn gap(&self, range: Range<u64>) -> Option<Range<u64>> {
        let range = range.start..range.end.min(self.count);
        let start = self.first(range.clone(), |word| !word)?;
        let end = self.first(start..range.end, |word| word);
        Some(start..end.unwrap_or(range.end))
    }

    /// The first one in `range` for which there is a bit in what `of` makes of its word.
    fn first(&self, range: Range<u64>, of: impl Fn(u64) -> u64) -> Option<u64> {
        self.masks(range).find_map(|(index, mask)| {
            let found = of(self.word(index)) & mask;
            let first = index as u64 * WORD_BITS + u64::from(found.trailing_zeros());
            (found != 0).then_some(first)
        })
    }

    fn word(&self, index: usize) -> u64 {
        let word: Option<&AtomicU64> = self.words.get(index);
        word.map_or(0, |word| word.load(Ordering::Acquire))
    }

    /// The words in which `range` lies, as far as there are such granules, and its bits in each.
    fn masks(&self, range: Range<u64>) -> impl Iterator<Item = (usize, u64)> + use<> {
        let (start, end) = (range.start, range.end.min(self.count));
        let words = match start < end {
            true => start / WORD_BITS..end.div_ceil(WORD_BITS),
            false => 0..0,
        };
        words.map(move |index| {
            let base = index * WORD_BITS;
            let low = start.saturating_sub(base);
            let high = (end - base).min(WORD_BITS);
            (
                index as usize,
                u64::MAX >> (WORD_BITS - high) & u64::MAX << low,
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_of_granules() {
        let granules = Granules::new(1000);
        assert_eq!(granules.run(0..1000), None);
        granules.insert(3..4);
        granules.insert(60..200);
        granules.insert(990..2000);
        assert_eq!(granules.count(0..u64::MAX), 1 + 140 + 10);
        assert_eq!(granules.run(0..1000), Some(3..4));
        assert_eq!(granules.run(4..1000), Some(60..200));
        assert_eq!(granules.run(100..128), Some(100..128));
        assert_eq!(granules.run(200..1000), Some(990..1000));
        assert_eq!(granules.run(200..990), None);
        granules.remove(64..128);
        assert_eq!(granules.run(4..1000), Some(60..64));
        assert_eq!(granules.run(64..1000), Some(128..200));
        assert!(granules.any(63..64) && granules.any(0..1000));
        assert_eq!(granules.gap(0..1000), Some(0..3));
        assert_eq!(granules.gap(60..1000), Some(64..128));
        assert_eq!(granules.gap(200..u64::MAX), Some(200..990));
        assert_eq!(granules.gap(990..u64::MAX), None);
        let taken = granules.take();
        assert_eq!((granules.count(0..1000), taken.count(0..1000)), (0, 87));
        assert_eq!(taken.run(4..1000), Some(60..64));
        let granules = taken;
        assert!(!granules.any(64..128) && !granules.any(5..5) && !granules.any(1000..1001));
    }
}
