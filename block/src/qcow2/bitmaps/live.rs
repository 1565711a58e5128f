//! Changing the bitmaps of an image that is open and written.
//!
//! What changes in memory only is marked on disk before, as for a change of the disk: after a crash
//! nobody takes for complete what has lost a change. A directory with other bitmaps than the one
//! on disk replaces it, with all of them marked, as the editor's does.

use std::sync::Arc;

use super::bits::Bits;
use super::dirty::DirtyBits;
use super::draft::{BitmapAction, Draft, Edited, check_usable, error, not_found};
use super::tracked::{Bitmaps, Tracked};
use super::{directory::flags, load};
use crate::qcow2::Qcow2;
use crate::{Disk, Error, Result};

impl Qcow2 {
    /// Changes the bitmaps while the image is in use: as `actions` say, in their order, all of them or,
    /// after an error, none. Each write is in the bitmaps that followed changes when it was made.
    ///
    /// The bits reach the disk when the image is closed. After a crash before that, the bitmaps are in
    /// use and can only be removed.
    ///
    /// # Errors
    /// [`Error::ReadOnly`], [`Error::Closed`], [`Error::Corrupt`]; [`Error::Bitmap`] for what is not
    /// possible; [`Error::HeaderFull`] if the header has no room for bitmaps; [`Error::Io`]. If the header
    /// could not be written, the bitmaps are not stored any more.
    pub fn change_bitmaps(&mut self, actions: &[BitmapAction]) -> Result<()> {
        let mut draft = self.draft_of(actions)?;
        if !draft.changed {
            return Ok(());
        }
        if !self.tracked()?.has_started() {
            // What is not possible has been found out before a mark is on disk.
            self.start_bitmaps(self.tracked()?)?;
            draft = self.draft_of(actions)?;
        }
        self.adopt(draft)
    }

    /// What a bitmap has as dirty, which starts again with nothing.
    ///
    /// # Errors
    /// As [`change_bitmaps`](Self::change_bitmaps).
    pub fn take_bitmap(&mut self, name: &[u8]) -> Result<DirtyBits> {
        let dirty = self.dirty_bits(name)?;
        let name = name.to_vec();
        self.change_bitmaps(&[BitmapAction::Clear { name }])?;
        Ok(dirty)
    }

    /// Makes dirty in a bitmap what is so in `dirty`, as far as the disk goes.
    ///
    /// # Errors
    /// As [`change_bitmaps`](Self::change_bitmaps).
    pub fn put_back_bitmap(&self, name: &[u8], dirty: &DirtyBits) -> Result<()> {
        self.check_writable()?;
        self.usable(name)?;
        self.start_bitmaps(self.tracked()?)?;
        let (granularity_bits, bits) = self.in_memory(name)?;
        bits.merge(
            granularity_bits,
            &dirty.bits,
            dirty.granularity_bits,
            self.size(),
        );
        Ok(())
    }

    /// A copy of what a bitmap has as dirty.
    ///
    /// # Errors
    /// [`Error::Bitmap`] if there is none called `name`, or it cannot be used; [`Error::ReadOnly`];
    /// [`Error::Io`], [`Error::Invalid`]
    pub fn read_bitmap(&self, name: &[u8]) -> Result<DirtyBits> {
        let mut dirty = self.dirty_bits(name)?;
        Arc::make_mut(&mut dirty.bits);
        Ok(dirty)
    }

    /// How many bytes a bitmap has as dirty.
    ///
    /// # Errors
    /// As [`read_bitmap`](Self::read_bitmap).
    pub fn dirty_bytes(&self, name: &[u8]) -> Result<u64> {
        self.dirty_bits(name).map(|dirty| dirty.count())
    }

