//! What a small write to a new cluster and a flush have written, traced from outside.

use std::path::Path;
use std::process::Command;

use super::requests::{BLOCK, role};
use crate::child::{self, Written};
use crate::image::Kind;
use crate::measure::{Goal, Line, Role, Series, Unit};
use crate::one::Scenario;
use crate::suite::Suite;
use crate::target::Who;
use crate::work::shuffled;

const REQUESTS: usize = 200;

type Figure = fn(&Written) -> f64;

pub fn rows(suite: &mut Suite) {
    for kind in [Kind::Raw, Kind::External, Kind::Internal, Kind::Packed] {
        let dir = suite.memory();
        let all = [Who::Bare, Who::Tandem, Who::Imago, Who::Qcow2Rs];
        let mut written: Vec<_> = all
            .into_iter()
            .filter(|who| who.knows(kind))
            .map(|who| {
                let path = dir.path().join(who.name());
                let arguments = child::one(Scenario::AllocateFlushed, who, kind, &path, REQUESTS);
                (
                    who.name(),
                    role(who),
                    child::written(&arguments, dir.path()),
                )
            })
            .collect();
        if kind != Kind::Packed {
            written.push(("QEMU", Role::Peer, qemu(dir.path(), kind)));
        }
        let text = |what| format!("4 KiB first write and flush, {}: {what}", kind.name());
        let figures: [(_, _, Figure); 3] = [
            ("written", Unit::Kib, |written| written.bytes / 1024.0),
            ("writes", Unit::Count, |written| written.writes),
            ("syncs", Unit::Count, |written| written.syncs),
        ];
        for (what, unit, of) in figures {
            let series = written.iter().map(|(name, role, written)| {
                Series::new(name, *role, vec![of(written) / REQUESTS as f64])
            });
            let mut line = Line::new(text(what), unit, series.collect());
            match what {
                "written" => line.goals.push(Goal::AtMost(12.0)),
                "writes" => line.goals.push(Goal::AtMost(3.0)),
                // As many as the promises need; nobody can do with fewer than one.
                _ => {}
            }
            suite.add(line);
        }
    }
}

/// `qemu-io`, with the little that it writes when it opens and closes the image.
fn qemu(dir: &Path, kind: Kind) -> Written {
    let image = dir.join("qemu.qcow2");
    let size = REQUESTS as u64 * (64 << 10);
    let mut create = Command::new("qemu-img");
    create.args(["create", "-q", "-f", "qcow2"]);
    if kind.has_data_file() {
        let raw = if kind == Kind::Raw { "on" } else { "off" };
        let data = dir.join("qemu.data");
        create
            .arg("-o")
            .arg(format!("data_file={},data_file_raw={raw}", data.display()));
    }
    child::run(create.arg(&image).arg(size.to_string()));
    let mut arguments: Vec<String> = ["qemu-io", "-f", "qcow2", "-t", "writeback"]
        .map(String::from)
        .into();
    for at in shuffled(size, 64 << 10) {
        arguments.extend(["-c".into(), format!("write -q {at} {BLOCK}")]);
        arguments.extend(["-c".into(), "flush".into()]);
    }
    arguments.push(image.display().to_string());
    child::written(&arguments, dir)
}
