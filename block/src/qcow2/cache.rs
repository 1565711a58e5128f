//! A bounded cache of table slices, read without locks.
//!
//! The cache is set-associative: a slice can be in any of the [`WAYS`] frames of one set. A frame
//! holds the entries of one slice as atomics, and a tag that says which slice, with a version that
//! changes each time the frame is filled or changed. A reader loads the tag, the entries and the tag again:
//! the same tag twice means that the entries belong to the slice (a sequence lock). So a hit takes
//! no lock and no reference count, and frames are never freed while the cache lives.
//!
//! Filling and changing a frame takes the lock of its set. A slice that was changed is dirty until
//! it has been written back, and stays in its frame until then.
//!
//! A frame also has a [`Summary`], which most lookups of single entries need no more than.

use crate::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering, fence};
use std::ops::Range;
use std::sync::OnceLock;

use super::summary::Summary;
use crate::sync::{Mutex, MutexGuard, lock};

/// Frames in a set; the model checkers have one, which is evicted at every turn.
const WAYS: usize = if cfg!(any(loom, shuttle)) { 1 } else { 8 };

/// Bits of a tag that hold the version; the slice number plus one is above them. A reader would
/// have to sleep through exactly 2^24 refills of a frame to take one filling for another.
const VERSION_BITS: u32 = 24;

/// Slices of L2 tables, by number.
pub(crate) struct SliceCache {
    /// Sets are made when first used: a small disk in a large cache costs little memory.
    sets: Box<[OnceLock<Box<Set>>]>,
    entries: usize,
    /// By how much the entries of clusters differ that lie one behind the other.
    step: u64,
    dirty: AtomicUsize,
    max_dirty: usize,
}

/// All tags are in one line of the processor's cache.
#[repr(C, align(64))]
struct Set {
    tags: [AtomicU64; WAYS],
    /// Used since the clock hand passed; a hint, so relaxed.
    used: [AtomicBool; WAYS],
    words: Box<[AtomicU64]>,
    summaries: [Summary; WAYS],
    state: Mutex<SetState>,
}

#[derive(Default)]
struct SetState {
    frames: [Frame; WAYS],
    hand: usize,
}

#[derive(Clone, Copy, Default)]
struct Frame {
    version: u64,
    /// Changed since it was last taken for writing back.
    dirty: bool,
    /// Taken for writing back, and not yet known to be on disk.
    writing: bool,
}

/// A copy of a dirty slice, to be written back.
pub(crate) struct DirtySlice {
    pub slice: u64,
    pub entries: Box<[u64]>,
}

/// Why a slice could not be brought into the cache.
#[derive(Debug)]
pub(crate) enum LoadError<E> {
    /// Every frame of its set is dirty: write back, then try again.
    Full,
    /// Reading it failed.
    Read(E),
}

impl SliceCache {
    /// A cache for slices of `entries` entries that takes up to `limit` bytes for those, at least one
    /// set. The entries of clusters that lie one behind the other differ by `step`.
    pub fn new(entries: usize, step: u64, limit: usize) -> Self {
        let sets = 1 << (limit / (WAYS * entries * 8)).max(1).ilog2();
        Self {
            sets: (0..sets).map(|_| OnceLock::new()).collect(),
            entries,
            step,
            dirty: AtomicUsize::new(0),
            max_dirty: (sets * WAYS / 4).max(1),
        }
    }

    #[inline]
    fn set(&self, slice: u64) -> &Set {
        // Neighbouring slices, and the same slice of neighbouring tables, spread over all sets.
        let hash = slice.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        let set = &self.sets[hash as usize & (self.sets.len() - 1)];
        set.get_or_init(|| Box::new(Set::new(self.entries)))
    }

    /// Calls `look` on the entries of `slice`, if they are cached, and returns its result.
    ///
    /// `look` may see entries of another slice while the frame is being refilled; its result is
    /// dropped then. It must cope with any value and have no effect.
    #[inline]
    pub fn read<R>(&self, slice: u64, look: impl Fn(&[AtomicU64]) -> R) -> Option<R> {
        self.read_frame(slice, |set, way| look(set.words(way)))
    }

    /// Entry `index` of `slice`, if it is cached.
    #[inline]
    pub fn entry(&self, slice: u64, index: usize) -> Option<u64> {
        let (entry, wants_summary) =
            self.read_frame(slice, |set, way| set.entry(way, index, self.step))?;
        if wants_summary {
            self.summarise(slice);
        }
        Some(entry)
    }

