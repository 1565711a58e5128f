//! A machine without CPUs, whose disks are images in a directory, and clients that operate it. What
//! answers them can open files below that directory only, as `--allow-dir` has it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::Shutdown;
use std::os::unix::fs::symlink;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::mpsc::{Sender, channel};
use std::sync::{LazyLock, Mutex};
use std::thread::{self, JoinHandle};

use serde_json::Value;
use tandem_block::qcow2::{
    AmendOptions, BitmapEditor, CreateOptions, DataFileLayout, OpenOptions, Qcow2, create,
};
use tandem_block::{Disk, ImageFormat, VolatileSlice};
use tandem_vmm::control::{Control, fuzzing};
use tandem_vmm::sandbox::{Enforced, FileRules, confine_files};
use tempfile::TempDir;

/// Bytes of a disk: some granules of a backup.
pub const SIZE: u64 = 512 << 10;
/// What the file outside is full of.
const SECRET: &[u8] = &[0xab; 64 << 10];

/// A disk to be: its files, and how it is opened.
pub struct Kind {
    files: Vec<(String, Vec<u8>)>,
    /// What follows the directory of the images.
    pub config: String,
    /// Nothing is left of what is written to it.
    pub is_temporary: bool,
}

/// The directory of the images, and one beside it.
pub struct Place {
    root: TempDir,
}

impl Place {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        for directory in ["images", "images/sub", "outside"] {
            fs::create_dir(root.path().join(directory)).unwrap();
        }
        let place = Self { root };
        symlink("../outside", place.path("out")).unwrap();
        symlink("loop", place.path("loop")).unwrap();
        let made = Command::new("mkfifo").arg(place.path("pipe")).status();
        assert!(made.unwrap().success());
        fs::write(place.secret(), SECRET).unwrap();
        place
    }

    pub fn directory(&self) -> PathBuf {
        self.root.path().join("images")
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory().join(name)
    }

    fn secret(&self) -> PathBuf {
        self.root.path().join("outside/secret")
    }

    /// All files that could be images.
    pub fn files(&self) -> Vec<PathBuf> {
        let in_directory = |name: &str| fs::read_dir(self.path(name)).unwrap();
        let entries = in_directory("").chain(in_directory("sub"));
        let files = entries.map(|entry| entry.unwrap());
        let files = files.filter(|entry| entry.file_type().unwrap().is_file());
        files.map(|entry| entry.path()).collect()
    }

    /// Has the directory hold what `kinds` consist of.
    fn fill(&self, kinds: &[&Kind]) {
        for file in self.files() {
            fs::remove_file(file).unwrap();
        }
        for (name, content) in kinds.iter().flat_map(|kind| &kind.files) {
            fs::write(self.path(name), content).unwrap();
        }
    }

    pub fn assert_outside_is_as_it_was(&self) {
        let outside = fs::read_dir(self.root.path().join("outside")).unwrap();
        assert_eq!(outside.count(), 1, "there is a file outside");
        let count = fs::read_dir(self.root.path()).unwrap().count();
        assert_eq!(count, 2, "there is a file beside the directory");
        let secret = fs::read(self.secret()).unwrap();
        assert!(secret == SECRET, "the file outside has been changed");
    }
}

pub static PLACE: LazyLock<Place> = LazyLock::new(Place::new);

/// The kinds of the first disk, and those of the second.
pub static KINDS: LazyLock<[Vec<Kind>; 2]> = LazyLock::new(|| ["a", "b"].map(kinds));

fn kinds(name: &str) -> Vec<Kind> {
    let plain = CreateOptions {
        size: SIZE,
        cluster_size: 4 << 10,
        ..CreateOptions::default()
    };
    let data_file = |layout, is_raw| CreateOptions {
        data_file: Some(format!("{name}.data").into()),
        data_file_layout: layout,
        data_file_raw: is_raw,
        ..plain.clone()
    };
    let on = |below: &str| CreateOptions {
        backing_file: Some(format!("{name}.{below}").into()),
        backing_format: Some(ImageFormat::Qcow2),
        ..plain.clone()
    };
    let extended = CreateOptions {
        extended_l2: true,
        cluster_size: 64 << 10,
        ..plain.clone()
    };
    let chain = [
        ("base", plain.clone()),
        ("mid", on("base")),
        ("", on("mid")),
    ];
    let data = || data_file(DataFileLayout::default(), true);
    vec![
        kind(name, &[("", plain.clone())], ""),
        kind(name, &[("base", plain.clone()), ("", on("base"))], ""),
        kind(name, &chain, ""),
        kind(name, &[("", data())], ""),
        kind(
            name,
            &[("", data_file(DataFileLayout::default(), false))],
            "",
        ),
        kind(name, &[("", data_file(DataFileLayout::Packed, false))], ""),
        kind(name, &[("", extended)], ""),
        kind(name, &[("base", plain.clone())], ".base,overlay=temp"),
        Kind {
            files: vec![(name.to_owned(), vec![3; SIZE as usize])],
            config: format!("{name},format=raw"),
            is_temporary: false,
        },
    ]
}

