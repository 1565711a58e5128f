//! Operations on the images of a disk in use: as QEMU finds them afterwards, and after a process that was
//! killed at them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{CommitOptions, Disk, ForkOptions, LiveDisk, Raw, RebaseOptions};
use tandem_tests::scratch;

use crate::qemu::{at_once, command, qemu_img, read_all, run, write};

const SIZE: u64 = 2 << 20;

fn go_on(_: u64, _: u64) -> ControlFlow<()> {
    ControlFlow::Continue(())
}

fn commit(disk: &LiveDisk, pivot: bool) {
    let options = CommitOptions {
        open: OpenOptions::default(),
        between: 0,
        pivot,
        max_last: None,
    };
    disk.commit(&options, &mut go_on).unwrap();
}

fn stand_alone(disk: &LiveDisk) {
    let options = RebaseOptions {
        open: OpenOptions::default(),
        backing: None,
        max_last: None,
    };
    disk.rebase(&options, &mut go_on).unwrap();
}

fn fork(disk: &LiveDisk, overlay: &Path, fork: &Path) {
    let options = ForkOptions {
        open: OpenOptions::default(),
        overlay: overlay.to_owned(),
        fork: fork.to_owned(),
    };
    disk.fork(&options).unwrap();
}

/// Has threads stop, also when a test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Writes all over `disk` while `operation` goes on; what the disk reads then.
fn during(disk: &LiveDisk, operation: impl FnOnce()) -> Vec<u8> {
    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            let mut i = 1_u64;
            while !stop.load(Ordering::Relaxed) {
                let at = i * 7919 % (SIZE / 512) * 512;
                match i % 16 {
                    0 => disk.discard(at / 65536 * 65536, 65536).unwrap(),
                    1 => disk.write_zeroes(at, 512, true).unwrap(),
                    _ => write(disk, at, 512, i as u8),
                }
                i += 1;
            }
        });
        let stop = Stop(&stop);
        thread::sleep(Duration::from_millis(5));
        operation();
        drop(stop);
    });
    read_all(disk)
}

fn path_of(disk: &LiveDisk) -> PathBuf {
    disk.with_image(|image| image.path().to_owned())
}

#[test]
fn qemu_finds_what_the_disk_had() {
    at_once(["raw", "qcow2", "data_file"], |kind| {
        let dir = scratch::in_memory();
        let path = |name: &str| dir.path().join(name);
        let base = path("base");
        let disk = if kind == "raw" {
            fs::File::create(&base).unwrap().set_len(SIZE).unwrap();
            LiveDisk::new(Raw::open(&base, false).unwrap())
        } else {
            let options = CreateOptions {
                size: SIZE,
                data_file: (kind == "data_file").then(|| path("data")),
                data_file_raw: kind == "data_file",
                ..CreateOptions::default()
            };
            create(&base, &options).unwrap();
            LiveDisk::new(Qcow2::open(&base, &OpenOptions::default()).unwrap())
        };
        during(&disk, || fork(&disk, &path("one"), &path("other")));
        let other = qemu_img(&["info", path("other").to_str().unwrap()]);
        assert!(other.contains("backing file: base"), "{other}");
        during(&disk, || commit(&disk, false));
        during(&disk, || fork(&disk, &path("two"), &path("more")));
        during(&disk, || commit(&disk, true));
        assert_eq!(path_of(&disk), path("one"));
        during(&disk, || fork(&disk, &path("three"), &path("much")));
        let expected = during(&disk, || stand_alone(&disk));
        disk.close().unwrap();
        drop(disk);
        for name in ["one", "two", "three", "more"] {
            run("qemu-img", &["check", path(name).to_str().unwrap()]);
        }
        let info = qemu_img(&["info", path("three").to_str().unwrap()]);
        assert!(!info.contains("backing"), "{info}");
        fs::write(path("expected"), expected).unwrap();
        let (three, expected) = (path("three"), path("expected"));
        let (three, expected) = (three.to_str().unwrap(), expected.to_str().unwrap());
        let compared = qemu_img(&["compare", "-f", "qcow2", "-F", "raw", three, expected]);
        assert!(compared.contains("identical"), "{kind}: {compared}");
    });
}

/// Tells the program that runs this test where to do what it is killed at.
const VICTIM: &str = "TANDEM_TEST_LIVE_VICTIM";
/// Sectors that the victim writes, one after the other, over and over.
const SECTORS: u64 = 256;

