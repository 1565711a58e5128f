//! Writing compressed clusters.
//!
//! One takes as many bytes of the image file as it has, behind the one that was written before, so
//! that several lie in one cluster of the file, and one may reach into the next. Each cluster of the
//! file counts those that touch it as its users. What does not become smaller is stored as it is.

use std::ops::Range;

use flate2::{Compress, Compression, FlushCompress, Status};
use vm_memory::VolatileSlice;

use super::compressed::CompressionType;
use super::entry::{Entry, L2Entry};
use super::mapping::Kind;
use super::placement::Placement;
use super::subclusters::Subclusters;
use super::{Qcow2, allocator::Allocation, zstd};
use crate::disk::check_range;
use crate::sync::atomic::Ordering;
use crate::{Disk, Error, Result};

/// QEMU reads a deflate stream with a window of 4 KiB, and no distance in it may be longer.
const WINDOW_BITS: u8 = 12;

/// What a guest cluster is to hold, ready for [`Qcow2::write_compressed`].
#[derive(Clone, Debug)]
pub struct CompressedCluster {
    content: Content,
    /// What it was compressed for.
    kind: CompressionType,
    cluster_size: u64,
    /// Bytes of the disk.
    len: u64,
}

#[derive(Clone, Debug)]
enum Content {
    Packed(Vec<u8>),
    /// What does not become smaller.
    Plain(Vec<u8>),
}

impl Qcow2 {
    /// Size of a cluster in bytes.
    pub fn cluster_size(&self) -> u64 {
        self.geometry.cluster_size()
    }

    /// Compresses `data`, what a guest cluster is to hold, in the way that the image is made for.
    /// What it lacks of a cluster, at the end of the disk, is zero.
    ///
    /// Nothing is written: several threads may do this at once, and write in an order of theirs.
    ///
    /// # Errors
    /// [`Error::Option`] for an image with an external data file, which cannot have compressed
    /// clusters, and for data of more than a cluster.
    pub fn compress(&self, mut data: Vec<u8>) -> Result<CompressedCluster> {
        if !matches!(self.placement, Placement::Internal) {
            let reason = "Compression is not supported for images with an external data file";
            return Err(Error::Option(reason.to_owned()));
        }
        let (len, cluster_size) = (data.len(), self.cluster_size() as usize);
        if len > cluster_size {
            let reason = format!("{len} bytes do not fit into a cluster of {cluster_size}");
            return Err(Error::Option(reason));
        }
        data.resize(cluster_size, 0);
        let content = match pack(self.compression_type, &data) {
            Some(packed) => Content::Packed(packed),
            None => {
                data.truncate(len);
                Content::Plain(data)
            }
        };
        Ok(CompressedCluster {
            content,
            kind: self.compression_type,
            cluster_size: self.cluster_size(),
            len: len as u64,
        })
    }

    /// Writes `cluster` at guest offset `offset`, compressed if that saves space. What was there
    /// before loses its space.
    ///
    /// # Errors
    /// [`Error::Option`] if the cluster is neither a whole one of this disk nor ends where the disk
    /// does, or was compressed for an image of another kind, and those of
    /// [`write_at`](Disk::write_at).
    pub fn write_compressed(&self, cluster: CompressedCluster, offset: u64) -> Result<()> {
        self.check_writable()?;
        let is_of_this_kind =
            (cluster.kind, cluster.cluster_size) == (self.compression_type, self.cluster_size());
        if !is_of_this_kind || !matches!(self.placement, Placement::Internal) {
            let reason = "the cluster was compressed for an image of another kind";
            return Err(Error::Option(reason.to_owned()));
        }
        let CompressedCluster { content, len, .. } = cluster;
        self.check_whole(offset, len)?;
        self.track(offset, len)?;
        match content {
            Content::Packed(packed) => self.with_space(|| self.write_packed(&packed, offset, len)),
            Content::Plain(mut data) => {
                self.write_at(&[VolatileSlice::from(&mut data[..])], offset)
            }
        }
    }

    /// Refuses a range that is not a whole cluster, where the one that the disk ends in counts as one.
    fn check_whole(&self, offset: u64, len: u64) -> Result<()> {
        let size = self.size();
        check_range(offset, len, size)?;
        let is_whole = len == self.cluster_size() || offset + len == size;
        if self.geometry.in_cluster(offset) != 0 || !is_whole {
            let reason = format!("{len} bytes at {offset:#x} are not a cluster of the disk");
            return Err(Error::Option(reason));
        }
        Ok(())
    }

