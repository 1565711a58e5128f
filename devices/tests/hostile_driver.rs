//! Drivers that break the rules of the ring, or hold on to it, against the whole device.
//!
//! What the device must keep whatever comes: the process lives, every valid request before the
//! first violation is answered, the driver is told when the device needs a reset, a reset brings it
//! back, and no byte of guest memory changes but in the used ring and in writable buffers.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;
#[path = "common/machine.rs"]
mod machine;
#[path = "common/registers.rs"]
mod registers;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::thread;

use common::disk::MemoryDisk;
use common::guest_memory;
use common::ring::{
    Desc, INDIRECT, NEXT, Ring, WRITE, chain, indirect, readable, writable, write_table,
};
use machine::{Machine, within_deadline};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use registers::{NEEDS_RESET, RUNNING, header, read, ring_doorbell, start, write};
use tandem_block::{Disk, Limits, Result};
use tandem_devices::GuestMemory;
use tandem_devices::virtio::FEATURE_EVENT_IDX;
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

const RING: u64 = 0x1000;
const SIZE: u16 = 16;
/// Memory that descriptors of the tests let the device read: headers and data.
const READABLE: u64 = 0x1_0000;
/// Memory that descriptors of the tests let the device write.
const WRITABLE: u64 = 0x2_0000;
/// Length of each of the two.
const AREA: u64 = 0x1_0000;
const TABLE: u64 = 0x3_0000;
const IN: u32 = 0;
const OUT: u32 = 1;
const FLUSH: u32 = 4;

fn wait_until(condition: impl Fn() -> bool) {
    while !condition() {
        thread::yield_now();
    }
}

type BreakRing = fn(&GuestMemory, &mut Ring);

/// Every way to break the ring stops the queue, tells the driver, and ends with a reset.
#[test]
fn broken_ring_needs_a_reset() {
    let cases: [(&str, BreakRing); 6] = [
        ("available index", |_, ring| ring.set_avail_idx(SIZE + 2)),
        ("head index", |_, ring| ring.offer(SIZE)),
        ("loop", |mem, ring| {
            let mut desc = readable(READABLE, 1);
            (desc.flags, desc.next) = (NEXT, 1);
            write_table(mem, ring.table, 1, &[desc]);
            ring.offer(1);
        }),
        ("indirect table", |_, ring| {
            ring.offer_chain(&[indirect(2 * common::REGION, 16)]);
        }),
        ("double indirect", |mem, ring| {
            write_table(mem, TABLE, 0, &[indirect(TABLE, 16)]);
            ring.offer_chain(&[indirect(TABLE, 16)]);
        }),
        ("order", |_, ring| {
            ring.offer_chain(&[writable(WRITABLE, 1), readable(READABLE, 16)]);
        }),
    ];
    within_deadline(move || {
        let mem = guest_memory();
        let machine = Machine::new(Arc::new(MemoryDisk::new(16)), &mem);
        for (round, (name, break_ring)) in cases.into_iter().enumerate() {
            mem.write_slice(&[0; 0x3000], GuestAddress(RING)).unwrap();
            let mut ring = Ring::new(&mem, RING, SIZE);
            start(&machine, &ring, 0);
            // A good request first.
            header(&mem, READABLE, FLUSH, 0);
            ring.offer_chain(&[readable(READABLE, 16), writable(WRITABLE, 1)]);
            ring_doorbell(&machine);
            machine.wait_for_interrupt();
            assert_eq!(ring.used_idx(), 1, "{name}");
            write(&machine, 0x64, read(&machine, 0x60));

            break_ring(&mem, &mut ring);
            ring_doorbell(&machine);
            machine.wait_for_interrupt();
            assert_eq!(read(&machine, 0x60), 2, "{name}");
            assert_eq!(read(&machine, 0x70), RUNNING | NEEDS_RESET, "{name}");
            // Another doorbell changes nothing.
            ring_doorbell(&machine);
            machine.device.shutdown();
            assert_eq!(ring.used_idx(), 1, "{name}");
            assert_eq!(machine.stats.broken_rings(), round as u64 + 1);
            assert!(machine.stats.last_error().is_some());
        }
        assert_eq!(machine.stats.failed_requests(), 0);
    });
}

