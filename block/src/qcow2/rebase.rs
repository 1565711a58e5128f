//! Putting an image on top of another backing file.
//!
//! Where the image has nothing, and what the new backing file shows is not what the old one does, the
//! image takes up the latter first. All of that is on disk before the header changes to the new name,
//! and the disk reads the same before and after: an attempt that is broken off has only made the image
//! larger.

use std::path::Path;

use vm_memory::VolatileSlice;

use super::Qcow2;
use super::backing::Found;
use super::header::Header;
use super::parse::MAX_BACKING_FILE;
use super::placement::Placement;
use super::zeroes::Zeroed;
use crate::file::{FileOptions, ImageFile};
use crate::lock::Access;
use crate::{Disk, Error, ExtentKind, Result, Stamp, extent_in_chain};

/// Bytes that are compared at once; a multiple of the largest cluster.
const PIECE: u64 = 2 << 20;

/// How an image names its backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BackingName {
    /// Its name. A relative one is relative to the image's directory.
    pub file: Vec<u8>,
    /// Name of its format.
    pub format: Vec<u8>,
}

/// What a disk is to lie on.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub enum NewBacking<'a> {
    /// Nothing.
    Nothing,
    /// One of those that it lies on now: how many others are above it.
    Below(usize),
    /// Another one, that nobody writes to.
    Other(&'a dyn Disk),
}

/// Makes the image at `path` name another backing file, or none, whatever its disk shows then; no
/// other file is looked for, and a [stamp](super::stamp_base) of the old one ends.
///
/// # Errors
/// As [`Qcow2::check_backing_name`]; as [`Qcow2::open`] for an image that cannot be written.
pub fn set_backing_name(
    path: &Path,
    name: Option<&BackingName>,
    options: FileOptions,
) -> Result<()> {
    let image = ImageFile::open(path, Access::Write, options)?;
    let Found { image, mut header } = Found::new(image, false)?;
    set(&mut header, name)?;
    header.write(&image)
}

fn set(header: &mut Header, name: Option<&BackingName>) -> Result<()> {
    let wrong = |reason: &str| Err(Error::Option(reason.to_owned()));
    if name.is_some() && header.data_file_is_raw() {
        return wrong("data-file-raw is incompatible with backing files");
    }
    if name.is_some_and(|name| name.file.len() > MAX_BACKING_FILE) {
        return wrong("Invalid argument");
    }
    header.backing_file = name.map(|name| name.file.clone());
    header.extensions.backing_format = name.map(|name| name.format.clone());
    header.set_base_stamp(None);
    header.forget_unknown_autoclear();
    Ok(())
}

impl Qcow2 {
    /// Tells whether [`rebase`](Self::rebase) can give the image this backing file.
    ///
    /// # Errors
    /// [`Error::Option`] for an image with a raw data file, which cannot have one, and for a name
    /// that is too long for any; [`Error::HeaderFull`] for one that is too long for this image.
    pub fn check_backing_name(&self, name: Option<&BackingName>) -> Result<()> {
        let mut header = Header::read(&*self.image.storage, &self.image.path)?;
        set(&mut header, name)?;
        header.plan(&self.image).map(drop)
    }

    /// Puts the disk on `new`, which `name` leads to, without a change of what it reads, and closes
    /// the image. What it must take up for that is compressed with `compress`, where it is a whole
    /// cluster. `progress` is told how many bytes of how many have been looked at.
    ///
    /// # Errors
    /// Those of [`check_backing_name`](Self::check_backing_name), before anything has changed, and
    /// [`Error::Option`] for compression in an image with an external data file. After any error the
    /// disk reads as before, on what it has been on.
    pub fn rebase(
        self,
        name: Option<&BackingName>,
        new: NewBacking<'_>,
        compress: bool,
        progress: &mut dyn FnMut(u64, u64),
    ) -> Result<()> {
        self.check_writable()?;
        self.check_backing_name(name)?;
        if compress && !matches!(self.placement, Placement::Internal) {
            let reason = "Compression is not supported for images with an external data file";
            return Err(Error::Option(reason.to_owned()));
        }
        let (shared, below) = match new {
            NewBacking::Nothing => (None, None),
            NewBacking::Below(depth) => (Some(depth), self.below(depth)),
            NewBacking::Other(disk) => (None, Some(disk)),
        };
        let taking = Taking {
            disk: &self,
            new: below,
            shared,
            compress,
        };
        taking.run(progress)?;
        self.name_backing(name, below)?;
        self.close()
    }

