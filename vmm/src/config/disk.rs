//! Disks to attach, and how they are written on a command line.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use tandem_block::qcow2::{Follow, OverlayPlace};
use tandem_block::{CacheMode, FileOptions, ImageFormat, Locking};
use tandem_devices::virtio::block::{Rate, RateLimits, Serial};

use super::overlay::OverlayKeys;
use super::{Config, Error, listed, lossy, os_path, parse_memory};

/// Most memory for the L2 tables of a disk: it would hold those of 256 TiB in clusters of 64 KiB.
const MAX_L2_CACHE: usize = 32 << 30;
/// Most threads for requests that wait.
const MAX_THREADS: u16 = 256;
/// Longest search for requests, in microseconds: beyond, being called costs nothing in comparison.
const MAX_POLL: u64 = 10_000;
/// Without a burst of its own, a rate allows as much at once as in one part of a second out of so
/// many.
const BURST_PARTS: u64 = 10;

/// A disk to attach.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// Whether the guest is kept from writing.
    pub read_only: bool,
    /// What takes the guest's writes in place of the image, which is only read then, and can be shared.
    pub overlay: Option<OverlayPlace>,
    /// External data file to use instead of the one that a qcow2 header names.
    pub data_file: Option<PathBuf>,
    /// Where the names of files in a qcow2 image may lead; `None` is the engine's default.
    pub follow: Option<Follow>,
    /// Format of the backing file, where a qcow2 image does not tell it.
    pub backing_format: Option<ImageFormat>,
    /// What the guest reads as the disk's serial number.
    pub serial: Option<Serial>,
    /// Bytes of memory for the L2 tables of a qcow2 image; `None` is the engine's default.
    pub l2_cache_size: Option<usize>,
    /// Whether the disk's files are locked, and which caches lie before the medium.
    pub files: FileOptions,
    /// Queues, each with a thread of its own, 1 to [`DiskConfig::MAX_QUEUES`]; `None` is one for
    /// each CPU, up to [`DiskConfig::DEFAULT_QUEUES`].
    pub queues: Option<u16>,
    /// Threads for requests that wait for the host's disk; `None` is the device's default.
    pub threads: Option<u16>,
    /// What the guest may do in a second.
    pub rate: RateLimits,
    /// How long a queue's thread looks for requests before it waits to be called.
    pub poll: Duration,
}

/// The keys of rates, until all are known.
#[derive(Default)]
struct RateKeys {
    iops: Option<u64>,
    iops_burst: Option<u64>,
    bw: Option<u64>,
    bw_burst: Option<u64>,
}

impl DiskConfig {
    /// Most queues of a disk: each may belong to a CPU.
    pub const MAX_QUEUES: u16 = Config::MAX_CPUS as u16;
    /// Most queues of a disk that does not say how many.
    pub const DEFAULT_QUEUES: u16 = 16;

