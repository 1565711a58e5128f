//! The device without a virtual machine: requests through a queue in shared memory, over vhost-user.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use super::requests::BLOCK;
use crate::client::{Client, Taken, memory, qemu, tandem};
use crate::clock;
use crate::floor::Floor;
use crate::image::{Kind, image};
use crate::measure::{Contender, Goal, Line, Role, Series, Summary, Unit};
use crate::plot::{Plot, number};
use crate::suite::Suite;
use crate::target::fill_image;
use crate::work::{Work, in_order, shuffled};

const SIZE: u64 = 256 << 20;
const TURN: usize = 8000;

/// The servers, each with an image of its own.
struct Servers {
    clients: Vec<(&'static str, Role, RefCell<Client>)>,
    /// Tandem's image.
    own: PathBuf,
    _dir: tempfile::TempDir,
}

impl Servers {
    /// Files on a disk's file system, in the page cache: those in memory cannot tell what would wait.
    fn start(suite: &Suite) -> Self {
        let dir = suite.disk();
        let disk = |name: &str| filled(&dir.path().join(name));
        let socket = |name: &str| dir.path().join(name);
        let program = suite.program("tandem");
        let own = disk("tandem");
        let clients = vec![
            (
                "Tandem",
                Role::Tandem,
                tandem(&program, &own, ",queues=1", true, socket("a")),
            ),
            (
                "no sandbox",
                Role::Aside,
                tandem(&program, &disk("open"), ",queues=1", false, socket("b")),
            ),
            (
                "polling 20 µs",
                Role::Aside,
                tandem(
                    &program,
                    &disk("poll"),
                    ",queues=1,poll=20",
                    true,
                    socket("e"),
                ),
            ),
            (
                "QEMU",
                Role::Peer,
                qemu(&disk("qemu"), "threads", socket("c")),
            ),
            (
                "QEMU, io_uring",
                Role::Peer,
                qemu(&disk("uring"), "io_uring", socket("d")),
            ),
        ];
        Self {
            clients: clients
                .into_iter()
                .map(|(name, role, client)| (name, role, RefCell::new(client)))
                .collect(),
            own,
            _dir: dir,
        }
    }

