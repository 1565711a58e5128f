//! Header extensions (qcow2 specification, "Header extensions").

use std::ops::Range;
use std::path::Path;

use zerocopy::byteorder::big_endian::{U32, U64};
use zerocopy::{FromBytes, FromZeros, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::stamp;
use crate::{Error, Result, Stamp};

const END: u32 = 0;
const BACKING_FORMAT: u32 = 0xe279_2aca;
const FEATURE_NAMES: u32 = 0x6803_f857;
const BITMAPS: u32 = 0x2385_2875;
const CRYPTO: u32 = 0x0537_be77;
const DATA_FILE: u32 = 0x4441_5441;
/// Ours, "BSTM": see `stamp`.
const BASE_STAMP: u32 = 0x4253_544d;

/// Longest name of a backing format in bytes.
const MAX_BACKING_FORMAT: usize = 15;
const MAX_BITMAPS: u32 = 65535;
const MAX_BITMAP_DIRECTORY_SIZE: u64 = MAX_BITMAPS as u64 * 1024;

/// The optional parts of a header.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Extensions {
    /// Name of the backing file's format.
    pub backing_format: Option<Vec<u8>>,
    /// Name of the external data file. Untrusted; see [`policy`](super::policy).
    pub data_file: Option<Vec<u8>>,
    /// Where the LUKS header is.
    pub crypto: Option<Crypto>,
    /// Where the persistent bitmaps are; `None` also if they are not valid any more.
    pub bitmaps: Option<Bitmaps>,
    /// Whether there are bitmaps that a program without support for them has made stale.
    pub stale_bitmaps: bool,
    /// What the backing file was like; `None` also if that does not count any more.
    pub base_stamp: Option<Stamp>,
    /// The image's own names of feature bits.
    pub feature_names: Vec<FeatureName>,
    /// Type and content of every other extension, in the order in which they were read.
    pub unknown: Vec<(u32, Vec<u8>)>,
}

/// Content of the crypto header extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Crypto {
    /// Offset of the LUKS header in the image file in bytes.
    pub offset: u64,
    /// Length of the LUKS header in bytes.
    pub length: u64,
}

/// Content of the bitmaps extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Bitmaps {
    /// Number of entries of the bitmap directory.
    pub count: u32,
    /// Length of the bitmap directory in bytes.
    pub directory_size: u64,
    /// Offset of the bitmap directory in the image file in bytes.
    pub directory_offset: u64,
}

/// One entry of the feature name table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct FeatureName {
    /// 0 incompatible, 1 compatible, 2 autoclear.
    pub kind: u8,
    /// Number of the bit.
    pub bit: u8,
    /// What it is called, without padding.
    pub name: Vec<u8>,
}

/// What the validity of an extension depends on in the fixed part of the header.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Context<'a> {
    pub file: &'a Path,
    pub cluster_size: u64,
    pub luks: bool,
    pub bitmaps_valid: bool,
    pub base_stamp_valid: bool,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct ExtensionHeader {
    kind: U32,
    len: U32,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct CryptoLayout {
    offset: U64,
    length: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct BitmapsLayout {
    count: U32,
    reserved: U32,
    directory_size: U64,
    directory_offset: U64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout, Unaligned)]
#[repr(C)]
struct FeatureNameLayout {
    kind: u8,
    bit: u8,
    name: [u8; 46],
}

/// The names that QEMU gives to the feature bits.
const KNOWN_FEATURES: [(u8, u8, &str); 8] = [
    (0, 0, "dirty bit"),
    (0, 1, "corrupt bit"),
    (0, 2, "external data file"),
    (0, 3, "compression type"),
    (0, 4, "extended L2 entries"),
    (1, 0, "lazy refcounts"),
    (2, 0, "bitmaps"),
    (2, 1, "raw external data"),
];

/// So that a program that does not know it can say what it misses.
const PACKED_DATA_FILE: (u8, u8, &str) = (0, 62, "packed data file");

/// What a feature name table is to contain; it is left out if that is nothing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct FeatureNames {
    /// All features of the published specification.
    pub published: bool,
    /// The packed layout of data files.
    pub packed: bool,
}

