//! From the first cluster of an image to a valid [`Header`].
//!
//! What is checked, in which order, and the words for it are those of QEMU, so that tools can
//! print the same text.

use std::ops::Range;
use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::extension::{Context, Extensions, FeatureName};
use super::header::{
    CLUSTER_BITS, Header, MAX_L1_SIZE, MAX_REFCOUNT_TABLE_SIZE, autoclear, incompatible,
};
use super::snapshot;
use crate::{Error, Result, Storage};

/// "QFI\xfb", the first four bytes of an image.
pub(super) const MAGIC: u32 = 0x5146_49fb;

/// Most internal snapshots that an image may have.
pub(super) const MAX_SNAPSHOTS: u32 = 65536;
/// Longest name of a backing file in bytes.
pub(super) const MAX_BACKING_FILE: usize = 1023;

/// What a header is read for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Purpose {
    /// To serve the disk.
    Use,
    /// To report what is wrong.
    Check,
}

/// The fixed fields as they lie in the file.
#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
pub(super) struct Layout {
    pub magic: U32,
    pub version: U32,
    pub backing_file_offset: U64,
    pub backing_file_size: U32,
    pub cluster_bits: U32,
    pub size: U64,
    pub crypt_method: U32,
    pub l1_size: U32,
    pub l1_table_offset: U64,
    pub refcount_table_offset: U64,
    pub refcount_table_clusters: U32,
    pub nb_snapshots: U32,
    pub snapshots_offset: U64,
    pub incompatible_features: U64,
    pub compatible_features: U64,
    pub autoclear_features: U64,
    pub refcount_order: U32,
    pub header_length: U32,
    pub compression_type: u8,
    pub padding: [u8; 7],
}

/// Where fields begin in the header, in bytes, that change in an image in use. Those that change
/// together follow each other, in one sector.
pub(super) mod offset {
    use super::Layout;
    use std::mem::offset_of;

    /// `size`; `crypt_method`, `l1_size` and `l1_table_offset` follow it.
    pub const SIZE: u64 = offset_of!(Layout, size) as u64;
    /// `l1_size`; `l1_table_offset` follows it.
    pub const L1_TABLE: u64 = offset_of!(Layout, l1_size) as u64;
    /// `refcount_table_offset`; `refcount_table_clusters` follows it.
    pub const REFCOUNT_TABLE: u64 = offset_of!(Layout, refcount_table_offset) as u64;
    /// `nb_snapshots`; `snapshots_offset` follows it.
    pub const SNAPSHOTS: u64 = offset_of!(Layout, nb_snapshots) as u64;
    /// `incompatible_features`.
    pub const INCOMPATIBLE_FEATURES: u64 = offset_of!(Layout, incompatible_features) as u64;
    /// `autoclear_features`.
    pub const AUTOCLEAR_FEATURES: u64 = offset_of!(Layout, autoclear_features) as u64;
}

/// Bytes of the fixed fields in version 2.
pub(super) const LENGTH_V2: usize = 72;
/// Least length of the fixed fields in version 3: `compression_type` may be missing.
const MIN_LENGTH_V3: usize = 104;
/// Length of the fixed fields in version 3, as it is written.
pub(super) const LENGTH_V3: usize = size_of::<Layout>();

impl Header {
    pub(super) fn read_for(storage: &dyn Storage, file: &Path, purpose: Purpose) -> Result<Self> {
        let read = |buf: &mut [u8]| {
            storage
                .read_bytes_at(buf, 0)
                .map_err(|e| Error::io_at(file, "read the header of", 0, e))
        };
        let mut layout = Layout::new_zeroed();
        read(layout.as_mut_bytes())?;
        let cluster_size = layout.check_start(file)?;
        let mut cluster = vec![0; cluster_size];
        read(&mut cluster)?;
        Self::parse(&cluster, file, purpose)
    }

