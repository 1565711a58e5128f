//! What to run, and how its parts are written on a command line.

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use tandem_block::qcow2::{BackingFormat, Follow};
use tandem_block::{CacheMode, FileOptions, Locking};
use tandem_devices::virtio::block::{InvalidSerial, Serial};

use crate::layout;

/// Most memory for the L2 tables of a disk: it would hold those of 256 TiB in clusters of 64 KiB.
const MAX_L2_CACHE: usize = 32 << 30;

/// A virtual machine to build.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Config {
    /// Linux `vmlinux` (ELF) or `bzImage`, or another ELF64 program for bare metal.
    pub kernel: PathBuf,
    /// Initial RAM disk.
    pub initrd: Option<PathBuf>,
    /// Kernel command line, after [`Config::DEFAULT_CMDLINE`].
    pub cmdline: String,
    /// RAM in bytes, a multiple of 4 KiB.
    pub memory: u64,
    /// Number of CPUs, 1 to [`Config::MAX_CPUS`].
    pub cpus: u8,
    /// Disks in the order in which the guest finds them.
    pub disks: Vec<DiskConfig>,
    /// The guest's console.
    pub serial: SerialConfig,
}

impl Config {
    /// What every kernel command line begins with.
    ///
    /// * The console is the serial port.
    /// * A kernel that panics restarts, which ends the VM, instead of hanging in it.
    /// * Restarts go through ACPI. On a hardware-reduced platform Linux would try EFI, which is not
    ///   there, and then jump to a BIOS, of which there is only as much as ends the VM.
    pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 reboot=a";
    /// RAM unless said otherwise: 512 MiB.
    pub const DEFAULT_MEMORY: u64 = 512 << 20;
    /// Least RAM: what is below 1 MiB belongs to the boot protocol and ACPI.
    pub const MIN_MEMORY: u64 = 2 << 20;
    /// Most CPUs.
    pub const MAX_CPUS: u8 = 32;
    /// Most disks: each has an interrupt line.
    pub const MAX_DISKS: usize = layout::MAX_DISKS;

    /// A machine with one CPU, the default RAM, no disk, and its console on standard input and
    /// output.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            memory: Self::DEFAULT_MEMORY,
            cpus: 1,
            disks: Vec::new(),
            serial: SerialConfig::Stdio,
        }
    }

    /// The whole kernel command line.
    pub fn full_cmdline(&self) -> String {
        format!("{} {}", Self::DEFAULT_CMDLINE, self.cmdline)
            .trim_end()
            .to_owned()
    }

    /// Checks what does not depend on files or on the host.
    pub fn validate(&self) -> Result<(), Error> {
        if self.memory < Self::MIN_MEMORY || !self.memory.is_multiple_of(4096) {
            return Err(Error::Memory(self.memory));
        }
        if !(1..=Self::MAX_CPUS).contains(&self.cpus) {
            return Err(Error::Cpus(self.cpus));
        }
        if self.disks.len() > Self::MAX_DISKS {
            return Err(Error::Disks(self.disks.len()));
        }
        let length = self.full_cmdline().len();
        if length >= layout::CMDLINE_SIZE {
            return Err(Error::CmdlineLength(length));
        }
        if self.cmdline.contains('\0') {
            return Err(Error::CmdlineNul);
        }
        Ok(())
    }
}

/// A disk to attach.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct DiskConfig {
    /// The image.
    pub path: PathBuf,
    /// Its format.
    pub format: DiskFormat,
    /// Whether the guest is kept from writing.
    pub read_only: bool,
    /// External data file to use instead of the one that a qcow2 header names.
    pub data_file: Option<PathBuf>,
    /// Where the names of files in a qcow2 image may lead; `None` is the engine's default.
    pub follow: Option<Follow>,
    /// Format of the backing file, where a qcow2 image does not tell it.
    pub backing_format: Option<BackingFormat>,
    /// What the guest reads as the disk's serial number.
    pub serial: Option<Serial>,
    /// Bytes of memory for the L2 tables of a qcow2 image; `None` is the engine's default.
    pub l2_cache_size: Option<usize>,
    /// Whether the disk's files are locked, and which caches lie before the medium.
    pub files: FileOptions,
}

