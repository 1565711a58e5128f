//! The engine as a whole under the model checker `shuttle`: a few requests at a time, on an image of
//! a few clusters and with a cache of one slice, in very many of the orders in which their steps can
//! happen. A failure prints the schedule that leads to it.
#![cfg(shuttle)]
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "a test fails by panicking, in its helpers as well"
)]

#[allow(dead_code, reason = "each test uses a part of it")]
mod common;

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex};

use common::{Memory, assert_clean, new_image, open_with, read, write};
use shuttle::scheduler::{PctScheduler, RandomScheduler};
use shuttle::sync::atomic::{AtomicUsize, Ordering};
use shuttle::{Config, Runner, thread};
use tandem_block::qcow2::{
    CreateOptions, DataFileLayout, FindingKind, OpenOptions, Qcow2, check_storage,
};
use tandem_block::{Disk, Storage};
use vm_memory::VolatileSlice;

const SECTOR: u64 = 512;
const CLUSTER: u64 = 2 * SECTOR;
/// What an L2 slice maps: its table is as large.
const SLICE: u64 = CLUSTER / 8 * CLUSTER;
const SIZE: u64 = 3 * SLICE;

/// Schedules for each scenario and kind of image, with each of two schedulers.
const SCHEDULES: usize = 400;

/// Kinds of images.
const KINDS: [Kind; 4] = [Kind::Internal, Kind::External, Kind::Raw, Kind::Packed];

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Internal,
    External,
    /// With a mapping that is not complete, which L2 decides on.
    Raw,
    Packed,
}

/// A file whose every call is a point where another thread may go on, and whose data is written
/// sector by sector.
#[derive(Clone, Debug)]
struct Steps {
    file: Memory,
    step: Arc<AtomicUsize>,
    power: Arc<Power>,
    /// Index of the file's content.
    index: usize,
}

/// What power failures would leave.
#[derive(Debug, Default)]
struct Power {
    /// What syncs have made durable: content of the image and of the data file, after each of them.
    durable: Mutex<Vec<[Vec<u8>; 2]>>,
}

impl Steps {
    fn new(file: Memory, power: &Arc<Power>, index: usize) -> Self {
        Self {
            file,
            step: Arc::new(AtomicUsize::new(0)),
            power: power.clone(),
            index,
        }
    }

    /// Any operation of the checker's is such a point.
    fn step(&self) {
        self.step.fetch_add(1, Ordering::SeqCst);
    }

