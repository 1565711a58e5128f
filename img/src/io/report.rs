//! What a request reports of itself.

use std::fmt::Write;
use std::time::Duration;

use super::numbers;

/// Text that is said at once.
const SAID: usize = 64 << 10;

/// How a request reports itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Style {
    /// Not at all.
    pub quiet: bool,
    /// In one line for programs.
    pub for_programs: bool,
}

impl Style {
    /// The report that `len` bytes at `offset` have been dealt with in `time`, as `what` says.
    pub fn report(self, what: &str, offset: u64, len: u64, time: Duration) -> String {
        if self.quiet {
            return String::new();
        }
        let shown = numbers::time(time, self.for_programs);
        let per_second = |number: f64| number / time.as_secs_f64();
        let (speed, rate) = (per_second(len as f64), per_second(1.0));
        if self.for_programs {
            format!("{len},1,{shown},{speed:.3},{rate:.3}\n")
        } else {
            let (size, speed) = (numbers::bytes(len as f64), numbers::bytes(speed));
            format!(
                "{what} {len}/{len} bytes at offset {offset}\n\
                 {size}, 1 ops; {shown} ({speed}/sec and {rate:.4} ops/sec)\n"
            )
        }
    }
}

/// Says what `data`, which is at `offset`, is in hexadecimal.
pub fn dump(data: &[u8], offset: u64, say: &mut dyn FnMut(&str)) {
    let mut text = String::new();
    for (row, at) in data.chunks(16).zip((offset..).step_by(16)) {
        // Writing to a string does not fail.
        let _ = write!(text, "{at:08x}:  ");
        for byte in row {
            let _ = write!(text, "{byte:02x} ");
        }
        text.push(' ');
        let printable = |byte: &u8| match byte {
            byte if byte.is_ascii_alphanumeric() => char::from(*byte),
            _ => '.',
        };
        text.extend(row.iter().map(printable));
        text.push('\n');
        if text.len() >= SAID {
            say(&text);
            text.clear();
        }
    }
    say(&text);
}