/// A disk whose reads wait until they are let through: on the queue's thread if it is hot, in the
/// pool if it is cold.
struct Gate {
    disk: MemoryDisk,
    is_hot: bool,
    entered: mpsc::SyncSender<()>,
    pass: Mutex<mpsc::Receiver<()>>,
}

impl Gate {
    /// Also returns where a read says that it waits, and where to let it through.
    fn new(is_hot: bool) -> (Self, mpsc::Receiver<()>, mpsc::Sender<()>) {
        let (entered, has_entered) = mpsc::sync_channel(0);
        let (pass, wait) = mpsc::channel();
        let gate = Self {
            disk: MemoryDisk::new(16),
            is_hot,
            entered,
            pass: Mutex::new(wait),
        };
        (gate, has_entered, pass)
    }
}

impl Disk for Gate {
    fn size(&self) -> u64 {
        self.disk.size()
    }
    fn limits(&self) -> Limits {
        self.disk.limits()
    }
    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        if self.is_hot {
            self.read_at(bufs, offset)?;
        }
        Ok(self.is_hot)
    }
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.entered.send(()).unwrap();
        self.pass.lock().unwrap().recv().unwrap();
        self.disk.read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.disk.write_at(bufs, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.disk.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.disk.discard(offset, len)
    }
    fn flush(&self) -> Result<()> {
        self.disk.flush()
    }
}

/// A reset waits for the requests under way and begins no other: afterwards the driver may use the
/// memory for something else.
#[test]
fn reset_waits_for_the_request_under_way() {
    for is_hot in [true, false] {
        within_deadline(move || check_reset_waits(is_hot));
    }
}

fn check_reset_waits(is_hot: bool) {
    let (disk, has_entered, pass) = Gate::new(is_hot);
    let mem = guest_memory();
    let machine = Arc::new(Machine::new(Arc::new(disk), &mem));
    let mut ring = Ring::new(&mem, RING, SIZE);
    start(&machine, &ring, 0);
    header(&mem, READABLE, IN, 7);
    let request = [readable(READABLE, 16), writable(WRITABLE, 513)];
    ring.offer_chain(&request);
    ring_doorbell(&machine);
    has_entered.recv().unwrap();
    if is_hot {
        // The thread is busy, so that this one is not taken before it is told to stop.
        write_table(&mem, ring.table, 2, &chain(2, &request));
        ring.offer(2);
    }

    let (reset, is_reset) = mpsc::channel();
    let thread = thread::spawn({
        let machine = Arc::clone(&machine);
        move || {
            write(&machine, 0x70, 0);
            reset.send(()).unwrap();
        }
    });
    // Registers that take no lock answer meanwhile.
    assert_eq!(read(&machine, 0x60), 0);
    thread::sleep(std::time::Duration::from_millis(20));
    assert!(
        is_reset.try_recv().is_err(),
        "the disk still writes to guest memory"
    );
    pass.send(()).unwrap();
    is_reset.recv().unwrap();
    thread.join().unwrap();
    assert_eq!(ring.used_idx(), 1, "the second request must not begin");
    let mut data = [0; 513];
    mem.read_slice(&mut data, GuestAddress(WRITABLE)).unwrap();
    assert_eq!((&data[..512], data[512]), (&[7; 512][..], 0));
}

/// While it is at work it wants no doorbell; before it sleeps it looks once more.
#[test]
fn wants_no_doorbell_while_it_works() {
    within_deadline(|| {
        let (disk, has_entered, pass) = Gate::new(true);
        let mem = guest_memory();
        let machine = Machine::new(Arc::new(disk), &mem);
        let mut ring = Ring::new(&mem, RING, SIZE);
        start(&machine, &ring, 0);
        header(&mem, READABLE, IN, 0);
        let request = [readable(READABLE, 16), writable(WRITABLE, 513)];
        ring.offer_chain(&request);
        ring_doorbell(&machine);
        has_entered.recv().unwrap();
        assert_eq!(ring.used_flags(), 1);
        // No doorbell for this one.
        write_table(&mem, ring.table, 2, &chain(2, &request));
        ring.offer(2);
        pass.send(()).unwrap();
        has_entered.recv().unwrap();
        assert_eq!(ring.used_flags(), 1);
        pass.send(()).unwrap();
        wait_until(|| ring.used_idx() == 2 && ring.used_flags() == 0);
    });
}

