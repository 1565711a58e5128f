//! The image header (qcow2 specification, "Header").

use std::path::Path;

use zerocopy::IntoBytes;

use super::DataFileLayout;
use super::compressed::CompressionType;
use super::extension::{self, Bitmaps, Extensions, FeatureNames};
use super::geometry::Geometry;
use super::parse::{LENGTH_V2, LENGTH_V3, Layout, MAGIC, Purpose};
use super::refcount_width::RefcountWidth;
use crate::{Error, Result, Stamp, Storage};

/// The smallest and the largest cluster that an image may have, as powers of two.
pub(crate) const CLUSTER_BITS: std::ops::RangeInclusive<u32> = 9..=21;
/// Most bytes that an L1 table may have.
pub(crate) const MAX_L1_SIZE: u64 = 32 << 20;
/// Most bytes that a refcount table may have.
pub(crate) const MAX_REFCOUNT_TABLE_SIZE: u64 = 8 << 20;
/// End of the offsets that L1 and L2 entries can express (qcow2 specification, bits 9 to 55).
pub(crate) const MAX_OFFSET: u64 = 1 << 56;
/// The feature name table is left out of clusters too small to waste space on it.
const MIN_CLUSTER_FOR_NAMES: usize = 4096;

/// Bits of `incompatible_features`.
pub(crate) mod incompatible {
    /// Refcounts may be wrong.
    pub(crate) const DIRTY: u64 = 1 << 0;
    /// Some data structure is known to be wrong.
    pub(crate) const CORRUPT: u64 = 1 << 1;
    /// Guest data is in an external data file.
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not the default one.
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 16 bytes.
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    /// The data file is in the packed layout: an extension of ours, see `packed`.
    pub(crate) const PACKED: u64 = 1 << 62;
    /// All bits that the published specification defines.
    pub(crate) const PUBLISHED: u64 = 0x1f;
}

/// Bits of `compatible_features`.
pub(crate) mod compatible {
    /// A writer may postpone refcount updates behind the dirty bit.
    pub(crate) const LAZY_REFCOUNTS: u64 = 1 << 0;
}

/// Bits of `autoclear_features`.
pub(crate) mod autoclear {
    /// The persistent bitmaps are up to date.
    pub(crate) const BITMAPS: u64 = 1 << 0;
    /// The data file is by itself a valid raw image.
    pub(crate) const DATA_FILE_RAW: u64 = 1 << 1;
    /// The stamp of the backing file holds: an extension of ours, see `stamp`.
    pub(crate) const BASE_STAMP: u64 = 1 << 62;
    /// All bits that are kept up.
    pub(crate) const KNOWN: u64 = BITMAPS | DATA_FILE_RAW | BASE_STAMP;
}

/// The header of an image, valid in itself; whether this version supports everything that it asks
/// for is told by [`check_supported`](Header::check_supported).
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// 2 or 3.
    pub version: u32,
    /// Name of the backing file.
    pub backing_file: Option<Vec<u8>>,
    /// Cluster size as a power of two.
    pub cluster_bits: u32,
    /// Size of the disk in bytes. Only whole sectors count: see [`disk_size`](Header::disk_size).
    pub size: u64,
    /// 0 none, 1 AES-CBC, 2 LUKS.
    pub crypt_method: u32,
    /// Entries of the active L1 table.
    pub l1_size: u32,
    /// Offset of the active L1 table in the image file in bytes.
    pub l1_table_offset: u64,
    /// Offset of the refcount table in the image file in bytes.
    pub refcount_table_offset: u64,
    /// Length of the refcount table in clusters.
    pub refcount_table_clusters: u32,
    /// Number of internal snapshots.
    pub nb_snapshots: u32,
    /// Offset of the snapshot table in the image file in bytes.
    pub snapshots_offset: u64,
    /// See [`incompatible`].
    pub incompatible_features: u64,
    /// See [`compatible`].
    pub compatible_features: u64,
    /// See [`autoclear`].
    pub autoclear_features: u64,
    /// Width of a refcount in bits as a power of two.
    pub refcount_order: u32,
    /// Length in bytes of the header as it was read, without extensions.
    pub header_length: u32,
    /// 0 deflate, 1 zstd.
    pub compression_type: u8,
    /// What follows the fields that are known.
    pub unknown_fields: Vec<u8>,
    /// The header extensions.
    pub extensions: Extensions,
}

