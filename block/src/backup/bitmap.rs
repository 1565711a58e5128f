//! The bitmap that a backup begins or goes by.
//!
//! It starts anew at the instant of the backup, and so tells later what has changed since. What it told
//! before is the backup's until its end: if that is not a success, the bitmap gets it back.

use super::{BackupId, BackupKind};
use crate::live::{LiveImage, State};
use crate::qcow2::{BitmapAction, DirtyBits};
use crate::{Error, Result};

/// What is known of the backups of a disk that bitmaps go on from.
#[derive(Default)]
pub(crate) struct History {
    /// The last backup that has begun each bitmap anew, and succeeded.
    bases: Vec<(Vec<u8>, BackupId)>,
    /// Bitmaps of backups under way.
    taken: Vec<Vec<u8>>,
}

/// What a backup has taken from a bitmap.
pub(super) struct Taken {
    name: Vec<u8>,
    /// `None` if the bitmap was made for the backup.
    bits: Option<DirtyBits>,
}

/// What a backup is to copy.
pub(super) struct Selection {
    /// `None` for all of the disk.
    pub dirty: Option<DirtyBits>,
    /// What has been taken for it.
    pub taken: Option<Taken>,
    /// The backup that it goes on from, if it is known.
    pub base: Option<BackupId>,
}

impl Selection {
    /// Carries out what `kind` says of bitmaps.
    pub fn new(state: &mut State, kind: &BackupKind) -> Result<Self> {
        let mut selection = Self {
            dirty: None,
            taken: None,
            base: None,
        };
        match kind {
            BackupKind::Full { track: None } => {}
            BackupKind::Full { track: Some(name) } => {
                selection.taken = Some(state.begin_bitmap(name)?);
            }
            BackupKind::Since { bitmap, keep } => {
                selection.base = state.history.base(bitmap);
                if *keep {
                    state.history.check_free(bitmap)?;
                    let dirty = state.image.with_bitmaps_mut()?.read_bitmap(bitmap)?;
                    selection.dirty = Some(dirty);
                } else {
                    let taken = state.take_bitmap(bitmap)?;
                    selection.dirty.clone_from(&taken.bits);
                    selection.taken = Some(taken);
                }
            }
        }
        Ok(selection)
    }
}

impl State {
    /// Makes the bitmap `name` start anew, or anyway.
    fn begin_bitmap(&mut self, name: &[u8]) -> Result<Taken> {
        let bitmaps = self
            .image
            .with_bitmaps_mut()?
            .bitmaps()?
            .unwrap_or_default();
        if bitmaps.iter().any(|bitmap| bitmap.name == name) {
            return self.take_bitmap(name);
        }
        let name = name.to_vec();
        let add = BitmapAction::Add {
            name: name.clone(),
            granularity: None,
            enabled: true,
        };
        self.image.with_bitmaps_mut()?.change_bitmaps(&[add])?;
        self.history.taken.push(name.clone());
        Ok(Taken { name, bits: None })
    }

    /// Takes what the bitmap `name` tells, which follows changes and belongs to no other backup.
    fn take_bitmap(&mut self, name: &[u8]) -> Result<Taken> {
        let wrong = |reason: &str| {
            let name = name.escape_ascii();
            Error::Backup(format!("bitmap '{name}' {reason}"))
        };
        self.history.check_free(name)?;
        let image = self.image.with_bitmaps_mut()?;
        let bitmaps = image.bitmaps()?.unwrap_or_default();
        if bitmaps
            .iter()
            .any(|bitmap| bitmap.name == name && !bitmap.auto)
        {
            return Err(wrong(
                "does not follow changes of the disk: enable it, or keep it",
            ));
        }
        let bits = image.take_bitmap(name)?;
        let name = name.to_vec();
        self.history.taken.push(name.clone());
        Ok(Taken {
            name,
            bits: Some(bits),
        })
    }
}

impl History {
    fn base(&self, name: &[u8]) -> Option<BackupId> {
        let found = self.bases.iter().find(|(known, _)| known == name)?;
        Some(found.1)
    }

    /// Refuses to change bitmaps that belong to backups under way as `actions` say, and to go by what
    /// such a bitmap tells: it tells less than it may tell later.
    ///
    /// # Errors
    /// [`Error::Backup`]
    pub fn check(&self, actions: &[BitmapAction]) -> Result<()> {
        let mut names = actions.iter().filter_map(|action| match action {
            BitmapAction::Merge { source, .. } => Some(&source[..]),
            _ => changed(action),
        });
        names.try_for_each(|name| self.check_free(name))
    }

    /// Refuses a bitmap that belongs to a backup under way: if that does not succeed, it tells more again.
    fn check_free(&self, name: &[u8]) -> Result<()> {
        if self.taken.iter().any(|taken| taken == name) {
            let name = name.escape_ascii();
            return Err(Error::Backup(format!(
                "bitmap '{name}' belongs to a backup that is under way"
            )));
        }
        Ok(())
    }

    /// Bitmaps have been changed as `actions` say: those do not go on from any backup.
    pub fn note(&mut self, actions: &[BitmapAction]) {
        for changed in actions.iter().filter_map(changed) {
            self.bases.retain(|(name, _)| name != changed);
        }
    }

    /// The backup `id` has succeeded: its bitmap tells what has changed since.
    pub(super) fn succeed(&mut self, taken: Taken, id: BackupId) {
        self.forget(&taken);
        self.bases.retain(|(name, _)| *name != taken.name);
        self.bases.push((taken.name, id));
    }

    fn forget(&mut self, taken: &Taken) {
        self.taken.retain(|name| *name != taken.name);
    }
}

impl Taken {
    /// Gives the bitmap back what it told before.
    ///
    /// # Errors
    /// It is gone, or the image cannot be written any more.
    pub fn give_back(self, image: &mut LiveImage, history: &mut History) -> Result<()> {
        history.forget(&self);
        let name = self.name;
        #[cfg(mutate)]
        if crate::mutate::is(crate::mutate::NOT_GIVEN_BACK) {
            return Ok(());
        }
        match self.bits {
            Some(bits) => image.with_bitmaps()?.put_back_bitmap(&name, &bits),
            // There is nothing that it could go on from.
            None => {
                let image = image.with_bitmaps_mut()?;
                image.change_bitmaps(&[BitmapAction::Remove { name }])
            }
        }
    }
}

/// The bitmap that `action` changes so that it does not tell any more what it has told. One that has
/// more than it needs is still right.
fn changed(action: &BitmapAction) -> Option<&[u8]> {
    match action {
        BitmapAction::Remove { name }
        | BitmapAction::Clear { name }
        | BitmapAction::SetEnabled { name, .. } => Some(name),
        BitmapAction::Add { .. } | BitmapAction::Merge { .. } => None,
    }
}
