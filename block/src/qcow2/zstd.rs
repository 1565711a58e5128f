//! Zstandard, where this crate is built with it (feature `zstd`). Without it, images that are made for
//! it are refused before anything is done with them.

use std::path::Path;

use super::compressed::CompressionType;
use crate::{Error, Result};

/// Refuses `image` if its clusters are compressed in a way that this crate is built without.
pub(super) fn check_built(kind: CompressionType, image: &Path) -> Result<()> {
    match kind {
        CompressionType::Zstd if !cfg!(feature = "zstd") => {
            let feature = "compression type zstd (tandem-block is built without its feature zstd)";
            Err(Error::unsupported(image, feature))
        }
        _ => Ok(()),
    }
}

/// Length of the zstd frame of `cluster`, if it fits into `packed`.
#[cfg(feature = "zstd")]
pub(super) fn compress(cluster: &[u8], packed: &mut [u8]) -> Option<usize> {
    zstd::bulk::compress_to_buffer(cluster, packed, zstd::DEFAULT_COMPRESSION_LEVEL).ok()
}

/// Whether `packed` begins with zstd frames that fill `cluster`.
#[cfg(feature = "zstd")]
pub(super) fn decompress(packed: &[u8], cluster: &mut [u8]) -> bool {
    use std::io::Read;
    zstd::Decoder::with_buffer(packed).is_ok_and(|mut stream| stream.read_exact(cluster).is_ok())
}

/// No image gets as far as this.
#[cfg(not(feature = "zstd"))]
pub(super) fn compress(_: &[u8], _: &mut [u8]) -> Option<usize> {
    None
}

/// No image gets as far as this.
#[cfg(not(feature = "zstd"))]
pub(super) fn decompress(_: &[u8], _: &mut [u8]) -> bool {
    false
}

#[cfg(all(test, feature = "zstd"))]
mod tests {
    use super::*;

    #[test]
    fn what_does_not_fill_a_cluster_is_no_cluster() {
        let data: Vec<u8> = (0..4096).map(|i| (i / 7) as u8).collect();
        let packed = zstd::encode_all(&data[..], 3).unwrap();
        let mut cluster = vec![0; 4096];
        assert!(decompress(&[&packed[..], &[0; 100]].concat(), &mut cluster));
        assert!(cluster == data);
        assert!(!decompress(&packed[..packed.len() / 2], &mut cluster));
        assert!(!decompress(&packed, &mut vec![0; 8192]));
    }
}
