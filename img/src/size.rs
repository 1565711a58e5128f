//! Sizes as QEMU reads and prints them.

/// Why a text is not a size.
#[derive(Debug, PartialEq, Eq)]
pub enum Wrong {
    /// It is not a number with a known suffix.
    Syntax,
    /// It is negative or exceeds 64 bits.
    Range,
}

impl Wrong {
    /// QEMU's message about `value` as the value of the parameter `name`.
    pub fn message(self, name: &str, value: &str) -> String {
        match self {
            Self::Range => format!("Value '{value}' is out of range for parameter '{name}'"),
            Self::Syntax => format!(
                "Parameter '{name}' expects a non-negative number below 2^64\n\
                 Optional suffix k, M, G, T, P or E means kilo-, mega-, giga-, tera-, peta-\n\
                 and exabytes, respectively."
            ),
        }
    }
}

/// Reads a size in bytes: decimal, possibly with a fraction, with one of the suffixes b, k, M, G,
/// T, P, E (powers of 1024, in either case), or hexadecimal without any.
pub fn parse(text: &str) -> Result<u64, Wrong> {
    let text = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    let (negative, text) = match text.strip_prefix(['+', '-']) {
        Some(rest) => (text.starts_with('-'), rest),
        None => (false, text),
    };
    let hexadecimal = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"));
    let value = match hexadecimal {
        Some(digits) if !digits.is_empty() => {
            if !digits.bytes().all(|byte| byte.is_ascii_hexdigit()) {
                return Err(Wrong::Syntax);
            }
            u64::from_str_radix(digits, 16).map_err(|_| Wrong::Range)?
        }
        _ => parse_decimal(text)?,
    };
    if negative {
        return Err(Wrong::Range);
    }
    Ok(value)
}

/// [`parse`] of what is called `what` in QEMU's message about a mistake in it.
pub fn parse_named(what: &str, text: &str) -> Result<u64, String> {
    parse_between(what, text, 0, i64::MAX as u64)
}

/// As [`parse_named`], of a size from `min` to `max`.
pub fn parse_between(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    match parse(text) {
        Ok(size) if (min..=max).contains(&size) => Ok(size),
        Ok(_) | Err(Wrong::Range) => Err(format!(
            "Invalid {what} specified. Must be between {min} and {max}."
        )),
        Err(Wrong::Syntax) => Err(format!("Invalid {what} specified: '{text}'.")),
    }
}

/// A number as C's `strtoull` reads it, and nothing behind it: hexadecimal after `0x`, octal after `0`,
/// else decimal. Whether it is negative, and its amount, unless that exceeds 64 bits; `None` for what
/// is no number.
pub fn c_number(text: &str) -> Option<(bool, Option<u64>)> {
    let digits = text.trim_start_matches([' ', '\t', '\n', '\u{b}', '\u{c}', '\r']);
    let (negative, digits) = match digits.strip_prefix(['+', '-']) {
        Some(rest) => (digits.starts_with('-'), rest),
        None => (false, digits),
    };
    let hexadecimal = digits
        .strip_prefix("0x")
        .or_else(|| digits.strip_prefix("0X"));
    let (digits, radix) = match hexadecimal {
        Some(digits) => (digits, 16),
        None if digits.starts_with('0') => (digits, 8),
        None => (digits, 10),
    };
    let is_number = !digits.is_empty() && digits.chars().all(|digit| digit.is_digit(radix));
    is_number.then(|| (negative, u64::from_str_radix(digits, radix).ok()))
}

/// A [`c_number`] from `min` to `max`, of what is called `what` in QEMU's message about a mistake in
/// it.
pub fn parse_count(what: &str, text: &str, min: u64, max: u64) -> Result<u64, String> {
    match c_number(text) {
        None => Err(format!("Invalid {what} specified: '{text}'.")),
        Some((_, Some(0))) if min == 0 => Ok(0),
        Some((false, Some(number))) if (min..=max).contains(&number) => Ok(number),
        Some(_) => Err(format!(
            "Invalid {what} specified. Must be between {min} and {max}."
        )),
    }
}

