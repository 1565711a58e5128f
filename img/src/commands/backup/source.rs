//! Where a backup comes from: the monitor that runs the disk, or an image that nobody uses.

use std::sync::Arc;

use tandem_block::qcow2::BitmapAction;
use tandem_block::{
    Backup, BackupId, BackupKind, BackupOptions, ChunkExtent, Disk, Error, FileOptions, LiveDisk,
};

use super::request::Request;
use crate::common_options::follow;
use crate::image::Image;
use crate::image::opened::Opened;

/// Bytes that are read at once.
pub const PIECE: usize = 4 << 20;

/// What a backup is.
#[derive(Clone, Debug)]
pub struct Info {
    /// What it is called.
    pub id: BackupId,
    /// The backup that it goes on from, if it is known.
    pub base: Option<BackupId>,
    /// Whether it has only what has changed since that.
    pub is_incremental: bool,
    /// The bitmap that it goes by, or begins.
    pub bitmap: Vec<u8>,
    /// Of the disk, in bytes.
    pub size: u64,
    /// In bytes.
    pub granularity: u64,
}

/// A part of a backup.
pub struct Part {
    /// What it has, in order.
    pub extents: Vec<ChunkExtent>,
    /// Where the backup goes on.
    pub next: u64,
}

/// A backup that can be read.
pub trait Source: Send {
    /// What it is.
    fn info(&self) -> &Info;

    /// Reads a part from offset `from` on, whose data is put into `buffer`. What lies below offset
    /// `release` is not asked for again.
    ///
    /// # Errors
    /// Why it could not be read.
    fn read(&mut self, from: u64, release: u64, buffer: &mut Vec<u8>) -> Result<Part, String>;

    /// Ends the backup, all of which is where it should be.
    ///
    /// # Errors
    /// Why its bitmap does not go on from it.
    fn finish(self: Box<Self>) -> Result<(), String>;

    /// Gives the backup up.
    fn cancel(self: Box<Self>);
}

/// A backup of an image that nobody uses. Its bitmap changes at the end: until then, nothing of the image
/// does, and a process that is killed leaves it as it was.
pub struct Local {
    disk: Arc<LiveDisk>,
    backup: Backup,
    info: Info,
    at_end: Vec<BitmapAction>,
}

impl Local {
    /// Begins a backup of `image`.
    ///
    /// # Errors
    /// Why there can be none.
    pub fn begin(request: &Request<'_>, image: &Image<'_>) -> Result<Self, String> {
        let read_only = request.since.is_none() && request.track.is_none();
        let follow = follow(request.args).map_err(|failure| failure.message)?;
        let options = image.options(read_only, follow, FileOptions::default());
        let opened = options.and_then(|options| Opened::open(image, &options));
        let disk = Arc::new(match opened.map_err(|e| e.reason())? {
            Opened::Raw(disk) => LiveDisk::new(*disk),
            Opened::Qcow2(disk) => LiveDisk::new(*disk),
            Opened::Other(_) => return Err("a backup is of a file".to_owned()),
        });
        let at_end = at_end(&disk, request)?;
        let kind = match request.since {
            None => BackupKind::Full { track: None },
            Some(name) => BackupKind::Since {
                bitmap: name.to_vec(),
                keep: true,
            },
        };
        // Nothing changes, so nothing is put there.
        let options = BackupOptions {
            kind,
            scratch_dir: Some(std::env::temp_dir()),
            scratch_size: 0,
        };
        let backup = LiveDisk::begin_backup(&disk, &options).map_err(|e| e.reason())?;
        let info = Info {
            id: backup.id(),
            base: None,
            is_incremental: request.since.is_some(),
            bitmap: request.since.or(request.track).unwrap_or_default().to_vec(),
            size: backup.size(),
            granularity: backup.granularity(),
        };
        Ok(Self {
            disk,
            backup,
            info,
            at_end,
        })
    }
}

/// What becomes of the bitmap once the backup has succeeded.
fn at_end(disk: &LiveDisk, request: &Request<'_>) -> Result<Vec<BitmapAction>, String> {
    let name = match (request.since, request.track) {
        (Some(name), _) if !request.keep => name,
        (None, Some(name)) => name,
        _ => return Ok(Vec::new()),
    };
    let shown = name.escape_ascii();
    let bitmaps = disk.bitmaps().map_err(|e| e.reason())?;
    let found = bitmaps.iter().find(|bitmap| bitmap.info.name == name);
    let is_old = disk.with_image(|image| !matches!(image.bitmaps(), Ok(Some(_))));
    let name = name.to_vec();
    match found {
        Some(bitmap) if bitmap.info.in_use => Err(format!(
            "Bitmap '{shown}' is inconsistent and cannot be used"
        )),
        Some(bitmap) if !bitmap.info.auto => Err(format!(
            "bitmap '{shown}' does not follow changes of the disk: enable it, or keep it"
        )),
        Some(_) => Ok(vec![BitmapAction::Clear { name }]),
        None if request.since.is_some() => Err(format!("Dirty bitmap '{shown}' not found")),
        None if is_old => Err("Cannot store dirty bitmaps in qcow2 v2 files".to_owned()),
        None => Ok(vec![BitmapAction::Add {
            name,
            granularity: None,
            enabled: true,
        }]),
    }
}

impl Source for Local {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self, from: u64, release: u64, buffer: &mut Vec<u8>) -> Result<Part, String> {
        buffer.resize(PIECE, 0);
        let released = self.backup.release(release);
        let chunk = released.and_then(|()| self.backup.read(from, buffer));
        let chunk = chunk.map_err(|e| format!("error while reading: {}", e.cause()))?;
        buffer.truncate(chunk.bytes);
        Ok(Part {
            extents: chunk.extents,
            next: chunk.next,
        })
    }

    fn finish(self: Box<Self>) -> Result<(), String> {
        let done = self.backup.finish().and_then(|()| {
            if !self.at_end.is_empty() {
                self.disk.change_bitmaps(&self.at_end)?;
            }
            self.disk.close()
        });
        done.map_err(|e: Error| e.reason())
    }

    fn cancel(self: Box<Self>) {
        // It has taken nothing, so there is nothing that could go wrong.
        let _ = self.backup.cancel();
    }
}
