//! How far long work has come.

use std::cell::Cell;

use indicatif::{ProgressBar, ProgressStyle};

use crate::getopt::Parsed;
use crate::output;

/// Per cent that the work must have come further before a line for programs says so.
const STEP: f64 = 1.0;

/// Shows how far work has come: with `-p` in lines on standard output as `qemu-img` prints them, else
/// by a bar on standard error if that is a terminal, and not at all with `-q`.
pub struct Progress {
    bar: ProgressBar,
    /// Per cent of the last line for programs; `None` if there are no such lines.
    line: Cell<Option<f64>>,
}

impl Progress {
    /// As the options `progress` and `quiet` of `args` say.
    pub fn new(args: &Parsed) -> Self {
        let (forced, quiet) = (args.has("progress"), args.has("quiet"));
        let bar = if forced || quiet {
            ProgressBar::hidden()
        } else {
            // It is drawn on standard error, and only if that is a terminal.
            let style = ProgressStyle::with_template("{bar:40} {percent:>3}% {eta}");
            ProgressBar::new(0).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
        };
        let progress = Self {
            bar,
            line: Cell::new((forced && !quiet).then_some(0.0)),
        };
        progress.print(0.0);
        progress
    }

    /// `done` of `total` has been done.
    pub fn set(&self, done: u64, total: u64) {
        self.bar.set_length(total);
        self.bar.set_position(done);
        let Some(last) = self.line.get() else {
            return;
        };
        let percent = match total {
            0 => 100.0,
            _ => (done as f64 / total as f64).min(1.0) * 100.0,
        };
        if percent - last >= STEP || percent > last && percent == 100.0 {
            self.line.set(Some(percent));
            self.print(percent);
        }
    }

    /// Prints by `print` to a terminal that may show a bar.
    pub fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }

    fn print(&self, percent: f64) {
        if self.line.get().is_some() {
            output::print_now(&format!("    ({percent:.2}/100%)\r"));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        if self.line.get().is_some() {
            output::print_now("\n");
        }
    }
}
