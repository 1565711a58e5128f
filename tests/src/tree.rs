//! A file tree, written as an initrd (cpio) or as an ext4 file system.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use crate::error::{Context, Error, Result};
use crate::lab::{Lab, Module};
use crate::process::{command, run, stdout};

/// Files by their absolute path. Directories above a file are added with it; all belong to root.
#[derive(Default)]
pub struct Tree {
    // Sorted, so that a directory comes before what is in it.
    entries: BTreeMap<PathBuf, Entry>,
}

enum Entry {
    Directory,
    File { executable: bool, content: Content },
    Symlink(PathBuf),
}

enum Content {
    Bytes(Vec<u8>),
    Of(PathBuf),
}

impl Content {
    fn read(&self) -> Result<Vec<u8>> {
        match self {
            Content::Bytes(bytes) => Ok(bytes.clone()),
            Content::Of(path) => fs::read(path).context(format!("reading {path:?}")),
        }
    }
}

impl Tree {
    /// An empty directory.
    pub fn directory(&mut self, path: impl AsRef<Path>) -> &mut Self {
        let path = path.as_ref();
        assert!(path.is_absolute(), "{path:?} must be absolute");
        for ancestor in path
            .ancestors()
            .filter(|ancestor| ancestor.parent().is_some())
        {
            self.entries
                .entry(ancestor.into())
                .or_insert(Entry::Directory);
        }
        self
    }

    fn insert(&mut self, path: &Path, entry: Entry) -> &mut Self {
        if let Some(parent) = path.parent() {
            self.directory(parent);
        }
        self.entries.insert(path.into(), entry);
        self
    }

    /// A file with this content.
    pub fn file(&mut self, path: impl AsRef<Path>, content: impl Into<Vec<u8>>) -> &mut Self {
        let content = Content::Bytes(content.into());
        self.insert(
            path.as_ref(),
            Entry::File {
                executable: false,
                content,
            },
        )
    }

    /// An executable file with this content.
    pub fn script(&mut self, path: impl AsRef<Path>, content: &str) -> &mut Self {
        let content = Content::Bytes(content.into());
        self.insert(
            path.as_ref(),
            Entry::File {
                executable: true,
                content,
            },
        )
    }

    /// A copy of this machine's file `source`.
    pub fn copy(&mut self, path: impl AsRef<Path>, source: impl Into<PathBuf>) -> &mut Self {
        let content = Content::Of(source.into());
        self.insert(
            path.as_ref(),
            Entry::File {
                executable: true,
                content,
            },
        )
    }

    /// A symbolic link to `target`.
    pub fn symlink(&mut self, path: impl AsRef<Path>, target: impl Into<PathBuf>) -> &mut Self {
        self.insert(path.as_ref(), Entry::Symlink(target.into()))
    }

    /// Busybox in `/bin`, with a link for each of its applets that is not there as a program of its
    /// own, and the directories that an `init` mounts file systems on.
    pub fn busybox(&mut self, lab: &Lab) -> Result<&mut Self> {
        self.copy("/bin/busybox", lab.busybox());
        let applets = stdout(command(lab.busybox()).arg("--list"))?;
        for applet in String::from_utf8_lossy(&applets)
            .lines()
            .filter(|&name| name != "busybox")
        {
            let link = Entry::Symlink("busybox".into());
            self.entries
                .entry(format!("/bin/{applet}").into())
                .or_insert(link);
        }
        for mount_point in ["/dev", "/proc", "/sys", "/tmp", "/mnt"] {
            self.directory(mount_point);
        }
        Ok(self)
    }

    /// This machine's `program` (a path, or a name looked up in `PATH` and the `sbin`s) in `/bin`,
    /// and the shared libraries it is linked with.
    pub fn program(&mut self, program: impl AsRef<Path>) -> Result<&mut Self> {
        let path = find_program(program.as_ref())?;
        let name = path
            .file_name()
            .ok_or_else(|| Error::new(format!("{path:?} has no name")))?;
        self.copy(Path::new("/bin").join(name), &path);
        // ldd fails on a static program, which has nothing to add.
        let libraries = stdout(command("ldd").arg(&path)).unwrap_or_default();
        for line in String::from_utf8_lossy(&libraries).lines() {
            if let Some(library) = line.split_whitespace().find(|word| word.starts_with('/')) {
                self.copy(library, library);
            } else if line.contains("not found") {
                return Err(Error::new(format!("{path:?}: {}", line.trim())));
            }
        }
        Ok(self)
    }

    /// Modules in `/modules`, named so that their order is the one to load them in:
    /// `for m in /modules/*; do insmod $m; done`.
    pub fn modules(&mut self, modules: &[Module]) -> &mut Self {
        self.directory("/modules");
        for (index, module) in modules.iter().enumerate() {
            self.file(
                format!("/modules/{index:02}-{}.ko", module.name),
                module.image.clone(),
            );
        }
        self
    }