/// A request that waits elsewhere leaves the queue's thread nothing to do: it wants the doorbell for
/// the next one.
#[test]
fn wants_the_doorbell_while_requests_wait() {
    within_deadline(|| {
        let (disk, has_entered, pass) = Gate::new(false);
        let mem = guest_memory();
        let machine = Machine::new(Arc::new(disk), &mem);
        let mut ring = Ring::new(&mem, RING, SIZE);
        start(&machine, &ring, 0);
        header(&mem, READABLE, IN, 0);
        ring.offer_chain(&[readable(READABLE, 16), writable(WRITABLE, 513)]);
        ring_doorbell(&machine);
        has_entered.recv().unwrap();
        wait_until(|| ring.used_flags() == 0);
        assert_eq!(ring.used_idx(), 0);
        pass.send(()).unwrap();
        wait_until(|| ring.used_idx() == 1);
    });
}

/// A driver that never lets the ring run empty cannot keep a reset from happening.
#[test]
fn reset_comes_through_a_ring_that_never_runs_empty() {
    within_deadline(|| {
        let mem = guest_memory();
        let machine = Machine::new(Arc::new(MemoryDisk::new(16)), &mem);
        let mut ring = Ring::new(&mem, RING, SIZE);
        start(&machine, &ring, 0);
        header(&mem, READABLE, IN, 0);
        for head in (0..SIZE).step_by(2) {
            let request = [readable(READABLE, 16), writable(WRITABLE, 1)];
            write_table(&mem, ring.table, head, &chain(head, &request));
        }
        ring.offer(0);
        let is_over = Arc::new(AtomicBool::new(false));
        let feeder = thread::spawn({
            let is_over = Arc::clone(&is_over);
            move || {
                let mut offered = 1u16;
                while !is_over.load(Ordering::SeqCst) {
                    thread::yield_now();
                    if offered.wrapping_sub(ring.used_idx()) < SIZE / 2 {
                        ring.offer(2 * (offered % (SIZE / 2)));
                        offered = offered.wrapping_add(1);
                    }
                }
                ring.used_idx()
            }
        });
        ring_doorbell(&machine);
        machine.wait_for_interrupt();
        machine.device.shutdown();
        is_over.store(true, Ordering::SeqCst);
        assert_ne!(feeder.join().unwrap(), 0);
        assert_eq!(machine.stats.broken_rings(), 0);
    });
}

#[test]
fn dropping_the_device_ends_its_thread() {
    within_deadline(|| {
        let disk: Arc<dyn Disk> = Arc::new(MemoryDisk::new(16));
        let mem = guest_memory();
        let machine = Machine::new(Arc::clone(&disk), &mem);
        start(&machine, &Ring::new(&mem, RING, SIZE), 0);
        drop(machine);
        assert_eq!(Arc::strong_count(&disk), 1);
    });
}

/// What a hostile driver puts before the device.
#[derive(Clone, Debug)]
struct Attack {
    table: Vec<Desc>,
    indirect_table: Vec<Desc>,
    headers: Vec<(u32, u64)>,
    /// Chains that are made available at once, the next ones when these have been answered.
    rounds: Vec<Vec<u16>>,
    /// What the available index says at last beyond `rounds`.
    excess: u16,
    event_idx: bool,
    /// Reads and writes have to wait.
    is_cold: bool,
}

fn any_desc() -> impl Strategy<Value = Desc> {
    let len = prop_oneof![
        4 => Just(16),
        4 => Just(1),
        4 => Just(512),
        2 => 0..1100u32,
        1 => Just(AREA as u32),
        1 => any::<u32>(),
    ];
    let flags =
        prop_oneof![4 => Just(NEXT), 4 => Just(NEXT | WRITE), 3 => Just(WRITE), 1 => 0..16u16];
    let place = prop_oneof![
        8 => (0..AREA / 16).prop_map(|n| Some(16 * n)),
        1 => Just(None),
    ];
    (len, flags, 0..SIZE + 2, place, any::<u64>()).prop_map(|(len, flags, next, place, wild)| {
        let base = if flags & WRITE != 0 {
            WRITABLE
        } else {
            READABLE
        };
        let (addr, len) = match place {
            _ if flags & INDIRECT != 0 => (TABLE, 16 * (len % 20)),
            // Within the area, with its length cut to that.
            Some(offset) => (base + offset, len.min((AREA - offset) as u32)),
            // Outside of all memory.
            None => (wild | 1 << 40, len),
        };
        Desc {
            addr,
            len,
            flags,
            next,
        }
    })
}

