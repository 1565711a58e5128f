//! Running the two programs in directories of equal content.

use std::fs;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use tempfile::TempDir;

/// What a program did.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    pub status: Option<i32>,
    pub stdout: String,
    pub stderr: String,
}

/// A directory in which a program runs.
pub struct Place {
    dir: TempDir,
    program: &'static str,
}

const TANDEM: &str = env!("CARGO_BIN_EXE_tandem-img");
const QEMU: &str = "/usr/bin/qemu-img";

/// What all tests that run at once need in memory, and more.
const ROOM: u64 = 2 << 30;

impl Place {
    /// An empty directory for `tandem-img`.
    pub fn tandem() -> Self {
        Self {
            dir: tempfile::tempdir().unwrap(),
            program: TANDEM,
        }
    }

    /// An empty directory for `tandem-img` in memory, where there is no waiting for disks, if there is
    /// room enough: in a container, `/dev/shm` may be small.
    pub fn in_memory() -> Self {
        let memory = Path::new("/dev/shm");
        let dir = match rustix::fs::statvfs(memory) {
            Ok(it) if it.f_bavail.saturating_mul(it.f_frsize) >= ROOM => {
                tempfile::tempdir_in(memory)
            }
            _ => tempfile::tempdir(),
        };
        Self {
            dir: dir.unwrap(),
            program: TANDEM,
        }
    }

    /// An empty directory for `qemu-img`.
    pub fn qemu() -> Self {
        Self {
            program: QEMU,
            ..Self::tandem()
        }
    }

