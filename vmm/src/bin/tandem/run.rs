//! `tandem run`.

use std::ffi::OsString;
use std::io::{self, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{OsStringValueParser, TypedValueParser};
use clap::{ArgAction, Args, Command};
use rustix::process::{Resource, getrlimit, setrlimit};
use tandem_vmm::config::parse_memory;
use tandem_vmm::signals::Signals;
use tandem_vmm::{
    Config, Control, ControlSocket, DiskConfig, ExitReason, MetricsLog, MetricsOutput,
    MetricsTarget, OutputConfig, Result, SerialConfig, Vmm,
};

use crate::disk_keys::{DISK_KEYS, disk_parser};
use crate::sandbox::SandboxArgs;

/// What to run.
#[derive(Args, Debug, PartialEq)]
#[command(after_help = EXAMPLES, after_long_help = details())]
pub struct Run {
    /// Kernel: a distribution's vmlinuz (bzImage) or an uncompressed vmlinux (ELF)
    #[arg(long, value_name = "FILE")]
    kernel: PathBuf,

    /// Initial RAM disk
    #[arg(long, value_name = "FILE")]
    initrd: Option<PathBuf>,

    /// Kernel command line, added to "console=ttyS0 panic=-1 reboot=a pci=conf1"
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

    /// A second serial port, /dev/ttyS1, for output alone: stdout, file=PATH or fd=N
    #[arg(long, value_name = "WHERE", value_parser = output_parser())]
    output: Option<OutputConfig>,

    /// A third serial port, /dev/ttyS2: a line with a number there ends the VM, and is the exit status
    #[arg(long, num_args = 0..=1, require_equals = true, value_name = "true|false")]
    #[arg(action = ArgAction::Set, default_value_t = false, default_missing_value = "true")]
    #[arg(hide_default_value = true, hide_possible_values = true)]
    pub exit_port: bool,

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

    /// Take options from a TOML file; those of the command line go before them
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,

    /// Print these options as a file for --config, and run nothing
    #[arg(long)]
    pub print_config: bool,
}

/// A day.
const MAX_INTERVAL: u64 = 24 * 60 * 60;

const EXAMPLES: &str = "\
Examples:
  tandem run --kernel vmlinuz --initrd initrd.img --disk image.qcow2
  tandem run --kernel vmlinuz --initrd initrd.img --memory 2G --cpus 4 \\
      --disk root.qcow2,serial=root --disk scratch.raw,format=raw \\
      --cmdline 'root=/dev/vda rw'
  tandem run --config machine.toml --memory 4G

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

Output and exit status of a command:
  What the guest writes to /dev/ttyS1 goes to --output, byte for byte if the port is in raw mode. With
  --exit-port, a line with a number from 0 to 255 on /dev/ttyS2 ends the VM at once, as SIGTERM does, and
  is the exit status of tandem. A stock guest needs nothing for either:
    stty -F /dev/ttyS1 raw
    sh -c 'make test' >/dev/ttyS1 2>&1
    echo $? >/dev/ttyS2
  What it has not synced then is lost for disks that are kept.

Files of options:
  A file for --config is in TOML. Its keys are the names of the options, without the dashes; a relative path
  means what it means on the command line. An option of the command line replaces the key of the file, and
  --disk and --allow-dir all of theirs. A disk is text as behind --disk, or a table with the disk keys:
    kernel = \"vmlinuz\"
    cpus = 2
    no-sandbox = false
    [[disk]]
    path = \"root.qcow2\"
    overlay = \"temp\"

Sandbox:
  Once its files are open, and before the guest runs, tandem keeps itself to the system calls that each
  thread needs (seccomp), and from all other files (Landlock). Requests to the socket of --control may name
  files below the directories of --allow-dir: new images, the base of a commit, and where a backup has its
  scratch file. A forbidden system call ends it, and one line says which it was.

Exit status:
  0      The guest powered off or restarted (also after a panic), or Ctrl-A X was typed
  1      The VM could not be built, broke (triple fault, KVM failure), or a disk could not be flushed
  2      The command line, or the file of --config, is wrong
  With --exit-port: what the guest has written; and 125 in place of 1, and where the machine has ended
  without that, as by power-off, restart or Ctrl-A X
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

  One command on a copy of a disk that nobody keeps, its output and exit status (docs/sandbox.md):
    tandem run --kernel vmlinuz --initrd sandbox.img --disk base.raw,format=raw,overlay=temp \\
        --disk script,format=raw,readonly=on --serial none --output stdout --exit-port

  The same machine again, from a file:
    tandem run --kernel vmlinuz --disk root.qcow2 --cmdline root=/dev/vda --print-config > machine.toml
    tandem run --config machine.toml

  An image whose data file has moved, not to be written:
    tandem run --kernel vmlinuz --initrd initrd.img \\
        --disk image.qcow2,data-file=/srv/data.raw,readonly=on"
    )
}

fn metrics_parser() -> impl TypedValueParser<Value = MetricsTarget> {
    OsStringValueParser::new().try_map(|text: OsString| MetricsTarget::parse(&text))
}

fn output_parser() -> impl TypedValueParser<Value = OutputConfig> {
    OsStringValueParser::new().try_map(|text: OsString| OutputConfig::parse(&text))
}

fn serial_parser() -> impl TypedValueParser<Value = SerialConfig> {
    OsStringValueParser::new().try_map(|text: OsString| SerialConfig::parse(&text))
}

/// Name of the subcommand.
pub const NAME: &str = "run";

/// The subcommand's options.
pub fn command() -> Command {
    Run::augment_args(Command::new(NAME))
}

impl Run {
    /// The machine that is asked for.
    pub fn machine(&self) -> Config {
        let mut config = Config::new(&self.kernel);
        config.initrd.clone_from(&self.initrd);
        config.cmdline.clone_from(&self.cmdline);
        config.memory = self.memory;
        config.cpus = self.cpus;
        config.disks.clone_from(&self.disks);
        config.serial.clone_from(&self.serial);
        config.output.clone_from(&self.output);
        config.exit_port = self.exit_port;
        config.seccomp = self.sandbox.is_on();
        config
    }

    /// Runs the guest to its end.
    pub fn execute(self) -> Result<ExitReason> {
        let config = self.machine();
        // Before any other file is open.
        config.output.iter().try_for_each(OutputConfig::check)?;
        let output = match &self.metrics {
            Some(target) => MetricsOutput::open(target)?,
            None => MetricsOutput::stderr()?,
        };
        allow_descriptors();
        // Before there is a second thread.
        let signals = Signals::block()?;
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
