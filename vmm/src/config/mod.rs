//! What to run, and how its parts are written on a command line.

mod disk;
mod overlay;

use std::ffi::OsStr;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::PathBuf;
use std::str::FromStr;

use tandem_devices::virtio::block::InvalidSerial;

use crate::{descriptor, layout};

pub use disk::{DiskConfig, split_commas};

/// A virtual machine to build.
#[derive(Debug, Clone, PartialEq, Eq)]
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
    /// Where a second serial port (`/dev/ttyS1` in Linux) sends what the guest writes to it; without it
    /// the machine has no such port. It has no input.
    pub output: Option<OutputConfig>,
    /// Whether there is a third serial port (`/dev/ttyS2` in Linux), where a line with a number up to 255
    /// ends the machine with [`ExitReason::Exit`](crate::ExitReason::Exit).
    pub exit_port: bool,
    /// Whether the threads of the VM, among them the one that runs it, are confined to the system calls
    /// that they need: see [`sandbox`](crate::sandbox). It needs the cargo feature of that name.
    pub seccomp: bool,
}

impl Config {
    /// What every kernel command line begins with.
    ///
    /// * The console is the serial port.
    /// * A kernel that panics restarts, which ends the VM, instead of hanging in it.
    /// * Restarts go through ACPI. On a hardware-reduced platform Linux would try EFI, which is not
    ///   there, and then jump to a BIOS, of which there is only as much as ends the VM.
    /// * There are no PCI devices, and the way to ask for them is the first one: Linux would take it for
    ///   missing otherwise, as no device answers, and report an error.
    pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1 reboot=a pci=conf1";
    /// RAM unless said otherwise: 512 MiB.
    pub const DEFAULT_MEMORY: u64 = 512 << 20;
    /// Least RAM: what is below 1 MiB belongs to the boot protocol and ACPI.
    pub const MIN_MEMORY: u64 = 2 << 20;
    /// Most CPUs.
    pub const MAX_CPUS: u8 = 32;
    /// Most disks: each has an interrupt line.
    pub const MAX_DISKS: usize = layout::MAX_DISKS;

    /// A machine with one CPU, the default RAM, no disk, and its console on standard input and
    /// output, not confined.
    pub fn new(kernel: impl Into<PathBuf>) -> Self {
        Self {
            kernel: kernel.into(),
            initrd: None,
            cmdline: String::new(),
            memory: Self::DEFAULT_MEMORY,
            cpus: 1,
            disks: Vec::new(),
            serial: SerialConfig::Stdio,
            output: None,
            exit_port: false,
            seccomp: false,
        }
    }

    /// The whole kernel command line.
    pub fn full_cmdline(&self) -> String {
        format!("{} {}", Self::DEFAULT_CMDLINE, self.cmdline)
            .trim_end()
            .to_owned()
    }

    /// Which of the serial ports of a PC there are, counted from 0.
    pub(crate) fn serial_ports(&self) -> Vec<usize> {
        let ports = [
            (layout::CONSOLE, true),
            (layout::OUTPUT, self.output.is_some()),
            (layout::EXIT, self.exit_port),
        ];
        let ports = ports.into_iter().filter(|(_, exists)| *exists);
        ports.map(|(number, _)| number).collect()
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
        if self.seccomp && !cfg!(feature = "sandbox") {
            return Err(Error::NoSandbox);
        }
        if self.serial == SerialConfig::Stdio && self.output == Some(OutputConfig::Stdout) {
            return Err(Error::OutputTwice);
        }
        Ok(())
    }
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

/// Where the output of the second serial port goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum OutputConfig {
    /// Standard output of this process.
    Stdout,
    /// Into a file, which is created or emptied.
    File(PathBuf),
    /// Into a file descriptor of this process, which is duplicated when the machine is built.
    Descriptor(i32),
}

/// Where a VM's metrics go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsTarget {
    /// To the end of a file, which may be a named pipe.
    File(PathBuf),
    /// Into a file descriptor that this process was started with.
    Descriptor(i32),
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
    /// Filters of system calls, which this crate is built without.
    #[error("seccomp is asked for, but tandem-vmm is built without its feature sandbox")]
    NoSandbox,
    /// A disk without a path.
    #[error("the path of the disk is missing: write PATH[,key=value...]")]
    DiskPath,
    /// Something after the path of a disk that is no `key=value`.
    #[error("'{0}' is not key=value; a comma that belongs to a path is written twice")]
    DiskOption(String),
    /// A key that disks do not have.
    #[error("unknown disk key '{0}'; known are {known}", known = listed(DiskConfig::KEYS, "and"))]
    DiskKey(String),
    /// A key that is there twice.
    #[error("disk key '{0}' is given twice")]
    DiskKeyTwice(&'static str),
    /// A value that its key does not take.
    #[error("disk key {key}: '{value}' is not {expected}")]
    DiskValue {
        /// The key.
        key: &'static str,
        /// The value.
        value: String,
        /// What the key takes.
        expected: String,
    },
    /// A key that needs another one.
    #[error("disk key {0} has no meaning without {1}")]
    DiskKeyAlone(&'static str, &'static str),
    /// Keys that do not go together.
    #[error("disk keys {0} and {1} exclude each other")]
    DiskKeysExclude(&'static str, &'static str),
    /// A serial number that a disk cannot have.
    #[error(transparent)]
    DiskSerial(InvalidSerial),
    /// A key that only qcow2 disks have, for a raw one.
    #[error("{0} belongs to format=qcow2; a raw disk has no such thing")]
    RawDisk(&'static str),
    /// Metrics into no file.
    #[error("'{0}' is neither a file nor fd=N")]
    Metrics(String),
    /// A second serial port that goes nowhere.
    #[error("'{0}' is not stdout, file=PATH or fd=N")]
    Output(String),
    /// Two serial ports on standard output.
    #[error(
        "the console and --output would be mixed up on standard output: \
         send the console elsewhere, as with --serial none"
    )]
    OutputTwice,
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

