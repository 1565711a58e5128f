//! What a guest can do with a block device: fill its memory, and use the registers.

use std::io;
use std::path::Path;
use std::sync::Arc;

use tandem_block::{Disk, Raw};
use tandem_devices::GuestMemory;
use tandem_devices::bus::BusDevice;
use tandem_devices::virtio::block::{Block, Options, fuzzing};
use tandem_devices::virtio::mmio::VirtioMmio;
use tandem_devices::virtio::{
    Activation, FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, FEATURE_RING_RESET, FEATURE_VERSION_1,
    VirtioDevice,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Bytes, GuestAddress};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::input::Input;
use crate::memory::Memory;

/// Guest memory has a hole behind so many bytes,
const HOLE: u64 = 0x8000;
/// which ends here,
const BEHIND_HOLE: u64 = 0x9000;
/// and itself here.
const END: u64 = 0x1_0000;
/// The parts of a queue of up to 16 entries.
pub const TABLE: u64 = 0;
pub const AVAILABLE: u64 = 0x100;
pub const USED: u64 = 0x200;
/// Where memory begins that is used for headers and data, mostly.
const FREE: u64 = 0x400;
const DISK: usize = 32 << 10;
/// Most things that a guest does.
const STEPS: usize = 64;

/// Types of requests: IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, and none.
const TYPES: [u32; 8] = [0, 1, 4, 8, 11, 13, 0, 99];
/// What a driver accepts, mostly: with flushes, discards and zeroes.
pub const FEATURES: u64 =
    FEATURE_VERSION_1 | FEATURE_INDIRECT_DESC | 1 << 9 | 1 << 11 | 1 << 13 | 1 << 14;

pub fn guest_memory() -> GuestMemory {
    let region = |start: u64, end: u64| (GuestAddress(start), (end - start) as usize);
    GuestMemory::from_ranges(&[region(0, HOLE), region(BEHIND_HOLE, END)]).unwrap()
}

pub fn clear(mem: &GuestMemory) {
    for (start, end) in [(0, HOLE), (BEHIND_HOLE, END)] {
        let zeros = [0; HOLE as usize];
        mem.write_slice(&zeros[..(end - start) as usize], GuestAddress(start))
            .unwrap();
    }
}

pub fn disk() -> Arc<dyn Disk> {
    let storage = Box::new(Memory::new(vec![5; DISK]));
    Arc::new(Raw::with_storage(Path::new("disk"), storage, false).unwrap())
}

/// A driver that fills memory.
pub struct Driver<'m> {
    pub mem: &'m GuestMemory,
    /// The index in the available ring that it has shown.
    available: u16,
    /// Entries of its queue.
    pub size: u16,
}

impl<'m> Driver<'m> {
    pub fn new(mem: &'m GuestMemory, size: u16) -> Self {
        Self {
            mem,
            available: 0,
            size,
        }
    }

    fn put(&self, addr: u64, bytes: &[u8]) {
        // It may lie in the hole.
        let _ = self.mem.write_slice(bytes, GuestAddress(addr));
    }

    /// An address in memory, mostly.
    fn address(input: &mut Input<'_>) -> u64 {
        match input.byte() {
            0..224 => FREE + u64::from(input.byte()) * 0xfc,
            224..240 => u64::from(input.u16()),
            _ => input.value(),
        }
    }

    fn len(input: &mut Input<'_>) -> u32 {
        match input.byte() {
            0..96 => 16,
            96..144 => 1,
            144..208 => 512 * u32::from(input.byte() % 16),
            208..240 => input.u16().into(),
            _ => input.value() as u32,
        }
    }

    fn desc(input: &mut Input<'_>) -> [u8; 16] {
        let (addr, len) = (Self::address(input), Self::len(input));
        // NEXT, WRITE and INDIRECT.
        let flags = u16::from(input.byte() & 7);
        let next = u16::from(input.byte() % 17);
        let mut bytes = [0; 16];
        bytes[..8].copy_from_slice(&addr.to_le_bytes());
        bytes[8..12].copy_from_slice(&len.to_le_bytes());
        bytes[12..14].copy_from_slice(&flags.to_le_bytes());
        bytes[14..].copy_from_slice(&next.to_le_bytes());
        bytes
    }

