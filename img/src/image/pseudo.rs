//! Names that describe an image: `json:{"driver": "qcow2", "file": {"filename": "NAME"}}` and
//! `blkdebug:CONFIG:NAME`.
//!
//! Names that stand in an image are never read so.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;

use serde_json::Value;

use crate::image::opts::ImageOpts;
use tandem_block::ImageFormat;

/// Adds what `name` describes to `options`, which come first, and tells whether it describes
/// anything; `format` is what another option says of the format.
///
/// # Errors
/// The message of QEMU.
pub fn add_name(
    options: &mut ImageOpts,
    name: &OsStr,
    format: Option<&OsStr>,
) -> Result<bool, String> {
    let bytes = name.as_bytes();
    if !bytes.starts_with(b"json:") && !bytes.starts_with(b"blkdebug:") {
        return Ok(false);
    }
    let name = name.to_str().ok_or("The name is not UTF-8")?;
    if let Some(text) = name.strip_prefix("json:") {
        add_json(options, text)?;
    } else if let Some(rest) = name.strip_prefix("blkdebug:") {
        let (config, image) = rest
            .split_once(':')
            .ok_or("blkdebug requires both config file and image path")?;
        add_blkdebug(options, config, image, format);
    }
    Ok(true)
}

fn add_blkdebug(options: &mut ImageOpts, config: &str, image: &str, format: Option<&OsStr>) {
    let is_top = match format {
        Some(format) => format == "blkdebug",
        None => options.get("driver") == Some("blkdebug"),
    };
    let node = if is_top { "" } else { "file." };
    if !is_top {
        options.add("file.driver".to_owned(), "blkdebug".to_owned());
    }
    if !config.is_empty() {
        options.add(format!("{node}config"), config.to_owned());
    }
    let driver = options.get(&format!("{node}image.driver"));
    let file = match driver.and_then(ImageFormat::from_name) {
        Some(_) => "file.filename",
        None => "filename",
    };
    options.add(format!("{node}image.{file}"), image.to_owned());
}

fn add_json(options: &mut ImageOpts, text: &str) -> Result<(), String> {
    if text.trim().is_empty() {
        return Err("Could not parse the JSON options: Expecting a JSON value".to_owned());
    }
    let value: Value = serde_json::from_str(&double_quoted(text)).map_err(|e| {
        let reason = match (
            e.is_eof(),
            text.split(['{', '}', '[', ']', ',', ':']).next(),
        ) {
            (true, _) => "premature EOI".to_owned(),
            (_, Some(word)) if word.starts_with(|c: char| c.is_ascii_alphabetic()) => {
                format!("invalid keyword '{word}'")
            }
            _ => e.to_string(),
        };
        format!("Could not parse the JSON options: JSON parse error, {reason}")
    })?;
    if !value.is_object() {
        return Err("Invalid JSON object given".to_owned());
    }
    flatten("", &value, options);
    Ok(())
}

/// `text` with double quotes around strings: QEMU takes single ones, too.
fn double_quoted(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut quote = None;
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        match (quote, c) {
            (Some(_), '\\') => match chars.next() {
                Some('\'') => out.push('\''),
                next => {
                    out.push('\\');
                    out.extend(next);
                }
            },
            (Some('\''), '"') => out.push_str("\\\""),
            (None, '\'' | '"') => {
                quote = Some(c);
                out.push('"');
            }
            (Some(open), c) if c == open => {
                quote = None;
                out.push('"');
            }
            _ => out.push(c),
        }
    }
    out
}

/// Adds what `value` holds, under names with dots.
fn flatten(name: &str, value: &Value, options: &mut ImageOpts) {
    let below = |key: &str| match name {
        "" => key.to_owned(),
        name => format!("{name}.{key}"),
    };
    let text = match value {
        Value::Object(map) => {
            return map
                .iter()
                .for_each(|(key, value)| flatten(&below(key), value, options));
        }
        Value::Array(items) => {
            let items = items.iter().enumerate();
            return items.for_each(|(i, value)| flatten(&below(&i.to_string()), value, options));
        }
        Value::Bool(true) => "on".to_owned(),
        Value::Bool(false) => "off".to_owned(),
        Value::Null => String::new(),
        Value::Number(number) => number.to_string(),
        Value::String(text) => text.clone(),
    };
    options.add(name.to_owned(), text);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quotes_become_double() {
        assert_eq!(
            double_quoted(r#"{'a\'"b': "it's \" \n"}"#),
            r#"{"a'\"b": "it's \" \n"}"#
        );
    }
}
