//! The commands that are about the images that a disk consists of.

use std::path::PathBuf;

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tandem_block::ImageFormat;
use tandem_block::qcow2::BackingName;

use super::{RequestError, arguments, bytes, find};
use crate::control::jobs::micros;
use crate::control::{CommitBase, Control};

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct CommitArguments {
    disk: Value,
    base: Option<Value>,
    #[serde(default)]
    pivot: bool,
    max_last: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RebaseArguments {
    disk: Value,
    backing: String,
    format: Option<String>,
    max_last: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ForkArguments {
    disk: Value,
    overlay: PathBuf,
    fork: PathBuf,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct JobArguments {
    job: u64,
}

/// Carries out `command`, one of those of this module.
pub(super) fn carry_out(
    control: &Control,
    command: &str,
    request: Map<String, Value>,
) -> Result<Value, RequestError> {
    match command {
        "commit" => commit(control, arguments(command, request)?),
        "rebase" => rebase(control, arguments(command, request)?),
        "fork" => fork(control, arguments(command, request)?),
        _ => cancel(control, arguments(command, request)?),
    }
}

fn commit(control: &Control, arguments: CommitArguments) -> Result<Value, RequestError> {
    let index = find(control, &arguments.disk)?;
    let base = match &arguments.base {
        None => CommitBase::Between(0),
        Some(Value::String(path)) => CommitBase::Path(path.into()),
        Some(number) => number
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .map(CommitBase::Between)
            .ok_or_else(|| {
                let what =
                    "is neither a path nor how many images are between the disk and its base";
                RequestError::Argument(format!("base: {number} {what}"))
            })?,
    };
    let max_last = max_last(&arguments.max_last)?;
    let job = control.commit(index, &base, arguments.pivot, max_last)?;
    Ok(json!({"job": job}))
}

fn rebase(control: &Control, arguments: RebaseArguments) -> Result<Value, RequestError> {
    let index = find(control, &arguments.disk)?;
    let max_last = max_last(&arguments.max_last)?;
    let RebaseArguments {
        backing, format, ..
    } = arguments;
    let wrong = |what: &str| RequestError::Argument(format!("command rebase: {what}"));
    let backing = match format {
        None if backing.is_empty() => None,
        Some(_) if backing.is_empty() => {
            return Err(wrong("no backing file has a format"));
        }
        None => {
            return Err(wrong(
                "the format of the backing file is needed: raw or qcow2",
            ));
        }
        Some(format) => {
            let known = ImageFormat::from_header(format.as_bytes());
            let known = known.ok_or_else(|| wrong(&format!("unknown format '{format}'")))?;
            Some(BackingName {
                file: backing.into_bytes(),
                format: known.name().into(),
            })
        }
    };
    let job = control.rebase(index, backing, max_last)?;
    Ok(json!({"job": job}))
}

fn fork(control: &Control, arguments: ForkArguments) -> Result<Value, RequestError> {
    let index = find(control, &arguments.disk)?;
    let report = control.fork(index, arguments.overlay, arguments.fork)?;
    let warning = report.warning.as_ref().map(ToString::to_string);
    Ok(json!({"stopped_us": micros(&report), "warning": warning}))
}

fn cancel(control: &Control, arguments: JobArguments) -> Result<Value, RequestError> {
    control.cancel_job(arguments.job)?;
    Ok(json!({}))
}

fn max_last(bytes_left: &Option<Value>) -> Result<Option<u64>, RequestError> {
    let bytes_left = bytes_left.as_ref();
    bytes_left.map(|left| bytes("max_last", left)).transpose()
}
