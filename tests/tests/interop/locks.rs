//! QEMU's locks and ours: the same bytes, and each keeps the other off.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use tandem_block::qcow2::{CheckOptions, CreateOptions, Info, OpenOptions, Qcow2, check, create};
use tandem_block::{Disk, Error, FileOptions, Locking, Preallocation, Raw, Result};
use tempfile::TempDir;

use crate::qemu::{Image, Kind, run};

/// A program of QEMU that has a disk open, until this is dropped.
struct User(Child);

impl User {
    /// `qemu-io`, waiting for commands.
    fn io(args: &[&str], path: &Path) -> Self {
        let child = Command::new("qemu-io")
            .args(args)
            .arg(path)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut user = Self(child);
        let mut prompt = [0; 8];
        let stdout = user.0.stdout.as_mut().unwrap();
        stdout.read_exact(&mut prompt).unwrap();
        assert_eq!(&prompt, b"qemu-io>");
        user
    }

    /// A virtual machine that has the disk as a device, and does not run.
    fn machine(format: &str, read_only: bool, path: &Path) -> Self {
        let read_only = if read_only { ",readonly=on" } else { "" };
        let drive = format!(
            "file={},format={format},if=virtio{read_only}",
            path.display()
        );
        let child = Command::new("qemu-system-x86_64")
            .args([
                "-M", "q35", "-accel", "tcg", "-display", "none", "-S", "-m", "32",
            ])
            .args(["-nodefaults", "-qmp", "stdio", "-drive", &drive])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut user = Self(child);
        // It greets before it has its devices, and answers after.
        let stdin = user.0.stdin.as_mut().unwrap();
        writeln!(stdin, "{{\"execute\": \"qmp_capabilities\"}}").unwrap();
        let stdout = user.0.stdout.as_mut().unwrap();
        let answer = BufReader::new(stdout).lines().nth(1);
        let answer = answer.unwrap().unwrap();
        assert!(answer.contains("return"), "{answer}");
        user
    }
}

impl Drop for User {
    fn drop(&mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

/// The bytes of `path` that a process has locked. `/proc/locks` would be shorter, but it can tell of a
/// lock twice or not at all when others come and go meanwhile.
fn locked_bytes(process: u32, path: &Path) -> Vec<u64> {
    let path = path.canonicalize().unwrap();
    let mut bytes = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd")).unwrap() {
        // Other tests close their files.
        let Ok(entry) = entry else { continue };
        if entry.path().read_link().ok().as_ref() != Some(&path) {
            continue;
        }
        let number = entry.file_name().into_string().unwrap();
        let info = fs::read_to_string(format!("/proc/{process}/fdinfo/{number}")).unwrap();
        for line in info.lines().filter_map(|line| line.strip_prefix("lock:")) {
            let fields: Vec<_> = line.split_whitespace().collect();
            assert_eq!(fields[1..4], ["OFDLCK", "ADVISORY", "READ"], "{line}");
            let number = |at: usize| fields[at].parse::<u64>().unwrap();
            bytes.extend(number(6)..=number(7));
        }
    }
    bytes.sort_unstable();
    bytes
}

fn with(locking: Locking) -> FileOptions {
    FileOptions {
        locking,
        ..FileOptions::default()
    }
}

fn open(path: &Path, read_only: bool, locking: Locking) -> Result<Qcow2> {
    let options = OpenOptions {
        read_only,
        files: with(locking),
        ..OpenOptions::default()
    };
    Qcow2::open(path, &options)
}

/// A directory with disks that stand on one another.
struct Disks(TempDir);

impl Disks {
    /// `raw`; `image` with the data file `data`; `overlay` on `image`; `on-raw` on `raw`.
    fn new() -> Self {
        let disks = Self(tempfile::tempdir().unwrap());
        let make = |args: &str| {
            let status = Command::new("qemu-img")
                .args(args.split(' '))
                .current_dir(disks.0.path())
                .status();
            assert!(status.unwrap().success(), "{args}");
        };
        make("create -q -f raw raw 1M");
        let data = disks.path("data");
        make(&format!(
            "create -q -f qcow2 -o data_file={} image 1M",
            data.display()
        ));
        make("create -q -f qcow2 -b image -F qcow2 overlay");
        make("create -q -f qcow2 -b raw -F raw on-raw");
        disks
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.0.path().join(name)
    }

