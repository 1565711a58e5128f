//! Debian systems with their own kernels, initrds and root file systems, made by the commands of
//! `docs/guests.md`.

use std::fs;
use std::path::{Path, PathBuf};

use crate::error::{Context, Result};
use crate::lab::Lab;
use crate::page::{ROOT, steps};
use crate::process::{command, stdout};
use crate::tree::{Tree, find_program};

/// The page.
pub const PAGE: &str = include_str!("../../docs/guests.md");
/// What the commands leave.
const FILES: [&str; 3] = ["root.raw", "vmlinuz", "initrd.img"];

/// A system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct System {
    /// Debian's name of its release.
    pub suite: &'static str,
    /// The major version of its kernel.
    pub kernel: &'static str,
    /// Whether it has the kernel for any machine, and not the one for virtual machines.
    pub full: bool,
}

/// All of them.
pub const SYSTEMS: [System; 4] = [
    System::new("bookworm", "6.1.", false),
    System::new("trixie", "6.12.", false),
    System::new("bookworm", "6.1.", true),
    System::new("trixie", "6.12.", true),
];

impl System {
    const fn new(suite: &'static str, kernel: &'static str, full: bool) -> Self {
        Self {
            suite,
            kernel,
            full,
        }
    }

    /// Its name in the lab.
    pub fn name(&self) -> String {
        format!("{}{}", self.suite, if self.full { "_full" } else { "" })
    }

    /// One of its files: `root.raw`, `vmlinuz` or `initrd.img`.
    pub fn file(&self, lab: &Lab, name: &str) -> PathBuf {
        self.directory(lab.directory()).join(name)
    }

    fn directory(&self, lab: &Path) -> PathBuf {
        lab.join("stock").join(self.name())
    }

    /// Makes it, unless it has been made already. That takes root, Debian's mirror, and a minute.
    pub fn make(&self, lab: &Lab) -> Result<()> {
        let made = self.directory(lab.directory());
        if made.exists() {
            return Ok(());
        }
        println!("guest-suite: making a disk with Debian ({})", self.name());
        let part = made.with_extension("part");
        let _ = fs::remove_dir_all(&part);
        fs::create_dir_all(&part).context(format!("making {part:?}"))?;
        for step in steps(PAGE, "A disk with Debian", &[ROOT]) {
            let mut line = step
                .command
                .replace(" trixie ", &format!(" {} ", self.suite));
            if self.full {
                line = line.replace("linux-image-cloud-amd64", "linux-image-amd64");
            }
            if line.starts_with("apt-get install ") {
                if find_program("mmdebstrap".as_ref()).is_ok() {
                    continue;
                }
                line = line.replace("install", "install -q -y");
            }
            let mut shell = command("sh");
            shell.env("DEBIAN_FRONTEND", "noninteractive");
            // Where Debian has mke2fs, which is not in a user's PATH.
            shell.args(["-c", &format!("PATH=$PATH:/usr/sbin:/sbin; {line}")]);
            stdout(shell.current_dir(&part))?;
        }
        fs::rename(&part, &made).context(format!("naming {made:?}"))
    }

    /// Copies it to where the lab is in the emulated machine.
    pub fn copy_to(&self, tree: &mut Tree, lab: &Lab) {
        for name in FILES {
            let to = self.directory(Path::new("/lab")).join(name);
            tree.copy(to, self.file(lab, name));
        }
    }
}
