//! The end of a process that has made a forbidden system call: in a line that says so.

use std::mem::zeroed;
use std::ptr;
use std::sync::Once;

use crate::terminal;

/// Has a forbidden system call told on standard error before it ends the process, unless this process
/// has a handler for that.
pub(crate) fn install_handler() {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        // SAFETY: all zeros is a valid value of this plain structure; nothing is changed.
        let old = unsafe {
            let mut old: libc::sigaction = zeroed();
            libc::sigaction(libc::SIGSYS, ptr::null(), &mut old);
            old
        };
        if old.sa_sigaction != libc::SIG_DFL {
            return;
        }
        let handler: Handler = handle;
        // SAFETY: all zeros is a valid value of this plain structure.
        let mut action: libc::sigaction = unsafe { zeroed() };
        action.sa_sigaction = handler as libc::sighandler_t;
        // It sends itself the signal once more, which is to arrive at once.
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        // SAFETY: `handle` does nothing that a signal handler must not do.
        unsafe { libc::sigaction(libc::SIGSYS, &action, ptr::null_mut()) };
    });
}

type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Where the number of the system call is in `siginfo_t`, for which the crate `libc` has no name.
const CALL_OFFSET: usize = 24;
const _: () = assert!(CALL_OFFSET + size_of::<libc::c_int>() <= size_of::<libc::siginfo_t>());

/// The `si_code` of a filter.
const SYS_SECCOMP: libc::c_int = 1;

extern "C" fn handle(number: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    terminal::restore_in_crash();
    // SAFETY: the kernel passes a valid `info`, and for a filter it has set this field.
    let call = unsafe {
        let is_filter = (*info).si_code == SYS_SECCOMP;
        is_filter.then(|| info.byte_add(CALL_OFFSET).cast::<libc::c_int>().read())
    };
    if let Some(call) = call {
        report(call);
    }
    // SAFETY: these may be called in a handler.
    unsafe {
        libc::signal(number, libc::SIG_DFL);
        libc::raise(number);
        // The first process of a container gets no signals from itself.
        libc::_exit(128 + number);
    }
}

fn report(call: libc::c_int) {
    let mut name = [0u8; 16];
    // SAFETY: there is room for the longest name, and this may be called in a handler.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    let end = name.iter().position(|byte| *byte == 0);
    let mut line = Line::default();
    line.push(b"tandem: the sandbox forbids system call ");
    line.push_number(call.unsigned_abs());
    line.push(b" (thread ");
    line.push(&name[..end.unwrap_or(name.len())]);
    line.push(b"), which ends the process; --no-sandbox turns it off\n");
    // SAFETY: so many bytes are there, and this may be called in a handler.
    unsafe { libc::write(libc::STDERR_FILENO, line.bytes.as_ptr().cast(), line.len) };
}

/// Text that is put together without memory from the heap, which a handler must not use.
struct Line {
    bytes: [u8; 160],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 160],
            len: 0,
        }
    }
}

impl Line {
    /// What there is no room for is left out.
    fn push(&mut self, text: &[u8]) {
        for (to, from) in self.bytes[self.len..].iter_mut().zip(text) {
            *to = *from;
            self.len += 1;
        }
    }

    fn push_number(&mut self, number: u32) {
        if number >= 10 {
            self.push_number(number / 10);
        }
        self.push(&[b'0' + (number % 10) as u8]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_an_end() {
        let mut line = Line::default();
        for number in [0, 7, 10, u32::MAX] {
            line.push_number(number);
            line.push(b" ");
        }
        assert_eq!(&line.bytes[..line.len], b"0 7 10 4294967295 ");
        (0..100).for_each(|_| line.push(b"text"));
        assert_eq!(line.len, line.bytes.len());
    }
}
