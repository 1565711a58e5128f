//! System calls that fail, one at a time.
//!
//! A thread whose calls are to fail tells the kernel to hold each of its calls that use a file until
//! another thread has said what becomes of it (seccomp_unotify(2)). So what fails is what would fail on
//! a real file system, below everything that the engine does to deal with it.

use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::panic::resume_unwind;
use std::path::PathBuf;
use std::sync::mpsc;
use std::thread;

/// What becomes of a call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// It does nothing and fails.
    Error(i32),
    /// It transfers a part of what it was asked for.
    Short,
}

/// Which call of the thread's fails, and how.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// How many calls come before it that could fail so.
    pub after: usize,
    pub fault: Fault,
}

/// A call that has been made.
#[derive(Clone, Debug)]
pub struct Call {
    pub number: i64,
    pub file: PathBuf,
}

impl Call {
    pub fn is_sync(&self) -> bool {
        matches!(self.number, libc::SYS_fdatasync | libc::SYS_fsync)
    }

    pub fn is_open(&self) -> bool {
        matches!(self.number, libc::SYS_openat | libc::SYS_openat2)
    }

    pub fn is_about_names(&self) -> bool {
        NAMES.contains(&self.number)
    }

    fn is_read(&self) -> bool {
        matches!(
            self.number,
            libc::SYS_pread64 | libc::SYS_preadv | libc::SYS_preadv2
        )
    }

    fn is_write(&self) -> bool {
        matches!(self.number, libc::SYS_pwrite64 | libc::SYS_pwritev)
    }

    fn can(&self, fault: Fault) -> bool {
        match fault {
            Fault::Short => {
                matches!(self.number, libc::SYS_pread64 | libc::SYS_preadv) || self.is_write()
            }
            // What reads needs no space.
            Fault::Error(libc::ENOSPC | libc::EDQUOT) => !self.is_read() && !self.is_open(),
            // Nobody waits for names.
            Fault::Error(libc::EINTR) => !self.is_about_names() && !self.is_open(),
            Fault::Error(_) => true,
        }
    }
}

/// Calls that read a file, or open one.
const READS: [i64; 5] = [
    libc::SYS_pread64,
    libc::SYS_preadv,
    libc::SYS_preadv2,
    libc::SYS_openat,
    libc::SYS_openat2,
];

/// Calls that change a file, or make it durable.
const CHANGES: [i64; 9] = [
    libc::SYS_pwrite64,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_fallocate,
    libc::SYS_ftruncate,
    libc::SYS_fdatasync,
    libc::SYS_fsync,
    libc::SYS_copy_file_range,
    libc::SYS_utimensat,
];

/// Calls that change names of files.
const NAMES: [i64; 5] = [
    libc::SYS_linkat,
    libc::SYS_renameat,
    libc::SYS_renameat2,
    libc::SYS_unlink,
    libc::SYS_unlinkat,
];

/// What becomes of a call: it returns so much or fails, or is carried out.
type Outcome = Option<Result<i64, i32>>;

/// Runs `f` on a thread of its own, in which a call fails as planned. Returns what it returns, and the
/// call that has failed, if there were that many.
pub fn with_fault<T: Send>(plan: Plan, f: impl FnOnce() -> T + Send) -> (T, Option<Call>) {
    let mut left = plan.after;
    let mut failed = None;
    let all = [&READS[..], &CHANGES, &NAMES].concat();
    let result = hold(&all, f, |held| {
        let call = Call {
            number: i64::from(held.nr),
            file: std::fs::read_link(format!("/proc/self/fd/{}", held.args[0])).unwrap_or_default(),
        };
        if failed.is_some() || !call.can(plan.fault) {
            return None;
        }
        if left > 0 {
            left -= 1;
            return None;
        }
        let outcome = match plan.fault {
            Fault::Error(errno) => Some(Err(errno)),
            Fault::Short => transfer_part(held).map(Ok),
        };
        failed = outcome.is_some().then_some(call);
        outcome
    });
    (result, failed)
}

/// Runs `f` on a thread of its own, and `each` before each of its calls that changes a file or the name
/// of one, while it waits: with the number of the call and, unless it is about names, the file.
pub fn at_each_call<T: Send>(
    f: impl FnOnce() -> T + Send,
    mut each: impl FnMut(i64, Option<RawFd>),
) -> T {
    hold(&[&CHANGES[..], &NAMES].concat(), f, |held| {
        let number = i64::from(held.nr);
        let file = match number {
            libc::SYS_copy_file_range => Some(held.args[2]),
            _ if NAMES.contains(&number) => None,
            _ => Some(held.args[0]),
        };
        each(number, file.map(|file| file as RawFd));
        None
    })
}