    /// Parses the first cluster of an image.
    pub(super) fn parse(cluster: &[u8], file: &Path, purpose: Purpose) -> Result<Self> {
        let (layout, _) = Layout::read_from_prefix(cluster)
            .map_err(|_| Error::invalid(file, "header_length", 0, "qcow2 header too short"))?;
        layout.check_start(file)?;
        let backing_offset = layout.backing_file_offset.get();
        let (header, extension_bytes) = layout.header(cluster, file)?;
        header.check_compression_type(file)?;
        header.check_incompatible_features(file, extension_bytes)?;
        header.check_refcount_table(file, purpose)?;
        header.check_snapshot_table(file)?;
        header.check_l1_table(file)?;
        if header.crypt_method > 2 {
            let method = header.crypt_method;
            let reason = format!("Unsupported encryption method {method}");
            return Err(Error::invalid(file, "crypt_method", method.into(), reason));
        }
        let context = Context {
            file,
            cluster_size: header.cluster_size(),
            luks: header.crypt_method == 2,
            bitmaps_valid: header.autoclear_features & autoclear::BITMAPS != 0,
            base_stamp_valid: header.autoclear_features & autoclear::BASE_STAMP != 0,
        };
        let extensions = Extensions::parse(extension_bytes, &context)?;
        if header.crypt_method == 2 && extensions.crypto.is_none() {
            let reason = "Missing CRYPTO header for crypt method 2";
            return Err(Error::invalid(file, "crypt_method", 2, reason));
        }
        let backing_file = layout.backing_file(backing_offset, cluster, file)?;
        Ok(Self {
            backing_file,
            extensions,
            ..header
        })
    }

    fn check_compression_type(&self, file: &Path) -> Result<()> {
        let bit = self.incompatible_features & incompatible::COMPRESSION != 0;
        let reason = match (self.compression_type, bit) {
            (0, false) | (1, true) => return Ok(()),
            (0, true) => {
                "qcow2: Compression type incompatible feature bit must not be set".to_owned()
            }
            (1, false) => "qcow2: Compression type incompatible feature bit must be set".to_owned(),
            (other, _) => format!("qcow2: unknown compression type: {other}"),
        };
        let value = self.compression_type.into();
        Err(Error::invalid(file, "compression_type", value, reason))
    }

    fn check_incompatible_features(&self, file: &Path, extension_bytes: &[u8]) -> Result<()> {
        // Without a data file the bit is not ours.
        let packed = match self.has_data_file() {
            true => incompatible::PACKED,
            false => 0,
        };
        let unknown = self.incompatible_features & !(incompatible::PUBLISHED | packed);
        if unknown != 0 {
            let names = Extensions::feature_names(extension_bytes);
            return Err(Error::unsupported(file, &name_bits(unknown, &names)));
        }
        if self.has_extended_l2() && self.cluster_size() / 32 < 512 {
            let size = self.cluster_size() / 32;
            let reason = format!("Unsupported subcluster size: {size}");
            return Err(Error::invalid(
                file,
                "cluster_bits",
                self.cluster_bits.into(),
                reason,
            ));
        }
        if self.refcount_order > 6 {
            let reason = "Reference count entry width too large; may not exceed 64 bits";
            return Err(Error::invalid(
                file,
                "refcount_order",
                self.refcount_order.into(),
                reason,
            ));
        }
        Ok(())
    }

    fn check_refcount_table(&self, file: &Path, purpose: Purpose) -> Result<()> {
        let clusters = u64::from(self.refcount_table_clusters);
        let wrong = |field, value, reason: &str| Err(Error::invalid(file, field, value, reason));
        if clusters == 0 && purpose == Purpose::Use {
            let reason = "Image does not contain a reference count table";
            return wrong("refcount_table_clusters", 0, reason);
        }
        if clusters > MAX_REFCOUNT_TABLE_SIZE / self.cluster_size() {
            let reason = "Reference count table too large";
            return wrong("refcount_table_clusters", clusters, reason);
        }
        if !self.fits(self.refcount_table_offset, clusters * self.cluster_size()) {
            let reason = "Reference count table offset invalid";
            return wrong("refcount_table_offset", self.refcount_table_offset, reason);
        }
        Ok(())
    }

