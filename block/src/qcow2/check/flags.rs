//! The COPIED flags (qcow2 specification, "Cluster mapping"): set in the tables of the disk where the
//! target is used once, and nowhere else.

use std::collections::HashSet;

use super::{Check, Repair};
use crate::Result;
use crate::qcow2::entry::{COPIED, Cluster, L1Entry, L2Entry};
use crate::qcow2::geometry::ENTRY_SIZE;
use crate::qcow2::table;

impl Check<'_> {
    pub(super) fn check_copied_flags(&mut self) -> Result<()> {
        let report = &self.report;
        let is_sound = report.corruptions == 0 && report.leaks == 0 && report.check_errors == 0;
        let repairs = match self.repair {
            Repair::Nothing => false,
            Repair::Leaks => is_sound,
            // Flags follow refcounts that are right.
            Repair::All => !self.rebuild,
        };
        let l1_repairs = repairs && self.is_l1_table_alone();
        // A table that is named often takes the work of one.
        let mut seen = HashSet::new();
        for i in 0..self.l1_table.len() {
            let entry = L1Entry(self.l1_table[i]);
            if entry.offset() != 0
                && let Some(refcount) = self.refcount_at(entry.offset())
            {
                self.check_l1_flag(i, entry, refcount, l1_repairs)?;
                // Of the others, all flags have been seen to be right.
                let is_open =
                    !self.is_used_once || self.special_l2_tables.contains(&entry.offset());
                if seen.insert(entry.offset()) && is_open {
                    let repairs = repairs && self.is_l2_table(entry.offset());
                    self.check_l2_flags(entry.offset(), repairs)?;
                }
            }
            self.step();
        }
        Ok(())
    }

    /// Whether there is nothing but the L1 table where it is.
    fn is_l1_table_alone(&self) -> bool {
        let first = self.cluster_of(self.header.l1_table_offset);
        let len = u64::from(self.header.l1_size) * ENTRY_SIZE;
        self.is_aligned(self.header.l1_table_offset)
            && (first..first + self.geometry.clusters(len))
                .all(|cluster| self.references.get(cluster) == 1)
    }

    fn check_l1_flag(
        &mut self,
        i: usize,
        entry: L1Entry,
        refcount: u64,
        repairs: bool,
    ) -> Result<()> {
        if (refcount == 1) == entry.is_copied() {
            return Ok(());
        }
        let repaired = self.repairs(repairs, |word| {
            format!(
                "{word} OFLAG_COPIED L2 cluster: l1_index={i} l1_entry={:x} refcount={refcount}",
                entry.0
            )
        });
        if repaired {
            self.l1_table[i] = entry.0 ^ COPIED;
            let at = self.header.l1_table_offset + i as u64 * ENTRY_SIZE;
            self.files.write(&self.l1_table[i].to_be_bytes(), at)?;
        }
        Ok(())
    }

    fn check_l2_flags(&mut self, offset: u64, repairs: bool) -> Result<()> {
        let Some(mut words) = self.read_l2_table(offset)? else {
            return Ok(());
        };
        let layout = self.header.data_file_layout();
        let mut changed = false;
        for word in words.iter_mut().step_by(self.geometry.l2_entry_words()) {
            let entry = L2Entry(*word);
            let refcount = match entry.cluster(layout) {
                Cluster::Normal(_) | Cluster::ZeroAlloc(_) if layout.is_some() => Some(1),
                Cluster::Normal(offset) | Cluster::ZeroAlloc(offset) => self.refcount_at(offset),
                _ => None,
            };
            if let Some(refcount) = refcount
                && (refcount == 1) != entry.is_copied()
                && self.repairs(repairs, |word| {
                    format!(
                        "{word} OFLAG_COPIED data cluster: l2_entry={:x} refcount={refcount}",
                        entry.0
                    )
                })
            {
                *word ^= COPIED;
                changed = true;
            }
        }
        if changed {
            self.files.write(&table::encode(words), offset)?;
        }
        Ok(())
    }
}