    /// Makes the summary of `slice`, if that need not wait.
    #[cold]
    fn summarise(&self, slice: u64) {
        let set = self.set(slice);
        if let Ok(mut state) = set.state.try_lock()
            && let Some(way) = set.way_of(slice)
        {
            set.hide(way);
            set.summaries[way].make(set.words(way), self.step);
            set.show(&mut state, way, slice);
        }
    }

    #[inline]
    fn read_frame<R>(&self, slice: u64, look: impl Fn(&Set, usize) -> R) -> Option<R> {
        let set = self.set(slice);
        for way in 0..WAYS {
            let tag = set.tags[way].load(Ordering::Acquire);
            if tag >> VERSION_BITS != slice + 1 {
                continue;
            }
            let result = look(set, way);
            fence(Ordering::Acquire);
            if set.tags[way].load(Ordering::Relaxed) != tag {
                return None;
            }
            if !set.used[way].load(Ordering::Relaxed) {
                set.used[way].store(true, Ordering::Relaxed);
            }
            return Some(result);
        }
        None
    }

    /// Brings `slice` into the cache, if it is not there yet, with the entries that `fill` stores,
    /// and returns the result of `look` on them: before anybody can evict it again.
    pub fn load<R, E>(
        &self,
        slice: u64,
        fill: impl FnOnce(&[AtomicU64]) -> Result<(), E>,
        look: impl FnOnce(&[AtomicU64]) -> R,
    ) -> Result<R, LoadError<E>> {
        let set = self.set(slice);
        let mut state = lock(&set.state);
        let way = set.load(&mut state, slice, fill)?;
        Ok(look(set.words(way)))
    }

