//! Copying persistent bitmaps.

use tandem_block::qcow2::{BitmapEditor, BitmapInfo};

use crate::failure::Failure;
use crate::getopt::Parsed;
use crate::image::opened::Opened;
use crate::output;

/// The bitmaps of `source` that are to be copied.
///
/// # Errors
/// It cannot have any, or one is broken and `args` do not say that it is left out.
pub fn to_copy(args: &Parsed, source: &Opened) -> Result<Vec<BitmapInfo>, Failure> {
    let error = |reason: &str| args.name.error(reason);
    let found = match source {
        Opened::Raw(_) | Opened::Other(_) => None,
        Opened::Qcow2(disk) => disk.bitmaps().map_err(|e| error(&e.reason()))?,
    };
    let mut bitmaps = found.ok_or_else(|| error("Source lacks bitmap support"))?;
    if let Some(broken) = bitmaps.iter().find(|bitmap| bitmap.in_use)
        && !args.has("skip-broken-bitmaps")
    {
        let name = broken.name.escape_ascii();
        return Err(error(&format!(
            "Cannot copy inconsistent bitmap '{name}'\n\
             Try --skip-broken-bitmaps, or use 'qemu-img bitmap --remove' to delete it"
        )));
    }
    bitmaps.retain(|bitmap| {
        if bitmap.in_use {
            let name = bitmap.name.escape_ascii();
            let text = format!("warning: Skipping inconsistent bitmap '{name}'");
            output::complain_line(&args.name.text(&text));
        }
        !bitmap.in_use
    });
    Ok(bitmaps)
}

/// The failure of a target that cannot have bitmaps.
pub fn unsupported(args: &Parsed, format: &str) -> Failure {
    let text = format!("Format driver '{format}' does not support bitmaps");
    args.name.error(&text)
}

/// Copies `bitmaps` of `source` to `target`, and closes both.
pub fn copy(
    args: &Parsed,
    bitmaps: &[BitmapInfo],
    source: Opened,
    target: Opened,
) -> Result<(), Failure> {
    let (Opened::Qcow2(source), Opened::Qcow2(target)) = (source, target) else {
        return Ok(());
    };
    let error = |text: &str, reason: &str| args.name.error(&format!("{text}{reason}"));
    let editor = |disk| BitmapEditor::new(disk).map_err(|e| error("", &e.reason()));
    let (source, mut target) = (editor(*source)?, editor(*target)?);
    for bitmap in bitmaps {
        let name = bitmap.name.escape_ascii();
        target
            .add(&bitmap.name, Some(bitmap.granularity))
            .map_err(|e| error(&format!("Failed to create bitmap {name}: "), &e.reason()))?;
    }
    // The order in which QEMU does it, and so finds out that it cannot.
    for bitmap in bitmaps.iter().rev() {
        let name = bitmap.name.escape_ascii();
        target
            .merge_from(&bitmap.name, &source, &bitmap.name)
            .and_then(|()| target.set_enabled(&bitmap.name, bitmap.auto))
            .map_err(|e| error(&format!("Failed to populate bitmap {name}: "), &e.reason()))?;
    }
    target.commit().map_err(|e| error("", &e.reason()))
}