    /// Writes compressed data for the `len` bytes at guest offset `offset`, and maps it last.
    fn write_packed(&self, packed: &[u8], offset: u64, len: u64) -> Result<()> {
        let _running = self.requests.begin();
        let g = self.geometry;
        let cluster = g.cluster(offset);
        let _held = self.ranges.lock(cluster..cluster + 1);
        // In a disk that has grown, more of the cluster is others' by now.
        self.check_whole(offset, len)?;
        let old = self.entries(cluster..cluster + 1)?[0];
        let old = self.cluster_kind(old.word, cluster)?;
        match (old, old.place()) {
            (Kind::Compressed { stored, .. }, _) => {
                self.check_leaving(stored.offset, stored.len)?;
            }
            (_, Some(place)) => self.check_leaving(place.offset, g.cluster_size())?,
            (_, None) => {}
        }
        self.own_table(g.l1_index(cluster))?;
        let bytes = packed.len() as u64;
        let start = self.refcounts()?.allocate_packed(&self.image, bytes)?;
        let written = self.map_packed(packed, cluster, start);
        if written.is_err() {
            self.release_packed(start..start + bytes);
        }
        written?;
        match (old, old.place()) {
            (Kind::Compressed { stored, .. }, _) => self.retired.add_compressed(stored.range()),
            (_, Some(place)) => self.retire(place.offset, g.cluster_size()),
            (_, None) => {}
        }
        Ok(())
    }

    /// Writes compressed data to `start` of the image file, and maps guest cluster `cluster` to it.
    fn map_packed(&self, packed: &[u8], cluster: u64, start: u64) -> Result<()> {
        let g = self.geometry;
        let len = packed.len() as u64;
        let word =
            L2Entry::new_compressed(start, len, g.cluster_bits).ok_or_else(|| self.image.full())?;
        self.image.write_bytes_at(packed, start)?;
        let end = g.clusters(start + len) << g.cluster_bits;
        self.data_end.fetch_max(end, Ordering::Relaxed);
        self.change(cluster..cluster + 1, |_, _| Entry {
            word,
            subclusters: Subclusters::default(),
        })
    }

    /// Gives back what was allocated for compressed data that is not mapped.
    fn release_packed(&self, range: Range<u64>) {
        let g = self.geometry;
        let first = g.cluster(range.start);
        self.release(&Allocation {
            offset: first << g.cluster_bits,
            clusters: g.clusters(range.end) - first,
            zeroed: false,
        });
    }
}

/// `cluster` compressed, if that is smaller.
fn pack(kind: CompressionType, cluster: &[u8]) -> Option<Vec<u8>> {
    let mut packed = vec![0; cluster.len() - 1];
    let len = match kind {
        CompressionType::Deflate => deflate(cluster, &mut packed),
        CompressionType::Zstd => zstd::compress(cluster, &mut packed),
    }?;
    packed.truncate(len);
    Some(packed)
}

/// Length of the deflate stream of `cluster`, if it fits into `packed`.
fn deflate(cluster: &[u8], packed: &mut [u8]) -> Option<usize> {
    let level = Compression::default();
    let mut stream = Compress::new_with_window_bits(level, false, WINDOW_BITS);
    let status = stream.compress(cluster, packed, FlushCompress::Finish);
    matches!(status, Ok(Status::StreamEnd)).then_some(stream.total_out() as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Noise that repeats can be compressed where it repeats within the window, and only there.
    #[test]
    fn no_distance_is_longer_than_the_window() {
        let mut state = 1u64;
        let mut noise = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        };
        for (distance, is_near) in [
            (1000, true),
            (3800, true),
            (4097, false),
            (5000, false),
            (8192, false),
            (30_000, false),
        ] {
            let block: Vec<u8> = (0..distance).map(&mut noise).collect();
            let cluster: Vec<u8> = block.iter().copied().cycle().take(65_536).collect();
            let packed = pack(CompressionType::Deflate, &cluster);
            let is_small = packed.is_some_and(|packed| packed.len() < 10_000);
            assert_eq!(is_small, is_near, "distance {distance}");
        }
    }

    #[test]
    fn what_does_not_become_smaller_is_not_packed() {
        let mut state = 1u64;
        let mut noise = |_| {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1);
            (state >> 56) as u8
        };
        let mut kinds = vec![CompressionType::Deflate];
        if cfg!(feature = "zstd") {
            kinds.push(CompressionType::Zstd);
        }
        for kind in kinds {
            let cluster: Vec<u8> = (0..512).map(&mut noise).collect();
            assert_eq!(pack(kind, &cluster), None);
            assert!(pack(kind, &[7; 512]).unwrap().len() < 100);
        }
    }
}
