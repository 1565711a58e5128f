//! The disks: opened as configured, and put behind a virtio-mmio transport.

use std::path::PathBuf;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use tandem_block::qcow2::{OpenOptions, Qcow2};
use tandem_block::{Disk, Raw};
use tandem_devices::GuestMemory;
use tandem_devices::bus::Bus;
use tandem_devices::virtio::block::{Block, Options, Stats};
use tandem_devices::virtio::mmio::{self, VirtioMmio};

use crate::acpi::VirtioDevice;
use crate::config::{DiskConfig, DiskFormat};
use crate::error::{Error, HostContext, Result};
use crate::interrupts;
use crate::layout;

/// Opens the image of `config`.
pub fn open(config: &DiskConfig) -> Result<Arc<dyn Disk>> {
    match config.format {
        DiskFormat::Raw => Ok(Arc::new(Raw::open_with(
            &config.path,
            config.read_only,
            config.files,
        )?)),
        DiskFormat::Qcow2 => open_qcow2(config),
    }
}

fn open_qcow2(config: &DiskConfig) -> Result<Arc<dyn Disk>> {
    let default = OpenOptions::default();
    let options = OpenOptions {
        read_only: config.read_only,
        data_file: config.data_file.clone(),
        follow: config.follow.unwrap_or(default.follow),
        backing_format: config.backing_format,
        l2_cache_size: config.l2_cache_size.unwrap_or(default.l2_cache_size),
        files: config.files,
        ..default
    };
    match Qcow2::open(&config.path, &options) {
        Ok(disk) => Ok(Arc::new(disk)),
        Err(tandem_block::Error::NotQcow2 { file, .. }) => Err(Error::NotQcow2 { path: file }),
        Err(error) => Err(error.into()),
    }
}

/// How the disk of `config` is offered to a guest with `cpus` CPUs.
fn options(config: &DiskConfig, cpus: u8) -> Options {
    let mut options = Options::default();
    options.serial = config.serial;
    options.queues = config.queue_count(cpus);
    options.threads = config.threads.map_or(options.threads, usize::from);
    options.rate = config.rate;
    options.poll = config.poll;
    options
}

/// Where the guest finds disk number `index`.
pub fn place(index: usize) -> VirtioDevice {
    // There are at most `layout::MAX_DISKS`.
    let index = index as u32;
    VirtioDevice {
        base: layout::VIRTIO_MMIO as u32 + index * mmio::REGION_SIZE as u32,
        size: mmio::REGION_SIZE as u32,
        gsi: layout::DISK_GSI + index,
    }
}

/// A disk that is attached to the guest.
pub struct Attached {
    path: PathBuf,
    disk: Arc<dyn Disk>,
    stats: Arc<Stats>,
    transport: Arc<VirtioMmio>,
}

impl Attached {
    /// Attaches `disk` at `place`.
    pub fn new(
        vm: &VmFd,
        mem: &GuestMemory,
        mmio: &mut Bus,
        place: VirtioDevice,
        config: &DiskConfig,
        cpus: u8,
        disk: Arc<dyn Disk>,
    ) -> Result<Self> {
        let base = u64::from(place.base);
        let block = Box::new(Block::new(disk.clone(), options(config, cpus)));
        let stats = block.handle().stats();
        let irq = interrupts::line(vm, place.gsi)?;
        let transport = VirtioMmio::new(block, mem.clone(), irq).host("set up a disk")?;
        for (queue, doorbell) in (0..).zip(transport.doorbells()) {
            interrupts::doorbell(vm, doorbell, base + mmio::QUEUE_NOTIFY, queue)?;
        }
        let transport = Arc::new(transport);
        mmio.insert(base, mmio::REGION_SIZE, transport.clone())
            .map_err(std::io::Error::other)
            .host("place a disk")?;
        Ok(Self {
            path: config.path.clone(),
            disk,
            stats,
            transport,
        })
    }

    /// The image's path, and what has gone wrong on the disk.
    pub fn stats(&self) -> (PathBuf, Arc<Stats>) {
        (self.path.clone(), self.stats.clone())
    }

    /// Ends the disk's threads, with their requests completed.
    pub fn stop(&self) {
        self.transport.shutdown();
    }

    /// Makes everything durable, for the last time. Call it after [`Attached::stop`].
    pub fn close(&self) -> std::result::Result<(), (PathBuf, tandem_block::Error)> {
        self.disk.close().map_err(|e| (self.path.clone(), e))
    }
}
