//! The threads of a device that its driver has started: one for each queue, and a pool for what has
//! to wait.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, Sender, SyncSender};
use std::thread::{self, JoinHandle, ScopedJoinHandle};

use virtio_queue::Queue;
use vmm_sys_util::eventfd::EventFd;

use super::pool::Pool;
use super::worker::{self, Context, Stop, Threads};

/// A queue that can be served, and how its driver calls.
pub(super) struct Source {
    pub index: u16,
    pub queue: Queue,
    pub doorbell: EventFd,
}

/// The threads of an active device. Dropping it ends them all: requests that have been taken are
/// completed first.
///
/// One thread does nothing but to hold the others in a scope, in which guest memory stays mapped
/// and can be borrowed.
pub(super) struct Engine {
    queues: Vec<Option<Running>>,
    /// `None` only while it is dropped.
    starts: Option<Sender<Start>>,
    thread: Option<JoinHandle<()>>,
}

/// A queue that is served.
struct Running {
    stop: Arc<Stop>,
    /// Gives the queue back when its worker has ended, unless it cannot be served any more.
    ended: Receiver<Source>,
}

struct Start {
    source: Source,
    stop: Arc<Stop>,
    ended: SyncSender<Source>,
    outcome: SyncSender<io::Result<()>>,
}

impl Engine {
    pub(super) fn new(context: Context, queues: u16, max_threads: usize) -> io::Result<Self> {
        let (starts, receiver) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("virtio-blk".to_owned())
            .spawn(move || hold(&context, max_threads, &receiver))?;
        Ok(Self {
            queues: (0..queues).map(|_| None).collect(),
            starts: Some(starts),
            thread: Some(thread),
        })
    }

    /// Starts serving a queue.
    ///
    /// # Errors
    /// There is no such queue, it is being served, or its thread cannot be started.
    pub(super) fn start(&mut self, source: Source) -> io::Result<()> {
        let place = self.queues.get_mut(usize::from(source.index));
        let (Some(place @ None), Some(starts)) = (place, &self.starts) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let stop = Arc::new(Stop::new()?);
        let (ended_sender, ended) = mpsc::sync_channel(1);
        let (outcome, started) = mpsc::sync_channel(1);
        let start = Start {
            source,
            stop: Arc::clone(&stop),
            ended: ended_sender,
            outcome,
        };
        starts.send(start).map_err(io::Error::other)?;
        started.recv().map_err(io::Error::other)??;
        *place = Some(Running { stop, ended });
        Ok(())
    }

    /// Whether there is such a queue, and it is not being served.
    pub(super) fn can_start(&self, index: u16) -> bool {
        matches!(self.queues.get(usize::from(index)), Some(None))
    }

    /// Stops serving a queue, and returns it when its requests have been completed. `None` if it was
    /// not served or its thread has failed.
    pub(super) fn stop(&mut self, index: u16) -> Option<Source> {
        let running = self.queues.get_mut(usize::from(index))?.take()?;
        running.stop.request();
        running.ended.recv().ok()
    }

    /// Stops serving all queues, and returns them.
    pub(super) fn stop_all(&mut self) -> Vec<Source> {
        let running: Vec<_> = self.queues.iter_mut().filter_map(Option::take).collect();
        running.iter().for_each(|running| running.stop.request());
        let ended = running.iter().map(|running| running.ended.recv());
        ended.filter_map(Result::ok).collect()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.stop_all();
        self.starts = None;
        if let Some(thread) = self.thread.take() {
            // A panic has been reported on the thread itself; either way it is gone.
            let _ = thread.join();
        }
    }
}

/// Starts workers as they are asked for, until the engine is dropped.
fn hold(context: &Context, max_threads: usize, starts: &Receiver<Start>) {
    let pool = Pool::new(&context.target, max_threads);
    thread::scope(|scope| {
        let threads = Threads {
            scope,
            context,
            pool: &pool,
        };
        let mut workers: Vec<ScopedJoinHandle<'_, ()>> = Vec::new();
        for start in starts {
            // A driver may start and stop a queue any number of times.
            let has_ended = |worker: &mut ScopedJoinHandle<'_, ()>| worker.is_finished();
            workers.extract_if(.., has_ended).for_each(end);
            workers.extend(spawn(threads, start));
        }
        workers.into_iter().for_each(end);
        pool.close();
    });
}

/// Waits for a worker. If it has panicked, that has been dealt with on the thread itself.
fn end(worker: ScopedJoinHandle<'_, ()>) {
    let _ = worker.join();
}

/// Starts a worker and tells the engine how that went.
fn spawn<'scope, 'env, 'm: 'scope>(
    threads: Threads<'scope, 'env, 'm>,
    start: Start,
) -> Option<ScopedJoinHandle<'scope, ()>> {
    let Start {
        source,
        stop,
        ended,
        outcome,
    } = start;
    let name = format!("virtio-blk-{}", source.index);
    let thread = thread::Builder::new()
        .name(name)
        .spawn_scoped(threads.scope, move || {
            if let Some(source) = worker::run(threads, source, &stop) {
                // Nobody may be waiting.
                let _ = ended.send(source);
            }
        });
    let (thread, result) = match thread {
        Ok(thread) => (Some(thread), Ok(())),
        Err(error) => (None, Err(error)),
    };
    // The engine waits for it.
    let _ = outcome.send(result);
    thread
}
