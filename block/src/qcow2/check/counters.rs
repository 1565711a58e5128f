//! A counter for each cluster of a file.

use crate::qcow2::refcount_width::RefcountWidth;

/// Counters as wide as the refcounts of an image. Memory is taken in pages, and only for those that
/// are not all zero.
#[derive(Debug)]
pub(super) struct Counters {
    width: RefcountWidth,
    pages: Vec<Option<Box<[u8; PAGE]>>>,
}

/// Bytes in a page.
const PAGE: usize = 4096;

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
            let page = page as usize;
            if page >= self.pages.len() {
                self.pages.resize_with(page + 1, || None);
            }
            let page = self.pages[page].get_or_insert_with(|| Box::new([0; PAGE]));
            self.width.set(&mut page[..], index, value);
        }
    }

    /// Adds one to the counter of cluster `i`.
    pub fn increment(&mut self, i: u64) -> Result<(), Full> {
        let value = self.get(i);
        if value == self.width.max() {
            return Err(Full);
        }
        self.set(i, value + 1);
        Ok(())
    }

    /// Adds `n` to the counter of cluster `i`, as far as it goes.
    pub fn add(&mut self, i: u64, n: u64) {
        let sum = self.get(i).saturating_add(n);
        self.set(i, sum.min(self.width.max()));
    }

    /// The page that holds counter `i`, and the counter's index there.
    fn place(&self, i: u64) -> (u64, usize) {
        let per_page = self.width.count_in(PAGE as u64);
        (i / per_page, (i % per_page) as usize)
    }
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
            assert_eq!(counters.increment(1 << 31), Ok(()));
            assert_eq!(counters.increment(1 << 31), Err(Full));
            assert_eq!(counters.get(1 << 31), width.max());
            assert_eq!(counters.increment(5), Ok(()));
            assert_eq!(counters.get(5), 1);
            counters.add(6, 1);
            counters.add(6, u64::MAX);
            assert_eq!(counters.get(6), width.max());
            assert_eq!(counters.pages.iter().flatten().count(), 2);
        }
    }
}