fn parse_decimal(text: &str) -> Result<u64, Wrong> {
    let digits_end = |text: &str| {
        text.bytes()
            .position(|byte| !byte.is_ascii_digit())
            .unwrap_or(text.len())
    };
    let (whole, rest) = text.split_at(digits_end(text));
    let (fraction, suffix) = match rest.strip_prefix('.') {
        Some(rest) => rest.split_at(digits_end(rest)),
        None => ("", rest),
    };
    if whole.is_empty() && fraction.is_empty() {
        return Err(Wrong::Syntax);
    }
    let unit = match suffix.to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "k" => 10,
        "m" => 20,
        "g" => 30,
        "t" => 40,
        "p" => 50,
        "e" => 60,
        _ => return Err(Wrong::Syntax),
    };
    let has_fraction = fraction.bytes().any(|digit| digit != b'0');
    if has_fraction && unit == 0 {
        return Err(Wrong::Syntax);
    }
    let whole: u64 = match whole {
        "" => 0,
        digits => digits.parse().map_err(|_| Wrong::Range)?,
    };
    let part: f64 = format!("0.{fraction}0")
        .parse()
        .map_err(|_| Wrong::Syntax)?;
    let part = (part * (1u64 << unit) as f64).round() as u64;
    whole
        .checked_mul(1 << unit)
        .and_then(|whole| whole.checked_add(part))
        .ok_or(Wrong::Range)
}

/// A size in bytes for people: three significant digits and a binary unit.
pub fn human(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    let mut value = bytes as f64;
    let mut unit = 0;
    // The next unit begins where the whole part would have four digits.
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    format!("{} {}B", three_digits(value), UNITS[unit])
}

/// C's `%.3g`, for values below 1024.
fn three_digits(value: f64) -> String {
    let decimals = match value {
        v if v >= 999.5 => return "1e+03".to_owned(),
        v if v >= 99.95 => 0,
        v if v >= 9.995 => 1,
        v if v >= 0.9995 || v == 0.0 => 2,
        _ => 3,
    };
    let text = format!("{value:.decimals$}");
    if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.').to_owned()
    } else {
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The expected values are what `qemu-img create` and `qemu-img info` print.
    #[test]
    fn reads_sizes_like_qemu() {
        for (text, expected) in [
            ("1.5G", 1_610_612_736),
            ("0x1000", 4096),
            ("1.3k", 1331),
            ("0.1M", 104_858),
            ("1b", 1),
            ("1B", 1),
            (" 1M", 1 << 20),
            ("+5", 5),
            (".5k", 512),
            ("5.k", 5120),
            ("010", 10),
            ("1.00000000000000000000001M", 1 << 20),
            ("5e", 5 << 60),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
        for text in [
            "",
            "1X",
            "1e3",
            "1.5",
            "1kB",
            "1M ",
            "0x10k",
            "0x1.8",
            "inf",
            "1.999999999b",
            ".",
            "x",
        ] {
            assert_eq!(parse(text), Err(Wrong::Syntax), "{text}");
        }
        for text in [
            "-1",
            "-0",
            "16E",
            "99999999999999999999",
            "0x10000000000000000",
        ] {
            assert_eq!(parse(text), Err(Wrong::Range), "{text}");
        }
    }

    /// As `qemu-img dd count=` does.
    #[test]
    fn reads_numbers_like_qemu() {
        let parse = |text| parse_count("count", text, 0, i64::MAX as u64);
        for (text, expected) in [
            ("0", 0),
            ("-0", 0),
            ("+3", 3),
            (" 2", 2),
            ("0x1F", 31),
            ("010", 8),
        ] {
            assert_eq!(parse(text), Ok(expected), "{text}");
        }
        for text in ["", "x", "1k", "2 ", "0x", "08", "1.5", "-", "0x-1", "++1"] {
            let reason = format!("Invalid count specified: '{text}'.");
            assert_eq!(parse(text), Err(reason), "{text}");
        }
        for text in ["-1", "9223372036854775808", "99999999999999999999"] {
            assert!(parse(text).unwrap_err().contains("between 0 and"), "{text}");
        }
    }

    #[test]
    fn prints_sizes_like_qemu() {
        for (bytes, expected) in [
            (0, "0 B"),
            (512, "512 B"),
            (1000, "0.977 KiB"),
            (1331, "1.3 KiB"),
            (197_120, "192 KiB"),
            (1_441_792, "1.38 MiB"),
            (10 << 20, "10 MiB"),
            (1 << 63, "8 EiB"),
        ] {
            assert_eq!(human(bytes), expected);
        }
    }
}
