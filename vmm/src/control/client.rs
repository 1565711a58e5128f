//! One client of the control socket.

use std::io::{self, BufRead, BufReader, Read};
use std::mem;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send, sockopt};
use rustix::process::geteuid;

use super::protocol::{self, MAX_LINE, RequestError};
use super::{Control, VmState, lock};

/// How long a client may take to make room for an answer, before it is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a client may take no byte of what follows an answer.
const PAYLOAD_PATIENCE: Duration = Duration::from_secs(30);

/// Serves a client until it has gone, cannot be understood any more, or takes no answers.
pub(super) fn serve(control: &Control, stream: &UnixStream) -> io::Result<()> {
    if !is_permitted(stream)? {
        return write(stream, &RequestError::NotPermitted.answer(None));
    }
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    let mut payload = Payload::take(control);
    loop {
        line.clear();
        // One byte more than there may be, and the end of the line.
        let limit = MAX_LINE as u64 + 2;
        let count = (&mut reader).take(limit).read_until(b'\n', &mut line)?;
        if count == 0 {
            return Ok(());
        }
        let text = line.trim_ascii();
        if text.len() > MAX_LINE || count as u64 == limit {
            // Where the next request begins is not known.
            return write(stream, &RequestError::TooLong.answer(None));
        }
        if !text.is_empty() {
            write(stream, &protocol::answer(control, text, &mut payload.bytes))?;
            write_payload(control, stream, &payload.bytes)?;
        }
    }
}

/// Room for what follows answers. Clients use it one after another: an allocator keeps what a thread has
/// freed for others of its kind, and memory would grow with each thread that answers who reads a backup.
struct Payload<'a> {
    control: &'a Control,
    bytes: Vec<u8>,
}

impl<'a> Payload<'a> {
    fn take(control: &'a Control) -> Self {
        let bytes = lock(&control.0.payloads).pop().unwrap_or_default();
        Self { control, bytes }
    }
}

impl Drop for Payload<'_> {
    fn drop(&mut self) {
        let bytes = mem::take(&mut self.bytes);
        if bytes.capacity() > 0 {
            lock(&self.control.0.payloads).push(bytes);
        }
    }
}

/// Whether the client's user may operate this VM: it could kill the process as well.
fn is_permitted(stream: &UnixStream) -> io::Result<bool> {
    let peer = sockopt::socket_peercred(stream)?.uid;
    Ok(peer.is_root() || peer == geteuid())
}

/// Sends a whole line. A client that has gone is an error, not a signal.
pub(super) fn write(stream: &UnixStream, line: &str) -> io::Result<()> {
    let end = Instant::now() + PATIENCE;
    let mut rest = line.as_bytes();
    while !rest.is_empty() {
        let patience = end.saturating_duration_since(Instant::now());
        // None left is an error.
        stream.set_write_timeout(Some(patience))?;
        match send(stream, rest, SendFlags::NOSIGNAL) {
            Ok(count) => rest = &rest[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Sends what follows an answer. A client may take its time for it, unless the VM ends.
fn write_payload(control: &Control, stream: &UnixStream, bytes: &[u8]) -> io::Result<()> {
    let mut rest = bytes;
    let mut end = Instant::now() + PAYLOAD_PATIENCE;
    stream.set_write_timeout(Some(PATIENCE))?;
    while !rest.is_empty() {
        match send(stream, rest, SendFlags::NOSIGNAL) {
            Ok(count) => {
                rest = &rest[count..];
                end = Instant::now() + PAYLOAD_PATIENCE;
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(rustix::io::Errno::AGAIN)
                if Instant::now() < end && control.state() != VmState::Ended => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::test_common::control;
    use super::*;

    #[test]
    fn the_next_client_uses_the_memory_of_the_last_one() {
        let (control, _dir) = control();
        drop(Payload::take(&control));
        assert!(lock(&control.0.payloads).is_empty());
        let mut first = Payload::take(&control);
        first.bytes.resize(1 << 20, 0);
        let memory = first.bytes.as_ptr();
        drop(first);
        for _ in 0..2 {
            assert_eq!(Payload::take(&control).bytes.as_ptr(), memory);
        }
    }
}
