//! What the figures were measured on, in general terms.

use std::fs;
use std::process::Command;

/// Date, processor, memory, kernel, and how much else the machine has to do.
pub fn description() -> String {
    let processors = read("/proc/cpuinfo");
    let model = field(&processors, "model name");
    let count = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal");
    let kib: u64 = memory.trim_end_matches(" kB").parse().unwrap_or_default();
    let kernel = read("/proc/sys/kernel/osrelease");
    let kernel: Vec<_> = kernel.split(['.', '-']).take(2).collect();
    let is_virtual = processors.contains(" hypervisor");
    let load = read("/proc/loadavg");
    format!(
        "{}, {count} processors ({model}{}), {} GiB, Linux {}; load when it began: {}",
        date(),
        if is_virtual { ", virtual" } else { "" },
        kib.div_ceil(1 << 20),
        kernel.join("."),
        load.split(' ').next().unwrap_or_default()
    )
}

fn date() -> String {
    let output = Command::new("date").args(["-u", "+%Y-%m-%d"]).output();
    let output = output.map(|output| output.stdout).unwrap_or_default();
    String::from_utf8_lossy(&output).trim().to_owned()
}

fn read(path: &str) -> String {
    fs::read_to_string(path).unwrap_or_default()
}

/// The first `NAME: VALUE`.
fn field(text: &str, name: &str) -> String {
    let line = text.lines().find(|line| line.starts_with(name));
    let value = line.and_then(|line| line.split_once(':'));
    value.map_or(String::new(), |(_, value)| value.trim().to_owned())
}
