//! What each sector of a disk may hold when whoever writes it is cut off.

use std::collections::VecDeque;
use std::ops::Range;

use crate::content;

/// What is written with a request: a number of its own, and whether it is zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stamp {
    number: u64,
    zero: bool,
}

impl Stamp {
    /// That of data which somebody else has filled with this seed.
    pub fn of_seed(number: u64) -> Self {
        let zero = false;
        Self { number, zero }
    }
}

/// What has been asked of a disk, and what of it is durable.
#[derive(Clone)]
pub struct History {
    /// Of each sector: the stamp that is durable, and those written since.
    possible: Vec<Vec<Stamp>>,
    /// Writes that are complete, but not durable.
    complete: VecDeque<(Range<u64>, Stamp)>,
    /// How many are durable.
    durable: usize,
    next: u64,
}

impl History {
    /// A disk of zeros.
    pub fn new(sectors: u64) -> Self {
        let (number, zero) = (0, true);
        Self {
            possible: vec![vec![Stamp { number, zero }]; sectors as usize],
            complete: VecDeque::new(),
            durable: 0,
            next: 1,
        }
    }

    /// A new stamp.
    pub fn stamp(&mut self, zero: bool) -> Stamp {
        let number = self.next;
        self.next += 1;
        Stamp { number, zero }
    }

    /// A request is on its way that will change these sectors.
    pub fn begin(&mut self, sectors: Range<u64>, stamp: Stamp) {
        for sector in sectors {
            self.possible[sector as usize].push(stamp);
        }
    }

    /// It has been answered.
    pub fn complete(&mut self, sectors: Range<u64>, stamp: Stamp) {
        self.complete.push_back((sectors, stamp));
    }

    /// How many writes are complete so far: those that a flush sent now makes durable.
    pub fn before_flush(&self) -> usize {
        self.durable + self.complete.len()
    }

    /// A flush has been answered before which so many writes were complete.
    pub fn flushed(&mut self, writes: usize) {
        // They may be already, by a later flush.
        while self.durable < writes {
            self.durable += 1;
            let Some((sectors, stamp)) = self.complete.pop_front() else {
                return;
            };
            for sector in sectors {
                let possible = &mut self.possible[sector as usize];
                if let Some(at) = possible.iter().position(|other| *other == stamp) {
                    possible.drain(..at);
                }
            }
        }
    }

    /// Compares the disk with it. From then on each sector holds what has been found.
    pub fn judge(&mut self, disk: &[u8]) -> Result<(), String> {
        self.durable += self.complete.len();
        self.complete.clear();
        let sectors = disk.chunks_exact(content::SECTOR_SIZE).zip(0..);
        for ((found, sector), possible) in sectors.zip(&mut self.possible) {
            let stamp = possible
                .iter()
                .rev()
                .find(|stamp| found == sector_of(sector, **stamp));
            let Some(&stamp) = stamp else {
                return Err(format!(
                    "sector {sector} holds {:x?}…, and may hold the stamps {possible:?}",
                    &found[..16]
                ));
            };
            *possible = vec![stamp];
        }
        Ok(())
    }
}

/// The content of a sector that has been written with a stamp.
fn sector_of(sector: u64, stamp: Stamp) -> [u8; content::SECTOR_SIZE] {
    let mut data = [0; content::SECTOR_SIZE];
    fill(&mut data, sector, stamp);
    data
}

/// Fills whole sectors.
pub fn fill(data: &mut [u8], sector: u64, stamp: Stamp) {
    match stamp.zero {
        true => data.fill(0),
        false => content::fill(data, sector, stamp.number),
    }
}

#[test]
fn what_is_flushed_must_be_there_and_what_is_not_may() {
    let mut history = History::new(2);
    let zero = history.possible[0][0];
    let (one, two) = (history.stamp(false), history.stamp(false));
    history.begin(0..2, one);
    history.complete(0..2, one);
    let before = history.before_flush();
    history.begin(0..1, two);
    history.flushed(before);
    for (stamps, may_be) in [
        ([one, one], true),
        ([two, one], true),
        ([zero, one], false),
        ([two, zero], false),
        ([two, two], false),
    ] {
        let disk = [sector_of(0, stamps[0]), sector_of(1, stamps[1])].concat();
        assert_eq!(history.clone().judge(&disk).is_ok(), may_be, "{stamps:?}");
    }
}