    /// Makes the image name another backing file, or none, whatever its disk shows then, and closes it.
    /// A stamp of the old one ends.
    ///
    /// # Errors
    /// Those of [`check_backing_name`](Self::check_backing_name); [`Error::ReadOnly`].
    pub fn set_backing_name(self, name: Option<&BackingName>) -> Result<()> {
        self.name_backing(name, None)?;
        self.close()
    }

    /// As [`set_backing_name`](Self::set_backing_name), and goes on, on what it has been on. An image that
    /// kept the stamp of that keeps the one of `new`, if it is given.
    pub(crate) fn name_backing(
        &self,
        name: Option<&BackingName>,
        new: Option<&dyn Disk>,
    ) -> Result<()> {
        self.check_writable()?;
        self.flush()?;
        let mut header = Header::read(&*self.image.storage, &self.image.path)?;
        let new = new.filter(|_| header.extensions.base_stamp.is_some());
        set(&mut header, name)?;
        if let Some(new) = new {
            header.set_base_stamp(Stamp::of(new)?);
        }
        header.write(&self.image)
    }

    fn below(&self, depth: usize) -> Option<&dyn Disk> {
        let mut below = self.backing();
        for _ in 0..depth {
            below = below?.backing();
        }
        below
    }
}

/// Takes up what the old backing file shows and the new one does not.
pub(crate) struct Taking<'a> {
    pub disk: &'a Qcow2,
    pub new: Option<&'a dyn Disk>,
    /// How many images of the old chain are above the new backing file, if that is one of it.
    pub shared: Option<usize>,
    pub compress: bool,
}