    fn locked(&self, process: u32) -> Vec<(&'static str, Vec<u64>)> {
        let names = ["raw", "image", "data", "overlay", "on-raw"];
        names
            .map(|name| (name, locked_bytes(process, &self.path(name))))
            .into()
    }
}

#[test]
fn the_same_bytes_as_a_machine_of_qemu() {
    let disks = Disks::new();
    for (name, format) in [
        ("raw", "raw"),
        ("image", "qcow2"),
        ("overlay", "qcow2"),
        ("on-raw", "qcow2"),
    ] {
        for read_only in [false, true] {
            let path = disks.path(name);
            let machine = User::machine(format, read_only, &path);
            let mut expected = disks.locked(machine.0.id());
            drop(machine);
            if name == "raw" && !read_only {
                // QEMU takes the permission to resize a raw disk when it does so.
                assert_eq!(expected[0].1, [100, 101, 201]);
                expected[0].1.insert(2, 103);
            }
            let disk: Box<dyn Disk> = match format {
                "raw" => Box::new(Raw::open(&path, read_only).unwrap()),
                _ => Box::new(open(&path, read_only, Locking::On).unwrap()),
            };
            assert_eq!(
                disks.locked(std::process::id()),
                expected,
                "{name}, read-only: {read_only}"
            );
            drop(disk);
            assert!(
                disks
                    .locked(std::process::id())
                    .iter()
                    .all(|(_, bytes)| bytes.is_empty())
            );
        }
    }
}

/// `Failed to get … lock`, as `kind` says, and nothing else.
fn assert_locked<T>(result: Result<T>, kind: &str, file: &Path) {
    let Err(error) = result else {
        panic!("{} can be opened", file.display())
    };
    let expected = format!(
        "Failed to get {kind} lock\nIs another process using the image [{}]?",
        file.display()
    );
    assert!(error.reason().ends_with(&expected), "{error}");
    assert!(
        matches!(error, Error::Locked { .. } | Error::BackingFile { .. }),
        "{error:?}"
    );
}

#[test]
fn qemu_keeps_us_off() {
    let disks = Disks::new();
    let (image, overlay, raw) = (
        disks.path("image"),
        disks.path("overlay"),
        disks.path("raw"),
    );
    let user = User::io(&["-f", "qcow2"], &image);
    let before = fs::read(&image).unwrap();
    assert_locked(open(&image, false, Locking::On), "\"write\"", &image);
    assert_locked(open(&image, true, Locking::On), "shared \"write\"", &image);
    assert_locked(
        open(&overlay, false, Locking::On),
        "shared \"write\"",
        &image,
    );
    assert_locked(Info::read(&image), "shared \"write\"", &image);
    let checked = check(&image, &CheckOptions::default(), &mut |_| ());
    assert_locked(checked, "shared \"write\"", &image);
    let options = CreateOptions::default();
    assert_locked(create(&image, &options), "\"write\"", &image);
    let data = disks.path("data");
    let options = CreateOptions {
        data_file: Some(data.clone()),
        ..CreateOptions::default()
    };
    // `qemu-io` shares the data file with writers, as long as its length stays.
    assert_locked(create(&disks.path("new"), &options), "\"resize\"", &data);
    assert!(!disks.path("new").exists());
    assert!(fs::read(&image).unwrap() == before);

    open(&image, true, Locking::ForceShare).unwrap();
    let options = CheckOptions {
        files: with(Locking::ForceShare),
        ..CheckOptions::default()
    };
    check(&image, &options, &mut |_| ()).unwrap();
    Info::read_with(&image, Locking::ForceShare).unwrap();
    let writer = open(&image, false, Locking::ForceShare)
        .map(drop)
        .unwrap_err();
    assert!(writer.to_string().contains("force-share=on"), "{writer}");
    drop(user);

    let user = User::machine("raw", false, &raw);
    assert_locked(Raw::open(&raw, false), "\"write\"", &raw);
    assert_locked(Raw::open(&raw, true), "shared \"write\"", &raw);
    assert_locked(
        Raw::create(&raw, 512, Preallocation::Off),
        "\"write\"",
        &raw,
    );
    Raw::open_with(&raw, true, with(Locking::ForceShare)).unwrap();
    drop(user);

    drop(open(&overlay, false, Locking::On).unwrap());
    Raw::open(&raw, false).unwrap();
}

fn output(program: &str, args: &[&str], path: &Path) -> Output {
    Command::new(program).args(args).arg(path).output().unwrap()
}

#[test]
fn we_keep_qemu_off() {
    let disks = Disks::new();
    let refused = |program: &str, args: &[&str], name: &str, what: &str| {
        let output = output(program, args, &disks.path(name));
        let text = String::from_utf8_lossy(&output.stderr);
        let expected = format!("Failed to get {what} lock\nIs another process using");
        assert!(
            text.contains(&expected),
            "{program} {args:?} {name}: {text}"
        );
    };
    let granted = |program: &str, args: &[&str], name: &str| {
        let output = output(program, args, &disks.path(name));
        assert!(
            output.status.success(),
            "{program} {args:?} {name}: {output:?}"
        );
    };
    let disk = open(&disks.path("overlay"), false, Locking::On).unwrap();
    refused("qemu-io", &["-c", "quit"], "overlay", "\"write\"");
    refused(
        "qemu-io",
        &["-r", "-c", "quit"],
        "overlay",
        "shared \"write\"",
    );
    refused("qemu-img", &["check"], "overlay", "shared \"write\"");
    refused(
        "qemu-img",
        &["amend", "-o", "lazy_refcounts=on"],
        "overlay",
        "\"write\"",
    );
    refused("qemu-io", &["-c", "quit"], "image", "\"write\"");
    refused("qemu-io", &["-f", "raw", "-c", "quit"], "data", "\"write\"");
    granted("qemu-io", &["-r", "-c", "quit"], "image");
    granted("qemu-img", &["info", "-U"], "overlay");
    granted("qemu-img", &["check", "-U"], "overlay");
    drop(disk);
    granted("qemu-io", &["-c", "quit"], "overlay");

    let disk = open(&disks.path("image"), true, Locking::On).unwrap();
    granted("qemu-io", &["-r", "-c", "quit"], "image");
    granted("qemu-img", &["check"], "image");
    refused("qemu-io", &["-c", "quit"], "image", "\"write\"");
    open(&disks.path("image"), true, Locking::On).unwrap();
    drop(disk);

    let disk = Raw::open(&disks.path("raw"), false).unwrap();
    refused("qemu-io", &["-f", "raw", "-c", "quit"], "raw", "\"write\"");
    drop(disk);
    let _free = open(&disks.path("image"), false, Locking::Off).unwrap();
    granted("qemu-io", &["-c", "quit"], "image");
}

#[test]
fn a_file_has_one_writer_in_a_process_too() {
    for kind in [Kind::Internal, Kind::External, Kind::Raw] {
        let image = Image::create(kind, 65536, 1 << 20);
        let path = image.path();
        let disk = image.open().unwrap();
        assert_locked(image.open(), "\"write\"", &path);
        assert_locked(open(&path, true, Locking::On), "shared \"write\"", &path);
        drop(disk);
        let readers = [(); 2].map(|()| open(&path, true, Locking::On).unwrap());
        assert_locked(image.open(), "\"write\"", &path);
        drop(readers);
        if kind == Kind::Internal {
            continue;
        }
        // Another image on the same data file.
        let copy = path.with_extension("copy");
        fs::copy(&path, &copy).unwrap();
        let disk = image.open().unwrap();
        let data = image.data_file().canonicalize().unwrap();
        assert_locked(open(&copy, false, Locking::On), "\"write\"", &data);
        drop(disk);
        run("qemu-img", &["check", "-q", copy.to_str().unwrap()]);
    }
}
