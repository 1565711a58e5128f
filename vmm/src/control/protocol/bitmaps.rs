//! The commands that are about bitmaps.

use serde::Deserialize;
use serde_json::{Map, Value, json};
use tandem_block::LiveBitmap;
use tandem_block::qcow2::BitmapAction;

use super::{RequestError, arguments, bytes, find};
use crate::control::Control;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListArguments {
    disk: Value,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct TransactionArguments {
    disk: Value,
    actions: Vec<Map<String, Value>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct AddArguments {
    name: String,
    granularity: Option<Value>,
    #[serde(default)]
    disabled: bool,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct NameArguments {
    name: String,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct MergeArguments {
    target: String,
    sources: Vec<String>,
}

/// Carries out `command`, which is about bitmaps if there is such a command.
pub(super) fn carry_out(
    control: &Control,
    command: String,
    mut request: Map<String, Value>,
) -> Result<Value, RequestError> {
    match command.as_str() {
        "bitmaps" => list(control, request),
        "bitmap-transaction" => transaction(control, request),
        _ => {
            let disk = request.shift_remove("disk");
            let Some(actions) = actions(&command, request) else {
                return Err(RequestError::UnknownCommand(command));
            };
            let missing =
                || RequestError::Argument(format!("command {command}: missing field `disk`"));
            change(control, &disk.ok_or_else(missing)?, &actions?)
        }
    }
}

fn list(control: &Control, request: Map<String, Value>) -> Result<Value, RequestError> {
    let ListArguments { disk } = arguments("bitmaps", request)?;
    let bitmaps = control.bitmaps(find(control, &disk)?)?;
    let shown = |LiveBitmap { info, dirty, .. }: LiveBitmap| {
        json!({
            "name": String::from_utf8_lossy(&info.name),
            "granularity": info.granularity,
            "enabled": info.auto,
            "in_use": info.in_use,
            "dirty": dirty,
        })
    };
    let bitmaps: Vec<Value> = bitmaps.into_iter().map(shown).collect();
    Ok(json!({"bitmaps": bitmaps}))
}

/// Several commands at one instant, each as it would be given alone, but without a disk.
fn transaction(control: &Control, request: Map<String, Value>) -> Result<Value, RequestError> {
    let transaction: TransactionArguments = arguments("bitmap-transaction", request)?;
    let mut all = Vec::new();
    for mut action in transaction.actions {
        let Some(Value::String(command)) = action.shift_remove("command") else {
            return Err(RequestError::Argument(
                "command bitmap-transaction: an action has no \"command\" that is a string"
                    .to_owned(),
            ));
        };
        let actions = actions(&command, action).unwrap_or_else(|| {
            Err(RequestError::Argument(format!(
                "command bitmap-transaction: '{command}' is none of bitmap-add, bitmap-remove, \
                 bitmap-enable, bitmap-disable, bitmap-clear and bitmap-merge"
            )))
        });
        all.extend(actions?);
    }
    change(control, &transaction.disk, &all)
}

fn change(
    control: &Control,
    disk: &Value,
    actions: &[BitmapAction],
) -> Result<Value, RequestError> {
    control.change_bitmaps(find(control, disk)?, actions)?;
    Ok(json!({}))
}

/// What `command` with the arguments in `request` asks for; `None` if it is no change of bitmaps.
fn actions(
    command: &str,
    request: Map<String, Value>,
) -> Option<Result<Vec<BitmapAction>, RequestError>> {
    let named = |request, action: fn(Vec<u8>) -> BitmapAction| {
        let NameArguments { name } = arguments(command, request)?;
        Ok(vec![action(name.into_bytes())])
    };
    Some(match command {
        "bitmap-add" => arguments(command, request).and_then(add),
        "bitmap-merge" => arguments(command, request).map(merge),
        "bitmap-remove" => named(request, |name| BitmapAction::Remove { name }),
        "bitmap-clear" => named(request, |name| BitmapAction::Clear { name }),
        "bitmap-enable" => named(request, |name| BitmapAction::SetEnabled {
            name,
            enabled: true,
        }),
        "bitmap-disable" => named(request, |name| BitmapAction::SetEnabled {
            name,
            enabled: false,
        }),
        _ => return None,
    })
}

fn add(arguments: AddArguments) -> Result<Vec<BitmapAction>, RequestError> {
    let granularity = arguments.granularity.as_ref();
    let granularity = granularity.map(|value| bytes("granularity", value));
    Ok(vec![BitmapAction::Add {
        name: arguments.name.into_bytes(),
        granularity: granularity.transpose()?,
        enabled: !arguments.disabled,
    }])
}

fn merge(arguments: MergeArguments) -> Vec<BitmapAction> {
    let merge = |source: String| BitmapAction::Merge {
        target: arguments.target.clone().into_bytes(),
        source: source.into_bytes(),
    };
    arguments.sources.into_iter().map(merge).collect()
}

#[cfg(test)]
mod tests;