impl Taking<'_> {
    fn run(&self, progress: &mut dyn FnMut(u64, u64)) -> Result<()> {
        let size = self.disk.size();
        let mut old = vec![0; PIECE as usize];
        let mut new = old.clone();
        let mut at = 0;
        while at < size {
            progress(at, size);
            let len = PIECE.min(size - at);
            let extent = self.disk.extent(at, len)?;
            if extent.kind != ExtentKind::Unallocated {
                at += extent.len;
                continue;
            }
            let end = at + extent.len;
            while at < end {
                let same = self.known_same(at, end - at)?;
                at += same;
                if same == 0 {
                    let len = (end - at) as usize;
                    self.take(at, &mut old[..len], &mut new[..len])?;
                    at = end;
                }
            }
        }
        progress(size, size);
        Ok(())
    }

    /// How many of the `len` bytes at `at`, whole units or all, both backing files are known to show
    /// the same of, without reading them.
    pub(super) fn known_same(&self, at: u64, len: u64) -> Result<u64> {
        let same = match self.shared {
            Some(depth) => self.comes_from(depth, at, len)?,
            None => 0,
        };
        let same = match same {
            0 => {
                let old = zeros(self.disk.backing(), at, len)?;
                old.min(zeros(self.new, at, len)?)
            }
            same => same,
        };
        Ok(if same == len {
            len
        } else {
            same - self.disk.geometry.in_grain(same)
        })
    }

    /// How many of the bytes of the old backing file come from the image with `depth` others above
    /// it, or from below that.
    fn comes_from(&self, depth: usize, at: u64, len: u64) -> Result<u64> {
        let Some(old) = self.disk.backing().filter(|old| at < old.size()) else {
            return Ok(0);
        };
        let (found, extent) = extent_in_chain(old, at, len.min(old.size() - at))?;
        Ok(if found >= depth { extent.len } else { 0 })
    }

    /// Takes up what differs at `at`, where the image has nothing. The buffers are as long as the range.
    fn take(&self, at: u64, old: &mut [u8], new: &mut [u8]) -> Result<()> {
        let len = old.len() as u64;
        self.disk
            .read_backing(&[VolatileSlice::from(&mut *old)], at, len)?;
        read(self.new, at, new)?;
        let mut done = 0;
        while done < old.len() {
            let unit = self.unit(at + done as u64).min(old.len() - done);
            let mut end = done + unit;
            let differs = old[done..end] != new[done..end];
            if !differs {
                done = end;
                continue;
            }
            let is_zero = old[done..end].iter().all(|byte| *byte == 0);
            // Units of one kind in one request.
            while end < old.len() {
                let next = end..end + self.unit(at + end as u64).min(old.len() - end);
                let zero = old[next.clone()].iter().all(|byte| *byte == 0);
                if zero != is_zero || old[next.clone()] == new[next.clone()] {
                    break;
                }
                end = next.end;
            }
            self.write(at + done as u64, &mut old[done..end], is_zero)?;
            done = end;
        }
        Ok(())
    }

    /// Bytes from `at` to the end of what is taken up as a whole.
    pub(super) fn unit(&self, at: u64) -> usize {
        let g = self.disk.geometry;
        let unit = if self.compress {
            g.cluster_size() - g.in_cluster(at)
        } else {
            g.grain_size() - g.in_grain(at)
        };
        unit as usize
    }

    fn write(&self, at: u64, data: &mut [u8], is_zero: bool) -> Result<()> {
        let disk = self.disk;
        let len = data.len() as u64;
        if is_zero {
            disk.track(at, len)?;
            return disk.with_space(|| disk.zero_as(at, len, Zeroed::Explicit));
        }
        let cluster_size = disk.cluster_size();
        let is_whole = |at: u64, len: u64| {
            disk.geometry.in_cluster(at) == 0 && (len == cluster_size || at + len == disk.size())
        };
        let mut done = 0;
        while self.compress && done < len {
            let part = (cluster_size - disk.geometry.in_cluster(at + done)).min(len - done);
            let range = done as usize..(done + part) as usize;
            if is_whole(at + done, part) {
                let cluster = disk.compress(data[range].to_vec())?;
                disk.write_compressed(cluster, at + done)?;
            } else {
                disk.write_at(&[VolatileSlice::from(&mut data[range])], at + done)?;
            }
            done += part;
        }
        if self.compress {
            return Ok(());
        }
        disk.write_at(&[VolatileSlice::from(data)], at)
    }
}

/// How many of the `len` bytes at `at` of `disk` are known to be zero; behind its end all are.
fn zeros(disk: Option<&dyn Disk>, at: u64, len: u64) -> Result<u64> {
    let Some(disk) = disk.filter(|disk| at < disk.size()) else {
        return Ok(len);
    };
    let (_, extent) = extent_in_chain(disk, at, len.min(disk.size() - at))?;
    Ok(match extent.kind {
        ExtentKind::Zero | ExtentKind::Unallocated => extent.len,
        ExtentKind::Data | ExtentKind::Compressed => 0,
    })
}

/// Reads what `disk` has at `at`, and zeros behind its end.
pub(super) fn read(disk: Option<&dyn Disk>, at: u64, buf: &mut [u8]) -> Result<()> {
    let size = disk.map_or(0, Disk::size);
    let (stored, rest) = buf.split_at_mut(size.saturating_sub(at).min(buf.len() as u64) as usize);
    rest.fill(0);
    match disk {
        Some(disk) if !stored.is_empty() => disk.read_at(&[VolatileSlice::from(stored)], at),
        _ => Ok(()),
    }
}
