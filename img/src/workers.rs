//! Work in pieces, on several threads.

use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// How the pieces of some work are done.
#[derive(Clone, Copy, Debug)]
pub struct Workers {
    /// Threads, at least one.
    pub threads: usize,
    /// Bytes of the buffer that each has.
    pub buffer: usize,
    /// Whether a piece that asks for its [`Turn`] waits for the pieces before it.
    pub in_order: bool,
}

impl Workers {
    /// Takes pieces from `next` until there are no more or one fails, and does `work` on them. A thread
    /// that has taken one does it whatever happens to others.
    ///
    /// # Errors
    /// That of the first piece that failed, in the order in which they were taken.
    pub fn run<P, E: Send>(
        self,
        next: impl FnMut() -> Result<Option<P>, E> + Send,
        work: impl Fn(P, &mut [u8], &Turn<'_>) -> Result<(), E> + Sync,
    ) -> Result<(), E> {
        let queue = Mutex::new(Queue {
            next,
            taken: 0,
            error: None,
        });
        let turns = Turns::default();
        let thread = || {
            let mut buffer = vec![0; self.buffer];
            loop {
                let taken = lock(&queue).take();
                let Some((index, piece)) = taken else {
                    return;
                };
                let turn = Turn {
                    turns: &turns,
                    index: self.in_order.then_some(index),
                };
                match work(piece, &mut buffer, &turn) {
                    Ok(()) => turn.end(),
                    Err(error) => lock(&queue).fail(index, error),
                }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..self.threads {
                scope.spawn(thread);
            }
            thread();
        });
        let queue = queue.into_inner().unwrap_or_else(PoisonError::into_inner);
        queue.error.map_or(Ok(()), |(_, error)| Err(error))
    }
}

/// As many threads as there are processors, but two at least, so that one can read while another
/// writes, and `most` at most.
pub fn threads(most: usize) -> usize {
    let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    processors.max(2).min(most)
}

struct Queue<N, E> {
    next: N,
    taken: u64,
    /// The error of the first piece that failed, and its index.
    error: Option<(u64, E)>,
}

impl<P, E, N: FnMut() -> Result<Option<P>, E>> Queue<N, E> {
    fn take(&mut self) -> Option<(u64, P)> {
        if self.error.is_some() {
            return None;
        }
        let index = self.taken;
        self.taken += 1;
        match (self.next)() {
            Ok(piece) => Some((index, piece?)),
            Err(error) => {
                self.fail(index, error);
                None
            }
        }
    }

    fn fail(&mut self, index: u64, error: E) {
        if self.error.as_ref().is_none_or(|(first, _)| index < *first) {
            self.error = Some((index, error));
        }
    }
}

#[derive(Default)]
struct Turns {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Default)]
struct State {
    /// Index of the piece whose turn it is.
    current: u64,
    /// A piece has failed, and its successors never have their turn.
    is_over: bool,
}

/// The turn of a piece, which comes after that of the pieces before it.
pub struct Turn<'a> {
    turns: &'a Turns,
    /// `None` if no piece waits.
    index: Option<u64>,
}

impl Turn<'_> {
    /// Waits for the pieces before this one. Whether all of them have succeeded; if not, this one has
    /// nothing more to do.
    pub fn wait(&self) -> bool {
        let Some(index) = self.index else {
            return true;
        };
        let mut state = lock(&self.turns.state);
        while state.current != index && !state.is_over {
            let changed = self.turns.changed.wait(state);
            state = changed.unwrap_or_else(PoisonError::into_inner);
        }
        !state.is_over
    }

    /// The piece has succeeded.
    fn end(&self) {
        if self.wait() && self.index.is_some() {
            lock(&self.turns.state).current += 1;
            self.turns.changed.notify_all();
        }
    }
}

impl Drop for Turn<'_> {
    /// Without `end` the piece has failed.
    fn drop(&mut self) {
        if let Some(index) = self.index {
            let mut state = lock(&self.turns.state);
            state.is_over |= state.current <= index;
            self.turns.changed.notify_all();
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use std::time::Duration;

    fn workers(in_order: bool) -> Workers {
        Workers {
            threads: 4,
            buffer: 1,
            in_order,
        }
    }

    /// What `count` pieces do, of which those in `failing` fail, before and in their turn.
    fn run(count: u64, failing: &[u64]) -> (Result<(), u64>, Vec<u64>) {
        let mut pieces = 0..count;
        let done = Mutex::new(Vec::new());
        let result = workers(true).run(
            || Ok(pieces.next()),
            |piece, _, turn| {
                // The later ones are faster.
                std::thread::sleep(Duration::from_micros(300 - piece % 4 * 100));
                if failing.contains(&piece) && piece % 2 == 0 {
                    return Err(piece);
                }
                if !turn.wait() {
                    return Ok(());
                }
                if failing.contains(&piece) {
                    return Err(piece);
                }
                lock(&done).push(piece);
                Ok(())
            },
        );
        (result, done.into_inner().unwrap())
    }

    #[test]
    fn in_order() {
        assert_eq!(run(50, &[]), (Ok(()), (0..50).collect()));
        assert_eq!(run(0, &[]), (Ok(()), vec![]));
    }

    #[test]
    fn nothing_follows_a_failure() {
        for failing in [7, 8, 0] {
            let (result, done) = run(50, &[failing, 20, 21]);
            assert_eq!(result, Err(failing));
            assert_eq!(done, (0..done.len() as u64).collect::<Vec<_>>());
            assert!(done.len() as u64 <= failing);
        }
    }

    #[test]
    fn without_order_all_is_done() {
        let mut pieces = 0..100u64;
        let sum = AtomicU64::new(0);
        let result: Result<(), ()> = workers(false).run(
            || Ok(pieces.next()),
            |piece, _, turn| {
                assert!(turn.wait());
                sum.fetch_add(piece, Ordering::Relaxed);
                Ok(())
            },
        );
        assert_eq!((result, sum.into_inner()), (Ok(()), 4950));
    }
}
