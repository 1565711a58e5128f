//! Guests of a few instructions, and `tandem` run with them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "what fails here fails the test"
)]

pub mod driver;

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// Longer than anything here takes on a busy machine; a test that waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// Ports of the machine, as its guests know them.
pub const COM1: u16 = 0x3f8;
pub const KEYBOARD_COMMAND: u16 = 0x64;
pub const POWER: u16 = 0x600;
pub const POWER_OFF: u8 = 5 << 2 | 1 << 5;
pub const RESET: u8 = 1;

/// Machine code, in the subset of instructions whose encoding is the same in 32- and 64-bit mode.
#[derive(Clone, Default)]
pub struct Code(pub Vec<u8>);

impl Code {
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn mov_dx(self, port: u16) -> Self {
        let [low, high] = port.to_le_bytes();
        self.raw(&[0x66, 0xba, low, high])
    }

    /// `mov dx, port; mov al, value; out dx, al`
    pub fn out(self, port: u16, value: u8) -> Self {
        self.mov_dx(port).raw(&[0xb0, value, 0xee])
    }

    pub fn print(self, text: &str) -> Self {
        text.bytes().fold(self, |code, byte| code.out(COM1, byte))
    }

    pub fn power_off(self) -> Self {
        self.out(POWER, POWER_OFF)
    }

    /// `mov ebx, address`
    pub fn mov_ebx(self, address: u32) -> Self {
        self.raw(&[0xbb]).raw(&address.to_le_bytes())
    }

    /// `mov dword [rbx + offset], value`
    pub fn store(self, offset: u32, value: u32) -> Self {
        let code = self.raw(&[0xc7, 0x83]).raw(&offset.to_le_bytes());
        code.raw(&value.to_le_bytes())
    }

    /// `cli; hlt`, again and again
    pub fn sleep(self) -> Self {
        self.raw(&[0xfa, 0xf4, 0xeb, 0xfc])
    }

    /// Takes input and sends it back, up to and including `last`.
    pub fn echo_until(self, last: u8) -> Self {
        // RTS and DTR: ready to receive.
        let start = self.out(COM1 + 4, 3);
        // again: in al, [line status]; test al, 1; jz again
        let wait = Code::default().mov_dx(COM1 + 5).raw(&[0xec, 0xa8, 1, 0x74]);
        let wait = wait.raw(&[0xf7]);
        // in al, [data]; out [data], al; cmp al, last; jne again
        let whole = wait.mov_dx(COM1).raw(&[0xec, 0xee, 0x3c, last, 0x75, 0xed]);
        start.raw(&whole.0)
    }
}

/// Where guests are loaded.
const BASE: u64 = 0x20_0000;
const HEADERS: u64 = 0x100;

