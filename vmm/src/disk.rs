//! The disks: opened as configured, and put behind a virtio-mmio transport.

use std::fs;
use std::path::PathBuf;
use std::sync::Arc;

use kvm_ioctls::VmFd;
use tandem_block::qcow2::{Base, DataFileLayout, OpenOptions, OverlayOptions, OverlayPlace, Qcow2};
use tandem_block::{
    CacheMode, Disk, FileUsers, ImageFormat, ImageView, LiveDisk, LiveImage, Locking, Raw,
};
use tandem_devices::GuestMemory;
use tandem_devices::bus::Bus;
use tandem_devices::virtio::block::{Block, Handle, Options};
use tandem_devices::virtio::mmio::{self, VirtioMmio};

use crate::acpi::VirtioDevice;
use crate::config::DiskConfig;
use crate::control::Operated;
use crate::error::{Error, HostContext, Result};
use crate::interrupts;
use crate::layout;

/// An image that is open.
#[derive(Clone)]
pub struct Image {
    /// How it has been opened, and how others will be that come to be in its place.
    pub open_options: OpenOptions,
    /// What a temporary overlay, which has no name, stands on.
    temporary_on: Option<PathBuf>,
    /// The guest's disk.
    pub disk: Arc<LiveDisk>,
}

/// What a disk consists of now.
pub struct Description {
    /// Where its image is; of a temporary overlay, what it stands on.
    pub path: PathBuf,
    /// The format of that.
    pub format: ImageFormat,
    /// Where the guest's data is.
    pub kind: &'static str,
    /// The external data file.
    pub data_file: Option<PathBuf>,
}

impl Image {
    /// Where it is now.
    pub fn path(&self) -> PathBuf {
        self.describe().path
    }

    /// What it consists of now.
    pub fn describe(&self) -> Description {
        let mut description = self.disk.with_image(describe);
        if let Some(base) = &self.temporary_on {
            description.path.clone_from(base);
        }
        description
    }
}

