//! Data that is not in the page cache: many requests at once on one queue, and as many threads.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Mutex;
use std::thread;

use super::requests::BLOCK;
use crate::client::{Client, qemu, tandem};
use crate::clock;
use crate::image::{Kind, image};
use crate::measure::{Contender, Goal, Line, Role, Unit};
use crate::suite::Suite;
use crate::target::{Target, fill_image, open_file};
use crate::work::{Buffer, fill, piece, shuffled};

const SIZE: u64 = 512 << 20;
const DEPTH: usize = 32;
const TURN: usize = 3000;

pub fn rows(suite: &mut Suite) {
    for kind in [Kind::Raw, Kind::Internal] {
        let dir = suite.disk();
        let image_of = |name: &str| {
            let path = image(&dir.path().join(name), kind, SIZE);
            fill_image(&path, SIZE);
            path
        };
        let bare = open_file(&dir.path().join("bare"));
        fill(&bare, SIZE);
        let offsets = shuffled(SIZE, BLOCK);
        let program = suite.program("tandem");
        let own = image_of("tandem");
        let few = image_of("few");
        let other = image_of("qemu");
        let socket = |name: &str| dir.path().join(name);
        let keys = format!(",queues=1,threads={DEPTH}");
        let contenders = vec![
            Contender::bare(|turn| {
                forget(&bare);
                threads(&bare, piece(&offsets, TURN, turn), DEPTH)
            }),
            Contender::aside("bare, 16 threads", |turn| {
                forget(&bare);
                threads(&bare, piece(&offsets, TURN, turn), 16)
            }),
            served(
                "Tandem",
                Role::Tandem,
                tandem(&program, &own, &keys, true, socket("a")),
                &own,
                &offsets,
            ),
            served(
                "16 threads",
                Role::Aside,
                tandem(&program, &few, ",queues=1", true, socket("b")),
                &few,
                &offsets,
            ),
            served(
                "QEMU",
                Role::Peer,
                qemu(&other, "threads", socket("c")),
                &other,
                &offsets,
            ),
        ];
        let series = suite.turns(3).run(contenders);
        let text = format!(
            "4 KiB random read from the disk at depth {DEPTH}, {}, time that goes by",
            kind.name()
        );
        let line = Line::new(text, Unit::Nanoseconds, series);
        suite.add(line.goal(Goal::OfBare(0.9)));
    }
}

fn served<'a>(
    name: &'static str,
    role: Role,
    mut client: Client,
    image: &Path,
    offsets: &'a [u64],
) -> Contender<'a> {
    let files: Vec<File> = [image.to_owned(), image.with_file_name("data")]
        .iter()
        .filter_map(|path| File::open(path).ok())
        .collect();
    Contender::new(name, role, move |turn| {
        files.iter().for_each(forget);
        client.turn(offsets, TURN, turn, DEPTH).wall
    })
}

/// Drops what the page cache has of a file.
fn forget(file: &File) {
    file.sync_all().unwrap();
    let advice = libc::POSIX_FADV_DONTNEED;
    // SAFETY: no memory is passed.
    let error = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, advice) };
    assert_eq!(error, 0);
}

/// What goes by for a request, if so many threads make them.
fn threads(file: &File, offsets: &[u64], count: usize) -> f64 {
    let left = Mutex::new(offsets.iter());
    let before = clock::wall();
    thread::scope(|scope| {
        for _ in 0..count {
            scope.spawn(|| {
                let mut buffer = Buffer::new(BLOCK as usize);
                let next = || left.lock().unwrap().next().copied();
                while let Some(at) = next() {
                    Target::read(file, buffer.bytes(), at);
                }
            });
        }
    });
    (clock::wall() - before) / offsets.len() as f64
}
