//! In which units a file, or the device that it is, works best.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;

/// Units of a file below a disk, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Units {
    /// What begins and ends at multiples of it is written without reading what lies around it. A
    /// power of two, at least 512.
    pub physical_block: u32,
    /// Transfers of multiples of it are served best; 0 if that is not known.
    pub optimal_io: u32,
    /// The smallest aligned range of which a discard releases the space.
    pub discard: u32,
    /// Whether zeroing a range can release its space.
    pub can_unmap: bool,
}

/// The page cache holds so many bytes together.
pub(crate) const PAGE: u32 = 4096;

/// The smallest block.
const SECTOR: u32 = 512;

impl Default for Units {
    /// What is assumed of a file of which nothing is known.
    fn default() -> Self {
        Self {
            physical_block: PAGE,
            optimal_io: 0,
            discard: PAGE,
            can_unmap: true,
        }
    }
}

impl Units {
    /// Those of a regular file: of the page cache, and of the file system.
    pub(crate) fn of_file(file: &File) -> Self {
        let default = Self::default();
        let block = rustix::fs::fstatfs(file).ok();
        let block = block.and_then(|stat| u32::try_from(stat.f_bsize).ok());
        Self {
            discard: block
                .filter(|block| is_block(*block))
                .unwrap_or(default.discard),
            ..default
        }
    }

    /// Those that the system tells of a block device.
    pub(crate) fn of_device(device: &File) -> Self {
        let physical = rustix::fs::ioctl_blkpbszget(device).ok();
        let physical_block = physical.filter(|size| is_block(*size)).unwrap_or(PAGE);
        let limit = |name| queue_limit(device, name);
        let granularity = limit("discard_granularity");
        let discard = granularity.and_then(|bytes| u32::try_from(bytes).ok());
        Self {
            physical_block,
            optimal_io: limit("optimal_io_size").map_or(0, |bytes| bytes.try_into().unwrap_or(0)),
            discard: discard
                .filter(|size| is_block(*size))
                .unwrap_or(physical_block),
            can_unmap: granularity != Some(0) && limit("write_zeroes_max_bytes") != Some(0),
        }
    }
}

fn is_block(size: u32) -> bool {
    size >= SECTOR && size.is_power_of_two()
}

/// What the system tells of the queue of `device`, if that can be seen.
fn queue_limit(device: &File, name: &str) -> Option<u64> {
    let id = device.metadata().ok()?.rdev();
    let (major, minor) = (rustix::fs::major(id), rustix::fs::minor(id));
    // A partition has that of its disk.
    ["queue", "../queue"].iter().find_map(|queue| {
        let path = format!("/sys/dev/block/{major}:{minor}/{queue}/{name}");
        fs::read_to_string(path).ok()?.trim().parse().ok()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_has_those_of_its_file_system() {
        let dir = tempfile::tempdir().unwrap();
        let file = File::create(dir.path().join("file")).unwrap();
        let units = Units::of_file(&file);
        let block = rustix::fs::statfs(dir.path()).unwrap().f_bsize;
        assert_eq!(u64::from(units.discard), block as u64);
        assert_eq!((units.physical_block, units.optimal_io), (4096, 0));
        assert!(units.can_unmap);
    }
}
