//! Numbers as `qemu-io` reads and prints them.

use std::time::Duration;

use super::failed::Failed;
use crate::size::{self, Wrong};

/// Most bytes of one request.
pub const MAX_REQUEST: u64 = 0x7fff_fe00;

/// Reads an offset or a length, which fits into 63 bits.
pub fn parse_size(text: &str) -> Result<u64, Failed> {
    parse_size_called(text, text)
}

/// [`parse_size`] of what is called `name` in the message.
pub fn parse_size_called(text: &str, name: &str) -> Result<u64, Failed> {
    let reason = match size::parse(text) {
        Ok(size) if size <= i64::MAX as u64 => return Ok(size),
        Err(Wrong::Syntax) => "non-numeric argument, or extraneous/unrecognized suffix",
        Ok(_) | Err(Wrong::Range) => "argument too large",
    };
    Err(Failed::output(&format!(
        "Parsing error: {reason} -- {name}"
    )))
}

/// Reads the byte that data consists of.
pub fn parse_pattern(text: &str) -> Result<u8, Failed> {
    parse_integer(text)
        .and_then(|number| u8::try_from(number).ok())
        .ok_or_else(|| Failed::output(&format!("{text} is not a valid pattern byte")))
}

/// Reads a number as C's `strtol` does, and nothing behind it. An empty text is zero, and a number that
/// is too large the largest.
pub fn parse_integer(text: &str) -> Option<i64> {
    if text.is_empty() {
        return Some(0);
    }
    let (negative, amount) = size::c_number(text)?;
    let amount = amount.and_then(|amount| i64::try_from(amount).ok());
    let amount = amount.unwrap_or(i64::MAX);
    Some(if negative { -amount } else { amount })
}

/// A number of bytes for people.
pub fn bytes(value: f64) -> String {
    const UNITS: [&str; 6] = ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let (mut text, mut unit) = (format!("{value:.6}"), "bytes");
    let mut size = 1.0;
    for larger in UNITS {
        size *= 1024.0;
        if value >= size {
            (text, unit) = (format!("{:.3}", value / size), larger);
        }
    }
    // Only the beginning of the fraction counts, as in QEMU.
    if let Some(zeros) = text.find(".000") {
        text.truncate(zeros);
    }
    format!("{text} {unit}")
}

/// A time: for programs with all its parts, for people as seconds while they suffice.
pub fn time(time: Duration, for_programs: bool) -> String {
    let fraction = f64::from(time.subsec_nanos()) / 1e9;
    let seconds = time.as_secs();
    if seconds == 0 && !for_programs {
        return format!("{fraction:05.2} sec");
    }
    let (hours, minutes) = (seconds / 3600, seconds / 60 % 60);
    let seconds = (seconds % 60) as f64 + fraction;
    format!("{hours}:{minutes:02}:{seconds:05.2}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_as_in_c() {
        for (text, expected) in [
            ("", Some(0)),
            ("010", Some(8)),
            ("0x1F", Some(31)),
            ("-3", Some(-3)),
            ("+7", Some(7)),
            ("0", Some(0)),
            ("99999999999999999999", Some(i64::MAX)),
            ("0x", None),
            ("08", None),
            ("1k", None),
            ("+-1", None),
            ("x", None),
        ] {
            assert_eq!(parse_integer(text), expected, "{text}");
        }
    }

    /// The expected texts are those of `qemu-io`.
    #[test]
    fn numbers_of_bytes() {
        for (value, expected) in [
            (0.0, "0 bytes"),
            (512.0, "512 bytes"),
            (45.95043, "45.950430 bytes"),
            (0.0004, "0 bytes"),
            (1023.0, "1023 bytes"),
            (1539.0, "1.503 KiB"),
            (4096.0, "4 KiB"),
            (1_769_472.0, "1.688 MiB"),
            (8.0 * (1u64 << 60) as f64, "8 EiB"),
        ] {
            assert_eq!(bytes(value), expected);
        }
    }

    #[test]
    fn times() {
        let short = Duration::from_millis(38);
        assert_eq!(time(short, false), "00.04 sec");
        assert_eq!(time(short, true), "0:00:00.04");
        assert_eq!(time(Duration::from_secs(3725), false), "1:02:05.00");
    }
}
