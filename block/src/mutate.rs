//! Mistakes that tests make the engine commit, to see that they are found (`cfg(mutate)`).
//!
//! Barriers are left out by their place in the code, so that each one that is added is tried without
//! being named anywhere.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::panic::Location;

/// A mistake.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Mutation {
    /// The sync, or the write-back, at this place does not happen.
    Without(&'static Location<'static>),
    /// Another one, in words.
    Mistake(&'static str),
}

/// Data is written back after the mapping.
pub const MAPPING_FIRST: &str = "the mapping is written before data and counts are synced";
/// A cluster is free as soon as it has lost its mapping in memory.
pub const REUSED_EARLY: &str = "a freed cluster is used again before its mapping is gone from disk";
/// Bitmaps are not marked.
pub const NOT_MARKED: &str = "bitmaps are not marked as in use";
/// Bitmaps lose their marks first.
pub const STORED_LATE: &str = "bitmaps are not marked any more before their bits are on disk";
/// A header is rewritten at once.
pub const ONE_WRITE: &str = "a header of several sectors changes in one write";
/// The disk's new size is written first.
pub const GROWN_EARLY: &str = "a disk grows before what is behind its end is cleared";
/// A bitmap begins anew for a backup that does not succeed.
pub const NOT_GIVEN_BACK: &str = "a bitmap does not get back what a backup has taken";
/// What is committed is removed at once.
pub const EMPTIED_EARLY: &str = "an image is emptied before the base is durable";
/// The failure of a sync is told once.
pub const SYNC_FORGIVEN: &str = "a sync succeeds after one has failed";

/// What each [`Mutation::Mistake`] can be.
pub const MISTAKES: [&str; 9] = [
    MAPPING_FIRST,
    REUSED_EARLY,
    NOT_MARKED,
    STORED_LATE,
    ONE_WRITE,
    GROWN_EARLY,
    NOT_GIVEN_BACK,
    EMPTIED_EARLY,
    SYNC_FORGIVEN,
];

thread_local! {
    static ACTIVE: Cell<Option<Mutation>> = const { Cell::new(None) };
    static MET: RefCell<BTreeSet<Mutation>> = const { RefCell::new(BTreeSet::new()) };
}

/// From now on this thread makes that mistake, or none.
pub fn set(mutation: Option<Mutation>) {
    ACTIVE.set(mutation);
}

/// The mistake that this thread makes.
pub fn active() -> Option<Mutation> {
    ACTIVE.get()
}

/// The mistakes that this thread has had an opportunity for since this was asked last.
pub fn met() -> BTreeSet<Mutation> {
    MET.take()
}

/// This thread has had these opportunities, too: another one has, for it.
pub fn note(met: BTreeSet<Mutation>) {
    MET.with_borrow_mut(|all| all.extend(met));
}

/// Whether what is at `place` is to be left out.
pub(crate) fn leaves_out(place: &'static Location<'static>) -> bool {
    makes(Mutation::Without(place))
}

/// Whether `mistake` is to be made.
pub(crate) fn is(mistake: &'static str) -> bool {
    makes(Mutation::Mistake(mistake))
}

fn makes(mutation: Mutation) -> bool {
    MET.with_borrow_mut(|met| met.insert(mutation));
    ACTIVE.get() == Some(mutation)
}
