//! Running the guest, in this process: of a VM of its own KVM tells how often the guest had to stop.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::sync::{Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tandem_vmm::{Config, Control, ExitReason, SerialConfig, Vmm};

use crate::disk::Disk;
use crate::exits::MmioExits;
use crate::guest::GUEST;

/// How long a guest may run; far longer than it takes on a busy machine.
const LIMIT: Duration = Duration::from_secs(60);

/// A start of the guest.
pub struct Start<'a> {
    disks: &'a [Disk],
    console: PathBuf,
    /// The machine.
    pub config: Config,
}

/// How a guest ended.
pub struct Ended {
    /// How often it left for this process to handle an access to a device's registers.
    pub mmio_exits: u64,
    /// How often the guest broke a ring of each disk.
    pub broken_rings: Vec<u64>,
}

impl<'a> Start<'a> {
    /// A machine with `disks`, whose console is a file in `dir`.
    pub fn new(dir: &Path, disks: &'a [Disk]) -> Self {
        let console = dir.join("console");
        let mut config = Config::new(&*GUEST);
        config.memory = 64 << 20;
        config.serial = SerialConfig::File(console.clone());
        config.disks = disks.iter().map(Disk::config).collect();
        Self {
            disks,
            console,
            config,
        }
    }

    /// Runs the guest until it powers off, and checks that it has found all `cases` well.
    pub fn run(self, cases: &[&str]) -> Ended {
        self.run_with(cases, |_, _| ())
    }

    /// As [`run`](Self::run), and hands each line of the console to `watch`, which may operate the
    /// machine.
    pub fn run_with(mut self, cases: &[&str], watch: impl FnMut(&str, &Control)) -> Ended {
        let disks = self.disks.iter().map(Disk::cmdline);
        let words: Vec<_> = disks
            .chain([format!("cases={}", cases.join(","))])
            .collect();
        self.config.cmdline = words.join(" ");
        let ended = power_off(self.config, &self.console, watch);
        let said = fs::read_to_string(&self.console).unwrap();
        let lines = said.lines().filter(|line| line.starts_with("case "));
        let expected: Vec<_> = cases.iter().map(|name| format!("case {name} ok")).collect();
        let ended = ended.unwrap_or_else(|error| panic!("{error}; the guest said\n{said}"));
        assert!(lines.eq(&expected), "the guest said\n{said}");
        for line in said.lines().filter(|line| line.starts_with("speed ")) {
            println!("{line}");
        }
        ended
    }
}

/// Runs a machine until it powers off; anything else is an error.
fn power_off(
    config: Config,
    console: &Path,
    mut watch: impl FnMut(&str, &Control),
) -> Result<Ended, String> {
    // One at a time: the VM's files are found by their names in this process.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);

    let vmm = Vmm::build(&config).map_err(|error| error.to_string())?;
    let exits = MmioExits::of_cpu(0).map_err(|error| format!("KVM's statistics: {error}"))?;
    let control = vmm.control();
    let (sender, ended) = channel();
    thread::spawn(move || sender.send(vmm.run()));
    let end = Instant::now() + LIMIT;
    let mut lines = 0;
    let reason = loop {
        let reason = ended.recv_timeout(Duration::from_millis(20));
        let said = fs::read_to_string(console).unwrap_or_default();
        let said: Vec<_> = said.split_inclusive('\n').collect();
        for line in said.iter().skip(lines).filter(|line| line.ends_with('\n')) {
            watch(line.trim_end(), &control);
            lines += 1;
        }
        match reason {
            Err(RecvTimeoutError::Timeout) if Instant::now() < end => {}
            Err(RecvTimeoutError::Timeout) => {
                control.shut_down();
                break ended.recv_timeout(LIMIT);
            }
            _ => break reason,
        }
    };
    match reason {
        Ok(Ok(ExitReason::PowerOff)) => Ok(Ended {
            mmio_exits: exits.count().map_err(|error| error.to_string())?,
            broken_rings: (0..config.disks.len())
                .map(|disk| control.stats(disk).map(|stats| stats.broken_rings()))
                .collect::<Result<_, _>>()
                .map_err(|error| error.to_string())?,
        }),
        Ok(Ok(ExitReason::Stopped)) => Err(format!("it did not end within {LIMIT:?}")),
        Ok(Ok(reason)) => Err(format!("it ended with {reason:?}")),
        Ok(Err(error)) => Err(error.to_string()),
        Err(error) => Err(format!("the machine did not end: {error}")),
    }
}