    /// Changes memory once.
    pub fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() % 8 {
            0 => {
                let at = u64::from(input.byte() % 16) * 16;
                self.put(TABLE + at, &Self::desc(input));
            }
            1 => self.put(Self::address(input), &Self::desc(input)),
            2 => self.header(Self::address(input), input),
            3 => self.put(Self::address(input), input.bytes(16)),
            4 => self.offer(input.byte().into()),
            5 => self.show(input.value() as u16),
            _ => self.request(input),
        }
    }

    fn header(&self, addr: u64, input: &mut Input<'_>) {
        let (kind, sector) = (input.choose(&TYPES), input.value());
        self.put(addr, &kind.to_le_bytes());
        self.put(addr.wrapping_add(8), &sector.to_le_bytes());
    }

    /// A request as it should be, mostly, in three descriptors.
    fn request(&mut self, input: &mut Input<'_>) {
        let first = u16::from(input.byte() % 14);
        let place = FREE + u64::from(first) * 0x400;
        self.header(place, input);
        let mut descs = [Self::desc(input), Self::desc(input), Self::desc(input)];
        let data_flags = 1 | (descs[1][12] & 2);
        for (n, (addr, len, flags)) in [
            (place, 16, 1),
            (place + 0x80, Self::len(input), data_flags),
            (place + 0x70, 1, 2),
        ]
        .into_iter()
        .enumerate()
        {
            let keeps = input.byte() >= 250;
            if !keeps {
                descs[n][..8].copy_from_slice(&u64::to_le_bytes(addr));
                descs[n][8..12].copy_from_slice(&u32::to_le_bytes(len));
                descs[n][12..14].copy_from_slice(&u16::to_le_bytes(flags.into()));
                descs[n][14..].copy_from_slice(&u16::to_le_bytes(first + n as u16 + 1));
            }
        }
        if input.bool() {
            self.put(TABLE + u64::from(first) * 16, descs.as_flattened());
        } else {
            // In a table of its own.
            for (n, desc) in (1u16..).zip(&mut descs) {
                desc[14..].copy_from_slice(&n.to_le_bytes());
            }
            self.put(place + 0x20, descs.as_flattened());
            let mut desc = [0; 16];
            desc[..8].copy_from_slice(&(place + 0x20).to_le_bytes());
            desc[8] = 48;
            desc[12] = 4;
            self.put(TABLE + u64::from(first) * 16, &desc);
        }
        self.offer(first);
    }

    fn offer(&mut self, head: u16) {
        let slot = u64::from(self.available % self.size.max(1));
        self.put(AVAILABLE + 4 + 2 * slot, &head.to_le_bytes());
        self.show(self.available.wrapping_add(1));
    }

    fn show(&mut self, index: u16) {
        self.available = index;
        self.put(AVAILABLE + 2, &index.to_le_bytes());
    }

    pub fn used_index(&self) -> u16 {
        self.mem.read_obj(GuestAddress(USED + 2)).unwrap()
    }
}

/// A block device whose queues are served when they are started, on the thread of the caller.
pub struct Inline {
    block: Block,
    disk: Arc<dyn Disk>,
    active: Option<(GuestMemory, u64)>,
    queues: [Option<Queue>; 2],
}

impl Inline {
    pub fn new(disk: &Arc<dyn Disk>) -> Self {
        Self {
            block: block(disk),
            disk: Arc::clone(disk),
            active: None,
            queues: [None, None],
        }
    }
}

/// A device of two queues.
pub fn block(disk: &Arc<dyn Disk>) -> Block {
    let mut options = Options::default();
    options.queues = 2;
    options.queue_size = 16;
    options.threads = 2;
    Block::new(Arc::clone(disk), options)
}

impl VirtioDevice for Inline {
    fn device_type(&self) -> u32 {
        self.block.device_type()
    }

    fn features(&self) -> u64 {
        self.block.features()
    }

