//! A directory of files that change with each input. `TMPDIR` tells where; it should be in memory.

use std::ffi::OsString;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

/// What the file outside of the directory of the images is full of.
pub const SECRET: u8 = 0xab;
/// As much as a disk has.
const SECRET_LEN: usize = 64 << 10;

/// A directory for images, and a file beside it that they are not to lead to.
pub struct Directory {
    root: TempDir,
}

impl Directory {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let directory = Self { root };
        fs::create_dir(directory.path("")).unwrap();
        fs::create_dir(directory.path("sub")).unwrap();
        symlink("../outside", directory.path("out")).unwrap();
        symlink("raw", directory.path("in")).unwrap();
        symlink("loop", directory.path("loop")).unwrap();
        let made = Command::new("mkfifo").arg(directory.path("pipe")).status();
        assert!(made.unwrap().success());
        directory.hide_secret();
        directory
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join("images").join(name)
    }

    pub fn argument(&self, name: &str) -> OsString {
        self.path(name).into()
    }

    pub fn outside(&self) -> PathBuf {
        self.root.path().join("outside")
    }

    pub fn write(&self, name: &str, bytes: &[u8]) {
        fs::write(self.path(name), bytes).unwrap();
    }

    pub fn hide_secret(&self) {
        fs::write(self.outside(), [SECRET; SECRET_LEN]).unwrap();
    }

    pub fn assert_secret_is_safe(&self) {
        let is_safe = fs::read(self.outside()).unwrap() == [SECRET; SECRET_LEN];
        assert!(is_safe, "the file outside has been changed");
    }
}

impl Default for Directory {
    fn default() -> Self {
        Self::new()
    }
}

/// Whether `bytes` come from the file outside.
pub fn is_secret(bytes: &[u8]) -> bool {
    bytes
        .windows(16)
        .any(|part| part.iter().all(|b| *b == SECRET))
}

/// The names that `image`, of version 3, is to have of other files, in place of all that follows its
/// header.
pub fn set_names(image: &mut [u8], backing: Option<(&Path, &[u8])>, data: Option<&Path>) {
    const FORMAT: u32 = 0xe279_2aca;
    const DATA: u32 = 0x4441_5441;
    const DATA_FILE_BIT: u8 = 4;
    let cluster = 1usize << image[23];
    let at = u32::from_be_bytes([image[100], image[101], image[102], image[103]]) as usize;
    let mut names = Vec::new();
    let mut extension = |kind: u32, content: &[u8]| {
        names.extend(kind.to_be_bytes());
        names.extend((content.len() as u32).to_be_bytes());
        names.extend(content);
        names.resize(names.len().next_multiple_of(8), 0);
    };
    if let Some((_, format)) = backing {
        extension(FORMAT, format);
    }
    if let Some(data) = data {
        extension(DATA, data.as_os_str().as_encoded_bytes());
    }
    extension(0, &[]);
    let backing = backing.map_or(&[][..], |(name, _)| name.as_os_str().as_encoded_bytes());
    let name_at = at + names.len();
    names.extend(backing);
    if at + names.len() > cluster || cluster > image.len() {
        return;
    }
    image[at..cluster].fill(0);
    image[at..at + names.len()].copy_from_slice(&names);
    let name_at = if backing.is_empty() {
        0
    } else {
        name_at as u64
    };
    image[8..16].copy_from_slice(&name_at.to_be_bytes());
    image[16..20].copy_from_slice(&(backing.len() as u32).to_be_bytes());
    image[79] &= !DATA_FILE_BIT;
    if data.is_some() {
        image[79] |= DATA_FILE_BIT;
    }
}
