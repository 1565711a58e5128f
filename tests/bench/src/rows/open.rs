//! Opening disks of 16 TiB, each time in a new process.

use std::cell::RefCell;
use std::path::Path;
use std::process::Command;

use tandem_block::Preallocation;

use super::requests::contender;
use crate::child;
use crate::image::{Kind, image_with};
use crate::measure::{Goal, Line, Series, Unit};
use crate::one::Scenario;
use crate::suite::Suite;
use crate::target::Who;

const SIZE: u64 = (16 << 40) - (1 << 20);

pub fn rows(suite: &mut Suite) {
    for (kind, is_mapped) in [
        (Kind::Raw, true),
        (Kind::External, false),
        (Kind::External, true),
        (Kind::Internal, false),
        (Kind::Internal, true),
        (Kind::Packed, false),
    ] {
        let dir = suite.memory();
        let preallocation = if is_mapped && kind != Kind::Raw {
            Preallocation::Metadata
        } else {
            Preallocation::Off
        };
        let path = image_with(&dir.path().join("disk"), kind, SIZE, preallocation);
        let mapped = if is_mapped { "all mapped" } else { "empty" };
        let text = format!("open 16 TiB, {}, {mapped}", kind.name());
        let [time, memory] = measure(suite, kind, &path);
        let line = Line::new(format!("{text}: time"), Unit::Nanoseconds, time);
        suite.add(line.goal(Goal::AtMost(1e6)));
        let line = Line::new(format!("{text}: memory"), Unit::Kib, memory);
        suite.add(line.goal(Goal::AtMost(1024.0)));
    }
}

fn measure(suite: &Suite, kind: Kind, path: &Path) -> [Vec<Series>; 2] {
    // imago takes the promise of a raw data file back.
    let all = [Who::Tandem, Who::Imago, Who::Qcow2Rs];
    let those = all.into_iter().filter(|who| match who {
        Who::Imago => kind != Kind::Raw && who.knows(kind),
        _ => who.knows(kind),
    });
    let those: Vec<_> = those.map(|who| (who, RefCell::new(Vec::new()))).collect();
    let contenders = those.iter().map(|(who, memory)| {
        let arguments = child::one(Scenario::Open, *who, kind, path, 1);
        contender(*who, move |_| {
            let output = Command::new(&arguments[0]).args(&arguments[1..]).output();
            let output = String::from_utf8(output.unwrap().stdout).unwrap();
            let figures: Vec<f64> = output
                .split_whitespace()
                .map(|word| word.parse().unwrap())
                .collect();
            memory.borrow_mut().push(figures[1]);
            figures[0]
        })
    });
    let time = suite.turns(1).run(contenders.collect());
    let memory = time.iter().zip(&those).map(|(time, (_, memory))| Series {
        samples: memory.borrow().clone(),
        ..time.clone()
    });
    let memory = memory.collect();
    [time, memory]
}