    /// Whether it is the place of QEMU's program.
    pub fn is_qemus(&self) -> bool {
        self.program == QEMU
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Runs the program of this place under the name `qemu-img`.
    pub fn run(&self, args: &[&str]) -> Run {
        self.run_program(self.program, args)
    }

    /// Runs QEMU's own program in this place, whatever the place is for.
    pub fn qemu_img(&self, args: &[&str]) -> Run {
        self.run_program(QEMU, args)
    }

    /// As [`qemu_img`](Self::qemu_img), with files of at most `limit` bytes: what would make one longer
    /// fails, or ends the program where it does not ignore `SIGXFSZ`.
    pub fn qemu_img_within(&self, limit: u64, args: &[&str]) -> Run {
        let limit = format!("--fsize={limit}");
        self.run_program("prlimit", &[&[&limit, QEMU], args].concat())
    }

    /// The program of this place under the name `qemu-img`, not run yet.
    pub fn command(&self, args: &[&str]) -> Command {
        self.command_of(self.program, args)
    }

    fn command_of(&self, program: &str, args: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .arg0("qemu-img")
            .args(args)
            .current_dir(self.dir.path());
        command
    }

    fn run_program(&self, program: &str, args: &[&str]) -> Run {
        let output = self
            .command_of(program, args)
            .output()
            .unwrap_or_else(|e| panic!("{program}: {e}"));
        Run {
            status: output.status.code(),
            stdout: String::from_utf8(output.stdout).unwrap(),
            stderr: String::from_utf8(output.stderr).unwrap(),
        }
    }

    /// Runs `qemu-img`, which must succeed.
    pub fn make(&self, line: &str) {
        let made = self.qemu_img(&words(line));
        assert_eq!(made.status, Some(0), "{line}: {}", made.stderr);
    }

    /// Runs the program of this place, and kills it after a time. Whether it had not ended by then.
    pub fn kill_after(&self, args: &[&str], time: Duration) -> bool {
        let mut child = Command::new(self.program)
            .args(args)
            .current_dir(self.dir.path())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(time);
        child.kill().unwrap();
        child.wait().unwrap().signal() == Some(9)
    }

    /// Another place in memory, with equal content.
    pub fn copy(&self) -> Self {
        let copy = Self::in_memory();
        let copied = Command::new("cp")
            .arg("-a")
            .arg(self.dir.path().join("."))
            .arg(copy.dir.path())
            .status();
        assert!(copied.unwrap().success());
        copy
    }

    /// Runs commands of `qemu-io` on an image.
    pub fn qemu_io(&self, image: &str, commands: &[&str]) {
        self.run_qemu_io(&[], image, commands);
    }

    /// As [`qemu_io`](Self::qemu_io), for an image of this format.
    pub fn qemu_io_as(&self, format: &str, image: &str, commands: &[&str]) {
        self.run_qemu_io(&["-d", "unmap", "-f", format], image, commands);
    }

    /// Runs commands of `tandem-io` on an image.
    pub fn tandem_io(&self, image: &str, commands: &[&str]) {
        let mut io = self.command_of(env!("CARGO_BIN_EXE_tandem-io"), &[]);
        io.args(commands.iter().flat_map(|command| ["-c", command]));
        let done = io.arg(image).output().unwrap();
        assert!(done.status.success(), "{image}: {done:?}");
    }

    fn run_qemu_io(&self, options: &[&str], image: &str, commands: &[&str]) {
        let done = Command::new("qemu-io")
            .args(options)
            .args(["-t", "unsafe"])
            .args(commands.iter().flat_map(|command| ["-c", command]))
            .arg(image)
            .current_dir(self.dir.path())
            .output()
            .unwrap();
        assert!(
            done.status.success(),
            "{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }

    /// Names and content of the files, sorted by name.
    pub fn content(&self) -> Vec<(String, Vec<u8>)> {
        let mut files: Vec<_> = fs::read_dir(self.dir.path())
            .unwrap()
            .map(|entry| {
                let entry = entry.unwrap();
                let name = entry.file_name().into_string().unwrap();
                let content = fs::read(entry.path()).unwrap_or_default();
                (name, content)
            })
            .collect();
        files.sort();
        files
    }
}

/// Splits a command line at blanks; `''` is an empty word.
pub fn words(line: &str) -> Vec<&str> {
    line.split_whitespace()
        .map(|word| if word == "''" { "" } else { word })
        .collect()
}

/// A place of each program, with equal content.
pub struct Both {
    pub qemu: Place,
    pub tandem: Place,
}

impl Both {
    /// Two places made by `prepare`.
    pub fn new(prepare: impl Fn(&Place) + Sync) -> Self {
        let both = Self {
            qemu: Place::qemu(),
            tandem: Place::tandem(),
        };
        both.each(prepare);
        both
    }

    /// As [`new`](Self::new), in memory: for what no file system decides about.
    pub fn in_memory(prepare: impl Fn(&Place) + Sync) -> Self {
        let both = Self {
            qemu: Place {
                program: QEMU,
                ..Place::in_memory()
            },
            tandem: Place::in_memory(),
        };
        both.each(prepare);
        both
    }

    /// What `f` makes of the place of QEMU and of that of Tandem, at the same time: most of the time
    /// goes by waiting for the disk.
    pub fn each<T: Send>(&self, f: impl Fn(&Place) -> T + Sync) -> [T; 2] {
        std::thread::scope(|scope| {
            let qemu = scope.spawn(|| f(&self.qemu));
            let tandem = f(&self.tandem);
            [qemu.join().unwrap(), tandem]
        })
    }

    /// Two empty places.
    pub fn empty() -> Self {
        Self::new(|_| ())
    }

    /// Runs `line` with both programs; fails unless output, messages and status are equal.
    pub fn same(&self, line: &str) {
        let args = words(line);
        let [expected, found] = self.each(|place| place.run(&args));
        assert_eq!(found, expected, "{line}");
    }
}

impl Both {
    /// Fails unless the file `name` is the same in both places.
    pub fn same_bytes(&self, name: &str) {
        let read = |place: &Place| fs::read(place.path(name)).unwrap();
        assert!(read(&self.qemu) == read(&self.tandem), "{name} differs");
    }
}

/// Length of a file in a place.
pub fn len(place: &Place, name: impl AsRef<Path>) -> u64 {
    fs::metadata(place.dir.path().join(name)).unwrap().len()
}
