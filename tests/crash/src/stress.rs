//! Several threads that use one disk at the same time, and what each of them may see.
//!
//! Every write has a stamp of its own, and a log tells when each access to each sector began and ended;
//! `linear` judges whether that can have happened one after the other. The cache has room for a table or
//! two. Meanwhile somebody flushes and changes the size of the disk; between rounds the image is opened
//! again, or snapshots are taken and deleted.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use tandem_block::qcow2::OpenOptions;
use tandem_block::{Disk, LiveDisk};
use vm_memory::VolatileSlice;

use crate::judge::{check_with, read_stamps};
use crate::linear::{self, Access};
use crate::random::Random;
use crate::setup::{Kind, Operations, Setup};
use crate::storage::{Memory, SECTOR, Which, stamp_of};
use crate::workload::{Maker, Op, Session, request};

const THREADS: u64 = 4;
/// Requests of each thread in a round.
const REQUESTS: usize = 60;
/// Of so many requests one reads.
const READS: u64 = 2;

/// Images that are used.
pub const SETUPS: [Setup; 12] = [
    Setup::new(Kind::Internal, 3, 512).with(Operations::Snapshots),
    Setup::new(Kind::Internal, 3, 4096),
    Setup::new(Kind::Internal, 2, 1024),
    Setup::new(Kind::Internal, 3, 1024).with_bitmap(),
    Setup::new(Kind::Internal, 3, 16384)
        .with_subclusters()
        .with(Operations::Snapshots),
    Setup::new(Kind::External, 3, 512),
    Setup::new(Kind::External, 3, 16384).with_subclusters(),
    Setup::new(Kind::Raw, 3, 512),
    Setup::new(Kind::RawIncomplete, 3, 512),
    Setup::new(Kind::Packed, 3, 512),
    Setup::new(Kind::Overlay, 3, 1024),
    Setup::new(Kind::Snapshot, 3, 1024).with(Operations::Snapshots),
];

/// An access of one of the sectors.
type Logged = (usize, Access);

/// Has threads use an image of `setup` for so many `rounds`. Returns how many accesses to sectors have
/// been judged.
///
/// # Errors
/// What cannot have been seen, or is wrong afterwards.
pub fn run(setup: &Setup, seed: u64, rounds: u64) -> Result<usize, String> {
    let [image, data] = setup.files().shared();
    let file = |which, bytes: &Arc<Mutex<Vec<u8>>>| Memory::plain(which, bytes).piecewise();
    let options = OpenOptions {
        l2_cache_size: 0,
        ..OpenOptions::default()
    };
    let files = || (file(Which::Image, &image), file(Which::Data, &data));
    let (i, d) = files();
    let open = Session::open(setup, &options, i, d);
    let mut session = open.map_err(|e| e.to_string())?;
    let mut content = setup.initial();
    content.resize(setup.size() as usize / SECTOR, 0);
    let (mut judged, mut snapshots) = (0, Vec::new());
    for round in 0..rounds {
        let log = round_of(session.disk(), setup, seed << 20 | round);
        let log = log.map_err(|e| format!("round {round}: {e}"))?;
        let seen = read_stamps(session.disk())?;
        judged += log.len();
        judge(&content, log, &seen).map_err(|e| format!("round {round}: {e}"))?;
        content = seen;
        for op in operations(setup, round, &mut snapshots) {
            let done = session.perform(&op);
            done.map_err(|e| format!("round {round}: {op:?}: {e}"))?;
        }
        if read_stamps(session.disk())? != content {
            return Err(format!("round {round}: changed while nobody wrote"));
        }
    }
    session.disk().close().map_err(|e| e.to_string())?;
    drop(session);
    let (i, d) = files();
    let has_data = setup.has_data_file() && setup.kind != Kind::RawIncomplete;
    check_with(&i, has_data.then_some(&d))?;
    Ok(judged)
}

/// What is done to the image after a round.
fn operations(setup: &Setup, round: u64, snapshots: &mut Vec<u64>) -> Vec<Op> {
    if setup.operations == Operations::Snapshots && round.is_multiple_of(2) {
        let snapshot = round + 1;
        snapshots.push(snapshot);
        let mut ops = vec![Op::Take { snapshot }];
        if snapshots.len() > 2 {
            let snapshot = snapshots.remove(0);
            ops.push(Op::Delete { snapshot });
        }
        return ops;
    }
    vec![Op::Reopen]
}