    fn check_snapshot_table(&self, file: &Path) -> Result<()> {
        let count = self.nb_snapshots;
        if count > MAX_SNAPSHOTS {
            return Err(Error::invalid(
                file,
                "nb_snapshots",
                count.into(),
                "Snapshot table too large",
            ));
        }
        if !self.fits(
            self.snapshots_offset,
            u64::from(count) * snapshot::MIN_ENTRY_SIZE,
        ) {
            let reason = "Snapshot table offset invalid";
            return Err(Error::invalid(
                file,
                "snapshots_offset",
                self.snapshots_offset,
                reason,
            ));
        }
        Ok(())
    }

    fn check_l1_table(&self, file: &Path) -> Result<()> {
        let bytes = u64::from(self.l1_size) * 8;
        let wrong = |field, value, reason: &str| Err(Error::invalid(file, field, value, reason));
        if bytes > MAX_L1_SIZE {
            return wrong("l1_size", self.l1_size.into(), "Active L1 table too large");
        }
        if !self.fits(self.l1_table_offset, bytes) {
            let reason = "Active L1 table offset invalid";
            return wrong("l1_table_offset", self.l1_table_offset, reason);
        }
        let needed = self.size.div_ceil(self.cluster_size() * self.l2_entries());
        if needed > i32::MAX as u64 {
            return wrong("size", self.size, "Image is too big");
        }
        if u64::from(self.l1_size) < needed {
            return wrong("l1_size", self.l1_size.into(), "L1 table is too small");
        }
        Ok(())
    }

    /// Whether a table of `len` bytes may lie at `offset`.
    fn fits(&self, offset: u64, len: u64) -> bool {
        offset.is_multiple_of(self.cluster_size())
            && offset
                .checked_add(len)
                .is_some_and(|end| end <= i64::MAX as u64)
    }
}

impl Layout {
    /// Checks the fields that tell how long the rest is; returns the cluster size.
    fn check_start(&self, file: &Path) -> Result<usize> {
        if self.magic.get() != MAGIC {
            return Err(Error::NotQcow2 {
                file: file.to_owned(),
                found: self.magic.get(),
            });
        }
        let version = self.version.get();
        if !(2..=3).contains(&version) {
            let reason = format!("Unsupported qcow2 version {version}");
            return Err(Error::invalid(file, "version", version.into(), reason));
        }
        let bits = self.cluster_bits.get();
        if !CLUSTER_BITS.contains(&bits) {
            let reason = format!("Unsupported cluster size: 2^{bits}");
            return Err(Error::invalid(file, "cluster_bits", bits.into(), reason));
        }
        Ok(1 << bits)
    }