impl Extensions {
    /// Reads the extensions in `bytes`, which lie between the fixed header and the backing file's
    /// name (or the end of the cluster).
    pub fn parse(bytes: &[u8], context: &Context<'_>) -> Result<Self> {
        let mut found = Self::default();
        for item in Items(bytes) {
            match item {
                Ok((kind, data)) => found.take(kind, data, context)?,
                Err(len) => {
                    return Err(context.invalid(len.into(), "Header extension too large"));
                }
            }
        }
        Ok(found)
    }

    /// Only the feature names, of a header that may be wrong in every other respect.
    pub fn feature_names(bytes: &[u8]) -> Vec<FeatureName> {
        Items(bytes)
            .map_while(|item| item.ok())
            .filter(|(kind, _)| *kind == FEATURE_NAMES)
            .flat_map(|(_, data)| parse_feature_names(data))
            .collect()
    }

    fn take(&mut self, kind: u32, data: &[u8], context: &Context<'_>) -> Result<()> {
        match kind {
            BACKING_FORMAT => {
                if data.len() > MAX_BACKING_FORMAT {
                    let len = data.len();
                    let reason = format!("ERROR: ext_backing_format: len={len} too large (>=16)");
                    return Err(context.invalid(len as u64, reason));
                }
                self.backing_format = Some(data.to_vec());
            }
            DATA_FILE => self.data_file = Some(data.to_vec()),
            FEATURE_NAMES => self.feature_names = parse_feature_names(data),
            CRYPTO => self.crypto = Some(parse_crypto(data, context)?),
            BITMAPS if context.bitmaps_valid || data.len() != size_of::<BitmapsLayout>() => {
                self.bitmaps = Some(parse_bitmaps(data, context)?);
            }
            BITMAPS => self.stale_bitmaps = true,
            BASE_STAMP if context.base_stamp_valid => {
                let stamp = stamp::decode(data);
                let wrong =
                    || context.invalid(data.len() as u64, "wrong stamp of the backing file");
                self.base_stamp = Some(stamp.ok_or_else(wrong)?);
            }
            // A program without support for it has written to the image.
            BASE_STAMP => {}
            _ => self.unknown.push((kind, data.to_vec())),
        }
        Ok(())
    }

    /// Appends the extensions in QEMU's order, with the end marker. Stale bitmaps and stamps are
    /// dropped.
    ///
    /// `with_data_file`: whether the image has an external data file, without which a name in the
    /// header means nothing.
    pub fn encode(&self, out: &mut Vec<u8>, with_data_file: bool, names: FeatureNames) {
        if let Some(format) = &self.backing_format {
            append(out, BACKING_FORMAT, format);
        }
        if let Some(name) = self.data_file.as_ref().filter(|_| with_data_file) {
            append(out, DATA_FILE, name);
        }
        if let Some(crypto) = self.crypto {
            let data = CryptoLayout {
                offset: crypto.offset.into(),
                length: crypto.length.into(),
            };
            append(out, CRYPTO, data.as_bytes());
        }
        let names = encode_feature_names(names);
        if !names.is_empty() {
            append(out, FEATURE_NAMES, &names);
        }
        if let Some(bitmaps) = self.bitmaps {
            append(out, BITMAPS, bitmaps.layout().as_bytes());
        }
        if let Some(stamp) = &self.base_stamp {
            append(out, BASE_STAMP, &stamp::encode(stamp));
        }
        for (kind, data) in &self.unknown {
            append(out, *kind, data);
        }
        append(out, END, &[]);
    }
}

/// Where in `bytes` the extensions are, and the end marker. What a feature name table says is left out:
/// it tells nothing of the image.
pub(crate) fn places(bytes: &[u8]) -> Vec<Range<usize>> {
    const HEADER: usize = size_of::<ExtensionHeader>();
    let mut places = Vec::new();
    let mut at = 0;
    for (kind, data) in Items(bytes).map_while(|item| item.ok()) {
        let told = if kind == FEATURE_NAMES { 0 } else { data.len() };
        places.push(at..at + HEADER + told);
        at += HEADER + data.len().next_multiple_of(8);
    }
    places.push(at..at + HEADER);
    places
}

/// Appends an extension of `len` bytes, of which there are 8 at least and a multiple of 8, that says
/// nothing, and that no program keeps when it writes the header: a feature name table.
pub(crate) fn append_gap(out: &mut Vec<u8>, len: usize) {
    let names = len.saturating_sub(size_of::<ExtensionHeader>());
    append(out, FEATURE_NAMES, &vec![0; names]);
}

