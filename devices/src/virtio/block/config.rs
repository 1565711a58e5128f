//! Configuration space of the block device (virtio 1.3, section 5.2.4).

use tandem_block::Limits;

/// Sectors are 512 bytes, whatever the block size.
pub(super) const SECTOR_SIZE: u64 = 512;

/// Segments of one discard or write-zeroes request.
pub(super) const MAX_SEGMENTS: u32 = 32;
/// Sectors of one segment of a discard: 2 GiB, so that a request does not take for ever.
pub(super) const MAX_DISCARD_SECTORS: u32 = 1 << 22;
/// Sectors of one segment to be zeroed: 256 MiB, as a file system may need them written.
pub(super) const MAX_WRITE_ZEROES_SECTORS: u32 = 1 << 19;

/// Offset of the field `writeback`, the only one that a driver may write.
pub(super) const WRITEBACK: u64 = 32;

/// Offsets of the other fields.
mod field {
    pub const CAPACITY: usize = 0;
    pub const SEG_MAX: usize = 12;
    pub const CYLINDERS: usize = 16;
    pub const HEADS: usize = 18;
    pub const SECTORS: usize = 19;
    pub const BLK_SIZE: usize = 20;
    pub const PHYSICAL_BLOCK_EXP: usize = 24;
    pub const MIN_IO_SIZE: usize = 26;
    pub const OPT_IO_SIZE: usize = 28;
    pub const NUM_QUEUES: usize = 34;
    pub const MAX_DISCARD_SECTORS: usize = 36;
    pub const MAX_DISCARD_SEG: usize = 40;
    pub const DISCARD_SECTOR_ALIGNMENT: usize = 44;
    pub const MAX_WRITE_ZEROES_SECTORS: usize = 48;
    pub const MAX_WRITE_ZEROES_SEG: usize = 52;
    pub const WRITE_ZEROES_MAY_UNMAP: usize = 56;
    /// The fields behind belong to features that are not offered.
    pub const END: usize = 60;
}

/// The shape that disks without one are given.
const HEADS: u8 = 16;
const SECTORS_PER_TRACK: u8 = 63;
const MAX_CYLINDERS: u64 = 16383;

/// What the configuration space tells.
#[derive(Clone, Copy, Debug)]
pub(super) struct Config {
    /// Size of the disk in bytes.
    pub size: u64,
    pub limits: Limits,
    pub seg_max: u32,
    pub queues: u16,
    /// Completed writes may need a flush to be durable.
    pub writeback: bool,
}

impl Config {
    /// Reads at `offset`; past the end there are zeros.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        data.fill(0);
        let space = self.space();
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| space.get(offset..))
            .unwrap_or_default();
        for (to, from) in data.iter_mut().zip(rest) {
            *to = *from;
        }
    }

    /// All fields are little-endian; those of features that are not offered are zero.
    fn space(&self) -> [u8; field::END] {
        let mut space = [0; field::END];
        let mut put = |at: usize, bytes: &[u8]| space[at..at + bytes.len()].copy_from_slice(bytes);
        let limits = &self.limits;
        let capacity = self.size / SECTOR_SIZE;
        put(field::CAPACITY, &capacity.to_le_bytes());
        put(field::SEG_MAX, &self.seg_max.to_le_bytes());
        let track = u64::from(HEADS) * u64::from(SECTORS_PER_TRACK);
        // At most 16383.
        let cylinders = (capacity / track).min(MAX_CYLINDERS) as u16;
        put(field::CYLINDERS, &cylinders.to_le_bytes());
        put(field::HEADS, &[HEADS]);
        put(field::SECTORS, &[SECTORS_PER_TRACK]);
        put(field::BLK_SIZE, &limits.block_size.to_le_bytes());
        let blocks = |bytes: u32| bytes / limits.block_size.max(1);
        let physical = blocks(limits.physical_block_size).max(1);
        put(field::PHYSICAL_BLOCK_EXP, &[physical.ilog2() as u8]);
        let minimum = u16::try_from(physical).unwrap_or(u16::MAX);
        put(field::MIN_IO_SIZE, &minimum.to_le_bytes());
        let optimal = blocks(limits.optimal_io_size);
        put(field::OPT_IO_SIZE, &optimal.to_le_bytes());
        put(WRITEBACK as usize, &[self.writeback.into()]);
        put(field::NUM_QUEUES, &self.queues.to_le_bytes());
        if !limits.read_only {
            let alignment = limits.discard_granularity / SECTOR_SIZE as u32;
            for (at, value) in [
                (field::MAX_DISCARD_SECTORS, MAX_DISCARD_SECTORS),
                (field::MAX_DISCARD_SEG, MAX_SEGMENTS),
                (field::DISCARD_SECTOR_ALIGNMENT, alignment.max(1)),
                (field::MAX_WRITE_ZEROES_SECTORS, MAX_WRITE_ZEROES_SECTORS),
                (field::MAX_WRITE_ZEROES_SEG, MAX_SEGMENTS),
            ] {
                put(at, &value.to_le_bytes());
            }
            put(field::WRITE_ZEROES_MAY_UNMAP, &[limits.can_unmap.into()]);
        }
        space
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_common::disk::{BLOCK_SIZE, MemoryDisk};
    use tandem_block::Disk;

    fn config(disk: &MemoryDisk) -> Config {
        let mut limits = disk.limits();
        limits.physical_block_size = 4 * BLOCK_SIZE;
        limits.optimal_io_size = 64 << 10;
        limits.discard_granularity = 64 << 10;
        limits.can_unmap = true;
        Config {
            size: disk.size(),
            limits,
            seg_max: 254,
            queues: 3,
            writeback: true,
        }
    }

    fn read_at<const N: usize>(offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        config(&MemoryDisk::new(200)).read(offset, &mut data);
        data
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        assert_eq!(read_at(0), 200u64.to_le_bytes());
        assert_eq!(read_at(8), [0; 4], "size_max is not offered");
        assert_eq!(read_at(12), 254u32.to_le_bytes());
        assert_eq!(read_at(16), [0, 0, 16, 63]);
        assert_eq!(read_at(20), BLOCK_SIZE.to_le_bytes());
        assert_eq!(read_at(24), [2, 0, 4, 0], "in blocks");
        assert_eq!(read_at(28), 16u32.to_le_bytes());
        assert_eq!(read_at(32), [1, 0, 3, 0]);
        assert_eq!(read_at(36), (4u32 << 20).to_le_bytes());
        assert_eq!(read_at(40), 32u32.to_le_bytes());
        assert_eq!(read_at(44), 128u32.to_le_bytes());
        assert_eq!(read_at(48), (512u32 << 10).to_le_bytes());
        assert_eq!(read_at(52), 32u32.to_le_bytes());
        assert_eq!(read_at(56), [1, 0, 0, 0]);
    }

    #[test]
    fn a_disk_that_is_read_only_tells_of_no_discards() {
        let mut data = [0xee; 24];
        config(&MemoryDisk::read_only(200)).read(36, &mut data);
        assert_eq!(data, [0; 24]);
    }

    #[test]
    fn any_part_can_be_read_and_past_the_end_there_are_zeros() {
        assert_eq!(read_at(12), [254]);
        assert_eq!(read_at(56), [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read_at(59), [0; 2]);
        assert_eq!(read_at(60), [0; 4]);
        assert_eq!(read_at(u64::MAX), [0; 4]);
    }
}
