//! What is measured, in turns, and how it is judged.

use std::cmp::Ordering;

use crate::report::shown;

/// Who does the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// The system calls alone: the limit.
    Bare,
    Tandem,
    /// Somebody else who does the same.
    Peer,
    /// What explains the others, and is compared with nobody.
    Aside,
}

/// Somebody who does the work when it is his turn.
pub struct Contender<'a> {
    name: &'static str,
    role: Role,
    run: Box<dyn FnMut(usize) -> f64 + 'a>,
    floor: Option<Box<dyn FnMut(usize) -> f64 + 'a>>,
}

impl<'a> Contender<'a> {
    /// `run` does a turn, whose number it is told, and returns what was measured.
    pub fn new(name: &'static str, role: Role, run: impl FnMut(usize) -> f64 + 'a) -> Self {
        Self {
            name,
            role,
            run: Box::new(run),
            floor: None,
        }
    }

    /// `floor` makes only the system calls that a turn comes down to, on the same files.
    pub fn with_floor(mut self, floor: impl FnMut(usize) -> f64 + 'a) -> Self {
        self.floor = Some(Box::new(floor));
        self
    }

    pub fn bare(run: impl FnMut(usize) -> f64 + 'a) -> Self {
        Self::new("bare", Role::Bare, run)
    }

    pub fn tandem(run: impl FnMut(usize) -> f64 + 'a) -> Self {
        Self::new("Tandem", Role::Tandem, run)
    }

    pub fn peer(name: &'static str, run: impl FnMut(usize) -> f64 + 'a) -> Self {
        Self::new(name, Role::Peer, run)
    }

    pub fn aside(name: &'static str, run: impl FnMut(usize) -> f64 + 'a) -> Self {
        Self::new(name, Role::Aside, run)
    }
}

/// What somebody's rounds have shown, one figure each.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: String,
    pub role: Role,
    pub samples: Vec<f64>,
    /// What the bare system calls have taken on the same files, if that was measured.
    pub floor: Vec<f64>,
}

impl Series {
    pub fn new(name: &str, role: Role, samples: Vec<f64>) -> Self {
        Self {
            name: name.to_owned(),
            role,
            samples,
            floor: Vec::new(),
        }
    }
}

/// How work is divided into turns.
#[derive(Clone, Copy, Debug)]
pub struct Turns {
    pub rounds: usize,
    /// Turns that each has in a round, of which the median counts.
    pub pieces: usize,
}

impl Turns {
    /// Lets all do their turns, A B C A B C …. Who comes first changes, as the first finds the
    /// processor's caches full of something else.
    pub fn run(self, mut contenders: Vec<Contender<'_>>) -> Vec<Series> {
        let count = contenders.len();
        let new =
            |contender: &Contender<'_>| Series::new(contender.name, contender.role, Vec::new());
        let mut series: Vec<_> = contenders.iter().map(new).collect();
        for round in 0..self.rounds {
            let mut pieces = vec![(Vec::new(), Vec::new()); count];
            for piece in 0..self.pieces {
                let turn = round * self.pieces + piece;
                for i in 0..count {
                    let i = (i + turn) % count;
                    let Contender { run, floor, .. } = &mut contenders[i];
                    let (samples, above) = &mut pieces[i];
                    match floor {
                        Some(floor) => {
                            let [bare, difference] = side_by_side(run, floor, turn);
                            samples.push(bare);
                            above.push(difference);
                        }
                        None => samples.push(run(turn)),
                    }
                }
            }
            for (series, (samples, above)) in series.iter_mut().zip(pieces) {
                let median = Summary::of(&samples).median;
                if above.is_empty() {
                    series.samples.push(median);
                } else {
                    series.samples.push(median + Summary::of(&above).median);
                    series.floor.push(median);
                }
            }
        }
        series
    }
}

/// What the floor of turn `turn` takes, and how much more the work does. Both are done twice, one of them
/// first and last, so that what changes meanwhile, or is left in the processor's caches, tells on both.
fn side_by_side<'a>(
    run: &'a mut dyn FnMut(usize) -> f64,
    floor: &'a mut dyn FnMut(usize) -> f64,
    turn: usize,
) -> [f64; 2] {
    // Requests of another turn each time, as the data of the last are in the processor's caches.
    let number = 5 * turn;
    // The one before all finds what the system has of the file far away, and is not counted.
    floor(number);
    let (outer, inner) = if turn.is_multiple_of(2) {
        (floor, run)
    } else {
        (run, floor)
    };
    let first = outer(number + 1);
    let between = inner(number + 2) + inner(number + 3);
    let around = first + outer(number + 4);
    let [bare, own] = if turn.is_multiple_of(2) {
        [around, between]
    } else {
        [between, around]
    };
    [bare / 2.0, (own - bare) / 2.0]
}

/// Median and spread.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Summary {
    pub median: f64,
    pub min: f64,
    pub max: f64,
}

