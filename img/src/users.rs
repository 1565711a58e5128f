//! Who has a file open, as `/proc` tells.

use std::collections::BTreeMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use serde_json::{Value, json};

/// The access mode in the flags of an open file.
const ACCESS_MODE: u32 = 0o3;
/// A descriptor that only stands for a file.
const PATH_ONLY: u32 = 0o10_000_000;
/// The kernel's own process, from which its threads come.
const KERNEL: u32 = 2;

/// The processes that have a file open, but for this one.
pub struct Users {
    /// By their IDs.
    found: BTreeMap<u32, User>,
    /// How many processes cannot be looked into.
    unseen: usize,
}

struct User {
    command: String,
    writes: bool,
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

impl Users {
    /// Those who have the file open that `metadata` is of.
    pub fn of(metadata: &Metadata) -> Self {
        let mut users = Self {
            found: BTreeMap::new(),
            unseen: 0,
        };
        let id = Id::of(metadata);
        // Without `/proc`, nobody can be seen.
        for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
            let pid = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok());
            if let Some(pid) = pid.filter(|pid| *pid != std::process::id()) {
                users.look_into(pid, &entry.path(), &id);
            }
        }
        users
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
        for descriptor in descriptors.flatten() {
            let metadata = fs::metadata(descriptor.path());
            if !metadata.is_ok_and(|metadata| Id::of(&metadata) == *id) {
                continue;
            }
            let info = directory.join("fdinfo").join(descriptor.file_name());
            let Some(flags) = flags(&fs::read_to_string(info).unwrap_or_default()) else {
                continue;
            };
            if flags & PATH_ONLY == 0 {
                let user = self.found.entry(pid).or_insert_with(|| User {
                    command: command(directory),
                    writes: false,
                });
                user.writes |= flags & ACCESS_MODE != 0;
            }
        }
    }

    /// Lines for people.
    pub fn human(&self) -> String {
        let mut text = "users:\n".to_owned();
        for (pid, user) in &self.found {
            let (command, access) = (user.command.escape_debug(), user.access());
            text += &format!("    process {pid} ({command}): {access}\n");
        }
        match (self.unseen, self.found.len()) {
            (0, 0) => text += "    none\n",
            (0, _) => {}
            (unseen, _) => {
                text += &format!(
                    "    {unseen} other processes cannot be looked into (as root they can)\n"
                );
            }
        }
        text
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        let found = self.found.iter().map(
            |(pid, user)| json!({ "pid": pid, "command": user.command, "access": user.access() }),
        );
        json!({ "processes": found.collect::<Vec<_>>(), "unseen": self.unseen })
    }
}

impl User {
    fn access(&self) -> &'static str {
        if self.writes { "write" } else { "read" }
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
    fn what_cannot_be_seen_is_told() {
        let user = |writes| User {
            command: "a\nb".into(),
            writes,
        };
        let users = |found: &[bool], unseen| Users {
            found: (7..)
                .zip(found.iter().map(|writes| user(*writes)))
                .collect(),
            unseen,
        };
        assert_eq!(users(&[], 0).human(), "users:\n    none\n");
        let text = users(&[true, false], 3).human();
        assert_eq!(
            text,
            "users:\n    process 7 (a\\nb): write\n    process 8 (a\\nb): read\n    \
             3 other processes cannot be looked into (as root they can)\n"
        );
        let json = users(&[false], 3).json();
        let expected = json!({
            "processes": [{ "pid": 7, "command": "a\nb", "access": "read" }],
            "unseen": 3,
        });
        assert_eq!(json, expected);
    }
}