/// Tells what `image` is.
pub fn describe(image: ImageView<'_>) -> Description {
    let data_file = image.data_file();
    let (format, kind) = match (image.is_qcow2(), &data_file) {
        (false, _) => (ImageFormat::Raw, "raw"),
        (true, None) => (ImageFormat::Qcow2, "internal"),
        (true, Some(file)) if file.layout == DataFileLayout::Packed => {
            (ImageFormat::Qcow2, "packed")
        }
        (true, Some(file)) if file.is_raw => (ImageFormat::Qcow2, "external-raw"),
        (true, Some(_)) => (ImageFormat::Qcow2, "external"),
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
    open_image(config).map_err(with_users)
}

fn open_image(config: &DiskConfig) -> Result<Image> {
    if let Some(place) = &config.overlay {
        return open_overlay(config, place);
    }
    let open_options = open_options(config);
    if config.format == ImageFormat::Raw {
        let disk = Raw::open_with(&config.path, config.read_only, config.files)?;
        return Ok(Image::new(disk, open_options));
    }
    let disk = Qcow2::open(&config.path, &open_options).map_err(with_hint)?;
    Ok(Image::new(disk, open_options))
}

/// Opens the overlay of the image of `config`, which is made if it is not there yet.
fn open_overlay(config: &DiskConfig, place: &OverlayPlace) -> Result<Image> {
    config.check_overlay()?;
    let base = Base::open(&config.path, config.format, &open_options(config)).map_err(with_hint)?;
    let mut options = OverlayOptions {
        place: place.clone(),
        open: open_options(config),
        ..OverlayOptions::default()
    };
    let files = &mut options.open.files;
    if files.locking == Locking::ForceShare {
        // That is for what is read.
        files.locking = Locking::On;
    }
    match place {
        OverlayPlace::Temporary { .. } => {
            if !files.cache.is_direct() {
                // Nobody finds it after a failure of power.
                files.cache = CacheMode::Unsafe;
            }
            let overlay = base.overlay(&options)?;
            Ok(Image {
                temporary_on: Some(config.path.clone()),
                ..Image::new(overlay, options.open)
            })
        }
        OverlayPlace::Kept { path, data_file } => {
            let disk = if path.exists() {
                options.open.data_file = data_file.clone();
                base.open_overlay(path, &options.open)?
            } else {
                base.overlay(&options)?
            };
            Ok(Image::new(disk, options.open))
        }
    }
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

/// An image that is not qcow2 may have been meant to be raw.
fn with_hint(error: tandem_block::Error) -> Error {
    match error {
        tandem_block::Error::NotQcow2 { file, .. } => Error::NotQcow2 { path: file },
        error => error.into(),
    }
}

/// Adds who uses a file that is in use.
fn with_users(error: Error) -> Error {
    let Error::Disk(error) = error else {
        return error;
    };
    let file = match &error {
        tandem_block::Error::Locked { file, .. } => fs::metadata(file).ok(),
        _ => None,
    };
    match file.and_then(|file| FileUsers::of(&file).lock_holders()) {
        Some(users) => Error::DiskInUse { error, users },
        None => error.into(),
    }
}

impl Image {
    fn new(image: impl Into<LiveImage>, open_options: OpenOptions) -> Self {
        Self {
            open_options,
            temporary_on: None,
            disk: Arc::new(LiveDisk::new(image)),
        }
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::Path;

    use tandem_block::qcow2::{CreateOptions, create};
    use tandem_block::{Preallocation, VolatileSlice};

    const SIZE: u64 = 1 << 20;

    fn write(disk: &dyn Disk, byte: u8) {
        disk.write_at(&[VolatileSlice::from(&mut [byte; 4096][..])], 4096)
            .unwrap();
    }

    fn byte(disk: &dyn Disk) -> u8 {
        let mut sector = [0; 512];
        disk.read_at(&[VolatileSlice::from(&mut sector[..])], 4096)
            .unwrap();
        sector[0]
    }

    /// A raw base and a qcow2 one, of sevens.
    fn bases(directory: &Path) -> [String; 2] {
        let (raw, image) = (directory.join("raw"), directory.join("image"));
        Raw::create(&raw, SIZE, Preallocation::Off).unwrap();
        let options = CreateOptions {
            size: SIZE,
            data_file: Some(directory.join("image.data")),
            ..CreateOptions::default()
        };
        create(&image, &options).unwrap();
        let bases = [
            format!("{},format=raw", raw.display()),
            image.display().to_string(),
        ];
        for base in &bases {
            let disk = open(&base.parse().unwrap()).unwrap().disk;
            write(&*disk, 7);
            disk.close().unwrap();
        }
        bases
    }

    fn open_text(text: &str) -> Result<Image> {
        open(&text.parse().unwrap())
    }

    #[test]
    fn overlays_of_each_kind() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().display().to_string();
        let names = || fs::read_dir(dir.path()).unwrap().count();
        for base in bases(dir.path()) {
            let path: DiskConfig = base.parse().unwrap();
            let before = fs::read(&path.path).unwrap();
            let count = names();
            for (keys, kind) in [
                ("", "internal"),
                (",cache=none", "internal"),
                (",overlay-data-file=temp,l2-cache-size=1M", "external"),
            ] {
                let text = format!("{base},overlay=temp,overlay-dir={directory}{keys}");
                let image = open_text(&text).unwrap();
                assert_eq!(
                    (image.describe().kind, image.describe().format),
                    (kind, ImageFormat::Qcow2)
                );
                assert_eq!((&image.path(), image.disk.size()), (&path.path, SIZE));
                assert_eq!(byte(&*image.disk), 7);
                write(&*image.disk, 8);
                assert_eq!(byte(&*image.disk), 8);
                image.disk.close().unwrap();
                assert_eq!(names(), count);
            }
            for keys in [",follow=anywhere", ",locking=force-share"] {
                let text = format!("{base},overlay={directory}/over{keys}");
                // It is made, and found again.
                for expected in [7, 9] {
                    let image = open_text(&text).unwrap();
                    let path = dir.path().join("over");
                    assert_eq!((image.describe().kind, &image.path()), ("internal", &path));
                    assert_eq!(byte(&*image.disk), expected);
                    write(&*image.disk, 9);
                    image.disk.close().unwrap();
                }
                fs::remove_file(dir.path().join("over")).unwrap();
            }
            let data = format!("{base},overlay={directory}/over,overlay-data-file={directory}/d");
            for expected in [7, 9] {
                let image = open_text(&data).unwrap();
                assert_eq!(image.describe().kind, "external");
                assert_eq!(byte(&*image.disk), expected);
                write(&*image.disk, 9);
                image.disk.close().unwrap();
            }
            for name in ["over", "d"] {
                fs::remove_file(dir.path().join(name)).unwrap();
            }
            assert!(fs::read(&path.path).unwrap() == before);
        }
    }

    #[test]
    fn overlays_that_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let directory = dir.path().display().to_string();
        let [raw, image] = bases(dir.path());
        let refused = |text: String, reason: &str| {
            let error = open_text(&text).map(drop).unwrap_err().to_string();
            assert!(error.contains(reason), "{error}");
        };
        drop(open_text(&format!("{image},overlay={directory}/over")).unwrap());
        refused(
            format!("{raw},overlay={directory}/over"),
            "image' and not '",
        );
        refused(
            format!("{image},overlay={directory}/raw"),
            "not in qcow2 format",
        );
        refused(format!("{directory}/raw,overlay=temp"), "format=raw");
        refused(
            format!("{image},overlay=temp,overlay-dir={directory}/none"),
            "No such file",
        );
        fs::copy(dir.path().join("image"), dir.path().join("copy")).unwrap();
        refused(
            format!("{image},overlay={directory}/copy"),
            "it has none, and is no overlay of '",
        );
        let image_in_use = open_text(&format!("{image},overlay=temp")).unwrap();
        refused(image.clone(), "lock");
        refused(format!("{directory}/image.data,format=raw"), "lock");
        drop(image_in_use);
        let file = fs::File::options()
            .write(true)
            .open(dir.path().join("image.data"));
        file.unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
        refused(format!("{image},overlay={directory}/over"), "has changed (");
        let mut config: DiskConfig = format!("{image},overlay=temp").parse().unwrap();
        config.read_only = true;
        let error = open(&config).map(drop).unwrap_err().to_string();
        assert!(error.contains("exclude each other"), "{error}");
    }

    #[test]
    fn many_machines_share_one_base() {
        let dir = tempfile::tempdir().unwrap();
        for base in bases(dir.path()) {
            let text = format!("{base},overlay=temp,overlay-dir={}", dir.path().display());
            let disks: Vec<_> = (0..50).map(|_| open_text(&text).unwrap().disk).collect();
            for (number, disk) in (10..).zip(&disks) {
                assert_eq!(byte(&**disk), 7);
                write(&**disk, number);
            }
            for (number, disk) in (10..).zip(&disks) {
                assert_eq!(byte(&**disk), number);
            }
        }
    }
}