/// How a disk image is laid out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DiskFormat {
    /// qcow2, version 2 or 3.
    #[default]
    Qcow2,
    /// The file is the disk. Never guessed: a guest can write a qcow2 header into its raw disk.
    Raw,
}

/// Where the guest's serial console goes.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum SerialConfig {
    /// Standard input and output of this process.
    #[default]
    Stdio,
    /// Nowhere: output is dropped, there is no input.
    None,
    /// Output into a file, which is created or emptied; no input.
    File(PathBuf),
}

/// What is wrong with a [`Config`] or with one of its written forms.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// Memory out of range.
    #[error(
        "{0} bytes of memory: must be a multiple of 4 KiB and at least {min} MiB",
        min = Config::MIN_MEMORY >> 20
    )]
    Memory(u64),
    /// Memory that is no number with a unit.
    #[error("'{0}' is not a size: write a whole number and K, M, G or T, as in 512M")]
    MemorySyntax(String),
    /// Number of CPUs out of range.
    #[error("{0} CPUs: must be 1 to {max}", max = Config::MAX_CPUS)]
    Cpus(u8),
    /// Too many disks.
    #[error("{0} disks: there are interrupt lines for {max}", max = Config::MAX_DISKS)]
    Disks(usize),
    /// Command line too long for the kernel.
    #[error(
        "the kernel command line has {0} bytes, the kernel takes {max}",
        max = layout::CMDLINE_SIZE - 1
    )]
    CmdlineLength(usize),
    /// Command line with a NUL, which would end it.
    #[error("the kernel command line holds a NUL")]
    CmdlineNul,
    /// A disk without a path.
    #[error("the path of the disk is missing: write PATH[,key=value...]")]
    DiskPath,
    /// Something after the path of a disk that is no `key=value`.
    #[error("'{0}' is not key=value; a comma that belongs to a path is written twice")]
    DiskOption(String),
    /// A key that disks do not have.
    #[error(
        "unknown disk key '{0}'; known are readonly, format, cache, locking, data-file, follow, \
         backing-format, serial and l2-cache-size"
    )]
    DiskKey(String),
    /// A key that is there twice.
    #[error("disk key '{0}' is given twice")]
    DiskKeyTwice(String),
    /// A value that its key does not take.
    #[error("disk key {key}: '{value}' is not {expected}")]
    DiskValue {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What the key takes.
        expected: &'static str,
    },
    /// A serial number that a disk cannot have.
    #[error(transparent)]
    DiskSerial(InvalidSerial),
    /// A key that only qcow2 disks have, for a raw one.
    #[error("{0} belongs to format=qcow2; a raw disk has no such thing")]
    RawDisk(&'static str),
    /// A serial console that there is not.
    #[error("'{0}' is not stdio, none or file=PATH")]
    Serial(String),
}

/// Reads a size in bytes: a whole number and a unit (`K`, `M`, `G` or `T`: powers of 1024).
///
/// The unit is required, because programs disagree on what a number without one means.
pub fn parse_memory(text: &str) -> Result<u64, Error> {
    let error = || Error::MemorySyntax(text.to_owned());
    let unit = text.chars().next_back().ok_or_else(error)?;
    let shift = match unit.to_ascii_uppercase() {
        'K' => 10,
        'M' => 20,
        'G' => 30,
        'T' => 40,
        _ => return Err(error()),
    };
    let digits = &text[..text.len() - 1];
    if digits.is_empty() || !digits.bytes().all(|b| b.is_ascii_digit()) {
        return Err(error());
    }
    let number: u64 = digits.parse().map_err(|_| error())?;
    number.checked_mul(1 << shift).ok_or_else(error)
}

impl DiskConfig {
    /// A writable qcow2 disk.
    pub fn new(path: impl Into<PathBuf>) -> Self {
        Self {
            path: path.into(),
            format: DiskFormat::default(),
            read_only: false,
            data_file: None,
            follow: None,
            backing_format: None,
            serial: None,
            l2_cache_size: None,
            files: FileOptions::default(),
        }
    }

