//! The machine around the disks: how it ends, its console, its processors and memory.

use std::fs;
use std::io::Write;

use crate::disk::{Image, Kind};
use crate::error::{Context, Result};
use crate::guest::{Guest, values};
use crate::lab::Kernel;
use crate::suite::{Bench, Case};

pub fn cases() -> Vec<Case> {
    vec![
        Case::new("machine::eight_cpus_from_vmlinux", eight_cpus_from_vmlinux),
        Case::new("machine::memory_above_4_gib", memory_above_4_gib),
        Case::new("machine::no_errors_of_the_kernel", no_errors_of_the_kernel),
        Case::new("machine::console_in_a_pipe", console_in_a_pipe),
        Case::new("machine::reboot_ends_with_0", reboot_ends_with_0),
        Case::new(
            "machine::triple_fault_ends_with_an_error",
            triple_fault_ends_with_an_error,
        ),
        Case::new("machine::serial_to_a_file", serial_to_a_file),
        Case::new("machine::serial_to_nowhere", serial_to_nowhere),
    ]
}

fn eight_cpus_from_vmlinux(bench: &Bench) -> Result<()> {
    let boot = Guest::new(bench)
        .kernel(Kernel::Vmlinux)
        .cpus(8)
        .boot(r#"echo "@ cpus $(grep -c ^processor /proc/cpuinfo)""#)?
        .succeeded();
    assert_eq!(boot.value("cpus"), "8");
    Ok(())
}

/// Linux finds nothing wrong with the machine: `journalctl` shows errors in red.
fn no_errors_of_the_kernel(bench: &Bench) -> Result<()> {
    let boot = Guest::new(bench)
        .boot("dmesg -r | sed -n 's/^<[0-3]>/@ error /p'\necho \"@ lines $(dmesg | wc -l)\"")?
        .succeeded();
    let lines: usize = boot.value("lines").parse().expect("a number");
    assert!(lines > 50, "{lines}");
    assert_eq!(boot.values("error").collect::<Vec<_>>(), [""; 0]);
    Ok(())
}

/// Data goes to and from memory above 4 GiB, which Linux uses first.
fn memory_above_4_gib(bench: &Bench) -> Result<()> {
    let image = Image::new(bench, "disk.qcow2", Kind::External, "8M")?;
    let boot = Guest::new(bench)
        .option("--memory", "4G")
        .disk(&image.path, "")
        .boot(
            r#"
            echo "@ kib $(grep MemTotal /proc/meminfo | tr -dc 0-9)"
            dd if=/seed of=/dev/vda bs=12k seek=3 conv=fsync 2>/dev/null
            echo 3 >/proc/sys/vm/drop_caches
            dd if=/dev/vda bs=12k skip=3 2>/dev/null | head -c 1048576 | cmp - /seed
            echo "@ sha256 $(sha256sum </dev/vda | cut -d' ' -f1)"
            "#,
        )?
        .succeeded();
    let kib: u64 = boot.value("kib").parse().expect("a number");
    // The kernel keeps some for itself; without the part above 4 GiB there are 3 GiB.
    assert!((3700 << 10..=4 << 20).contains(&kib), "{kib} KiB");
    image.check()?;
    image.assert_sha256(Kind::External, boot.value("sha256"))
}

/// The console works in a pipe, both ways.
fn console_in_a_pipe(bench: &Bench) -> Result<()> {
    let mut typed = false;
    let boot = Guest::new(bench)
        .watch(
            r#"
            stty -echo </dev/console
            echo "@ ready yes"
            read line </dev/console
            echo "@ line $line"
            "#,
            |console, tandem| {
                if !typed && values(console, "ready").next().is_some() {
                    typed = true;
                    let pipe = tandem.stdin.as_mut().expect("a pipe to the console");
                    pipe.write_all(b"typed on the console\n").expect("typing");
                }
            },
        )?
        .succeeded();
    assert_eq!(boot.value("line"), "typed on the console");
    Ok(())
}

fn reboot_ends_with_0(bench: &Bench) -> Result<()> {
    let boot = Guest::new(bench).boot("echo '@ rebooting now'; reboot -f")?;
    assert_eq!(boot.values("rebooting").count(), 1, "it booted once");
    assert!(boot.status().success(), "{}", boot.status());
    Ok(())
}

/// `reboot=t` makes the kernel reset the machine with a triple fault.
fn triple_fault_ends_with_an_error(bench: &Bench) -> Result<()> {
    let boot = Guest::new(bench)
        .cmdline("reboot=t")
        .boot("echo '@ rebooting now'; reboot -f")?;
    assert_eq!(boot.values("rebooting").count(), 1, "it booted once");
    assert_eq!(boot.status().code(), Some(1), "{}", boot.status());
    let last = boot.output().lines().last().unwrap_or_default();
    assert!(
        last.contains("triple fault"),
        "the last line does not say what happened: {last}"
    );
    Ok(())
}

fn serial_to_a_file(bench: &Bench) -> Result<()> {
    let console = bench.scratch("console");
    let mut option = std::ffi::OsString::from("file=");
    option.push(&console);
    let boot = Guest::new(bench)
        .option("--serial", option)
        .boot("echo '@ hello file'")?;
    assert!(boot.status().success(), "{}", boot.status());
    assert_eq!(
        boot.values("hello").count(),
        0,
        "the console came out on standard output too"
    );
    let shown = fs::read_to_string(&console).context("reading the console's file")?;
    assert_eq!(values(&shown, "hello").collect::<Vec<_>>(), ["file"]);
    assert_eq!(values(&shown, "script").collect::<Vec<_>>(), ["0"]);
    Ok(())
}

fn serial_to_nowhere(bench: &Bench) -> Result<()> {
    let boot = Guest::new(bench)
        .option("--serial", "none")
        .boot("echo '@ hello nobody'")?;
    assert!(boot.status().success(), "{}", boot.status());
    assert_eq!(boot.output(), "");
    Ok(())
}
