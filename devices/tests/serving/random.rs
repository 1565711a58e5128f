//! Anything at all before the device: registers and configuration space in any order, of any width,
//! with two queues whose rings are hostile.
//!
//! Whatever comes, the device neither panics nor hangs, writes to used rings and writable buffers
//! only, and to the disk only what a request for it said.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use tandem_devices::bus::BusDevice;
use tandem_devices::virtio::block::Rate;
use vm_memory::{Bytes, GuestAddress};

use crate::common::disk::MemoryDisk;
use crate::common::gate::Gate;
use crate::common::guest_memory;
use crate::common::ring::{Desc, INDIRECT, NEXT, WRITE, chain, write_table};
use crate::driver::{DISCARD, FLUSH, GET_ID, IN, OUT, WRITE_ZEROES};
use crate::machine::{Machine, within_deadline};

/// Guest memory, in parts of 64 KiB: descriptor tables; available rings; what descriptors let the
/// device read; and what it may write: used rings and buffers.
const TABLES: u64 = 0;
const AVAIL: u64 = 0x1_0000;
const READABLE: u64 = 0x2_0000;
const USED: u64 = 0x3_0000;
const WRITABLE: u64 = 0x4_0000;
const END: u64 = 0x5_0000;
const PART: u64 = 0x1_0000;

const SECTORS: u8 = 64;
/// Requests write these sectors, and no others.
const WRITTEN: std::ops::Range<u64> = 8..24;
/// What they write.
const FILL: u8 = 0xf1;
/// The queue's size, unless a register says otherwise.
const SIZE: u16 = 16;

#[derive(Clone, Debug)]
enum Step {
    Read {
        offset: u64,
        width: usize,
    },
    Write {
        offset: u64,
        data: Vec<u8>,
    },
    /// What a good driver does, as far as status, features and queues go.
    Start {
        features: u64,
        queues: u8,
    },
    /// What a good driver does with a queue: index, table, rings.
    Queue {
        index: u32,
        place: u64,
    },
    /// The available index of a ring.
    Avail {
        place: u64,
        index: u16,
    },
    Doorbell(u32),
    PauseAndResume,
    Resize(u8),
}

fn any_register() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0..0x40u64).prop_map(|n| 4 * n),
        4 => 0x100..0x148u64,
        1 => 0..0x1000u64,
        1 => any::<u64>(),
    ]
}

fn any_data() -> impl Strategy<Value = Vec<u8>> {
    let word = prop_oneof![
        4 => (0..16u32).prop_map(|n| n),
        2 => (0..END as u32 / 0x1000).prop_map(|n| 0x1000 * n),
        1 => any::<u32>(),
    ];
    prop_oneof![
        4 => word.prop_map(|word| word.to_le_bytes().to_vec()),
        1 => prop::collection::vec(any::<u8>(), 0..17),
    ]
}

/// Registers with which the driver says where the device may write.
fn names_memory_to_write(offset: u64) -> bool {
    (0xa0..0xa8).contains(&offset)
}

fn any_step() -> impl Strategy<Value = Step> {
    let place = || prop_oneof![6 => 0..2u64, 1 => 0..8u64];
    prop_oneof![
        4 => (any_register(), 0..17usize).prop_map(|(offset, width)| Step::Read { offset, width }),
        // Used rings stay where they belong, so that other writes show.
        6 => (any_register(), any_data()).prop_map(|(offset, data)| {
            let offset = if names_memory_to_write(offset) { 0x50 } else { offset };
            Step::Write { offset, data }
        }),
        3 => (any::<u64>(), 0..4u8).prop_map(|(features, queues)| Step::Start { features, queues }),
        2 => (0..4u32, place()).prop_map(|(index, place)| Step::Queue { index, place }),
        6 => (place(), prop_oneof![6 => 0..6u16, 3 => 0..20u16, 1 => any::<u16>()])
            .prop_map(|(place, index)| Step::Avail { place, index }),
        6 => (0..3u32).prop_map(Step::Doorbell),
        1 => Just(Step::PauseAndResume),
        1 => (20..SECTORS).prop_map(Step::Resize),
    ]
}

fn any_desc() -> impl Strategy<Value = Desc> {
    let len = prop_oneof![
        3 => Just(16),
        3 => Just(1),
        3 => (0..4u32).prop_map(|n| 512 * n),
        1 => 0..1100u32,
    ];
    let flags = prop_oneof![
        4 => Just(NEXT),
        4 => Just(NEXT | WRITE),
        3 => Just(WRITE),
        1 => Just(INDIRECT),
        1 => 0..16u16,
    ];
    (len, flags, 0..SIZE + 2, 0..PART / 16 - 128, 0..20u8).prop_map(
        |(len, flags, next, place, wild)| {
            let base = if flags & INDIRECT != 0 {
                TABLES
            } else if flags & WRITE != 0 {
                WRITABLE
            } else {
                READABLE
            };
            let addr = if wild == 0 {
                1 << 40
            } else {
                base + 16 * place
            };
            Desc {
                addr,
                len,
                flags,
                next,
            }
        },
    )
}

