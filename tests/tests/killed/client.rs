//! A front end that writes to a disk of `tandem serve` until the server is gone: the crate
//! `virtio-driver`, which is the library behind libblkio.

use std::ops::Range;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::time::Instant;

use virtio_driver::{VirtioBlkFeatureFlags, VirtioFeatureFlags};

use crate::Random;
use crate::history::{self, History, Stamp};
use crate::image::SECTORS;
use crate::vhost_client::Connection;

const QUEUES: usize = 2;
/// Requests in flight on each queue.
const DEPTH: usize = 16;
/// Most sectors of a request.
const MOST: u64 = 200;
const SECTOR: usize = 512;
const PLACE: usize = MOST as usize * SECTOR;

/// A request on its way.
#[derive(Clone)]
struct Request {
    place: usize,
    does: Does,
}

#[derive(Clone)]
enum Does {
    Write(Range<u64>, Stamp),
    /// What is discarded may be zero or what it was.
    Discard(Range<u64>),
    /// After so many writes had been complete.
    Flush(usize),
}

pub struct Client {
    connection: Connection<Request>,
    /// Sectors of requests that are on their way.
    busy: Vec<bool>,
    /// Whether the disk has a cache that can be flushed.
    has_cache: bool,
}

impl Client {
    /// `None` while nobody listens.
    pub fn connect(socket: &Path, has_cache: bool) -> Option<Self> {
        let mut block = VirtioBlkFeatureFlags::DISCARD | VirtioBlkFeatureFlags::WRITE_ZEROES;
        if has_cache {
            block |= VirtioBlkFeatureFlags::FLUSH;
        }
        let none = VirtioFeatureFlags::empty();
        let connection = Connection::open(socket, none, block, QUEUES, DEPTH, PLACE)?;
        Some(Self {
            connection,
            busy: vec![false; SECTORS as usize],
            has_cache,
        })
    }

    /// Keeps the queues full until `end`.
    pub fn write_until(&mut self, end: Instant, history: &mut History, random: &mut Random) {
        while Instant::now() < end {
            for queue in 0..QUEUES {
                while let Some(place) = self.connection.free[queue].pop() {
                    self.submit(queue, place, history, random);
                }
                let notifier = self.connection.transport.get_submission_notifier(queue);
                notifier.notify().unwrap();
            }
            if !self.complete(history) {
                self.wait();
            }
        }
    }

    fn submit(&mut self, queue: usize, place: usize, history: &mut History, random: &mut Random) {
        let kind = random.below(16);
        let target = &mut self.connection.queues[queue];
        if kind == 0 && self.has_cache {
            let does = Does::Flush(history.before_flush());
            target.flush(Request { place, does }).unwrap();
            return;
        }
        let sectors = loop {
            // Small ones mostly.
            let most = if random.below(4) == 0 { MOST } else { 16 };
            let (count, at) = (1 + random.below(most), random.below(SECTORS));
            let sectors = at..SECTORS.min(at + count);
            let busy = &mut self.busy[at as usize..sectors.end as usize];
            if !busy.contains(&true) {
                busy.fill(true);
                break sectors;
            }
        };
        let offset = sectors.start * SECTOR as u64;
        let bytes = (sectors.end - sectors.start) as usize * SECTOR;
        let stamp = history.stamp(kind < 4);
        history.begin(sectors.clone(), stamp);
        match kind {
            0 | 1 => {
                let does = Does::Discard(sectors);
                target.discard(offset, bytes as u64, Request { place, does })
            }
            2 | 3 => {
                let does = Does::Write(sectors, stamp);
                target.write_zeroes(offset, bytes as u64, kind == 2, Request { place, does })
            }
            _ => {
                // SAFETY: places lie in the memory, one behind another, and this one is in no other
                // use until its request is complete.
                let data = unsafe {
                    let data = self.connection.memory.as_ptr().add(place * PLACE);
                    std::slice::from_raw_parts_mut(data, bytes)
                };
                history::fill(data, sectors.start, stamp);
                let does = Does::Write(sectors, stamp);
                // SAFETY: as before.
                unsafe { target.write_raw(offset, data.as_ptr(), bytes, Request { place, does }) }
            }
        }
        .unwrap();
    }

    /// Takes what has been completed, also by a server that has gone since. Whether there was anything.
    pub fn complete(&mut self, history: &mut History) -> bool {
        let mut any = false;
        for queue in 0..QUEUES {
            let completed: Vec<_> = self.connection.queues[queue].completions().collect();
            for completion in completed {
                any = true;
                assert_eq!(completion.ret, 0);
                let Request { place, does } = completion.context;
                self.connection.free[queue].push(place);
                let sectors = match does {
                    Does::Flush(writes) => {
                        history.flushed(writes);
                        continue;
                    }
                    Does::Discard(sectors) => sectors,
                    Does::Write(sectors, stamp) => {
                        history.complete(sectors.clone(), stamp);
                        sectors
                    }
                };
                self.busy[sectors.start as usize..sectors.end as usize].fill(false);
            }
        }
        if any && !self.has_cache {
            history.flushed(history.before_flush());
        }
        any
    }

    /// Waits a moment for an interrupt.
    fn wait(&self) {
        let events = (0..QUEUES).map(|n| self.connection.transport.get_completion_fd(n));
        let events: Vec<_> = events.collect();
        let mut fds: Vec<_> = events
            .iter()
            .map(|event| libc::pollfd {
                fd: event.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        // SAFETY: a valid array of as many entries.
        unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, 1) };
        for (event, _) in events.iter().zip(fds).filter(|(_, fd)| fd.revents != 0) {
            event.read().unwrap();
        }
    }
}
