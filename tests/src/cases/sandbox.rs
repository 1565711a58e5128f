//! One command in a guest, its output and exit status, on a disk that it cannot change: by `tandem run`, and
//! by the examples of the library, in this process.

#[path = "../../../vmm/examples/fifty.rs"]
#[allow(dead_code, reason = "the example is a program, too")]
mod fifty;

use std::fs;
use std::time::Duration;

use fifty::sandbox::{self, Setting};
use tandem_vmm::ExitReason;

use crate::disk::sha256;
use crate::error::{Context, Error, Result};
use crate::lab::Kernel;
use crate::suite::{Bench, Case};
use crate::tree::Tree;

/// Enough to be at once: the emulated machine has room for few.
const AT_ONCE: usize = 3;

/// What a script says that ends with status 42, having changed the disk.
const SCRIPT: &str = "echo to standard error >&2\ncat /hello\necho changed >/hello\nseq 1 200\n\
                      sync\nexit 42\n";

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("sandbox::one_command", one_command),
        Case::new("sandbox::several_at_once", several_at_once),
    ]
}

/// The output of [`SCRIPT`].
fn expected() -> String {
    let numbers: String = (1..=200).map(|number| format!("{number}\n")).collect();
    format!("to standard error\nhello\n{numbers}")
}

/// An initrd with the example's `init`, and a root file system.
fn setting(bench: &Bench) -> Result<Setting> {
    // Busybox and modules are in that of all guests; of two files with one name, the second counts.
    let mut initrd = fs::read(bench.base_initrd()).context("reading the base initrd")?;
    let mut init = Tree::default();
    init.script("/init", include_str!("../../../vmm/examples/sandbox-init"));
    initrd.extend(init.cpio()?);
    let path = bench.scratch("initrd");
    fs::write(&path, initrd).context("writing the initrd")?;
    let mut root = Tree::default();
    root.busybox(bench.lab())?.file("/hello", "hello\n");
    let base = bench.scratch("base.raw");
    root.ext4(&base, 24 << 20)?;
    Ok(Setting {
        kernel: bench.lab().kernel(Kernel::BzImage),
        initrd: Some(path),
        base,
        scratch: Some(bench.directory().to_owned()),
        limit: Duration::from_secs(300),
    })
}

fn one_command(bench: &Bench) -> Result<()> {
    let setting = setting(bench)?;
    let before = sha256(&setting.base)?;
    let script = bench.scratch("script");
    fs::write(&script, format!("{SCRIPT:\n<512}")).context("writing the script")?;
    let mut tandem = bench.tool(bench.tandem());
    tandem.args(["run", "--cmdline=quiet", "--memory=128M", "--serial=none"]);
    tandem.args(["--output=stdout", "--exit-port", "--kernel"]);
    tandem
        .arg(&setting.kernel)
        .args(["--initrd=initrd", "--disk"]);
    tandem.arg(format!(
        "base.raw,format=raw,overlay=temp,overlay-dir={}",
        bench.directory().display()
    ));
    tandem.arg("--disk=script,format=raw,readonly=on");
    let output = tandem.output().context("running tandem")?;
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(42));
    assert_eq!(String::from_utf8_lossy(&output.stdout), expected());

    // A kernel that panics has no status for its command.
    let setting = Setting {
        initrd: None,
        ..setting
    };
    let guest = sandbox::Guest::build(&setting, SCRIPT);
    let outcome = guest.and_then(sandbox::Guest::run);
    let outcome = outcome.map_err(|error| Error::new(error.to_string()))?;
    assert_eq!(outcome.status, Err(ExitReason::Reset));
    assert_eq!(sha256(&setting.base)?, before, "the base has changed");
    Ok(())
}

fn several_at_once(bench: &Bench) -> Result<()> {
    let setting = setting(bench)?;
    let before = sha256(&setting.base)?;
    let outcomes = fifty::run_all(&setting, SCRIPT, AT_ONCE);
    let outcomes = outcomes.map_err(|error| Error::new(error.to_string()))?;
    let peak = fifty::peak_memory().map_err(|error| Error::new(error.to_string()))?;
    println!("sandbox::several_at_once: {AT_ONCE} guests have taken at most {peak} MiB");
    for outcome in outcomes {
        assert_eq!(outcome.status, Ok(42));
        assert_eq!(String::from_utf8_lossy(&outcome.output), expected());
    }
    assert_eq!(sha256(&setting.base)?, before, "the base has changed");
    Ok(())
}
