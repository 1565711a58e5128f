//! Signals that end the process, taken in as events so that disks are closed first, and the one that
//! asks for metrics.

use std::fs::File;
use std::io::{self, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd};

use vmm_sys_util::signal;

use crate::error::{HostContext, Result};

/// The signals SIGHUP, SIGINT, SIGQUIT, SIGTERM and SIGUSR1, blocked and readable.
pub struct Signals {
    file: File,
}

impl Signals {
    /// Blocks the signals in this thread and in those that it will start, so that they arrive here
    /// and nowhere else: call it while the process has one thread. A signal that the process was
    /// started to ignore (`nohup`, background jobs) stays ignored.
    pub fn block() -> Result<Self> {
        let wanted = [
            libc::SIGHUP,
            libc::SIGINT,
            libc::SIGQUIT,
            libc::SIGTERM,
            libc::SIGUSR1,
        ];
        let wanted: Vec<_> = wanted.into_iter().filter(|s| !is_ignored(*s)).collect();
        Self::open(&wanted).host("wait for signals")
    }

    fn open(wanted: &[i32]) -> io::Result<Self> {
        let set = signal::create_sigset(wanted).map_err(io::Error::from)?;
        // SAFETY: `set` is initialised; the old mask is not asked for.
        let error = unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &set, std::ptr::null_mut()) };
        if error != 0 {
            return Err(io::Error::from_raw_os_error(error));
        }
        // SAFETY: `set` is initialised.
        let fd = unsafe { libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor is new and belongs to nobody else.
        let file = unsafe { File::from_raw_fd(fd) };
        Ok(Self { file })
    }

    /// The number of a signal that has arrived.
    pub(crate) fn next(&mut self) -> Option<i32> {
        let mut info = [0; size_of::<libc::signalfd_siginfo>()];
        let count = self.file.read(&mut info).ok()?;
        // `ssi_signo` is the first field.
        let number = info.first_chunk().filter(|_| count == info.len())?;
        Some(i32::from_ne_bytes(*number))
    }
}

impl AsRawFd for Signals {
    fn as_raw_fd(&self) -> i32 {
        self.file.as_raw_fd()
    }
}

fn is_ignored(number: i32) -> bool {
    let mut action = MaybeUninit::<libc::sigaction>::zeroed();
    // SAFETY: `action` is large enough for the answer, and nothing is changed.
    let result = unsafe { libc::sigaction(number, std::ptr::null(), action.as_mut_ptr()) };
    // SAFETY: all zeros is a valid value, and the call has overwritten it if it succeeded.
    result == 0 && unsafe { action.assume_init() }.sa_sigaction == libc::SIG_IGN
}

/// Ends this process by signal `number`, as if it had not been blocked, so that whoever started the
/// process sees why it ended. Returns only where that is impossible (process 1 of a container).
pub fn die_of(number: i32) {
    let Ok(set) = signal::create_sigset(&[number]) else {
        return;
    };
    // SAFETY: the default action of the signal replaces whatever there is; `set` is initialised.
    unsafe {
        libc::signal(number, libc::SIG_DFL);
        libc::pthread_sigmask(libc::SIG_UNBLOCK, &set, std::ptr::null_mut());
        libc::raise(number);
    }
}
