//! What an operation that works with names leaves of the files when the process is killed in it.

use std::fs;
use std::path::Path;

use tandem_block::qcow2::{CheckOptions, FindingKind, OpenOptions, Qcow2, check};
use tandem_block::{Disk, Error, ForkOptions, LiveDisk};
use vm_memory::VolatileSlice;

use crate::judge::read_stamps;
use crate::power::Run;
use crate::setup::{Kind, Setup, scratch};
use crate::storage::{SECTOR, sector_bytes};
use crate::syscalls::at_each_call;

const SETUPS: [Setup; 4] = [
    Setup::new(Kind::Internal, 3, 512),
    Setup::new(Kind::Internal, 3, 4096),
    Setup::new(Kind::Overlay, 3, 4096),
    Setup::new(Kind::Internal, 3, 4096).with_bitmap(),
];
/// Names of the images that a disk is forked into.
const NEW: [&str; 2] = ["top", "fork"];

fn fill(disk: &dyn Disk, sector: u64, count: usize, stamp: u64) {
    let mut bytes = sector_bytes(stamp).repeat(count);
    let bufs = [VolatileSlice::from(&mut bytes[..])];
    disk.write_at(&bufs, sector * SECTOR as u64).unwrap();
}

/// At each call the old image and the new ones, as far as they are there, hold what had been flushed, and
/// of the rest each sector or not; afterwards, the fork keeps what the disk held.
pub fn forking(run: &mut Run) {
    for setup in SETUPS {
        let dir = scratch();
        setup.create_in(dir.path());
        let path = |name: &str| dir.path().join(name);
        let options = OpenOptions::default();
        let disk = LiveDisk::new(Qcow2::open(&path("image"), &options).unwrap());
        fill(&disk, 3, 30, 5);
        disk.flush().unwrap();
        let flushed = read_stamps(&disk).unwrap();
        fill(&disk, 20, 40, 6);
        let written = read_stamps(&disk).unwrap();
        let fork = ForkOptions {
            open: options.clone(),
            overlay: path(NEW[0]),
            fork: path(NEW[1]),
        };
        run.tally.workloads += 1;
        let forked = at_each_call(
            || disk.fork(&fork),
            || {
                run.tally.points += 1;
                run.tally.states += 1;
                judge(&setup, dir.path(), &[&flushed, &written]);
            },
        );
        forked.unwrap();
        run.tally.states += 1;
        judge(&setup, dir.path(), &[&written]);
        fill(&disk, 0, 70, 7);
        disk.close().unwrap();
        drop(disk);
        judge(&setup, dir.path(), &[&written]);
        let top = Qcow2::open(&path(NEW[0]), &options).unwrap();
        assert_eq!(read_stamps(&top).unwrap()[..70], [7; 70], "{setup}");
    }
}

/// Each image in a copy of `dir` shows in each sector what one of `contents` has. What the disk goes on
/// with may have more.
fn judge(setup: &Setup, dir: &Path, contents: &[&Vec<u64>]) {
    let copy = scratch();
    for entry in fs::read_dir(dir).unwrap() {
        let entry = entry.unwrap();
        let to = copy.path().join(entry.file_name());
        fs::copy(entry.path(), &to).unwrap();
        // Overlays know when the image below them was written last.
        let modified = entry.metadata().unwrap().modified().unwrap();
        let file = fs::File::options().write(true).open(to).unwrap();
        file.set_modified(modified).unwrap();
    }
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    for name in ["image", NEW[0], NEW[1]] {
        let path = copy.path().join(name);
        if !path.exists() {
            assert_ne!(name, "image");
            continue;
        }
        let wrong = &mut |finding: tandem_block::qcow2::Finding| {
            let is_leak = finding.kind == FindingKind::Leak;
            assert!(is_leak, "{setup}, {name}: {}", finding.text);
        };
        check(&path, &CheckOptions::default(), wrong).unwrap();
        let disk = match Qcow2::open(&path, &options) {
            Ok(disk) => disk,
            // Nothing stands on a new image as long as the one below goes on changing.
            Err(Error::BaseChanged { .. }) if contents.len() > 1 && name != "image" => continue,
            Err(e) => panic!("{setup}, {name}: {e}"),
        };
        let shown = read_stamps(&disk).unwrap();
        let is_going_on = name == NEW[0] && contents.len() == 1;
        for (sector, stamp) in shown.iter().enumerate().filter(|_| !is_going_on) {
            let is_allowed = contents.iter().any(|content| content[sector] == *stamp);
            assert!(is_allowed, "{setup}, {name}: sector {sector} is {stamp:#x}");
        }
    }
}
