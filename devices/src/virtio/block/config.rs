//! Configuration space of the block device (virtio 1.3, section 5.2.4).

use tandem_block::Disk;

const CAPACITY: usize = 0;
const SEG_MAX: usize = 12;
const BLK_SIZE: usize = 20;
/// The fields after `blk_size` belong to features that the device does not offer.
const SIZE: usize = 24;

/// Sectors are 512 bytes, whatever the block size.
pub(super) const SECTOR_SIZE: u64 = 512;

/// The configuration space as it is now. All fields are little-endian; those of features that are
/// not offered are zero.
pub(super) fn space(disk: &dyn Disk, seg_max: u32) -> [u8; SIZE] {
    let mut space = [0; SIZE];
    let capacity = disk.size() / SECTOR_SIZE;
    space[CAPACITY..CAPACITY + 8].copy_from_slice(&capacity.to_le_bytes());
    space[SEG_MAX..SEG_MAX + 4].copy_from_slice(&seg_max.to_le_bytes());
    space[BLK_SIZE..BLK_SIZE + 4].copy_from_slice(&disk.limits().block_size.to_le_bytes());
    space
}

/// Reads `space` at `offset`; past its end there are zeros.
pub(super) fn read(space: &[u8], offset: u64, data: &mut [u8]) {
    data.fill(0);
    let rest = usize::try_from(offset)
        .ok()
        .and_then(|offset| space.get(offset..))
        .unwrap_or_default();
    for (to, from) in data.iter_mut().zip(rest) {
        *to = *from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_common::disk::{BLOCK_SIZE, MemoryDisk};

    fn read_at<const N: usize>(offset: u64) -> [u8; N] {
        let mut data = [0xee; N];
        read(&space(&MemoryDisk::new(200), 254), offset, &mut data);
        data
    }

    #[test]
    fn fields_are_where_the_specification_has_them() {
        assert_eq!(read_at(0), 200u64.to_le_bytes());
        assert_eq!(read_at(8), [0; 4], "size_max is not offered");
        assert_eq!(read_at(12), 254u32.to_le_bytes());
        assert_eq!(read_at(16), [0; 4], "geometry is not offered");
        assert_eq!(read_at(20), BLOCK_SIZE.to_le_bytes());
    }

    #[test]
    fn any_part_can_be_read_and_past_the_end_there_are_zeros() {
        assert_eq!(read_at(12), [254]);
        assert_eq!(read_at(21), [0x10, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(read_at(23), [0; 2]);
        assert_eq!(read_at(24), [0; 4]);
        assert_eq!(read_at(u64::MAX), [0; 4]);
    }
}
