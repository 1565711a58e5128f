//! How much space images take: one that is to be made, and one that is there on its host.

use super::bitmaps::BitmapInfo;
use super::create::refcount_clusters;
use super::geometry::ENTRY_SIZE;
use super::header::{Header, MAX_L1_SIZE};
use super::refcount::Refcounts;
use super::refcount_width::RefcountWidth;
use super::{Qcow2, bitmaps};
use crate::{Extent, ExtentKind, Result};

/// Length in bytes of an image file that is full: with data for a disk of `size` bytes, and all the
/// tables for it. `cluster_size` and `refcount_bits` are what an image can have.
///
/// `None` for a disk that is too large for such clusters.
pub fn full_size(
    size: u64,
    cluster_size: u64,
    refcount_bits: u32,
    extended_l2: bool,
) -> Option<u64> {
    let entry_size = if extended_l2 { 16 } else { ENTRY_SIZE };
    let data = size.div_ceil(cluster_size);
    let l2_tables = data.div_ceil(cluster_size / entry_size);
    if l2_tables * ENTRY_SIZE > MAX_L1_SIZE {
        return None;
    }
    let l1_clusters = (l2_tables * ENTRY_SIZE).div_ceil(cluster_size);
    let clusters = 1 + l1_clusters + l2_tables + data;
    let width = RefcountWidth {
        order: refcount_bits.trailing_zeros(),
    };
    let (table, blocks) = refcount_clusters(clusters, cluster_size, width);
    (clusters + table + blocks).checked_mul(cluster_size)
}

/// Bytes that `bitmaps` of a disk of `size` bytes take at most in an image with clusters of
/// `cluster_size` bytes.
pub fn bitmaps_size(bitmaps: &[BitmapInfo], size: u64, cluster_size: u64) -> u64 {
    let (mut clusters, mut directory) = (0, 0);
    for bitmap in bitmaps {
        let parts = size
            .div_ceil(bitmap.granularity)
            .div_ceil(8)
            .div_ceil(cluster_size);
        clusters += parts + (parts * ENTRY_SIZE).div_ceil(cluster_size);
        directory += bitmaps::entry_len(bitmap.name.len());
    }
    (clusters + directory.div_ceil(cluster_size)) * cluster_size
}

impl Qcow2 {
    /// As [`find_extent`](Self::find_extent), but what lies in a hole of the file that holds guest data
    /// is called zero if there may be many of them.
    ///
    /// The system is asked for holes only in an image that looks as if its clusters had been
    /// allocated beforehand: elsewhere there are hardly any.
    pub(super) fn find_sparse_extent(&self, offset: u64, len: u64) -> Result<Extent> {
        let extent = self.find_extent(offset, len)?;
        let Some(place) = extent.offset.filter(|_| extent.kind == ExtentKind::Data) else {
            return Ok(extent);
        };
        if !*self
            .preallocated
            .get_or_init(|| self.looks_preallocated().unwrap_or(false))
        {
            return Ok(extent);
        }
        let file = self.data();
        let data = file.next_data(place)?;
        let (kind, end) = if data > place {
            (ExtentKind::Zero, data)
        } else {
            // Another program may have cut the file meanwhile.
            (ExtentKind::Data, file.next_hole(place)?.max(place + 1))
        };
        Ok(Extent {
            len: extent.len.min(end - place),
            kind,
            ..extent
        })
    }

    /// Whether clearly more clusters of the image file are in use than have space on the host.
    fn looks_preallocated(&self) -> Result<bool> {
        let Some(allocated) = self.image.allocated()? else {
            return Ok(false);
        };
        let g = self.geometry;
        let clusters = g.cluster(allocated);
        let many = (clusters * 10 / 9).max(clusters + 2);
        let header = Header::read(&*self.image.storage, &self.image.path)?;
        let mut refcounts = Refcounts::open(
            &self.image,
            g,
            header.refcount_width(),
            header.refcount_table_offset,
            header.refcount_table_clusters.into(),
        )?;
        let end = g.clusters(self.image.size()?);
        let (mut used, mut cluster) = (0, 0);
        // A file can be much longer than what its refcounts count.
        while let Some(next) = refcounts.next_counted(cluster).filter(|next| *next < end) {
            if refcounts.count(&self.image, next)? > 0 {
                used += 1;
            }
            if used >= many {
                return Ok(true);
            }
            cluster = next + 1;
        }
        Ok(false)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values are what `qemu-img measure` prints.
    #[test]
    fn full_images() {
        for (size, cluster_size, refcount_bits, extended_l2, expected) in [
            (0, 65536, 16, false, Some(196_608)),
            (1 << 20, 65536, 16, false, Some(1_376_256)),
            (10 << 20, 65536, 16, false, Some(10_813_440)),
            (2 << 60, 65536, 16, false, None),
            (1 << 40, 512, 16, false, None),
        ] {
            let found = full_size(size, cluster_size, refcount_bits, extended_l2);
            assert_eq!(found, expected, "{size} {cluster_size}");
        }
    }
}