    /// Changes the entries of `slice` with indices in `changed` and marks it dirty, loading it first
    /// where necessary.
    pub fn update<E>(
        &self,
        slice: u64,
        changed: Range<usize>,
        fill: impl FnOnce(&[AtomicU64]) -> Result<(), E>,
        change: impl FnOnce(&[AtomicU64]),
    ) -> Result<(), LoadError<E>> {
        let set = self.set(slice);
        let mut state = lock(&set.state);
        let way = set.load(&mut state, slice, fill)?;
        set.hide(way);
        change(set.words(way));
        set.summaries[way].forget(changed);
        set.show(&mut state, way, slice);
        if !state.frames[way].dirty {
            state.frames[way].dirty = true;
            self.dirty.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether so much is dirty that it should be written back soon.
    pub fn wants_write_back(&self) -> bool {
        self.dirty.load(Ordering::Relaxed) >= self.max_dirty
    }

    /// Takes copies of all dirty slices. Each stays in its frame until [`written`](Self::written)
    /// or [`not_written`](Self::not_written) is called for it.
    pub fn take_dirty(&self) -> Vec<DirtySlice> {
        let mut taken = Vec::new();
        for (set, mut state) in self.made_sets() {
            for way in 0..WAYS {
                let frame = &mut state.frames[way];
                if frame.dirty {
                    frame.dirty = false;
                    frame.writing = true;
                    let entries = set.words(way).iter().map(|e| e.load(Ordering::Relaxed));
                    taken.push(DirtySlice {
                        slice: set.slice(way),
                        entries: entries.collect(),
                    });
                }
            }
        }
        self.dirty.fetch_sub(taken.len(), Ordering::Relaxed);
        taken
    }

    /// Everything that was taken is on disk.
    pub fn written(&self) {
        for (_, mut state) in self.made_sets() {
            state.frames.iter_mut().for_each(|f| f.writing = false);
        }
    }

    /// What was taken may not be on disk: it is dirty again.
    pub fn not_written(&self) {
        for (_, mut state) in self.made_sets() {
            for frame in state.frames.iter_mut().filter(|f| f.writing) {
                frame.writing = false;
                if !frame.dirty {
                    frame.dirty = true;
                    self.dirty.fetch_add(1, Ordering::Relaxed);
                }
            }
        }
    }

    fn made_sets(&self) -> impl Iterator<Item = (&Set, MutexGuard<'_, SetState>)> {
        self.sets
            .iter()
            .filter_map(OnceLock::get)
            .map(|set| (&**set, lock(&set.state)))
    }
}

impl Set {
    fn new(entries: usize) -> Self {
        Self {
            tags: Default::default(),
            used: Default::default(),
            words: (0..WAYS * entries).map(|_| AtomicU64::new(0)).collect(),
            summaries: Default::default(),
            state: Mutex::default(),
        }
    }

    fn words(&self, way: usize) -> &[AtomicU64] {
        let entries = self.words.len() / WAYS;
        &self.words[way * entries..(way + 1) * entries]
    }

    /// Entry `index` of a frame, and whether its summary should be made.
    #[inline]
    fn entry(&self, way: usize, index: usize, step: u64) -> (u64, bool) {
        let summary = &self.summaries[way];
        if let Some(entry) = summary.get(index, step) {
            return (entry, false);
        }
        let entry = self.words(way)[index].load(Ordering::Acquire);
        // Those that are not there yet are about to change.
        (entry, entry != 0 && summary.missed())
    }

    /// Number of the slice in a filled frame.
    fn slice(&self, way: usize) -> u64 {
        (self.tags[way].load(Ordering::Relaxed) >> VERSION_BITS) - 1
    }

    /// The frame of `slice`, filled.
    fn load<E>(
        &self,
        state: &mut SetState,
        slice: u64,
        fill: impl FnOnce(&[AtomicU64]) -> Result<(), E>,
    ) -> Result<usize, LoadError<E>> {
        if let Some(way) = self.way_of(slice) {
            return Ok(way);
        }
        let way = self.victim(state).ok_or(LoadError::Full)?;
        self.hide(way);
        self.summaries[way].forget(0..self.words(way).len());
        fill(self.words(way)).map_err(LoadError::Read)?;
        self.show(state, way, slice);
        Ok(way)
    }

    /// The frame that holds `slice`.
    fn way_of(&self, slice: u64) -> Option<usize> {
        let holds =
            |way: &usize| self.tags[*way].load(Ordering::Relaxed) >> VERSION_BITS == slice + 1;
        (0..WAYS).find(holds)
    }

    /// Keeps readers from a frame, whose words are about to change: they must not see new ones under
    /// the old tag, nor of two words that belong together only one. The tag is cleared first, and
    /// the fence keeps what is stored later behind it.
    fn hide(&self, way: usize) {
        self.tags[way].store(0, Ordering::Relaxed);
        fence(Ordering::Release);
    }

    /// The frame holds `slice` now.
    fn show(&self, state: &mut SetState, way: usize, slice: u64) {
        let frame = &mut state.frames[way];
        frame.version = (frame.version + 1) & ((1 << VERSION_BITS) - 1);
        self.tags[way].store(
            (slice + 1) << VERSION_BITS | frame.version,
            Ordering::Release,
        );
    }

    /// A frame that may be refilled: not dirty, and not used lately if there is such a one.
    fn victim(&self, state: &mut SetState) -> Option<usize> {
        let mut clean = None;
        for _ in 0..WAYS {
            let way = state.hand;
            state.hand = (way + 1) % WAYS;
            let Frame { dirty, writing, .. } = state.frames[way];
            if !dirty && !writing {
                if !self.used[way].swap(false, Ordering::Relaxed) {
                    return Some(way);
                }
                clean = Some(way);
            }
        }
        // All are in use, and readers may mark them again as fast as the marks are cleared.
        clean
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::convert::Infallible;

    const STEP: u64 = 1 << 16;

    fn fill_with(value: u64) -> impl FnOnce(&[AtomicU64]) -> Result<(), Infallible> {
        move |words| {
            words.iter().for_each(|w| w.store(value, Ordering::Relaxed));
            Ok(())
        }
    }

    fn first(cache: &SliceCache, slice: u64) -> Option<u64> {
        cache.read(slice, |words| words[0].load(Ordering::Relaxed))
    }

    #[test]
    fn holds_what_was_loaded() {
        let cache = SliceCache::new(64, STEP, 64 << 10);
        assert_eq!(first(&cache, 3), None);
        cache.load(3, fill_with(33), |_| ()).unwrap();
        cache.load(3, fill_with(44), |_| ()).unwrap();
        assert_eq!(first(&cache, 3), Some(33));
    }

    #[test]
    fn takes_no_more_than_its_limit() {
        for (limit, sets) in [
            (0, 1),
            (WAYS * 512, 1),
            (3 * WAYS * 512, 2),
            (4 * WAYS * 512, 4),
        ] {
            assert_eq!(SliceCache::new(64, STEP, limit).sets.len(), sets, "{limit}");
        }
    }

    #[test]
    fn dirty_slices_are_never_evicted() {
        let cache = SliceCache::new(64, STEP, 0);
        for slice in 0..WAYS as u64 {
            cache
                .update(slice, 0..1, fill_with(0), |w| {
                    w[0].store(slice, Ordering::Relaxed)
                })
                .unwrap();
        }
        assert!(matches!(
            cache.load(100, fill_with(1), |_| ()),
            Err(LoadError::Full)
        ));
        let taken = cache.take_dirty();
        assert_eq!(taken.len(), WAYS);
        assert!(taken.iter().all(|d| d.entries[0] == d.slice));
        assert!(matches!(
            cache.load(100, fill_with(1), |_| ()),
            Err(LoadError::Full)
        ));
        cache.not_written();
        assert_eq!(cache.take_dirty().len(), WAYS);
        cache.written();
        cache.load(100, fill_with(1), |_| ()).unwrap();
        assert!(cache.take_dirty().is_empty());
    }

    #[test]
    fn changes_during_write_back_are_kept() {
        let cache = SliceCache::new(64, STEP, 0);
        cache
            .update(1, 0..1, fill_with(0), |w| w[0].store(1, Ordering::Relaxed))
            .unwrap();
        assert_eq!(cache.take_dirty()[0].entries[0], 1);
        cache
            .update(1, 0..1, fill_with(9), |w| w[0].store(2, Ordering::Relaxed))
            .unwrap();
        cache.written();
        assert_eq!(cache.take_dirty()[0].entries[0], 2);
    }

    /// Whether they are in a summary or not.
    #[test]
    fn entries_are_those_stored_last() {
        let cache = SliceCache::new(64, STEP, 0);
        cache.load(1, fill_with(5), |_| ()).unwrap();
        let check = |first: u64, step: u64| {
            // Often enough for a summary.
            for _ in 0..10 {
                let seen = (0..64).map(|index| cache.entry(1, index).unwrap());
                assert!(seen.eq((0..64).map(|index| first + index * step)));
            }
        };
        check(5, 0);
        for first in [7, 8] {
            let change = |words: &[AtomicU64]| {
                for (word, index) in words.iter().zip(0..) {
                    word.store(first + index * STEP, Ordering::Relaxed);
                }
            };
            cache.update(1, 0..64, fill_with(0), change).unwrap();
            check(first, STEP);
            assert!(cache.set(1).summaries[0].get(63, STEP).is_some());
        }
        cache.take_dirty();
        cache.written();
        (2..).take(3 * WAYS).for_each(|slice| {
            cache.load(slice, fill_with(slice), |_| ()).unwrap();
            assert_eq!(cache.entry(slice, 63), Some(slice));
        });
        assert_eq!(cache.entry(1, 0), None);
    }

    #[test]
    fn a_failed_fill_leaves_no_slice() {
        let cache = SliceCache::new(64, STEP, 0);
        cache.load(1, fill_with(1), |_| ()).unwrap();
        assert!(matches!(
            cache.load(2, |_| Err("no"), |_| ()),
            Err(LoadError::Read("no"))
        ));
        assert_eq!(first(&cache, 2), None);
    }

    /// Readers race with refills of a cache far too small; no reader may see a foreign entry.
    #[test]
    fn readers_never_see_another_slice() {
        let cache = SliceCache::new(16, STEP, 0);
        let done = AtomicBool::new(false);
        let hits = AtomicU64::new(0);
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    while !done.load(Ordering::Relaxed) {
                        for slice in 0..12 {
                            let seen = cache.read(slice, |words| {
                                words.iter().all(|w| w.load(Ordering::Relaxed) == slice)
                            });
                            assert_ne!(seen, Some(false));
                            hits.fetch_add(u64::from(seen.is_some()), Ordering::Relaxed);
                        }
                    }
                });
            }
            // A frame is always found: nothing is dirty.
            let mut failed = false;
            for round in 0..10_000_000 {
                let slice = round * 7 % 12;
                failed |= cache.load(slice, fill_with(slice), |_| ()).is_err();
                if failed || round > 20_000 && hits.load(Ordering::Relaxed) > 1000 {
                    break;
                }
            }
            done.store(true, Ordering::Relaxed);
            assert!(!failed);
        });
        assert!(hits.into_inner() > 0);
    }
}

