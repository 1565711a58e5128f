//! Entries of a slice in a line or two of the processor's cache.
//!
//! The entries of 4 KiB fill 64 lines, which the data of requests soon drives out, and then it takes
//! longer to get one of them than to do all the rest. But clusters mostly lie one behind the other, as
//! they were written, or because a data file has no other place for them. Their entries differ by one
//! step each, so that a bit is enough to tell one.

use crate::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::ops::Range;

/// Bits in a word.
const BITS: usize = u64::BITS as usize;
/// Enough for the entries of a slice of 4 KiB.
const WORDS: usize = 8;

/// Entries that are looked up one by one before a summary is made.
const LOOKUPS: u32 = 64;

/// Which entries of a slice can be computed.
///
/// It is read as the entries are: whoever changes it keeps readers from the slice meanwhile.
#[derive(Default)]
pub(super) struct Summary {
    /// What entry 0 would be.
    first: AtomicU64,
    /// A bit for each entry that is larger than that by its index times the step.
    bits: [AtomicU64; WORDS],
    /// Entries that have been looked up and were not here, since some have changed; a hint.
    lookups: AtomicU32,
}

impl Summary {
    /// Entry `index`, if it can be computed.
    #[inline]
    pub fn get(&self, index: usize, step: u64) -> Option<u64> {
        let bits = self.bits.get(index / BITS)?.load(Ordering::Acquire);
        let first = self.first.load(Ordering::Relaxed);
        (bits >> (index % BITS) & 1 != 0).then(|| nth(first, index, step))
    }

    /// An entry was looked up that is not here. Returns whether this should be made.
    pub fn missed(&self) -> bool {
        let lookups = self.lookups.load(Ordering::Relaxed) + 1;
        if lookups < LOOKUPS {
            self.lookups.store(lookups, Ordering::Relaxed);
        }
        lookups == LOOKUPS
    }

    /// Makes it of all `entries`.
    pub fn make(&self, entries: &[AtomicU64], step: u64) {
        let entry = |index: usize| entries[index].load(Ordering::Relaxed);
        // What more than half of them have in common is left over.
        let (mut first, mut votes) = (0, 0_usize);
        for index in (0..entries.len()).filter(|index| entry(*index) != 0) {
            let own = nth(entry(index), index, step.wrapping_neg());
            match votes {
                0 => (first, votes) = (own, 1),
                _ if own == first => votes += 1,
                _ => votes -= 1,
            }
        }
        self.first.store(first, Ordering::Relaxed);
        for (number, bits) in self.bits.iter().enumerate() {
            let indices = number * BITS..entries.len().min((number + 1) * BITS);
            let bit = |index| u64::from(entry(index) == nth(first, index, step)) << (index % BITS);
            bits.store(indices.map(bit).sum(), Ordering::Release);
        }
        self.lookups.store(LOOKUPS, Ordering::Relaxed);
    }

    /// The entries with indices in `changed` are others.
    pub fn forget(&self, changed: Range<usize>) {
        let mut start = changed.start;
        while start < changed.end.min(WORDS * BITS) {
            let end = changed.end.min((start / BITS + 1) * BITS);
            let ones = (u64::MAX >> (BITS - (end - start))) << (start % BITS);
            let bits = &self.bits[start / BITS];
            bits.store(bits.load(Ordering::Relaxed) & !ones, Ordering::Release);
            start = end;
        }
        self.lookups.store(0, Ordering::Relaxed);
    }
}

/// Entry `index` where they differ by `step` each.
#[inline]
fn nth(first: u64, index: usize, step: u64) -> u64 {
    first.wrapping_add(step.wrapping_mul(index as u64))
}

#[cfg(all(test, not(any(loom, shuttle))))]
mod tests {
    use super::*;

    const STEP: u64 = 1 << 16;

    /// What it has of the entries, all of which must be right.
    fn count(summary: &Summary, entries: &[AtomicU64]) -> usize {
        let seen = entries.iter().enumerate().filter(|(index, entry)| {
            let seen = summary.get(*index, STEP);
            assert!(seen.is_none_or(|seen| seen == entry.load(Ordering::Relaxed)));
            seen.is_some()
        });
        seen.count()
    }

    #[test]
    fn holds_what_follows_each_other() {
        let summary = Summary::default();
        let entries: Vec<_> = (0..500).map(|_| AtomicU64::new(0)).collect();
        assert_eq!(count(&summary, &entries), 0);
        summary.make(&entries, STEP);
        assert_eq!(count(&summary, &entries), 1, "the first would be zero");
        let base = (1 << 63) + 77 * STEP;
        let changes = [
            (10..300, nth(base, 10, STEP), 290),
            (300..500, nth(base, 300, STEP), 490),
            (0..5, base - 1, 490),
            (128..129, 0, 489),
            (60..70, 3, 479),
            (60..70, nth(base, 60, STEP), 489),
        ];
        for (range, first, expected) in changes {
            let before = count(&summary, &entries);
            for (entry, number) in entries[range.clone()].iter().zip(0..) {
                entry.store(nth(first, number, STEP), Ordering::Relaxed);
            }
            summary.forget(range);
            assert!(count(&summary, &entries) <= before);
            summary.make(&entries, STEP);
            assert_eq!(count(&summary, &entries), expected);
        }
        summary.forget(1..499);
        assert_eq!(count(&summary, &entries), 1);
        assert_eq!(summary.get(512, STEP), None, "there is no room for more");
    }

    #[test]
    fn is_made_once_it_has_been_missed_often() {
        let summary = Summary::default();
        let missed = |times| (0..times).filter(|_| summary.missed()).count();
        assert_eq!(missed(LOOKUPS + 1), 2);
        summary.make(&[], STEP);
        assert_eq!(missed(2 * LOOKUPS), 0);
        summary.forget(0..1);
        assert_eq!(missed(LOOKUPS), 1);
    }
}
