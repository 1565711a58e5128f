//! A Linux guest under `tandem run`.
//!
//! Every guest boots the stock kernel and an initrd with busybox, `mke2fs`, `blkdiscard`, `fallocate`,
//! the virtio modules and `/seed`, a MiB of pseudo-random bytes. Its `/init` runs the shell script of the case with
//! `sh -e`, and powers off; or, if the script has made a file `/switch_root`, goes on with the root
//! file system on `/mnt`. A script reports by printing lines `@ KEY VALUE`.

use std::ffi::OsString;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use crate::error::{Context, Error, Result};
use crate::lab::{Kernel, Lab};
use crate::page::type_line;
use crate::process::{self, Ended, command};
use crate::suite::Bench;
use crate::tree::Tree;

/// How long a guest may take unless it is said; far more than any needs, even in the emulated machine.
const LIMIT: Duration = Duration::from_secs(300);

/// The modules that a guest needs for its disks: under `tandem run`, and under QEMU.
const MODULES: [&str; 4] = ["virtio_mmio", "virtio_pci", "virtio_blk", "ext4"];

const INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t tmpfs tmp /tmp
for module in /modules/*; do insmod $module || echo "cannot load $module"; done
sh -e /script
echo "@ script $?"
[ ! -e /switch_root ] || exec switch_root /mnt /sbin/init
poweroff -f
"#;

const ROOT_INIT: &str = r#"#!/bin/sh
export PATH=/bin
mount -t devtmpfs dev /dev
for module in /modules/*; do insmod $module || echo "cannot load $module"; done
mount -t ext4 /dev/vda /mnt
mount --move /dev /mnt/dev
exec switch_root /mnt /sbin/init
"#;

/// The initrd of all guests, without the script.
pub fn base_initrd(lab: &Lab) -> Result<Vec<u8>> {
    let mut tree = Tree::default();
    tree.busybox(lab)?
        .program("mke2fs")?
        // Those of busybox neither zero nor punch holes into devices.
        .program("blkdiscard")?
        .program("fallocate")?
        .modules(&lab.modules(&MODULES)?)
        .copy("/etc/mke2fs.conf", "/etc/mke2fs.conf")
        .file("/seed", seed())
        .script("/init", INIT);
    tree.cpio()
}

/// Size of the [`tools_disk`], which is sparse.
const TOOLS_SIZE: u64 = 256 << 20;

/// Where a script has the disk `$1` with what is too large for every guest's initrd: `fio`.
const TOOLS: &str = r#"
tools() {
    mkdir /tools
    mount -t ext4 -o ro,noload $1 /tools
    for here in dev proc sys tmp; do mount --bind /$here /tools/$here; done
}
"#;

/// Makes the file `image`, a root file system with `fio`, to be attached read-only.
pub fn tools_disk(image: &Path) -> Result<()> {
    let mut tree = Tree::default();
    for mount_point in ["/dev", "/proc", "/sys", "/tmp"] {
        tree.directory(mount_point);
    }
    tree.program("fio")?.ext4(image, TOOLS_SIZE)
}

/// How a script stops, and says where, until the suite lets it go on ([`Guest::steps`]).
const STEPS: &str = r#"
stty -echo </dev/console
step() {
    echo "@ step $*"
    read -r _ </dev/console
}
"#;

/// An initrd that goes on with the root file system on `/dev/vda`, and runs its `/sbin/init`.
pub fn root_initrd(lab: &Lab) -> Result<Vec<u8>> {
    let mut tree = Tree::default();
    tree.busybox(lab)?
        .modules(&lab.modules(&MODULES)?)
        .script("/init", ROOT_INIT);
    tree.cpio()
}

/// The bytes of `/seed`.
pub fn seed() -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let words = std::iter::repeat_with(|| {
        // xorshift64
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take((1 << 20) / 8).flatten().collect()
}

/// A guest to boot.
pub struct Guest<'a> {
    bench: &'a Bench,
    kernel: Kernel,
    cmdline: String,
    arguments: Vec<OsString>,
    limit: Duration,
}

/// How a guest ended, and what it said.
pub struct Boot {
    ended: Ended,
}

impl<'a> Guest<'a> {
    /// A guest with one vCPU, 256 MiB and no disk.
    pub fn new(bench: &'a Bench) -> Self {
        Guest {
            bench,
            kernel: Kernel::BzImage,
            cmdline: "quiet mitigations=off".into(),
            arguments: Vec::new(),
            limit: LIMIT,
        }
        .option("--memory", "256M")
    }

    /// Boots this kernel image instead of the bzImage.
    pub fn kernel(mut self, kernel: Kernel) -> Self {
        self.kernel = kernel;
        self
    }

    /// A further option of `tandem run`. The last of two values counts.
    pub fn option(mut self, name: &str, value: impl Into<OsString>) -> Self {
        let value = value.into();
        let given = self
            .arguments
            .iter()
            .position(|argument| argument.as_os_str() == name);
        match given {
            Some(at) if name != "--disk" => self.arguments[at + 1] = value,
            _ => self.arguments.extend([name.into(), value]),
        }
        self
    }

    /// How long it may take, in place of five minutes.
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// Attaches the [`tools_disk`] as the last disk; the script calls `tools /dev/vdX`, and then
    /// `chroot /tools fio`.
    pub fn tools(self) -> Self {
        let disk = self.bench.tools_disk();
        self.disk(&disk, ",format=raw,readonly=on,queues=1")
    }

    /// The number of vCPUs.
    pub fn cpus(self, cpus: usize) -> Self {
        self.option("--cpus", cpus.to_string())
    }

    /// The next disk; `keys` follows its path and is empty or begins with a comma.
    pub fn disk(self, path: &Path, keys: &str) -> Self {
        let mut value = path.as_os_str().to_owned();
        value.push(keys);
        self.option("--disk", value)
    }

    /// Further words for the kernel command line.
    pub fn cmdline(mut self, words: &str) -> Self {
        self.cmdline = format!("{} {words}", self.cmdline);
        self
    }

    /// Runs `script` in the guest until it powers off.
    pub fn boot(self, script: &str) -> Result<Boot> {
        self.watch(script, |_, _| ())
    }

    /// Like [`boot`](Guest::boot), and calls `watch` with all the console has shown whenever it
    /// shows more. The child's standard input is a pipe.
    pub fn watch(self, script: &str, watch: impl FnMut(&str, &mut Child)) -> Result<Boot> {
        let mut tandem = self.tandem(script)?;
        tandem.stdin(Stdio::piped());
        Boot::watch_for(self.bench, self.limit, tandem, watch)
    }

    /// Like [`boot`](Guest::boot), for a script that stops at each `step NAME`, until `act` has
    /// returned for that name.
    pub fn steps(
        self,
        script: &str,
        mut act: impl FnMut(&str, &mut Child) -> Result<()>,
    ) -> Result<Boot> {
        let mut taken = 0;
        let mut outcome = Ok(());
        let boot = self.watch(&format!("{STEPS}{script}"), |console, tandem| {
            while let Some(step) = values(console, "step").nth(taken) {
                taken += 1;
                let acted = act(step, tandem).and_then(|()| type_line(tandem, ""));
                if let Err(error) = acted {
                    outcome = Err(Error::new(format!("at step {step}: {error}")));
                    // It may have ended by itself.
                    let _ = tandem.kill();
                }
            }
        })?;
        outcome.map(|()| boot)
    }

    fn tandem(&self, script: &str) -> Result<Command> {
        let path = initrd(self.bench, script)?;
        let mut tandem = command(self.bench.tandem());
        tandem
            .args(["run", "--kernel"])
            .arg(self.bench.lab().kernel(self.kernel))
            .arg("--initrd")
            .arg(path)
            .args(["--cmdline", &self.cmdline])
            .args(&self.arguments);
        Ok(tandem)
    }
}

/// The initrd of a guest that runs `script`.
pub fn initrd(bench: &Bench, script: &str) -> Result<PathBuf> {
    let mut initrd = fs::read(bench.base_initrd()).context("reading the base initrd")?;
    let mut tree = Tree::default();
    tree.file("/script", format!("{TOOLS}{script}"));
    initrd.extend(tree.cpio()?);
    let path = bench.scratch("initrd");
    fs::write(&path, initrd).context("writing the initrd")?;
    Ok(path)
}

impl Boot {
    /// Runs `monitor`, which boots a guest with an [`initrd`], to its end. Calls `watch` with all the
    /// console has shown whenever it shows more.
    pub fn watch(
        bench: &Bench,
        monitor: Command,
        watch: impl FnMut(&str, &mut Child),
    ) -> Result<Self> {
        Self::watch_for(bench, LIMIT, monitor, watch)
    }

    fn watch_for(
        bench: &Bench,
        limit: Duration,
        mut monitor: Command,
        mut watch: impl FnMut(&str, &mut Child),
    ) -> Result<Self> {
        let mut shown = String::new();
        let ended = process::watch(&mut monitor, limit, |piece, child| {
            shown.push_str(&String::from_utf8_lossy(piece));
            watch(&shown, child);
        })?;
        bench.log(&format!("$ {}\n{}", process::shown(&monitor), ended.output));
        Ok(Self { ended })
    }

    /// The console, and what the monitor said on standard error.
    pub fn output(&self) -> &str {
        &self.ended.output
    }

    /// How the monitor ended. Panics if it had to be killed.
    pub fn status(&self) -> ExitStatus {
        self.ended
            .status
            .expect("the monitor did not end by itself in time")
    }

    /// Panics unless the script succeeded and the monitor ended with status 0.
    pub fn succeeded(self) -> Self {
        assert!(self.status().success(), "the monitor: {}", self.status());
        assert_eq!(
            self.value("script"),
            "0",
            "the status of the guest's script"
        );
        self
    }

    /// The value of the last line `@ KEY VALUE`. Panics if there is none.
    pub fn value(&self, key: &str) -> &str {
        self.values(key)
            .last()
            .unwrap_or_else(|| panic!("the guest printed no line \"@ {key} …\""))
    }

    /// The values of all lines `@ KEY VALUE`.
    pub fn values(&self, key: &str) -> impl Iterator<Item = &str> {
        values(&self.ended.output, key)
    }
}

/// The values of all complete lines `@ KEY VALUE` in what a console has shown.
pub fn values<'a>(console: &'a str, key: &str) -> impl Iterator<Item = &'a str> {
    let lines = console
        .split_inclusive('\n')
        .filter_map(|line| line.strip_suffix('\n'));
    lines.filter_map(move |line| {
        line.trim_end()
            .strip_prefix("@ ")?
            .strip_prefix(key)?
            .strip_prefix(' ')
    })
}

/// Whether this machine's `/dev/kvm` can run the stock kernel, found out by booting it for some
/// seconds; the reason if not.
pub fn probe(bench: &Bench) -> std::result::Result<(), String> {
    let kvm = Path::new("/dev/kvm");
    if let Err(error) = fs::OpenOptions::new().read(true).write(true).open(kvm) {
        return Err(format!("/dev/kvm cannot be opened: {error}"));
    }
    let guest = Guest::new(bench);
    let limit = Duration::from_secs(15);
    let mut tandem = guest
        .tandem("echo @ up yes")
        .map_err(|error| error.to_string())?;
    let ended = process::watch(&mut tandem, limit, |_, _| ()).map_err(|error| error.to_string())?;
    if values(&ended.output, "up").next().is_some() {
        return Ok(());
    }
    Err(match ended.status {
        None => format!("the stock kernel was not up after {} s", limit.as_secs()),
        Some(status) => format!(
            "the stock kernel does not boot on /dev/kvm ({status}; {})",
            ended.output.lines().last().unwrap_or("no message")
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_of_whole_lines() {
        let console = "noise\r\n@ sum abc\r\n@ summer no\n@ sum d e\r\n@ sum f";
        assert_eq!(values(console, "sum").collect::<Vec<_>>(), ["abc", "d e"]);
    }

    #[test]
    fn the_seed_does_not_repeat() {
        let seed = seed();
        assert_eq!(seed.len(), 1 << 20);
        let mut blocks: Vec<_> = seed.chunks(16).collect();
        blocks.sort_unstable();
        assert!(blocks.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