impl Header {
    /// Reads the header of the image in `storage`, called `file` in errors.
    ///
    /// # Errors
    /// [`Error::NotQcow2`], [`Error::Invalid`] for a field or extension that the format forbids,
    /// [`Error::Unsupported`] for an incompatible feature that is not known, [`Error::Io`].
    pub fn read(storage: &dyn Storage, file: &Path) -> Result<Self> {
        Self::read_for(storage, file, Purpose::Use)
    }

    /// [`read`](Header::read) that lets pass what a check reports itself: a missing refcount
    /// table.
    pub fn read_for_check(storage: &dyn Storage, file: &Path) -> Result<Self> {
        Self::read_for(storage, file, Purpose::Check)
    }

    /// The first cluster of an image with this header, in the layout that QEMU writes.
    ///
    /// Unknown fields and extensions are kept; the feature name table becomes the current one.
    ///
    /// # Errors
    /// [`Error::HeaderFull`] if the extensions and names do not fit into one cluster.
    pub fn encode(&self, file: &Path) -> Result<Vec<u8>> {
        self.encode_at(0).ok_or_else(|| self.full(file))
    }

    /// As [`encode`](Self::encode), with a gap behind the fields if they end before `place`: the
    /// extensions and the backing file's name begin there, or up to 7 bytes behind it.
    ///
    /// `None` if there is no room.
    pub(super) fn encode_at(&self, place: usize) -> Option<Vec<u8>> {
        let cluster_size = 1usize << self.cluster_bits;
        let mut layout = self.layout();
        let mut tail = self.unknown_fields.clone();
        let fixed = if self.version == 2 {
            LENGTH_V2
        } else {
            LENGTH_V3
        };
        if place > fixed + tail.len() {
            let gap = place - fixed - tail.len();
            extension::append_gap(&mut tail, gap);
        }
        let names = FeatureNames {
            published: self.version >= 3 && cluster_size > MIN_CLUSTER_FOR_NAMES,
            packed: self.incompatible_features & incompatible::PACKED != 0,
        };
        self.extensions
            .encode(&mut tail, self.has_data_file(), names);
        if let Some(name) = &self.backing_file {
            layout.backing_file_offset = ((fixed + tail.len()) as u64).into();
            layout.backing_file_size = (name.len() as u32).into();
            tail.extend_from_slice(name);
        }
        if fixed + tail.len() > cluster_size {
            return None;
        }
        let mut cluster = vec![0; cluster_size];
        cluster[..fixed].copy_from_slice(&layout.as_bytes()[..fixed]);
        cluster[fixed..fixed + tail.len()].copy_from_slice(&tail);
        Some(cluster)
    }

    /// The error of a header for which there is no room in `file`.
    pub(super) fn full(&self, file: &Path) -> Error {
        Error::HeaderFull {
            file: file.to_owned(),
            cluster_size: self.cluster_size(),
        }
    }

    fn layout(&self) -> Layout {
        Layout {
            magic: MAGIC.into(),
            version: self.version.into(),
            backing_file_offset: 0.into(),
            backing_file_size: 0.into(),
            cluster_bits: self.cluster_bits.into(),
            size: self.size.into(),
            crypt_method: self.crypt_method.into(),
            l1_size: self.l1_size.into(),
            l1_table_offset: self.l1_table_offset.into(),
            refcount_table_offset: self.refcount_table_offset.into(),
            refcount_table_clusters: self.refcount_table_clusters.into(),
            nb_snapshots: self.nb_snapshots.into(),
            snapshots_offset: self.snapshots_offset.into(),
            incompatible_features: self.incompatible_features.into(),
            compatible_features: self.compatible_features.into(),
            autoclear_features: self.autoclear_features.into(),
            refcount_order: self.refcount_order.into(),
            header_length: ((LENGTH_V3 + self.unknown_fields.len()) as u32).into(),
            compression_type: self.compression_type,
            padding: [0; 7],
        }
    }

