//! Runs one command in a Linux guest of its own, on a disk that many guests share and none can change:
//!
//! ```text
//! cargo run --release --example sandbox -- vmlinuz initrd.img base.raw 'make test'
//! ```
//!
//! prints what the command has written, and ends with its exit status. What the guest writes to its disk
//! goes to an overlay without a name, which is gone with the guest. `docs/sandbox.md` tells how to make the
//! initrd, whose `/init` is `sandbox-init` beside this file.

use std::error::Error;
use std::fs::File;
use std::io::{self, PipeReader, Read, Write};
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::mpsc::channel;
use std::thread;
use std::time::Duration;

use tandem_block::qcow2::OverlayPlace;
use tandem_vmm::{Config, DiskConfig, ExitReason, ImageFormat, OutputConfig, SerialConfig, Vmm};
use tempfile::TempDir;

/// More of what a command writes is thrown away.
pub const MAX_OUTPUT: u64 = 16 << 20;
/// More than this a guest cannot take.
pub const MEMORY: u64 = 128 << 20;

/// What all guests have in common.
pub struct Setting {
    pub kernel: PathBuf,
    pub initrd: Option<PathBuf>,
    /// A raw disk with the root file system.
    pub base: PathBuf,
    /// Where overlays take their space; without it, where temporary files do.
    pub scratch: Option<PathBuf>,
    /// The longest time that a command may take.
    pub limit: Duration,
}

/// A guest that is ready to run its command.
pub struct Guest {
    vmm: Vmm,
    output: PipeReader,
    limit: Duration,
    /// Holds the script until the guest has ended.
    _directory: TempDir,
}

/// What has become of a command.
pub struct Outcome {
    /// Its standard output and standard error, up to [`MAX_OUTPUT`].
    pub output: Vec<u8>,
    /// Its exit status, or why there is none: its time was up ([`ExitReason::Stopped`]), for instance.
    pub status: Result<u8, ExitReason>,
}

impl Guest {
    /// Builds a guest for `command`, a shell script.
    pub fn build(setting: &Setting, command: &str) -> Result<Self, Box<dyn Error>> {
        let directory = tempfile::tempdir()?;
        let script = directory.path().join("script");
        // A disk consists of sectors; empty lines do no harm to a script.
        let padding = "\n".repeat(512 - command.len() % 512);
        File::create(&script)?.write_all(format!("{command}{padding}").as_bytes())?;

        let mut base = DiskConfig::new(&setting.base);
        base.format = ImageFormat::Raw;
        base.overlay = Some(OverlayPlace::Temporary {
            directory: setting.scratch.clone(),
            data_file: false,
        });
        let mut script = DiskConfig::new(script);
        script.format = ImageFormat::Raw;
        script.read_only = true;

        let (output, writer) = io::pipe()?;
        let mut config = Config::new(&setting.kernel);
        config.initrd.clone_from(&setting.initrd);
        config.cmdline = "quiet".to_owned();
        config.memory = MEMORY;
        config.disks = vec![base, script];
        config.serial = SerialConfig::None;
        config.output = Some(OutputConfig::Descriptor(writer.as_raw_fd()));
        config.exit_port = true;
        // The guest's threads keep to the system calls that they need.
        config.seccomp = true;
        Ok(Self {
            // It has a copy of the pipe's end, and this one is closed: so the output ends with the guest.
            vmm: Vmm::build(&config)?,
            output,
            limit: setting.limit,
            _directory: directory,
        })
    }

    /// Runs the command to its end, or to that of its time.
    pub fn run(self) -> Result<Outcome, Box<dyn Error>> {
        let control = self.vmm.control();
        let (sender, ended) = channel();
        let reading = thread::spawn(move || {
            let mut output = Vec::new();
            // When this is closed, the guest's output goes nowhere, and does not hold it up.
            let mut source = self.output.take(MAX_OUTPUT);
            source.read_to_end(&mut output).map(|_| output)
        });
        // The thread that runs a guest is confined for good, so the guest has one of its own.
        let vmm = self.vmm;
        thread::spawn(move || sender.send(vmm.run()));
        let reason = ended.recv_timeout(self.limit).or_else(|_| {
            control.shut_down();
            ended.recv()
        })??;
        let output = reading.join().map_err(|_| "the reader has panicked")??;
        Ok(Outcome {
            output,
            status: match reason {
                ExitReason::Exit(status) => Ok(status),
                other => Err(other),
            },
        })
    }
}

fn main() -> Result<ExitCode, Box<dyn Error>> {
    let arguments: Vec<_> = std::env::args().skip(1).collect();
    let [kernel, initrd, base, command] = &arguments[..] else {
        return Err("usage: sandbox KERNEL INITRD BASE COMMAND".into());
    };
    let setting = Setting {
        kernel: kernel.into(),
        initrd: Some(initrd.into()),
        base: base.into(),
        scratch: None,
        limit: Duration::from_secs(60),
    };
    let outcome = Guest::build(&setting, command)?.run()?;
    io::stdout().write_all(&outcome.output)?;
    match outcome.status {
        Ok(status) => Ok(ExitCode::from(status)),
        Err(reason) => Err(format!("the command has no exit status: {reason:?}").into()),
    }
}
