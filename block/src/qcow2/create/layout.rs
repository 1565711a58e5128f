//! Where everything in a new image is, and writing it.

use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use super::CreateOptions;
use crate::preallocation::Preallocation;
use crate::qcow2::DataFileLayout;
use crate::qcow2::compressed::CompressionType;
use crate::qcow2::entry::{L1Entry, L2Entry};
use crate::qcow2::extension::Extensions;
use crate::qcow2::geometry::{ENTRY_SIZE, Geometry};
use crate::qcow2::header::{
    Header, MAX_L1_SIZE, MAX_OFFSET, MAX_REFCOUNT_TABLE_SIZE, autoclear, compatible, incompatible,
};
use crate::qcow2::refcount_width::RefcountWidth;
use crate::qcow2::subclusters::Subclusters;
use crate::qcow2::table::TableWriter;
use crate::{Error, Result};

/// Where everything in a new image is. Offsets and lengths are in bytes unless they say otherwise.
#[derive(Debug)]
pub(in crate::qcow2) struct Layout {
    geometry: Geometry,
    width: RefcountWidth,
    /// Of the disk.
    size: u64,
    external: bool,
    packed: bool,
    raw: bool,
    /// Whether all clusters of the disk are mapped.
    pub mapped: bool,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    l1_offset: u64,
    /// Entries.
    l1_size: u64,
    pub first_l2: u64,
    /// Clusters that have a refcount: all of the image.
    clusters: u64,
    pub file_len: u64,
}

impl Layout {
    pub fn new(options: &CreateOptions) -> Result<Self> {
        options.check()?;
        let cluster_size = options.cluster_size;
        let size = options
            .size
            .checked_next_multiple_of(512)
            .ok_or_else(too_large)?;
        let external = options.data_file.is_some();
        let mapped = options.data_file_raw || options.preallocation != Preallocation::Off;
        let geometry = Geometry {
            cluster_bits: cluster_size.trailing_zeros(),
            extended_l2: options.extended_l2,
        };
        let width = RefcountWidth {
            order: options.refcount_bits.trailing_zeros(),
        };
        let l1_size = geometry.l1_entries(size);
        if l1_size > MAX_L1_SIZE / ENTRY_SIZE || (external && size > MAX_OFFSET) {
            return Err(too_large());
        }
        let l1_clusters = (l1_size * ENTRY_SIZE).div_ceil(cluster_size);
        let l2_tables = if mapped { l1_size } else { 0 };
        let internal_data = mapped && !external;
        let data_clusters = if internal_data {
            geometry.clusters(size)
        } else {
            0
        };
        let other = 1 + l1_clusters + l2_tables + data_clusters;
        let (refcount_table_clusters, refcount_blocks) =
            refcount_clusters(other, cluster_size, width);
        let clusters = other + refcount_table_clusters + refcount_blocks;
        if refcount_table_clusters * cluster_size > MAX_REFCOUNT_TABLE_SIZE
            || clusters > MAX_OFFSET / cluster_size
        {
            return Err(too_large());
        }
        let l1_offset = (1 + refcount_table_clusters + refcount_blocks) * cluster_size;
        let end = clusters * cluster_size;
        Ok(Self {
            geometry,
            width,
            size,
            external,
            packed: options.data_file_layout == DataFileLayout::Packed,
            raw: options.data_file_raw,
            mapped,
            refcount_table_clusters,
            refcount_blocks,
            l1_offset,
            l1_size,
            first_l2: l1_offset + l1_clusters * cluster_size,
            clusters,
            // As in QEMU, a table at the end of the file occupies only what it needs.
            file_len: if l2_tables > 0 {
                end
            } else {
                l1_offset + l1_size * ENTRY_SIZE
            },
        })
    }

    pub fn header(&self, options: &CreateOptions) -> Header {
        let flag = |set, bit| if set { bit } else { 0 };
        let bytes = |name: &PathBuf| name.as_os_str().as_bytes().to_vec();
        let backing_format = options.backing_format.map(|f| f.name().into());
        let mut header = Header {
            version: options.version,
            backing_file: options.backing_file.as_ref().map(bytes),
            cluster_bits: self.geometry.cluster_bits,
            size: self.size,
            crypt_method: 0,
            l1_size: self.l1_size as u32,
            l1_table_offset: if self.l1_size > 0 { self.l1_offset } else { 0 },
            refcount_table_offset: self.geometry.cluster_size(),
            refcount_table_clusters: self.refcount_table_clusters as u32,
            nb_snapshots: 0,
            snapshots_offset: 0,
            incompatible_features: flag(self.external, incompatible::DATA_FILE)
                | flag(self.packed, incompatible::PACKED)
                | flag(options.extended_l2, incompatible::EXTENDED_L2)
                | flag(
                    options.compression_type != CompressionType::Deflate,
                    incompatible::COMPRESSION,
                ),
            compatible_features: flag(options.lazy_refcounts, compatible::LAZY_REFCOUNTS),
            autoclear_features: flag(options.data_file_raw, autoclear::DATA_FILE_RAW),
            refcount_order: self.width.order,
            header_length: 0,
            compression_type: options.compression_type.into(),
            unknown_fields: Vec::new(),
            extensions: Extensions {
                data_file: options.data_file.as_ref().map(bytes),
                backing_format,
                ..Extensions::default()
            },
        };
        header.set_base_stamp(options.base_stamp.clone());
        header
    }

    /// Length of the data file: the last cluster is complete where it is mapped, and a packed one has
    /// nothing but what is mapped.
    pub fn data_file_len(&self) -> u64 {
        let g = self.geometry;
        if self.packed && !self.mapped {
            0
        } else if self.mapped {
            self.size.next_multiple_of(g.cluster_size())
        } else {
            self.size
        }
    }

