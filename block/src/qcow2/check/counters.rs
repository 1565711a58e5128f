//! A counter for each cluster of a file.

use std::ops::Range;

use crate::qcow2::refcount_width::RefcountWidth;

/// Counters as wide as the refcounts of an image, and laid out like those of its blocks. Memory is taken in pages, and only for those that
/// are not all zero.
#[derive(Debug)]
pub(super) struct Counters {
    width: RefcountWidth,
    pages: Vec<Option<Box<[u8; PAGE]>>>,
}

/// Bytes in a page.
const PAGE: usize = 1 << PAGE_BITS;
const PAGE_BITS: u32 = 12;

/// A counter is at its maximum already.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

impl Counters {
    /// All of them zero.
    pub fn new(width: RefcountWidth) -> Self {
        Self {
            width,
            pages: Vec::new(),
        }
    }

    /// The counter of cluster `i`; zero if it was never set.
    #[inline]
    pub fn get(&self, i: u64) -> u64 {
        let (page, index) = self.place(i);
        usize::try_from(page)
            .ok()
            .and_then(|page| self.pages.get(page)?.as_ref())
            .map_or(0, |page| self.width.get(&page[..], index))
    }

    /// Sets the counter of cluster `i`, of which there must be few enough for a table of pages, to
    /// `value`, which must not be larger than its width allows.
    pub fn set(&mut self, i: u64, value: u64) {
        if value != 0 || self.get(i) != 0 {
            let (page, index) = self.place(i);
            let width = self.width;
            width.set(self.page(page as usize), index, value);
        }
    }

    /// Sets the counters from cluster `first` on, all of them zero, to those that a block, or the first
    /// part of one, holds.
    pub fn set_block(&mut self, first: u64, mut block: &[u8]) {
        let mut at = first << self.width.order >> 3;
        while !block.is_empty() {
            let start = (at % PAGE as u64) as usize;
            let part;
            (part, block) = block.split_at(block.len().min(PAGE - start));
            if part.iter().any(|byte| *byte != 0) {
                let page = self.page((at >> PAGE_BITS) as usize);
                page[start..start + part.len()].copy_from_slice(part);
            }
            at += part.len() as u64;
        }
    }

    /// Adds one to the counter of cluster `i`, and returns what it is then.
    #[inline]
    pub fn increment(&mut self, i: u64) -> Result<u64, Full> {
        let (page, index) = self.place(i);
        let width = self.width;
        let page = self.page(page as usize);
        let value = width.get(page, index);
        if value == width.max() {
            return Err(Full);
        }
        width.set(page, index, value + 1);
        Ok(value + 1)
    }

    /// Sets the counter of cluster `i` to one, if it is zero. Returns whether it was.
    #[inline]
    pub fn set_first(&mut self, i: u64) -> bool {
        let (page, index) = self.place(i);
        let width = self.width;
        let page = self.page(page as usize);
        let is_first = width.get(page, index) == 0;
        if is_first {
            width.set(page, index, 1);
        }
        is_first
    }

    /// Whether the counters of `range` are the same in `wider`.
    pub fn agree(&self, wider: &Self, range: Range<u64>) -> bool {
        let mut first = range.start;
        while first < range.end {
            let per_page = wider.width.count_in(PAGE as u64);
            let end = range.end.min((first / per_page + 1) * per_page);
            let orders = (self.width.order, wider.width.order);
            let agree = match (self.part(first..end), wider.part(first..end)) {
                (None, None) => true,
                // Almost all images have refcounts of 16 bits.
                (Some(few), Some(many)) if orders == (4, 5) => is_same(few, many),
                _ => (first..end).all(|i| self.get(i) == wider.get(i)),
            };
            if !agree {
                return false;
            }
            first = end;
        }
        true
    }

    /// The bytes of the counters of `range`, which lie in one page; `None` if there is none, and all
    /// of them are zero.
    fn part(&self, range: Range<u64>) -> Option<&[u8]> {
        let (page, index) = self.place(range.start);
        let page = self.pages.get(usize::try_from(page).ok()?)?.as_ref()?;
        let start = index << self.width.order >> 3;
        let len = self.width.bytes_for(range.end - range.start) as usize;
        Some(&page[start..start + len])
    }