    fn queue_max_sizes(&self) -> &[u16] {
        self.block.queue_max_sizes()
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.block.read_config(offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        self.block.write_config(offset, data);
    }

    fn set_features(&mut self, features: u64) {
        self.block.set_features(features);
    }

    fn activate(&mut self, activation: Activation) -> io::Result<()> {
        assert!(self.active.is_none(), "activated twice");
        self.active = Some((activation.mem, activation.features));
        Ok(())
    }

    fn start_queue(&mut self, index: u16, queue: Queue, _doorbell: EventFd) -> io::Result<()> {
        let (mem, features) = self.active.as_ref().expect("started before it is active");
        assert!(queue.ready(), "it is not ready");
        let place = &mut self.queues[usize::from(index)];
        assert!(place.is_none(), "started twice");
        let disk = Arc::clone(&self.disk);
        let (queue, answered) = fuzzing::serve(disk, *features, mem, queue);
        *place = Some(queue);
        answered.map(drop).map_err(io::Error::other)
    }

    fn stop_queue(&mut self, index: u16) -> Option<u16> {
        let queue = self.queues[usize::from(index)].take();
        queue.map(|queue| queue.next_avail())
    }

    fn reset(&mut self) {
        self.active = None;
        self.queues = [None, None];
        self.block.reset();
    }
}

/// A device behind registers, and a guest that uses them.
pub struct Machine {
    device: VirtioMmio,
    irq: EventFd,
    mem: GuestMemory,
}

impl Machine {
    pub fn new(device: Box<dyn VirtioDevice>) -> Self {
        let mem = guest_memory();
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let device = VirtioMmio::new(device, mem.clone(), irq.try_clone().unwrap()).unwrap();
        Self { device, irq, mem }
    }

    /// Does what `input` says, and resets the device.
    pub fn run(&self, input: &mut Input<'_>) {
        clear(&self.mem);
        let mut driver = Driver::new(&self.mem, 16);
        for _ in 0..STEPS {
            if input.is_empty() {
                break;
            }
            match input.byte() % 8 {
                0..3 => driver.step(input),
                3 => self.start(&mut driver, input),
                4 => self.write(0x50, input.byte().into()),
                5 => self.read_any(input),
                6 => self.write_any(input),
                _ => self.set_up_queue(&driver, input),
            }
        }
        self.device.shutdown();
        assert_eq!(self.read(0x70), 0, "it has been reset");
        let _ = self.irq.read();
    }

    fn read(&self, register: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(register, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, register: u64, value: u32) {
        self.device.write(register, &value.to_le_bytes());
    }

    /// As a driver should begin, up to somewhere.
    fn start(&self, driver: &mut Driver<'_>, input: &mut Input<'_>) {
        self.write(0x70, 0);
        self.write(0x70, 3);
        let more = [FEATURE_EVENT_IDX, FEATURE_RING_RESET, 1 << 12, 1 << 13];
        let features = FEATURES | input.choose(&more) ^ input.choose(&more);
        for half in [0, 1] {
            self.write(0x24, half);
            self.write(0x20, (features >> (32 * half)) as u32);
        }
        self.write(0x70, 0xb);
        driver.size = 1 << input.below(5);
        self.set_up(0, driver.size);
        if input.byte() < 240 {
            self.write(0x70, 0xf);
        }
    }

    fn set_up(&self, queue: u32, size: u16) {
        self.write(0x30, queue);
        self.write(0x38, size.into());
        self.write(0x80, TABLE as u32);
        self.write(0x90, AVAILABLE as u32);
        self.write(0xa0, USED as u32);
        self.write(0x44, 1);
    }

    /// Resets or stops a queue, and sets it up again.
    fn set_up_queue(&self, driver: &Driver<'_>, input: &mut Input<'_>) {
        let queue = u32::from(input.byte() % 3);
        self.write(0x30, queue);
        match input.byte() % 3 {
            0 => self.write(0xc0, 1),
            1 => self.write(0x44, 0),
            _ => {}
        }
        self.set_up(queue, driver.size);
    }

    /// A register, mostly.
    fn register(input: &mut Input<'_>) -> u64 {
        match input.byte() {
            0..200 => u64::from(input.byte()) * 4 % 0x140,
            200..240 => u64::from(input.u16()) % 0x200,
            _ => input.value(),
        }
    }

    fn read_any(&self, input: &mut Input<'_>) {
        let mut bytes = [0xee; 16];
        let len = input.choose(&[4, 4, 4, 1, 2, 8, 0, 16]);
        self.device.read(Self::register(input), &mut bytes[..len]);
    }

    fn write_any(&self, input: &mut Input<'_>) {
        let register = Self::register(input);
        let value = input.value().to_le_bytes();
        let len = input.choose(&[4, 4, 4, 1, 2, 8, 0, 3]);
        self.device.write(register, &value[..len]);
    }
}