    /// Writes everything but the header.
    ///
    /// Tables are written up to the end of their last cluster, as QEMU does: it takes an image
    /// with holes in its metadata for a preallocated one.
    pub fn write_tables(&self, file: &File) -> io::Result<()> {
        let cluster_size = self.geometry.cluster_size();
        let blocks_offset = (1 + self.refcount_table_clusters) * cluster_size;
        let mut table = TableWriter::new(file, cluster_size);
        for i in 0..self.refcount_blocks {
            table.push(&(blocks_offset + i * cluster_size).to_be_bytes())?;
        }
        table.end_at(blocks_offset)?;
        // Eight refcounts are whole bytes in any width.
        let mut counts = [0; 64];
        (0..8).for_each(|index| self.width.set(&mut counts, index, 1));
        let eight = &counts[..self.width.bytes_for(8) as usize];
        for _ in 0..self.clusters / 8 {
            table.push(eight)?;
        }
        let rest = self.clusters % 8;
        (rest..8).for_each(|index| self.width.set(&mut counts, index as usize, 0));
        table.push(&counts[..self.width.bytes_for(rest) as usize])?;
        table.end_at(self.l1_offset)?;
        if !self.mapped {
            return Ok(());
        }
        for i in 0..self.l1_size {
            table.push(&L1Entry::new(self.l2_table(i)).0.to_be_bytes())?;
        }
        table.end()?;
        for i in 0..self.l1_size {
            self.write_l2_table(file, i)?;
        }
        Ok(())
    }

    /// Offset of the L2 table that L1 entry `i` refers to.
    fn l2_table(&self, i: u64) -> u64 {
        let g = self.geometry;
        let data_clusters = if self.external { 0 } else { g.l2_entries() };
        self.first_l2 + i * (1 + data_clusters) * g.cluster_size()
    }

    fn write_l2_table(&self, file: &File, i: u64) -> io::Result<()> {
        let g = self.geometry;
        let table = self.l2_table(i);
        let first = i * g.l2_entries();
        let count = g.l2_entries().min(g.clusters(self.size) - first);
        let data = if self.external {
            first * g.cluster_size()
        } else {
            table + g.cluster_size()
        };
        let mut writer = TableWriter::new(file, table);
        // As in QEMU, space is there for subclusters, and nothing is known of them; but a raw data
        // file shows what it holds.
        let subclusters = if self.raw {
            Subclusters::ALL_ALLOCATED
        } else {
            Subclusters::default()
        };
        for k in 0..count {
            writer.push(&L2Entry::normal(data + k * g.cluster_size()).0.to_be_bytes())?;
            if g.extended_l2 {
                writer.push(&subclusters.0.to_be_bytes())?;
            }
        }
        writer.end_at(table + g.cluster_size())
    }
}

/// The text that QEMU has for every size that cannot be represented.
fn too_large() -> Error {
    Error::Option(
        "The image size is too large for file format 'qcow2' (try using a larger cluster size)"
            .to_owned(),
    )
}

/// Clusters of the refcount table, and refcount blocks, that count `other` clusters and themselves.
pub(in crate::qcow2) fn refcount_clusters(
    other: u64,
    cluster_size: u64,
    width: RefcountWidth,
) -> (u64, u64) {
    let per_block = width.count_in(cluster_size);
    let (mut table, mut blocks) = (1, 1);
    loop {
        let needed_blocks = (other + table + blocks).div_ceil(per_block);
        let needed_table = (needed_blocks * ENTRY_SIZE).div_ceil(cluster_size);
        if (needed_table, needed_blocks) == (table, blocks) {
            return (table, blocks);
        }
        (table, blocks) = (needed_table, needed_blocks);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// The refcount blocks count every cluster, themselves and their table included, and no
        /// smaller number of them would.
        #[test]
        fn refcount_structures_count_themselves(
            other in prop_oneof![1u64..3000, 1u64..1 << 40],
            bits in 9u32..=21,
            order in 0u32..=6,
        ) {
            let cluster_size = 1 << bits;
            let width = RefcountWidth { order };
            let per_block = width.count_in(cluster_size);
            let (table, blocks) = refcount_clusters(other, cluster_size, width);
            prop_assert!(blocks * per_block >= other + table + blocks);
            prop_assert!(table * cluster_size / 8 >= blocks);
            prop_assert!((blocks - 1) * per_block < other + table + blocks);
        }

        #[test]
        fn parts_do_not_overlap(
            size in prop_oneof![0u64..1 << 20, 0u64..1 << 45],
            bits in 9u32..=21,
            external: bool,
            mapped: bool,
            order in 0u32..=6,
        ) {
            let options = CreateOptions {
                refcount_bits: 1 << order,
                cluster_size: 1 << bits,
                data_file: external.then(|| "data".into()),
                preallocation: if mapped { Preallocation::Metadata } else { Preallocation::Off },
                size,
                ..CreateOptions::default()
            };
            if let Ok(layout) = Layout::new(&options) {
                let cluster_size = layout.geometry.cluster_size();
                prop_assert!(layout.l1_offset + layout.l1_size * 8 <= layout.first_l2);
                prop_assert!(layout.file_len <= layout.clusters * cluster_size);
                prop_assert!(layout.file_len + cluster_size
                    > layout.clusters * cluster_size);
                if mapped && layout.l1_size > 0 {
                    let last = layout.l1_size - 1;
                    let left = size.next_multiple_of(512).div_ceil(cluster_size)
                        - last * layout.geometry.l2_entries();
                    let data = if external { 0 } else { left };
                    prop_assert_eq!(
                        layout.l2_table(last) + (1 + data) * cluster_size,
                        layout.file_len
                    );
                }
            }
        }
    }
}
