//! `tandem run`.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use clap::builder::{OsStringValueParser, TypedValueParser};
use rustix::process::{Resource, getrlimit, setrlimit};
use tandem_vmm::config::parse_memory;
use tandem_vmm::signals::Signals;
use tandem_vmm::{
    Config, Control, ControlSocket, DiskConfig, ExitReason, MetricsLog, MetricsOutput,
    MetricsTarget, Result, SerialConfig, Vmm,
};

use crate::disk_keys::{DISK_KEYS, disk_parser};
use crate::sandbox::SandboxArgs;

/// What to run.
#[derive(Args)]
#[command(after_help = EXAMPLES, after_long_help = details())]
pub struct Run {
    /// Kernel: a distribution's vmlinuz (bzImage) or an uncompressed vmlinux (ELF)
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Kernel command line, added to "console=ttyS0 panic=-1 reboot=a"
    #[arg(
        long,
        value_name = "TEXT",
        default_value = "",
        hide_default_value = true
    )]
    #[arg(allow_hyphen_values = true)]
    cmdline: String,

    /// Memory, with unit K, M, G or T
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_memory)]
    memory: u64,

    /// Number of CPUs, 1 to 32
    #[arg(long, value_name = "N", default_value_t = 1)]
    #[arg(value_parser = clap::value_parser!(u8).range(1..=i64::from(Config::MAX_CPUS)))]
    cpus: u8,

    /// Disk image; may be repeated: /dev/vda, /dev/vdb, ... in this order
    #[arg(long = "disk", value_name = "PATH[,KEY=VALUE...]", value_parser = disk_parser())]
    disks: Vec<DiskConfig>,

    /// Console: stdio, none or file=PATH
    #[arg(long, value_name = "WHERE", default_value = "stdio", value_parser = serial_parser())]
    serial: SerialConfig,

    /// Counters of the disks as lines of JSON: to the end of a file, or into an open descriptor
    #[arg(long, value_name = "FILE|fd=N", value_parser = metrics_parser())]
    metrics: Option<MetricsTarget>,

    /// Seconds between lines of metrics; 0: only on SIGUSR1 and at the end
    #[arg(
        long,
        value_name = "SECONDS",
        default_value_t = 10,
        requires = "metrics"
    )]
    #[arg(value_parser = clap::value_parser!(u64).range(0..=MAX_INTERVAL))]
    metrics_interval: u64,

    /// Unix socket to operate the VM with while it runs
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,

    /// Directory below which requests to the control socket may name files; may be repeated
    #[arg(long = "allow-dir", value_name = "DIR", requires = "control")]
    allowed: Vec<PathBuf>,

    #[command(flatten)]
    sandbox: SandboxArgs,
}

/// A day.
const MAX_INTERVAL: u64 = 24 * 60 * 60;

const EXAMPLES: &str = "\
Examples:
  tandem run --kernel vmlinuz --initrd initrd.img --disk image.qcow2
  tandem run --kernel vmlinuz --initrd initrd.img --memory 2G --cpus 4 \\
      --disk root.qcow2,serial=root --disk scratch.raw,format=raw \\
      --cmdline 'root=/dev/vda rw'

--help tells the disk keys, the console's keys and the exit status.";