/// The threads make their requests, and return what they saw and wrote.
fn round_of(disk: &LiveDisk, setup: &Setup, seed: u64) -> Result<Vec<Logged>, String> {
    let clock = AtomicU64::new(1);
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let clock = &clock;
        let worker = |thread: u64| scope.spawn(move || work(disk, setup, clock, seed, thread));
        let workers: Vec<_> = (0..THREADS).map(worker).collect();
        let other = scope.spawn(|| disturb(disk, setup, &is_over));
        let mut log = Vec::new();
        let mut ended = Ok(());
        for worker in workers {
            match worker.join().unwrap() {
                Ok(more) => log.extend(more),
                Err(e) => ended = Err(e),
            }
        }
        is_over.store(true, Ordering::Relaxed);
        ended.and(other.join().unwrap()).map(|()| log)
    })
}

/// Flushes, and changes the size of the disk behind what the others use.
fn disturb(disk: &LiveDisk, setup: &Setup, is_over: &AtomicBool) -> Result<(), String> {
    let mut turn = 0;
    while !is_over.load(Ordering::Relaxed) {
        turn += 1;
        let done = match turn % 3 {
            1 => disk.resize(setup.max_size()),
            2 => disk.resize(setup.size()),
            _ => disk.flush(),
        };
        done.map_err(|e| e.to_string())?;
        thread::yield_now();
    }
    disk.resize(setup.size()).map_err(|e| e.to_string())
}

fn work(
    disk: &LiveDisk,
    setup: &Setup,
    clock: &AtomicU64,
    seed: u64,
    thread: u64,
) -> Result<Vec<Logged>, String> {
    let mut random = Random::of(seed, &[thread]);
    let mut maker = Maker::new(setup);
    maker.stamp = (seed + 1) << 20 | thread << 16;
    maker.operates = false;
    maker.resizes = false;
    let per_cluster = setup.cluster_size / SECTOR as u64;
    let now = || clock.fetch_add(1, Ordering::SeqCst);
    let mut log = Vec::new();
    for _ in 0..REQUESTS {
        // Many requests are to few sectors.
        maker.sectors = match random.below(2) {
            0 => setup.size() / SECTOR as u64,
            // Whole clusters, for only those can be discarded.
            _ => per_cluster * (24 / per_cluster).max(2),
        };
        let op = maker.make(&mut random, 1).remove(0);
        let Some((sectors, stamp)) = op.written() else {
            continue;
        };
        let begun = now();
        if random.below(READS) == 0 {
            let mut bytes = vec![0; sectors.len() * SECTOR];
            let bufs = [VolatileSlice::from(&mut bytes[..])];
            let read = disk.read_at(&bufs, (sectors.start * SECTOR) as u64);
            read.map_err(|e| e.to_string())?;
            let ended = now();
            for (sector, bytes) in sectors.zip(bytes.chunks_exact(SECTOR)) {
                let stamp = stamp_of(bytes).map_err(|e| format!("sector {sector} {e}"))?;
                log.push((sector, access(begun, ended, stamp, false)));
            }
        } else {
            request(disk, &op).map_err(|e| format!("{op:?}: {e}"))?;
            let ended = now();
            log.extend(sectors.map(|sector| (sector, access(begun, ended, stamp, true))));
        }
    }
    Ok(log)
}

fn access(begun: u64, ended: u64, stamp: u64, is_write: bool) -> Access {
    Access {
        begun,
        ended,
        stamp,
        is_write,
    }
}

/// Judges a round, before which the disk held `content`, and after which it holds `seen`.
fn judge(content: &[u64], log: Vec<Logged>, seen: &[u64]) -> Result<(), String> {
    let mut sectors: Vec<Vec<Access>> = vec![Vec::new(); content.len()];
    for (sector, access) in log {
        sectors[sector].push(access);
    }
    for (sector, accesses) in sectors.iter_mut().enumerate() {
        let last = u64::MAX - 1;
        accesses.push(access(last, last + 1, seen[sector], false));
        let checked = linear::check(content[sector], accesses);
        checked.map_err(|e| format!("sector {sector}: {e}"))?;
    }
    Ok(())
}