    /// The tree as a cpio archive in the "newc" format (the kernel's
    /// Documentation/driver-api/early-userspace/buffer-format.rst). Archives may be concatenated.
    pub fn cpio(&self) -> Result<Vec<u8>> {
        let mut archive = Vec::new();
        for (index, (path, entry)) in self.entries.iter().enumerate() {
            let name = path.strip_prefix("/").unwrap_or(path).to_string_lossy();
            let (mode, content) = match entry {
                Entry::Directory => (0o040_755, Vec::new()),
                Entry::File {
                    executable: false,
                    content,
                } => (0o100_644, content.read()?),
                Entry::File {
                    executable: true,
                    content,
                } => (0o100_755, content.read()?),
                Entry::Symlink(target) => (0o120_777, target.to_string_lossy().as_bytes().into()),
            };
            append_member(&mut archive, index as u32 + 1, mode, &name, &content);
        }
        append_member(&mut archive, 0, 0, "TRAILER!!!", &[]);
        Ok(archive)
    }

    /// The tree as files in the directory `root`, which is made.
    pub fn write_to(&self, root: &Path) -> Result<()> {
        fs::create_dir_all(root).context(format!("making {root:?}"))?;
        for (path, entry) in &self.entries {
            let to = root.join(path.strip_prefix("/").unwrap_or(path));
            let made = match entry {
                Entry::Directory => fs::create_dir_all(&to),
                Entry::Symlink(target) => symlink(target, &to),
                Entry::File {
                    executable,
                    content,
                } => {
                    let mode = if *executable { 0o755 } else { 0o644 };
                    match content {
                        Content::Bytes(bytes) => fs::write(&to, bytes),
                        // It leaves out the holes of a disk.
                        Content::Of(source) => {
                            run(command("cp").arg(source).arg(&to)).map_err(io::Error::other)
                        }
                    }
                    .and_then(|()| fs::set_permissions(&to, fs::Permissions::from_mode(mode)))
                }
            };
            made.context(format!("writing {to:?}"))?;
        }
        Ok(())
    }

    /// An ext4 file system with the tree in it, made in the file `image` of `size` bytes.
    pub fn ext4(&self, image: &Path, size: u64) -> Result<()> {
        let root = image.with_extension("tree");
        self.write_to(&root)?;
        let made = fs::File::create(image)
            .and_then(|file| file.set_len(size))
            .context(format!("making {image:?}"))
            .and_then(|()| {
                run(command(find_program("mke2fs".as_ref())?)
                    .args(["-q", "-F", "-t", "ext4", "-E", "root_owner=0:0", "-d"])
                    .args([&root, image]))
            });
        fs::remove_dir_all(&root).context(format!("removing {root:?}"))?;
        made
    }
}

/// One member: a header of thirteen eight-digit hexadecimal fields, the name with its NUL, and the
/// content, each padded to four bytes.
fn append_member(archive: &mut Vec<u8>, inode: u32, mode: u32, name: &str, content: &[u8]) {
    archive.extend_from_slice(b"070701");
    let (size, name_size) = (content.len() as u32, name.len() as u32 + 1);
    for field in [inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0] {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// Where `program` is; a bare name is looked up in `PATH` and in the `sbin`s, which Debian leaves
/// out of a user's `PATH`.
pub fn find_program(program: &Path) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(["/usr/sbin".into(), "/sbin".into()])
        .map(|directory| directory.join(program))
        .find(|candidate| candidate.is_file())
        .ok_or_else(|| Error::new(format!("{program:?} not found: run tests/setup")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cpio_members_are_aligned_and_in_order() {
        let mut tree = Tree::default();
        tree.script("/a/init", "abc").symlink("/a/b", "init");
        let archive = tree.cpio().unwrap();
        assert_eq!(archive.len() % 4, 0);
        let text = String::from_utf8_lossy(&archive);
        let at = |name: &str| text.find(name).unwrap();
        assert!(at("a\0") < at("a/b\0") && at("a/b\0") < at("a/init\0"));
        assert!(at("a/init\0") < at("TRAILER!!!\0"));
        // Mode, and size in the seventh field.
        let header = at("a/init\0") - 110;
        assert_eq!(&text[header + 14..header + 22], "000081ed");
        assert_eq!(&text[header + 54..header + 62], "00000003");
    }

    #[test]
    fn a_program_brings_its_libraries() {
        let mut tree = Tree::default();
        tree.program("mke2fs").unwrap();
        let paths: Vec<_> = tree
            .entries
            .keys()
            .map(|path| path.display().to_string())
            .collect();
        assert!(paths.iter().any(|path| path == "/bin/mke2fs"), "{paths:?}");
        assert!(
            paths.iter().any(|path| path.contains("libext2fs.so")),
            "{paths:?}"
        );
        assert!(
            paths.iter().any(|path| path.contains("ld-linux")),
            "{paths:?}"
        );
    }
}
