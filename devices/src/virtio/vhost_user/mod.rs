//! A virtio device as a vhost-user back end: offered to another virtual machine monitor over a
//! Unix socket (the vhost-user protocol, as QEMU's documentation specifies it).
//!
//! [`Backend`] holds a [`VirtioDevice`] and serves front ends one after another. It stands beside
//! [`VirtioMmio`](super::mmio::VirtioMmio): negotiation arrives as messages instead of accesses to
//! registers, guest memory as file descriptors, and doorbells and interrupts as eventfds of the
//! front end.
//!
//! # What is offered
//! Protocol features `MQ`, `CONFIG`, `REPLY_ACK`, `RESET_DEVICE` and `CONFIGURE_MEM_SLOTS`; rings of
//! up to 1024 descriptors. Not offered are the log of dirty memory (live migration), which would have
//! to be kept by the device; resets of single rings, for which there is no message; and in-flight
//! tracking: a back end that ends in an orderly way has completed all requests, and a front end that
//! reconnects goes on from there, but after a crash requests under way are lost. A change of the
//! configuration (a resize) cannot be told to the front end, as the crate `vhost` has no such message;
//! the front end sees it when it reads the configuration again.
//!
//! # What a front end cannot do
//! Whatever it sends, the process lives, and the next front end is served. When a ring is stopped
//! (`GET_VRING_BASE`, a change of the memory table, the end of the connection), all requests that
//! were taken from it are complete before the answer, and no thread accesses its memory afterwards.
//! That is why the device's own threads serve the rings: the crate `vhost-user-backend` (0.24) has a
//! device complete its requests for `GET_VRING_BASE` alone. When a ring is disabled or the connection
//! ends it does not ask, and of new memory it tells when the old is gone already, so requests that are
//! still under way elsewhere would write to memory that its owner has put to other use.
//!
//! An eventfd that blocks and whose counter is full takes no signal, and does not stop the device.
//!
//! A front end that truncates the file behind its memory while the device uses it ends this process
//! (`SIGBUS`). It cannot when the file is sealed against that, as QEMU's memory files are.

mod calls;
mod memory;
mod session;

use std::io;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use vhost::vhost_user::{BackendReqHandler, Error as ProtocolError};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::VirtioDevice;
use session::Session;

/// Why a front end is served no more.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The socket failed.
    #[error("cannot {action} the socket: {source}")]
    Socket {
        /// What was being done to it.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// The front end broke the protocol, or asked for what cannot be.
    #[error("the front end broke the protocol: {0}")]
    Protocol(String),
}

/// A device that is offered to front ends.
pub struct Backend {
    session: Arc<Mutex<Session>>,
    stop: Arc<Stop>,
}

/// Ends [`Backend::serve`], from any thread.
#[derive(Clone)]
pub struct StopHandle(Arc<Stop>);

struct Stop {
    /// Stays signalled.
    event: EventFd,
    /// The connection that is being served.
    connection: Mutex<Option<UnixStream>>,
}

impl StopHandle {
    /// Has [`Backend::serve`] return, now or when it is called.
    pub fn stop(&self) {
        // Fails only if it has been signalled 2^64 - 2 times.
        let _ = self.0.event.write(1);
        if let Some(connection) = &*lock(&self.0.connection) {
            // It may be gone already.
            let _ = connection.shutdown(Shutdown::Both);
        }
    }
}

impl Backend {
    /// Offers `device`.
    ///
    /// # Errors
    /// No file descriptor is left.
    pub fn new(device: Box<dyn VirtioDevice>) -> io::Result<Self> {
        Ok(Self {
            session: Arc::new(Mutex::new(Session::new(device))),
            stop: Arc::new(Stop {
                event: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
                connection: Mutex::default(),
            }),
        })
    }

    /// The means to end [`serve`](Self::serve).
    pub fn stop_handle(&self) -> StopHandle {
        StopHandle(Arc::clone(&self.stop))
    }

    /// Serves the front ends that connect to `listener`, one after another, until it is stopped.
    /// After each, with the device reset, `disconnected` is told how it ended.
    ///
    /// # Errors
    /// Connections cannot be accepted.
    pub fn serve(
        &mut self,
        listener: &UnixListener,
        mut disconnected: impl FnMut(Result<(), Error>),
    ) -> Result<(), Error> {
        let failed = |action| move |source| Error::Socket { action, source };
        listener.set_nonblocking(true).map_err(failed("prepare"))?;
        while self.wait_for(listener).map_err(failed("wait for"))? {
            match listener.accept() {
                Ok((connection, _)) => disconnected(self.serve_connection(connection)),
                // It has gone before it was accepted.
                Err(e) if is_transient(&e) => {}
                Err(e) => return Err(failed("accept connections on")(e)),
            }
        }
        Ok(())
    }

    /// Serves one front end until it disconnects, fails, or [`StopHandle::stop`] is called. On return
    /// the device has been reset.
    ///
    /// # Errors
    /// The front end broke the protocol, or its connection.
    pub fn serve_connection(&mut self, connection: UnixStream) -> Result<(), Error> {
        let result = self.serve_messages(connection);
        *lock(&self.stop.connection) = None;
        lock(&self.session).end();
        result
    }

    fn serve_messages(&mut self, connection: UnixStream) -> Result<(), Error> {
        let failed = |action| move |source| Error::Socket { action, source };
        let prepared = connection
            .set_nonblocking(false)
            .and_then(|()| connection.try_clone());
        let watched = prepared.map_err(failed("prepare"))?;
        let mut handler = BackendReqHandler::from_stream(connection, Arc::clone(&self.session));
        *lock(&self.stop.connection) = Some(watched.try_clone().map_err(failed("prepare"))?);
        // Only the rest of a message that has begun is waited for in the handler, where the end of the
        // connection is what a stop shows as.
        while self.wait_for(&watched).map_err(failed("wait for"))? {
            match handler.handle_request() {
                Ok(()) => {}
                Err(ProtocolError::Disconnected) => return Ok(()),
                Err(error) => return Err(Error::Protocol(error.to_string())),
            }
        }
        Ok(())
    }

    /// Waits until `socket` can be read. Returns whether it can; if not, the end has come.
    fn wait_for(&self, socket: &impl AsRawFd) -> io::Result<bool> {
        let mut fds = [
            pollfd(&self.stop.event, libc::POLLIN),
            pollfd(socket, libc::POLLIN),
        ];
        poll(&mut fds, -1)?;
        Ok(fds[0].revents == 0)
    }
}

fn pollfd(file: &impl AsRawFd, events: i16) -> libc::pollfd {
    libc::pollfd {
        fd: file.as_raw_fd(),
        events,
        revents: 0,
    }
}

/// Waits until something happens to one of `fds`, for `timeout` milliseconds at the most unless it is
/// negative.
fn poll(fds: &mut [libc::pollfd], timeout: i32) -> io::Result<()> {
    loop {
        // SAFETY: a valid array of as many entries, which outlives the call.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, timeout) };
        if n >= 0 {
            return Ok(());
        }
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, Interrupted, WouldBlock};
    matches!(error.kind(), ConnectionAborted | Interrupted | WouldBlock)
}

/// A panic elsewhere leaves no state that a hostile front end could not produce as well.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
