//! 1 MiB at a time, one behind the other, over mappings that are in order or in pieces.

use std::cell::RefCell;

use super::requests::contender;
use crate::clock;
use crate::floor::Floor;
use crate::image::{Kind, image};
use crate::measure::{Goal, Line, Summary, Unit};
use crate::plot::{Plot, number};
use crate::suite::Suite;
use crate::target::{Target, Who};
use crate::work::{Buffer, Work, fill, in_order, piece, shuffled};

const SIZE: u64 = 256 << 20;
const BLOCK: u64 = 1 << 20;
const CLUSTER: u64 = 64 << 10;
const TURN: usize = 4;

pub fn rows(suite: &mut Suite) {
    for (work, name) in [(Work::Read, "read"), (Work::Write, "overwrite")] {
        for kind in [Kind::Raw, Kind::External, Kind::Internal, Kind::Packed] {
            let text = format!("1 MiB sequential {name}, {}", kind.name());
            let line = measure(suite, text, work, kind, None);
            suite.add(line);
        }
        let text = format!("1 MiB sequential {name}, internal, in pieces of 64 KiB");
        let line = measure(suite, text, work, Kind::Internal, Some(1));
        suite.add(line);
    }
}

/// What a request costs that is made of more and more pieces.
pub fn plot(suite: &mut Suite) {
    let mut curves = [
        ("bare", Vec::new()),
        ("Tandem", Vec::new()),
        ("imago", Vec::new()),
    ];
    for pieces in [1, 2, 4, 8, 16] {
        let run = BLOCK / CLUSTER / pieces;
        let text = format!("1 MiB sequential read, internal, {pieces} pieces");
        let line = measure(suite, text, Work::Read, Kind::Internal, Some(run));
        for (name, points) in &mut curves {
            let samples = match *name {
                "bare" => line.bare(),
                _ => line.named(name).map(|series| series.samples.as_slice()),
            };
            let median = Summary::of(samples.unwrap_or_default()).median;
            points.push((pieces as f64, median / 1000.0));
        }
        suite.add(line);
    }
    suite.plots.push(Plot {
        name: "fragmentation",
        title: "Reading 1 MiB of an internal image that lies in several pieces",
        x: "pieces",
        y: "processor time, µs",
        is_log_y: false,
        marks: number,
        curves: curves
            .map(|(name, points)| (name.to_owned(), points))
            .into(),
    });
}

/// The bare system calls are one for each piece.
fn measure(suite: &Suite, text: String, work: Work, kind: Kind, run: Option<u64>) -> Line {
    let dir = suite.memory();
    let offsets = in_order(SIZE, BLOCK);
    let all = [Who::Tandem, Who::Imago, Who::Qcow2Rs];
    let buffer = RefCell::new(Buffer::new(BLOCK as usize));
    let mut contenders = Vec::new();
    for who in all.into_iter().filter(|who| who.knows(kind)) {
        let path = image(&dir.path().join(who.name()), kind, SIZE);
        let target = who.open(&path, kind);
        if let Some(clusters) = run {
            allocate(&*target, clusters);
        }
        fill(&*target, SIZE);
        let floor = Floor::new(&path, kind, &offsets, BLOCK);
        let (offsets, buffer) = (&offsets, &buffer);
        let contender = contender(who, move |turn| {
            let offsets = piece(offsets, TURN, turn);
            work.time(
                clock::thread,
                &*target,
                buffer.borrow_mut().bytes(),
                offsets,
            )
        });
        contenders.push(contender.with_floor(move |turn| {
            floor.time(clock::thread, work, buffer.borrow_mut().bytes(), TURN, turn)
        }));
    }
    let series = suite.turns(25).run(contenders);
    Line::new(text, Unit::Nanoseconds, series).goal(Goal::OfBare(0.99))
}

/// Gives runs of so many clusters their places in a random order.
fn allocate(target: &dyn Target, clusters: u64) {
    let length = clusters * CLUSTER;
    let mut buffer = Buffer::new(length as usize);
    for at in shuffled(SIZE, length) {
        target.write(buffer.bytes(), at);
    }
}
