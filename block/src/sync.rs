//! Locks that do not spread a panic, and the atomics of what the model checkers examine.

/// The standard library's; those of the model checkers in their tests: `loom` examines the small
/// parts (`cfg(loom)`, `loom_tests` beside the code), `shuttle` the engine as a whole
/// (`cfg(shuttle)`, `tests/model.rs`).
#[cfg(not(any(loom, shuttle)))]
pub(crate) use std::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread::sleep,
};

#[cfg(loom)]
pub(crate) use {
    loom::sync::{Condvar, Mutex, MutexGuard, atomic},
    std::thread::sleep,
};

#[cfg(shuttle)]
pub(crate) use shuttle::{
    sync::{Condvar, Mutex, MutexGuard, atomic},
    thread::sleep,
};

use std::sync::PoisonError;

/// Locks `mutex`, also after a thread has panicked while it held it: for state that is valid between
/// any two statements, which is everything but what is allocated (see [`lock_whole`]).
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Locks `mutex`, unless a thread has panicked while it held it, and may have left what it guards
/// half changed.
pub(crate) fn lock_whole<T>(mutex: &Mutex<T>) -> Option<MutexGuard<'_, T>> {
    mutex.lock().ok()
}