    /// What the servers' processors do for a request, and what goes by.
    fn measure(&self, suite: &Suite, offsets: &[u64], depth: usize) -> Measured {
        let taken: Vec<_> = self
            .clients
            .iter()
            .map(|_| RefCell::new(Vec::new()))
            .collect();
        let mut contenders = Vec::new();
        let floor = Floor::new(&self.own, Kind::Internal, offsets, BLOCK);
        let memory = memory();
        contenders.push(Contender::bare(move |turn| {
            // SAFETY: so many blocks are mapped as long as `memory` is there, and nobody else uses them.
            let places =
                unsafe { std::slice::from_raw_parts_mut(memory.as_ptr(), depth * BLOCK as usize) };
            // Others than the server reads in this turn, and its last ones are not left in the caches.
            let mut time = |turn| floor.time(clock::thread, Work::TryRead, places, TURN, turn);
            time(turn + 2);
            time(turn + 4)
        }));
        for ((name, role, client), taken) in self.clients.iter().zip(&taken) {
            contenders.push(Contender::new(name, *role, move |turn| {
                let this = client.borrow_mut().turn(offsets, TURN, turn, depth);
                taken.borrow_mut().push(this);
                this.processor
            }));
        }
        let processor = suite.turns(1).run(contenders);
        let taken: Vec<Vec<Taken>> = taken.into_iter().map(RefCell::into_inner).collect();
        let wall = self
            .clients
            .iter()
            .zip(&taken)
            .map(|((name, role, _), taken)| {
                Series::new(name, *role, taken.iter().map(|taken| taken.wall).collect())
            });
        Measured {
            wall: wall.collect(),
            note: interrupts(&taken[0]),
            processor,
        }
    }
}

struct Measured {
    processor: Vec<Series>,
    wall: Vec<Series>,
    note: String,
}

fn interrupts(taken: &[Taken]) -> String {
    let median = |of: fn(&Taken) -> f64| {
        let figures: Vec<_> = taken.iter().map(of).collect();
        Summary::of(&figures).median
    };
    format!(
        "{:.2} interrupts and {:.2} doorbells for a request",
        median(|taken| taken.interrupts),
        median(|taken| taken.doorbells)
    )
}

/// An internal image in the new directory `dir`, with data everywhere.
fn filled(dir: &Path) -> std::path::PathBuf {
    let path = image(dir, Kind::Internal, SIZE);
    fill_image(&path, SIZE);
    path
}

pub fn rows(suite: &mut Suite) {
    let servers = Servers::start(suite);
    let (random, sequential) = (shuffled(SIZE, BLOCK), in_order(SIZE, BLOCK));
    for (name, offsets, depth) in [
        ("random", &random, 1),
        ("random", &random, 32),
        ("sequential", &sequential, 32),
    ] {
        let measured = servers.measure(suite, offsets, depth);
        let text = format!("4 KiB {name} read through a queue at depth {depth}");
        let mut line = Line::new(
            format!("{text}, processor time of the server"),
            Unit::Nanoseconds,
            measured.processor,
        );
        if (name, depth) == ("random", 32) {
            line.goals.push(Goal::AboveBare(150.0));
        }
        suite.add(line.note(format!(
            "{}<br>bare: the same calls to the same file and as many places",
            measured.note
        )));
        let line = Line::new(
            format!("{text}, time that goes by"),
            Unit::Nanoseconds,
            measured.wall,
        );
        suite.add(line.goal(Goal::TimesPeers(2.0)));
    }
}

/// Time for a request against the number of those in flight.
pub fn depths(suite: &mut Suite) {
    let servers = Servers::start(suite);
    let offsets = shuffled(SIZE, BLOCK);
    let mut curves: Vec<(String, Vec<(f64, f64)>)> = Vec::new();
    for depth in [1, 2, 4, 8, 16, 32, 64] {
        let measured = servers.measure(suite, &offsets, depth);
        for series in &measured.wall {
            let median = Summary::of(&series.samples).median / 1000.0;
            match curves.iter_mut().find(|curve| curve.0 == series.name) {
                Some(curve) => curve.1.push((depth as f64, median)),
                None => curves.push((series.name.clone(), vec![(depth as f64, median)])),
            }
        }
    }
    suite.plots.push(Plot {
        name: "queue-depth",
        title: "4 KiB random reads over vhost-user",
        x: "requests in flight",
        y: "time for a request, µs",
        is_log_y: true,
        marks: number,
        curves,
    });
}

/// Processor time for a request against the number of disks, each with a server of its own, and one
/// request in flight.
pub fn disks(suite: &mut Suite) {
    let dir = suite.disk();
    let program = suite.program("tandem");
    let mut points = Vec::new();
    let mut clients: Vec<Client> = Vec::new();
    for count in [1, 2, 4, 8, 16, 32, 64] {
        while clients.len() < count {
            let number = clients.len();
            let path = image(
                &dir.path().join(format!("{number}")),
                Kind::Internal,
                8 << 20,
            );
            fill_image(&path, 8 << 20);
            let socket = dir.path().join(format!("socket{number}"));
            clients.push(tandem(&program, &path, ",queues=1", true, socket));
        }
        let offsets = shuffled(8 << 20, BLOCK);
        let rounds: Vec<_> = (0..suite.settings.rounds)
            .map(|_| all_at_once(&mut clients, &offsets, (8192 / count).max(256)))
            .collect();
        points.push((count as f64, Summary::of(&rounds).median / 1000.0));
    }
    suite.plots.push(Plot {
        name: "disks",
        title: "4 KiB random reads of many disks at once",
        x: "disks",
        y: "processor time of the servers for a request, µs",
        is_log_y: false,
        marks: number,
        curves: vec![("tandem serve".to_owned(), points)],
    });
}

/// Has each of the disks read a block, so many times.
fn all_at_once(clients: &mut [Client], offsets: &[u64], times: usize) -> f64 {
    let used = |clients: &[Client]| -> f64 {
        clients
            .iter()
            .map(|client| clock::of_process(client.pid()))
            .sum()
    };
    let before = used(clients);
    for number in 0..times {
        for client in clients.iter_mut() {
            client.submit(offsets[number % offsets.len()], 0);
            client.ring();
        }
        for client in clients.iter_mut() {
            client.wait(&mut Vec::new());
        }
    }
    (used(clients) - before) / (times * clients.len()) as f64
}
