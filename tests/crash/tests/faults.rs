//! A part of the faults that the command injects, which takes seconds.

use tandem_crash::faults::{Injected, SETUPS, explore};
use tandem_crash::live_faults;

#[test]
fn any_call_may_fail() {
    let mut injected = Injected::default();
    for setup in SETUPS {
        explore(&setup, 5, &mut injected).unwrap_or_else(|problem| panic!("{problem}"));
    }
    println!("{injected}");
    assert!(injected.faults > 500 && injected.syncs > 50);
}

#[test]
fn any_call_may_fail_in_operations_on_disks_in_use() {
    let mut injected = Injected::default();
    live_faults::explore(13, &mut injected).unwrap_or_else(|problem| panic!("{problem}"));
    println!("{injected}");
    assert!(injected.faults > 100 && injected.syncs > 20);
}