impl Summary {
    pub fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |place: usize| sorted.get(place).copied().unwrap_or(f64::NAN);
        let middle = (at((sorted.len().max(1) - 1) / 2) + at(sorted.len() / 2)) / 2.0;
        Self {
            median: middle,
            min: at(0),
            max: at(sorted.len().max(1) - 1),
        }
    }
}

/// What figures are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    Nanoseconds,
    /// User-space instructions.
    Instructions,
    Seconds,
    Kib,
    /// Just a number.
    Count,
}

/// What has to come out of a line.
#[derive(Clone, Copy, Debug)]
pub enum Goal {
    /// Tandem takes at most so much more than the bare system calls.
    AboveBare(f64),
    /// What it takes more is at most this part of what the best peer takes more.
    PartOfPeer(f64),
    /// Its speed is at least this part of that of the bare system calls.
    OfBare(f64),
    /// It is at least so many times as fast as every peer.
    TimesPeers(f64),
    /// It is at least so many times as fast as whoever has this name.
    Times(&'static str, f64),
    /// It is at most this.
    AtMost(f64),
}

/// A goal, and what has come of it.
#[derive(Clone, Debug)]
pub struct Verdict {
    pub goal: String,
    pub figure: Summary,
    pub unit: Unit,
    pub met: bool,
}

/// A line of the table.
#[derive(Clone, Debug)]
pub struct Line {
    pub row: &'static str,
    pub work: String,
    pub unit: Unit,
    pub series: Vec<Series>,
    pub goals: Vec<Goal>,
    /// What is to be known beside the figures.
    pub note: String,
}

impl Line {
    pub fn new(work: impl Into<String>, unit: Unit, series: Vec<Series>) -> Self {
        Self {
            row: "",
            work: work.into(),
            unit,
            series,
            goals: Vec::new(),
            note: String::new(),
        }
    }

    pub fn goal(mut self, goal: Goal) -> Self {
        self.goals.push(goal);
        self
    }

    pub fn goals(mut self, goals: &[Goal]) -> Self {
        self.goals.extend_from_slice(goals);
        self
    }

    pub fn note(mut self, note: impl Into<String>) -> Self {
        self.note = note.into();
        self
    }

    pub fn of(&self, role: Role) -> Option<&Series> {
        self.series.iter().find(|series| series.role == role)
    }

    pub fn named(&self, name: &str) -> Option<&Series> {
        self.series.iter().find(|series| series.name == name)
    }

    /// The one that has the smallest median.
    fn best_peer(&self) -> Option<&Series> {
        let median = |series: &&Series| Summary::of(&series.samples).median;
        let peers = self.series.iter().filter(|s| s.role == Role::Peer);
        peers.min_by(|a, b| median(a).total_cmp(&median(b)))
    }

    /// What the bare system calls have taken that somebody is compared with.
    pub fn bare(&self) -> Option<&[f64]> {
        self.bare_of(self.of(Role::Tandem)?)
    }

    fn bare_of<'a>(&'a self, series: &'a Series) -> Option<&'a [f64]> {
        match series.floor.as_slice() {
            [] => Some(&self.of(Role::Bare)?.samples),
            floor => Some(floor),
        }
    }

    /// What somebody takes above the bare system calls, in each round.
    pub fn above_bare(&self, series: &Series) -> Option<Vec<f64>> {
        let pairs = series.samples.iter().zip(self.bare_of(series)?);
        Some(pairs.map(|(own, bare)| own - bare).collect())
    }

    /// How many times as fast as `other` Tandem is.
    fn speed(&self, other: &[f64]) -> Option<Summary> {
        let pairs = self.of(Role::Tandem)?.samples.iter().zip(other);
        let figures: Vec<_> = pairs.map(|(tandem, other)| other / tandem).collect();
        Some(Summary::of(&figures))
    }

    /// What has come of the goals; those that cannot be judged are left out.
    pub fn verdicts(&self) -> Vec<Verdict> {
        self.goals
            .iter()
            .filter_map(|goal| self.judge(*goal))
            .collect()
    }

