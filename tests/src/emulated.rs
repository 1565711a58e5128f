//! The emulated AMD machine: real KVM semantics where the hardware offers none.
//!
//! QEMU's TCG emulates AMD's SVM with nested paging, so the stock kernel in it loads `kvm-amd`
//! and has a `/dev/kvm`. It is slow per instruction, and says nothing about speed.
//!
//! The machine boots from a small initrd, which mounts the *work disk*: an ext4 file system made
//! of the [`Tree`] of the caller. A program of that tree is run; what it prints comes out as it is
//! printed, and its exit status and the files it left in `/out` are read from the disk at the end.
//!
//! The program runs on the machine's CPUs 1 and 2, never on CPU 0: QEMU (10.0 at least) clears a
//! flag of CPU 0, `IGNNE`, whenever any CPU restores FPU state, without a lock, in a word that also
//! says whether nested paging is on. When CPU 0 enters or leaves a guest at that moment, it goes on
//! with the page tables of the other side: guests end in a triple fault, or the kernel panics.

use std::fs;
use std::io::{IsTerminal, stdin};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::lab::{Kernel, Lab};
use crate::process::{self, command, stdout};
use crate::tree::{Tree, find_program};

/// The kernel modules that the machine needs: KVM, and its own disk.
const MODULES: [&str; 4] = ["kvm_amd", "virtio_pci", "virtio_blk", "ext4"];

/// The size of the work disk, which is sparse.
const DISK_SIZE: u64 = 8 << 30;

const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module || echo "cannot load $module"; done
mount -t ext4 /dev/vda /mnt
mount -t devtmpfs dev /mnt/dev
mount -t proc proc /mnt/proc
mount -t sysfs sys /mnt/sys
mount -t tmpfs tmp /mnt/tmp
# A guest may have more memory than this machine; it touches little of it.
echo 1 >/mnt/proc/sys/vm/overcommit_memory
taskset 6 chroot /mnt /payload
echo $? >/mnt/out/status
umount /mnt/* 2>/dev/null
umount /mnt
poweroff -f
"#;

/// What to run, and where.
pub struct Machine<'a> {
    lab: &'a Lab,
    directory: PathBuf,
    limit: Duration,
    interactive: bool,
}

impl<'a> Machine<'a> {
    /// A machine whose files are in `directory`, ended by force after `limit`.
    pub fn new(lab: &'a Lab, directory: impl Into<PathBuf>, limit: Duration) -> Self {
        Machine {
            lab,
            directory: directory.into(),
            limit,
            interactive: false,
        }
    }

    /// Connects this process's terminal to the machine's console, without a time limit.
    pub fn interactive(mut self) -> Self {
        self.interactive = stdin().is_terminal();
        self
    }

    /// Runs the shell script `payload` in the machine, its root file system made of `tree`, and
    /// returns its exit status.
    pub fn run(&self, mut tree: Tree, payload: &str) -> Result<i32> {
        fs::create_dir_all(&self.directory).context(format!("making {:?}", self.directory))?;
        // Held to the end: a second machine would write over this one's disk.
        let lock = fs::File::create(self.directory.join("lock")).context("making a lock file")?;
        lock.try_lock()
            .map_err(|e| Error::new(format!("another run uses {:?}: {e}", self.directory)))?;
        tree.busybox(self.lab)?
            .directory("/out")
            .script("/payload", payload);
        tree.ext4(&self.disk(), DISK_SIZE)?;
        let mut initrd = Tree::default();
        initrd
            .busybox(self.lab)?
            .modules(&self.lab.modules(&MODULES)?)
            .script("/init", INIT);
        fs::write(self.initrd(), initrd.cpio()?).context("writing the initrd")?;

        let mut qemu = self.qemu()?;
        let said = if self.interactive {
            qemu.status().context(process::shown(&qemu))?;
            String::new()
        } else {
            let ended = process::watch(qemu.stdin(Stdio::null()), self.limit, |piece, _| {
                process::echo(piece);
            })?;
            if ended.status.is_none() {
                let limit = self.limit.as_secs();
                return Err(Error::new(format!(
                    "the emulated machine ran for over {limit} s"
                )));
            }
            ended.output
        };
        let status = String::from_utf8_lossy(&self.read("/out/status")?)
            .trim()
            .to_owned();
        status.parse().map_err(|_| {
            let tail: Vec<_> = said.lines().rev().take(5).collect();
            Error::new(format!(
                "the emulated machine stopped without a result; it last said\n{}",
                tail.into_iter().rev().collect::<Vec<_>>().join("\n")
            ))
        })
    }

    /// A file of the work disk, after the machine has run; empty if there is no such file.
    pub fn read(&self, path: &str) -> Result<Vec<u8>> {
        stdout(
            command(find_program("debugfs".as_ref())?)
                .args(["-R", &format!("cat {path}")])
                .arg(self.disk()),
        )
    }

    /// Copies a directory of the work disk, after the machine has run, and returns the copy. It
    /// lies in `to`, which is made anew: `debugfs` does not write into what is there.
    pub fn copy_out(&self, from: &str, to: &Path) -> Result<PathBuf> {
        let _ = fs::remove_dir_all(to);
        fs::create_dir_all(to).context(format!("making {to:?}"))?;
        stdout(
            command(find_program("debugfs".as_ref())?)
                .args(["-R", &format!("rdump {from} {}", to.display())])
                .arg(self.disk()),
        )?;
        let copy = to.join(Path::new(from).file_name().unwrap_or_default());
        if !copy.exists() {
            return Err(Error::new(format!("debugfs did not copy {from} to {to:?}")));
        }
        Ok(copy)
    }

    fn disk(&self) -> PathBuf {
        self.directory.join("work.img")
    }

    fn initrd(&self) -> PathBuf {
        self.directory.join("initrd")
    }

    fn qemu(&self) -> Result<Command> {
        let mut qemu = Command::new(find_program("qemu-system-x86_64".as_ref())?);
        qemu.args([
            "-machine",
            "q35",
            "-accel",
            "tcg,thread=multi",
            "-cpu",
            "max",
        ])
        .args(["-smp", "3", "-m", "3072", "-no-reboot"])
        .args(["-nodefaults", "-display", "none"])
        .args([
            "-chardev",
            "stdio,id=console,signal=off",
            "-serial",
            "chardev:console",
        ])
        .arg("-kernel")
        .arg(self.lab.kernel(Kernel::BzImage))
        .arg("-initrd")
        .arg(self.initrd())
        .args([
            "-append",
            "console=ttyS0 loglevel=3 panic=1 reboot=t mitigations=off",
        ])
        .arg("-drive")
        .arg(format!(
            "if=none,id=work,format=raw,cache=unsafe,file={}",
            self.disk().display()
        ))
        .args(["-device", "virtio-blk-pci,drive=work"]);
        Ok(qemu)
    }
}
