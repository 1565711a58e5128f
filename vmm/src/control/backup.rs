//! Backups of disks while the guest goes on writing to them.

use std::sync::Arc;

use serde::Serialize;
use serde_json::{Value, json};
use tandem_block::{Backup, BackupId, BackupKind, BackupOptions, BackupState, Chunk, LiveDisk};

use super::{Control, ControlError, device_name, lock};

/// A backup under way.
#[derive(Clone)]
pub(super) struct Running {
    /// The disk.
    index: usize,
    backup: Arc<Backup>,
}

/// A backup, as it was begun and as it stands.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct BackupInfo {
    /// Its name.
    #[serde(serialize_with = "as_text")]
    pub backup: BackupId,
    /// The backup that it goes on from, if that has been made of this VM.
    #[serde(serialize_with = "as_optional_text")]
    pub base: Option<BackupId>,
    /// What the guest calls the disk.
    pub disk: String,
    /// Whether it has only what its bitmap told.
    pub incremental: bool,
    /// The bitmap that it goes by, or begins.
    pub bitmap: Option<String>,
    /// Size of the disk at its instant, in bytes.
    pub size: u64,
    /// The unit in which it is copied, in bytes.
    pub granularity: u64,
    /// Bytes that it has in all, zeros included.
    pub wanted: u64,
    /// Bytes of those that the reader has for good.
    pub released: u64,
    /// Bytes in the scratch file now.
    pub scratch_used: u64,
    /// The most that there ever were.
    pub scratch_peak: u64,
    /// The most that there may be.
    pub scratch_size: u64,
    /// Whether it is `running`, or has `failed`.
    pub state: &'static str,
    /// Why it has failed.
    pub error: Option<String>,
}

impl Control {
    /// Begins a backup of disk number `index` as it is at this instant. It goes on until it is
    /// [ended](Self::end_backup), whoever reads it.
    ///
    /// # Errors
    /// [`ControlError::NoSuchDisk`], [`ControlError::Ended`]; [`ControlError::Disk`] if there can be none.
    pub fn begin_backup(
        &self,
        index: usize,
        options: &BackupOptions,
    ) -> Result<BackupInfo, ControlError> {
        let _operation = self.begin()?;
        let disk = self.disk(index)?;
        let backup = LiveDisk::begin_backup(&disk.image.disk, options);
        let backup = Arc::new(backup.map_err(|error| disk.error(error))?);
        let running = Running { index, backup };
        let info = running.info();
        lock(&self.0.backups).push(running);
        Ok(info)
    }

    /// Reads a backup from offset `from` on into `buffer`, once what lies below offset `release` is
    /// given up: the reader has it for good.
    ///
    /// # Errors
    /// [`ControlError::NoSuchBackup`], [`ControlError::Ended`]; [`ControlError::Disk`] if it has failed, or
    /// has no such offset.
    pub fn read_backup(
        &self,
        id: BackupId,
        from: u64,
        release: u64,
        buffer: &mut [u8],
    ) -> Result<Chunk, ControlError> {
        let _operation = self.begin()?;
        let running = self.backup(id)?;
        let backup = &running.backup;
        let chunk = backup
            .release(release)
            .and_then(|()| backup.read(from, buffer));
        chunk.map_err(|error| self.backup_error(&running, error))
    }

    /// Ends a backup: its reader has all of it, or, with `cancel`, does not want it any more.
    ///
    /// # Errors
    /// [`ControlError::NoSuchBackup`], [`ControlError::Ended`]; [`ControlError::Disk`] if it has failed, or
    /// has not been read to its end, and goes on; or the bitmap of one that is cancelled is lost.
    pub fn end_backup(&self, id: BackupId, cancel: bool) -> Result<(), ControlError> {
        let _operation = self.begin()?;
        let running = self.backup(id)?;
        if !cancel {
            let finished = running.backup.finish();
            finished.map_err(|error| self.backup_error(&running, error))?;
        }
        let cancelled = running.backup.cancel();
        lock(&self.0.backups).retain(|running| running.backup.id() != id);
        cancelled.map_err(|error| self.backup_error(&running, error))
    }

    /// The backups that have not been ended.
    pub fn backups(&self) -> Vec<BackupInfo> {
        let running = lock(&self.0.backups).clone();
        running.iter().map(Running::info).collect()
    }

    fn backup(&self, id: BackupId) -> Result<Running, ControlError> {
        let backups = lock(&self.0.backups);
        let found = backups.iter().find(|running| running.backup.id() == id);
        found.cloned().ok_or(ControlError::NoSuchBackup(id))
    }

    fn backup_error(&self, running: &Running, error: tandem_block::Error) -> ControlError {
        match self.disk(running.index) {
            Ok(disk) => disk.error(error),
            Err(error) => error,
        }
    }
}

impl Running {
    fn info(&self) -> BackupInfo {
        let (backup, status) = (&self.backup, self.backup.status());
        let (incremental, bitmap) = match backup.kind() {
            BackupKind::Full { track } => (false, track.as_ref()),
            BackupKind::Since { bitmap, .. } => (true, Some(bitmap)),
        };
        BackupInfo {
            backup: backup.id(),
            base: backup.base(),
            disk: device_name(self.index),
            incremental,
            bitmap: bitmap.map(|name| String::from_utf8_lossy(name).into_owned()),
            size: backup.size(),
            granularity: backup.granularity(),
            wanted: status.wanted,
            released: status.released,
            scratch_used: status.scratch_used,
            scratch_peak: status.scratch_peak,
            scratch_size: status.scratch_size,
            state: match status.state {
                BackupState::Active => "running",
                BackupState::Failed => "failed",
            },
            error: status.failure,
        }
    }
}

/// What the socket tells of a part of a backup, whose data follows.
pub(super) fn describe(chunk: &Chunk) -> Value {
    let extents = chunk.extents.iter().map(|extent| {
        let kind = if extent.is_zero { "zero" } else { "data" };
        json!([extent.offset, extent.len, kind])
    });
    json!({
        "next": chunk.next,
        "bytes": chunk.bytes,
        "extents": Vec::from_iter(extents),
    })
}

fn as_text<S: serde::Serializer>(id: &BackupId, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(id)
}

fn as_optional_text<S: serde::Serializer>(id: &Option<BackupId>, to: S) -> Result<S::Ok, S::Error> {
    id.map(|id| id.to_string()).serialize(to)
}

#[cfg(test)]
mod tests;
