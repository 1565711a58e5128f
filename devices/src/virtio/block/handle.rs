//! The device as whoever operates it sees it, while the guest uses it.

use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use tandem_block::{Disk, Result};
use virtio_queue::QueueT;

use super::config::Config;
use super::engine::{Engine, Source};
use super::features::FLUSH;
use super::rate::Limiter;
use super::target::Target;
use super::worker::Context;
use super::{Options, Stats};
use crate::virtio::{Activation, Interrupt};

/// The means to operate a device while a guest uses it. Cloning is cheap: clones share the device.
#[derive(Clone)]
pub struct Handle(pub(super) Arc<Shared>);

impl fmt::Debug for Handle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Handle").finish_non_exhaustive()
    }
}

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
///
/// A guest reads the size in two halves, and the configuration generation before and after. Where the
/// device has not been started there is no way to change that, so the size stays the same.
struct Shown {
    size: u64,
    /// Of a device that has been started.
    interrupt: Option<Arc<dyn Interrupt>>,
    /// To a driver that has declined `FLUSH`, there is no write cache, whatever it chooses (virtio 1.3,
    /// section 5.2.5.2).
    can_flush: bool,
}

impl Shown {
    /// Shows the size that `disk` has now.
    fn update(&mut self, disk: &dyn Disk) {
        let Some(interrupt) = &self.interrupt else {
            return;
        };
        let size = disk.size();
        if self.size != size {
            self.size = size;
            // The guest reads the size under the lock that our caller holds, and the generation
            // without: it must not find the new size with the old generation.
            interrupt.signal_config();
        }
    }
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

    /// Changes the size of the disk to `size` bytes, and tells the guest. One that is still looking
    /// at the device is told when it has started it.
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
        lock(&self.0.shown).update(&*self.0.disk);
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
    /// Threads could not be started; their queues are not served until the guest, which is told, resets
    /// the device.
    pub fn resume(&self) -> io::Result<()> {
        // Locked until the end, so that no other driver takes over and is told.
        let mut threads = self.0.threads();
        let result = threads.resume();
        if let Err(error) = &result {
            self.0.stats.note_error(error);
            if let Some(interrupt) = &lock(&self.0.shown).interrupt {
                interrupt.needs_reset();
            }
        }
        result
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
                can_flush: true,
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
        let limits = self.disk.limits();
        let shown = lock(&self.shown);
        let has_cache = limits.write_cache && shown.can_flush;
        Config {
            size: shown.size,
            limits,
            seg_max: u32::from(self.options.queue_size) - 2,
            queues: self.options.queues,
            writeback: has_cache && self.writeback.load(Ordering::SeqCst),
        }
    }

    /// The driver switches between write-back and write-through.
    pub(super) fn set_writeback(&self, writeback: bool) {
        let before = self.writeback.swap(writeback, Ordering::SeqCst);
        if before && !writeback && self.disk.limits().write_cache {
            // From now on it takes completed writes for durable, the earlier ones too. Where they
            // are not, it reads back that the switch has not happened.
            if let Err(error) = self.disk.flush() {
                self.stats.note_error(&error);
                self.writeback.store(true, Ordering::SeqCst);
            }
        }
    }

    pub(super) fn set_features(&self, features: u64) {
        lock(&self.shown).can_flush = features & FLUSH != 0;
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
        let mut shown = lock(&self.shown);
        shown.interrupt = Some(interrupt);
        shown.can_flush = features & FLUSH != 0;
        shown.update(&*self.disk);
        Ok(())
    }

    /// On return no thread accesses guest memory.
    pub(super) fn reset(&self) {
        self.threads().clear();
        let mut shown = lock(&self.shown);
        shown.interrupt = None;
        shown.can_flush = true;
        shown.size = self.disk.size();
        drop(shown);
        self.writeback.store(true, Ordering::SeqCst);
    }
}

impl Threads {
    pub(super) fn start(&mut self, source: Source) -> io::Result<()> {
        let is_waiting = self.find_paused(source.index).is_some();
        let Some(engine) = &mut self.engine else {
            return Err(io::ErrorKind::NotConnected.into());
        };
        if !self.is_paused {
            return engine.start(source);
        }
        if is_waiting || !engine.can_start(source.index) {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.paused.push(source);
        Ok(())
    }

    /// Returns the index in the available ring that comes next.
    pub(super) fn stop(&mut self, index: u16) -> Option<u16> {
        let source = match self.find_paused(index) {
            Some(place) => Some(self.paused.swap_remove(place)),
            None => self.engine.as_mut()?.stop(index),
        };
        source.map(|source| source.queue.next_avail())
    }

    fn find_paused(&self, index: u16) -> Option<usize> {
        self.paused.iter().position(|source| source.index == index)
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
        let mut result = Ok(());
        for source in self.paused.drain(..) {
            result = result.and(engine.start(source));
        }
        result
    }
}

/// A panic elsewhere leaves no state half-changed.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_common::disk::MemoryDisk;
    use crate::test_common::guest_memory;
    use crate::test_common::ring::Ring;
    use vmm_sys_util::eventfd::EventFd;

    #[derive(Default)]
    struct Told {
        needs_reset: AtomicBool,
    }

    impl Interrupt for Told {
        fn signal_queue(&self, _index: u16) {}
        fn signal_config(&self) {}
        fn needs_reset(&self) {
            self.needs_reset.store(true, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_queue_that_cannot_go_on_after_a_pause_needs_a_reset() {
        let shared = Shared::new(Arc::new(MemoryDisk::new(1)), Options::default());
        let handle = Handle(Arc::new(shared));
        let (mem, told) = (guest_memory(), Arc::new(Told::default()));
        let source = |index| Source {
            index,
            queue: Ring::new(&mem, 0, 16).queue(false),
            doorbell: EventFd::new(0).unwrap(),
        };
        let activation = Activation {
            mem: mem.clone(),
            features: FLUSH,
            interrupt: told.clone(),
        };
        handle.0.activate(activation).unwrap();
        handle.pause();
        handle.0.threads().start(source(0)).unwrap();
        handle.resume().unwrap();
        assert!(!told.needs_reset.load(Ordering::SeqCst));
        // There is no such queue, which is as good as one that the system has no thread for.
        handle.pause();
        handle.0.threads().paused.push(source(1));
        assert!(handle.resume().is_err());
        assert!(told.needs_reset.load(Ordering::SeqCst));
        assert!(handle.stats().last_error().is_some());
        handle.0.reset();
    }
}
