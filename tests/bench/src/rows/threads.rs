//! Several threads on one image.

use std::sync::Barrier;
use std::thread;

use crate::clock;
use crate::image::{Kind, image};
use crate::measure::{Contender, Goal, Line, Unit};
use crate::suite::Suite;
use crate::target::{self, Target, open_file};
use crate::work::{Buffer, Work, fill, piece, shuffled};

use super::requests::{BLOCK, SIZE};

const THREADS: usize = 4;
/// Requests of all threads in a turn.
const TURN: usize = 40_000;

pub fn rows(suite: &mut Suite) {
    for kind in [Kind::Raw, Kind::Internal] {
        let dir = suite.memory();
        let open = |name: &str| image(&dir.path().join(name), kind, SIZE);
        let tandem = target::tandem(&open("tandem"));
        let imago = target::imago(&open("imago"));
        let bare = open_file(&dir.path().join("bare"));
        let all: [&dyn Target; 3] = [&tandem, &imago, &bare];
        all.iter().for_each(|target| fill(*target, SIZE));
        let contenders = vec![
            Contender::tandem(|turn| measure(&tandem, THREADS, turn)),
            Contender::aside("one thread", |turn| measure(&tandem, 1, turn)),
            Contender::peer("imago", |turn| measure(&imago, THREADS, turn)),
            Contender::bare(|turn| measure(&bare, THREADS, turn)),
            Contender::aside("bare, one thread", |turn| measure(&bare, 1, turn)),
        ];
        let series = suite.turns(3).run(contenders);
        let text = format!(
            "4 KiB random reads and writes, four threads, {}",
            kind.name()
        );
        let line = Line::new(text, Unit::Nanoseconds, series);
        suite.add(line.goal(Goal::Times("one thread", 1.9)));
    }
}

/// Time that goes by for a request, where so many threads share them.
fn measure(target: &(impl Target + Sync), threads: usize, turn: usize) -> f64 {
    let offsets = shuffled(SIZE, BLOCK);
    let offsets = piece(&offsets, TURN, turn);
    let barrier = Barrier::new(threads + 1);
    thread::scope(|scope| {
        let workers: Vec<_> = offsets
            .chunks(TURN / threads)
            .map(|offsets| {
                let barrier = &barrier;
                scope.spawn(move || {
                    let mut buffer = Buffer::new(BLOCK as usize);
                    barrier.wait();
                    Work::Mixed.carry_out(target, buffer.bytes(), offsets);
                })
            })
            .collect();
        barrier.wait();
        let before = clock::wall();
        workers
            .into_iter()
            .for_each(|worker| worker.join().unwrap());
        (clock::wall() - before) / TURN as f64
    })
}
