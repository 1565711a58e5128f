//! The control socket: where it is, and who is connected to it.

use std::fs::{self, File, Metadata};
use std::io;
use std::net::Shutdown;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, Builder, JoinHandle};
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::net::{bind, connect, listen, socket_with};

use super::protocol::RequestError;
use super::{Control, client};
use crate::error::{Error, HostContext, Result};

/// Most clients at a time. Each one has a thread.
const MAX_CLIENTS: usize = 16;
/// Clients that wait to be let in.
const BACKLOG: i32 = 16;
/// How long to wait when the system has no room for another client.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// How often, and how long after each other, to try to lock the socket's directory.
const LOCK_TRIES: usize = 100;
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// A Unix socket over which programs of the same user operate a VM. The README describes the
/// language. Dropping it disconnects all clients, and removes the socket's file.
pub struct ControlSocket {
    path: PathBuf,
    /// Of the socket's file: another program may put its own in its place.
    inode: (u64, u64),
    listener: Arc<UnixListener>,
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl ControlSocket {
    /// Makes a socket at `path` that operates a VM through `control`. Its file is the user's alone. A
    /// socket that a process has left there is replaced; anything else stays, and is an error.
    ///
    /// # Errors
    /// [`Error::File`], [`Error::Host`].
    pub fn bind(path: &Path, control: Control) -> Result<Self> {
        let error = |source| Error::File {
            file: path.to_owned(),
            action: "make a control socket at",
            source,
        };
        let listener = Arc::new(claim(path).map_err(error)?);
        let inode = fs::symlink_metadata(path).map(|file| inode(&file));
        let is_over = Arc::new(AtomicBool::new(false));
        let mut socket = Self {
            path: path.to_owned(),
            inode: inode.map_err(error)?,
            listener: listener.clone(),
            is_over: is_over.clone(),
            thread: None,
        };
        let thread = Builder::new()
            .name("control".to_owned())
            .spawn(move || accept(&listener, &control, &is_over));
        socket.thread = Some(thread.host("start the thread of the control socket")?);
        Ok(socket)
    }
}

impl Drop for ControlSocket {
    fn drop(&mut self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| inode(&file) == self.inode) {
            let _ = fs::remove_file(&self.path);
        }
        self.is_over.store(true, Ordering::Release);
        // Ends the wait for clients.
        let _ = rustix::net::shutdown(&*self.listener, rustix::net::Shutdown::Both);
        if let Some(thread) = self.thread.take() {
            // A panic has been reported on the thread itself.
            let _ = thread.join();
        }
    }
}

fn inode(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
}

/// Makes a socket at `path`, if need be in the place of one that nobody listens at any more.
fn claim(path: &Path) -> io::Result<UnixListener> {
    // Nobody else is to find it when it does not listen yet, take it for dead, and remove it.
    let _lock = lock_directory(path)?;
    match fs::symlink_metadata(path) {
        Ok(file) if !file.file_type().is_socket() => {
            return Err(io::Error::other(
                "another file, which is no socket, is there",
            ));
        }
        Ok(_) if is_alive(path)? => {
            return Err(io::Error::other("another program listens there"));
        }
        Ok(_) => fs::remove_file(path)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(error),
    }
    bind_private(path)
}

fn lock_directory(path: &Path) -> io::Result<File> {
    let parent = path.parent().filter(|path| !path.as_os_str().is_empty());
    // A pipe would wait for its other end.
    let mut options = File::options();
    options.read(true).custom_flags(libc::O_DIRECTORY);
    let directory = options.open(parent.unwrap_or(Path::new(".")))?;
    for _ in 0..LOCK_TRIES {
        match flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => thread::sleep(LOCK_INTERVAL),
            result => return result.map(|()| directory).map_err(Into::into),
        }
    }
    Err(io::Error::other("somebody keeps its directory locked"))
}

/// A socket at `path` that only this user can use, from the first moment: Linux gives the file the
/// mode of the socket.
fn bind_private(path: &Path) -> io::Result<UnixListener> {
    let address = SocketAddrUnix::new(path)?;
    let socket = new_socket(SocketFlags::CLOEXEC)?;
    fchmod(&socket, Mode::RUSR | Mode::WUSR)?;
    bind(&socket, &address)?;
    if let Err(error) = listen(&socket, BACKLOG) {
        let _ = fs::remove_file(path);
        return Err(error.into());
    }
    Ok(socket.into())
}

/// Whether anybody listens at the socket `path`.
fn is_alive(path: &Path) -> io::Result<bool> {
    let socket = new_socket(SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)?;
    match connect(&socket, &SocketAddrUnix::new(path)?) {
        // Its queue of clients may be full.
        Ok(()) | Err(Errno::WOULDBLOCK) => Ok(true),
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(false),
        Err(error) => Err(error.into()),
    }
}

fn new_socket(flags: SocketFlags) -> io::Result<std::os::fd::OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Ok(socket)
}

/// A client that is connected.
struct Client {
    stream: Arc<UnixStream>,
    thread: JoinHandle<()>,
}

/// Lets clients in until it is over, and then waits for their requests under way.
fn accept(listener: &UnixListener, control: &Control, is_over: &AtomicBool) {
    let mut clients: Vec<Client> = Vec::new();
    while !is_over.load(Ordering::Acquire) {
        match listener.accept() {
            Ok((stream, _)) => {
                clients.retain(|client| !client.thread.is_finished());
                if clients.len() < MAX_CLIENTS {
                    clients.extend(start(control.clone(), stream));
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

fn start(control: Control, stream: UnixStream) -> Option<Client> {
    let stream = Arc::new(stream);
    let served = stream.clone();
    let body = move || {
        // An error means that the client has gone, or is given up.
        let _ = client::serve(&control, &served);
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
