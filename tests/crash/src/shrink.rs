//! Makes what leads to a broken promise smaller.

use crate::explore::Found;
use crate::workload::Op;

/// Leaves out operations of what was `found` as long as `fails` finds something without them.
pub fn ops(mut found: Found, fails: impl Fn(&[Op]) -> Option<Found>) -> Box<Found> {
    let mut len = found.ops.len() / 2;
    while len > 0 {
        let mut at = 0;
        while at < found.ops.len() {
            let end = found.ops.len().min(at + len);
            let rest = [&found.ops[..at], &found.ops[end..]].concat();
            match fails(&rest) {
                Some(smaller) => found = smaller,
                None => at = end,
            }
        }
        len /= 2;
    }
    Box::new(found)
}

/// Leaves out what is `chosen` as long as it `fails`: the problem then, and what is left.
pub fn choice(
    mut problem: String,
    chosen: &[bool],
    fails: impl Fn(&[bool]) -> Option<String>,
) -> (String, Vec<bool>) {
    let mut chosen = chosen.to_vec();
    for i in 0..chosen.len() {
        if std::mem::replace(&mut chosen[i], false) {
            match fails(&chosen) {
                Some(smaller) => problem = smaller,
                None => chosen[i] = true,
            }
        }
    }
    (problem, chosen)
}