    /// The header without extensions and backing file, and the bytes of the extensions.
    fn header<'a>(&self, cluster: &'a [u8], file: &Path) -> Result<(Header, &'a [u8])> {
        let is_v3 = self.version.get() >= 3;
        let length = if is_v3 {
            self.header_length.get() as usize
        } else {
            LENGTH_V2
        };
        if is_v3 && length < MIN_LENGTH_V3 {
            return Err(Error::invalid(
                file,
                "header_length",
                length as u64,
                "qcow2 header too short",
            ));
        }
        if length > cluster.len() {
            let reason = "qcow2 header exceeds cluster size";
            return Err(Error::invalid(file, "header_length", length as u64, reason));
        }
        let backing_offset = self.backing_file_offset.get();
        if backing_offset > cluster.len() as u64 {
            let reason = "Invalid backing file offset";
            return Err(Error::invalid(
                file,
                "backing_file_offset",
                backing_offset,
                reason,
            ));
        }
        let v3 = |value: u64| if is_v3 { value } else { 0 };
        let header = Header {
            version: self.version.get(),
            backing_file: None,
            cluster_bits: self.cluster_bits.get(),
            size: self.size.get(),
            crypt_method: self.crypt_method.get(),
            l1_size: self.l1_size.get(),
            l1_table_offset: self.l1_table_offset.get(),
            refcount_table_offset: self.refcount_table_offset.get(),
            refcount_table_clusters: self.refcount_table_clusters.get(),
            nb_snapshots: self.nb_snapshots.get(),
            snapshots_offset: self.snapshots_offset.get(),
            incompatible_features: v3(self.incompatible_features.get()),
            compatible_features: v3(self.compatible_features.get()),
            autoclear_features: v3(self.autoclear_features.get()),
            refcount_order: if is_v3 { self.refcount_order.get() } else { 4 },
            header_length: length as u32,
            compression_type: if length > MIN_LENGTH_V3 {
                self.compression_type
            } else {
                0
            },
            unknown_fields: cluster.get(LENGTH_V3..length).unwrap_or_default().to_vec(),
            extensions: Extensions::default(),
        };
        let extensions = self.extensions(cluster.len());
        Ok((header, cluster.get(extensions).unwrap_or_default()))
    }

    /// Where the extensions are in a first cluster of `cluster_size` bytes.
    pub(super) fn extensions(&self, cluster_size: usize) -> Range<usize> {
        let start = match self.version.get() {
            2 => LENGTH_V2,
            _ => self.header_length.get() as usize,
        };
        match self.backing_file_offset.get() as usize {
            0 => start..cluster_size,
            name => start..name,
        }
    }

    /// Where the name of the backing file is.
    pub(super) fn backing_name(&self) -> Range<usize> {
        let start = self.backing_file_offset.get() as usize;
        start..start.saturating_add(self.backing_file_size.get() as usize)
    }

    fn backing_file(&self, offset: u64, cluster: &[u8], file: &Path) -> Result<Option<Vec<u8>>> {
        if offset == 0 {
            return Ok(None);
        }
        let len = u64::from(self.backing_file_size.get());
        if len > (MAX_BACKING_FILE as u64).min(cluster.len() as u64 - offset) {
            let reason = "Backing file name too long";
            return Err(Error::invalid(file, "backing_file_size", len, reason));
        }
        Ok(Some(
            cluster[offset as usize..(offset + len) as usize].to_vec(),
        ))
    }
}

/// The image's own names of incompatible feature bits, and the bits that it does not name.
fn name_bits(mut bits: u64, names: &[FeatureName]) -> String {
    let mut found = Vec::new();
    for entry in names
        .iter()
        .filter(|entry| entry.kind == 0 && entry.bit < 64)
    {
        let mask = 1 << entry.bit;
        if bits & mask != 0 {
            bits &= !mask;
            found.push(String::from_utf8_lossy(&entry.name).into_owned());
        }
    }
    if bits != 0 {
        found.push(format!("Unknown incompatible feature: {bits:x}"));
    }
    found.join(", ")
}

#[cfg(test)]
mod tests {
    use super::super::header::tests::sample;
    use super::*;
    use proptest::prelude::*;

    const FILE: &str = "disk.qcow2";

    fn parse(cluster: &[u8]) -> Result<Header> {
        Header::parse(cluster, Path::new(FILE), Purpose::Use)
    }

    fn reason(header: &Header) -> String {
        match parse(&header.encode(Path::new(FILE)).unwrap()).unwrap_err() {
            Error::Invalid { reason, .. } => reason,
            Error::Unsupported { feature, .. } => feature,
            other => other.to_string(),
        }
    }

