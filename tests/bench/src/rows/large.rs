//! A disk of 1 TiB of which every cluster is mapped, and none has data.

use tandem_block::Preallocation;

use super::requests::{BLOCK, contender};
use crate::clock;
use crate::image::{Kind, image_with};
use crate::measure::{Goal, Line, Role, Summary, Unit};
use crate::report::shown;
use crate::suite::Suite;
use crate::target::{Who, open_file};
use crate::work::{Buffer, Random, Work, piece};

const SIZE: u64 = 1 << 40;
/// Places that are read. Each has an entry in another part of the tables.
const PLACES: usize = 30_000;
const TURN: usize = 2000;

pub fn rows(suite: &mut Suite) {
    for kind in [Kind::Raw, Kind::External, Kind::Internal] {
        let dir = suite.memory();
        let mut random = Random::new(3);
        let offsets: Vec<u64> = (0..PLACES)
            .map(|_| random.below(SIZE / BLOCK) * BLOCK)
            .collect();
        let all = [Who::Bare, Who::Tandem, Who::Imago, Who::Qcow2Rs];
        let contenders = all.into_iter().filter(|who| who.knows(kind)).map(|who| {
            let path = image_with(
                &dir.path().join(who.name()),
                kind,
                SIZE,
                Preallocation::Metadata,
            );
            if who == Who::Bare {
                open_file(&path.with_file_name("bare"))
                    .set_len(SIZE)
                    .unwrap();
            }
            let target = who.open(&path, kind);
            let mut buffer = Buffer::new(BLOCK as usize);
            // What lies before the cache of the engine is the same for all of them then.
            Work::Read.carry_out(&*target, buffer.bytes(), &offsets);
            let offsets = &offsets;
            contender(who, move |turn| {
                let offsets = piece(offsets, TURN, turn);
                Work::Read.time(clock::thread, &*target, buffer.bytes(), offsets)
            })
        });
        let series = suite.turns(5).run(contenders.collect());
        let work = format!("4 KiB random read, 1 TiB all mapped, {}", kind.name());
        let mut line = Line::new(work, Unit::Nanoseconds, series).goal(Goal::TimesPeers(3.0));
        let above = line.of(Role::Tandem).and_then(|own| line.above_bare(own));
        if let (Some(above), true) = (above, kind != Kind::Raw) {
            // The tables have 128 MiB, and the cache has 4 MiB.
            let miss = shown(Summary::of(&above).median, line.unit);
            line.note = format!("a miss costs {miss}");
        }
        suite.add(line);
    }
}
