//! `tandem` on a terminal: a pseudo-terminal, whose other side is the test.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::fs::File;
use std::io::{Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::process::ExitStatusExt;
use std::process::Child;

use common::{Code, Guest, await_text, have_kvm, send_signal, wait_status};

/// A terminal and the user who sits before it.
struct Terminal {
    user: File,
    terminal: OwnedFd,
}

impl Terminal {
    fn new() -> Self {
        let (mut user, mut terminal) = (-1, -1);
        let null = std::ptr::null_mut();
        // SAFETY: the two descriptors are written; name, modes and size are not asked for.
        let result =
            unsafe { libc::openpty(&mut user, &mut terminal, null, null.cast(), null.cast()) };
        assert_eq!(result, 0);
        // SAFETY: the descriptors are new and belong to nobody else.
        unsafe {
            Self {
                user: File::from_raw_fd(user),
                terminal: OwnedFd::from_raw_fd(terminal),
            }
        }
    }

    /// Whether lines are edited and keys make signals; and all modes, to be compared.
    fn modes(&self) -> (bool, [libc::tcflag_t; 4]) {
        let mut modes = MaybeUninit::<libc::termios>::zeroed();
        // SAFETY: `modes` takes the answer; all zeros would be valid too.
        let modes = unsafe {
            assert_eq!(
                libc::tcgetattr(self.terminal.as_raw_fd(), modes.as_mut_ptr()),
                0
            );
            modes.assume_init()
        };
        let flags = [modes.c_iflag, modes.c_oflag, modes.c_cflag, modes.c_lflag];
        (modes.c_lflag & (libc::ICANON | libc::ISIG) != 0, flags)
    }

    /// Starts `guest` on this terminal.
    fn start(&self, guest: &Guest) -> Child {
        let mut command = guest.command();
        command.stdin(self.terminal.try_clone().unwrap());
        command.stdout(self.terminal.try_clone().unwrap());
        command.spawn().unwrap()
    }
}

/// Runs a guest that echoes, lets `end` end it, and checks that the terminal is as it was.
fn ends_restored(code: &Code, end: impl FnOnce(&mut Terminal, &Child)) -> std::process::ExitStatus {
    let mut terminal = Terminal::new();
    let before = terminal.modes();
    assert!(before.0);
    let guest = Guest::new(code);
    let mut child = terminal.start(&guest);
    await_text(&mut terminal.user, "ready");
    assert!(!terminal.modes().0, "raw while the guest runs");
    end(&mut terminal, &child);
    let status = wait_status(&mut child);
    assert_eq!(terminal.modes(), before);
    let mut stderr = String::new();
    child.stderr.unwrap().read_to_string(&mut stderr).unwrap();
    if status.success() {
        assert_eq!(stderr, "");
    }
    status
}

fn echo() -> Code {
    Code::default().print("ready").echo_until(b'q')
}

#[test]
fn keys_reach_the_guest_as_they_are() {
    if !have_kvm() {
        return;
    }
    let status = ends_restored(&echo().power_off(), |terminal, _| {
        // Ctrl-C, Ctrl-D, Ctrl-A twice, Ctrl-A and another key
        terminal
            .user
            .write_all(b"a\x03b\x04c\x01\x01d\x01eq")
            .unwrap();
        await_text(&mut terminal.user, "a\x03b\x04c\x01d\x01eq");
    });
    assert_eq!(status.code(), Some(0));
}

#[test]
fn ctrl_a_x_ends_the_vm_whatever_the_guest_does() {
    if !have_kvm() {
        return;
    }
    // This guest never takes input.
    let status = ends_restored(&Code::default().print("ready").sleep(), |terminal, _| {
        terminal.user.write_all(&[b'z'; 1000]).unwrap();
        terminal.user.write_all(b"\x01x").unwrap();
    });
    assert_eq!(status.code(), Some(0));
}

#[test]
fn restored_after_a_signal_or_a_crash() {
    if !have_kvm() {
        return;
    }
    for signal in [
        libc::SIGTERM,
        libc::SIGHUP,
        libc::SIGABRT,
        libc::SIGILL,
        libc::SIGSYS,
    ] {
        let status = ends_restored(&echo(), |_, child| send_signal(child, signal));
        assert_eq!(status.signal(), Some(signal));
    }
}

#[test]
fn restored_after_an_error() {
    if !have_kvm() {
        return;
    }
    let status = ends_restored(&echo().raw(&[0x0f, 0x0b]), |terminal, _| {
        terminal.user.write_all(b"q").unwrap();
    });
    assert_eq!(status.code(), Some(1));
}
