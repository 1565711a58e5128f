//! Making a file anew without losing the old one to a failure.

mod names;

use std::fs::{File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{
    FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, fchown,
};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use rustix::io::Errno;

use self::names::{Placed, create_unnamed, exchange, link_beside, replace, sync_content};
pub(crate) use self::names::{create_temporary, directory_of, sync_directory};
use crate::hints::FileHints;
use crate::lock::{self, Access, Locking};
use crate::preallocation::Preallocation;
use crate::{Error, FileStorage, Result};

/// Zeros are written in pieces of this many bytes.
const ZEROS: usize = 1 << 20;

/// At least the first block of any file system.
const FIRST_BLOCK: u64 = 4096;

/// A file in the making.
///
/// A regular file has no name while it grows, and takes its own, and the place of a file that is
/// there already, in [`commit`](NewFile::commit). If it is dropped before, or the process ends,
/// the directory is as it was. A block device is written in place.
///
/// Both files are locked until this is dropped. To replace a file that another program has open
/// would let it go on with one that nobody finds any more, so only a file that nobody uses is
/// replaced, and only the one that is locked.
#[derive(Debug)]
pub(crate) struct NewFile {
    /// The name that was asked for, for messages.
    name: PathBuf,
    /// Where the file goes: `name` with symbolic links resolved.
    target: PathBuf,
    file: File,
    /// The regular file that is there already.
    old: Option<File>,
    kind: Kind,
    /// Whether the locks of the file are somebody else's to give up.
    is_handed_over: bool,
}

#[derive(Debug, PartialEq, Eq)]
enum Kind {
    Regular {
        /// A name in the directory of the target that goes when this is dropped: the new file's
        /// until it is placed, then the one it has replaced.
        temporary: Option<PathBuf>,
        placed: Placed,
    },
    BlockDevice {
        size: u64,
        clear_start: bool,
    },
}

impl Kind {
    fn regular(temporary: Option<PathBuf>) -> Self {
        Self::Regular {
            temporary,
            placed: Placed::No,
        }
    }
}

impl NewFile {
    /// Starts to make the file `name`.
    ///
    /// # Errors
    /// [`Error::Io`] if the file could not be created, or exists and may not be written;
    /// [`Error::Locked`] if another program uses it.
    pub fn begin(name: &Path) -> Result<Self> {
        let new = Self::begin_io(name).map_err(|e| Error::io(name, "create", e))?;
        for file in new.old.iter().chain([&new.file]) {
            lock::acquire(file, name, Access::Replace, Locking::On)?;
        }
        Ok(new)
    }

    fn begin_io(name: &Path) -> io::Result<Self> {
        let old = match OpenOptions::new()
            .read(true)
            .write(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(name)
        {
            Ok(file) => Some(file),
            // A link must not be replaced by a file: whoever made it wants the file elsewhere.
            Err(e) if e.kind() == io::ErrorKind::NotFound && name.is_symlink() => {
                let text = "it is a symbolic link to a file that does not exist";
                return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
            }
            Err(e) if e.kind() == io::ErrorKind::NotFound => None,
            Err(e) => return Err(e),
        };
        let Some(old) = old else {
            let (file, temporary) = create_unnamed(name, 0o644)?;
            return Ok(Self {
                name: name.to_owned(),
                target: name.to_owned(),
                file,
                old: None,
                kind: Kind::regular(temporary),
                is_handed_over: false,
            });
        };
        let target = name.canonicalize()?;
        let metadata = old.metadata()?;
        if metadata.file_type().is_block_device() {
            let size = rustix::fs::seek(&old, rustix::fs::SeekFrom::End(0))?;
            return Ok(Self {
                name: name.to_owned(),
                target,
                file: old,
                old: None,
                kind: Kind::BlockDevice {
                    size,
                    clear_start: false,
                },
                is_handed_over: false,
            });
        }
        if !metadata.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "it exists and is neither a regular file nor a block device",
            ));
        }
        let (file, temporary) = create_unnamed(&target, 0o600)?;
        let new = Self {
            name: name.to_owned(),
            target,
            file,
            old: Some(old),
            kind: Kind::regular(temporary),
            is_handed_over: false,
        };
        keep_access(&new.file, &metadata)?;
        Ok(new)
    }

    /// Tells the file system what is known of the file, which is empty; what it does not want to
    /// know is told to `warn`.
    pub fn hint(&self, hints: FileHints, warn: &mut dyn FnMut(String)) {
        if let Kind::Regular { .. } = self.kind {
            hints.apply(&self.file, warn);
        }
    }

    /// The file, for positioned writes.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// The name that was asked for.
    pub fn name(&self) -> &Path {
        &self.name
    }

    /// Whether there is something of that name already, which it replaces or writes to.
    pub fn exists(&self) -> bool {
        self.old.is_some() || !self.is_regular()
    }

    /// Whether it is no block device, and so reads as zero where nothing has been written.
    pub fn is_regular(&self) -> bool {
        matches!(self.kind, Kind::Regular { .. })
    }

    /// The file for a disk that is filled before it is committed.
    pub fn storage(&mut self) -> Result<FileStorage> {
        self.clear_start()?;
        if let Kind::BlockDevice { clear_start, .. } = &mut self.kind {
            *clear_start = false;
        }
        let storage = self.file.try_clone().and_then(FileStorage::new);
        self.io("open", storage)
    }

    /// Makes it a file of `len` bytes that reads as zero, for metadata.
    pub fn zeroed(&self, len: u64) -> Result<()> {
        match self.kind {
            Kind::Regular { .. } => self.io("resize", self.file.set_len(len)),
            Kind::BlockDevice { size, .. } => {
                Self::check_device(len, size, Preallocation::Off)?;
                self.io("write", write_zeros(&self.file, 0, len))
            }
        }
    }

    /// Makes it a file of `len` bytes for a guest's data.
    ///
    /// On a block device only the first sector is cleared, so that nothing takes it for what it
    /// held before, and that only in [`commit`](NewFile::commit).
    pub fn with_data(&mut self, len: u64, preallocation: Preallocation) -> Result<()> {
        if let Kind::BlockDevice { size, clear_start } = &mut self.kind {
            *clear_start = true;
            return Self::check_device(len, *size, preallocation);
        }
        if preallocation == Preallocation::Off {
            return self.io("resize", make_data(&self.file, len));
        }
        self.io("resize", self.file.set_len(len))?;
        self.preallocate(0, len, preallocation)
    }

    /// Gives space to a range within the file.
    pub fn preallocate(&self, offset: u64, len: u64, preallocation: Preallocation) -> Result<()> {
        let done = match preallocation {
            _ if len == 0 => Ok(()),
            Preallocation::Off | Preallocation::Metadata => Ok(()),
            Preallocation::Falloc => {
                let result = rustix::io::retry_on_intr(|| {
                    rustix::fs::fallocate(&self.file, FallocateFlags::empty(), offset, len)
                });
                match result {
                    Err(Errno::OPNOTSUPP) => write_zeros(&self.file, offset, len),
                    other => other.map_err(io::Error::from),
                }
            }
            Preallocation::Full => write_zeros(&self.file, offset, len),
        };
        self.io("preallocate", done)
    }

    /// Puts the files, durable, in their places: all of them or, on an error, none. (On a file
    /// system that cannot exchange two names, an error after a file has been replaced cannot bring
    /// back the old one.)
    pub fn commit(mut files: Vec<Self>) -> Result<()> {
        // What needs space comes first, block devices, which keep nothing, come last.
        for file in &mut files {
            file.io("sync", sync_content(&file.file))?;
            let named = file.name_temporarily();
            file.io("name", named)?;
        }
        let placed = files
            .iter_mut()
            .try_for_each(Self::place)
            .and_then(|()| files.iter().try_for_each(Self::sync_directory))
            .and_then(|()| files.iter().try_for_each(Self::clear_start));
        if placed.is_err() {
            files.iter_mut().for_each(Self::take_back);
        }
        placed
    }

    /// Gives the files, none of which replaces another one, their names: all of them or, on an error,
    /// none. Nothing is made durable, and their locks stay for whoever has the files open.
    pub fn hand_over(mut files: Vec<Self>) -> Result<()> {
        let placed = files.iter_mut().try_for_each(|file| {
            let named = file.name_temporarily();
            file.io("name", named)?;
            file.place()
        });
        if placed.is_err() {
            files.iter_mut().for_each(Self::take_back);
        }
        for file in &mut files {
            file.is_handed_over = placed.is_ok();
        }
        placed
    }

    fn name_temporarily(&mut self) -> io::Result<()> {
        if let Kind::Regular { temporary, .. } = &mut self.kind
            && temporary.is_none()
        {
            *temporary = Some(link_beside(&self.file, &self.target)?);
        }
        Ok(())
    }

    fn place(&mut self) -> Result<()> {
        if let Kind::Regular { temporary, placed } = &mut self.kind
            && let Some(named) = temporary
        {
            let done = replace(named, &self.target, self.old.as_ref());
            *placed = done.map_err(|e| Error::io(&self.name, "replace", e))?;
            if *placed != Placed::Exchanged {
                *temporary = None;
            }
        }
        Ok(())
    }

    /// Undoes [`place`](Self::place) as far as possible.
    fn take_back(&mut self) {
        let Kind::Regular { temporary, placed } = &mut self.kind else {
            return;
        };
        match (*placed, &temporary) {
            (Placed::Added, _) => {
                let _ = std::fs::remove_file(&self.target);
            }
            // If it fails, the old file must at least not be removed.
            (Placed::Exchanged, Some(old)) if exchange(old, &self.target).is_err() => {
                *temporary = None;
            }
            _ => {}
        }
    }

    fn sync_directory(&self) -> Result<()> {
        if let Kind::BlockDevice { .. } = self.kind {
            return Ok(());
        }
        let directory = File::open(directory_of(&self.target));
        let synced = directory.and_then(|directory| sync_directory(&directory));
        self.io("sync the directory of", synced)
    }

    fn clear_start(&self) -> Result<()> {
        let Kind::BlockDevice {
            clear_start: true, ..
        } = self.kind
        else {
            return Ok(());
        };
        let cleared = self
            .file
            .write_all_at(&[0; 512], 0)
            .and_then(|()| self.file.sync_all());
        self.io("clear the start of", cleared)
    }

    fn check_device(len: u64, size: u64, preallocation: Preallocation) -> Result<()> {
        if matches!(preallocation, Preallocation::Falloc | Preallocation::Full) {
            return Err(Error::Option(
                "Preallocation of a block device is not supported; it has its space already"
                    .to_owned(),
            ));
        }
        if len > size {
            return Err(Error::Option(
                "Could not resize image: Cannot grow device files".to_owned(),
            ));
        }
        Ok(())
    }

    fn io<T>(&self, action: &'static str, result: io::Result<T>) -> Result<T> {
        result.map_err(|e| Error::io(&self.name, action, e))
    }
}