    /// A writable qcow2 disk.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: ImageFormat::Qcow2,
            read_only: false,
            overlay: None,
            data_file: None,
            follow: None,
            backing_format: None,
            serial: None,
            l2_cache_size: None,
            files: FileOptions::default(),
            queues: None,
            threads: None,
            rate: RateLimits::default(),
            poll: Duration::ZERO,
        }
    }

    /// The keys that may follow the path of a disk on a command line.
    pub const KEYS: &[&str] = &[
        "readonly",
        "format",
        "cache",
        "locking",
        "data-file",
        "follow",
        "backing-format",
        "overlay",
        "overlay-data-file",
        "overlay-dir",
        "l2-cache-size",
        "serial",
        "queues",
        "threads",
        "poll",
        "iops",
        "iops-burst",
        "bw",
        "bw-burst",
    ];

    /// Reads `PATH[,key=value...]`. A comma that belongs to the path or to a value is written twice.
    pub fn parse(text: &OsStr) -> Result<Self, Error> {
        let mut parts = split_commas(text.as_bytes()).into_iter();
        let path = parts.next().filter(|path| !path.is_empty());
        let mut disk = Self::new(os_path(path.ok_or(Error::DiskPath)?));
        let mut rates = RateKeys::default();
        let mut overlay = OverlayKeys::default();
        let mut seen = Vec::new();
        for part in parts {
            let at = part
                .iter()
                .position(|b| *b == b'=')
                .ok_or_else(|| Error::DiskOption(lossy(&part)))?;
            let (key, value) = (&part[..at], &part[at + 1..]);
            let known = Self::KEYS.iter().find(|known| known.as_bytes() == key);
            let key = *known.ok_or_else(|| Error::DiskKey(lossy(key)))?;
            let is_set = disk.set_file(key, value)?
                || disk.set_device(key, value, &mut rates)?
                || overlay.set(key, value)?;
            if !is_set {
                return Err(Error::DiskKey(key.to_owned()));
            }
            if seen.contains(&key) {
                return Err(Error::DiskKeyTwice(key));
            }
            seen.push(key);
        }
        disk.rate = rates.limits()?;
        disk.overlay = overlay.place()?;
        disk.check_overlay()?;
        let has_overlay = disk.overlay.is_some();
        let qcow2_only = [
            (disk.data_file.is_some(), "data-file"),
            (disk.backing_format.is_some(), "backing-format"),
            // An overlay is qcow2 whatever it lies on.
            (disk.follow.is_some() && !has_overlay, "follow"),
            (
                disk.l2_cache_size.is_some() && !has_overlay,
                "l2-cache-size",
            ),
        ];
        match qcow2_only.into_iter().find(|(is_given, _)| *is_given) {
            Some((_, key)) if disk.format == ImageFormat::Raw => Err(Error::RawDisk(key)),
            _ => Ok(disk),
        }
    }

    /// Sets what `key` tells of the disk's files. Returns whether it tells anything of them.
    fn set_file(&mut self, key: &'static str, value: &[u8]) -> Result<bool, Error> {
        match key {
            "readonly" => {
                self.read_only = match value {
                    b"on" => true,
                    b"off" => false,
                    _ => return Err(wrong(key, value, "on or off")),
                }
            }
            "format" => self.format = format(key, value)?,
            "cache" => {
                let (all, name) = (CacheMode::ALL, CacheMode::name);
                self.files.cache = choose(key, value, CacheMode::from_name, all, name)?;
            }
            "locking" => {
                let (all, name) = (Locking::ALL, Locking::name);
                self.files.locking = choose(key, value, Locking::from_name, all, name)?;
            }
            "data-file" if value.is_empty() => {
                return Err(wrong(key, value, "the path of a file"));
            }
            "data-file" => self.data_file = Some(os_path(value.to_owned())),
            "follow" => {
                let (all, name) = (Follow::ALL, Follow::name);
                self.follow = Some(choose(key, value, Follow::from_name, all, name)?);
            }
            "backing-format" => self.backing_format = Some(format(key, value)?),
            "l2-cache-size" => {
                let expected = "a size of up to 32G with a unit, as in 4M";
                let size = parse_memory(&lossy(value)).ok();
                let size = size.and_then(|size| usize::try_from(size).ok());
                let size = size.filter(|size| *size <= MAX_L2_CACHE);
                self.l2_cache_size = Some(size.ok_or_else(|| wrong(key, value, expected))?);
            }
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Sets what `key` tells of the device. Returns whether it tells anything of it.
    fn set_device(
        &mut self,
        key: &'static str,
        value: &[u8],
        rates: &mut RateKeys,
    ) -> Result<bool, Error> {
        match key {
            "serial" => self.serial = Some(lossy(value).parse().map_err(Error::DiskSerial)?),
            "queues" => {
                let max = u64::from(Self::MAX_QUEUES);
                self.queues = Some(number(key, value, 1..=max)? as u16);
            }
            "threads" => {
                let max = u64::from(MAX_THREADS);
                self.threads = Some(number(key, value, 1..=max)? as u16);
            }
            "poll" => {
                self.poll = Duration::from_micros(number(key, value, 0..=MAX_POLL)?);
            }
            "iops" => rates.iops = Some(number(key, value, 1..=MAX_RATE)?),
            "iops-burst" => rates.iops_burst = Some(number(key, value, 1..=MAX_RATE)?),
            "bw" => rates.bw = Some(bytes(key, value)?),
            "bw-burst" => rates.bw_burst = Some(bytes(key, value)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// Refuses a disk that cannot be written with an overlay that takes the writes.
    pub(crate) fn check_overlay(&self) -> Result<(), Error> {
        if self.overlay.is_some() && self.read_only {
            return Err(Error::DiskKeysExclude("readonly=on", "overlay"));
        }
        Ok(())
    }

    /// The number of queues, in a machine with `cpus` CPUs.
    pub fn queue_count(&self, cpus: u8) -> u16 {
        let default = u16::from(cpus).min(Self::DEFAULT_QUEUES);
        self.queues.unwrap_or(default)
    }
}

/// Largest number that [`Rate`] takes.
const MAX_RATE: u64 = 1 << 53;

impl RateKeys {
    fn limits(&self) -> Result<RateLimits, Error> {
        let mut limits = RateLimits::default();
        limits.requests = rate("iops", self.iops, "iops-burst", self.iops_burst)?;
        limits.bytes = rate("bw", self.bw, "bw-burst", self.bw_burst)?;
        Ok(limits)
    }
}

fn rate(
    key: &'static str,
    per_second: Option<u64>,
    burst_key: &'static str,
    burst: Option<u64>,
) -> Result<Option<Rate>, Error> {
    let Some(per_second) = per_second else {
        return match burst {
            None => Ok(None),
            Some(_) => Err(Error::DiskKeyAlone(burst_key, key)),
        };
    };
    let burst = burst.unwrap_or((per_second / BURST_PARTS).max(1));
    Ok(Rate::new(per_second, burst))
}

/// The value of `key`, which is a name that `find` knows: one of those of `all`, as the message says.
fn choose<T: Copy>(
    key: &'static str,
    value: &[u8],
    find: fn(&str) -> Option<T>,
    all: &[T],
    name: fn(T) -> &'static str,
) -> Result<T, Error> {
    find(&lossy(value)).ok_or_else(|| {
        let names: Vec<_> = all.iter().map(|choice| name(*choice)).collect();
        wrong(key, value, listed(&names, "or"))
    })
}

fn format(key: &'static str, value: &[u8]) -> Result<ImageFormat, Error> {
    let (all, name) = (ImageFormat::ALL, ImageFormat::name);
    choose(key, value, ImageFormat::from_name, all, name)
}

/// A whole number within `range`.
fn number(
    key: &'static str,
    value: &[u8],
    range: std::ops::RangeInclusive<u64>,
) -> Result<u64, Error> {
    let text = lossy(value);
    let is_digits = !text.is_empty() && text.bytes().all(|b| b.is_ascii_digit());
    let number = text.parse().ok().filter(|_| is_digits);
    number.filter(|n| range.contains(n)).ok_or_else(|| {
        let expected = format!("a whole number from {} to {}", range.start(), range.end());
        wrong(key, value, expected)
    })
}

/// A rate or a burst of bytes.
fn bytes(key: &'static str, value: &[u8]) -> Result<u64, Error> {
    let size = parse_memory(&lossy(value)).ok();
    let size = size.filter(|size| (1..=MAX_RATE).contains(size));
    let expected = "a size from 1K to 8192T with a unit, as in 100M";
    size.ok_or_else(|| wrong(key, value, expected))
}

pub(super) fn wrong(key: &'static str, value: &[u8], expected: impl Into<String>) -> Error {
    Error::DiskValue {
        key,
        value: lossy(value),
        expected: expected.into(),
    }
}

impl FromStr for DiskConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(OsStr::new(text))
    }
}

/// Splits at single commas; two commas stand for one that belongs to the part.
pub fn split_commas(text: &[u8]) -> Vec<Vec<u8>> {
    let mut parts = vec![Vec::new()];
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte == b',' && bytes.next_if_eq(&b',').is_none() {
            parts.push(Vec::new());
        } else if let Some(part) = parts.last_mut() {
            part.push(byte);
        }
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks() {
        let disk: DiskConfig = "a.qcow2".parse().unwrap();
        assert_eq!(disk, DiskConfig::new("a.qcow2"));

        let disk: DiskConfig = "x=1,,2.img,readonly=on,data-file=d,,d.raw,serial=A1"
            .parse()
            .unwrap();
        assert_eq!(
            disk,
            DiskConfig {
                read_only: true,
                data_file: Some("d,d.raw".into()),
                serial: Some("A1".parse().unwrap()),
                ..DiskConfig::new("x=1,2.img")
            }
        );
        let disk: DiskConfig = "a,l2-cache-size=512K".parse().unwrap();
        assert_eq!(disk.l2_cache_size, Some(512 << 10));
        let disk: DiskConfig = "a,follow=anywhere,backing-format=raw".parse().unwrap();
        assert_eq!(disk.follow, Some(Follow::Anywhere));
        assert_eq!(disk.backing_format, Some(ImageFormat::Raw));
        let disk: DiskConfig = "a,cache=none,locking=off".parse().unwrap();
        assert_eq!(
            (disk.files.cache, disk.files.locking),
            (CacheMode::None, Locking::Off)
        );
        let disk: DiskConfig = "a,format=raw,readonly=off".parse().unwrap();
        assert_eq!((disk.format, disk.read_only), (ImageFormat::Raw, false));

        let not_utf8 = OsStr::from_bytes(b"\xff.img,format=raw");
        let disk = DiskConfig::parse(not_utf8).unwrap();
        assert_eq!(disk.path.as_os_str().as_bytes(), b"\xff.img");
    }

    #[test]
    fn disk_errors() {
        let error = |text: &str| text.parse::<DiskConfig>().unwrap_err();
        assert_eq!(error(""), Error::DiskPath);
        assert_eq!(error(",readonly=on"), Error::DiskPath);
        assert_eq!(error("a,ro"), Error::DiskOption("ro".into()));
        assert_eq!(error("a,"), Error::DiskOption(String::new()));
        assert_eq!(error("a,aio=native"), Error::DiskKey("aio".into()));
        assert_eq!(
            error("a,readonly=on,readonly=on"),
            Error::DiskKeyTwice("readonly")
        );
        assert_eq!(
            error("a,format=raw,data-file=b"),
            Error::RawDisk("data-file")
        );
        assert_eq!(
            error("a,l2-cache-size=1M,format=raw"),
            Error::RawDisk("l2-cache-size")
        );
        for text in [
            "a,readonly=yes",
            "a,format=vmdk",
            "a,data-file=",
            "a,overlay=",
            "a,overlay=temp,overlay-data-file=",
            "a,overlay=temp,overlay-dir=",
            "a,follow=me",
            "a,cache=",
            "a,locking=auto",
            "a,backing-format=vmdk",
            "a,l2-cache-size=1000",
            "a,l2-cache-size=1T",
            "a,queues=0",
            "a,queues=33",
            "a,queues=+1",
            "a,threads=0",
            "a,threads=257",
            "a,poll=10001",
            "a,poll=10us",
            "a,iops=0",
            "a,iops=1K",
            "a,iops=9007199254740993",
            "a,bw=1000",
            "a,bw=0M",
            "a,bw-burst=8193T",
        ] {
            assert!(matches!(error(text), Error::DiskValue { .. }), "{text}");
        }
        for serial in ["", "123456789012345678901", "\u{e9}"] {
            let text = format!("a,serial={serial}");
            assert!(matches!(error(&text), Error::DiskSerial(_)), "{text}");
        }
        assert_eq!(
            error("a,bw-burst=1M"),
            Error::DiskKeyAlone("bw-burst", "bw")
        );
        let message = error("a,queues=99999999999999999999").to_string();
        assert_eq!(
            message,
            "disk key queues: '99999999999999999999' is not a whole number from 1 to 32"
        );
        let message = error("a,locking=auto").to_string();
        assert_eq!(
            message,
            "disk key locking: 'auto' is not on, force-share or off"
        );
    }

    #[test]
    fn queues_and_threads() {
        let disk: DiskConfig = "a,queues=3,threads=256,poll=50".parse().unwrap();
        assert_eq!((disk.queues, disk.threads), (Some(3), Some(256)));
        assert_eq!(disk.poll, Duration::from_micros(50));
        assert_eq!(disk.queue_count(1), 3);
        let disk = DiskConfig::new("a");
        assert_eq!([1, 4, 16, 32].map(|n| disk.queue_count(n)), [1, 4, 16, 16]);
    }

    #[test]
    fn rates() {
        let rates = |text: &str| {
            let rate = text.parse::<DiskConfig>().unwrap().rate;
            (rate.requests, rate.bytes)
        };
        assert_eq!(rates("a"), (None, None));
        let both = (Rate::new(500, 50), Rate::new(10 << 20, 1 << 20));
        assert_eq!(rates("a,iops=500,bw=10M"), both);
        // The burst may come first.
        let both = (Rate::new(5, 1), Rate::new(1 << 10, 64 << 10));
        assert_eq!(rates("a,bw-burst=64K,iops=5,bw=1K"), both);
        assert_eq!(rates("a,iops-burst=7,iops=5"), (Rate::new(5, 7), None));
    }
}
