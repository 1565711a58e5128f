//! A set of small numbers that finds its next member in constant time.

use std::ops::Range;

/// Runs that are looked at for one that is long enough.
const RUNS: usize = 8;

/// Bits in a word, and children of a node.
const FANOUT: usize = 64;

/// Which clusters are free, or which slices of refcounts may have some.
///
/// A tree of bitmaps: a bit of level 0 stands for a member, a bit above it for a word below that is
/// not zero. There are at most eleven levels, so each operation takes a handful of steps however
/// many members there are. Memory is one bit for each number below the largest one that was ever
/// looked at, and a sixty-third of that for the tree: for the free clusters of 1 TiB in clusters of
/// 64 KiB that makes 2.03 MiB.
#[derive(Debug, Default)]
pub(crate) struct FreeMap {
    levels: Vec<Vec<u64>>,
}

impl FreeMap {
    /// The numbers below `64 * bits.len()` whose bit is not set in `bits`.
    pub fn complement(mut bits: Vec<u64>) -> Self {
        bits.iter_mut().for_each(|word| *word = !*word);
        let mut levels = Vec::new();
        while !bits.is_empty() {
            let above = bits.chunks(FANOUT).map(|words| {
                let set = |(word, bit): (&u64, u32)| u64::from(*word != 0) << bit;
                words.iter().zip(0..).map(set).sum()
            });
            let above = if bits.len() > 1 {
                above.collect()
            } else {
                Vec::new()
            };
            levels.push(std::mem::replace(&mut bits, above));
        }
        Self { levels }
    }

    /// The set of `count` numbers from 0 on.
    #[cfg(test)]
    fn full(count: usize) -> Self {
        let mut map = Self::default();
        (0..count).for_each(|i| map.insert(i));
        map
    }

    /// Adds `number`.
    pub fn insert(&mut self, number: usize) {
        let mut index = number;
        let mut level = 0;
        loop {
            if level == self.levels.len() {
                // The first word of the new root stands for what the old root held.
                let below = self.levels.last().and_then(|words| words.first());
                let bit = u64::from(below.is_some_and(|word| *word != 0));
                self.levels.push(vec![bit]);
            }
            let words = &mut self.levels[level];
            let word = index / FANOUT;
            if words.len() <= word {
                words.resize(word + 1, 0);
            }
            words[word] |= 1 << (index % FANOUT);
            if words.len() == 1 && level + 1 == self.levels.len() {
                return;
            }
            index = word;
            level += 1;
        }
    }

    /// Removes `number`, if it is a member.
    pub fn remove(&mut self, number: usize) {
        let mut index = number;
        for words in &mut self.levels {
            let Some(word) = words.get_mut(index / FANOUT) else {
                return;
            };
            *word &= !(1 << (index % FANOUT));
            if *word != 0 {
                return;
            }
            index /= FANOUT;
        }
    }

    /// The first run of up to `max` members in a row that is that long, among the first few, or
    /// else the longest of those.
    pub fn run(&self, max: u64) -> Option<Range<usize>> {
        let mut best: Option<Range<usize>> = None;
        let mut from = 0;
        for _ in 0..RUNS {
            let Some(first) = self.first_from(from) else {
                break;
            };
            let run = first..first + self.run_length(first, max);
            if best.as_ref().is_none_or(|best| best.len() < run.len()) {
                best = Some(run.clone());
            }
            if run.len() as u64 >= max {
                break;
            }
            from = run.end;
        }
        best
    }

    /// How many of the up to `max` numbers from `first` on are members, one behind the other.
    pub fn run_length(&self, first: usize, max: u64) -> usize {
        let mut end = first;
        while ((end - first) as u64) < max && self.contains(end) {
            end += 1;
        }
        end - first
    }

    /// Whether `number` is a member.
    pub fn contains(&self, number: usize) -> bool {
        let word = self.levels.first().and_then(|l| l.get(number / FANOUT));
        word.is_some_and(|word| word & 1 << (number % FANOUT) != 0)
    }

    /// The smallest member that is not smaller than `from`.
    pub fn first_from(&self, from: usize) -> Option<usize> {
        let mut index = from;
        for level in 0..self.levels.len() {
            let word = *self.levels[level].get(index / FANOUT)?;
            let rest = word & u64::MAX << (index % FANOUT);
            if rest != 0 {
                let found = index - index % FANOUT + rest.trailing_zeros() as usize;
                return Some(self.descend(level, found));
            }
            index = index / FANOUT + 1;
        }
        None
    }

    /// The smallest member below bit `index` of `level`, which is set.
    fn descend(&self, level: usize, index: usize) -> usize {
        (0..level).rev().fold(index, |index, level| {
            index * FANOUT + self.levels[level][index].trailing_zeros() as usize
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    #[test]
    fn empty_and_full() {
        let empty = FreeMap::default();
        assert_eq!(empty.first_from(0), None);
        assert!(!empty.contains(5));
        for count in [1, 63, 64, 65, 4096, 4097] {
            let mut map = FreeMap::full(count);
            for i in 0..count {
                assert_eq!(map.first_from(0), Some(i));
                map.remove(i);
            }
            assert_eq!(map.first_from(0), None);
        }
    }

    #[test]
    fn runs() {
        let mut map = FreeMap::full(100);
        [3, 10, 20, 50].into_iter().for_each(|i| map.remove(i));
        assert_eq!(map.run(1), Some(0..1));
        assert_eq!(map.run(4), Some(4..8));
        assert_eq!(map.run(29), Some(21..50));
        assert_eq!(map.run(1000), Some(51..100));
        assert_eq!(map.run_length(98, 10), 2);
        assert_eq!(FreeMap::default().run(3), None);
    }

    proptest! {
        #[test]
        fn complement_holds_the_others(
            words in proptest::collection::vec(
                prop_oneof![Just(0), Just(u64::MAX), any::<u64>()], 0..300
            ),
        ) {
            let mut map = FreeMap::complement(words.clone());
            let mut from = 0;
            for i in 0..words.len() * 64 {
                if words[i / 64] & 1 << (i % 64) == 0 {
                    prop_assert_eq!(map.first_from(from), Some(i));
                    from = i + 1;
                }
            }
            prop_assert_eq!(map.first_from(from), None);
            map.insert(1 << 20);
            prop_assert_eq!(map.first_from(from), Some(1 << 20));
        }

        #[test]
        fn behaves_as_a_set(
            steps in proptest::collection::vec(
                (any::<bool>(), prop_oneof![0usize..200, 0usize..5000, 0usize..400_000]), 1..400
            ),
        ) {
            let (mut map, mut model) = (FreeMap::default(), BTreeSet::new());
            for (insert, number) in steps {
                if insert {
                    map.insert(number);
                    model.insert(number);
                } else {
                    map.remove(number);
                    model.remove(&number);
                }
                for at in [0, number.saturating_sub(1), number, number + 1, number * 2] {
                    prop_assert_eq!(map.contains(at), model.contains(&at));
                    prop_assert_eq!(map.first_from(at), model.range(at..).next().copied());
                }
            }
        }
    }
}
