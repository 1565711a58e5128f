//! What is new about an input beside the code that it covers.

use std::sync::atomic::{AtomicU8, Ordering};

const COUNTERS: usize = 1 << 14;

/// libFuzzer looks at these as it does at the counters of the code, and clears them.
// SAFETY: only what libFuzzer takes for counters of one byte is in this section.
#[unsafe(link_section = "__libfuzzer_extra_counters")]
static SEEN: [AtomicU8; COUNTERS] = [const { AtomicU8::new(0) }; COUNTERS];

/// Tells that these go together in the input. Those that had not been seen together before make it worth
/// keeping.
pub fn note(facts: &[usize]) {
    let mix = |hash: usize, fact: &usize| (hash ^ fact).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 7;
    let place = facts.iter().fold(facts.len(), mix) % COUNTERS;
    SEEN[place].store(1, Ordering::Relaxed);
}
