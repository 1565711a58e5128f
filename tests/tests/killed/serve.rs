//! `tandem serve` under a front end with two full queues.

use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use crate::client::Client;
use crate::history::History;
use crate::image::{Image, KINDS, Kind, SECTORS};
use crate::{PATIENCE, Random, Running, kills, program};

/// The longest time that is given to a server, in microseconds.
const LONGEST: u64 = 60_000;

/// Starts a server for the image.
fn serve(image: &Image) -> Running {
    // What the last one has left.
    let _ = std::fs::remove_file(image.path("socket"));
    let mut command = Command::new(program("tandem"));
    command
        .arg("serve")
        .arg("--socket")
        .arg(image.path("socket"));
    command.arg("--disk").arg(image.disk());
    Running::start(command)
}

/// Connects to it as soon as it listens.
fn connect(server: &mut Running, image: &Image) -> Client {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(client) = Client::connect(&image.path("socket"), image.kind.has_cache()) {
            return client;
        }
        assert!(Instant::now() < end, "nobody listens");
        server.assert_running();
        thread::sleep(Duration::from_millis(1));
    }
}

/// Kills so many servers of one image.
fn kill(kind: Kind, times: u64, seed: u64) {
    let image = Image::create(kind);
    let mut history = History::new(SECTORS);
    let mut random = Random(seed);
    for round in 0..times {
        let mut server = serve(&image);
        let mut client = connect(&mut server, &image);
        let time = Duration::from_micros(random.below(LONGEST));
        client.write_until(Instant::now() + time, &mut history, &mut random);
        server.kill();
        // What it answered before it was gone counts.
        client.complete(&mut history);
        let disk = image.judge(round % 8 == 7);
        let judged = history.judge(&disk);
        judged.unwrap_or_else(|lost| panic!("{}, kill {round}: {lost}", kind.name));
    }
}

#[test]
fn tandem_serve_loses_nothing() {
    let times = kills(6);
    // Two at a time.
    thread::scope(|scope| {
        for half in KINDS.chunks(KINDS.len().div_ceil(2)) {
            scope.spawn(move || {
                for (kind, seed) in half.iter().zip(1..) {
                    kill(*kind, times, seed);
                }
            });
        }
    });
    let kinds = KINDS.len() as u64;
    println!(
        "tandem serve: {} kills on {kinds} kinds of images, nothing lost",
        times * kinds
    );
}