/// Two headers, each a type and a sector: of a request for which the device writes data, or of any
/// that changes nothing; and of one that changes the disk, in sectors that may be written.
fn any_headers() -> impl Strategy<Value = [(u32, u64); 2]> {
    let kind = prop_oneof![
        8 => Just(IN),
        1 => Just(FLUSH),
        1 => Just(GET_ID),
        1 => 14..u32::MAX,
    ];
    let sector = prop_oneof![9 => 0..64u64, 1 => any::<u64>()];
    let change = prop_oneof![3 => Just(OUT), 1 => Just(DISCARD), 1 => Just(WRITE_ZEROES)];
    let written = WRITTEN.start..WRITTEN.end - 4;
    ((kind, sector), (change, written)).prop_map(|(read, write)| [read, write])
}

#[derive(Clone, Debug)]
struct Attack {
    steps: Vec<Step>,
    tables: Vec<Vec<Desc>>,
    headers: Vec<[(u32, u64); 2]>,
    /// What the driver's rings hold first; heads of chains then go round.
    heads: Vec<u16>,
    is_cold: bool,
    is_read_only: bool,
    is_polling: bool,
    is_limited: bool,
}

/// Five chains as they should be, of which some descriptors are anything.
fn any_table() -> impl Strategy<Value = Vec<Desc>> {
    let change = (0..usize::from(SIZE), any_desc());
    let kinds = prop::array::uniform5((0..32u64, any::<bool>(), 0..4u32));
    let changes = prop_oneof![
        2 => Just(Vec::new()),
        1 => prop::collection::vec(change, 0..4),
    ];
    (kinds, changes, any_desc()).prop_map(|(kinds, changes, last)| {
        let mut table: Vec<_> = (0u64..)
            .zip(kinds)
            .flat_map(|(n, (header, is_read, sectors))| {
                let data = if is_read { WRITE } else { 0 };
                let desc = |addr, len, flags| Desc {
                    addr,
                    len,
                    flags,
                    next: 0,
                };
                let base = if is_read { WRITABLE } else { READABLE };
                let descs = [
                    desc(READABLE + 16 * (2 * header + u64::from(!is_read)), 16, 0),
                    desc(base + 0x2000 + 0x800 * n, 512 * sectors, data),
                    desc(WRITABLE + n, 1, WRITE),
                ];
                chain(3 * n as u16, &descs)
            })
            .chain([last])
            .collect();
        for (index, desc) in changes {
            table[index] = desc;
        }
        table
    })
}

/// Most begin as a good driver does.
fn any_steps() -> impl Strategy<Value = Vec<Step>> {
    let start = any::<u64>().prop_map(|features| Step::Start {
        features,
        queues: 2,
    });
    let start = prop::option::weighted(0.8, start);
    let steps = prop::collection::vec(any_step(), 1..40);
    (start, steps).prop_map(|(start, steps)| start.into_iter().chain(steps).collect())
}

fn any_attack() -> impl Strategy<Value = Attack> {
    (
        any_steps(),
        prop::collection::vec(any_table(), 8),
        prop::collection::vec(any_headers(), 32),
        prop_oneof![
            2 => Just(Vec::new()),
            1 => prop::collection::vec(0..18u16, 0..4),
        ],
        prop::array::uniform4(any::<bool>()),
    )
        .prop_map(|(steps, tables, headers, heads, switches)| Attack {
            steps,
            tables,
            headers,
            heads,
            is_cold: switches[0],
            is_read_only: switches[1] && switches[2],
            is_polling: switches[2],
            is_limited: switches[3],
        })
}

impl Attack {
    /// Everything readable that is not a header is `FILL`, but for a list of segments where some
    /// requests have their data.
    fn fill(&self, mem: &tandem_devices::GuestMemory) {
        let write = |addr, bytes: &[u8]| mem.write_slice(bytes, GuestAddress(addr)).unwrap();
        write(READABLE, &[FILL; PART as usize]);
        for (n, &(kind, sector)) in (0..).zip(self.headers.iter().flatten()) {
            let mut header = [0; 16];
            header[..4].copy_from_slice(&kind.to_le_bytes());
            // Without a meaning; what is taken for a segment or part of a header is then bad.
            header[4..8].fill(FILL);
            header[8..].copy_from_slice(&sector.to_le_bytes());
            write(READABLE + 16 * n, &header);
        }
        for n in 0..32 {
            let mut segment = [0; 16];
            segment[0] = (WRITTEN.start + n % 16) as u8;
            segment[8] = 1;
            write(READABLE + 0x2000 + 16 * n, &segment);
        }
        for (n, table) in (0..).zip(&self.tables) {
            write_table(mem, TABLES + 0x1000 * n, 0, table);
            let rest = (0..5).cycle().map(|n| 3 * n);
            let heads = self.heads.iter().copied().chain(rest);
            for (i, head) in (0..u64::from(SIZE)).zip(heads) {
                let entry = AVAIL + 0x1000 * n + 4 + 2 * i;
                write(entry, &head.to_le_bytes());
            }
        }
    }