    /// Moves the bitmaps that follow changes to `to`, a disk of the same size, which has none of their
    /// names. After a crash they are in either image, or in both, and in use.
    ///
    /// # Errors
    /// As [`change_bitmaps`](Self::change_bitmaps), for either image: none has been moved.
    pub fn hand_over_bitmaps(&mut self, to: &mut Self) -> Result<()> {
        self.check_writable()?;
        to.check_writable()?;
        let (size, other) = (to.size(), self.size());
        if size != other {
            let reason = format!(
                "Bitmaps are of different sizes (destination size is {size}, source size is {other})"
            );
            return Err(error(to, reason));
        }
        let is_moved = |tracked: &&Tracked| tracked.entry.is_auto() && tracked.entry.is_stored();
        let moved = self.tracked()?.list().iter().filter(is_moved);
        let names = Vec::from_iter(moved.map(|tracked| tracked.entry.name.clone()));
        if names.is_empty() {
            return Ok(());
        }
        self.start_bitmaps(self.tracked()?)?;
        to.start_bitmaps(to.tracked()?)?;
        let mut draft = to.draft_of(&[])?;
        for name in &names {
            let (granularity_bits, bits) = self.in_memory(name)?;
            draft.add(to, name, Some(1 << granularity_bits))?;
            if let Some(added) = draft.bitmaps.last_mut() {
                added.bits = Some(bits);
            }
        }
        to.adopt(draft)?;
        let remove = |name: &Vec<u8>| BitmapAction::Remove { name: name.clone() };
        let remove = Vec::from_iter(names.iter().map(remove));
        self.change_bitmaps(&remove).inspect_err(|_| {
            // Two images with the same bitmaps would each miss what the other one sees.
            drop(to.change_bitmaps(&remove));
        })
    }

    fn tracked(&self) -> Result<&Bitmaps> {
        self.bitmaps.as_ref().ok_or(Error::ReadOnly)
    }

    /// The bitmaps as they are after `actions`.
    fn draft_of(&self, actions: &[BitmapAction]) -> Result<Draft> {
        self.check_writable()?;
        let bitmaps = self.tracked()?;
        bitmaps.check_whole(&self.image)?;
        let mut draft = Draft::of(bitmaps);
        for action in actions {
            draft.apply(self, action)?;
        }
        Ok(draft)
    }

    /// Makes `draft`, of bitmaps that are in memory, the bitmaps of the image.
    fn adopt(&mut self, mut draft: Draft) -> Result<()> {
        let has_table = |edited: &Edited| edited.entry.table_size != 0;
        if !draft.removed.is_empty() || !draft.bitmaps.iter().all(has_table) {
            // Those that are new have a table, which is filled when the image is closed.
            let written = |edited: &Edited| (!has_table(edited)).then(Arc::default);
            let planned = self.plan_directory(&mut draft, written, flags::IN_USE)?;
            if let Err(error) = planned.steps.run(&self.image) {
                if let Some(bitmaps) = &mut self.bitmaps {
                    bitmaps.abandon();
                }
                return Err(error);
            }
            // What cannot be given back is leaked.
            drop(self.release_places(planned.old));
        }
        let tracked = |Edited { entry, bits }| Tracked { entry, bits };
        let list = draft.bitmaps.into_iter().map(tracked).collect();
        self.bitmaps = Some(Bitmaps::new(list, true));
        Ok(())
    }

    /// A bitmap that tells what has changed.
    fn usable(&self, name: &[u8]) -> Result<&Tracked> {
        let mut list = self.tracked()?.list().iter();
        let found = list.find(|tracked| tracked.entry.name == name);
        let found = found.ok_or_else(|| not_found(self, name))?;
        check_usable(self, &found.entry)?;
        Ok(found)
    }

    /// The granularity and the bits of a bitmap, once they are in memory.
    fn in_memory(&self, name: &[u8]) -> Result<(u8, Arc<Bits>)> {
        let Tracked { entry, bits } = self.usable(name)?;
        let bits = bits.clone().ok_or_else(|| not_found(self, name))?;
        Ok((entry.granularity_bits, bits))
    }

    /// What a bitmap has as dirty, without a copy if it is in memory.
    fn dirty_bits(&self, name: &[u8]) -> Result<DirtyBits> {
        let (granularity_bits, mut bits) = self.in_memory(name)?;
        let size = self.size();
        if !self.tracked()?.has_started() {
            let loaded = Bits::new();
            load(
                &self.image,
                self.geometry,
                &self.usable(name)?.entry,
                &loaded,
                size,
            )?;
            bits = Arc::new(loaded);
        }
        Ok(DirtyBits {
            bits,
            granularity_bits,
            size,
        })
    }
}