    /// Reads `PATH[,key=value...]`. A comma that belongs to the path or to a value is written twice.
    pub fn parse(text: &OsStr) -> Result<Self, Error> {
        let mut parts = split_commas(text.as_bytes()).into_iter();
        let path = parts.next().filter(|path| !path.is_empty());
        let mut disk = Self::new(os_path(path.ok_or(Error::DiskPath)?));
        let mut seen: Vec<Vec<u8>> = Vec::new();
        for part in parts {
            let at = part
                .iter()
                .position(|b| *b == b'=')
                .ok_or_else(|| Error::DiskOption(lossy(&part)))?;
            let (key, value) = (&part[..at], &part[at + 1..]);
            disk.set(key, value)?;
            if seen.iter().any(|k| k == key) {
                return Err(Error::DiskKeyTwice(lossy(key)));
            }
            seen.push(key.to_owned());
        }
        let qcow2_only = [
            (disk.data_file.is_some(), "data-file"),
            (disk.follow.is_some(), "follow"),
            (disk.backing_format.is_some(), "backing-format"),
            (disk.l2_cache_size.is_some(), "l2-cache-size"),
        ];
        match qcow2_only.into_iter().find(|(is_given, _)| *is_given) {
            Some((_, key)) if disk.format == DiskFormat::Raw => Err(Error::RawDisk(key)),
            _ => Ok(disk),
        }
    }

    fn set(&mut self, key: &[u8], value: &[u8]) -> Result<(), Error> {
        let error = |key, expected| Error::DiskValue {
            key,
            value: lossy(value),
            expected,
        };
        match key {
            b"readonly" => {
                self.read_only = match value {
                    b"on" => true,
                    b"off" => false,
                    _ => return Err(error("readonly", "on or off")),
                }
            }
            b"format" => {
                self.format = match value {
                    b"qcow2" => DiskFormat::Qcow2,
                    b"raw" => DiskFormat::Raw,
                    _ => return Err(error("format", "qcow2 or raw")),
                }
            }
            b"cache" => {
                self.files.cache = CacheMode::from_name(&lossy(value)).ok_or_else(|| {
                    error(
                        "cache",
                        "writeback, none, writethrough, directsync or unsafe",
                    )
                })?;
            }
            b"locking" => {
                self.files.locking = match value {
                    b"on" => Locking::On,
                    b"force-share" => Locking::ForceShare,
                    b"off" => Locking::Off,
                    _ => return Err(error("locking", "on, force-share or off")),
                };
            }
            b"data-file" if value.is_empty() => {
                return Err(error("data-file", "the path of a file"));
            }
            b"data-file" => self.data_file = Some(os_path(value.to_owned())),
            b"follow" => {
                self.follow = Some(match value {
                    b"nothing" => Follow::Nothing,
                    b"image-directory" => Follow::ImageDirectory,
                    b"anywhere" => Follow::Anywhere,
                    _ => return Err(error("follow", "nothing, image-directory or anywhere")),
                });
            }
            b"backing-format" => {
                self.backing_format = Some(match value {
                    b"raw" => BackingFormat::Raw,
                    b"qcow2" => BackingFormat::Qcow2,
                    _ => return Err(error("backing-format", "raw or qcow2")),
                });
            }
            b"serial" => {
                self.serial = Some(lossy(value).parse().map_err(Error::DiskSerial)?);
            }
            b"l2-cache-size" => {
                let size = parse_memory(&lossy(value)).ok();
                let size = size.and_then(|size| usize::try_from(size).ok());
                self.l2_cache_size =
                    Some(size.filter(|size| *size <= MAX_L2_CACHE).ok_or_else(|| {
                        error("l2-cache-size", "a size of up to 32G with a unit, as in 4M")
                    })?);
            }
            _ => return Err(Error::DiskKey(lossy(key))),
        }
        Ok(())
    }
}

impl SerialConfig {
    /// Reads `stdio`, `none` or `file=PATH`.
    pub fn parse(text: &OsStr) -> Result<Self, Error> {
        match text.as_bytes() {
            b"stdio" => Ok(Self::Stdio),
            b"none" => Ok(Self::None),
            other => match other.strip_prefix(b"file=") {
                Some(path) if !path.is_empty() => Ok(Self::File(os_path(path.to_owned()))),
                _ => Err(Error::Serial(lossy(other))),
            },
        }
    }
}

impl FromStr for SerialConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(OsStr::new(text))
    }
}

impl FromStr for DiskConfig {
    type Err = Error;

    fn from_str(text: &str) -> Result<Self, Error> {
        Self::parse(OsStr::new(text))
    }
}

