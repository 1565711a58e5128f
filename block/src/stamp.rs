//! What tells that the files of a disk have been written since somebody looked: stamps.
//!
//! An overlay reads as garbage once what it lies on has changed. It can keep the stamp that its base
//! had, and see when it is opened whether that is still so. A write by any program changes the time of
//! a file; to open, lock, read or check one does not. What only copies a file gives the copy another
//! time.

use std::fmt;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use crate::live::ImageRef;
use crate::{Disk, Result};

/// Longest time between two ticks of the clock that file systems take their times from.
const TICK: Duration = Duration::from_millis(10);

/// What a disk and its files are like.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Stamp {
    /// Size of the disk in bytes.
    pub size: u64,
    /// Its files, and those of the disks below it: from the top down, an image before its data file.
    pub files: Vec<FileStamp>,
}

/// What a file is like.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileStamp {
    /// Its path, as it was opened; empty in a stamp that an image keeps.
    pub path: PathBuf,
    /// Length in bytes.
    pub len: u64,
    /// When it was written last; `None` for a block device, for which no system keeps that.
    pub modified: Option<Modified>,
}

/// A time, as file systems tell it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Modified {
    /// Seconds since 1970 (UTC).
    pub seconds: i64,
    /// Nanoseconds after that, less than a second.
    pub nanoseconds: u32,
}

impl Stamp {
    /// The stamp of `disk`, such that any later write makes another one; `None` if it cannot be told. It is
    /// durable, so that what keeps it is not refused after a failure of power.
    ///
    /// Writes within one tick of the clock, of some milliseconds, leave the same time. So a disk that
    /// has been written just now is waited for.
    ///
    /// # Errors
    /// [`Error::Io`](crate::Error::Io).
    pub fn of(disk: &dyn Disk) -> Result<Option<Self>> {
        Self::sync(disk)?;
        Self::settled(disk)
    }

    /// Makes the stamp of `disk` durable.
    pub(crate) fn sync(disk: &dyn Disk) -> Result<()> {
        disk.as_image().map_or(Ok(()), ImageRef::sync_stamps)
    }

    /// As [`of`](Self::of), but not durable.
    pub(crate) fn settled(disk: &dyn Disk) -> Result<Option<Self>> {
        let stamp = disk.stamp()?;
        let is_of_now = |stamp: &Self| stamp.files.iter().any(FileStamp::is_of_now);
        while stamp.as_ref().is_some_and(is_of_now) {
            sleep(TICK / 10);
        }
        Ok(stamp)
    }

    /// What has changed of the disk that had this stamp, if its stamp is `now`; `None` if nothing has.
    pub fn difference(&self, now: &Self) -> Option<String> {
        if self.size != now.size {
            let (now, then) = (now.size, self.size);
            return Some(format!("its size is {now} bytes, and was {then}"));
        }
        if self.files.len() != now.files.len() {
            let (now, then) = (now.files.len(), self.files.len());
            return Some(format!(
                "it lies in {now} files, with what is below it, and lay in {then}"
            ));
        }
        let mut pairs = self.files.iter().zip(&now.files);
        pairs.find_map(|(then, now)| then.difference(now))
    }
}

impl FileStamp {
    fn is_of_now(&self) -> bool {
        let Some(modified) = self.modified else {
            return false;
        };
        let since = SystemTime::now().duration_since(UNIX_EPOCH);
        let then = u64::try_from(modified.seconds).map(|s| Duration::new(s, modified.nanoseconds));
        match (since, then) {
            // A time in the future is not waited for.
            (Ok(now), Ok(then)) => now.checked_sub(then).is_some_and(|age| age < TICK),
            _ => false,
        }
    }

    fn difference(&self, now: &Self) -> Option<String> {
        let path = now.path.display();
        if self.len != now.len {
            let (now, then) = (now.len, self.len);
            return Some(format!("'{path}' has {now} bytes, and had {then}"));
        }
        match (self.modified, now.modified) {
            (then, now) if then == now => None,
            (Some(then), Some(now)) => Some(format!(
                "'{path}' was written at {now}, and last at {then} then, in seconds since 1970"
            )),
            _ => Some(format!("'{path}' is another kind of file than it was")),
        }
    }
}

impl fmt::Display for Modified {
    /// As `stat -c %.9Y` does.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:09}", self.seconds, self.nanoseconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Raw;
    use std::fs::{self, File};

    #[test]
    fn any_write_makes_another_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, [0; 1024]).unwrap();
        let disk = Raw::open(&path, true).unwrap();
        for len in [1024, 1024, 2048] {
            // Right after the write before.
            let stamp = Stamp::of(&disk).unwrap().unwrap();
            assert!(!stamp.files[0].is_of_now());
            assert_eq!(stamp.difference(&disk.stamp().unwrap().unwrap()), None);
            fs::write(&path, vec![0; len]).unwrap();
            let now = Raw::open(&path, true).unwrap().stamp().unwrap().unwrap();
            assert!(stamp.difference(&now).is_some(), "{stamp:?}, {now:?}");
        }
    }

    #[test]
    fn to_look_changes_no_stamp() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("disk");
        fs::write(&path, [7; 1024]).unwrap();
        let modified = UNIX_EPOCH + Duration::new(1 << 30, 123_456_789);
        File::options()
            .write(true)
            .open(&path)
            .unwrap()
            .set_modified(modified)
            .unwrap();
        let disk = Raw::open(&path, true).unwrap();
        disk.read_at(&[(&mut [0; 512][..]).into()], 0).unwrap();
        disk.flush().unwrap();
        let stamp = Stamp::of(&disk).unwrap().unwrap();
        let file = &stamp.files[0];
        assert_eq!((stamp.size, file.len, &file.path), (1024, 1024, &path));
        assert_eq!(file.modified.unwrap().to_string(), "1073741824.123456789");
    }

    #[test]
    fn what_differs_is_told() {
        let file = |len, seconds| FileStamp {
            path: "base".into(),
            len,
            modified: Some(Modified {
                seconds,
                nanoseconds: 5,
            }),
        };
        let stamp = |size, files: &[FileStamp]| Stamp {
            size,
            files: files.to_vec(),
        };
        let then = stamp(512, &[file(9, 1)]);
        let told = |now| then.difference(&now).unwrap_or_default();
        assert_eq!(told(then.clone()), "");
        let text = "its size is 1024 bytes, and was 512";
        assert_eq!(told(stamp(1024, &[file(9, 1)])), text);
        let text = "it lies in 2 files, with what is below it, and lay in 1";
        assert_eq!(told(stamp(512, &[file(9, 1), file(9, 1)])), text);
        assert_eq!(
            told(stamp(512, &[file(10, 1)])),
            "'base' has 10 bytes, and had 9"
        );
        let text = "'base' was written at 2.000000005, and last at 1.000000005 then, in seconds since 1970";
        assert_eq!(told(stamp(512, &[file(9, 2)])), text);
        let device = FileStamp {
            modified: None,
            ..file(9, 1)
        };
        let text = "'base' is another kind of file than it was";
        assert_eq!(told(stamp(512, &[device])), text);
    }
}
