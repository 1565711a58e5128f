//! Limits on how much a disk does in a second.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// What a disk may do in a second, and how much at once after a pause. Requests beyond that wait;
/// none fails.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RateLimits {
    /// Requests, of any kind.
    pub requests: Option<Rate>,
    /// Bytes that are read, written and zeroed.
    pub bytes: Option<Rate>,
}

/// A rate, in units (requests or bytes) per second.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    per_second: u64,
    burst: u64,
}

impl Rate {
    /// `per_second` units each second on average, and up to `burst` at once. `None` if one of them is
    /// zero, or more than 2⁵³.
    pub fn new(per_second: u64, burst: u64) -> Option<Self> {
        let range = 1..=1 << 53;
        (range.contains(&per_second) && range.contains(&burst))
            .then_some(Self { per_second, burst })
    }

    /// How long `units` take, in nanoseconds.
    fn nanos(&self, units: u64) -> u64 {
        let nanos = u128::from(units) * 1_000_000_000 / u128::from(self.per_second);
        u64::try_from(nanos).unwrap_or(u64::MAX)
    }
}

/// What all queues of a disk keep to.
#[derive(Debug)]
pub(super) struct Limiter {
    start: Instant,
    requests: Option<Meter>,
    bytes: Option<Meter>,
}

/// The point in time up to which what has been let through uses up the rate: in the past if there
/// has been less. What is let through is charged when its size is known, so a request larger than a
/// burst passes and delays those behind it.
#[derive(Debug)]
struct Meter {
    rate: Rate,
    /// In nanoseconds since the limiter was made.
    used_up_to: AtomicU64,
}

impl Limiter {
    /// `None` without any limit.
    pub(super) fn new(limits: &RateLimits, now: Instant) -> Option<Self> {
        let meter = |rate: Rate| Meter {
            rate,
            used_up_to: AtomicU64::new(0),
        };
        if limits.requests.is_none() && limits.bytes.is_none() {
            return None;
        }
        Some(Self {
            start: now,
            requests: limits.requests.map(meter),
            bytes: limits.bytes.map(meter),
        })
    }

    /// How long the next request has to wait; `None` if it may pass.
    pub(super) fn delay(&self, now: Instant) -> Option<Duration> {
        let now = self.nanos(now);
        let meters = [&self.requests, &self.bytes].into_iter().flatten();
        let delay = meters.map(|meter| meter.delay(now)).max()?;
        (delay > 0).then(|| Duration::from_nanos(delay))
    }

    /// Counts a request that has passed.
    pub(super) fn charge(&self, now: Instant, bytes: u64) {
        let now = self.nanos(now);
        if let Some(meter) = &self.requests {
            meter.charge(now, 1);
        }
        if let Some(meter) = &self.bytes {
            meter.charge(now, bytes);
        }
    }

    fn nanos(&self, now: Instant) -> u64 {
        // 584 years.
        now.saturating_duration_since(self.start).as_nanos() as u64
    }
}

impl Meter {
    fn delay(&self, now: u64) -> u64 {
        // One unit of the burst is for the request itself.
        let ahead = self.rate.nanos(self.rate.burst - 1);
        let used_up_to = self.used_up_to.load(Ordering::Relaxed);
        used_up_to.saturating_sub(now.saturating_add(ahead))
    }

    fn charge(&self, now: u64, units: u64) {
        let cost = self.rate.nanos(units);
        let add = |used_up_to: u64| Some(used_up_to.max(now).saturating_add(cost));
        // The closure always gives a value.
        let _ = self
            .used_up_to
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, add);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many requests of `bytes` bytes pass in `time`, each as soon as it may.
    fn passed(limits: RateLimits, bytes: u64, time: Duration) -> u64 {
        let start = Instant::now();
        let limiter = Limiter::new(&limits, start).unwrap();
        let mut now = start;
        let mut count = 0;
        while now < start + time {
            match limiter.delay(now) {
                Some(delay) => now += delay,
                None => {
                    limiter.charge(now, bytes);
                    count += 1;
                }
            }
        }
        count
    }

    fn limits(requests: Option<(u64, u64)>, bytes: Option<(u64, u64)>) -> RateLimits {
        let rate = |(per_second, burst)| Rate::new(per_second, burst).unwrap();
        RateLimits {
            requests: requests.map(rate),
            bytes: bytes.map(rate),
        }
    }

    #[test]
    fn the_average_is_the_rate_and_a_burst_comes_first() {
        let seconds = Duration::from_secs;
        assert_eq!(passed(limits(Some((100, 1)), None), 0, seconds(10)), 1000);
        assert_eq!(passed(limits(Some((100, 50)), None), 0, seconds(10)), 1049);
        let bytes = limits(None, Some((1 << 20, 4096)));
        // One more at the start: the burst is as large as a request.
        assert_eq!(passed(bytes, 4096, seconds(4)), 1025);
    }

    #[test]
    fn the_tighter_limit_counts() {
        let both = limits(Some((1000, 1)), Some((4096, 1)));
        assert_eq!(passed(both, 4096, Duration::from_secs(5)), 5);
        assert_eq!(passed(both, 0, Duration::from_secs(1)), 1000);
    }

    #[test]
    fn a_request_larger_than_a_burst_passes_and_delays_the_next() {
        let start = Instant::now();
        let limiter = Limiter::new(&limits(None, Some((1000, 10))), start).unwrap();
        assert_eq!(limiter.delay(start), None);
        limiter.charge(start, 5000);
        let delay = limiter.delay(start).unwrap();
        assert!(delay > Duration::from_secs(4) && delay <= Duration::from_secs(5));
        assert_eq!(limiter.delay(start + delay), None);
    }

    #[test]
    fn extreme_numbers() {
        assert_eq!(Rate::new(0, 1), None);
        assert_eq!(Rate::new(1, 0), None);
        assert_eq!(Rate::new(u64::MAX, 1), None);
        let start = Instant::now();
        let slow = limits(Some((1, 1 << 53)), Some((1, 1)));
        let limiter = Limiter::new(&slow, start).unwrap();
        limiter.charge(start, u64::MAX);
        limiter.charge(start, u64::MAX);
        assert!(limiter.delay(start).unwrap() > Duration::from_secs(1 << 33));
        assert_eq!(Limiter::new(&RateLimits::default(), start).map(drop), None);
    }
}
