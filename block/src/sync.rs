//! Locks that do not spread a panic, and the atomics of what the model checker examines.

/// The standard library's; those of the model checker `loom` in its tests (`cfg(loom)`).
#[cfg(not(loom))]
pub(crate) use std::sync::{Condvar, Mutex, MutexGuard, atomic};

#[cfg(loom)]
pub(crate) use loom::sync::{Condvar, Mutex, MutexGuard, atomic};

use std::sync::PoisonError;

/// Locks `mutex`, also after a thread has panicked while it held it: the state below each lock of
/// this crate is valid between any two statements, and a disk that refuses to flush because one
/// request failed would lose data.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
