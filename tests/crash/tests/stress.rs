//! Threads that use one disk at the same time, for seconds, or for as many as `TANDEM_STRESS_SECONDS`
//! says.

use std::time::{Duration, Instant};

use tandem_crash::stress::{SETUPS, run};

#[test]
fn what_threads_see_can_have_happened_one_after_the_other() {
    let seconds = std::env::var("TANDEM_STRESS_SECONDS");
    let seconds = seconds.ok().and_then(|seconds| seconds.parse().ok());
    let begun = Instant::now();
    let mut judged = 0;
    for seed in 0.. {
        for setup in SETUPS {
            judged += run(&setup, seed, 6).unwrap_or_else(|e| panic!("{setup}, seed {seed}: {e}"));
        }
        if begun.elapsed() >= Duration::from_secs(seconds.unwrap_or(0)) {
            break;
        }
    }
    println!("{judged} accesses to sectors judged");
    assert!(judged > 10_000);
}
