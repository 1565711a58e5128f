//! Looking for work for a while, instead of waiting to be called.

use std::hint::spin_loop;
use std::time::{Duration, Instant};

/// The window is halved after a search in vain, but not below this part of the limit: then a guest
/// that has become busy again is noticed.
const SMALLEST_PART: u32 = 16;

/// How long to look: up to a limit while that finds something, less and less while it does not.
#[derive(Debug)]
pub(super) struct Poll {
    limit: Duration,
    window: Duration,
}

impl Poll {
    /// At most `limit` at a time; with zero there is no search.
    pub(super) fn new(limit: Duration) -> Self {
        Self {
            limit,
            window: limit,
        }
    }

    /// Calls `find` until it finds something or the window is over. Returns whether it did.
    pub(super) fn run<E>(&mut self, mut find: impl FnMut() -> Result<bool, E>) -> Result<bool, E> {
        if self.limit.is_zero() {
            return Ok(false);
        }
        let start = Instant::now();
        while start.elapsed() < self.window {
            if find()? {
                self.window = (self.window * 2).min(self.limit);
                return Ok(true);
            }
            spin_loop();
        }
        self.window = (self.window / 2).max(self.limit / SMALLEST_PART);
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(poll: &mut Poll, finds: bool) -> bool {
        poll.run(|| Ok::<_, ()>(finds)).unwrap()
    }

    #[test]
    fn without_a_limit_nothing_is_looked_at() {
        let mut poll = Poll::new(Duration::ZERO);
        let found = poll.run(|| -> Result<bool, ()> { panic!("it has looked") });
        assert_eq!(found, Ok(false));
    }

    #[test]
    fn the_window_follows_success() {
        let limit = Duration::from_micros(64);
        let mut poll = Poll::new(limit);
        for _ in 0..10 {
            assert!(!run(&mut poll, false));
        }
        assert_eq!(poll.window, limit / 16);
        assert!(run(&mut poll, true));
        assert_eq!(poll.window, limit / 8);
        for _ in 0..10 {
            assert!(run(&mut poll, true));
        }
        assert_eq!(poll.window, limit);
    }

    #[test]
    fn an_error_ends_it() {
        let mut poll = Poll::new(Duration::from_secs(60));
        assert_eq!(poll.run(|| Err::<bool, _>("broken")), Err("broken"));
    }
}
