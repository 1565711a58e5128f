//! An unmodified block driver, written by others, drives the device through its registers.
//!
//! `VirtIOBlk` of the crate `virtio-drivers` runs in this process; its transport reads and writes
//! the registers as a vCPU would, and its memory is guest memory.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a test fails by panicking"
)]

mod common;
#[path = "common/machine.rs"]
mod machine;

use std::ptr::NonNull;
use std::sync::atomic::Ordering;
use std::sync::{Arc, LazyLock, Mutex};

use common::disk::{BLOCK_SIZE, MemoryDisk};
use machine::{Machine, SERIAL, within_deadline};
use tandem_block::{Disk, Raw};
use tandem_devices::GuestMemory;
use tandem_devices::bus::BusDevice;
use tandem_devices::virtio::block::{Block, Options};
use tandem_devices::virtio::mmio::VirtioMmio;
use tandem_devices::virtio::{FEATURE_EVENT_IDX, FEATURE_INDIRECT_DESC, VirtioDevice};
use virtio_drivers::device::blk::{BlkReq, BlkResp, RespStatus, VirtIOBlk};
use virtio_drivers::transport::{DeviceStatus, DeviceType, InterruptStatus, Transport};
use virtio_drivers::{BufferDirection, Error, Hal, PAGE_SIZE, PhysAddr};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use zerocopy::{FromBytes, Immutable, IntoBytes};

/// Bit of `VIRTIO_BLK_F_FLUSH`.
const FEATURE_FLUSH: u64 = 1 << 9;

/// Guest memory and its pages in use. The driver's memory functions have no receiver, so that all
/// tests share it.
struct Arena {
    mem: GuestMemory,
    used: Mutex<Vec<bool>>,
}

static ARENA: LazyLock<Arena> = LazyLock::new(|| {
    let size = 8 << 20;
    Arena {
        mem: GuestMemory::from_ranges(&[(GuestAddress(0), size)]).unwrap(),
        // Physical address 0 means failure to the driver.
        used: Mutex::new((0..size / PAGE_SIZE).map(|page| page == 0).collect()),
    }
});

impl Arena {
    fn allocate(&self, pages: usize) -> u64 {
        let mut used = self.used.lock().unwrap();
        let first = (0..=used.len() - pages)
            .find(|&first| !used[first..first + pages].contains(&true))
            .expect("guest memory is used up");
        used[first..first + pages].fill(true);
        let addr = (first * PAGE_SIZE) as u64;
        let zeros = vec![0; pages * PAGE_SIZE];
        self.mem.write_slice(&zeros, GuestAddress(addr)).unwrap();
        addr
    }

    fn free(&self, addr: u64, pages: usize) {
        let first = addr as usize / PAGE_SIZE;
        self.used.lock().unwrap()[first..first + pages].fill(false);
    }
}

struct ArenaHal;

// SAFETY: `dma_alloc` returns zeroed, page-aligned pages of a mapping that lives as long as the
// process and marks them used, so that nothing else is given them; the other functions copy.
unsafe impl Hal for ArenaHal {
    fn dma_alloc(pages: usize, _direction: BufferDirection) -> (PhysAddr, NonNull<u8>) {
        let addr = ARENA.allocate(pages);
        let host = ARENA.mem.get_host_address(GuestAddress(addr)).unwrap();
        (addr, NonNull::new(host).unwrap())
    }

    unsafe fn dma_dealloc(paddr: PhysAddr, _vaddr: NonNull<u8>, pages: usize) -> i32 {
        ARENA.free(paddr, pages);
        0
    }

    unsafe fn mmio_phys_to_virt(_paddr: PhysAddr, _size: usize) -> NonNull<u8> {
        unreachable!("only for PCI")
    }

    unsafe fn share(buffer: NonNull<[u8]>, direction: BufferDirection) -> PhysAddr {
        let addr = ARENA.allocate(buffer.len().div_ceil(PAGE_SIZE));
        if direction != BufferDirection::DeviceToDriver {
            // SAFETY: the caller passes a valid buffer that nobody writes to meanwhile.
            let bytes = unsafe { buffer.as_ref() };
            ARENA.mem.write_slice(bytes, GuestAddress(addr)).unwrap();
        }
        addr
    }

    unsafe fn unshare(paddr: PhysAddr, mut buffer: NonNull<[u8]>, direction: BufferDirection) {
        if direction != BufferDirection::DriverToDevice {
            // SAFETY: the caller passes a valid buffer that nobody else uses meanwhile.
            let bytes = unsafe { buffer.as_mut() };
            ARENA.mem.read_slice(bytes, GuestAddress(paddr)).unwrap();
        }
        ARENA.free(paddr, buffer.len().div_ceil(PAGE_SIZE));
    }
}

