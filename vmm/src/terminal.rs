//! The user's terminal: raw mode, and the key that ends the VM.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::ptr;
use std::sync::atomic::{AtomicPtr, Ordering};

use rustix::termios::{self, OptionalActions, OutputModes, Termios};

/// A terminal in raw mode: each key goes to the guest as it is. Restored when dropped, and when the
/// process crashes.
pub struct RawTerminal {
    saved: &'static Saved,
}

struct Saved {
    terminal: OwnedFd,
    modes: Termios,
    /// The crash signals and what they did before.
    actions: Vec<(libc::c_int, libc::sigaction)>,
}

impl RawTerminal {
    /// Puts `terminal` into raw mode.
    pub fn new(terminal: OwnedFd) -> io::Result<Self> {
        let modes = termios::tcgetattr(&terminal)?;
        let mut raw = modes.clone();
        raw.make_raw();
        // Messages of this process end in a bare line feed.
        raw.output_modes |= OutputModes::OPOST;
        // A crash may look at it at any time, so it is never freed.
        let saved: &Saved = Box::leak(Box::new(Saved {
            terminal,
            modes,
            actions: crash::current_actions(),
        }));
        crash::watch(saved);
        termios::tcsetattr(&saved.terminal, OptionalActions::Now, &raw)?;
        Ok(Self { saved })
    }
}

impl Saved {
    fn restore(&self) {
        // A terminal that has gone away needs no restoring.
        let _ = termios::tcsetattr(self.terminal.as_fd(), OptionalActions::Now, &self.modes);
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        crash::unwatch(self.saved);
        self.saved.restore();
    }
}

/// Restores the terminal, if one is in raw mode, in a signal handler of a process that is about to die.
#[cfg(feature = "sandbox")]
pub(crate) fn restore_in_crash() {
    crash::restore();
}

/// Restores the terminal in a process that is about to die of a fault or an abort.
mod crash {
    use super::*;

    const SIGNALS: [libc::c_int; 6] = [
        libc::SIGABRT,
        libc::SIGBUS,
        libc::SIGFPE,
        libc::SIGILL,
        libc::SIGSEGV,
        libc::SIGSYS,
    ];

    static WATCHED: AtomicPtr<Saved> = AtomicPtr::new(ptr::null_mut());

    pub(super) fn current_actions() -> Vec<(libc::c_int, libc::sigaction)> {
        let get = |number| {
            // SAFETY: all zeros is a valid value of this plain structure.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            // SAFETY: `action` takes the answer; nothing is changed.
            let result = unsafe { libc::sigaction(number, ptr::null(), &mut action) };
            // That of the sandbox restores the terminal itself, and tells which system call it was.
            let is_left = number == libc::SIGSYS && action.sa_sigaction != libc::SIG_DFL;
            (result == 0 && !is_left).then_some((number, action))
        };
        SIGNALS.into_iter().filter_map(get).collect()
    }

    pub(super) fn watch(saved: &'static Saved) {
        WATCHED.store(ptr::from_ref(saved).cast_mut(), Ordering::Release);
        for (number, _) in &saved.actions {
            // SAFETY: all zeros is a valid value of this plain structure.
            let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
            let handler: Handler = handle;
            action.sa_sigaction = handler as libc::sighandler_t;
            // On the alternative stack, where there is one: a stack may have overflowed.
            action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
            // SAFETY: `handle` does nothing that a signal handler must not do.
            unsafe { libc::sigaction(*number, &action, ptr::null_mut()) };
        }
    }

    pub(super) fn unwatch(saved: &Saved) {
        WATCHED.store(ptr::null_mut(), Ordering::Release);
        reset(saved);
    }

    fn reset(saved: &Saved) {
        for (number, old) in &saved.actions {
            // SAFETY: `old` is what the signal did before, which may be done again.
            unsafe { libc::sigaction(*number, old, ptr::null_mut()) };
        }
    }

    /// Restores the terminal, and returns what has been restored.
    pub(super) fn restore() -> Option<&'static Saved> {
        // SAFETY: the pointer is null or that of a `Saved`, which lives for ever.
        let saved = unsafe { WATCHED.load(Ordering::Acquire).as_ref() }?;
        saved.restore();
        Some(saved)
    }

    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

    /// Restores the terminal and lets the signal do what it did before.
    extern "C" fn handle(number: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
        if let Some(saved) = restore() {
            reset(saved);
        }
        // An instruction that faulted is run again now, and faults again; a signal that a process
        // sent (`abort` does) has to be sent again, and arrives when this returns.
        // SAFETY: the kernel passes a valid `info`; raising a signal is allowed in a handler.
        unsafe {
            if (*info).si_code <= 0 {
                libc::raise(number);
            }
        }
    }
}

/// Finds Ctrl-A X in what is typed.
#[derive(Debug, Default)]
pub struct EscapeKey {
    /// Ctrl-A came last, and the next key decides.
    pending: bool,
}

const CTRL_A: u8 = 0x01;

impl EscapeKey {
    /// Appends to `guest` what of `typed` is for the guest: everything but Ctrl-A X; Ctrl-A typed
    /// twice stands for one. Returns true when Ctrl-A X has been typed.
    pub fn filter(&mut self, typed: &[u8], guest: &mut Vec<u8>) -> bool {
        for &key in typed {
            match (self.pending, key) {
                (false, CTRL_A) => self.pending = true,
                (false, _) => guest.push(key),
                (true, b'x' | b'X') => return true,
                (true, _) => {
                    self.pending = false;
                    guest.push(CTRL_A);
                    if key != CTRL_A {
                        guest.push(key);
                    }
                }
            }
        }
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn typed(parts: &[&[u8]]) -> (Vec<u8>, bool) {
        let (mut key, mut guest) = (EscapeKey::default(), Vec::new());
        let quit = parts.iter().any(|part| key.filter(part, &mut guest));
        (guest, quit)
    }

    #[test]
    fn ctrl_a_x_quits() {
        assert_eq!(typed(&[b"ls\r"]), (b"ls\r".to_vec(), false));
        assert_eq!(typed(&[b"a\x01xb"]), (b"a".to_vec(), true));
        assert_eq!(typed(&[b"\x01", b"X"]), (b"".to_vec(), true));
        assert_eq!(typed(&[b"\x01\x01x"]), (b"\x01x".to_vec(), false));
        assert_eq!(typed(&[b"\x01", b"k\x01"]), (b"\x01k".to_vec(), false));
    }
}