impl MetricsTarget {
    /// Reads `FILE` or `fd=N`.
    pub fn parse(text: &OsStr) -> Result<Self, Error> {
        let error = || Error::Metrics(lossy(text.as_bytes()));
        match text.as_bytes().strip_prefix(b"fd=") {
            None if text.is_empty() => Err(error()),
            None => Ok(Self::File(text.into())),
            Some(digits) => descriptor_number(digits)
                .map(Self::Descriptor)
                .ok_or_else(error),
        }
    }
}

impl OutputConfig {
    /// Checks that a descriptor can be written to. Do so before anything else is opened: one that was
    /// not inherited is found to be missing then.
    ///
    /// # Errors
    /// [`Error::Output`](crate::Error::Output).
    pub fn check(&self) -> crate::Result<()> {
        match self {
            Self::Descriptor(number) => descriptor::duplicate_output(*number).map(drop),
            _ => Ok(()),
        }
    }

    /// Reads `stdout`, `file=PATH` or `fd=N`.
    pub fn parse(text: &OsStr) -> Result<Self, Error> {
        let bytes = text.as_bytes();
        let parsed = if bytes == b"stdout" {
            Some(Self::Stdout)
        } else if let Some(digits) = bytes.strip_prefix(b"fd=") {
            descriptor_number(digits).map(Self::Descriptor)
        } else {
            let path = bytes.strip_prefix(b"file=");
            let path = path.filter(|path| !path.is_empty());
            path.map(|path| Self::File(os_path(path.to_owned())))
        };
        parsed.ok_or_else(|| Error::Output(lossy(bytes)))
    }
}

/// `names` as a sentence has them, with `word` before the last one.
pub(crate) fn listed(names: &[&str], word: &str) -> String {
    match names {
        [first @ .., last] if !first.is_empty() => format!("{} {word} {last}", first.join(", ")),
        _ => names.concat(),
    }
}

/// The number of a file descriptor, in digits.
fn descriptor_number(digits: &[u8]) -> Option<i32> {
    let is_digits = digits.iter().all(u8::is_ascii_digit);
    lossy(digits).parse().ok().filter(|_| is_digits)
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
    fn serial_console() {
        assert_eq!("stdio".parse(), Ok(SerialConfig::Stdio));
        assert_eq!("none".parse(), Ok(SerialConfig::None));
        assert_eq!("file=a,b".parse(), Ok(SerialConfig::File("a,b".into())));
        for text in ["", "file", "file=", "tty"] {
            assert!(text.parse::<SerialConfig>().is_err(), "{text}");
        }
    }

    #[test]
    fn metrics_targets() {
        let parse = |text: &str| MetricsTarget::parse(OsStr::new(text));
        assert_eq!(parse("a=b"), Ok(MetricsTarget::File("a=b".into())));
        assert_eq!(parse("fd=3"), Ok(MetricsTarget::Descriptor(3)));
        assert_eq!(parse("./fd=x"), Ok(MetricsTarget::File("./fd=x".into())));
        for text in ["", "fd=", "fd=-1", "fd=+1", "fd=x", "fd=99999999999"] {
            assert_eq!(parse(text), Err(Error::Metrics(text.into())), "{text}");
        }
    }

    #[test]
    fn outputs() {
        let parse = |text: &str| OutputConfig::parse(OsStr::new(text));
        assert_eq!(parse("stdout"), Ok(OutputConfig::Stdout));
        assert_eq!(parse("file=a=b"), Ok(OutputConfig::File("a=b".into())));
        assert_eq!(parse("fd=3"), Ok(OutputConfig::Descriptor(3)));
        for text in ["", "stdio", "file=", "fd=", "fd=-1", "fd=+1", "a"] {
            assert_eq!(parse(text), Err(Error::Output(text.into())), "{text}");
        }
        let mut config = Config::new("vmlinux");
        config.output = Some(OutputConfig::Stdout);
        assert_eq!(config.validate(), Err(Error::OutputTwice));
        config.serial = SerialConfig::None;
        assert_eq!(config.validate(), Ok(()));
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
        let confined = check(&|c| c.seccomp = true);
        assert_eq!(confined.is_ok(), cfg!(feature = "sandbox"));
        assert!(check(&|c| c.cmdline = "x".repeat(2048)).is_err());
        assert!(check(&|c| c.cmdline = "a\0b".into()).is_err());
        assert!(check(&|c| c.disks = vec![DiskConfig::new("d"); 19]).is_ok());
        assert!(check(&|c| c.disks = vec![DiskConfig::new("d"); 20]).is_err());
    }
}