/// The registers as the driver uses them.
struct Registers {
    device: Arc<VirtioMmio>,
    /// Features that the driver shall not see.
    hidden: u64,
    /// Whether the doorbell is rung as a hypervisor does it, without a register write.
    has_ioeventfd: bool,
}

impl Registers {
    fn read(&self, offset: u64) -> u32 {
        let mut bytes = [0; 4];
        self.device.read(offset, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    fn write(&self, offset: u64, value: u32) {
        self.device.write(offset, &value.to_le_bytes());
    }

    fn write_address(&self, offset: u64, address: u64) {
        self.write(offset, address as u32);
        self.write(offset + 4, (address >> 32) as u32);
    }
}

impl Transport for Registers {
    fn device_type(&self) -> DeviceType {
        assert_eq!(self.read(0x00).to_le_bytes(), *b"virt");
        assert_eq!(self.read(0x04), 2);
        self.read(0x08).try_into().unwrap()
    }

    fn read_device_features(&mut self) -> u64 {
        self.write(0x14, 0);
        let low = u64::from(self.read(0x10));
        self.write(0x14, 1);
        (low | u64::from(self.read(0x10)) << 32) & !self.hidden
    }

    fn write_driver_features(&mut self, features: u64) {
        self.write(0x24, 0);
        self.write(0x20, features as u32);
        self.write(0x24, 1);
        self.write(0x20, (features >> 32) as u32);
    }

    fn max_queue_size(&mut self, queue: u16) -> u32 {
        self.write(0x30, queue.into());
        self.read(0x34)
    }

    fn notify(&mut self, queue: u16) {
        if self.has_ioeventfd {
            self.device.doorbells()[usize::from(queue)]
                .write(1)
                .unwrap();
        } else {
            self.write(0x50, queue.into());
        }
    }

    fn get_status(&self) -> DeviceStatus {
        DeviceStatus::from_bits_retain(self.read(0x70))
    }

    fn set_status(&mut self, status: DeviceStatus) {
        self.write(0x70, status.bits());
        assert_eq!(self.get_status(), status);
    }

    fn set_guest_page_size(&mut self, _guest_page_size: u32) {}

    fn requires_legacy_layout(&self) -> bool {
        false
    }

    fn queue_set(
        &mut self,
        queue: u16,
        size: u32,
        descriptors: PhysAddr,
        driver_area: PhysAddr,
        device_area: PhysAddr,
    ) {
        self.write(0x30, queue.into());
        self.write(0x38, size);
        self.write_address(0x80, descriptors);
        self.write_address(0x90, driver_area);
        self.write_address(0xa0, device_area);
        self.write(0x44, 1);
        assert_eq!(self.read(0x44), 1);
    }

    fn queue_unset(&mut self, queue: u16) {
        self.write(0x30, queue.into());
        self.write(0x44, 0);
        assert_eq!(self.read(0x44), 0);
    }

    fn queue_used(&mut self, queue: u16) -> bool {
        self.write(0x30, queue.into());
        self.read(0x44) != 0
    }

    fn ack_interrupt(&mut self) -> InterruptStatus {
        let status = self.read(0x60);
        self.write(0x64, status);
        InterruptStatus::from_bits_truncate(status)
    }

    fn read_config_generation(&self) -> u32 {
        self.read(0xfc)
    }

    fn read_config_space<T: FromBytes + IntoBytes>(
        &self,
        offset: usize,
    ) -> virtio_drivers::Result<T> {
        let mut value = T::new_zeroed();
        self.device
            .read(0x100 + offset as u64, value.as_mut_bytes());
        Ok(value)
    }

    fn write_config_space<T: IntoBytes + Immutable>(
        &mut self,
        offset: usize,
        value: T,
    ) -> virtio_drivers::Result<()> {
        self.device.write(0x100 + offset as u64, value.as_bytes());
        Ok(())
    }
}

type Driver = VirtIOBlk<ArenaHal, Registers>;

fn machine(disk: Arc<dyn Disk>) -> Machine {
    Machine::new(disk, &ARENA.mem)
}

fn registers(machine: &Machine, hidden: u64) -> Registers {
    Registers {
        device: Arc::clone(&machine.device),
        hidden,
        has_ioeventfd: false,
    }
}

fn driver(machine: &Machine) -> Driver {
    driver_without(machine, 0)
}

/// A driver that does not see the features `hidden`.
fn driver_without(machine: &Machine, hidden: u64) -> Driver {
    VirtIOBlk::new(registers(machine, hidden)).unwrap()
}

fn pattern(len: usize, seed: u8) -> Vec<u8> {
    (0..len).map(|i| (i % 251) as u8 ^ seed).collect()
}

#[test]
fn negotiates() {
    within_deadline(|| {
        let machine = machine(Arc::new(MemoryDisk::new(100)));
        let registers = registers(&machine, 0);
        assert_eq!(registers.device_type(), DeviceType::Block);
        assert_eq!(registers.read_config_space::<u32>(12), Ok(254), "seg_max");
        assert_eq!(registers.read_config_space::<u32>(20), Ok(BLOCK_SIZE));
        let driver = driver(&machine);
        assert_eq!(driver.capacity(), 100);
        assert!(!driver.readonly());
    });
}

/// With a real file, in all four combinations of the ring features that the driver knows.
#[test]
fn writes_reads_and_flushes_a_file() {
    within_deadline(|| {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk.raw");
        std::fs::write(&path, vec![0; 1 << 20]).unwrap();
        let machine = machine(Arc::new(Raw::open(&path, false).unwrap()));
        let mut expected = vec![0; 1 << 20];
        for (seed, hidden) in [
            0,
            FEATURE_EVENT_IDX,
            FEATURE_INDIRECT_DESC,
            FEATURE_EVENT_IDX | FEATURE_INDIRECT_DESC,
        ]
        .into_iter()
        .enumerate()
        {
            let mut driver = driver_without(&machine, hidden);
            // More requests than the queue has entries, so that all indices wrap.
            for i in 0..40 {
                let sector = (i * 37 + seed) % 1900;
                let data = pattern(512 * (1 + i % 64), (i + seed) as u8);
                driver.write_blocks(sector, &data).unwrap();
                expected[sector * 512..][..data.len()].copy_from_slice(&data);
                let mut back = vec![0; data.len()];
                driver.read_blocks(sector, &mut back).unwrap();
                assert!(back == data, "request {i} without features {hidden:#x}");
            }
            driver.flush().unwrap();
            assert!(std::fs::read(&path).unwrap() == expected);
        }
        assert_eq!(machine.stats.failed_requests(), 0);
        assert_eq!(machine.stats.last_error(), None);
    });
}

#[test]
fn flushes_when_asked_or_else_after_each_write() {
    within_deadline(|| {
        let disk = Arc::new(MemoryDisk::new(16));
        let machine = machine(Arc::clone(&disk) as Arc<dyn Disk>);
        let mut driver = driver(&machine);
        driver.write_blocks(0, &[1; 512]).unwrap();
        assert_eq!(disk.flushes.load(Ordering::SeqCst), 0);
        driver.flush().unwrap();
        assert_eq!(disk.flushes.load(Ordering::SeqCst), 1);
        drop(driver);

        let mut driver = driver_without(&machine, FEATURE_FLUSH);
        driver.write_blocks(0, &[2; 512]).unwrap();
        assert_eq!(disk.flushes.load(Ordering::SeqCst), 2);
    });
}

#[test]
fn a_disk_without_a_write_cache_is_never_flushed() {
    within_deadline(|| {
        let disk = Arc::new(MemoryDisk::without_write_cache(16));
        let block = Block::new(Arc::clone(&disk) as Arc<dyn Disk>, Options::default());
        assert_eq!(block.features() & FEATURE_FLUSH, 0);
        let machine = machine(Arc::clone(&disk) as Arc<dyn Disk>);
        let mut driver = driver(&machine);
        driver.write_blocks(0, &[1; 512]).unwrap();
        driver.flush().unwrap();
        assert_eq!(disk.content()[..512], [1; 512]);
        assert_eq!(disk.flushes.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn tells_its_serial() {
    within_deadline(|| {
        let machine = machine(Arc::new(MemoryDisk::new(16)));
        let mut id = [0; 20];
        assert_eq!(driver(&machine).device_id(&mut id), Ok(20));
        assert_eq!(&id, SERIAL);
    });
}

#[test]
fn refuses_what_lies_beyond_the_end_and_goes_on() {
    within_deadline(|| {
        let machine = machine(Arc::new(MemoryDisk::new(16)));
        let mut driver = driver(&machine);
        let mut buf = [0; 1024];
        assert_eq!(driver.read_blocks(15, &mut buf), Err(Error::IoError));
        assert_eq!(driver.write_blocks(16, &buf), Err(Error::IoError));
        assert_eq!(driver.read_blocks(1 << 55, &mut buf), Err(Error::IoError));
        driver.read_blocks(14, &mut buf).unwrap();
        assert_eq!(buf, *[[14; 512], [15; 512]].as_flattened());
        assert_eq!(machine.stats.failed_requests(), 3);
        // The guest's mistakes are not for the operator to read.
        assert_eq!(machine.stats.last_error(), None);
    });
}

#[test]
fn starts_again_after_a_reset() {
    within_deadline(|| {
        let machine = machine(Arc::new(MemoryDisk::new(16)));
        for round in 0..20 {
            let mut driver = driver(&machine);
            let mut buf = [0; 512];
            driver.read_blocks(3, &mut buf).unwrap();
            let before = if round == 0 { 3 } else { round - 1 };
            assert_eq!(buf, [before; 512]);
            driver.write_blocks(3, &[round; 512]).unwrap();
            // Dropping the driver stops the queue; the next one begins with a reset.
        }
        machine.device.shutdown();
        assert!(registers(&machine, 0).get_status().is_empty());
        machine.device.shutdown();
    });
}

#[test]
fn read_only_disk_takes_no_writes() {
    within_deadline(|| {
        let disk = Arc::new(MemoryDisk::read_only(16));
        let machine = machine(Arc::clone(&disk) as Arc<dyn Disk>);
        let mut driver = driver(&machine);
        assert!(driver.readonly());
        assert_eq!(driver.write_blocks(0, &[7; 512]), Err(Error::IoError));
        let mut buf = [0; 512];
        driver.read_blocks(9, &mut buf).unwrap();
        assert_eq!(buf, [9; 512]);
        driver.flush().unwrap();
        assert_eq!(disk.writes.load(Ordering::SeqCst), 0);
    });
}

#[test]
fn survives_a_failing_disk() {
    within_deadline(|| {
        let disk = Arc::new(MemoryDisk::new(16));
        let machine = machine(Arc::clone(&disk) as Arc<dyn Disk>);
        let mut driver = driver(&machine);
        let mut buf = [0; 512];
        disk.is_failing.store(true, Ordering::SeqCst);
        assert_eq!(driver.read_blocks(2, &mut buf), Err(Error::IoError));
        assert_eq!(driver.write_blocks(2, &buf), Err(Error::IoError));
        assert_eq!(driver.flush(), Err(Error::IoError));
        disk.is_failing.store(false, Ordering::SeqCst);
        driver.read_blocks(2, &mut buf).unwrap();
        assert_eq!(buf, [2; 512]);
        assert_eq!(machine.stats.failed_requests(), 3);
        let error = machine.stats.last_error().unwrap();
        assert!(
            error.contains("'test.disk'") && error.contains("No space left"),
            "{error}"
        );
    });
}

/// Requests that are begun, left alone, and finished when the interrupt has come.
#[test]
fn interrupts_when_requests_are_done() {
    within_deadline(|| {
        let machine = machine(Arc::new(MemoryDisk::new(16)));
        for hidden in [0, FEATURE_EVENT_IDX] {
            let mut driver = driver_without(&machine, hidden);
            for sector in 0..16 {
                let mut request = BlkReq::default();
                let mut response = BlkResp::default();
                let mut buf = [0xee; 512];
                // SAFETY: the buffers are used again only after the request is complete.
                let token =
                    unsafe { driver.read_blocks_nb(sector, &mut request, &mut buf, &mut response) }
                        .unwrap();
                machine.wait_for_interrupt();
                assert!(driver.ack_interrupt() == InterruptStatus::QUEUE_INTERRUPT);
                assert!(driver.ack_interrupt().is_empty());
                assert_eq!(driver.peek_used(), Some(token));
                // SAFETY: these are the buffers of the request.
                unsafe {
                    driver
                        .complete_read_blocks(token, &request, &mut buf, &mut response)
                        .unwrap();
                }
                assert_eq!(response.status(), RespStatus::OK);
                assert_eq!(buf, [sector as u8; 512]);
            }
        }
    });
}

#[test]
fn does_not_interrupt_a_driver_that_polls() {
    within_deadline(|| {
        let machine = machine(Arc::new(MemoryDisk::new(16)));
        let mut driver = driver_without(&machine, FEATURE_EVENT_IDX);
        driver.disable_interrupts();
        let mut buf = [0; 512];
        for sector in 0..16 {
            driver.read_blocks(sector, &mut buf).unwrap();
        }
        drop(driver);
        // The device has let go of the queue: what it had to signal, it has signalled.
        assert!(machine.irq.read().is_err(), "an interrupt was not wanted");
    });
}

#[test]
fn listens_to_its_doorbell() {
    within_deadline(|| {
        let machine = machine(Arc::new(MemoryDisk::new(16)));
        assert_eq!(machine.device.doorbells().len(), 1);
        let mut registers = registers(&machine, 0);
        registers.has_ioeventfd = true;
        let mut driver = VirtIOBlk::<ArenaHal, _>::new(registers).unwrap();
        let mut buf = [0; 512];
        for sector in 0..16 {
            driver.read_blocks(sector, &mut buf).unwrap();
            assert_eq!(buf, [sector as u8; 512]);
        }
    });
}
