//! How a VM comes to its end.

use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use vmm_sys_util::eventfd::EventFd;

use crate::error::{HostContext, Result};

/// Why a VM ended in good order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum ExitReason {
    /// The guest powered off.
    PowerOff,
    /// The guest restarted, which ends its machine.
    Reset,
    /// The user typed Ctrl-A X on the console.
    Quit,
    /// This process received a signal, given as its number.
    Signal(i32),
    /// The guest wrote this exit status to the port of [`Config::exit_port`](crate::Config::exit_port).
    Exit(u8),
    /// [`Control::shut_down`](crate::Control::shut_down) was called.
    Stopped,
}

/// The end of a VM: may be brought about by any thread, once; the first one counts.
pub(crate) struct Exit {
    /// Whether the outcome has been set. Read by vCPUs at each exit.
    set: AtomicBool,
    outcome: Mutex<Option<Result<ExitReason>>>,
    event: EventFd,
}

impl Exit {
    pub(crate) fn new() -> Result<Self> {
        Ok(Self {
            set: AtomicBool::new(false),
            outcome: Mutex::new(None),
            event: EventFd::new(libc::EFD_NONBLOCK | libc::EFD_CLOEXEC)
                .host("make an event for the end of the VM")?,
        })
    }

    /// Ends the VM with `outcome`, unless it has ended already.
    pub(crate) fn end(&self, outcome: Result<ExitReason>) {
        let mut slot = self.outcome.lock().unwrap_or_else(PoisonError::into_inner);
        if !self.set.swap(true, Ordering::AcqRel) {
            *slot = Some(outcome);
            // Can fail only when it is signalled already.
            let _ = self.event.write(1);
        }
    }

    /// Whether the VM has ended or is about to.
    pub(crate) fn has_ended(&self) -> bool {
        self.set.load(Ordering::Acquire)
    }

    /// The outcome, once.
    pub(crate) fn take(&self) -> Option<Result<ExitReason>> {
        self.outcome
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
    }
}

/// Readable from the end of the VM on.
impl AsRawFd for Exit {
    fn as_raw_fd(&self) -> i32 {
        self.event.as_raw_fd()
    }
}

/// Ends the VM by what the guest writes to it: a line with an exit status in digits.
///
/// What else is written there, of which little is kept, has no effect.
pub(crate) struct StatusLine {
    line: Vec<u8>,
    exit: Arc<Exit>,
}

impl StatusLine {
    /// More than any status, with the spaces and the carriage return that terminals may add.
    const MAX: usize = 16;

    pub(crate) fn new(exit: Arc<Exit>) -> Self {
        let line = Vec::new();
        Self { line, exit }
    }

    fn end_of_line(&mut self) {
        let digits = self.line.trim_ascii();
        let is_number = self.line.len() <= Self::MAX
            && !digits.is_empty()
            && digits.iter().all(u8::is_ascii_digit);
        let text = str::from_utf8(digits).unwrap_or_default();
        if let Some(status) = text.parse().ok().filter(|_| is_number) {
            self.exit.end(Ok(ExitReason::Exit(status)));
        }
        self.line.clear();
    }
}

impl Write for StatusLine {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for byte in bytes {
            match byte {
                b'\n' => self.end_of_line(),
                // One byte more than a status has makes the line none.
                _ if self.line.len() <= Self::MAX => self.line.push(*byte),
                _ => {}
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_with_a_number_ends_the_vm() {
        for (text, expected) in [
            ("0\n", Some(0)),
            ("255\r\n", Some(255)),
            (" 007 \r\n8\n", Some(7)),
            ("login: \r\n\n-1\n+1\n256\n1.5\n1 2\n0x1\n\u{661}\n", None),
            ("99999999999999999999999999999999999999\n", None),
            ("0000000000000000000000000000000000000001\n3\n", Some(3)),
            ("42", None),
        ] {
            let exit = Arc::new(Exit::new().unwrap());
            let mut line = StatusLine::new(exit.clone());
            // However it is cut into pieces.
            for piece in text.as_bytes().chunks(3) {
                assert_eq!(line.write(piece).unwrap(), piece.len());
            }
            assert!(line.line.len() <= StatusLine::MAX + 1);
            let status = match exit.take() {
                Some(Ok(ExitReason::Exit(status))) => Some(status),
                other => {
                    assert!(other.is_none());
                    None
                }
            };
            assert_eq!(status, expected, "{text:?}");
        }
    }

    #[test]
    fn the_first_end_counts() {
        let exit = Exit::new().unwrap();
        assert!(!exit.has_ended());
        assert!(exit.take().is_none());
        exit.end(Ok(ExitReason::PowerOff));
        exit.end(Ok(ExitReason::Signal(15)));
        assert!(exit.has_ended());
        assert_eq!(exit.event.read().unwrap(), 1);
        assert!(matches!(exit.take(), Some(Ok(ExitReason::PowerOff))));
        exit.end(Ok(ExitReason::Quit));
        assert!(exit.take().is_none());
    }
}