/// A good request: its type, sector and number of sectors.
fn any_request() -> impl Strategy<Value = (u32, u64, u32)> {
    let kind = prop_oneof![4 => Just(IN), 4 => Just(OUT), 1 => Just(FLUSH), 1 => any::<u32>()];
    let sector = prop_oneof![9 => 0..17u64, 1 => any::<u64>()];
    (kind, sector, 0..4u32)
}

/// The descriptors of the request whose header is number `n`, at index `first` of a table.
fn good_chain(n: u64, first: u16, (kind, _, sectors): (u32, u64, u32)) -> Vec<Desc> {
    let place = 0x1000 + 0x800 * n;
    let data = match kind {
        OUT => readable(READABLE + place, 512 * sectors),
        FLUSH => readable(READABLE, 0),
        _ => writable(WRITABLE + place, 512 * sectors),
    };
    let header = readable(READABLE + 16 * n, 16);
    chain(first, &[header, data, writable(WRITABLE + n, 1)])
}

/// Five good chains and one in an indirect table, some made available, with a few descriptors
/// replaced by anything.
fn any_attack() -> impl Strategy<Value = Attack> {
    let change = || prop::collection::vec((0..usize::from(SIZE), any_desc()), 0..3);
    // Each chain once, but for a wrong or repeated one now and then.
    let heads = || {
        let good = Just([0, 3, 6, 9, 12, 15]).prop_shuffle();
        let bad = prop_oneof![(0..SIZE + 1), any::<u16>()];
        let bad = prop::option::weighted(0.1, (0..6usize, bad));
        (good, 0..7usize, bad).prop_map(|(good, count, bad)| {
            let mut heads = good[..count].to_vec();
            if let Some((place, head)) = bad {
                heads.insert(place.min(count), head);
            }
            heads
        })
    };
    (
        prop::array::uniform6(any_request()),
        change(),
        change(),
        prop::collection::vec(heads(), 1..5),
        prop_oneof![9 => Just(0u16), 1 => 0..3u16, 1 => any::<u16>()],
        any::<bool>(),
        any::<bool>(),
    )
        .prop_map(
            |(requests, changes, indirect_changes, rounds, excess, event_idx, is_cold)| {
                let mut table: Vec<_> = (0..5)
                    .flat_map(|n| good_chain(n, 3 * n as u16, requests[n as usize]))
                    .chain([indirect(TABLE, 48)])
                    .collect();
                for (index, desc) in changes {
                    table[index] = desc;
                }
                let mut indirect_table = good_chain(5, 0, requests[5]);
                for (index, desc) in indirect_changes {
                    if let Some(place) = indirect_table.get_mut(index) {
                        *place = desc;
                    }
                }
                Attack {
                    table,
                    indirect_table,
                    headers: requests.map(|(kind, sector, _)| (kind, sector)).to_vec(),
                    rounds,
                    excess,
                    event_idx,
                    is_cold,
                }
            },
        )
}

impl Attack {
    /// Whether the chain at `head` keeps the rules of the ring: the specification once more, told
    /// differently.
    fn is_well_formed(&self, head: u16) -> bool {
        let mut descs = Vec::new();
        let (mut table, mut is_indirect) = (self.table.clone(), false);
        let mut index = usize::from(head);
        let mut steps = 0;
        loop {
            let Some(desc) = table.get(index) else {
                return false;
            };
            steps += 1;
            if steps > table.len() {
                return false;
            }
            if desc.flags & INDIRECT != 0 {
                if is_indirect || desc.len == 0 {
                    return false;
                }
                let mut all = self.indirect_table.clone();
                // Memory behind the table is zero.
                all.resize(20, readable(0, 0));
                all.truncate(desc.len as usize / 16);
                (table, is_indirect, index, steps) = (all, true, 0, 0);
                continue;
            }
            descs.push(*desc);
            if desc.flags & NEXT == 0 {
                break;
            }
            index = desc.next.into();
        }
        let total: u64 = descs.iter().map(|d| u64::from(d.len)).sum();
        descs.is_sorted_by_key(|d| d.flags & WRITE) && total <= u64::from(u32::MAX)
    }