    /// Sizes that follow from the header.
    pub fn geometry(&self) -> Geometry {
        Geometry {
            cluster_bits: self.cluster_bits,
            extended_l2: self.has_extended_l2(),
        }
    }

    /// Bytes in a cluster.
    pub fn cluster_size(&self) -> u64 {
        1 << self.cluster_bits
    }

    /// Size of the guest's disk in bytes: what a header says beyond the last whole sector does
    /// not count.
    pub fn disk_size(&self) -> u64 {
        self.size & !511
    }

    /// How clusters are compressed.
    pub fn compression(&self) -> CompressionType {
        match self.compression_type {
            0 => CompressionType::Deflate,
            _ => CompressionType::Zstd,
        }
    }

    /// Width of a refcount.
    pub fn refcount_width(&self) -> RefcountWidth {
        RefcountWidth {
            order: self.refcount_order,
        }
    }

    /// Bytes in an L2 entry.
    pub fn l2_entry_size(&self) -> u64 {
        if self.has_extended_l2() { 16 } else { 8 }
    }

    /// Entries in an L2 table.
    pub fn l2_entries(&self) -> u64 {
        self.cluster_size() / self.l2_entry_size()
    }

    /// Whether guest data is in an external data file.
    pub fn has_data_file(&self) -> bool {
        self.incompatible_features & incompatible::DATA_FILE != 0
    }

    /// How guest data lies in the data file, if there is one.
    pub fn data_file_layout(&self) -> Option<DataFileLayout> {
        let layout = if self.incompatible_features & incompatible::PACKED != 0 {
            DataFileLayout::Packed
        } else {
            DataFileLayout::Standard
        };
        self.has_data_file().then_some(layout)
    }

    /// Whether the data file is promised to be a valid raw image.
    pub fn data_file_is_raw(&self) -> bool {
        self.autoclear_features & autoclear::DATA_FILE_RAW != 0
    }

    /// Says where the persistent bitmaps are, and that they are up to date.
    pub fn set_bitmaps(&mut self, bitmaps: Option<Bitmaps>) {
        self.extensions.bitmaps = bitmaps;
        self.autoclear_features &= !autoclear::BITMAPS;
        if bitmaps.is_some() {
            self.autoclear_features |= autoclear::BITMAPS;
        }
    }

    /// Keeps what the backing file is like now, or nothing of that.
    pub fn set_base_stamp(&mut self, stamp: Option<Stamp>) {
        self.autoclear_features &= !autoclear::BASE_STAMP;
        if stamp.is_some() {
            self.autoclear_features |= autoclear::BASE_STAMP;
        }
        self.extensions.base_stamp = stamp;
    }

    /// Clears what this version does not know and will not keep up, as on any first write.
    pub fn forget_unknown_autoclear(&mut self) {
        self.autoclear_features &= autoclear::KNOWN;
    }

    /// Whether refcounts may be wrong, since the image was not closed.
    pub fn is_dirty(&self) -> bool {
        self.incompatible_features & incompatible::DIRTY != 0
    }

    /// Whether L2 entries have 16 bytes.
    pub fn has_extended_l2(&self) -> bool {
        self.incompatible_features & incompatible::EXTENDED_L2 != 0
    }

    /// Refuses what this version does not implement.
    ///
    /// # Errors
    /// [`Error::Unsupported`] names the feature; [`Error::Invalid`] if the image may not be
    /// written because it is marked as corrupt, or its data file bits contradict each other.
    pub fn check_supported(&self, file: &Path, read_only: bool) -> Result<()> {
        let has = |bit| self.incompatible_features & bit != 0;
        if has(incompatible::CORRUPT) && !read_only {
            let reason = "qcow2: Image is corrupt; cannot be opened read/write";
            let value = self.incompatible_features;
            return Err(Error::invalid(file, "incompatible_features", value, reason));
        }
        if self.data_file_is_raw() && !self.has_data_file() {
            let reason = "data-file-raw requires a data file";
            return Err(Error::invalid(
                file,
                "autoclear_features",
                self.autoclear_features,
                reason,
            ));
        }
        if has(incompatible::PACKED) && self.data_file_is_raw() {
            let reason = "the packed layout requires a data file that is not raw";
            let value = self.incompatible_features;
            return Err(Error::invalid(file, "incompatible_features", value, reason));
        }
        if self.backing_file.is_some() && self.data_file_is_raw() {
            let reason = "data-file-raw is incompatible with backing files";
            let value = self.autoclear_features;
            return Err(Error::invalid(file, "autoclear_features", value, reason));
        }
        self.check_encryption(file)
    }

