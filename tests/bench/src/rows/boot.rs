//! From the start of a monitor to its guest, and what it has in memory beside the guest's.

use std::cell::RefCell;
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use tandem_tests::emulated::Machine;
use tandem_tests::error::Result;
use tandem_tests::lab::{Kernel, Lab};
use tandem_tests::tree::Tree;

use crate::boot::{DISK, INITRD, KERNEL, MARK, tiny_kernel, until_mark};
use crate::clock;
use crate::image::{Kind, image};
use crate::measure::{Contender, Goal, Line, Role, Series, Unit};
use crate::suite::Suite;

const MEMORY: u64 = 256 << 20;
/// Of an initrd that has to be read.
const INITRD_SIZE: usize = 16 << 20;
/// How long the emulated machine may take.
const LIMIT: Duration = Duration::from_secs(3600);

/// With a guest that says at once that it is there, on this machine's own KVM.
pub fn own_share(suite: &mut Suite) {
    if !Path::new("/dev/kvm").exists() {
        println!("\nskipped: there is no /dev/kvm\n");
        return;
    }
    let dir = suite.disk();
    let disk = image(&dir.path().join("disk"), Kind::Internal, 20 << 30);
    let kernel = tiny_kernel(dir.path().join("kernel"));
    let initrd = dir.path().join("initrd");
    fs::write(&initrd, vec![0; INITRD_SIZE]).unwrap();
    let tandem = suite.program("tandem");
    let memory = RefCell::new(Vec::new());
    let contenders = vec![Contender::tandem(|_| {
        let mut command = Command::new(&tandem);
        command.arg("run").arg("--kernel").arg(&kernel);
        command.arg("--initrd").arg(&initrd);
        command.args(["--memory", &format!("{}M", MEMORY >> 20)]);
        let (running, time) = until_mark(command.arg("--disk").arg(&disk));
        let pid = running.pid().to_string();
        let guest = guest_memory(&pid);
        let own = clock::resident_kib(&pid, |line| !is_within(line, &guest));
        memory.borrow_mut().push(own);
        time
    })];
    let time = suite.turns(1).run(contenders);
    let line = Line::new(
        "from exec to the guest's first instruction, initrd of 16 MiB",
        Unit::Nanoseconds,
        time,
    );
    suite.add(line.goal(Goal::AtMost(10e6)));
    let samples = memory.into_inner();
    let memory = vec![Series::new("Tandem", Role::Tandem, samples)];
    let text = "memory beside the guest's, one disk";
    let line = Line::new(text, Unit::Kib, memory);
    suite.add(line.goal(Goal::AtMost(6.0 * 1024.0)));
}

/// Addresses of a mapping, from its line in `maps` or `smaps`.
fn addresses(line: &str) -> Option<Range<u64>> {
    let (start, end) = line.split(' ').next()?.split_once('-')?;
    let parse = |text| u64::from_str_radix(text, 16).ok();
    Some(parse(start)?..parse(end)?)
}

fn is_within(line: &str, range: &Range<u64>) -> bool {
    addresses(line).is_some_and(|own| range.start <= own.start && own.end <= range.end)
}

/// Where the guest's memory is: mappings side by side that are as long together.
fn guest_memory(pid: &str) -> Range<u64> {
    let maps = fs::read_to_string(format!("/proc/{pid}/maps")).unwrap();
    let mappings: Vec<_> = maps.lines().filter_map(addresses).collect();
    let starts_here = |first: usize| {
        let mut end = mappings[first].start;
        for next in &mappings[first..] {
            if next.start != end || end - mappings[first].start >= MEMORY {
                break;
            }
            end = next.end;
        }
        let range = mappings[first].start..end;
        (range.end - range.start == MEMORY).then_some(range)
    };
    (0..mappings.len()).find_map(starts_here).unwrap()
}

/// Boots of the stock kernel, in the machine that QEMU emulates.
pub fn stock_kernel(suite: &mut Suite) {
    match emulated(suite) {
        Ok(series) => {
            let text = "from exec to the guest's init, in the emulated machine";
            let note = pairs_won(&series);
            let line = Line::new(text, Unit::Nanoseconds, series);
            suite.add(line.goal(Goal::TimesPeers(1.0)).note(note));
        }
        Err(error) => println!("\nskipped: {error}\n"),
    }
}

/// In how many rounds Tandem was first.
fn pairs_won(series: &[Series]) -> String {
    let [tandem, peer] = series else {
        return String::new();
    };
    let pairs = tandem.samples.iter().zip(&peer.samples);
    let won = pairs.filter(|(tandem, peer)| tandem < peer).count();
    format!("first in {won} of {} pairs", tandem.samples.len())
}

fn emulated(suite: &Suite) -> Result<Vec<Series>> {
    let lab = Lab::open(&suite.settings.lab)?;
    let dir = suite.disk();
    let disk = image(&dir.path().join("disk"), Kind::Internal, 1 << 30);
    let init = format!("#!/bin/sh\necho {MARK}\nsleep 1000\n");
    let mut initrd = Tree::default();
    initrd.busybox(&lab)?.script("/init", &init);
    let own = std::env::current_exe().unwrap_or_default();
    let mut tree = Tree::default();
    tree.program(&own)?
        .program(fs::canonicalize(suite.program("tandem")).unwrap_or_default())?
        .program("qemu-system-x86_64")?
        .copy(KERNEL, lab.kernel(Kernel::BzImage))
        .file(INITRD, initrd.cpio()?)
        .copy(DISK, disk);
    // QEMU's firmware for this machine type.
    for path in [
        "/usr/share/seabios/bios-microvm.bin",
        "/usr/share/qemu/linuxboot_dma.bin",
        "/usr/share/qemu/pvh.bin",
    ] {
        tree.copy(path, path);
    }
    let name = own.file_name().unwrap_or_default().to_string_lossy();
    let rounds = suite.settings.rounds;
    let payload = format!("#!/bin/sh\nexec /bin/{name} boot --rounds {rounds} >/out/boot\n");
    let machine = Machine::new(&lab, dir.path().join("machine"), LIMIT);
    let status = machine.run(tree, &payload)?;
    let output = machine.read("/out/boot")?;
    assert_eq!(status, 0, "the measurement in the emulated machine");
    let output = String::from_utf8_lossy(&output);
    let series = output.lines().filter_map(|line| {
        let (name, samples) = line.split_once(':')?;
        let role = if name == "Tandem" {
            Role::Tandem
        } else {
            Role::Peer
        };
        let samples = samples.split(' ').filter_map(|word| word.parse().ok());
        Some(Series::new(name, role, samples.collect()))
    });
    Ok(series.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_are_counted() {
        let series = |role, samples: &[f64]| Series::new("", role, samples.into());
        let pairs = [
            series(Role::Tandem, &[1.0, 3.0, 2.0]),
            series(Role::Peer, &[2.0, 2.0, 4.0]),
        ];
        assert_eq!(pairs_won(&pairs), "first in 2 of 3 pairs");
    }
}
