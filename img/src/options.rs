//! Lists of options: `-o name=value,name=value`.

use crate::size;

/// An option that a format has.
#[derive(Clone, Copy, Debug)]
pub struct Definition {
    /// What it is called.
    pub name: &'static str,
    /// What values it takes.
    pub kind: Kind,
    /// The value that it has when it is not given, if that is shown.
    pub default: Option<&'static str>,
    /// What it means.
    pub help: &'static str,
}

/// What values an option takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Any text.
    Text,
    /// `on` or `off`.
    Switch,
    /// A number.
    Number,
    /// A size in bytes, with a suffix or without.
    Size,
}

/// The value of an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Value {
    /// Of [`Kind::Text`].
    Text(String),
    /// Of [`Kind::Switch`].
    Switch(bool),
    /// Of [`Kind::Number`] and [`Kind::Size`].
    Number(u64),
}

/// The options of a format and their values.
#[derive(Debug)]
pub struct Options {
    definitions: &'static [Definition],
    values: Vec<Option<Value>>,
}

/// Whether QEMU takes `list` for a list of options: a comma at either end is half of a pair.
pub fn is_list(list: &str) -> bool {
    let leading = list.len() - list.trim_start_matches(',').len();
    let trailing = list.len() - list.trim_end_matches(',').len();
    !list.is_empty() && leading.is_multiple_of(2) && trailing.is_multiple_of(2)
}

/// Whether a list asks for help.
pub fn asks_for_help(list: &str) -> bool {
    split(list).iter().any(|item| item == "help" || item == "?")
}

impl Options {
    /// The options of `definitions`, with their default values.
    pub fn new(definitions: &'static [Definition]) -> Self {
        let default = |definition: &Definition| {
            let text = definition.default?;
            parse_value(definition, text).ok()
        };
        Self {
            definitions,
            values: definitions.iter().map(default).collect(),
        }
    }

    /// Sets what `list` says; of an option that is there twice, the last value counts.
    ///
    /// # Errors
    /// The message of QEMU.
    pub fn parse(&mut self, list: &str) -> Result<(), String> {
        for item in split(list) {
            let (name, text) = match item.split_once('=') {
                Some((name, text)) => (name, text),
                None if self.position(&item).is_some() => (&*item, "on"),
                None => match item.strip_prefix("no") {
                    Some(name) if self.position(name).is_some() => (name, "off"),
                    _ => (&*item, "on"),
                },
            };
            let at = self
                .position(name)
                .ok_or_else(|| format!("Invalid parameter '{name}'"))?;
            self.values[at] = Some(parse_value(&self.definitions[at], text)?);
        }
        Ok(())
    }

    fn position(&self, name: &str) -> Option<usize> {
        self.definitions
            .iter()
            .position(|definition| definition.name == name)
    }

    /// The value of an option.
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.values.get(self.position(name)?)?.as_ref()
    }

    /// The value of a [`Kind::Text`] option.
    pub fn text(&self, name: &str) -> Option<&str> {
        match self.get(name) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    /// Whether a [`Kind::Switch`] option is on.
    pub fn is_on(&self, name: &str) -> bool {
        self.get(name) == Some(&Value::Switch(true))
    }

    /// The value of a [`Kind::Number`] or [`Kind::Size`] option.
    pub fn number(&self, name: &str) -> Option<u64> {
        match self.get(name) {
            Some(Value::Number(number)) => Some(*number),
            _ => None,
        }
    }

    /// Sets an option from outside the list.
    pub fn set(&mut self, name: &str, value: Value) {
        if let Some(at) = self.position(name) {
            self.values[at] = Some(value);
        }
    }

    /// All values as QEMU shows them, each after a blank.
    pub fn shown(&self) -> String {
        let mut text = String::new();
        for (definition, value) in self.definitions.iter().zip(&self.values) {
            let value = match value {
                None => continue,
                Some(Value::Text(text)) => text.replace(',', ",,"),
                Some(Value::Switch(true)) => "on".to_owned(),
                Some(Value::Switch(false)) => "off".to_owned(),
                Some(Value::Number(number)) => number.to_string(),
            };
            text += &format!(" {}={value}", definition.name);
        }
        text
    }
}

/// A description of options.
pub fn describe(definitions: &[Definition]) -> String {
    let mut lines: Vec<_> = definitions
        .iter()
        .map(|definition| {
            let kind = match definition.kind {
                Kind::Text => "str",
                Kind::Switch => "bool (on/off)",
                Kind::Number => "num",
                Kind::Size => "size",
            };
            let start = format!("{}=<{kind}>", definition.name);
            format!("  {start:<22} - {}\n", definition.help)
        })
        .collect();
    lines.sort();
    lines.concat()
}

/// Splits at single commas; two are one in a value.
pub fn split(list: &str) -> Vec<String> {
    let mut items = vec![String::new()];
    let mut chars = list.chars().peekable();
    while let Some(c) = chars.next() {
        if c == ',' && chars.next_if_eq(&',').is_none() {
            items.push(String::new());
        } else if let Some(item) = items.last_mut() {
            item.push(c);
        }
    }
    items
}

/// Reads the value of an option.
///
/// # Errors
/// The message of QEMU.
pub fn parse_value(definition: &Definition, text: &str) -> Result<Value, String> {
    let name = definition.name;
    match definition.kind {
        Kind::Text => Ok(Value::Text(text.to_owned())),
        Kind::Switch => match text {
            "on" | "yes" | "true" | "y" => Ok(Value::Switch(true)),
            "off" | "no" | "false" | "n" => Ok(Value::Switch(false)),
            _ => Err(format!("Parameter '{name}' expects 'on' or 'off'")),
        },
        Kind::Number => match size::c_number(text) {
            None => Err(format!("Parameter '{name}' expects a number")),
            Some((_, None)) => Err(format!(
                "Value '{text}' is too large for parameter '{name}'"
            )),
            // Negative numbers are large ones, as in C.
            Some((true, Some(number))) => Ok(Value::Number(number.wrapping_neg())),
            Some((false, Some(number))) => Ok(Value::Number(number)),
        },
        Kind::Size => size::parse(text)
            .map(Value::Number)
            .map_err(|wrong| wrong.message(name, text)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEFINITIONS: &[Definition] = &[
        Definition {
            name: "size",
            kind: Kind::Size,
            default: Some("64k"),
            help: "h",
        },
        Definition {
            name: "file",
            kind: Kind::Text,
            default: None,
            help: "h",
        },
        Definition {
            name: "raw",
            kind: Kind::Switch,
            default: None,
            help: "h",
        },
    ];

    fn parse(list: &str) -> Result<String, String> {
        let mut options = Options::new(DEFINITIONS);
        options.parse(list).map(|()| options.shown())
    }

    #[test]
    fn commas_are_doubled_in_values() {
        assert_eq!(
            parse("file=a,,b,raw").unwrap(),
            " size=65536 file=a,,b raw=on"
        );
        assert_eq!(
            parse("noraw,size=1k,size=2k").unwrap(),
            " size=2048 raw=off"
        );
        assert!(
            is_list("a,b") && is_list("a,,") && !is_list("a,") && !is_list(",a") && !is_list("")
        );
        assert!(asks_for_help("a=b,?") && asks_for_help("help") && !asks_for_help("a=help"));
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(parse("nofoo").unwrap_err(), "Invalid parameter 'nofoo'");
        assert_eq!(
            parse("raw=x").unwrap_err(),
            "Parameter 'raw' expects 'on' or 'off'"
        );
        assert_eq!(
            parse("size=-1").unwrap_err(),
            "Value '-1' is out of range for parameter 'size'"
        );
    }
}
