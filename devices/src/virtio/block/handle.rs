//! The device as whoever operates it sees it, while the guest uses it.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tandem_block::{Disk, Result};
use virtio_queue::QueueT;

use super::config::Config;
use super::engine::{Engine, Source};
use super::rate::Limiter;
use super::target::Target;
use super::worker::Context;
use super::{Options, SEG_MAX, Stats};
use crate::virtio::{Activation, Interrupt};

/// The means to operate a device while a guest uses it. Cloning is cheap: clones share the device.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Shared>);

/// What a device and those who operate it have in common.
///
/// Lock order: `threads` or `resizing` before `shown`.
pub(super) struct Shared {
    pub disk: Arc<dyn Disk>,
    options: Options,
    stats: Arc<Stats>,
    limiter: Option<Arc<Limiter>>,
    /// The driver's choice between write-back and write-through.
    writeback: Arc<AtomicBool>,
    threads: Mutex<Threads>,
    resizing: Mutex<()>,
    shown: Mutex<Shown>,
}

/// What the guest has been told, and how to tell it more.
struct Shown {
    size: u64,
    interrupt: Option<Arc<dyn Interrupt>>,
}

/// The threads that serve the guest.
pub(super) struct Threads {
    engine: Option<Engine>,
    is_paused: bool,
    /// Queues that will be served when the device goes on.
    paused: Vec<Source>,
}

impl Handle {
    /// Counters of what the disk has done, and what has gone wrong.
    pub fn stats(&self) -> Arc<Stats> {
        Arc::clone(&self.0.stats)
    }

    /// The disk.
    pub fn disk(&self) -> Arc<dyn Disk> {
        Arc::clone(&self.0.disk)
    }

    /// Number of queues.
    pub fn queues(&self) -> u16 {
        self.0.options.queues
    }

    /// Makes what the guest has written durable.
    ///
    /// # Errors
    /// Those of [`Disk::flush`].
    pub fn flush(&self) -> Result<()> {
        self.0.disk.flush()
    }

    /// Changes the size of the disk to `size` bytes, and tells the guest.
    ///
    /// # Errors
    /// Those of [`Disk::resize`].
    pub fn resize(&self, size: u64) -> Result<()> {
        self.change_size(|disk| disk.resize(size))
    }

    /// Takes over the size that the file or device below the disk has now, and tells the guest.
    /// Returns whether the disk has its size from there.
    ///
    /// # Errors
    /// Those of [`Disk::follow_size`].
    pub fn follow_size(&self) -> Result<bool> {
        self.change_size(|disk| disk.follow_size())
    }

    fn change_size<T>(&self, change: impl FnOnce(&dyn Disk) -> Result<T>) -> Result<T> {
        // So that of two calls the guest is shown the later one's size.
        let _resizing = lock(&self.0.resizing);
        let result = change(&*self.0.disk);
        // The size may have changed despite an error.
        let size = self.0.disk.size();
        let mut shown = lock(&self.0.shown);
        if shown.size != size {
            shown.size = size;
            // The guest reads the size under this lock, and the generation without: it must not find
            // the new size with the old generation.
            if let Some(interrupt) = &shown.interrupt {
                interrupt.signal_config();
            }
        }
        result
    }

    /// Stops serving the guest: on return all requests that were taken are completed, and no thread
    /// accesses guest memory. What the guest asks for meanwhile waits.
    pub fn pause(&self) {
        self.0.threads().pause();
    }

    /// Goes on after a [`pause`](Self::pause).
    ///
    /// # Errors
    /// A thread could not be started; its queue is not served until the guest resets the device.
    pub fn resume(&self) -> io::Result<()> {
        self.0.threads().resume()
    }
}

impl Shared {
    pub(super) fn new(disk: Arc<dyn Disk>, options: Options) -> Self {
        Self {
            stats: Arc::new(Stats::new(options.queues)),
            limiter: Limiter::new(&options.rate, Instant::now()).map(Arc::new),
            writeback: Arc::new(AtomicBool::new(true)),
            threads: Mutex::new(Threads {
                engine: None,
                is_paused: false,
                paused: Vec::new(),
            }),
            resizing: Mutex::default(),
            shown: Mutex::new(Shown {
                size: disk.size(),
                interrupt: None,
            }),
            options,
            disk,
        }
    }

    pub(super) fn threads(&self) -> MutexGuard<'_, Threads> {
        lock(&self.threads)
    }

    /// What the guest may know of the disk.
    pub(super) fn config(&self) -> Config {
        Config {
            size: lock(&self.shown).size,
            limits: self.disk.limits(),
            seg_max: SEG_MAX,
            queues: self.options.queues,
            writeback: self.writeback.load(Ordering::SeqCst),
        }
    }

    /// The driver switches between write-back and write-through.
    pub(super) fn set_writeback(&self, writeback: bool) {
        let before = self.writeback.swap(writeback, Ordering::SeqCst);
        if before && !writeback && self.disk.limits().write_cache {
            // From now on it takes completed writes for durable, the earlier ones too.
            if let Err(error) = self.disk.flush() {
                self.stats.note_error(&error);
            }
        }
    }

    pub(super) fn activate(&self, activation: Activation) -> io::Result<()> {
        let Activation {
            mem,
            features,
            interrupt,
        } = activation;
        let context = Context {
            mem,
            interrupt: Arc::clone(&interrupt),
            target: Target::new(
                Arc::clone(&self.disk),
                self.options.serial,
                Arc::clone(&self.writeback),
                features,
            ),
            stats: Arc::clone(&self.stats),
            limiter: self.limiter.clone(),
            poll: self.options.poll,
        };
        let mut threads = self.threads();
        threads.clear();
        threads.engine = Some(Engine::new(
            context,
            self.options.queues,
            self.options.threads,
        )?);
        lock(&self.shown).interrupt = Some(interrupt);
        Ok(())
    }

    /// On return no thread accesses guest memory.
    pub(super) fn reset(&self) {
        self.threads().clear();
        lock(&self.shown).interrupt = None;
        self.writeback.store(true, Ordering::SeqCst);
    }
}

impl Threads {
    pub(super) fn start(&mut self, source: Source) -> io::Result<()> {
        let Some(engine) = &mut self.engine else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        if self.is_paused {
            self.paused.push(source);
            return Ok(());
        }
        engine.start(source)
    }

    /// Returns the index in the available ring that comes next.
    pub(super) fn stop(&mut self, index: u16) -> Option<u16> {
        let paused = self.paused.iter().position(|source| source.index == index);
        let source = match paused {
            Some(place) => Some(self.paused.swap_remove(place)),
            None => self.engine.as_mut()?.stop(index),
        };
        source.map(|source| source.queue.next_avail())
    }

    fn clear(&mut self) {
        self.engine = None;
        self.paused.clear();
    }

    fn pause(&mut self) {
        self.is_paused = true;
        if let Some(engine) = &mut self.engine {
            self.paused.append(&mut engine.stop_all());
        }
    }

    fn resume(&mut self) -> io::Result<()> {
        self.is_paused = false;
        let Some(engine) = &mut self.engine else {
            return Ok(());
        };
        while let Some(source) = self.paused.pop() {
            // It may have been rung meanwhile, or before and not been heard to the end.
            source.doorbell.write(1)?;
            engine.start(source)?;
        }
        Ok(())
    }
}

/// A panic elsewhere leaves no state half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
