//! The language of the control socket: a request on a line, and its answer on a line, which may be
//! followed by bytes.

mod backup;
mod bitmaps;
mod images;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use super::{Control, ControlError, device_name};
use crate::config::{listed, parse_memory};

/// The commands of the control socket.
pub const COMMANDS: &[&str] = &[
    "status",
    "disks",
    "metrics",
    "flush",
    "pause",
    "resume",
    "resize",
    "shutdown",
    "commit",
    "rebase",
    "fork",
    "jobs",
    "job-cancel",
    "bitmaps",
    "bitmap-add",
    "bitmap-remove",
    "bitmap-enable",
    "bitmap-disable",
    "bitmap-clear",
    "bitmap-merge",
    "bitmap-transaction",
    "backups",
    "backup-begin",
    "backup-read",
    "backup-end",
];

/// Most bytes of a request, without the end of its line.
pub(super) const MAX_LINE: usize = 64 << 10;

/// Why a request was not carried out.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    #[error("the request is not a JSON object on one line: {0}")]
    Syntax(String),
    #[error("the request has more than {MAX_LINE} bytes")]
    TooLong,
    #[error("the request has no \"command\" that is a string")]
    NoCommand,
    #[error("unknown command '{0}'; known are {known}", known = listed(COMMANDS, "and"))]
    UnknownCommand(String),
    #[error("{0}")]
    Argument(String),
    #[error("so many clients are connected already that there is no room for another one")]
    TooManyClients,
    #[error("only the user who runs this VM, and root, may operate it")]
    NotPermitted,
    #[error(transparent)]
    Control(#[from] ControlError),
}

impl RequestError {
    /// A word for programs to tell errors by.
    fn kind(&self) -> &'static str {
        match self {
            Self::Syntax(_) | Self::TooLong | Self::NoCommand => "bad-request",
            Self::UnknownCommand(_) => "unknown-command",
            Self::Argument(_) => "bad-argument",
            Self::TooManyClients => "too-many-clients",
            Self::NotPermitted => "not-permitted",
            Self::Control(error) => error.kind(),
        }
    }

    /// The line that tells of it.
    pub(super) fn answer(&self, id: Option<Value>) -> String {
        let error = json!({"kind": self.kind(), "message": self.to_string()});
        line(id, "error", error)
    }
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NoArguments {}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct FlushArguments {
    disk: Option<Value>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ResizeArguments {
    disk: Value,
    size: Option<Value>,
    #[serde(default)]
    shrink: bool,
}

/// Carries out the request in `text`, and returns the line that answers it. The bytes that follow the
/// line are put into `payload`.
pub(super) fn answer(control: &Control, text: &[u8], payload: &mut Vec<u8>) -> String {
    payload.clear();
    let mut request = match serde_json::from_slice::<Map<String, Value>>(text) {
        Ok(request) => request,
        Err(error) => return RequestError::Syntax(error.to_string()).answer(None),
    };
    let id = request.shift_remove("id");
    match carry_out(control, request, payload) {
        Ok(result) => line(id, "ok", result),
        Err(error) => error.answer(id),
    }
}

fn line(id: Option<Value>, key: &str, value: Value) -> String {
    let mut answer = Map::new();
    if let Some(id) = id {
        answer.insert("id".to_owned(), id);
    }
    answer.insert(key.to_owned(), value);
    format!("{}\n", Value::Object(answer))
}

fn carry_out(
    control: &Control,
    mut request: Map<String, Value>,
    payload: &mut Vec<u8>,
) -> Result<Value, RequestError> {
    let Some(Value::String(command)) = request.shift_remove("command") else {
        return Err(RequestError::NoCommand);
    };
    match command.as_str() {
        "flush" => flush(control, arguments(&command, request)?),
        "resize" => resize(control, arguments(&command, request)?),
        "commit" | "rebase" | "fork" | "job-cancel" => {
            images::carry_out(control, &command, request)
        }
        "backup-begin" => backup::begin(control, arguments(&command, request)?),
        "backup-read" => backup::read(control, &arguments(&command, request)?, payload),
        "backup-end" => backup::end(control, &arguments(&command, request)?),
        "status" | "disks" | "metrics" | "jobs" | "pause" | "resume" | "backups" | "shutdown" => {
            let NoArguments {} = arguments(&command, request)?;
            simple(control, &command)
        }
        _ if command.starts_with("bitmap") => bitmaps::carry_out(control, command, request),
        _ => Err(RequestError::UnknownCommand(command)),
    }
}

/// A command without arguments.
fn simple(control: &Control, command: &str) -> Result<Value, RequestError> {
    match command {
        "disks" => Ok(json!({"disks": value(&control.disks())})),
        "backups" => Ok(json!({"backups": value(&control.backups())})),
        "metrics" => Ok(value(&control.metrics())),
        "jobs" => Ok(json!({"jobs": value(&control.jobs())})),
        "pause" => control.pause().map(|()| state(control)),
        "resume" => control.resume().map(|()| state(control)),
        "shutdown" => {
            control.shut_down();
            Ok(state(control))
        }
        _ => Ok(value(&control.status())),
    }
    .map_err(RequestError::Control)
}

fn flush(control: &Control, arguments: FlushArguments) -> Result<Value, RequestError> {
    match arguments.disk {
        None => control.flush_all()?,
        Some(disk) => control.flush(find(control, &disk)?)?,
    }
    Ok(json!({}))
}

fn resize(control: &Control, arguments: ResizeArguments) -> Result<Value, RequestError> {
    let index = find(control, &arguments.disk)?;
    let size = arguments.size.as_ref();
    let size = size.map(|size| bytes("size", size)).transpose()?;
    let size = control.resize(index, size, arguments.shrink)?;
    Ok(json!({"size": size}))
}

fn state(control: &Control) -> Value {
    json!({"state": control.state()})
}

/// The arguments of `command`, which are all that is left of its request.
fn arguments<T: DeserializeOwned>(
    command: &str,
    request: Map<String, Value>,
) -> Result<T, RequestError> {
    let wrong = |error| RequestError::Argument(format!("command {command}: {error}"));
    serde_json::from_value(Value::Object(request)).map_err(wrong)
}

/// What is answered is plain data, whose conversion cannot fail.
fn value(data: &impl Serialize) -> Value {
    serde_json::to_value(data).unwrap_or_default()
}

/// The index of a disk that is named, as in `vda`, or numbered from 0.
fn find(control: &Control, disk: &Value) -> Result<usize, RequestError> {
    let none = || RequestError::Control(ControlError::NoSuchDisk(disk.to_string()));
    let mut indices = 0..control.operated().len();
    match disk {
        Value::String(name) => indices.find(|index| device_name(*index) == *name),
        Value::Number(number) => number
            .as_u64()
            .and_then(|number| usize::try_from(number).ok())
            .filter(|index| indices.contains(index)),
        _ => {
            let what = "is neither a name, as in \"vda\", nor a number";
            return Err(RequestError::Argument(format!("disk: {disk} {what}")));
        }
    }
    .ok_or_else(none)
}

/// The value of the argument `name`: a number of bytes, or text with a unit.
fn bytes(name: &str, value: &Value) -> Result<u64, RequestError> {
    let bytes = match value {
        Value::String(text) => parse_memory(text).ok(),
        _ => value.as_u64(),
    };
    bytes.ok_or_else(|| {
        let what = "is neither a number of bytes nor text with a unit, as in \"20G\"";
        RequestError::Argument(format!("{name}: {value} {what}"))
    })
}

#[cfg(test)]
mod tests;
