//! Metrics as lines of JSON, written as the VM runs.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use serde::Serialize;

use super::Metrics;
use crate::config::MetricsTarget;
use crate::control::Control;
use crate::descriptor;
use crate::error::{Error, HostContext, Result};
use crate::sandbox::{self, Role};

/// Lines that may be asked for while an earlier one waits for its reader.
const MAX_WAITING: usize = 16;
/// How long the end waits for a reader to take the last lines.
const PATIENCE: Duration = Duration::from_secs(1);
/// How often the end looks for room among the lines that wait.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// What metrics are written to. It may be a pipe whose reader is slow.
#[derive(Debug)]
pub struct MetricsOutput(File);

/// Writes metrics of a VM, a line at a time, on a thread of its own: a reader that is slow or gone
/// holds nobody up, and costs lines.
pub struct MetricsLog {
    reporter: Reporter,
    /// Disconnected when the thread has ended.
    ended: Receiver<()>,
}

/// Asks for a line.
#[derive(Clone)]
pub struct Reporter {
    orders: SyncSender<Order>,
    dropped: Arc<AtomicU64>,
}

enum Order {
    Report,
    End,
}

/// A line.
#[derive(Serialize)]
struct Line {
    #[serde(flatten)]
    metrics: Metrics,
    /// Lines before this one that nobody has taken.
    dropped_lines: u64,
}

impl MetricsOutput {
    /// Opens `target`. Do so before anything else is opened: a descriptor that was not inherited is
    /// found to be missing then.
    ///
    /// # Errors
    /// [`Error::File`], also for a file that holds something else than metrics; [`Error::Metrics`].
    pub fn open(target: &MetricsTarget) -> Result<Self> {
        match target {
            MetricsTarget::Descriptor(number) => {
                let error = |source| Error::Metrics {
                    descriptor: *number,
                    source,
                };
                descriptor::duplicate(*number).map(Self).map_err(error)
            }
            MetricsTarget::File(path) => {
                let error = |source| Error::File {
                    file: path.clone(),
                    action: "write metrics to",
                    source,
                };
                open_file(path).map(Self).map_err(error)
            }
        }
    }

    /// Standard error.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn stderr() -> Result<Self> {
        let stderr = io::stderr().as_fd().try_clone_to_owned();
        Ok(Self(stderr.host("duplicate standard error")?.into()))
    }
}

/// For reading, too: so the other end of a named pipe need not be open, and may come and go.
fn open_file(path: &Path) -> io::Result<File> {
    let mut options = File::options();
    options.read(true).append(true).create(true);
    let mut file = options.open(path)?;
    let kind = file.metadata()?.file_type();
    if kind.is_block_device() {
        return Err(io::Error::other("it is a block device"));
    }
    let mut first = [b'{'];
    if kind.is_file() && file.read(&mut first)? == 1 && first != *b"{" {
        return Err(io::Error::other("it holds something else than metrics"));
    }
    Ok(file)
}

impl Reporter {
    /// Has a line written soon, without waiting for that.
    pub fn report(&self) {
        if self.orders.try_send(Order::Report).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

impl MetricsLog {
    /// Starts writing the metrics of `control` to `output`: each `interval`, and when a
    /// [`Reporter`] asks.
    ///
    /// # Errors
    /// [`Error::Host`].
    pub fn start(
        output: MetricsOutput,
        interval: Option<Duration>,
        control: Control,
    ) -> Result<Self> {
        let (orders, receiver) = sync_channel(MAX_WAITING);
        let (ends, ended) = sync_channel::<()>(0);
        let dropped = Arc::new(AtomicU64::new(0));
        let role = control.confined(Role::Watch);
        let writer = Writer {
            output: output.0,
            is_in_line: false,
            is_closed: false,
            control,
            dropped: dropped.clone(),
        };
        let body = move || {
            writer.run(&receiver, interval);
            drop(ends);
        };
        sandbox::spawn("metrics".to_owned(), role, body)?;
        Ok(Self {
            reporter: Reporter { orders, dropped },
            ended,
        })
    }

    /// The means to ask for lines.
    pub fn reporter(&self) -> Reporter {
        self.reporter.clone()
    }

    /// Has the last lines written, and waits for that, but not long for a reader who does not read.
    pub fn finish(self) {
        let end = Instant::now() + PATIENCE;
        // There is room as soon as a line has been written.
        while let Err(TrySendError::Full(_)) = self.reporter.orders.try_send(Order::End) {
            if Instant::now() >= end {
                return;
            }
            thread::sleep(RETRY_INTERVAL);
        }
        let left = end.saturating_duration_since(Instant::now());
        let _ = self.ended.recv_timeout(left);
    }
}

/// What the thread has.
struct Writer {
    output: File,
    /// The last line is there in part.
    is_in_line: bool,
    /// Nobody will ever read what is written.
    is_closed: bool,
    control: Control,
    dropped: Arc<AtomicU64>,
}

impl Writer {
    fn run(mut self, orders: &Receiver<Order>, interval: Option<Duration>) {
        let mut next = interval.map(|interval| Instant::now() + interval);
        loop {
            let order = match next {
                None => orders.recv().map_err(|_| RecvTimeoutError::Disconnected),
                Some(next) => orders.recv_timeout(next.saturating_duration_since(Instant::now())),
            };
            match order {
                Ok(Order::Report) => self.write_line(),
                Ok(Order::End) | Err(RecvTimeoutError::Disconnected) => return,
                Err(RecvTimeoutError::Timeout) => self.write_line(),
            }
            if let (Some(next), Some(interval)) = (&mut next, interval) {
                self.advance(next, interval);
            }
        }
    }

    /// Sets `next` to the next time that lies ahead. The times that have gone by while a line waited
    /// for its reader are those of lines that are not written.
    fn advance(&self, next: &mut Instant, interval: Duration) {
        let now = Instant::now();
        if *next > now {
            return;
        }
        *next += interval;
        if *next <= now {
            let missed = (now - *next).as_nanos() / interval.as_nanos().max(1) + 1;
            let missed = u32::try_from(missed).unwrap_or(u32::MAX);
            self.dropped.fetch_add(missed.into(), Ordering::Relaxed);
            *next = now + interval;
        }
    }

    fn write_line(&mut self) {
        let line = Line {
            metrics: self.control.metrics(),
            dropped_lines: self.dropped.load(Ordering::Relaxed),
        };
        // Plain data is always written; without it the line would be empty.
        let mut text = serde_json::to_string(&line).unwrap_or_default();
        text.push('\n');
        if self.is_in_line {
            text.insert(0, '\n');
        }
        if self.is_closed || self.write(text.as_bytes()).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn write(&mut self, mut text: &[u8]) -> io::Result<()> {
        while !text.is_empty() {
            match self.output.write(text) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => text = &text[count..],
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                // Whoever shares the descriptor has made it non-blocking.
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    poll(&mut [PollFd::new(&self.output, PollFlags::OUT)], None)?;
                }
                Err(error) => {
                    self.is_closed |= error.kind() == io::ErrorKind::BrokenPipe;
                    return Err(error);
                }
            }
            self.is_in_line = !text.is_empty();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
