//! How a VM comes to its end.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};

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

#[cfg(test)]
mod tests {
    use super::*;

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