impl Drop for NewFile {
    fn drop(&mut self) {
        if let Kind::Regular {
            temporary: Some(temporary),
            ..
        } = &self.kind
        {
            let _ = std::fs::remove_file(temporary);
        }
        let own = Some(&self.file).filter(|_| !self.is_handed_over);
        self.old.iter().chain(own).for_each(lock::release);
    }
}

/// Lets those use the new file who may use the old one, as far as this process may decide it.
fn keep_access(file: &File, old: &Metadata) -> io::Result<()> {
    // Only root can give a file away, but whoever is in the group can leave it to that.
    let group = Some(old.gid());
    let keeps_group =
        fchown(file, Some(old.uid()), group).is_ok() || fchown(file, None, group).is_ok();
    // What the old group may do is no concern of another one.
    let mask = if keeps_group { 0o777 } else { 0o707 };
    file.set_permissions(Permissions::from_mode(old.mode() & mask))
}

/// Makes an empty file one of `len` bytes for a guest's data, without space for it.
pub(crate) fn make_data(file: &File, len: u64) -> io::Result<()> {
    file.set_len(len)?;
    // How direct I/O must be aligned can be found out only where there is a block.
    write_zeros(file, 0, len.min(FIRST_BLOCK))
}

fn write_zeros(file: &File, mut offset: u64, len: u64) -> io::Result<()> {
    let zeros = vec![0; ZEROS.min(usize::try_from(len).unwrap_or(ZEROS))];
    let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
    while offset < end {
        let n = (end - offset).min(zeros.len() as u64);
        file.write_all_at(&zeros[..n as usize], offset)?;
        offset += n;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::names::create_beside;
    use super::*;
    use std::fs;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_link_to_nowhere_stays() {
        let dir = tempfile::tempdir().unwrap();
        let link = dir.path().join("link");
        std::os::unix::fs::symlink("nowhere", &link).unwrap();
        let message = NewFile::begin(&link).unwrap_err().to_string();
        assert!(message.contains("symbolic link"), "{message}");
        assert!(link.is_symlink());
    }

    #[test]
    fn takes_its_place_only_when_committed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let names = || fs::read_dir(dir.path()).unwrap().count();

        let mut new = NewFile::begin(&path).unwrap();
        new.with_data(1000, Preallocation::Off).unwrap();
        assert_eq!(names(), 0);
        drop(new);
        assert_eq!(names(), 0);

        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o640)).unwrap();
        let mut new = NewFile::begin(&path).unwrap();
        new.with_data(1000, Preallocation::Full).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"old");
        NewFile::commit(vec![new]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), [0; 1000]);
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o640);
        assert_eq!(names(), 1);
    }

    #[test]
    fn works_without_unnamed_files() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        let create = |path: &Path| File::create_new(path);
        for commit in [false, true] {
            let (file, temporary) = create_beside(&path, create).unwrap();
            let new = NewFile {
                name: path.clone(),
                target: path.clone(),
                file,
                old: None,
                kind: Kind::regular(Some(temporary)),
                is_handed_over: false,
            };
            if commit {
                NewFile::commit(vec![new]).unwrap();
            } else {
                drop(new);
            }
            assert_eq!(path.exists(), commit);
            assert_eq!(
                fs::read_dir(dir.path()).unwrap().count(),
                usize::from(commit)
            );
        }
    }

    /// The second of two files cannot get its temporary name, or loses it before it is placed.
    #[test]
    fn a_failure_leaves_every_place_as_it_was() {
        for old in [None, Some("old")] {
            for named in [false, true] {
                let dir = tempfile::tempdir().unwrap();
                let (first, sub) = (dir.path().join("first"), dir.path().join("sub"));
                if let Some(old) = old {
                    fs::write(&first, old).unwrap();
                }
                fs::create_dir(&sub).unwrap();
                let mut files = vec![
                    NewFile::begin(&first).unwrap(),
                    NewFile::begin(&sub.join("second")).unwrap(),
                ];
                if named {
                    files[1].kind = Kind::regular(Some(sub.join("gone")));
                }
                fs::remove_dir(&sub).unwrap();
                let error = NewFile::commit(files).unwrap_err().to_string();
                let action = if named { "replace" } else { "name" };
                assert!(error.contains(action), "{error}");
                assert_eq!(fs::read_to_string(&first).ok().as_deref(), old);
                let names = fs::read_dir(dir.path()).unwrap().count();
                assert_eq!(names, old.iter().count());
            }
        }
    }

    #[test]
    fn only_the_file_that_was_there_is_replaced() {
        for old in [None, Some("old")] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("disk");
            if let Some(old) = old {
                fs::write(&path, old).unwrap();
            }
            let new = NewFile::begin(&path).unwrap();
            let other = dir.path().join("other");
            fs::write(&other, "other").unwrap();
            fs::rename(&other, &path).unwrap();
            let error = NewFile::commit(vec![new]).unwrap_err().to_string();
            assert!(error.contains("replace"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), b"other");
            assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        }
    }

    #[test]
    fn a_file_in_use_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, "old").unwrap();
        for access in [Access::Read, Access::Write, Access::WriteRaw] {
            let options = crate::FileOptions::default();
            let user = crate::file::ImageFile::open(&path, access, options).unwrap();
            assert!(matches!(NewFile::begin(&path), Err(Error::Locked { .. })));
            drop(user);
            let first = NewFile::begin(&path).unwrap();
            assert!(matches!(NewFile::begin(&path), Err(Error::Locked { .. })));
            drop(first);
        }
        assert_eq!(fs::read(&path).unwrap(), b"old");
    }

    #[test]
    fn symbolic_links_stay() {
        let dir = tempfile::tempdir().unwrap();
        let (path, link) = (dir.path().join("disk"), dir.path().join("link"));
        fs::write(&path, "old").unwrap();
        symlink("disk", &link).unwrap();
        NewFile::commit(vec![NewFile::begin(&link).unwrap()]).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"");
        assert!(link.is_symlink());
    }

    #[test]
    fn refuses_what_cannot_become_a_disk() {
        let dir = tempfile::tempdir().unwrap();
        let missing = dir.path().join("no/disk");
        for path in [
            Path::new(""),
            Path::new("/"),
            dir.path(),
            &missing,
            Path::new("/dev/null"),
        ] {
            assert!(NewFile::begin(path).is_err(), "{}", path.display());
        }
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