    fn run(&self) -> std::result::Result<(), TestCaseError> {
        let mem = guest_memory();
        self.fill(&mem);
        let memory = MemoryDisk::new(SECTORS);
        let memory = if self.is_read_only {
            MemoryDisk::read_only(SECTORS)
        } else {
            memory
        };
        let cold_from = if self.is_cold { 0 } else { 512 * 16 };
        let disk = Arc::new(Gate::new(memory, cold_from));
        let machine = Machine::with_options(disk.clone(), &mem, |options| {
            options.queues = 2;
            options.threads = 2;
            if self.is_polling {
                options.poll = Duration::from_micros(50);
            }
            if self.is_limited {
                options.rate.bytes = Rate::new(1 << 30, 512);
            }
        });
        let before = untouchable(&mem);
        for step in &self.steps {
            step.run(&machine, &mem);
        }
        let mut magic = [0; 4];
        machine.device.read(0, &mut magic);
        prop_assert_eq!(&magic, b"virt");
        machine.device.shutdown();

        prop_assert!(before == untouchable(&mem), "stray writes");
        let last = machine.stats.last_error().unwrap_or_default();
        prop_assert!(!last.contains("internal error"), "{}", last);
        let content = disk.disk.content();
        for (n, sector) in (0..).zip(content.chunks(512)) {
            let is_own = sector.iter().all(|&byte| byte == n as u8);
            // What was cut off and has come back is zero.
            let is_new = n >= 20 && sector.iter().all(|&byte| byte == 0);
            let is_written = WRITTEN.contains(&n) && !self.is_read_only;
            prop_assert!(is_own || is_new || is_written, "sector {}", n);
        }
        prop_assert!(!self.is_read_only || disk.disk.writes.load(Ordering::SeqCst) == 0);
        Ok(())
    }
}

impl Step {
    fn run(&self, machine: &Machine, mem: &tandem_devices::GuestMemory) {
        let write = |offset: u64, value: u32| machine.device.write(offset, &value.to_le_bytes());
        match self {
            &Self::Read { offset, width } => machine.device.read(offset, &mut vec![0xee; width]),
            Self::Write { offset, data } => machine.device.write(*offset, data),
            &Self::Start { features, queues } => {
                write(0x70, 0);
                write(0x70, 3);
                let mut offered = 0;
                for half in [0, 1] {
                    write(0x14, half);
                    let mut word = [0; 4];
                    machine.device.read(0x10, &mut word);
                    offered |= u64::from(u32::from_le_bytes(word)) << (32 * half);
                }
                let features = features & offered | 1 << 32;
                for half in [0, 1] {
                    write(0x24, half);
                    write(0x20, (features >> (32 * half)) as u32);
                }
                write(0x70, 0xb);
                for index in 0..u32::from(queues) {
                    let place = u64::from(index);
                    Self::Queue { index, place }.run(machine, mem);
                }
                write(0x70, 0xf);
            }
            &Self::Queue { index, place } => {
                write(0x30, index);
                write(0xc0, 1);
                write(0x38, SIZE.into());
                for (register, base) in [(0x80, TABLES), (0x90, AVAIL), (0xa0, USED)] {
                    write(register, (base + 0x1000 * place) as u32);
                    write(register + 4, 0);
                }
                write(0x44, 1);
            }
            &Self::Avail { place, index } => {
                let addr = GuestAddress(AVAIL + 0x1000 * place + 2);
                mem.store(index, addr, Ordering::Release).unwrap();
            }
            &Self::Doorbell(index) => write(0x50, index),
            Self::PauseAndResume => {
                machine.handle.pause();
                machine.handle.resume().unwrap();
            }
            &Self::Resize(sectors) => {
                machine.handle.resize(512 * u64::from(sectors)).unwrap();
            }
        }
    }
}

/// Guest memory, without what the device may write and the indices that the driver writes.
fn untouchable(mem: &tandem_devices::GuestMemory) -> Vec<u8> {
    let mut bytes = vec![0; END as usize + 0x1000];
    mem.read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes[USED as usize..END as usize].fill(0);
    for place in 0..8 {
        bytes[(AVAIL + 0x1000 * place) as usize..][2..4].fill(0);
    }
    bytes
}

#[test]
fn survives_anything() {
    within_deadline(|| {
        let config = Config {
            cases: 800,
            failure_persistence: None,
            ..Config::default()
        };
        TestRunner::new(config)
            .run(&any_attack(), |attack| attack.run())
            .unwrap();
    });
}
