//! The commands about backups.

use serde::Deserialize;
use serde_json::{Value, json};
use tandem_block::{BackupId, BackupKind, BackupOptions};

use super::{Control, RequestError, bytes, find, value};
use crate::control::backup::describe;

/// Most bytes of a backup in one answer.
const MAX_PAYLOAD: usize = 4 << 20;
/// As many as there are when nobody says how many.
const DEFAULT_PAYLOAD: usize = 1 << 20;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Begin {
    disk: Value,
    since: Option<String>,
    track: Option<String>,
    #[serde(default)]
    keep: bool,
    scratch_dir: Option<String>,
    scratch_size: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Read {
    backup: String,
    from: u64,
    max: Option<Value>,
    release: Option<u64>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct End {
    backup: String,
    #[serde(default)]
    cancel: bool,
}

pub(super) fn begin(control: &Control, arguments: Begin) -> Result<Value, RequestError> {
    let index = find(control, &arguments.disk)?;
    let name = String::into_bytes;
    let kind = match (arguments.since, arguments.track, arguments.keep) {
        (None, track, false) => BackupKind::Full {
            track: track.map(name),
        },
        (Some(since), None, keep) => BackupKind::Since {
            bitmap: name(since),
            keep,
        },
        (Some(_), Some(_), _) => {
            let reason = "since and track exclude each other: the bitmap of since goes on anyway";
            return Err(RequestError::Argument(reason.to_owned()));
        }
        (None, _, true) => {
            let reason = "keep is for the bitmap of since, which is missing";
            return Err(RequestError::Argument(reason.to_owned()));
        }
    };
    let default = BackupOptions::default();
    let size = arguments
        .scratch_size
        .as_ref()
        .map(|size| bytes("scratch_size", size));
    let options = BackupOptions {
        kind,
        scratch_dir: arguments.scratch_dir.map(Into::into),
        scratch_size: size.transpose()?.unwrap_or(default.scratch_size),
    };
    let info = control.begin_backup(index, &options)?;
    Ok(value(&info))
}

/// Reads a part of a backup into `payload`, which follows the answer.
pub(super) fn read(
    control: &Control,
    arguments: &Read,
    payload: &mut Vec<u8>,
) -> Result<Value, RequestError> {
    let id = id(&arguments.backup)?;
    let max = match &arguments.max {
        None => DEFAULT_PAYLOAD,
        Some(max) => match bytes("max", max)? {
            // Whoever asked again and again would not come further.
            0 => {
                return Err(RequestError::Argument(
                    "max: there is nothing in 0 bytes".to_owned(),
                ));
            }
            max => usize::try_from(max).unwrap_or(MAX_PAYLOAD).min(MAX_PAYLOAD),
        },
    };
    let release = arguments.release.unwrap_or(arguments.from);
    payload.resize(max, 0);
    let chunk = control.read_backup(id, arguments.from, release, payload);
    payload.truncate(chunk.as_ref().map_or(0, |chunk| chunk.bytes));
    Ok(describe(&chunk?))
}

pub(super) fn end(control: &Control, arguments: &End) -> Result<Value, RequestError> {
    control.end_backup(id(&arguments.backup)?, arguments.cancel)?;
    Ok(json!({}))
}

fn id(text: &str) -> Result<BackupId, RequestError> {
    let wrong = |error: tandem_block::Error| RequestError::Argument(format!("backup: {error}"));
    text.parse().map_err(wrong)
}
