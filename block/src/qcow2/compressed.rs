//! Compressed clusters (qcow2 specification, "Compressed Clusters Descriptor").
//!
//! They are read as whole clusters, and never changed in place: a write takes up what it does not
//! change, as from a backing file; `compress` writes whole ones. Several may lie in one host cluster,
//! whose refcount counts them.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use flate2::{Decompress, FlushDecompress};
use vm_memory::VolatileSlice;

use super::{Qcow2, zstd};
use crate::names::named;
use crate::sync::lock;
use crate::{Error, Result};

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum CompressionType {
    /// Raw deflate, called zlib by QEMU.
    #[default]
    Deflate,
    /// Zstandard. It needs the cargo feature `zstd`: without it, images of this type are neither made
    /// nor opened.
    Zstd,
}

named!(CompressionType: Deflate = "zlib", Zstd = "zstd");

/// Where a compressed cluster lies in the image file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Stored {
    /// In bytes, without alignment.
    pub offset: u64,
    /// Bytes up to the end of the last sector of 512 bytes that it touches.
    pub len: u64,
}

impl Stored {
    pub fn range(self) -> Range<u64> {
        self.offset..self.offset + self.len
    }
}

/// The cluster that was decompressed last: reads of its parts follow each other.
#[derive(Default)]
pub(super) struct Decompressed {
    last: Option<(Stored, Arc<[u8]>)>,
}

impl Decompressed {
    fn get(&self, stored: Stored) -> Option<Arc<[u8]>> {
        let (last, cluster) = self.last.as_ref()?;
        (*last == stored).then(|| cluster.clone())
    }
}

impl Qcow2 {
    /// Fills `bufs` with what the cluster at `stored` holds from `skip` on.
    pub(super) fn read_compressed(
        &self,
        stored: Stored,
        mut skip: usize,
        bufs: &[VolatileSlice<'_>],
    ) -> Result<()> {
        let cached = lock(&self.decompressed).get(stored);
        let cluster = match cached {
            Some(cluster) => cluster,
            None => {
                let cluster = self.decompress(stored)?;
                lock(&self.decompressed).last = Some((stored, cluster.clone()));
                cluster
            }
        };
        for buf in bufs {
            buf.copy_from(&cluster[skip..skip + buf.len()]);
            skip += buf.len();
        }
        Ok(())
    }

    fn decompress(&self, stored: Stored) -> Result<Arc<[u8]>> {
        let mut packed = vec![0; stored.len as usize];
        self.image.read_bytes_at(&mut packed, stored.offset)?;
        let mut cluster = vec![0; self.geometry.cluster_size() as usize];
        let is_whole = match self.compression_type {
            CompressionType::Deflate => inflate(&packed, &mut cluster),
            CompressionType::Zstd => zstd::decompress(&packed, &mut cluster),
        };
        if is_whole {
            return Ok(cluster.into());
        }
        // As for QEMU, no reason to mark the image as corrupt: nothing else is in danger.
        let error = io::Error::from_raw_os_error(libc::EIO);
        let path = &self.image.path;
        Err(Error::io_at(
            path,
            "decompress data of",
            stored.offset,
            error,
        ))
    }

    /// Gives back one reference to each cluster of the image file that `range` lies in, where a
    /// compressed cluster was. An error leaks them.
    pub(super) fn give_back_compressed(&self, range: Range<u64>) -> Result<()> {
        // Of the requests that could have left it there, none is running any more.
        lock(&self.decompressed).last = None;
        self.release_clusters(None, range)
    }
}

/// Whether `packed` begins with a deflate stream that fills `cluster`.
fn inflate(packed: &[u8], cluster: &mut [u8]) -> bool {
    let mut stream = Decompress::new(false);
    let result = stream.decompress(packed, cluster, FlushDecompress::Finish);
    result.is_ok() && stream.total_out() == cluster.len() as u64
}

impl From<CompressionType> for u8 {
    fn from(kind: CompressionType) -> Self {
        match kind {
            CompressionType::Deflate => 0,
            CompressionType::Zstd => 1,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fill_a_cluster_is_no_cluster() {
        let data: Vec<u8> = (0..4096).map(|i| (i / 7) as u8).collect();
        let mut deflate = flate2::Compress::new(flate2::Compression::default(), false);
        let mut packed = Vec::with_capacity(8192);
        let all = flate2::FlushCompress::Finish;
        deflate.compress_vec(&data, &mut packed, all).unwrap();
        let mut cluster = vec![0; 4096];
        assert!(inflate(&[&packed[..], &[0; 100]].concat(), &mut cluster));
        assert!(cluster == data);
        assert!(!inflate(&packed[..packed.len() / 2], &mut cluster));
        assert!(!inflate(&packed, &mut vec![0; 8192]));
        assert!(!inflate(&[0xff; 100], &mut cluster));
    }
}
