//! Small requests to clusters that are there, and what they cost above the bare system calls.

use std::cell::RefCell;

use tempfile::TempDir;

use crate::clock;
use crate::floor::Floor;
use crate::image::{Kind, add_bitmaps, image};
use crate::measure::{Contender, Goal, Line, Role, Series, Unit};
use crate::suite::Suite;
use crate::target::Who;
use crate::work::{Buffer, Work, fill, piece, shuffled};

/// Of the disk. All images of a line are in memory at once.
pub const SIZE: u64 = 512 << 20;
pub const BLOCK: u64 = 4096;
/// Requests of a turn.
const TURN: usize = 1000;

pub fn rows(suite: &mut Suite) {
    for (work, name) in [(Work::Read, "read"), (Work::Write, "overwrite")] {
        for kind in Kind::ALL {
            let series = measure(suite, suite.memory(), kind, work, 0);
            suite.add(Line::new(text(name, kind), Unit::Nanoseconds, series).goals(goals(kind)));
        }
    }
}

/// `4 KiB random read, packed`.
pub fn text(name: &str, kind: Kind) -> String {
    format!("4 KiB random {name}, {}", kind.name())
}

pub fn goals(kind: Kind) -> &'static [Goal] {
    match kind {
        Kind::Raw => &[Goal::AboveBare(30.0)],
        // No peer knows it.
        Kind::Packed => &[Goal::AboveBare(60.0)],
        _ => &[Goal::AboveBare(60.0), Goal::PartOfPeer(1.0 / 3.0)],
    }
}

/// Overwrites while bitmaps follow them, and requests that are to be left alone if they would wait.
pub fn variants(suite: &mut Suite) {
    for bitmaps in [1, 4] {
        for kind in [Kind::Raw, Kind::Internal] {
            let series = measure(suite, suite.memory(), kind, Work::Write, bitmaps);
            let name = format!("{}, {bitmaps} bitmaps", text("overwrite", kind));
            suite.add(Line::new(name, Unit::Nanoseconds, series));
        }
    }
    for (work, name) in [(Work::TryRead, "read"), (Work::TryWrite, "overwrite")] {
        for kind in [Kind::Raw, Kind::Internal] {
            // Files in memory cannot tell what would wait.
            let series = measure(suite, suite.disk(), kind, work, 0);
            let name = format!("{}, without waiting", text(name, kind));
            suite.add(Line::new(name, Unit::Nanoseconds, series));
        }
    }
}

/// Each has an image of its own, filled, and a [floor](Floor) on its file.
fn measure(suite: &Suite, dir: TempDir, kind: Kind, work: Work, bitmaps: usize) -> Vec<Series> {
    // Peers do not know how not to wait.
    let all: &[Who] = match work {
        Work::TryRead | Work::TryWrite => &[Who::Tandem, Who::Alone],
        _ => &[Who::Tandem, Who::Imago, Who::Qcow2Rs, Who::Alone],
    };
    let offsets = shuffled(SIZE, BLOCK);
    // All use the same memory, as it makes a difference, too, how that lies.
    let buffer = RefCell::new(Buffer::new(BLOCK as usize));
    let mut contenders = Vec::new();
    for who in all.iter().copied().filter(|who| who.knows(kind)) {
        let path = image(&dir.path().join(who.name()), kind, SIZE);
        if bitmaps > 0 && matches!(who, Who::Tandem | Who::Alone) {
            add_bitmaps(&path, bitmaps);
        }
        let target = who.open(&path, kind);
        fill(&*target, SIZE);
        let (all, buffer) = (&offsets, &buffer);
        let run = move |turn| {
            let offsets = piece(all, TURN, turn);
            work.time(
                clock::thread,
                &*target,
                buffer.borrow_mut().bytes(),
                offsets,
            )
        };
        let contender = contender(who, run);
        contenders.push(match who {
            Who::Alone => contender,
            _ => {
                let floor = Floor::new(&path, kind, all, BLOCK);
                contender.with_floor(move |turn| {
                    floor.time(clock::thread, work, buffer.borrow_mut().bytes(), TURN, turn)
                })
            }
        });
    }
    suite.turns(25).run(contenders)
}

/// Somebody with the part that he has.
pub fn contender<'a>(who: Who, run: impl FnMut(usize) -> f64 + 'a) -> Contender<'a> {
    Contender::new(who.name(), role(who), run)
}

pub fn role(who: Who) -> Role {
    match who {
        Who::Bare => Role::Bare,
        Who::Tandem => Role::Tandem,
        Who::Imago | Who::Qcow2Rs => Role::Peer,
        Who::Alone => Role::Aside,
    }
}