    /// Adds `n` to the counter of cluster `i`, as far as it goes.
    pub fn add(&mut self, i: u64, n: u64) {
        let sum = self.get(i).saturating_add(n);
        self.set(i, sum.min(self.width.max()));
    }

    /// The page that holds counter `i`, and the counter's index there.
    #[inline]
    fn place(&self, i: u64) -> (u64, usize) {
        let bits = PAGE_BITS + 3 - self.width.order;
        (i >> bits, (i & ((1 << bits) - 1)) as usize)
    }

    /// The page of this number, to be changed.
    #[inline]
    fn page(&mut self, page: usize) -> &mut [u8] {
        if page >= self.pages.len() {
            self.pages.resize_with(page + 1, || None);
        }
        &mut self.pages[page].get_or_insert_with(|| Box::new([0; PAGE]))[..]
    }
}

/// Whether counters of 16 and of 32 bits are the same.
fn is_same(few: &[u8], many: &[u8]) -> bool {
    let few = few.as_chunks().0.iter().map(|few| u16::from_be_bytes(*few));
    let many = many.as_chunks().0.iter();
    let many = many.map(|many| u32::from_be_bytes(*many));
    // Without a way out on the way, many are compared at once.
    few.zip(many)
        .fold(0, |differ, (few, many)| differ | (u32::from(few) ^ many))
        == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_sparsely_up_to_the_maximum() {
        for order in 0..=6 {
            let width = RefcountWidth { order };
            let mut counters = Counters::new(width);
            assert_eq!(counters.get(u64::MAX), 0);
            counters.set(1 << 31, 0);
            assert!(counters.pages.is_empty());
            counters.set(1 << 31, width.max() - 1);
            assert_eq!(counters.increment(1 << 31), Ok(width.max()));
            assert_eq!(counters.increment(1 << 31), Err(Full));
            assert_eq!(counters.get(1 << 31), width.max());
            assert_eq!(counters.increment(5), Ok(1));
            assert_eq!(counters.get(5), 1);
            counters.add(6, 1);
            counters.add(6, u64::MAX);
            assert_eq!(counters.get(6), width.max());
            assert_eq!(counters.pages.iter().flatten().count(), 2);
        }
    }

    #[test]
    fn takes_over_blocks() {
        for order in 0..=6 {
            let width = RefcountWidth { order };
            // They begin inside one page, and end inside the next one but one.
            let first = width.count_in(3 * PAGE as u64 / 2);
            let mut block = vec![0; 2 * PAGE];
            let last = width.count_in(block.len() as u64) - 1;
            width.set(&mut block, 0, 1);
            width.set(&mut block, last as usize, width.max());
            let mut counters = Counters::new(width);
            counters.set_block(first, &block);
            for (i, value) in [(0, 1), (1, 0), (last - 1, 0), (last, width.max())] {
                assert_eq!(counters.get(first + i), value, "{order}, {i}");
            }
            assert_eq!(counters.pages.iter().flatten().count(), 2);
        }
    }

    #[test]
    fn counters_of_two_widths_agree() {
        for order in 0..6 {
            let mut few = Counters::new(RefcountWidth { order });
            let mut many = Counters::new(RefcountWidth { order: order + 1 });
            let range = || 8..100_000;
            assert!(few.agree(&many, range()), "{order}");
            for i in [0, 8, 1023, 1024, 5000, 99_999, 100_000] {
                many.set(i, 1);
                let is_outside = i == 0 || i == 100_000;
                assert_eq!(few.agree(&many, range()), is_outside, "{order}, {i}");
                few.set(i, 1);
                assert!(few.agree(&many, range()), "{order}, {i}");
            }
            // Of these, the narrower one has the lower half.
            many.set(5000, few.width.max() + 2);
            assert!(!few.agree(&many, range()), "{order}");
        }
    }
}
