//! The same work in instructions, which do not depend on what else the machine does.

use super::requests::{goals, role, text};
use crate::child;
use crate::image::Kind;
use crate::measure::{Goal, Line, Series, Unit};
use crate::one::Scenario;
use crate::suite::Suite;
use crate::target::Who;

const REQUESTS: usize = 2000;

pub fn rows(suite: &mut Suite) {
    for (scenario, name) in [(Scenario::Read, "read"), (Scenario::Overwrite, "overwrite")] {
        for kind in Kind::ALL {
            let of_peers = goals(kind)
                .iter()
                .filter(|goal| matches!(goal, Goal::PartOfPeer(_)));
            let goals: Vec<_> = of_peers.copied().collect();
            let line = measure(suite, scenario, kind, text(name, kind));
            suite.add(line.goals(&goals));
        }
    }
    for kind in Kind::ALL {
        let text = text("first write and a flush at the end", kind);
        let line = measure(suite, Scenario::Allocate, kind, text);
        suite.add(line);
    }
    let text = "4 KiB random first write over a backing file".to_owned();
    let line = measure(suite, Scenario::Copy, Kind::Overlay, text);
    suite.add(line);
}

fn measure(suite: &Suite, scenario: Scenario, kind: Kind, text: String) -> Line {
    let dir = suite.memory();
    // What data the engine leaves out, it has to put zeros around when it allocates.
    let is_there = matches!(scenario, Scenario::Read | Scenario::Overwrite);
    let takes_part = |who: &Who| who.knows(kind) && (is_there || *who != Who::Alone);
    let series = Who::ALL.into_iter().filter(takes_part).map(|who| {
        let path = dir.path().join(who.name());
        let arguments = child::one(scenario, who, kind, &path, REQUESTS);
        let counted = child::instructions(&arguments, dir.path());
        Series::new(who.name(), role(who), vec![counted / REQUESTS as f64])
    });
    Line::new(text, Unit::Instructions, series.collect())
}
