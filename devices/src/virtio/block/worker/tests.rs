//! A queue's thread, with a disk that panics and a driver that looks when it is interrupted.

use std::sync::mpsc;
use std::time::Duration;

use tandem_block::{Disk, Limits, Result};
use vm_memory::{Bytes, GuestAddress, VolatileSlice};

use super::super::engine::Engine;
use super::*;
use crate::test_common::disk::MemoryDisk;
use crate::test_common::guest_memory;
use crate::test_common::ring::{Ring, chain, readable, writable, write_table};

/// Reads panic, on the queue's thread or on one of the pool; writes do not, and are made in the pool.
struct PanickingDisk {
    disk: MemoryDisk,
    is_inline: bool,
}

impl Disk for PanickingDisk {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        if self.is_inline {
            self.read_at(bufs, offset)?;
        }
        Ok(false)
    }

    fn read_at(&self, _: &[VolatileSlice<'_>], _: u64) -> Result<()> {
        panic!("a bug in the disk");
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

#[derive(Debug, PartialEq)]
enum Signal {
    /// The used index was this then.
    Queue(u16),
    Config,
    NeedsReset,
}

/// Tells the test what has been signalled.
struct Teller {
    sender: mpsc::SyncSender<Signal>,
    mem: GuestMemory,
}

impl Teller {
    fn tell(&self, signal: Signal) {
        self.sender.send(signal).unwrap();
    }
}

impl Interrupt for Teller {
    fn signal_queue(&self, _index: u16) {
        let ring = Ring::new(&self.mem, RING, SIZE);
        self.tell(Signal::Queue(ring.used_idx()));
    }

    fn signal_config(&self) {
        self.tell(Signal::Config);
    }

    fn needs_reset(&self) {
        self.tell(Signal::NeedsReset);
    }
}

const RING: u64 = 0;
const SIZE: u16 = 64;
/// A header of zeroes, a read at the start of the disk; and one of a write.
const READ: u64 = 0x1_0000;
const WRITE: u64 = 0x1_0010;
const DATA: u64 = 0x2_0000;

struct Bench {
    engine: Engine,
    ring: Ring,
    signals: mpsc::Receiver<Signal>,
    stats: Arc<Stats>,
    doorbell: EventFd,
}

impl Bench {
    /// Serves what `offer` puts into the ring, for which no doorbell is rung.
    fn new(disk: impl Disk + 'static, offer: impl FnOnce(&GuestMemory, &mut Ring)) -> Self {
        let mem = guest_memory();
        mem.write_obj(1u32, GuestAddress(WRITE)).unwrap();
        let mut ring = Ring::new(&mem, RING, SIZE);
        offer(&mem, &mut ring);
        let doorbell = EventFd::new(EFD_NONBLOCK).unwrap();
        let (sender, signals) = mpsc::sync_channel(8);
        let stats = Arc::new(Stats::new(1));
        let writeback = Arc::new(AtomicBool::new(true));
        let teller = Teller {
            sender,
            mem: mem.clone(),
        };
        let context = Context {
            mem,
            interrupt: Arc::new(teller),
            target: Target::new(Arc::new(disk), None, writeback, 0),
            stats: Arc::clone(&stats),
            limiter: None,
            poll: Duration::ZERO,
        };
        let mut engine = Engine::new(context, 1, 4).unwrap();
        let source = Source {
            index: 0,
            queue: ring.queue(false),
            doorbell: doorbell.try_clone().unwrap(),
        };
        engine.start(source).unwrap();
        Self {
            engine,
            ring,
            signals,
            stats,
            doorbell,
        }
    }

    fn next_signal(&self) -> Signal {
        let signal = self.signals.recv_timeout(Duration::from_secs(60));
        signal.expect("no signal")
    }
}

/// A request with its header at `header`, at index `head`.
fn put(mem: &GuestMemory, ring: &Ring, head: u16, header: u64) {
    let data = if header == WRITE {
        readable(DATA, 512)
    } else {
        writable(DATA, 512)
    };
    let descs = [readable(header, 16), data, writable(DATA + 512, 1)];
    write_table(mem, ring.table, head, &chain(head, &descs));
}

#[test]
fn panic_needs_a_reset() {
    for is_inline in [true, false] {
        let disk = PanickingDisk {
            disk: MemoryDisk::new(1),
            is_inline,
        };
        let mut bench = Bench::new(disk, |mem, ring| {
            put(mem, ring, 0, READ);
            ring.offer(0);
        });
        assert_eq!(bench.next_signal(), Signal::NeedsReset);
        assert!(
            bench.engine.stop(0).is_none(),
            "it is not to be served again"
        );
        drop(bench.engine);
        assert_eq!(bench.signals.recv(), Err(mpsc::RecvError));
        assert_eq!(bench.ring.used_idx(), 0);
        assert!(bench.stats.last_error().unwrap().contains("panicked"));
    }
}

/// Of what the pool has, only the request that panicked stays without an answer.
#[test]
fn panic_in_the_pool_leaves_the_other_requests_alone() {
    let disk = PanickingDisk {
        disk: MemoryDisk::new(1),
        is_inline: false,
    };
    let bench = Bench::new(disk, |mem, ring| {
        let heads = [(0, WRITE), (3, READ), (6, WRITE), (9, WRITE)];
        for (head, header) in heads {
            put(mem, ring, head, header);
        }
        ring.offer_all(&heads.map(|(head, _)| head));
    });
    while bench.next_signal() != Signal::NeedsReset {}
    drop(bench.engine);
    let mut used: Vec<_> = (0..bench.ring.used_idx())
        .map(|n| bench.ring.used(n))
        .collect();
    used.sort_unstable();
    assert_eq!(used, [(0, 1), (6, 1), (9, 1)]);
}

#[test]
fn the_used_index_is_there_before_the_interrupt() {
    let bench = Bench::new(MemoryDisk::new(1), |mem, ring| {
        let heads: Vec<u16> = (0..20).map(|n| 3 * n).collect();
        for &head in &heads {
            put(mem, ring, head, READ);
        }
        ring.offer_all(&heads);
    });
    // One interrupt for all, unless the first part has taken long.
    let mut signal = bench.next_signal();
    if signal == Signal::Queue(16) {
        signal = bench.next_signal();
    }
    assert_eq!(signal, Signal::Queue(20));
    drop(bench.engine);
    assert_eq!(bench.signals.recv(), Err(mpsc::RecvError));
}

#[test]
fn queue_with_a_broken_ring_is_not_served_again() {
    let mut bench = Bench::new(MemoryDisk::new(1), |mem, ring| {
        put(mem, ring, 0, READ);
        ring.offer_all(&[0, SIZE]);
    });
    assert_eq!(bench.next_signal(), Signal::Queue(1));
    assert_eq!(bench.next_signal(), Signal::NeedsReset);
    bench.ring.offer(0);
    bench.doorbell.write(1).unwrap();
    assert!(bench.engine.stop_all().is_empty());
    drop(bench.engine);
    assert_eq!(bench.signals.recv(), Err(mpsc::RecvError));
    assert_eq!(bench.ring.used_idx(), 1);
}

#[test]
fn queue_is_served_once() {
    let mut bench = Bench::new(MemoryDisk::new(1), |mem, ring| put(mem, ring, 0, READ));
    let source = |index| Source {
        index,
        queue: bench.ring.queue(false),
        doorbell: bench.doorbell.try_clone().unwrap(),
    };
    for index in [0, 1, u16::MAX] {
        let error = bench.engine.start(source(index)).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
    }
    let queue = bench.engine.stop(0).unwrap();
    bench.engine.start(queue).unwrap();
    assert!(bench.engine.stop(1).is_none());
}
