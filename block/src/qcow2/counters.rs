//! A counter for each cluster of a file.

/// Counters of 16 bits. Memory is taken in pages, and only for those that are not all zero.
#[derive(Debug, Default)]
pub(super) struct Counters {
    pages: Vec<Option<Box<[u16; PAGE]>>>,
}

/// Counters in a page.
const PAGE: usize = 2048;

/// A counter is at its maximum already.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Full;

impl Counters {
    /// The counter of cluster `i`; zero if it was never set.
    pub fn get(&self, i: u64) -> u16 {
        usize::try_from(i / PAGE as u64)
            .ok()
            .and_then(|page| self.pages.get(page)?.as_ref())
            .map_or(0, |page| page[i as usize % PAGE])
    }

    /// Sets the counter of cluster `i`, of which there must be few enough for a table of pages.
    pub fn set(&mut self, i: u64, value: u16) {
        if value != 0 || self.get(i) != 0 {
            *self.counter(i) = value;
        }
    }

    /// Adds one to the counter of cluster `i`.
    pub fn increment(&mut self, i: u64) -> Result<(), Full> {
        let counter = self.counter(i);
        *counter = counter.checked_add(1).ok_or(Full)?;
        Ok(())
    }

    fn counter(&mut self, i: u64) -> &mut u16 {
        let page = (i / PAGE as u64) as usize;
        if page >= self.pages.len() {
            self.pages.resize_with(page + 1, || None);
        }
        let page = self.pages[page].get_or_insert_with(|| Box::new([0; PAGE]));
        &mut page[i as usize % PAGE]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_sparsely_up_to_the_maximum() {
        let mut counters = Counters::default();
        assert_eq!(counters.get(u64::MAX), 0);
        counters.set(1 << 31, 0);
        assert!(counters.pages.is_empty());
        counters.set(1 << 31, u16::MAX - 1);
        assert_eq!(counters.increment(1 << 31), Ok(()));
        assert_eq!(counters.increment(1 << 31), Err(Full));
        assert_eq!(counters.get(1 << 31), u16::MAX);
        assert_eq!(counters.increment(5), Ok(()));
        assert_eq!(counters.get(5), 1);
        assert_eq!(counters.pages.iter().flatten().count(), 2);
    }
}