    /// Refuses an encrypted image.
    pub fn check_encryption(&self, file: &Path) -> Result<()> {
        if self.crypt_method != 0 {
            return Err(Error::unsupported(file, "encryption"));
        }
        Ok(())
    }

    /// Refuses internal snapshots with an external data file, which has no refcounts.
    pub fn check_snapshots(&self, file: &Path) -> Result<()> {
        if self.nb_snapshots == 0 || !self.has_data_file() {
            return Ok(());
        }
        let reason = "an image with an external data file cannot have internal snapshots";
        let count = self.nb_snapshots.into();
        Err(Error::invalid(file, "nb_snapshots", count, reason))
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    const FILE: &str = "disk.qcow2";

    /// A header of the smallest clusters that is valid.
    pub(in super::super) fn sample() -> Header {
        Header {
            version: 3,
            backing_file: None,
            cluster_bits: 9,
            size: 1 << 20,
            crypt_method: 0,
            l1_size: 32,
            l1_table_offset: 0x600,
            refcount_table_offset: 0x200,
            refcount_table_clusters: 1,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: incompatible::DATA_FILE,
            compatible_features: 0,
            autoclear_features: autoclear::DATA_FILE_RAW,
            refcount_order: 4,
            header_length: 112,
            compression_type: 0,
            unknown_fields: vec![],
            extensions: Extensions {
                data_file: Some(b"disk.raw".to_vec()),
                ..Extensions::default()
            },
        }
    }

    #[test]
    fn what_is_encoded_is_parsed_back() {
        let headers = [
            sample(),
            Header {
                unknown_fields: vec![7; 24],
                header_length: 136,
                ..sample()
            },
            Header {
                version: 2,
                header_length: 72,
                backing_file: Some(b"base".to_vec()),
                incompatible_features: 0,
                autoclear_features: 0,
                extensions: Extensions {
                    backing_format: Some(b"raw".to_vec()),
                    unknown: vec![(5, b"five!".to_vec())],
                    ..Extensions::default()
                },
                ..sample()
            },
        ];
        for header in headers {
            assert_eq!(
                Header::parse(
                    &header.encode(Path::new(FILE)).unwrap(),
                    Path::new(FILE),
                    Purpose::Use
                )
                .unwrap(),
                header
            );
        }
    }

    #[test]
    fn a_header_that_does_not_fit_is_an_error() {
        let mut header = sample();
        header.extensions.data_file = Some(vec![b'x'; 400]);
        assert!(matches!(
            header.encode(Path::new(FILE)),
            Err(Error::HeaderFull {
                cluster_size: 512,
                ..
            })
        ));
    }

    #[test]
    fn what_is_not_implemented_is_refused_by_name() {
        let refused = |change: &dyn Fn(&mut Header), read_only| {
            let mut header = sample();
            change(&mut header);
            header
                .check_supported(Path::new(FILE), read_only)
                .map_err(|e| e.to_string())
        };
        assert_eq!(refused(&|_| (), false), Ok(()));
        let encrypted: &dyn Fn(&mut Header) = &|h| h.crypt_method = 2;
        assert_eq!(
            refused(encrypted, true).unwrap_err(),
            "'disk.qcow2': Unsupported qcow2 feature(s): encryption"
        );
        let corrupt: &dyn Fn(&mut Header) = &|h| h.incompatible_features |= incompatible::CORRUPT;
        assert_eq!(refused(corrupt, true), Ok(()));
        assert!(refused(corrupt, false).is_err());
    }
}