/// A disk of `images`, each made on those before, called `name` with an ending.
fn kind(name: &str, images: &[(&str, CreateOptions)], config: &str) -> Kind {
    let dir = tempfile::tempdir().unwrap();
    for (number, (ending, options)) in (1..).zip(images) {
        let dot = if ending.is_empty() { "" } else { "." };
        let path = dir.path().join(format!("{name}{dot}{ending}"));
        let mut options = options.clone();
        let data_file = options.data_file.take();
        options.data_file = data_file.as_ref().map(|name| dir.path().join(name));
        create(&path, &options).unwrap();
        if data_file.is_some() {
            // Its name is not to have this directory in it.
            let named = AmendOptions {
                data_file: data_file.map(Into::into),
                ..AmendOptions::default()
            };
            let disk = Qcow2::open(&path, &OpenOptions::default()).unwrap();
            disk.amend(&named, &mut |_, _| {}).unwrap();
        }
        write_some(&path, number);
    }
    let files = fs::read_dir(dir.path()).unwrap().map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap().to_owned();
        (name, fs::read(path).unwrap())
    });
    Kind {
        files: files.collect(),
        config: format!("{name}{config}"),
        is_temporary: config.contains("overlay=temp"),
    }
}

/// Writes to a part of an image that depends on `number`, and gives it a bitmap.
fn write_some(path: &Path, number: u64) {
    let disk = Qcow2::open(path, &OpenOptions::default()).unwrap();
    for offset in [number * (96 << 10), SIZE - number * (20 << 10)] {
        let mut bytes = vec![number as u8; 20 << 10];
        disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
            .unwrap();
    }
    let mut editor = BitmapEditor::new(disk).unwrap();
    editor.add(b"a", None).unwrap();
    editor.commit().unwrap();
}

type Body = Box<dyn FnOnce() + Send>;

/// The thread that starts those which answer clients.
static CONFINED: LazyLock<Mutex<Sender<Body>>> = LazyLock::new(|| {
    let (sender, bodies) = channel::<Body>();
    let mut rules = FileRules::default();
    rules.directories.push(PLACE.directory());
    // Whoever panics keeps its input there.
    let findings = PathBuf::from("target/fuzz/findings");
    rules
        .directories
        .extend(Some(findings).filter(|path| path.is_dir()));
    thread::spawn(move || {
        let enforced = confine_files(&rules).unwrap();
        assert!(enforced != Enforced::Nothing, "this needs Landlock");
        bodies.into_iter().for_each(|body| body());
    });
    Mutex::new(sender)
});

/// Makes a machine with a disk of each kind.
pub fn machine(kinds: [&Kind; 2]) -> Control {
    PLACE.fill(&kinds);
    let configs = kinds.map(|kind| {
        let path = PLACE.path(&kind.config);
        path.to_str().unwrap().parse().unwrap()
    });
    fuzzing::control(&configs).unwrap()
}

/// A client that is connected.
pub struct Client {
    reader: BufReader<UnixStream>,
    server: Option<JoinHandle<()>>,
}

impl Client {
    pub fn connect(control: &Control) -> Self {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let control = control.clone();
        let (sender, started) = channel();
        let body = Box::new(move || {
            let serve = move || {
                // It fails when the client has gone.
                let _ = fuzzing::serve(&control, &theirs);
                let _ = theirs.shutdown(Shutdown::Both);
            };
            let _ = sender.send(thread::spawn(serve));
        });
        CONFINED.lock().unwrap().send(body).unwrap();
        Self {
            reader: BufReader::new(ours),
            server: Some(started.recv().unwrap()),
        }
    }

    /// Sends anything. It is never more than what is read before it is answered, or the socket holds.
    pub fn send(&self, bytes: &[u8]) {
        // The server hangs up behind a line that is too long.
        let _ = self.reader.get_ref().write_all(bytes);
    }

    pub fn end_requests(&self) {
        self.reader.get_ref().shutdown(Shutdown::Write).unwrap();
    }

    /// The next answer and the bytes behind it; `None` at the end.
    pub fn answer(&mut self) -> Option<(Value, Vec<u8>)> {
        let mut line = String::new();
        self.reader.read_line(&mut line).ok()?;
        if line.is_empty() {
            return None;
        }
        assert!(line.ends_with('\n'), "an answer without an end: {line}");
        let answer: Value = serde_json::from_str(&line).expect("an answer is JSON");
        let bytes = answer["ok"].get("extents").map(|_| &answer["ok"]["bytes"]);
        let bytes = bytes.map_or(0, |bytes| bytes.as_u64().expect("a number of bytes"));
        let mut payload = vec![0; bytes as usize];
        self.reader.read_exact(&mut payload).ok()?;
        Some((answer, payload))
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        let _ = self.reader.get_ref().shutdown(Shutdown::Both);
        let server = self.server.take().map(JoinHandle::join);
        assert!(server.is_none_or(|end| end.is_ok()) || thread::panicking());
    }
}