/// The model checker runs these in every order of events that the memory model allows, in a cache of
/// one frame.
#[cfg(all(test, loom))]
mod loom_tests {
    use super::*;
    use loom::sync::Arc;
    use loom::thread;
    use std::convert::Infallible;

    const STEP: u64 = 1 << 16;

    fn fill(value: u64) -> impl FnOnce(&[AtomicU64]) -> Result<(), Infallible> {
        move |words| {
            words.iter().for_each(|w| w.store(value, Ordering::Relaxed));
            Ok(())
        }
    }

    /// Loads as weakly as any user of the cache may.
    fn look(cache: &SliceCache, slice: u64) -> Option<[u64; 2]> {
        cache.read(slice, |words| {
            [0, 1].map(|i| words[i].load(Ordering::Relaxed))
        })
    }

    fn cache() -> Arc<SliceCache> {
        let cache = Arc::new(SliceCache::new(2, STEP, 0));
        cache.load(1, fill(1), |_| ()).unwrap();
        cache
    }

    /// A frame is refilled with another slice, and again with the first, during a lookup.
    #[test]
    fn loom_eviction_during_a_lookup() {
        loom::model(|| {
            let cache = cache();
            let evict = thread::spawn({
                let cache = cache.clone();
                move || {
                    cache.load(2, fill(2), |_| ()).unwrap();
                    cache.load(1, fill(3), |_| ()).unwrap();
                }
            });
            if let Some(seen) = look(&cache, 2) {
                assert_eq!(seen, [2, 2]);
            }
            if let Some(seen) = look(&cache, 1) {
                assert!(seen == [1, 1] || seen == [3, 3], "{seen:?}");
            }
            evict.join().unwrap();
            assert_eq!(look(&cache, 1), Some([3, 3]));
        });
    }