    fn judge(&self, goal: Goal) -> Option<Verdict> {
        let tandem = self.of(Role::Tandem)?;
        let at_most = |figure: Summary, bound: f64, unit, goal| Verdict {
            goal,
            figure,
            unit,
            met: figure.median <= bound,
        };
        let at_least = |figure: Summary, bound: f64, goal| Verdict {
            goal,
            figure,
            unit: Unit::Count,
            met: figure.median >= bound,
        };
        Some(match goal {
            Goal::AboveBare(bound) => {
                let figure = Summary::of(&self.above_bare(tandem)?);
                let text = format!("≤ {} above bare", shown(bound, self.unit));
                at_most(figure, bound, self.unit, text)
            }
            Goal::PartOfPeer(bound) => {
                let above = |series: &Series| Some(Summary::of(&self.above_bare(series)?).median);
                let peers = self
                    .series
                    .iter()
                    .filter(|series| series.role == Role::Peer);
                let by_cost = |a: &&Series, b: &&Series| above(a).partial_cmp(&above(b));
                let best = peers.min_by(|a, b| by_cost(a, b).unwrap_or(Ordering::Equal))?;
                let pairs = self.above_bare(tandem)?.into_iter();
                let pairs = pairs.zip(self.above_bare(best)?);
                let parts: Vec<_> = pairs.map(|(own, peer)| own / peer).collect();
                let text = format!("≤ {bound:.2} of {} above bare", best.name);
                at_most(Summary::of(&parts), bound, Unit::Count, text)
            }
            Goal::OfBare(bound) => {
                let figure = self.speed(self.bare()?)?;
                at_least(figure, bound, format!("≥ {bound} of bare"))
            }
            Goal::TimesPeers(bound) => {
                let peer = self.best_peer()?;
                let figure = self.speed(&peer.samples)?;
                at_least(figure, bound, format!("≥ {bound} × {}", peer.name))
            }
            Goal::Times(name, bound) => {
                let figure = self.speed(&self.named(name)?.samples)?;
                at_least(figure, bound, format!("≥ {bound} × {name}"))
            }
            Goal::AtMost(bound) => {
                let text = format!("≤ {}", shown(bound, self.unit));
                at_most(Summary::of(&tandem.samples), bound, self.unit, text)
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn line(tandem: &[f64], bare: &[f64], peer: &[f64]) -> Line {
        let series = |name, role, samples: &[f64]| Series::new(name, role, samples.into());
        let series = vec![
            series("bare", Role::Bare, bare),
            series("Tandem", Role::Tandem, tandem),
            series("slow", Role::Peer, &[90.0, 90.0, 90.0]),
            series("peer", Role::Peer, peer),
        ];
        Line::new("work", Unit::Nanoseconds, series)
    }

    fn judged(goal: Goal, tandem: &[f64]) -> (f64, bool) {
        let line = line(tandem, &[10.0, 11.0, 12.0], &[30.0, 33.0, 42.0]).goal(goal);
        let verdict = &line.verdicts()[0];
        (verdict.figure.median, verdict.met)
    }

    #[test]
    fn goals_are_judged_by_pairs_of_the_same_round() {
        let tandem = [15.0, 16.5, 18.0];
        assert_eq!(judged(Goal::AboveBare(5.5), &tandem), (5.5, true));
        assert_eq!(judged(Goal::AboveBare(5.4), &tandem), (5.5, false));
        assert_eq!(judged(Goal::TimesPeers(2.0), &tandem), (2.0, true));
        assert_eq!(judged(Goal::TimesPeers(2.1), &tandem), (2.0, false));
        assert_eq!(
            judged(Goal::Times("slow", 5.0), &tandem),
            (90.0 / 16.5, true)
        );
        assert!(!judged(Goal::OfBare(0.7), &tandem).1);
        assert_eq!(judged(Goal::PartOfPeer(0.25), &tandem), (0.25, true));
        assert_eq!(judged(Goal::AtMost(16.0), &tandem), (16.5, false));
    }

    #[test]
    fn a_floor_of_its_own_counts_before_the_bare_system_calls() {
        let mut line = line(&[15.0], &[10.0], &[30.0]).goal(Goal::AboveBare(2.0));
        line.series[1].floor = vec![13.0];
        assert_eq!(line.verdicts()[0].figure.median, 2.0);
        line.series[3].floor = vec![22.0];
        line.goals = vec![Goal::PartOfPeer(0.3)];
        assert_eq!(line.verdicts()[0].figure.median, 0.25);
    }

    #[test]
    fn what_cannot_be_judged_is_left_out() {
        let mut line = line(&[1.0], &[1.0], &[1.0]).goal(Goal::OfBare(1.0));
        line.series.remove(0);
        assert!(line.verdicts().is_empty());
    }

    #[test]
    fn all_take_turns_and_another_one_comes_first_each_time() {
        let order = std::cell::RefCell::new(String::new());
        let contender = |name: &'static str| {
            Contender::peer(name, |turn| {
                order.borrow_mut().push_str(name);
                turn as f64
            })
        };
        let turns = Turns {
            rounds: 2,
            pieces: 2,
        };
        let series = turns.run(vec![contender("a"), contender("b")]);
        assert_eq!(*order.borrow(), "abbaabba");
        assert_eq!(series[0].samples, [0.5, 2.5]);
    }

    #[test]
    fn what_changes_meanwhile_tells_on_both() {
        let time = std::cell::Cell::new(0.0);
        let passes = |cost: f64| {
            time.set(time.get() + 10.0);
            time.get() + cost
        };
        let contender = Contender::tandem(|_| passes(3.0)).with_floor(|_| passes(0.0));
        let turns = Turns {
            rounds: 1,
            pieces: 3,
        };
        let series = &turns.run(vec![contender])[0];
        assert_eq!(series.samples[0] - series.floor[0], 3.0);
        // Of five turns in the second piece, those in the middle.
        assert_eq!(series.floor[0], f64::midpoint(80.0, 90.0));
    }
}
