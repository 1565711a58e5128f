//! Who has a file open, as `/proc` tells.

use std::fmt;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

/// The access mode in the flags of an open file.
const ACCESS_MODE: u32 = 0o3;
/// A descriptor that only stands for a file.
const PATH_ONLY: u32 = 0o10_000_000;
/// The kernel's own process, from which its threads come.
const KERNEL: u32 = 2;

/// The processes that have a file open.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct FileUsers {
    /// Those that can be seen, by their IDs.
    pub found: Vec<FileUser>,
    /// How many processes cannot be looked into.
    pub unseen: usize,
}

/// A process that has a file open.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileUser {
    /// Its ID.
    pub pid: u32,
    /// The name of its program.
    pub command: String,
    /// Whether it may write to the file.
    pub writes: bool,
    /// Whether it has a lock on the file, of any kind.
    pub has_lock: bool,
}

/// What tells a file, or a block device whatever its name is.
#[derive(PartialEq, Eq)]
enum Id {
    File(u64, u64),
    Device(u64),
}

impl Id {
    fn of(metadata: &Metadata) -> Self {
        if metadata.file_type().is_block_device() {
            Self::Device(metadata.rdev())
        } else {
            Self::File(metadata.dev(), metadata.ino())
        }
    }
}

impl FileUsers {
    /// Those who have the file open that `metadata` is of, this process among them.
    pub fn of(metadata: &Metadata) -> Self {
        let mut users = Self::default();
        let id = Id::of(metadata);
        // Without `/proc`, nobody can be seen.
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let Some(pid) = pid {
                users.look_into(pid, &entry.path(), &id);
            }
        }
        users.found.sort_by_key(|user| user.pid);
        users
    }

    /// Those who have a lock on the file, in words; `None` if nobody can be seen.
    pub fn lock_holders(&self) -> Option<String> {
        let holders = self.found.iter().filter(|user| user.has_lock);
        let holders: Vec<_> = holders.map(ToString::to_string).collect();
        (!holders.is_empty()).then(|| holders.join(", "))
    }

    /// Looks what the process `pid` has open. One that ends meanwhile has nothing.
    fn look_into(&mut self, pid: u32, directory: &Path, id: &Id) {
        let descriptors = match fs::read_dir(directory.join("fd")) {
            Ok(descriptors) => descriptors,
            Err(e) => {
                let is_hidden = e.kind() == io::ErrorKind::PermissionDenied;
                self.unseen += usize::from(is_hidden && !is_kernels(pid, directory));
                return;
            }
        };
        let mut user: Option<FileUser> = None;
        for descriptor in descriptors.flatten() {
            let metadata = fs::metadata(descriptor.path());
            if !metadata.is_ok_and(|metadata| Id::of(&metadata) == *id) {
                continue;
            }
            let info = directory.join("fdinfo").join(descriptor.file_name());
            let info = fs::read_to_string(info).unwrap_or_default();
            let Some(flags) = flags(&info) else {
                continue;
            };
            if flags & PATH_ONLY == 0 {
                let user = user.get_or_insert_with(|| FileUser {
                    pid,
                    command: command(directory),
                    writes: false,
                    has_lock: false,
                });
                user.writes |= flags & ACCESS_MODE != 0;
                user.has_lock |= info.lines().any(|line| line.starts_with("lock:"));
            }
        }
        self.found.extend(user);
    }
}

/// As in `process 7 (qemu-io)`.
impl fmt::Display for FileUser {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let command = self.command.escape_debug();
        write!(f, "process {} ({command})", self.pid)
    }
}

/// The flags that the content of an `fdinfo` file tells.
fn flags(info: &str) -> Option<u32> {
    let flags = info.lines().find_map(|line| line.strip_prefix("flags:"))?;
    u32::from_str_radix(flags.trim(), 8).ok()
}

fn command(directory: &Path) -> String {
    let command = fs::read(directory.join("comm")).unwrap_or_default();
    String::from_utf8_lossy(&command).trim_end().to_owned()
}

/// Whether it is a thread of the kernel, which has no files.
fn is_kernels(pid: u32, directory: &Path) -> bool {
    let status = fs::read_to_string(directory.join("status")).unwrap_or_default();
    let parent = status.lines().find_map(|line| line.strip_prefix("PPid:"));
    let parent = parent.and_then(|parent| parent.trim().parse().ok());
    pid == KERNEL || parent == Some(KERNEL)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FileOptions, Raw};

    #[test]
    fn flags_of_open_files() {
        assert_eq!(
            flags("pos:\t0\nflags:\t0100002\nmnt_id:\t7\n"),
            Some(0o100_002)
        );
        assert_eq!(flags("pos:\t0\n"), None);
        assert_eq!(flags("flags:\t9\n"), None);
    }

    #[test]
    fn who_has_a_lock_is_told() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let users = || FileUsers::of(&file.as_file().metadata().unwrap());
        let this = |users: FileUsers| {
            let mut found = users.found.into_iter();
            found.find(|user| user.pid == std::process::id()).unwrap()
        };
        let before = users();
        assert_eq!(before.lock_holders(), None);
        let before = this(before);
        assert!(before.writes && !before.has_lock);
        let disk = Raw::open_with(file.path(), false, FileOptions::default()).unwrap();
        assert!(this(users()).has_lock);
        let holders = users().lock_holders().unwrap();
        let process = format!("process {} (", std::process::id());
        assert!(holders.starts_with(&process), "{holders}");
        drop(disk);
        assert_eq!(users().lock_holders(), None);
    }
}
