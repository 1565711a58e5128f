//! The options that images and files have, and what values they may have.

use std::collections::BTreeMap;

use crate::size;

/// Values that an option may have, and what to say of others.
pub enum Values {
    /// Any text.
    Any,
    /// `on` or `off`.
    Switch,
    /// A size in bytes.
    Size,
    /// A number.
    Number,
    /// One of these; the function makes a message of another one.
    OneOf(&'static [&'static str], fn(&str) -> String),
}

/// Options of every image and file.
pub const GENERIC: &[(&str, Values)] = &[
    ("auto-read-only", Values::Switch),
    ("cache.direct", Values::Switch),
    ("cache.no-flush", Values::Switch),
    (
        "detect-zeroes",
        Values::OneOf(&["off", "on", "unmap"], invalid),
    ),
    (
        "discard",
        Values::OneOf(&["ignore", "off", "unmap", "on"], |_| {
            "Invalid discard option".to_owned()
        }),
    ),
    ("force-share", Values::Switch),
    ("node-name", Values::Any),
    ("read-only", Values::Switch),
];

/// Options of files.
pub const FILE: &[(&str, Values)] = &[
    (
        "aio",
        Values::OneOf(&["threads", "native", "io_uring"], invalid),
    ),
    ("locking", Values::OneOf(&["auto", "on", "off"], invalid)),
];

/// Options of raw images.
pub const RAW: &[(&str, Values)] = &[("offset", Values::Size), ("size", Values::Size)];

/// Options of qcow2 images.
pub const QCOW2: &[(&str, Values)] = &[
    ("cache-clean-interval", Values::Number),
    ("cache-size", Values::Size),
    ("discard-no-unref", Values::Switch),
    ("l2-cache-entry-size", Values::Size),
    ("l2-cache-size", Values::Size),
    ("lazy-refcounts", Values::Switch),
    ("overlap-check", OVERLAP_CHECK),
    ("overlap-check.active-l1", Values::Switch),
    ("overlap-check.active-l2", Values::Switch),
    ("overlap-check.bitmap-directory", Values::Switch),
    ("overlap-check.inactive-l1", Values::Switch),
    ("overlap-check.inactive-l2", Values::Switch),
    ("overlap-check.main-header", Values::Switch),
    ("overlap-check.refcount-block", Values::Switch),
    ("overlap-check.refcount-table", Values::Switch),
    ("overlap-check.snapshot-table", Values::Switch),
    ("overlap-check.template", OVERLAP_CHECK),
    ("pass-discard-other", Values::Switch),
    ("pass-discard-request", Values::Switch),
    ("pass-discard-snapshot", Values::Switch),
    ("refcount-cache-size", Values::Size),
];

const OVERLAP_CHECK: Values = Values::OneOf(&["none", "constant", "cached", "all"], |value| {
    format!(
        "Unsupported value '{value}' for qcow2 option 'overlap-check'. Allowed are any of the \
         following: none, constant, cached, all"
    )
});

fn invalid(value: &str) -> String {
    format!("invalid parameter value: {value}")
}

/// Refuses wrong values of the options that are `known`.
pub fn check(values: &BTreeMap<String, String>, known: &[(&str, Values)]) -> Result<(), String> {
    for (name, allowed) in known {
        let Some(value) = values.get(*name) else {
            continue;
        };
        match allowed {
            Values::Any => {}
            Values::Switch if is_on(value).is_some() => {}
            Values::Switch => return Err(format!("Parameter '{name}' expects 'on' or 'off'")),
            Values::Size => {
                size::parse(value).map_err(|wrong| wrong.message(name, value))?;
            }
            Values::Number => {
                let is_number = value.parse::<u64>().is_ok();
                let text = || format!("Parameter '{name}' expects a number");
                is_number.then_some(()).ok_or_else(text)?;
            }
            Values::OneOf(names, _) if names.contains(&&**value) => {}
            Values::OneOf(_, message) => return Err(message(value)),
        }
    }
    Ok(())
}

/// Whether a switch is on; nothing if it is no switch.
pub fn is_on(value: &str) -> Option<bool> {
    match value {
        "on" | "yes" | "true" | "y" => Some(true),
        "off" | "no" | "false" | "n" => Some(false),
        _ => None,
    }
}
