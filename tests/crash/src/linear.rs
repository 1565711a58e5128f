//! Whether what several threads saw of a sector can have happened one thing after the other.

use std::collections::BTreeMap;

/// A read or write of a sector, between two moments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Access {
    pub begun: u64,
    pub ended: u64,
    /// What was written or seen: no two writes have the same, but for 0.
    pub stamp: u64,
    pub is_write: bool,
}

/// When a value was there at least, or at most.
#[derive(Clone, Copy, Debug)]
struct Zone {
    /// The first end of an access to the value.
    first_end: u64,
    /// The last begin of one.
    last_begin: u64,
}

/// Checks that every read of a sector, which held `initial` at moment 0, returned what the last write
/// before it had written, each access taking place at some moment between its begin and its end
/// (Gibbons and Korach, "Testing shared memories": each value has a zone, and zones must not overlap in
/// a certain way). Zeros, which many write, are seen by whoever has no reason to see something else.
///
/// # Errors
/// What cannot be.
pub fn check(initial: u64, accesses: &[Access]) -> Result<(), String> {
    let first = Access {
        begun: 0,
        ended: 0,
        stamp: initial,
        is_write: true,
    };
    let all = || std::iter::once(&first).chain(accesses);
    let writes: Vec<&Access> = all().filter(|access| access.is_write).collect();
    for read in accesses.iter().filter(|access| !access.is_write) {
        let possible = |write: &&&Access| {
            let is_over = |other: &&Access| other.begun > write.ended && other.ended < read.begun;
            write.stamp == read.stamp && write.begun < read.ended && !writes.iter().any(is_over)
        };
        if !writes.iter().any(|write| possible(&write)) {
            return Err(format!("{read:x?} cannot have seen that: {writes:x?}"));
        }
    }
    let mut zones: BTreeMap<u64, Zone> = BTreeMap::new();
    for access in all().filter(|access| access.stamp != 0) {
        let zone = zones.entry(access.stamp).or_insert(Zone {
            first_end: u64::MAX,
            last_begin: 0,
        });
        zone.first_end = zone.first_end.min(access.ended);
        zone.last_begin = zone.last_begin.max(access.begun);
    }
    let zones: Vec<Zone> = zones.into_values().collect();
    for (i, a) in zones.iter().enumerate().filter(|(_, a)| a.is_forward()) {
        for (j, b) in zones.iter().enumerate() {
            let (start, end) = (b.first_end.min(b.last_begin), b.first_end.max(b.last_begin));
            let overlaps = start < a.last_begin && a.first_end < end;
            let lies_in = a.first_end < start && end < a.last_begin;
            if i != j && (b.is_forward() && overlaps || lies_in) {
                return Err(format!("one value after the other, and back: {a:?}, {b:?}"));
            }
        }
    }
    Ok(())
}

impl Zone {
    /// The value was there all the time between.
    fn is_forward(&self) -> bool {
        self.first_end < self.last_begin
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(begun: u64, ended: u64, stamp: u64) -> Access {
        Access {
            begun,
            ended,
            stamp,
            is_write: true,
        }
    }

    fn read(begun: u64, ended: u64, stamp: u64) -> Access {
        Access {
            is_write: false,
            ..write(begun, ended, stamp)
        }
    }

    #[test]
    fn what_can_be_is_told_from_what_cannot() {
        let concurrent = [write(1, 10, 1), write(2, 11, 2)];
        let with = |reads: &[Access]| check(0, &[&concurrent, reads].concat());
        with(&[read(12, 13, 1), read(14, 15, 1)]).unwrap();
        with(&[read(3, 4, 0), read(5, 6, 2), read(7, 8, 2)]).unwrap();
        with(&[read(3, 4, 1), read(5, 6, 2), read(12, 13, 2)]).unwrap();
        // A value that came and went comes back.
        with(&[read(3, 4, 1), read(5, 6, 2), read(12, 13, 1)]).unwrap_err();
        with(&[read(12, 13, 1), read(14, 15, 2)]).unwrap_err();
        // What was there at first, too.
        with(&[read(12, 13, 0)]).unwrap_err();
        // Nobody wrote that, or not yet.
        with(&[read(12, 13, 3)]).unwrap_err();
        check(0, &[read(1, 2, 1), write(3, 4, 1)]).unwrap_err();
        // Zeros that are older than something else that is complete.
        check(5, &[write(1, 2, 0), write(3, 4, 1), read(5, 6, 0)]).unwrap_err();
        check(5, &[write(1, 2, 0), write(3, 6, 1), read(5, 7, 0)]).unwrap();
    }
}
