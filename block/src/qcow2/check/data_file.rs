//! The external data file: as long as the disk, and in a raw one zero where the mapping says so.

use std::ops::Range;

use super::{Check, Repair};
use crate::qcow2::DataFileLayout;
use crate::qcow2::entry::{Cluster, Entry, L1Entry};
use crate::qcow2::subclusters::{SUBCLUSTERS, Subcluster};
use crate::{Error, Result};

/// Bytes of the data file that are looked at in one piece.
const PIECE: u64 = 1 << 20;

impl Check<'_> {
    /// Length of the data file, if it is known.
    pub(super) fn data_file_len(&self) -> Option<u64> {
        let (_, data) = self.files.data?;
        data.size().ok()
    }

    pub(super) fn check_data_file(&mut self) -> Result<()> {
        let size = self.header.disk_size();
        let layout = self.header.data_file_layout();
        let (Some((path, data)), Some(DataFileLayout::Standard)) = (self.files.data, layout) else {
            return Ok(());
        };
        let len = data
            .size()
            .map_err(|e| Error::io(path, "get the size of", e))?;
        let repairs = self.repair == Repair::All;
        let report = &self.report;
        let found = [
            report.corruptions,
            report.corruptions_fixed,
            report.leaks,
            report.leaks_fixed,
            report.check_errors,
        ];
        self.zeroes_raw = repairs && found == [0; 5];
        if len < size
            && self.repairs(repairs, |word| {
                format!("{word} data file has {len} bytes, and the disk {size}")
            })
        {
            data.set_len(size)
                .map_err(|e| Error::io(path, "resize", e))?;
        }
        if self.header.data_file_is_raw() {
            self.check_raw(size)?;
        }
        match repairs {
            true => data.sync().map_err(|e| Error::io(path, "sync", e)),
            false => Ok(()),
        }
    }

    /// Checks that a raw data file is zero where the disk reads as zero. What a damaged entry says of
    /// its clusters is nothing to go by.
    fn check_raw(&mut self, size: u64) -> Result<()> {
        let g = self.geometry;
        let table_size = g.l2_entries() << g.cluster_bits;
        for i in 0..self.l1_table.len() {
            let start = i as u64 * table_size;
            let entry = L1Entry(self.l1_table[i]);
            if start >= size {
                break;
            }
            if entry.offset() == 0 && entry.reserved() == 0 {
                self.check_zero(start..size.min(start + table_size), Says::Nothing)?;
                continue;
            }
            let is_sound = entry.reserved() == 0
                && self.l2_tables.get(&entry.offset()) == Some(&1)
                && self.is_l2_table(entry.offset());
            let Some(words) = self.read_l2_table(entry.offset())?.filter(|_| is_sound) else {
                continue;
            };
            let mut zero = (start..start, Says::Nothing);
            for (k, entry) in Entry::all(&words, g).enumerate() {
                let at = start + ((k as u64) << g.cluster_bits);
                for (part, says) in self.zero_parts(entry, at) {
                    let part = at + part.start..(at + part.end).min(size);
                    if part.start != zero.0.end || says != zero.1 {
                        self.check_zero(zero.0, zero.1)?;
                        zero = (part.start..part.start, says);
                    }
                    zero.0.end = part.end.max(part.start);
                }
            }
            self.check_zero(zero.0, zero.1)?;
        }
        Ok(())
    }

    /// The parts of the cluster at guest offset `guest` that read as zero without looking at the data
    /// file, in bytes, and why.
    fn zero_parts(&self, entry: Entry, guest: u64) -> Vec<(Range<u64>, Says)> {
        let g = self.geometry;
        let cluster = entry.word.cluster(Some(DataFileLayout::Standard));
        let place = match cluster {
            Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) => Some(offset),
            _ => None,
        };
        let is_sound = entry.word.reserved() == 0
            && place.is_none_or(|offset| offset == guest)
            && (!g.extended_l2 || entry.subclusters.is_valid(place.is_some()));
        if !is_sound || cluster == Cluster::Compressed {
            return Vec::new();
        }
        if g.extended_l2 {
            return self.zero_subclusters(entry);
        }
        match cluster {
            Cluster::ZeroPlain | Cluster::ZeroAlloc(_) => vec![(0..g.cluster_size(), Says::Zero)],
            Cluster::Unallocated => vec![(0..g.cluster_size(), Says::Nothing)],
            Cluster::Normal(_) | Cluster::Compressed => Vec::new(),
        }
    }

    fn zero_subclusters(&self, entry: Entry) -> Vec<(Range<u64>, Says)> {
        let bytes = |index: u32| u64::from(index) * self.geometry.grain_size();
        let mut parts = Vec::new();
        let mut index = 0;
        while index < SUBCLUSTERS {
            let (state, count) = entry.subclusters.run(index);
            let range = bytes(index)..bytes(index + count);
            match state {
                Subcluster::Allocated => {}
                Subcluster::Zero => parts.push((range, Says::Zero)),
                Subcluster::Unallocated => parts.push((range, Says::Nothing)),
            }
            index += count;
        }
        parts
    }

    /// Checks that the data file has nothing but zeros in `range`. They are only written where the
    /// mapping `says` that they are to be there, and nothing else is wrong: where it says nothing, it may
    /// be the mapping that has been lost.
    fn check_zero(&mut self, range: Range<u64>, says: Says) -> Result<()> {
        let Some((path, data)) = self.files.data else {
            return Ok(());
        };
        let (mut at, end) = (range.start, range.end);
        let mut buffer = vec![0; PIECE.min(end.saturating_sub(at)) as usize];
        while at < end {
            let next = data
                .next_data(at)
                .map_err(|e| Error::io_at(path, "look for data in", at, e))?;
            at = match next {
                Some(next) if next < end => next,
                _ => return Ok(()),
            };
            let piece = &mut buffer[..PIECE.min(end - at) as usize];
            data.read_bytes_at(piece, at)
                .map_err(|e| Error::io_at(path, "read", at, e))?;
            let len = piece.len() as u64;
            if let Some(found) = piece.iter().position(|byte| *byte != 0) {
                let found = at + found as u64;
                let repaired = self.repairs(says == Says::Zero && self.zeroes_raw, |word| {
                    format!(
                        "{word} offset={found:x}: Raw data file has data where the disk reads as \
                         zero"
                    )
                });
                if !repaired {
                    return Ok(());
                }
                data.write_zeroes(at, len, true)
                    .map_err(|e| Error::io_at(path, "zero", at, e))?;
            }
            at += len;
        }
        Ok(())
    }
}

/// Why a part of the disk reads as zero.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Says {
    /// The mapping says so.
    Zero,
    /// There is no mapping.
    Nothing,
}
