//! The state of a virtual machine: bytes that the same mapping has behind the disk, from the first L2
//! table on that the disk has no part of (qcow2 specification, "VM state").
//!
//! They have no end but that of the largest L1 table, and belong to snapshots as the disk does. A disk
//! that grows takes their place, and finds zeros there.

use std::io;

use vm_memory::VolatileSlice;

use super::Qcow2;
use super::geometry::ENTRY_SIZE;
use super::header::MAX_L1_SIZE;
use super::io::Area;
use super::placement::Placement;
use crate::buffers::fill_zero;
use crate::disk::total_len;
use crate::sync::lock;
use crate::{Disk, Error, Result};

const MAX_L1_ENTRIES: u64 = MAX_L1_SIZE / ENTRY_SIZE;

impl Qcow2 {
    /// Guest offset at which the state of a virtual machine begins.
    pub fn vm_state_start(&self) -> u64 {
        let g = self.geometry;
        let table = g.l2_entries() << g.cluster_bits;
        g.l1_entries(self.size()).saturating_mul(table)
    }

    /// Fills `bufs` with the state from `position` on. What was never written reads as zero.
    ///
    /// # Errors
    /// [`Error::OutOfRange`] if `position` is behind all offsets; else as [`Disk::read_at`].
    pub fn read_vm_state(&self, bufs: &[VolatileSlice<'_>], position: u64) -> Result<()> {
        let _resizing = lock(&self.resizing);
        let len = total_len(bufs);
        let offset = self.vm_state_place(position, len)?;
        if self.geometry.l1_entries(offset + len) > MAX_L1_ENTRIES {
            fill_zero(bufs);
            return Ok(());
        }
        self.read_mapped(bufs, offset)
    }

    /// Writes `bufs` to the state at `position`.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the image has a data file; else as [`Disk::write_at`].
    pub fn write_vm_state(&self, bufs: &[VolatileSlice<'_>], position: u64) -> Result<()> {
        self.check_writable()?;
        if !matches!(self.placement, Placement::Internal) {
            let feature = "VM state in an image with a data file".to_owned();
            let file = self.image.path.clone();
            return Err(Error::Unsupported { file, feature });
        }
        // Nobody moves the start meanwhile, or makes a disk of what is written.
        let _resizing = lock(&self.resizing);
        let len = total_len(bufs);
        let offset = self.vm_state_place(position, len)?;
        if len == 0 {
            return Ok(());
        }
        let entries = self.geometry.l1_entries(offset + len);
        if entries > MAX_L1_ENTRIES {
            let error = io::Error::from_raw_os_error(libc::EFBIG);
            return Err(Error::io(&self.image.path, "write VM state to", error));
        }
        self.grow_l1_table(entries)?;
        self.with_space(|| self.write_mapped(bufs, offset, len, Area::VmState))
    }

    /// Guest offset of `len` bytes at `position`.
    fn vm_state_place(&self, position: u64, len: u64) -> Result<u64> {
        let size = self.vm_state_start();
        let offset = size.checked_add(position);
        let end = offset.and_then(|offset| offset.checked_add(len));
        match (offset, end) {
            (Some(offset), Some(end)) if end <= i64::MAX as u64 => Ok(offset),
            _ => Err(Error::OutOfRange {
                offset: position,
                len,
                size,
            }),
        }
    }
}
