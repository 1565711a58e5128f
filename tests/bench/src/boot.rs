//! Starting monitors, and waiting for what their guests say first.

use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use clap::Args;

use crate::measure::{Contender, Series, Turns};

/// What a guest says when it has come as far as is measured.
pub const MARK: &str = "@";
/// How long a guest may take.
const LIMIT: Duration = Duration::from_secs(300);

/// Pairs of boots of the stock kernel, in the emulated machine.
#[derive(Args)]
pub struct Boot {
    #[arg(long)]
    rounds: usize,
}

/// Where the files are in there.
pub const KERNEL: &str = "/boot/vmlinuz";
pub const INITRD: &str = "/boot/initrd";
pub const DISK: &str = "/boot/disk.qcow2";
const CMDLINE: &str = "quiet mitigations=off";

/// Prints what each has taken, in nanoseconds: a name and a list of numbers in a line.
pub fn run(boot: &Boot) {
    let turns = Turns {
        rounds: boot.rounds,
        pieces: 1,
    };
    let series = turns.run(vec![
        Contender::tandem(|_| until_mark(&mut tandem(Path::new("tandem"))).1),
        Contender::peer("QEMU microvm", |_| until_mark(&mut microvm()).1),
    ]);
    for Series { name, samples, .. } in series {
        let samples: Vec<_> = samples.iter().map(f64::to_string).collect();
        println!("{name}:{}", samples.join(" "));
    }
}

fn tandem(program: &Path) -> Command {
    let mut tandem = Command::new(program);
    tandem
        .args(["run", "--kernel", KERNEL, "--initrd", INITRD])
        .args(["--memory", "256M", "--disk", DISK, "--cmdline", CMDLINE]);
    tandem
}

fn microvm() -> Command {
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-machine", "microvm", "-accel", "kvm", "-cpu", "host"])
        .args(["-m", "256", "-nodefaults", "-no-user-config", "-no-reboot"])
        .args(["-display", "none", "-serial", "stdio"])
        .args(["-kernel", KERNEL, "-initrd", INITRD, "-append"])
        .arg(format!("console=ttyS0 panic=-1 {CMDLINE}"))
        .args([
            "-drive",
            &format!("if=none,id=disk,format=qcow2,file={DISK}"),
        ])
        .args(["-device", "virtio-blk-device,drive=disk"]);
    qemu
}

/// A monitor whose guest has said the mark; it ends with this.
pub struct Running(Child);

impl Running {
    pub fn pid(&self) -> u32 {
        self.0.id()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Nanoseconds from the start of a monitor until its guest says the mark. Panics if it does not.
pub fn until_mark(command: &mut Command) -> (Running, f64) {
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let start = Instant::now();
    let mut child = command.spawn().unwrap();
    let mut output = child.stdout.take().unwrap();
    let running = Running(child);
    let mut said = String::new();
    let mut buffer = [0; 4096];
    while !said.contains(MARK) {
        let length = output.read(&mut buffer).unwrap();
        said += &String::from_utf8_lossy(&buffer[..length]);
        let is_over = length == 0 || start.elapsed() > LIMIT;
        assert!(!is_over, "{command:?}: the guest said only {said:?}");
    }
    let time = start.elapsed().as_nanos() as f64;
    (running, time)
}

/// Writes a kernel that says the mark, and nothing else ever: what happens before is the monitor's.
pub fn tiny_kernel(path: PathBuf) -> PathBuf {
    /// Where it is in memory.
    const ENTRY: u64 = 0x10_0000;
    // mov dx, 0x3f8; mov al, '@'; out dx, al; mov al, '\n'; out dx, al; cli; hlt; jmp to the hlt.
    // The same in all modes of the processor but the oldest.
    let code = *b"\x66\xba\xf8\x03\xb0@\xee\xb0\n\xee\xfa\xf4\xeb\xfd";
    // The ELF note of its PVH entry.
    let mut note = Vec::new();
    for field in [4_u32, 8, 18] {
        note.extend(field.to_le_bytes());
    }
    note.extend(b"Xen\0");
    note.extend(ENTRY.to_le_bytes());
    let (of_note, of_code) = (176_u64, 256_u64);

    let mut file = b"\x7fELF\x02\x01\x01".to_vec();
    file.resize(16, 0);
    let mut put = |value: u64, size: usize| file.extend(&value.to_le_bytes()[..size]);
    // The header: an executable for x86-64 with two program headers right behind.
    for (value, size) in [(2, 2), (62, 2), (1, 4), (ENTRY, 8), (64, 8), (0, 8), (0, 4)] {
        put(value, size);
    }
    for value in [64, 56, 2, 0, 0, 0] {
        put(value, 2);
    }
    let (code_length, note_length) = (code.len() as u64, note.len() as u64);
    for (kind, flags, offset, address, length, align) in [
        (1, 7, of_code, ENTRY, code_length, 4096),
        (4, 4, of_note, 0, note_length, 4),
    ] {
        put(kind, 4);
        put(flags, 4);
        for value in [offset, address, address, length, length, align] {
            put(value, 8);
        }
    }
    assert_eq!(file.len() as u64, of_note);
    file.extend(note);
    file.resize(of_code as usize, 0);
    file.extend(code);
    fs::write(&path, file).unwrap();
    path
}
