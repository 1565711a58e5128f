//! Tandem on this machine's own KVM, with a guest that has no operating system: it drives its disks
//! with a driver written by others. What it does is in `tests/bare-guest`.

#[path = "../../bare-guest/src/content.rs"]
#[allow(dead_code, reason = "each test program uses a part of it")]
mod content;
mod disk;
mod exits;
mod guest;
mod machine;

use std::path::Path;

use content::SECTOR_SIZE;
use disk::{Disk, Kind};
use guest::have_kvm;
use machine::Start;

/// A disk of each kind in `dir`, in this order.
fn disks_of_every_kind(dir: &Path) -> Vec<Disk> {
    let kinds = [
        Kind::Internal,
        Kind::External,
        Kind::ExternalRaw,
        Kind::RawFormat,
    ];
    kinds.map(|kind| Disk::create(dir, kind)).to_vec()
}

#[test]
fn disks_of_every_kind_work_and_keep_what_is_written() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut disks = disks_of_every_kind(dir.path());

    let new = [
        "identity",
        "blank",
        "sizes",
        "segments",
        "flush",
        "beyond-the-end",
        "interrupts",
        "in-flight",
        "together",
        "restart",
        "speed",
        "fill",
        "content",
    ];
    Start::new(dir.path(), &disks).run(&new);
    for (index, disk) in disks.iter().enumerate() {
        disk.assert_content(index);
    }

    let again = [
        "identity",
        "content",
        "in-flight",
        "together",
        "fill",
        "content",
    ];
    let mut start = Start::new(dir.path(), &disks);
    start.config.cpus = 2;
    start.run(&again);
    for (index, disk) in disks.iter().enumerate() {
        disk.assert_content(index);
    }

    let before: Vec<_> = disks.iter().map(Disk::files).collect();
    for disk in &mut disks {
        disk.read_only = true;
    }
    let read_only = [
        "identity",
        "read-only",
        "beyond-the-end",
        "flush",
        "interrupts",
        "content",
    ];
    Start::new(dir.path(), &disks).run(&read_only);
    let after: Vec<_> = disks.iter().map(Disk::files).collect();
    assert!(before == after, "a file of a read-only disk has changed");
}

/// What the guest's driver does not know, the guest asks for by the queues alone.
#[test]
fn every_feature_of_the_device_works_on_disks_of_every_kind() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut disks = disks_of_every_kind(dir.path());
    let cases = [
        "discard",
        "write-zeroes",
        "writeback",
        "queues",
        "broken-rings",
        "grow",
        "fill",
        "content",
    ];
    let mut start = Start::new(dir.path(), &disks);
    start
        .config
        .disks
        .iter_mut()
        .for_each(|disk| disk.queues = Some(4));
    let ended = start.run_with(&cases, |line, control| {
        let index = line
            .strip_prefix("grow ")
            .and_then(|index| index.parse().ok());
        if let Some(index) = index {
            let disk: &Disk = &disks[index];
            let size = 2 * disk.sectors * SECTOR_SIZE as u64;
            assert_eq!(control.resize(index, Some(size), false).unwrap(), size);
        }
    });
    assert_eq!(ended.broken_rings, [3; 4]);
    for (index, disk) in disks.iter_mut().enumerate() {
        disk.sectors *= 2;
        disk.assert_content(index);
    }
}

/// Of the guest's accesses to the registers, KVM hands to this process all but the doorbells.
#[test]
fn doorbells_cause_no_exits() {
    if !have_kvm() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let disks = [Disk::create(dir.path(), Kind::ExternalRaw)];
    let ended = Start::new(dir.path(), &disks).run(&["doorbells"]);
    // The guest has read a register 1,000 times and rung 10,000 times.
    let exits = ended.mmio_exits;
    assert!((1000..10_000).contains(&exits), "{exits} exits");
}
