//! The disks: opened as configured, and put behind a virtio-mmio transport.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvm_ioctls::VmFd;
use tandem_block::qcow2::{DataFileLayout, OpenOptions, Qcow2};
use tandem_block::{Disk, LiveDisk, LiveImage, Raw};
use tandem_devices::GuestMemory;
use tandem_devices::bus::Bus;
use tandem_devices::virtio::block::{Block, Handle, Options};
use tandem_devices::virtio::mmio::{self, VirtioMmio};

use crate::acpi::VirtioDevice;
use crate::config::{DiskConfig, DiskFormat};
use crate::control::Operated;
use crate::error::{Error, HostContext, Result};
use crate::interrupts;
use crate::layout;

/// An image that is open.
#[derive(Clone)]
pub struct Image {
    /// How it has been opened, and how others will be that come to be in its place.
    pub open_options: OpenOptions,
    /// The guest's disk.
    pub disk: Arc<LiveDisk>,
}

/// What a disk consists of now.
pub struct Description {
    /// Where its image is.
    pub path: PathBuf,
    /// The format of that.
    pub format: DiskFormat,
    /// Where the guest's data is.
    pub kind: &'static str,
    /// The external data file.
    pub data_file: Option<PathBuf>,
}

impl Image {
    /// Where it is now.
    pub fn path(&self) -> PathBuf {
        self.disk.with_image(|image| image.path().to_owned())
    }

    /// What it consists of now.
    pub fn describe(&self) -> Description {
        self.disk.with_image(describe)
    }
}

/// Tells what `image` is.
pub fn describe(image: &LiveImage) -> Description {
    let data_file = image.qcow2().and_then(Qcow2::data_file);
    let (format, kind) = match (image.qcow2(), &data_file) {
        (None, _) => (DiskFormat::Raw, "raw"),
        (Some(_), None) => (DiskFormat::Qcow2, "internal"),
        (Some(_), Some(file)) if file.layout == DataFileLayout::Packed => {
            (DiskFormat::Qcow2, "packed")
        }
        (Some(_), Some(file)) if file.is_raw => (DiskFormat::Qcow2, "external-raw"),
        (Some(_), Some(_)) => (DiskFormat::Qcow2, "external"),
    };
    Description {
        path: image.path().to_owned(),
        format,
        kind,
        data_file: data_file.map(|file| file.path),
    }
}

/// Opens the image of `config`.
pub fn open(config: &DiskConfig) -> Result<Image> {
    let open_options = open_options(config);
    let image: LiveImage = match config.format {
        DiskFormat::Raw => Raw::open_with(&config.path, config.read_only, config.files)?.into(),
        DiskFormat::Qcow2 => open_qcow2(&config.path, &open_options)?.into(),
    };
    Ok(Image {
        open_options,
        disk: Arc::new(LiveDisk::new(image)),
    })
}

fn open_options(config: &DiskConfig) -> OpenOptions {
    let default = OpenOptions::default();
    OpenOptions {
        read_only: config.read_only,
        data_file: config.data_file.clone(),
        follow: config.follow.unwrap_or(default.follow),
        backing_format: config.backing_format,
        l2_cache_size: config.l2_cache_size.unwrap_or(default.l2_cache_size),
        files: config.files,
        ..default
    }
}

fn open_qcow2(path: &Path, options: &OpenOptions) -> Result<Qcow2> {
    Qcow2::open(path, options).map_err(|error| match error {
        tandem_block::Error::NotQcow2 { file, .. } => Error::NotQcow2 { path: file },
        error => error.into(),
    })
}

/// How the disk of `config` is offered to a guest, on so many queues.
pub fn options(config: &DiskConfig, queues: u16) -> Options {
    let mut options = Options::default();
    options.serial = config.serial;
    options.queues = queues;
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
    image: Image,
    handle: Handle,
    transport: Arc<VirtioMmio>,
}

impl Attached {
    /// Attaches the disk of `config`, which is `image`, at `place`.
    pub fn new(
        vm: &VmFd,
        mem: &GuestMemory,
        mmio: &mut Bus,
        place: VirtioDevice,
        (config, image): (&DiskConfig, Image),
        cpus: u8,
    ) -> Result<Self> {
        let base = u64::from(place.base);
        let options = options(config, config.queue_count(cpus));
        let block = Box::new(Block::new(image.disk.clone(), options));
        let handle = block.handle();
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
            image,
            handle,
            transport,
        })
    }

    /// The disk, for whoever operates it.
    pub fn operated(&self) -> Operated {
        Operated::new(self.image.clone(), self.handle.clone())
    }

    /// Ends the disk's threads, with their requests completed.
    pub fn stop(&self) {
        self.transport.shutdown();
    }

    /// Makes everything durable, for the last time. Call it after [`Attached::stop`].
    pub fn close(&self) -> std::result::Result<(), (PathBuf, tandem_block::Error)> {
        let path = || self.image.path();
        self.image.disk.close().map_err(|error| (path(), error))
    }
}
