//! Unix sockets with a name that other programs of the same user connect to.

use std::fs::{self, File, Metadata};
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use rustix::fs::{FlockOperation, Mode, fchmod, flock};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::net::{bind, connect, listen, socket_with};

use crate::error::{Error, Result};

/// Programs that wait to be let in.
const BACKLOG: i32 = 16;
/// How often, and how long after each other, to try to lock the socket's directory.
const LOCK_TRIES: usize = 100;
const LOCK_INTERVAL: Duration = Duration::from_millis(20);

/// A socket that listens, and whose file is the user's alone. The file goes with it.
pub struct PrivateSocket {
    listener: Arc<UnixListener>,
    path: PathBuf,
    /// Device and inode of the file: another program may put its own in its place.
    id: (u64, u64),
}

impl PrivateSocket {
    /// Makes a socket at `path`. One that a process has left there is replaced; anything else stays.
    ///
    /// # Errors
    /// [`Error::NotASocket`], [`Error::SocketInUse`], [`Error::File`].
    pub fn bind(path: &Path) -> Result<Self> {
        let error = |source| Error::File {
            file: path.to_owned(),
            action: "make a socket at",
            source,
        };
        // Nobody else is to find it when it does not listen yet, take it for dead, and remove it.
        let _lock = lock_directory(path).map_err(error)?;
        match fs::symlink_metadata(path) {
            Ok(file) if !file.file_type().is_socket() => {
                return Err(Error::NotASocket(path.to_owned()));
            }
            Ok(_) if is_alive(path).map_err(error)? => {
                return Err(Error::SocketInUse(path.to_owned()));
            }
            Ok(_) => fs::remove_file(path).map_err(error)?,
            // What else is wrong with the path is found when the socket is bound.
            Err(_) => {}
        }
        let listener = bind_private(path).map_err(error)?;
        let file = fs::symlink_metadata(path).map_err(error)?;
        Ok(Self {
            listener: Arc::new(listener),
            path: path.to_owned(),
            id: id(&file),
        })
    }

    /// The socket.
    pub fn listener(&self) -> Arc<UnixListener> {
        self.listener.clone()
    }

    /// Removes the file, so that nobody else finds the socket. May be called twice.
    pub fn remove(&self) {
        if fs::symlink_metadata(&self.path).is_ok_and(|file| id(&file) == self.id) {
            // One that stays is found to be left over the next time.
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Drop for PrivateSocket {
    fn drop(&mut self) {
        self.remove();
    }
}

fn id(file: &Metadata) -> (u64, u64) {
    (file.dev(), file.ino())
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

fn new_socket(flags: SocketFlags) -> io::Result<OwnedFd> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    Ok(socket)
}
