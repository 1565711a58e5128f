//! A disk that is offered to other virtual machine monitors.

use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use tandem_block::Disk;
use tandem_devices::virtio::block::{Block, Stats};
use tandem_devices::virtio::vhost_user::{Backend, Error as FrontEndError, StopHandle};

use crate::config::DiskConfig;
use crate::disk;
use crate::error::{Error, HostContext, Result};
use crate::exit::ExitReason;
use crate::private_socket::PrivateSocket;
use crate::signals::Signals;

/// Descriptors in a queue: what QEMU gives a vhost-user-blk device that is not told otherwise, so that
/// no guest is promised requests that its queue cannot hold.
const QUEUE_SIZE: u16 = 128;

/// A disk as a vhost-user-blk back end, ready for front ends.
pub struct Server {
    backend: Backend,
    socket: PrivateSocket,
    path: PathBuf,
    disk: Arc<dyn Disk>,
    stats: Arc<Stats>,
}

/// What has gone wrong with a front end, while others can still be served.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Incident {
    /// It is served no more.
    #[error(transparent)]
    FrontEnd(#[from] FrontEndError),
    /// What it has written may not be durable.
    #[error("could not flush disk '{}': {source}", disk.display())]
    Flush {
        /// The image.
        disk: PathBuf,
        /// Why.
        source: tandem_block::Error,
    },
}

impl Server {
    /// Opens the disk of `config` and makes the socket, which only this process's user may use. One
    /// that nobody listens on any more is replaced.
    pub fn open(socket: &Path, config: &DiskConfig) -> Result<Self> {
        let disk = disk::open(config)?.disk;
        let queues = config.queues.unwrap_or(DiskConfig::DEFAULT_QUEUES);
        let mut options = disk::options(config, queues);
        options.queue_size = QUEUE_SIZE;
        let block = Block::new(disk.clone(), options);
        let stats = block.handle().stats();
        Ok(Self {
            backend: Backend::new(Box::new(block)).host("set up the disk's device")?,
            socket: PrivateSocket::bind(socket)?,
            path: config.path.clone(),
            disk,
            stats,
        })
    }

    /// The means to end [`run`](Self::run), from any thread.
    pub fn stop_handle(&self) -> StopHandle {
        self.backend.stop_handle()
    }

    /// What goes wrong on the disk: otherwise only front ends are told.
    pub fn stats(&self) -> Arc<Stats> {
        self.stats.clone()
    }

    /// Serves one front end after another until one of `signals` arrives or the server is stopped.
    /// The disk is flushed after each; on return it is closed, and the socket removed.
    pub fn run(
        mut self,
        signals: Option<Signals>,
        mut report: impl FnMut(Incident),
    ) -> Result<ExitReason> {
        let outcome = self.serve(signals, &mut report);
        // No other front end gets as far as to wait for one that has ended.
        drop(self.socket);
        let closed = self.disk.close();
        let closed = closed.map_err(|error| Error::Flush(vec![(self.path, error)]));
        match (outcome, closed) {
            (outcome, Ok(())) => outcome,
            (Ok(_), Err(error)) => Err(error),
            (Err(first), Err(second)) => Err(Error::Both(first.into(), second.into())),
        }
    }

    fn serve(
        &mut self,
        signals: Option<Signals>,
        report: &mut impl FnMut(Incident),
    ) -> Result<ExitReason> {
        let Self {
            backend,
            socket,
            path,
            disk,
            ..
        } = self;
        let stop = backend.stop_handle();
        thread::scope(|scope| {
            // The thread that waits for signals ends when the other end of this is gone.
            let (end, is_serving) = io::pipe().host("wait for signals")?;
            let waiter = signals.map(|signals| {
                scope.spawn(move || {
                    let number = wait(signals, &end);
                    stop.stop();
                    number
                })
            });
            backend.serve(&socket.listener(), |result| {
                result.unwrap_or_else(|error| report(error.into()));
                if let Err(source) = disk.flush() {
                    let disk = path.clone();
                    report(Incident::Flush { disk, source });
                }
            })?;
            drop(is_serving);
            let number = waiter.and_then(|waiter| waiter.join().ok().flatten());
            Ok(number.map_or(ExitReason::Stopped, ExitReason::Signal))
        })
    }
}

/// Waits for a signal, and returns its number; `None` when `end` comes first.
fn wait(mut signals: Signals, end: &impl AsFd) -> Option<i32> {
    loop {
        let mut fds = [
            PollFd::new(&signals, PollFlags::IN),
            PollFd::new(end, PollFlags::IN),
        ];
        match poll(&mut fds, None) {
            Err(Errno::INTR) => continue,
            Err(_) => return None,
            Ok(_) => {}
        }
        let has_ended = !fds[1].revents().is_empty();
        let number = signals.next();
        if number.is_some() || has_ended {
            return number;
        }
    }
}