/// Runs `f` on a thread of its own, where `decide` is asked what becomes of each call with one of the
/// `numbers`.
fn hold<T: Send>(
    numbers: &[i64],
    f: impl FnOnce() -> T + Send,
    mut decide: impl FnMut(&libc::seccomp_data) -> Outcome,
) -> T {
    thread::scope(|scope| {
        let (sender, receiver) = mpsc::channel();
        #[cfg(mutate)]
        let mutation = tandem_block::mutate::active();
        let worker = scope.spawn(move || {
            #[cfg(mutate)]
            tandem_block::mutate::set(mutation);
            let listener = hold_calls(numbers).expect("the kernel holds system calls");
            sender.send(listener).expect("the other thread waits");
            let result = f();
            #[cfg(mutate)]
            let result = (result, tandem_block::mutate::met());
            result
        });
        let listener = receiver.recv().expect("the other thread sends");
        while let Some(held) = receive(&listener) {
            let outcome = decide(&held.data);
            answer(&listener, &held, outcome);
        }
        let result = match worker.join() {
            Ok(result) => result,
            Err(panic) => resume_unwind(panic),
        };
        #[cfg(mutate)]
        let (result, met) = result;
        #[cfg(mutate)]
        tandem_block::mutate::note(met);
        result
    })
}

/// Has the kernel hold the calls with these numbers that this thread makes from now on.
fn hold_calls(numbers: &[i64]) -> io::Result<OwnedFd> {
    let statement = |code: u32, k: u32| libc::sock_filter {
        code: code as u16,
        jt: 0,
        jf: 0,
        k,
    };
    let mut filter = vec![statement(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0)];
    for (i, number) in (0..).zip(numbers) {
        filter.push(libc::sock_filter {
            code: (libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K) as u16,
            jt: numbers.len() as u8 - i,
            jf: 0,
            k: *number as u32,
        });
    }
    filter.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_ALLOW,
    ));
    filter.push(statement(
        libc::BPF_RET | libc::BPF_K,
        libc::SECCOMP_RET_USER_NOTIF,
    ));
    let program = libc::sock_fprog {
        len: filter.len() as u16,
        filter: filter.as_mut_ptr(),
    };
    // SAFETY: the first call has no pointers; the second reads the program, which outlives it.
    let fd = unsafe {
        libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0);
        libc::syscall(
            libc::SYS_seccomp,
            libc::SECCOMP_SET_MODE_FILTER,
            libc::SECCOMP_FILTER_FLAG_NEW_LISTENER,
            &program,
        )
    };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the kernel has just made it, and nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// The next call that is held; `None` once the thread has ended.
fn receive(listener: &OwnedFd) -> Option<libc::seccomp_notif> {
    const RECEIVE: u64 = 0xc050_2100;
    loop {
        let mut poll = libc::pollfd {
            fd: listener.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        };
        // SAFETY: there is one entry.
        unsafe { libc::poll(&raw mut poll, 1, -1) };
        if poll.revents & libc::POLLIN == 0 {
            if poll.revents & libc::POLLHUP != 0 {
                return None;
            }
            continue;
        }
        // SAFETY: all zeros is a value of this structure of numbers, and what the kernel asks for.
        let mut held: libc::seccomp_notif = unsafe { std::mem::zeroed() };
        // SAFETY: the kernel writes such a structure.
        if unsafe { libc::ioctl(listener.as_raw_fd(), RECEIVE, &raw mut held) } == 0 {
            return Some(held);
        }
    }
}

/// Tells what becomes of a call.
fn answer(listener: &OwnedFd, held: &libc::seccomp_notif, outcome: Outcome) {
    const SEND: u64 = 0xc018_2101;
    let mut response = libc::seccomp_notif_resp {
        id: held.id,
        val: 0,
        error: 0,
        flags: 0,
    };
    match outcome {
        None => response.flags = libc::SECCOMP_USER_NOTIF_FLAG_CONTINUE as u32,
        Some(Ok(value)) => response.val = value,
        Some(Err(errno)) => response.error = -errno,
    }
    // SAFETY: the kernel reads such a structure.
    unsafe { libc::ioctl(listener.as_raw_fd(), SEND, &raw mut response) };
}

/// Carries out half of a transfer, if it has two bytes, and returns what it would.
fn transfer_part(call: &libc::seccomp_data) -> Option<i64> {
    let [_, buffer, count, ..] = call.args;
    let number = i64::from(call.nr);
    let whole = libc::iovec {
        iov_base: buffer as *mut libc::c_void,
        iov_len: count as usize,
    };
    let is_vectored = matches!(number, libc::SYS_preadv | libc::SYS_pwritev);
    let buffers = if is_vectored {
        // SAFETY: the caller, which waits, has passed so many buffers to the kernel.
        unsafe { std::slice::from_raw_parts(buffer as *const libc::iovec, count as usize) }
    } else {
        std::slice::from_ref(&whole)
    };
    let mut left = buffers.iter().map(|buffer| buffer.iov_len).sum::<usize>() / 2;
    if left == 0 {
        return None;
    }
    let mut part = Vec::new();
    for buffer in buffers {
        let iov_len = buffer.iov_len.min(left);
        left -= iov_len;
        part.push(libc::iovec { iov_len, ..*buffer });
    }
    let (fd, offset) = (call.args[0] as i32, call.args[3] as i64);
    let is_read = matches!(number, libc::SYS_pread64 | libc::SYS_preadv);
    // SAFETY: the buffers are those of the caller, which waits, or begin as they do.
    let moved = unsafe {
        let (buffers, count) = (part.as_ptr(), part.len() as i32);
        if is_read {
            libc::preadv(fd, buffers, count, offset)
        } else {
            libc::pwritev(fd, buffers, count, offset)
        }
    };
    (moved > 0).then_some(moved as i64)
}
