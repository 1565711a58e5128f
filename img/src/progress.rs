//! How far long work has come.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use indicatif::{ProgressBar, ProgressStyle};
use signal_hook::consts::SIGUSR1;
use signal_hook::flag;

use crate::getopt::Parsed;
use crate::output;

/// Per cent that the work must have come further before a line for programs says so.
const STEP: f32 = 1.0;

/// Steps of the bar.
const STEPS: u64 = 10_000;

/// Shows how far work has come: with `-p` in lines on standard output as `qemu-img` prints them, else
/// by a bar on standard error if that is a terminal, and not at all with `-q`. Without `-p`, `SIGUSR1`
/// asks for a line on standard error, which comes with the next step.
pub struct Progress {
    bar: ProgressBar,
    /// Per cent of the last line for programs, whether it was printed or not.
    line: Mutex<f32>,
    /// Whether all lines are printed.
    prints: bool,
    /// See [`STEP`].
    step: f32,
    /// Whether there was a signal that asks for a line.
    asked: Arc<AtomicBool>,
}

impl Progress {
    /// As the options `progress` and `quiet` of `args` say.
    pub fn new(args: &Parsed) -> Self {
        Self::with_step(args, STEP)
    }

    /// As [`new`](Self::new), with a line where the work has come `step` per cent further.
    pub fn with_step(args: &Parsed, step: f32) -> Self {
        let (forced, quiet) = (args.has("progress"), args.has("quiet"));
        let bar = if forced || quiet {
            ProgressBar::hidden()
        } else {
            // It is drawn on standard error, and only if that is a terminal.
            let style = ProgressStyle::with_template("{bar:40} {percent:>3}% {eta}");
            let style = style.unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(STEPS).with_style(style)
        };
        let asked = Arc::new(AtomicBool::new(false));
        // Without it the work goes on, and the signal ends it.
        drop(flag::register(SIGUSR1, Arc::clone(&asked)));
        let progress = Self {
            bar,
            line: Mutex::new(0.0),
            prints: forced && !quiet,
            step,
            asked,
        };
        progress.print(0.0);
        progress
    }

    /// Ends the lines of work that has not begun, as QEMU does.
    pub fn end_unbegun(args: &Parsed) {
        if args.has("progress") && !args.has("quiet") {
            output::print_now("\n");
        }
    }

    /// Whether somebody sees how far the work has come, or has asked.
    pub fn is_watched(&self) -> bool {
        self.prints || !self.bar.is_hidden() || self.asked.load(Ordering::Relaxed)
    }

    /// `done` of `total` has been done.
    pub fn set(&self, done: u64, total: u64) {
        let percent = percent(done, total);
        if self.line() != percent {
            self.set_percent(percent);
        }
    }

    /// So much has been done. A line says that this is all, however often that is told.
    pub fn set_percent(&self, percent: f32) {
        let percent = percent.min(100.0);
        let position = f64::from(percent) / 100.0 * STEPS as f64;
        self.bar.set_position(position as u64);
        if percent > self.line() + self.step || percent == 100.0 {
            *self.line.lock().unwrap_or_else(PoisonError::into_inner) = percent;
            self.print(percent);
        }
    }

    /// Prints by `print` to a terminal that may show a bar.
    pub fn suspend(&self, print: impl FnOnce()) {
        self.bar.suspend(print);
    }

    fn line(&self) -> f32 {
        *self.line.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn print(&self, percent: f32) {
        if self.prints {
            output::print_now(&format!("    ({percent:.2}/100%)\r"));
        } else if self.asked.swap(false, Ordering::Relaxed) {
            self.suspend(|| output::complain_line(&format!("    ({percent:.2}/100%)")));
        }
    }
}

/// How much of `total` `done` is, as precisely as `qemu-img` tells it.
pub fn percent(done: u64, total: u64) -> f32 {
    match total {
        0 => 100.0,
        _ => (100.0 * done as f64 / total as f64) as f32,
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.bar.finish_and_clear();
        if self.prints {
            output::print_now("\n");
        }
    }
}
