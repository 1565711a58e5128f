//! A growing array of words that is read without locks.

use std::sync::OnceLock;

use crate::sync::atomic::AtomicU64;

/// Words in a chunk.
const CHUNK: usize = 4096;

/// Words, all of them zero at first. Memory is taken chunk by chunk, for those in use.
pub(crate) struct Words {
    chunks: Box<[OnceLock<Box<[AtomicU64]>>]>,
}

impl Words {
    /// For up to `max` words.
    pub fn new(max: usize) -> Self {
        Self {
            chunks: (0..max.div_ceil(CHUNK)).map(|_| OnceLock::new()).collect(),
        }
    }

    /// The word at `index`, unless it is zero for sure.
    #[inline]
    pub fn get(&self, index: usize) -> Option<&AtomicU64> {
        let chunk = self.chunks.get(index / CHUNK)?.get()?;
        chunk.get(index % CHUNK)
    }

    /// The word at `index`, to be changed. `index` is below the number that the array was made for.
    pub fn make(&self, index: usize) -> &AtomicU64 {
        let new = || (0..CHUNK).map(|_| AtomicU64::new(0)).collect();
        &self.chunks[index / CHUNK].get_or_init(new)[index % CHUNK]
    }

    /// The words that may be other than zero, in order.
    pub fn made(&self) -> impl Iterator<Item = &AtomicU64> + '_ {
        self.chunks.iter().filter_map(OnceLock::get).flatten()
    }

    /// Indices from `first` on of words that may be other than zero.
    pub fn indices(&self, first: usize) -> impl Iterator<Item = usize> + '_ {
        let chunks = self.chunks.iter().enumerate().skip(first / CHUNK);
        chunks
            .filter(|(_, chunk)| chunk.get().is_some())
            .flat_map(move |(index, _)| first.max(index * CHUNK)..(index + 1) * CHUNK)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::atomic::Ordering;

    #[test]
    fn takes_memory_where_it_is_used() {
        let words = Words::new(3 * CHUNK);
        assert!(words.get(5).is_none());
        words.make(CHUNK + 1).store(7, Ordering::Relaxed);
        assert!(words.get(0).is_none());
        assert_eq!(words.get(CHUNK).unwrap().load(Ordering::Relaxed), 0);
        assert_eq!(words.get(CHUNK + 1).unwrap().load(Ordering::Relaxed), 7);
        assert_eq!(
            words.indices(0).collect::<Vec<_>>(),
            Vec::from_iter(CHUNK..2 * CHUNK)
        );
        assert_eq!(words.indices(2 * CHUNK - 1).count(), 1);
        assert_eq!(words.indices(2 * CHUNK).count(), 0);
        assert!(words.get(3 * CHUNK).is_none());
    }
}