    /// Two words that belong together change: nobody sees one of them only.
    #[test]
    fn loom_two_words_change_together() {
        loom::model(|| {
            let cache = cache();
            let change = thread::spawn({
                let cache = cache.clone();
                move || {
                    let store = |words: &[AtomicU64]| {
                        words.iter().for_each(|w| w.store(9, Ordering::Relaxed));
                    };
                    cache.update(1, 0..2, fill(0), store).unwrap();
                }
            });
            if let Some(seen) = look(&cache, 1) {
                assert!(seen == [1, 1] || seen == [9, 9], "{seen:?}");
            }
            change.join().unwrap();
            assert_eq!(look(&cache, 1), Some([9, 9]));
        });
    }

    /// An entry is changed, and the slice evicted, during a lookup by way of a summary.
    #[test]
    fn loom_entries_of_a_summary() {
        loom::model(|| {
            let cache = cache();
            cache.summarise(1);
            let change = thread::spawn({
                let cache = cache.clone();
                move || {
                    let store = |words: &[AtomicU64]| words[0].store(9, Ordering::Release);
                    cache.update(1, 0..1, fill(0), store).unwrap();
                    cache.summarise(1);
                    cache.take_dirty();
                    cache.written();
                    cache.load(2, fill(2), |_| ()).unwrap();
                }
            });
            for (slice, values) in [(1, [1, 9]), (2, [2, 2])] {
                if let Some(seen) = cache.entry(slice, 0) {
                    assert!(values.contains(&seen), "{seen}");
                }
            }
            change.join().unwrap();
            assert_eq!(cache.entry(2, 0), Some(2));
        });
    }

    /// An entry is changed while the slice is taken for writing back: it is in the copy, or the
    /// slice is dirty again.
    #[test]
    fn loom_write_back_during_a_change() {
        loom::model(|| {
            let cache = cache();
            let change = thread::spawn({
                let cache = cache.clone();
                move || {
                    let store = |words: &[AtomicU64]| words[1].store(9, Ordering::Release);
                    cache.update(1, 1..2, fill(0), store).unwrap();
                }
            });
            let first = cache.take_dirty();
            cache.written();
            change.join().unwrap();
            let second = cache.take_dirty();
            let copies: Vec<_> = first.iter().chain(&second).map(|d| d.entries[1]).collect();
            assert_eq!(copies, [9], "written back once");
        });
    }
}