fn details() -> String {
    format!(
        "{DISK_KEYS}

Root disk:
  Nothing is added to the command line for a disk. A kernel whose initrd does not know better finds
  its root file system through --cmdline root=/dev/vda (the first disk), or root=UUID=... .

Console:
  With --serial stdio, a terminal is in raw mode while the guest runs: every key, Ctrl-C included,
  goes to the guest. Ctrl-A X ends the VM; Ctrl-A Ctrl-A sends one Ctrl-A. Without a terminal,
  standard input is sent as it is, once the guest is ready to receive. The VM runs on when standard
  input ends or standard output is closed.
  A kernel that panics restarts the guest, which ends the VM; --cmdline panic=0 makes it stay.

Metrics and control:
  Each line of --metrics tells what the disks have done so far, for each queue: requests by kind, bytes,
  errors, and a histogram of latencies, in which bucket N counts the requests that took less than 2^N
  microseconds. A line is written each --metrics-interval, on SIGUSR1 (without --metrics, to standard
  error), and at the end. A reader that is too slow loses lines, and never holds up the VM.
  Programs of the same user, and root, send requests to the socket of --control, a JSON object on each
  line: {{\"command\":\"pause\"}}. The commands are status, disks, metrics, flush, pause, resume, resize,
  shutdown, and those for bitmaps, for backups, and for the images of a disk (fork, commit, rebase, and jobs).
  docs/run.md and docs/control.md describe both; tandem control sends such requests.

Sandbox:
  Once its files are open, and before the guest runs, tandem keeps itself to the system calls that each
  thread needs (seccomp), and from all other files (Landlock). Requests to the socket of --control may name
  files below the directories of --allow-dir: new images, the base of a commit, and where a backup has its
  scratch file. A forbidden system call ends it, and one line says which it was.

Exit status:
  0      The guest powered off or restarted (also after a panic), or Ctrl-A X was typed
  1      The VM could not be built, broke (triple fault, KVM failure), or a disk could not be flushed
  2      The command line is wrong
  Killed by SIGTERM, SIGINT, SIGHUP or SIGQUIT (a shell shows 128 + number): the same, after the disks
  have been flushed and closed; by SIGSYS: the sandbox has forbidden something
  Errors of a disk are for the guest to handle and leave the exit status alone; the last one of each
  disk is printed when the VM ends.

Examples:
  A stock kernel and its initrd, root file system on the first disk:
    tandem run --kernel vmlinuz --initrd initrd.img --disk root.qcow2 --cmdline root=/dev/vda

  Four CPUs, 2 GiB of memory, a second disk that is raw, console into a file:
    tandem run --kernel vmlinuz --initrd initrd.img --memory 2G --cpus 4 \\
        --disk root.qcow2,serial=root --disk scratch.raw,format=raw --serial file=console.log

  A machine whose disk is backed up, forked and committed while it runs (--allow-dir: in its directory):
    tandem run --kernel vmlinuz --initrd initrd.img \\
        --disk /vm/root.qcow2 --control /run/vm/socket --allow-dir /vm

  An image whose data file has moved, not to be written:
    tandem run --kernel vmlinuz --initrd initrd.img \\
        --disk image.qcow2,data-file=/srv/data.raw,readonly=on"
    )
}

fn metrics_parser() -> impl TypedValueParser<Value = MetricsTarget> {
    OsStringValueParser::new().try_map(|text: OsString| MetricsTarget::parse(&text))
}

fn serial_parser() -> impl TypedValueParser<Value = SerialConfig> {
    OsStringValueParser::new().try_map(|text: OsString| SerialConfig::parse(&text))
}

impl Run {
    /// Runs the guest to its end.
    pub fn execute(self) -> Result<ExitReason> {
        // Before any other file is open.
        let output = match &self.metrics {
            Some(target) => MetricsOutput::open(target)?,
            None => MetricsOutput::stderr()?,
        };
        allow_descriptors();
        // Before there is a second thread.
        let signals = Signals::block()?;
        let mut config = Config::new(self.kernel);
        config.initrd = self.initrd;
        config.cmdline = self.cmdline;
        config.memory = self.memory;
        config.cpus = self.cpus;
        config.disks = self.disks;
        config.serial = self.serial;
        config.seccomp = self.sandbox.is_on();
        let mut vmm = Vmm::build(&config)?;
        let control = vmm.control();
        let socket = self.control.as_deref().map(ControlSocket::bind);
        let socket = socket.transpose()?;
        // All files are open, and there is no second thread yet.
        self.sandbox.confine_files(self.allowed, self.control)?;
        let serve = |socket: ControlSocket| socket.serve(control.clone());
        let socket = socket.map(serve).transpose()?;
        let interval = Duration::from_secs(self.metrics_interval);
        let interval = Some(interval).filter(|i| self.metrics.is_some() && !i.is_zero());
        let log = MetricsLog::start(output, interval, control.clone())?;
        let reporter = log.reporter();
        vmm.handle_signals(signals, move || reporter.report());
        let outcome = vmm.run();
        drop(socket);
        if self.metrics.is_some() {
            log.reporter().report();
        }
        log.finish();
        print_last_errors(&control);
        outcome
    }
}

/// Each queue of a disk takes several descriptors: many disks take more than the usual limit, which
/// is there for programs that use `select`.
fn allow_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where it cannot be raised, what is opened in vain tells.
    let _ = setrlimit(Resource::Nofile, limit);
}

fn print_last_errors(control: &Control) {
    for disk in control.metrics().disks {
        if let Some(error) = disk.last_error {
            let path = disk.path.display();
            let _ = writeln!(io::stderr(), "tandem: disk '{path}': last error: {error}");
        }
    }
}