/// Splits at single commas; two commas stand for one that belongs to the part.
fn split_commas(text: &[u8]) -> Vec<Vec<u8>> {
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

fn os_path(bytes: Vec<u8>) -> PathBuf {
    std::ffi::OsString::from_vec(bytes).into()
}

fn lossy(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_needs_a_unit() {
        assert_eq!(parse_memory("512M"), Ok(512 << 20));
        assert_eq!(parse_memory("6g"), Ok(6 << 30));
        assert_eq!(parse_memory("2048K"), Ok(2 << 20));
        assert_eq!(parse_memory("1T"), Ok(1 << 40));
        for text in [
            "", "M", "512", "1.5G", "-1G", "+1G", "1 G", "512MB", "1\u{e9}",
        ] {
            assert!(
                matches!(parse_memory(text), Err(Error::MemorySyntax(t)) if t == text),
                "{text}"
            );
        }
        assert!(parse_memory("99999999999999999999G").is_err());
        assert!(parse_memory("18014398509481984K").is_err());
    }

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
                path: "x=1,2.img".into(),
                format: DiskFormat::Qcow2,
                read_only: true,
                data_file: Some("d,d.raw".into()),
                follow: None,
                backing_format: None,
                serial: Some("A1".parse().unwrap()),
                l2_cache_size: None,
                files: FileOptions::default(),
            }
        );
        let disk: DiskConfig = "a,l2-cache-size=512K".parse().unwrap();
        assert_eq!(disk.l2_cache_size, Some(512 << 10));
        let disk: DiskConfig = "a,follow=anywhere,backing-format=raw".parse().unwrap();
        assert_eq!(disk.follow, Some(Follow::Anywhere));
        assert_eq!(disk.backing_format, Some(BackingFormat::Raw));
        let disk: DiskConfig = "a,cache=none,locking=off".parse().unwrap();
        assert_eq!(
            (disk.files.cache, disk.files.locking),
            (CacheMode::None, Locking::Off)
        );
        let disk: DiskConfig = "a,format=raw,readonly=off".parse().unwrap();
        assert_eq!((disk.format, disk.read_only), (DiskFormat::Raw, false));

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
            Error::DiskKeyTwice("readonly".into())
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
            "a,follow=me",
            "a,cache=",
            "a,locking=auto",
            "a,backing-format=vmdk",
            "a,l2-cache-size=1000",
            "a,l2-cache-size=1T",
        ] {
            assert!(matches!(error(text), Error::DiskValue { .. }), "{text}");
        }
        for serial in ["", "123456789012345678901", "\u{e9}"] {
            let text = format!("a,serial={serial}");
            assert!(matches!(error(&text), Error::DiskSerial(_)), "{text}");
        }
    }

    #[test]
    fn serial_console() {
        assert_eq!("stdio".parse(), Ok(SerialConfig::Stdio));
        assert_eq!("none".parse(), Ok(SerialConfig::None));
        assert_eq!("file=a,b".parse(), Ok(SerialConfig::File("a,b".into())));
        for text in ["", "file", "file=", "tty"] {
            assert!(text.parse::<SerialConfig>().is_err(), "{text}");
        }
    }

    #[test]
    fn limits() {
        let good = Config::new("vmlinux");
        assert_eq!(good.validate(), Ok(()));
        assert_eq!(good.full_cmdline(), Config::DEFAULT_CMDLINE);
        let check = |change: &dyn Fn(&mut Config)| {
            let mut config = good.clone();
            change(&mut config);
            config.validate()
        };
        assert!(check(&|c| c.memory = 1 << 20).is_err());
        assert!(check(&|c| c.memory += 512).is_err());
        assert!(check(&|c| c.cpus = 0).is_err());
        assert!(check(&|c| c.cpus = 33).is_err());
        assert!(check(&|c| c.cpus = 32).is_ok());
        assert!(check(&|c| c.cmdline = "x".repeat(2048)).is_err());
        assert!(check(&|c| c.cmdline = "a\0b".into()).is_err());
        assert!(check(&|c| c.disks = vec![DiskConfig::new("d"); 19]).is_ok());
        assert!(check(&|c| c.disks = vec![DiskConfig::new("d"); 20]).is_err());
    }
}
