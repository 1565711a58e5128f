//! From the source to the target: one thread reads while another one writes the part before.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{self, Receiver, SyncSender};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use super::source::{Part, Source};
use super::target::Target;
use crate::progress::Progress;
use crate::rate::Rate;

/// Why a copy has not come to its end.
#[derive(Debug)]
pub enum Stop {
    /// The backup could not be read.
    Source(String),
    /// The target could not be written.
    Target(String),
    /// This signal has come.
    Signal(i32),
}

/// The signal that has come, if one has.
#[derive(Clone)]
pub struct Signals(Arc<AtomicUsize>);

impl Signals {
    /// Waits for those that end a program. A second one does so at once: the first one is not seen while a
    /// pipe is full whose reader has stopped.
    pub fn new() -> Self {
        let signal = Arc::new(AtomicUsize::new(0));
        let is_second = Arc::new(AtomicBool::new(false));
        for number in [SIGINT, SIGTERM, SIGHUP] {
            // Without them the signal ends the program at once. They are called in this order.
            drop(flag::register_conditional_default(
                number,
                is_second.clone(),
            ));
            drop(flag::register(number, is_second.clone()));
            drop(flag::register_usize(
                number,
                signal.clone(),
                number as usize,
            ));
        }
        Self(signal)
    }

    /// Fails once one has come.
    pub fn check(&self) -> Result<(), Stop> {
        match self.0.load(Ordering::Relaxed) {
            0 => Ok(()),
            number => Err(Stop::Signal(number as i32)),
        }
    }
}

/// What has been read.
type Read = Result<(Part, Vec<u8>), String>;

/// How a copy goes.
pub struct Copy<'a> {
    /// Where it begins.
    pub start: u64,
    /// How fast it may go.
    pub rate: Option<Rate>,
    /// Who is told how far it has come.
    pub progress: &'a Progress,
    /// What ends it early.
    pub signals: &'a Signals,
}

impl Copy<'_> {
    /// Copies what `source` has to `target`.
    ///
    /// # Errors
    /// Why it has not come to the end.
    pub fn run(&self, source: &mut dyn Source, target: &mut dyn Target) -> Result<(), Stop> {
        let size = source.info().size;
        let release = AtomicU64::new(self.start);
        let (to, from) = mpsc::sync_channel(1);
        let (give_back, used) = mpsc::channel();
        std::thread::scope(|scope| {
            let (start, released) = (self.start, &release);
            scope.spawn(move || read(source, start, released, &to, &used));
            // It goes before the other thread is waited for.
            let from: Receiver<Read> = from;
            for read in &from {
                let (part, mut data) = read.map_err(Stop::Source)?;
                let next = part.next;
                self.write(part, &mut data, target)?;
                release.store(target.has(next), Ordering::Relaxed);
                self.progress.set(next, size);
                // At the end nobody wants it.
                let _ = give_back.send(data);
            }
            target.complete().map_err(Stop::Target)?;
            while !target.has_arrived().map_err(Stop::Target)? {
                self.signals.check()?;
            }
            Ok(())
        })
    }

    fn write(&self, part: Part, mut data: &mut [u8], target: &mut dyn Target) -> Result<(), Stop> {
        for extent in part.extents {
            self.signals.check()?;
            // As much as the extents have together, which has been checked.
            let len = if extent.is_zero {
                0
            } else {
                extent.len as usize
            };
            let (bytes, rest) = data.split_at_mut(len);
            data = rest;
            if let Some(rate) = &self.rate {
                rate.wait(len as u64);
            }
            target.write(extent, bytes).map_err(Stop::Target)?;
        }
        self.signals.check()
    }
}

/// Reads into buffers that come back by `used`, or new ones.
fn read(
    source: &mut dyn Source,
    start: u64,
    release: &AtomicU64,
    to: &SyncSender<Read>,
    used: &Receiver<Vec<u8>>,
) {
    let size = source.info().size;
    let mut from = start;
    while from < size {
        let mut buffer = used.try_recv().unwrap_or_default();
        let part = source.read(from, release.load(Ordering::Relaxed), &mut buffer);
        let failed = part.is_err();
        if let Ok(part) = &part {
            from = part.next;
        }
        // Who writes may have failed.
        if to.send(part.map(|part| (part, buffer))).is_err() || failed {
            return;
        }
    }
}
