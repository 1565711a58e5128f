//! The guest suite: stock Linux guests under `tandem run`. See the library's documentation.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::Parser;
use tandem_tests::cases;
use tandem_tests::emulated::Machine;
use tandem_tests::error::{Context, Result};
use tandem_tests::guest::probe;
use tandem_tests::lab::{Kernel, Lab};
use tandem_tests::stock::{SYSTEMS, System};
use tandem_tests::suite::{Bench, Case, Runner, Setting, tools_beside};
use tandem_tests::tree::Tree;

/// How long the whole suite may take in the emulated machine.
const LIMIT: Duration = Duration::from_secs(45 * 60);

/// Runs the tests that boot stock Linux guests under `tandem run`: on this machine's KVM if it
/// can run a stock kernel, else in an emulated AMD machine. Those of `tandem serve` boot under QEMU,
/// without KVM.
#[derive(Parser)]
#[command(after_help = "Examples:
  guest-suite                     every case
  guest-suite roundtrip disks     the cases with one of these words in their names
  guest-suite stock               those of whole Debian systems, which run only if they are asked for
  guest-suite --soak 60           one guest, operated for an hour
  guest-suite --on emulated       in the emulated machine, whatever KVM can do here")]
struct Arguments {
    /// Only cases with one of these words in their names.
    filters: Vec<String>,
    /// Prints the names of the cases.
    #[arg(long)]
    list: bool,
    /// Where to run: tried out, or as said.
    #[arg(long, value_enum, default_value_t = Place::Auto)]
    on: Place,
    /// Runs this shell script in the emulated machine instead of the cases.
    #[arg(long, value_name = "SCRIPT")]
    sh: Option<String>,
    /// Instead of the cases: a guest that works for so many minutes while its machine is operated, with
    /// the memory and file descriptors that this takes.
    #[arg(long, value_name = "MINUTES")]
    soak: Option<u64>,
    /// Rounds that cases make which can make any number, as those of backups.
    #[arg(long, default_value_t = 4)]
    rounds: u64,
    /// How many cases run at a time.
    #[arg(long, default_value_t = 2)]
    jobs: usize,
    /// The directory that tests/setup fills.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/lab"))]
    lab: PathBuf,
    /// The guests' initrd, ready-made; the programs under test are in /bin then.
    #[arg(long)]
    initrd: Option<PathBuf>,
    /// The directory for the files of the cases; those of failed cases stay there.
    #[arg(long, default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/../target/lab/cases"))]
    scratch: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Place {
    /// Here if the stock kernel boots on this machine's KVM, else emulated.
    Auto,
    /// On this machine's KVM.
    Here,
    /// In the emulated machine.
    Emulated,
}

fn main() -> ExitCode {
    match run(&Arguments::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("guest-suite: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Whether every case passed.
fn run(arguments: &Arguments) -> Result<bool> {
    let wanted = |case: &Case| case.is_asked_for(&arguments.filters);
    let (cases, others) = match arguments.soak {
        Some(minutes) => (vec![cases::soak(minutes)], Vec::new()),
        None => cases::all().into_iter().partition(wanted),
    };
    if arguments.list {
        cases.iter().for_each(|case| println!("{}", case.name()));
        return Ok(true);
    }
    if arguments.scratch.exists() {
        fs::remove_dir_all(&arguments.scratch).context("removing the files of the last run")?;
    }
    let setting = match &arguments.initrd {
        None => Setting {
            rounds: arguments.rounds,
            ..Setting::of_build(&arguments.lab)?
        },
        Some(initrd) => Setting {
            lab: Arc::new(Lab::open(&arguments.lab)?),
            initrd: initrd.clone(),
            programs: "/bin".into(),
            rounds: arguments.rounds,
        },
    };
    if arguments.sh.is_some() {
        return run_emulated(arguments, &setting, &[]);
    }
    let systems: Vec<System> = SYSTEMS
        .into_iter()
        .filter(|system| cases.iter().any(|case| case.system() == Some(*system)))
        .collect();
    if arguments.initrd.is_none() {
        systems.iter().try_for_each(|s| s.make(&setting.lab))?;
    }
    let runner = Runner {
        setting: setting.clone(),
        scratch: arguments.scratch.clone(),
        jobs: arguments.jobs,
    };
    let (with_kvm, without): (Vec<_>, Vec<_>) = cases.into_iter().partition(Case::needs_kvm);
    if arguments.initrd.is_some() {
        // In the emulated machine. The others run outside.
        return Ok(runner.run(with_kvm, others.len() + without.len()));
    }
    if !with_kvm.is_empty() && !run_here(arguments, &setting)? {
        let passed = without.is_empty() || runner.run(without, others.len() + with_kvm.len());
        return Ok(run_emulated(arguments, &setting, &systems)? && passed);
    }
    Ok(runner.run(
        [with_kvm, without].into_iter().flatten().collect(),
        others.len(),
    ))
}

fn run_here(arguments: &Arguments, setting: &Setting) -> Result<bool> {
    if arguments.on != Place::Auto {
        return Ok(arguments.on == Place::Here);
    }
    let bench = Bench::new(setting.clone(), &arguments.scratch.join("probe"))?;
    let probed = probe(&bench);
    match &probed {
        Ok(()) => println!("guest-suite: running on this machine's KVM"),
        Err(reason) => println!("guest-suite: {reason}; running in an emulated AMD machine"),
    }
    Ok(probed.is_ok())
}

/// Runs this program in the emulated machine, with the same arguments.
fn run_emulated(arguments: &Arguments, setting: &Setting, systems: &[System]) -> Result<bool> {
    let mut tree = Tree::default();
    for program in ["guest-suite", "tandem", "tandem-img"] {
        tree.program(setting.programs.join(program))?;
    }
    for program in [
        "qemu-img", "qemu-io", "qemu-nbd", "mke2fs", "debugfs", "e2fsck",
    ] {
        tree.program(program)?;
    }
    for kernel in [Kernel::BzImage, Kernel::Vmlinux] {
        let path = setting.lab.kernel(kernel);
        let name = path.file_name().unwrap_or_default();
        tree.copy(Path::new("/lab/kernel").join(name), &path);
    }
    tree.copy("/lab/busybox/bin/busybox", setting.lab.busybox());
    tree.copy("/lab/guest-initrd", &setting.initrd)
        .copy("/lab/guest-tools", tools_beside(&setting.initrd));
    for system in systems {
        system.copy_to(&mut tree, &setting.lab);
    }
    tree.directory("/out/cases")
        .copy("/etc/mke2fs.conf", "/etc/mke2fs.conf");

    let payload = match &arguments.sh {
        Some(script) => format!("#!/bin/sh\ncd /out\n{script}\n"),
        None => suite_payload(arguments),
    };
    let directory = arguments.lab.join("machine");
    let longer = Duration::from_secs(60 * (arguments.soak.unwrap_or(0) + arguments.rounds));
    let machine = Machine::new(&setting.lab, directory, LIMIT + longer);
    let passed = machine.run(tree, &payload)? == 0;
    if !passed {
        let files = machine.copy_out("/out/cases", &arguments.scratch.join("emulated"))?;
        println!("guest-suite: the files of the failed cases are in {files:?}");
    }
    Ok(passed)
}

/// The command line of this program in the emulated machine.
fn suite_payload(arguments: &Arguments) -> String {
    let filters = arguments.filters.iter().map(|word| format!("'{word}'"));
    let soak = arguments.soak.map(|minutes| format!("--soak {minutes}"));
    let words: Vec<_> = filters.chain(soak).collect();
    format!(
        "#!/bin/sh\nexport RUST_BACKTRACE=1\nexec guest-suite --on here --jobs {} --rounds {} --lab \
         /lab --initrd /lab/guest-initrd --scratch /out/cases {}\n",
        arguments.jobs,
        arguments.rounds,
        words.join(" ")
    )
}