    #[test]
    fn forbidden_values_are_refused_by_name() {
        let refused = |change: &dyn Fn(&mut Header)| {
            let mut header = sample();
            change(&mut header);
            reason(&header)
        };
        assert_eq!(
            refused(&|h| h.refcount_table_clusters = 0),
            "Image does not contain a reference count table"
        );
        assert_eq!(
            refused(&|h| h.refcount_table_clusters = 16385),
            "Reference count table too large"
        );
        assert_eq!(
            refused(&|h| h.refcount_table_offset = 0x201),
            "Reference count table offset invalid"
        );
        assert_eq!(
            refused(&|h| h.refcount_table_offset = 1 << 63),
            "Reference count table offset invalid"
        );
        assert_eq!(
            refused(&|h| h.nb_snapshots = 65537),
            "Snapshot table too large"
        );
        assert_eq!(
            refused(&|h| h.snapshots_offset = 1),
            "Snapshot table offset invalid"
        );
        assert_eq!(
            refused(&|h| h.l1_size = 4194305),
            "Active L1 table too large"
        );
        assert_eq!(
            refused(&|h| h.l1_table_offset = u64::MAX - 511),
            "Active L1 table offset invalid"
        );
        assert_eq!(refused(&|h| h.size = u64::MAX), "Image is too big");
        assert_eq!(refused(&|h| h.size += 1), "L1 table is too small");
        assert_eq!(
            refused(&|h| h.crypt_method = 3),
            "Unsupported encryption method 3"
        );
        assert_eq!(
            refused(&|h| h.refcount_order = 7),
            "Reference count entry width too large; may not exceed 64 bits"
        );
        assert_eq!(
            refused(&|h| h.compression_type = 2),
            "qcow2: unknown compression type: 2"
        );
        assert_eq!(
            refused(&|h| h.incompatible_features |= incompatible::EXTENDED_L2),
            "Unsupported subcluster size: 16"
        );
        assert_eq!(
            refused(&|h| h.incompatible_features |= 1 << 40 | 1 << 63),
            "Unknown incompatible feature: 8000010000000000"
        );
    }

    #[test]
    fn unknown_features_are_called_what_the_image_calls_them() {
        let names = [
            (0, 40, "first"),
            (1, 41, "compatible"),
            (0, 42, "second"),
            (0, 99, "none"),
        ]
        .map(|(kind, bit, name)| FeatureName {
            kind,
            bit,
            name: name.into(),
        });
        assert_eq!(
            name_bits(1 << 40 | 1 << 41 | 1 << 42, &names),
            "first, second, Unknown incompatible feature: 20000000000"
        );
    }

    /// Bit 62 means the packed layout where there is a data file, and anything elsewhere.
    #[test]
    fn a_bit_of_ours_needs_a_data_file() {
        let header = Header {
            incompatible_features: incompatible::PACKED,
            ..sample()
        };
        let cluster = header.encode(Path::new(FILE)).unwrap();
        let error = parse(&cluster).unwrap_err().to_string();
        assert!(error.contains("Unsupported qcow2 feature(s)"), "{error}");
    }

    #[test]
    fn the_start_decides_whether_it_is_an_image() {
        let mut cluster = sample().encode(Path::new(FILE)).unwrap();
        cluster[7] = 4;
        assert_eq!(
            parse(&cluster).unwrap_err().to_string(),
            "'disk.qcow2': Unsupported qcow2 version 4 (version is 0x4)"
        );
        cluster[0] = 0;
        assert!(matches!(
            parse(&cluster),
            Err(Error::NotQcow2 {
                found: 0x4649fb,
                ..
            })
        ));
        assert!(parse(&[]).is_err());
    }

    proptest! {
        /// Whatever the bytes are, they are parsed or refused; what is parsed can be written.
        #[test]
        fn no_bytes_panic(
            changes in proptest::collection::vec((0usize..512, any::<u8>()), 1..12),
            fields in proptest::collection::vec((0usize..14, any::<u64>(), 0u32..64), 0..3),
            length in 0usize..=512,
        ) {
            let mut cluster = sample().encode(Path::new(FILE)).unwrap();
            for (at, byte) in changes {
                cluster[if byte % 2 == 0 { at % 128 } else { at }] = byte;
            }
            for (field, value, shift) in fields {
                cluster[8 * field..8 * field + 8].copy_from_slice(&(value >> shift).to_be_bytes());
            }
            cluster.truncate(length);
            cluster.resize(512, 0);
            for purpose in [Purpose::Use, Purpose::Check] {
                if let Ok(header) = Header::parse(&cluster, Path::new(FILE), purpose) {
                    let _ = header.check_supported(Path::new(FILE), false);
                    let _ = header.encode(Path::new(FILE));
                }
            }
        }
    }
}
