//! The control socket: where it is, and who is connected to it.

use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Builder, JoinHandle};
use std::time::Duration;

use super::protocol::RequestError;
use super::{Control, client};
use crate::error::Result;
use crate::private_socket::PrivateSocket;
use crate::sandbox::{self, Role};

/// Most clients at a time. Each one has a thread.
const MAX_CLIENTS: usize = 16;
/// How long to wait when the system has no room for another client.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);

/// A Unix socket over which programs of the same user operate a VM. docs/control.md describes the
/// language. Clients wait until it is [served](Self::serve). Dropping it disconnects them all, and
/// removes the socket's file.
pub struct ControlSocket {
    socket: PrivateSocket,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Makes a socket at `path`. Its file is the user's alone. A socket that a process has left there is
    /// replaced; anything else stays, and is an error.
    ///
    /// # Errors
    /// Those of a socket that cannot be made.
    pub fn bind(path: &Path) -> Result<Self> {
        Ok(Self {
            socket: PrivateSocket::bind(path)?,
            is_over: Arc::default(),
            thread: None,
        })
    }

    /// Lets clients operate a VM through `control`.
    ///
    /// # Errors
    /// [`Error::Host`](crate::Error::Host).
    pub fn serve(mut self, control: Control) -> Result<Self> {
        let (listener, is_over) = (self.socket.listener(), self.is_over.clone());
        let role = control.confined(Role::Control);
        let body = move || accept(&listener, &control, &is_over);
        self.thread = Some(sandbox::spawn("control".to_owned(), role, body)?);
        Ok(self)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        self.socket.remove();
        self.is_over.store(true, Ordering::Release);
        // Ends the wait for clients.
        let _ = rustix::net::shutdown(&*self.socket.listener(), rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported on the thread itself.
            let _ = thread.join();
        }
    }
}

/// A client that is connected.
struct Client {
    stream: Arc<UnixStream>,
    thread: JoinHandle<()>,
}

/// Lets clients in until it is over, and then waits for their requests under way.
fn accept(listener: &UnixListener, control: &Control, is_over: &Arc<AtomicBool>) {
    let mut clients: Vec<Client> = Vec::new();
    while !is_over.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((stream, _)) => {
                clients.retain(|client| !client.thread.is_finished());
                if clients.len() < MAX_CLIENTS {
                    clients.extend(start(control.clone(), stream, is_over.clone()));
                } else {
                    refuse(&stream);
                }
            }
            Err(_) if is_over.load(Ordering::Acquire) => {}
            // There are too few descriptors, say.
            Err(_) => thread::sleep(RETRY_INTERVAL),
        }
    }
    for client in &clients {
        // An answer that is under way may still be sent.
        let _ = client.stream.shutdown(Shutdown::Read);
    }
    for client in clients {
        // A panic has been reported on the thread itself.
        let _ = client.thread.join();
    }
}

fn start(control: Control, stream: UnixStream, is_over: Arc<AtomicBool>) -> Option<Client> {
    let stream = Arc::new(stream);
    let served = stream.clone();
    let body = move || {
        // An error means that the client has gone, or is given up.
        let _ = client::serve(&control, &served, &is_over);
        let _ = served.shutdown(Shutdown::Both);
    };
    let thread = Builder::new().name("control-client".to_owned()).spawn(body);
    // Without a thread the client finds itself disconnected.
    let thread = thread.ok()?;
    Some(Client { stream, thread })
}

/// Sends a client away, without waiting for it.
fn refuse(stream: &UnixStream) {
    let told = stream.set_nonblocking(true);
    let _ = told.and_then(|()| client::write(stream, &RequestError::TooManyClients.answer(None)));
}

#[cfg(test)]
mod tests;