/// An ELF64 executable whose entry point is the start of `code`; with a PVH note if asked.
pub fn elf(code: &Code, pvh: bool) -> Vec<u8> {
    let entry = BASE + HEADERS;
    let mut note = Vec::new();
    for word in [4u32, 4, 18] {
        note.extend(word.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend((entry as u32).to_le_bytes());

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    file.extend(2u16.to_le_bytes()); // ET_EXEC
    file.extend(62u16.to_le_bytes()); // EM_X86_64
    file.extend(1u32.to_le_bytes());
    file.extend(if pvh { 0 } else { entry }.to_le_bytes());
    file.extend(64u64.to_le_bytes()); // e_phoff
    file.extend(0u64.to_le_bytes()); // e_shoff
    file.extend(0u32.to_le_bytes());
    for half in [64u16, 56, 1 + u16::from(pvh), 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    let length = HEADERS + code.0.len() as u64;
    let note_at = HEADERS - note.len() as u64;
    let mut segment = |kind: u32, offset: u64, size: u64| {
        file.extend(kind.to_le_bytes());
        file.extend(7u32.to_le_bytes());
        for word in [offset, BASE + offset, BASE + offset, size, size, 0x1000] {
            file.extend(word.to_le_bytes());
        }
    };
    segment(1, 0, length); // PT_LOAD
    if pvh {
        segment(4, note_at, note.len() as u64); // PT_NOTE
    }
    assert!(file.len() as u64 <= note_at);
    file.resize(note_at as usize, 0);
    file.extend(note);
    file.extend(&code.0);
    file
}

/// Whether guests can be run here. If not, says so, or fails the test if `TANDEM_REQUIRE_KVM` is 1.
pub fn have_kvm() -> bool {
    let result = File::options().read(true).write(true).open("/dev/kvm");
    if let Err(e) = &result {
        let is_required = std::env::var_os("TANDEM_REQUIRE_KVM").is_some_and(|v| v == "1");
        assert!(!is_required, "TANDEM_REQUIRE_KVM=1, but /dev/kvm: {e}");
        // Not by `eprintln!`, whose output is kept back when a test passes.
        let _ = writeln!(io::stderr(), "skipped: /dev/kvm: {e}");
    }
    result.is_ok()
}

/// A guest's kernel in a directory of its own.
pub struct Guest {
    pub dir: TempDir,
    pub kernel: PathBuf,
}

impl Guest {
    pub fn new(code: &Code) -> Self {
        Self::from_file(&elf(code, false))
    }

    pub fn from_file(kernel_file: &[u8]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let kernel = dir.path().join("kernel");
        std::fs::write(&kernel, kernel_file).unwrap();
        Self { dir, kernel }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// `tandem run` with this kernel and little memory.
    pub fn command(&self) -> Command {
        let mut command = tandem_run(&self.kernel);
        command.args(["--memory", "8M"]);
        command
    }
}

/// `tandem run --kernel KERNEL`, with nothing on standard input and the outputs captured.
pub fn tandem_run(kernel: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
    command.arg("run").arg("--kernel").arg(kernel);
    command.stdin(Stdio::null());
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    heed_signals();
    command
}

/// Signals end what is started from here, though this was started to ignore them, as by `nohup`.
pub fn heed_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGQUIT, libc::SIGTERM] {
        // SAFETY: the default action is no code of ours.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// How a run of `tandem` ended.
#[derive(Debug)]
pub struct Ended {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl Ended {
    /// The exit status was `code` and nothing was complained of.
    pub fn assert_quiet(&self, code: i32) {
        assert_eq!(
            (self.status.code(), &*self.stderr),
            (Some(code), ""),
            "{self:?}"
        );
    }

    /// The exit status was `code` and standard error is one line that holds `text`.
    pub fn assert_says(&self, code: i32, text: &str) {
        assert_eq!(self.status.code(), Some(code), "{self:?}");
        assert!(self.stderr.contains(text), "{self:?}");
        assert_eq!(self.stderr.lines().count(), 1, "{self:?}");
    }

    pub fn assert_killed(&self, signal: i32) {
        assert_eq!(self.status.signal(), Some(signal), "{self:?}");
        assert_eq!(self.stderr, "");
    }
}

/// Runs `command` to its end.
pub fn run(mut command: Command) -> Ended {
    wait(command.spawn().unwrap())
}

/// Waits for `child` and takes what is left of its output.
pub fn wait(mut child: Child) -> Ended {
    fn collect(from: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
        thread::spawn(move || {
            let mut all = Vec::new();
            if let Some(mut from) = from {
                let _ = from.read_to_end(&mut all);
            }
            String::from_utf8_lossy(&all).into_owned()
        })
    }
    let (stdout, stderr) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let status = wait_status(&mut child);
    Ended {
        status,
        stdout: stdout.join().unwrap(),
        stderr: stderr.join().unwrap(),
    }
}

/// Waits for the end of `child`, and kills it when it takes too long.
pub fn wait_status(child: &mut Child) -> ExitStatus {
    let end = Instant::now() + PATIENCE;
    while Instant::now() < end {
        if let Some(status) = child.try_wait().unwrap() {
            return status;
        }
        thread::sleep(Duration::from_millis(5));
    }
    child.kill().unwrap();
    panic!("tandem did not end: {}", child.wait().unwrap());
}

/// Reads from `from` until `text` has come.
pub fn await_text(from: &mut impl Read, text: &str) -> String {
    let (mut seen, mut byte) = (Vec::new(), [0]);
    while !seen.ends_with(text.as_bytes()) {
        let count = from.read(&mut byte).unwrap();
        assert_eq!(count, 1, "end after {:?}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    String::from_utf8(seen).unwrap()
}

pub fn send_signal(child: &Child, signal: i32) {
    // SAFETY: the child has not been waited for, so its id is its own.
    assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
}