    /// How many requests are answered in each round, and whether the device then needs a reset. The
    /// chains of a round are taken together, so that one that is named twice is always in use.
    fn expectation(&self) -> Vec<(u16, bool)> {
        let mut expectation = Vec::new();
        let (mut entries, mut answered) = (vec![0; SIZE.into()], 0u16);
        for (n, round) in self.rounds.iter().enumerate() {
            let excess = if n + 1 == self.rounds.len() {
                self.excess
            } else {
                0
            };
            let place = |i: u16| usize::from(answered.wrapping_add(i) % SIZE);
            for (i, &head) in (0..).zip(round) {
                entries[place(i)] = head;
            }
            let offered = (round.len() as u16).wrapping_add(excess);
            if offered > SIZE {
                expectation.push((answered, true));
                break;
            }
            // Entries that the driver has not written hold what was there before.
            let heads: Vec<u16> = (0..offered).map(|i| entries[place(i)]).collect();
            let is_bad =
                |i: usize| heads[..i].contains(&heads[i]) || !self.is_well_formed(heads[i]);
            let bad = (0..heads.len()).find(|&i| is_bad(i));
            answered += bad.unwrap_or(heads.len()) as u16;
            expectation.push((answered, bad.is_some()));
            if bad.is_some() {
                break;
            }
        }
        expectation
    }

    fn run(&self) -> std::result::Result<(), TestCaseError> {
        let mem = guest_memory();
        for (i, &(kind, sector)) in self.headers.iter().enumerate() {
            header(&mem, READABLE + 16 * i as u64, kind, sector);
        }
        let mut ring = Ring::new(&mem, RING, SIZE);
        write_table(&mem, ring.table, 0, &self.table);
        write_table(&mem, TABLE, 0, &self.indirect_table);
        let disk = MemoryDisk::new(16);
        disk.is_cold.store(self.is_cold, Ordering::SeqCst);
        let machine = Machine::new(Arc::new(disk), &mem);
        let features = if self.event_idx { FEATURE_EVENT_IDX } else { 0 };
        start(&machine, &ring, features);

        let expectation = self.expectation();
        for (n, (round, &(answered, needs_reset))) in
            self.rounds.iter().zip(&expectation).enumerate()
        {
            let excess = if n + 1 == self.rounds.len() {
                self.excess
            } else {
                0
            };
            ring.offer_beyond(round, excess);
            let before = untouchable(&mem, &ring);
            ring_doorbell(&machine);
            let is_broken = || read(&machine, 0x70) & NEEDS_RESET != 0;
            wait_until(|| is_broken() || (!needs_reset && ring.used_idx() == answered));
            prop_assert_eq!((ring.used_idx(), is_broken()), (answered, needs_reset));
            prop_assert!(before == untouchable(&mem, &ring), "stray writes");
        }
        machine.device.shutdown();
        let answered = expectation.last().map(|&(answered, _)| answered);
        prop_assert_eq!(Some(ring.used_idx()), answered);
        Ok(())
    }
}

/// Guest memory, without what the device may write: the used ring and writable buffers.
fn untouchable(mem: &GuestMemory, ring: &Ring) -> Vec<u8> {
    let mut bytes = vec![0; (TABLE + AREA) as usize];
    mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes[ring.used as usize..][..6 + 8 * usize::from(SIZE)].fill(0);
    bytes[WRITABLE as usize..][..AREA as usize].fill(0);
    bytes
}

#[test]
fn survives_random_rings() {
    within_deadline(|| {
        let config = Config {
            cases: 1000,
            failure_persistence: None,
            ..Config::default()
        };
        TestRunner::new(config)
            .run(&any_attack(), |attack| attack.run())
            .unwrap();
    });
}