impl Bitmaps {
    fn layout(self) -> BitmapsLayout {
        BitmapsLayout {
            count: self.count.into(),
            reserved: 0.into(),
            directory_size: self.directory_size.into(),
            directory_offset: self.directory_offset.into(),
        }
    }
}

impl Context<'_> {
    fn invalid(&self, value: u64, reason: impl Into<String>) -> Error {
        Error::invalid(self.file, "header extension", value, reason)
    }
}

/// Type and content of each extension in a byte range; the claimed length of one that does not
/// fit ends the iteration.
struct Items<'a>(&'a [u8]);

impl<'a> Iterator for Items<'a> {
    type Item = std::result::Result<(u32, &'a [u8]), u32>;

    fn next(&mut self) -> Option<Self::Item> {
        let bytes = std::mem::take(&mut self.0);
        if bytes.is_empty() {
            return None;
        }
        let Ok((header, rest)) = ExtensionHeader::ref_from_prefix(bytes) else {
            return Some(Err(bytes.len() as u32));
        };
        let len = header.len.get();
        let Some((data, rest)) = rest.split_at_checked(len as usize) else {
            return Some(Err(len));
        };
        if header.kind.get() == END {
            return None;
        }
        let padding = data.len().next_multiple_of(8) - data.len();
        self.0 = rest.get(padding..).unwrap_or_default();
        Some(Ok((header.kind.get(), data)))
    }
}

fn append(out: &mut Vec<u8>, kind: u32, data: &[u8]) {
    let header = ExtensionHeader {
        kind: kind.into(),
        len: (data.len() as u32).into(),
    };
    out.extend_from_slice(header.as_bytes());
    out.extend_from_slice(data);
    out.resize(out.len() + data.len().next_multiple_of(8) - data.len(), 0);
}

fn parse_crypto(data: &[u8], context: &Context<'_>) -> Result<Crypto> {
    let len = data.len() as u64;
    if !context.luks {
        let reason = "CRYPTO header extension only expected with LUKS encryption method";
        return Err(context.invalid(len, reason));
    }
    let Ok(layout) = CryptoLayout::ref_from_bytes(data) else {
        let reason = format!("CRYPTO header extension size {len}, but expected size 16");
        return Err(context.invalid(len, reason));
    };
    let (offset, length) = (layout.offset.get(), layout.length.get());
    if !offset.is_multiple_of(context.cluster_size) {
        let reason = format!(
            "Encryption header offset '{offset}' is not a multiple of cluster size '{}'",
            context.cluster_size
        );
        return Err(context.invalid(offset, reason));
    }
    Ok(Crypto { offset, length })
}

fn parse_bitmaps(data: &[u8], context: &Context<'_>) -> Result<Bitmaps> {
    let invalid =
        |value: u64, reason: &str| Err(context.invalid(value, format!("bitmaps_ext: {reason}")));
    let Ok(layout) = BitmapsLayout::ref_from_bytes(data) else {
        return invalid(data.len() as u64, "Invalid extension length");
    };
    let bitmaps = Bitmaps {
        count: layout.count.get(),
        directory_size: layout.directory_size.get(),
        directory_offset: layout.directory_offset.get(),
    };
    let Bitmaps {
        count,
        directory_size,
        directory_offset,
    } = bitmaps;
    if layout.reserved.get() != 0 {
        return invalid(layout.reserved.get().into(), "Reserved field is not zero");
    }
    if count > MAX_BITMAPS {
        let reason = format!(
            "Image has {count} bitmaps, exceeding the QEMU supported maximum of {MAX_BITMAPS}"
        );
        return invalid(count.into(), &reason);
    }
    if count == 0 {
        return Err(context.invalid(0, "found bitmaps extension with zero bitmaps"));
    }
    if !directory_offset.is_multiple_of(context.cluster_size) {
        return invalid(directory_offset, "invalid bitmap directory offset");
    }
    if directory_size > MAX_BITMAP_DIRECTORY_SIZE {
        let reason = format!(
            "bitmap directory size ({directory_size}) exceeds the maximum supported size \
             ({MAX_BITMAP_DIRECTORY_SIZE})"
        );
        return invalid(directory_size, &reason);
    }
    Ok(bitmaps)
}

/// What the last entry lacks is zero, as for QEMU.
fn parse_feature_names(data: &[u8]) -> Vec<FeatureName> {
    data.chunks(size_of::<FeatureNameLayout>())
        .map(|bytes| {
            let mut entry = FeatureNameLayout::new_zeroed();
            entry.as_mut_bytes()[..bytes.len()].copy_from_slice(bytes);
            let name = entry.name.into_iter().take_while(|&byte| byte != 0);
            FeatureName {
                kind: entry.kind,
                bit: entry.bit,
                name: name.collect(),
            }
        })
        .collect()
}

fn encode_feature_names(names: FeatureNames) -> Vec<u8> {
    let published = KNOWN_FEATURES.iter().filter(|_| names.published);
    let packed = Some(&PACKED_DATA_FILE).filter(|_| names.packed);
    let mut table = Vec::new();
    for &(kind, bit, text) in published.chain(packed) {
        let mut name = [0; 46];
        name[..text.len()].copy_from_slice(text.as_bytes());
        table.extend_from_slice(FeatureNameLayout { kind, bit, name }.as_bytes());
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FileStamp, Modified};
    use std::path::PathBuf;

    fn parse(bytes: &[u8]) -> std::result::Result<Extensions, String> {
        let context = Context {
            file: Path::new("image"),
            cluster_size: 512,
            luks: false,
            bitmaps_valid: true,
            base_stamp_valid: true,
        };
        Extensions::parse(bytes, &context).map_err(|error| match error {
            Error::Invalid { reason, .. } => reason,
            other => panic!("{other}"),
        })
    }

    #[test]
    fn what_is_written_is_read_back() {
        let written = Extensions {
            backing_format: Some(b"raw".to_vec()),
            data_file: Some(b"disk.raw".to_vec()),
            bitmaps: Some(Bitmaps {
                count: 2,
                directory_size: 96,
                directory_offset: 0x1000,
            }),
            base_stamp: Some(Stamp {
                size: 1 << 40,
                files: vec![
                    FileStamp {
                        path: PathBuf::new(),
                        len: 1 << 33,
                        modified: Some(Modified {
                            seconds: -7,
                            nanoseconds: 999_999_999,
                        }),
                    },
                    FileStamp {
                        path: PathBuf::new(),
                        len: 512,
                        modified: None,
                    },
                ],
            }),
            unknown: vec![(0x1234, vec![1; 9]), (0x1233, vec![])],
            ..Extensions::default()
        };
        let mut bytes = Vec::new();
        let names = FeatureNames {
            published: true,
            packed: false,
        };
        written.encode(&mut bytes, true, names);
        let mut read = parse(&bytes).unwrap();
        let names = std::mem::take(&mut read.feature_names);
        assert_eq!(read, written);
        assert_eq!(names.len(), 8);
        assert_eq!(names[2].name, b"external data file");
    }

    #[test]
    fn lengths_are_checked_against_what_is_there() {
        assert_eq!(parse(&[]), Ok(Extensions::default()));
        assert!(parse(&[0; 8]).is_ok());
        let too_large = Err("Header extension too large".to_owned());
        assert_eq!(parse(&[0; 7]), too_large);
        assert_eq!(parse(&[0, 0, 0, 1, 0, 0, 0, 1]), too_large);
        assert_eq!(parse(&[0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff]), too_large);
        // The padding of the last one may be missing.
        let read = parse(&[0, 0, 0, 1, 0, 0, 0, 1, 9]).unwrap();
        assert_eq!(read.unknown, [(1, vec![9])]);
    }

    #[test]
    fn known_extensions_are_validated() {
        let reason = |kind: u32, data: &[u8]| {
            let mut bytes = Vec::new();
            append(&mut bytes, kind, data);
            parse(&bytes).unwrap_err()
        };
        assert_eq!(
            reason(BACKING_FORMAT, &[b'x'; 16]),
            "ERROR: ext_backing_format: len=16 too large (>=16)"
        );
        assert_eq!(
            reason(BITMAPS, &[0; 23]),
            "bitmaps_ext: Invalid extension length"
        );
        assert_eq!(
            reason(BITMAPS, &[0; 24]),
            "found bitmaps extension with zero bitmaps"
        );
        assert_eq!(
            reason(BITMAPS, &[1; 24]),
            "bitmaps_ext: Reserved field is not zero"
        );
        assert_eq!(
            reason(CRYPTO, &[0; 16]),
            "CRYPTO header extension only expected with LUKS encryption method"
        );
    }
}
