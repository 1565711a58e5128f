//! The image tools.

use std::cell::RefCell;
use std::fs;
use std::path::Path;
use std::process::Command;

use tandem_block::Preallocation;

use crate::child::{self, Taken};
use crate::image::{Kind, image_with};
use crate::measure::{Contender, Goal, Line, Role, Series, Unit};
use crate::suite::Suite;
use crate::target::{Target, fill_image, open_file};
use crate::work::{Buffer, in_order};

const SIZE: u64 = 512 << 20;
const CP: &str = "cp --sparse";

/// Somebody who is started by a command line, in words with spaces between them.
struct Program<'a> {
    name: &'static str,
    role: Role,
    path: &'a Path,
    line: String,
}

/// Time that goes by, and processor time.
fn compare(suite: &Suite, dir: &Path, programs: &[Program<'_>], made: &[&str]) -> [Vec<Series>; 2] {
    let taken: Vec<_> = programs.iter().map(|_| RefCell::new(Vec::new())).collect();
    let contenders = programs.iter().zip(&taken).map(|(program, taken)| {
        Contender::new(program.name, program.role, move |_| {
            for name in made {
                let _ = fs::remove_file(dir.join(name));
            }
            let mut command = Command::new(program.path);
            command.args(program.line.split(' ')).current_dir(dir);
            let this = child::run(&mut command);
            taken.borrow_mut().push(this);
            this.wall
        })
    });
    let wall = suite.turns(1).run(contenders.collect());
    let processor = wall.iter().zip(&taken).map(|(wall, taken)| Series {
        samples: taken
            .borrow()
            .iter()
            .map(|taken: &Taken| taken.processor)
            .collect(),
        ..wall.clone()
    });
    let processor = processor.collect();
    [wall, processor]
}

/// A raw disk with data in half of its parts of 1 MiB, and the same as an image.
pub fn convert(suite: &mut Suite) {
    let dir = suite.memory();
    let raw = open_file(&dir.path().join("disk.raw"));
    raw.set_len(SIZE).unwrap();
    let mut buffer = Buffer::new(1 << 20);
    for (number, at) in in_order(SIZE, 1 << 20).into_iter().step_by(2).enumerate() {
        buffer.bytes().fill(number as u8 | 1);
        raw.write(buffer.bytes(), at);
    }
    let tandem = suite.program("tandem-img");
    let out = "convert -f raw -O qcow2 -o data_file=new.data,data_file_raw=on disk.raw new";
    child::run(
        Command::new(&tandem)
            .args(out.replace("new", "disk").split(' '))
            .current_dir(dir.path()),
    );
    let back = "convert -f qcow2 -O raw disk new";
    for (name, line, source) in [
        ("raw to qcow2 with a raw data file", out, "disk.raw"),
        ("qcow2 with a raw data file to raw", back, "disk.data"),
    ] {
        let program = |name, role, path, line: &str| Program {
            name,
            role,
            path,
            line: line.to_owned(),
        };
        let copy = format!("--sparse=always {source} new");
        let programs = [
            program("Tandem", Role::Tandem, tandem.as_path(), line),
            program("qemu-img", Role::Peer, Path::new("qemu-img"), line),
            program(CP, Role::Aside, Path::new("cp"), &copy),
        ];
        let [wall, processor] = compare(suite, dir.path(), &programs, &["new", "new.data"]);
        for (what, series) in [("time that goes by", wall), ("processor time", processor)] {
            let line = Line::new(format!("convert {name}: {what}"), Unit::Seconds, series);
            suite.add(line.goals(&[Goal::Times(CP, 1.0), Goal::TimesPeers(2.0)]));
        }
    }
}

/// The benchmarks that the tools bring along, in steps that come to every place sooner or later.
pub fn bench(suite: &mut Suite) {
    let dir = suite.disk();
    let own = dir.path().join("disk");
    let path = image_with(&own, Kind::Internal, SIZE, Preallocation::Off);
    fill_image(&path, SIZE);
    let tandem = suite.program("tandem-img");
    for depth in [1, 32] {
        let program = |name, role, path| Program {
            name,
            role,
            path,
            line: format!("bench -f qcow2 -t writeback -c 50000 -d {depth} -s 4k -S 1052672 image"),
        };
        let programs = [
            program("Tandem", Role::Tandem, tandem.as_path()),
            program("qemu-img", Role::Peer, Path::new("qemu-img")),
        ];
        let [wall, processor] = compare(suite, &own, &programs, &[]);
        for (what, series) in [("time that goes by", wall), ("processor time", processor)] {
            let text = format!("bench, 50000 reads of 4 KiB at depth {depth}: {what}");
            suite.add(Line::new(text, Unit::Seconds, series));
        }
    }
}

pub fn check(suite: &mut Suite) {
    for kind in [Kind::Internal, Kind::External] {
        check_kind(suite, kind);
    }
}

fn check_kind(suite: &mut Suite, kind: Kind) {
    let dir = suite.memory();
    let own = dir.path().join("disk");
    image_with(&own, kind, 1 << 40, Preallocation::Metadata);
    let tandem = suite.program("tandem-img");
    let program = |name, role, path| Program {
        name,
        role,
        path,
        line: "check -q -f qcow2 image".to_owned(),
    };
    let programs = [
        program("Tandem", Role::Tandem, tandem.as_path()),
        program("qemu-img", Role::Peer, Path::new("qemu-img")),
    ];
    let [wall, processor] = compare(suite, &own, &programs, &[]);
    for (what, series) in [("time that goes by", wall), ("processor time", processor)] {
        let text = format!("check of 1 TiB, {}, all mapped: {what}", kind.name());
        let line = Line::new(text, Unit::Seconds, series);
        suite.add(line.goal(Goal::TimesPeers(3.0)));
    }
}

/// A whole copy by `backup`.
pub fn backup(suite: &mut Suite) {
    let dir = suite.memory();
    let own = dir.path().join("disk");
    let path = image_with(&own, Kind::Internal, SIZE, Preallocation::Off);
    fill_image(&path, SIZE);
    let tandem = suite.program("tandem-img");
    for format in ["qcow2", "raw"] {
        let programs = [
            Program {
                name: "Tandem",
                role: Role::Tandem,
                path: &tandem,
                line: format!("backup -f qcow2 -O {format} image new"),
            },
            Program {
                name: "qemu-img convert",
                role: Role::Peer,
                path: Path::new("qemu-img"),
                line: format!("convert -f qcow2 -O {format} image new"),
            },
        ];
        let [wall, _] = compare(suite, &own, &programs, &["new"]);
        let text = format!("backup of an image to {format}: time that goes by");
        suite.add(Line::new(text, Unit::Seconds, wall));
    }
}