    /// Each sector of `bufs`, with its offset.
    fn sectors<'a>(
        &self,
        bufs: &[VolatileSlice<'a>],
        mut offset: u64,
        each: impl Fn(&[VolatileSlice<'a>], u64) -> io::Result<()>,
    ) -> io::Result<()> {
        for buf in bufs {
            for at in (0..buf.len()).step_by(SECTOR as usize) {
                self.step();
                let len = (buf.len() - at).min(SECTOR as usize);
                each(&[buf.subslice(at, len).unwrap()], offset)?;
                offset += len as u64;
            }
        }
        self.step();
        Ok(())
    }
}

impl Storage for Steps {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.sectors(bufs, offset, |buf, offset| self.file.read_at(buf, offset))
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.sectors(bufs, offset, |buf, offset| self.file.write_at(buf, offset))
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.step();
        self.file.read_bytes_at(buf, offset)
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.step();
        self.file.write_bytes_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.step();
        self.file.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.step();
        self.file.discard(offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.step();
        self.file.next_data(offset)
    }

    /// What was written before it began is durable when it ends, and nothing else.
    fn sync(&self) -> io::Result<()> {
        self.step();
        let content = self.file.content();
        self.step();
        let mut durable = self.power.durable.lock().unwrap();
        let mut files = durable.last().cloned().unwrap();
        files[self.index] = content;
        durable.push(files);
        drop(durable);
        self.step();
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        self.step();
        self.file.size()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.step();
        self.file.set_len(len)
    }

    fn capacity(&self) -> io::Result<Option<u64>> {
        self.file.capacity()
    }
}

/// A disk, and the files below it.
struct Setup {
    disk: Qcow2,
    image: Memory,
    data: Option<Memory>,
    power: Arc<Power>,
}

impl Setup {
    fn new(image: &[u8], kind: Kind, capacity: Option<u64>) -> Self {
        let image = Memory::new(image.to_vec());
        let data = (kind != Kind::Internal).then(|| match capacity {
            Some(size) => Memory::device(size),
            None => Memory::new(Vec::new()),
        });
        let power = Arc::new(Power::default());
        let content = [Some(&image), data.as_ref()].map(|f| f.map_or(Vec::new(), Memory::content));
        power.durable.lock().unwrap().push(content);
        let boxed = |file: &Memory, index| Box::new(Steps::new(file.clone(), &power, index)) as _;
        let disk = Qcow2::with_storage(
            Path::new("image"),
            boxed(&image, 0),
            data.as_ref().map(|data| boxed(data, 1)),
            &OpenOptions {
                l2_cache_size: 0,
                ..OpenOptions::default()
            },
        );
        Self {
            disk: disk.unwrap(),
            image,
            data,
            power,
        }
    }

    /// What the disk would be if power failed now, and nothing but what was synced were left.
    fn after_power_failure(&self) -> Qcow2 {
        let files = self.power.durable.lock().unwrap().last().cloned();
        self.left_in(files.unwrap())
    }

    /// Asserts that the cluster at `offset` would hold `allowed` after each moment at which power
    /// could have failed.
    fn always(&self, offset: u64, allowed: &[u8]) {
        let all = self.power.durable.lock().unwrap().clone();
        for files in all {
            read_one_of(&self.left_in(files), offset, allowed);
        }
    }

    fn left_in(&self, [image, data]: [Vec<u8>; 2]) -> Qcow2 {
        let image = Memory::new(image);
        check_storage(
            Path::new("image"),
            &image,
            None,
            tandem_block::qcow2::Repair::Nothing,
            &mut |finding| {
                assert_eq!(finding.kind, FindingKind::Leak, "{}", finding.text);
            },
        )
        .unwrap();
        let data = self.data.as_ref().map(|_| Memory::new(data));
        let options = OpenOptions {
            read_only: true,
            ..OpenOptions::default()
        };
        open_with(&image, data.as_ref(), &options).unwrap()
    }

    /// Closes the disk, and opens it again.
    fn reopened(self) -> Qcow2 {
        drop(self.disk);
        assert_clean(&self.image);
        open_with(&self.image, self.data.as_ref(), &OpenOptions::default()).unwrap()
    }
}

fn image(kind: Kind) -> Vec<u8> {
    let image = new_image(&CreateOptions {
        size: SIZE,
        cluster_size: CLUSTER,
        data_file: (kind != Kind::Internal).then(|| "data".into()),
        data_file_raw: kind == Kind::Raw,
        data_file_layout: match kind {
            Kind::Packed => DataFileLayout::Packed,
            _ => DataFileLayout::Standard,
        },
        ..CreateOptions::default()
    });
    if kind == Kind::Raw {
        // L2 tables lie behind each other in a new image.
        let l1 = image.word(40);
        for table in 0..SIZE / SLICE {
            let l2 = image.word(l1 + table * 8) & !(1 << 63);
            for entry in 0..4 {
                image.put_word(l2 + entry * 8, 0);
            }
        }
    }
    image.content()
}

/// Runs `scenario` on new disks of `kinds`; data files have a fixed `capacity`, if there is one.
fn explore(kinds: &[Kind], capacity: Option<u64>, scenario: fn(Setup)) {
    for &kind in kinds {
        let image = image(kind);
        eprintln!("{kind:?}");
        let run = move || scenario(Setup::new(&image, kind, capacity));
        let mut config = Config::new();
        config.stack_size = 1 << 20;
        Runner::new(RandomScheduler::new(SCHEDULES), config.clone()).run(run.clone());
        Runner::new(PctScheduler::new(3, SCHEDULES), config).run(run);
    }
}

/// Runs each of `threads` beside the others, to its end.
fn side_by_side(setup: &Setup, threads: &[fn(&Setup)]) {
    thread::scope(|scope| {
        for thread in threads {
            scope.spawn(|| thread(setup));
        }
    });
}

/// Reads the cluster at `offset`, each of whose sectors must hold one of `allowed` throughout.
fn read_one_of(disk: &dyn Disk, offset: u64, allowed: &[u8]) {
    for sector in read(disk, offset, CLUSTER).chunks(SECTOR as usize) {
        assert!(allowed.contains(&sector[0]), "{}", sector[0]);
        assert!(sector.iter().all(|byte| *byte == sector[0]));
    }
}

/// Both get the same cluster, and it holds what both have written.
#[test]
fn two_writers_to_one_new_cluster() {
    explore(&KINDS, None, |setup| {
        side_by_side(
            &setup,
            &[
                |s| write(&s.disk, 0, SECTOR, 1).unwrap(),
                |s| write(&s.disk, SECTOR, SECTOR, 2).unwrap(),
                |s| read_one_of(&s.disk, 0, &[0, 1, 2]),
            ],
        );
        let verify = |disk: &dyn Disk| {
            assert_eq!(read(disk, 0, SECTOR), [1; SECTOR as usize]);
            assert_eq!(read(disk, SECTOR, SECTOR), [2; SECTOR as usize]);
        };
        verify(&setup.disk);
        verify(&setup.reopened());
    });
}

#[test]
fn two_writers_and_a_discard_of_one_cluster() {
    explore(&KINDS, None, |setup| {
        side_by_side(
            &setup,
            &[
                |s| write(&s.disk, 0, SECTOR, 1).unwrap(),
                |s| write(&s.disk, SECTOR, SECTOR, 2).unwrap(),
                |s| s.disk.discard(0, CLUSTER).unwrap(),
            ],
        );
        let seen = read(&setup.disk, 0, CLUSTER);
        let (first, second) = seen.split_at(SECTOR as usize);
        assert!(first == [0; SECTOR as usize] || first == [1; SECTOR as usize]);
        assert!(second == [0; SECTOR as usize] || second == [2; SECTOR as usize]);
        assert_eq!(read(&setup.reopened(), 0, CLUSTER), seen);
    });
}

/// Each access needs another slice than the one before it.
#[test]
fn eviction_during_a_lookup() {
    explore(&KINDS, None, |setup| {
        for slice in 0..3 {
            write(&setup.disk, slice * SLICE, CLUSTER, 1 + slice as u8).unwrap();
        }
        side_by_side(
            &setup,
            &[
                |s| {
                    read_one_of(&s.disk, 0, &[1]);
                    read_one_of(&s.disk, SLICE, &[2]);
                },
                |s| {
                    read_one_of(&s.disk, 2 * SLICE, &[3]);
                    read_one_of(&s.disk, CLUSTER, &[0, 4]);
                },
                |s| {
                    write(&s.disk, CLUSTER, CLUSTER, 4).unwrap();
                    write(&s.disk, 2 * SLICE + CLUSTER, CLUSTER, 5).unwrap();
                    read_one_of(&s.disk, CLUSTER, &[4]);
                },
            ],
        );
        let disk = setup.reopened();
        read_one_of(&disk, CLUSTER, &[4]);
        read_one_of(&disk, 2 * SLICE + CLUSTER, &[5]);
    });
}

/// What a thread has written and flushed is there after a power failure, whatever others are doing,
/// and the image is consistent.
#[test]
fn flush_during_allocations() {
    explore(&KINDS, None, |setup| {
        side_by_side(
            &setup,
            &[
                |s| {
                    write(&s.disk, 0, CLUSTER, 1).unwrap();
                    s.disk.flush().unwrap();
                    read_one_of(&s.after_power_failure(), 0, &[1]);
                },
                |s| {
                    write(&s.disk, CLUSTER, CLUSTER, 2).unwrap();
                    write(&s.disk, SLICE, CLUSTER, 3).unwrap();
                },
                |s| s.disk.flush().unwrap(),
            ],
        );
        setup.always(0, &[0, 1]);
        setup.always(CLUSTER, &[0, 2]);
        setup.always(SLICE, &[0, 3]);
        let disk = setup.reopened();
        read_one_of(&disk, CLUSTER, &[2]);
        read_one_of(&disk, SLICE, &[3]);
    });
}

/// Requests that have found the old mapping never meet what the cluster holds afterwards.
#[test]
fn discarded_clusters_are_used_again() {
    explore(&KINDS, None, |setup| {
        write(&setup.disk, 0, CLUSTER, 1).unwrap();
        side_by_side(
            &setup,
            &[
                |s| {
                    s.disk.discard(0, CLUSTER).unwrap();
                    s.disk.flush().unwrap();
                    write(&s.disk, CLUSTER, CLUSTER, 2).unwrap();
                    read_one_of(&s.disk, CLUSTER, &[2]);
                },
                |s| write(&s.disk, 0, SECTOR, 3).unwrap(),
                |s| {
                    read_one_of(&s.disk, 0, &[0, 1, 3]);
                    s.disk.flush().unwrap();
                },
            ],
        );
        setup.always(0, &[0, 1, 3]);
        setup.always(CLUSTER, &[0, 2]);
        let disk = setup.reopened();
        read_one_of(&disk, 0, &[0, 1, 3]);
        read_one_of(&disk, CLUSTER, &[2]);
    });
}

/// A request that finds no space waits for a cluster that is on its way back.
#[test]
fn a_full_device() {
    explore(&[Kind::Packed], Some(2 * CLUSTER), |setup| {
        write(&setup.disk, 0, 2 * CLUSTER, 1).unwrap();
        setup.disk.discard(0, CLUSTER).unwrap();
        side_by_side(
            &setup,
            &[
                |s| write(&s.disk, SLICE, SECTOR, 2).unwrap(),
                |s| read_one_of(&s.disk, 0, &[0]),
                |s| s.disk.flush().unwrap(),
            ],
        );
        read_one_of(&setup.reopened(), SLICE, &[0, 2]);
    });
}

#[test]
fn zeroes_beside_writes() {
    explore(&KINDS, None, |setup| {
        write(&setup.disk, 0, 2 * CLUSTER, 1).unwrap();
        side_by_side(
            &setup,
            &[
                |s| s.disk.write_zeroes(0, 2 * CLUSTER, false).unwrap(),
                |s| write(&s.disk, SECTOR, 2 * SECTOR, 2).unwrap(),
                |s| {
                    let zeroes = s.disk.write_zeroes(CLUSTER, CLUSTER + SECTOR, true);
                    zeroes.unwrap();
                },
            ],
        );
        let disk = setup.reopened();
        read_one_of(&disk, 0, &[0, 2]);
        read_one_of(&disk, CLUSTER, &[0, 2]);
        assert_eq!(read(&disk, 0, SECTOR), [0; SECTOR as usize]);
        read_one_of(&disk, 2 * CLUSTER, &[0]);
    });
}

/// Requests behind the end fail or are carried out; those before it notice nothing.
#[test]
fn shrinking_and_growing_beside_writes() {
    explore(&KINDS, None, |setup| {
        side_by_side(
            &setup,
            &[
                |s| {
                    s.disk.resize(SIZE - SLICE - SECTOR).unwrap();
                    s.disk.resize(SIZE).unwrap();
                },
                |s| drop(write(&s.disk, SIZE - SLICE - SECTOR, CLUSTER, 1)),
                |s| {
                    write(&s.disk, 0, CLUSTER, 2).unwrap();
                    read_one_of(&s.disk, 0, &[2]);
                },
            ],
        );
        let seen = read(&setup.disk, SIZE - SLICE - CLUSTER, 2 * CLUSTER);
        let disk = setup.reopened();
        read_one_of(&disk, 0, &[2]);
        read_one_of(&disk, SIZE - SLICE, &[0, 1]);
        assert_eq!(read(&disk, SIZE - SLICE - CLUSTER, 2 * CLUSTER), seen);
    });
}