/// Does one operation after another, and tells what it has flushed, and which image the disk has.
#[test]
fn victim() {
    let Some(dir) = std::env::var_os(VICTIM).map(PathBuf::from) else {
        return;
    };
    let disk = LiveDisk::new(Qcow2::open(&dir.join("base"), &OpenOptions::default()).unwrap());
    let told = Mutex::new(());
    let tell = |text: String| {
        let _telling = told.lock();
        let mut stdout = std::io::stdout().lock();
        stdout.write_all(text.as_bytes()).unwrap();
        stdout.flush().unwrap();
    };
    thread::scope(|scope| {
        scope.spawn(|| {
            for i in 1_u64.. {
                let mut data = i.to_be_bytes().repeat(64);
                let bufs = [tandem_block::VolatileSlice::from(&mut data[..])];
                // Apart, so that there are many clusters.
                disk.write_at(&bufs, i % SECTORS * (SIZE / SECTORS))
                    .unwrap();
                if i % 8 == 0 {
                    disk.flush().unwrap();
                    tell(format!("\nflushed {i}\n"));
                }
            }
        });
        for i in 0.. {
            for what in ["pivot", "alone"] {
                let overlay = dir.join(format!("overlay-{i}-{what}"));
                tell(format!("\nto {}\n", overlay.display()));
                fork(&disk, &overlay, &dir.join("fork"));
                fs::remove_file(dir.join("fork")).unwrap();
                tell(format!("\nat {}\n", path_of(&disk).display()));
                commit(&disk, false);
                match what {
                    "pivot" => commit(&disk, true),
                    _ => stand_alone(&disk),
                }
                tell(format!("\nat {}\n", path_of(&disk).display()));
            }
        }
    });
}

/// What a victim has told until it was killed.
fn kill(dir: &Path, patience: Duration) -> Vec<String> {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["live::victim", "--exact", "--nocapture"])
        .env(VICTIM, dir)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut told = Vec::new();
    for line in lines.by_ref() {
        told.push(line.unwrap());
        if told.iter().any(|line| line.starts_with("at ")) {
            break;
        }
    }
    let killer = thread::spawn(move || {
        thread::sleep(patience);
        child.kill().unwrap();
        child.wait().unwrap();
    });
    told.extend(lines.map_while(Result::ok));
    killer.join().unwrap();
    told
}

#[test]
fn what_was_flushed_is_there_when_the_process_is_killed() {
    at_once(0..4, |round| {
        let dir = scratch::in_memory();
        let options = CreateOptions {
            size: SIZE,
            cluster_size: 4096,
            ..CreateOptions::default()
        };
        create(&dir.path().join("base"), &options).unwrap();
        let told = kill(dir.path(), Duration::from_millis(17 + 61 * round));
        let last = |key: &str| {
            let found = told.iter().rev().find_map(|line| line.strip_prefix(key));
            found.unwrap_or_else(|| panic!("{told:?}"))
        };
        let flushed: u64 = last("flushed ").parse().unwrap();
        // An overlay that has been begun is the disk once it is there, or as good.
        let image = Some(Path::new(last("to "))).filter(|overlay| {
            let begun = told.iter().rposition(|line| line.starts_with("to "));
            overlay.exists() && begun > told.iter().rposition(|line| line.starts_with("at "))
        });
        let image = image.unwrap_or_else(|| Path::new(last("at ")));
        for found in fs::read_dir(dir.path()).unwrap() {
            let path = found.unwrap().path();
            let checked = command("qemu-img", &["check", path.to_str().unwrap()]);
            // Leaks are no damage.
            assert!(matches!(checked.status.code(), Some(0 | 3)), "{checked:?}");
        }
        let disk = Qcow2::open(image, &OpenOptions::default()).unwrap();
        for sector in 0..SECTORS {
            let mut data = [0; 512];
            let bufs = [tandem_block::VolatileSlice::from(&mut data[..])];
            disk.read_at(&bufs, sector * (SIZE / SECTORS)).unwrap();
            let number = u64::from_be_bytes(data[..8].try_into().unwrap());
            assert_eq!(data[..], number.to_be_bytes().repeat(64), "whole");
            let due = (flushed.saturating_sub(SECTORS - 1)..=flushed)
                .find(|i| i % SECTORS == sector)
                .unwrap_or(0);
            assert!(
                number >= due,
                "{number} in sector {sector}, not {due}: {told:?}"
            );
        }
    });
}
