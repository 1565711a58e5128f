//! One client of the control socket.

use std::io::{self, BufRead, BufReader, Read};
use std::mem;
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{SendFlags, send, sockopt};
use rustix::process::geteuid;

use super::protocol::{self, MAX_LINE, RequestError};
use super::{Control, lock};

/// How long a client may take to make room for an answer, before it is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// How long a client may take no byte of what follows an answer.
const PAYLOAD_PATIENCE: Duration = Duration::from_secs(30);

/// Most bytes that are sent at once: of more, the system waits for each part as long as for the whole.
const PIECE: usize = 32 << 10;

/// Serves a client until it has gone, cannot be understood any more, or takes no answers, or the socket
/// `is_over`.
pub(super) fn serve(
    control: &Control,
    stream: &UnixStream,
    is_over: &AtomicBool,
) -> io::Result<()> {
    if !is_permitted(stream)? {
        return write(stream, &RequestError::NotPermitted.answer(None));
    }
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
    let mut payload = Payload::take(control);
    // Requests that have been sent already do not hold up the end.
    while !is_over.load(Ordering::Acquire) {
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
            write_payload(stream, &payload.bytes, is_over)?;
        }
    }
    Ok(())
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
    write_until(stream, line.as_bytes(), Instant::now() + PATIENCE)
}

/// Sends all of `bytes`, for which the client makes room until `end`. What it has room for is sent even
/// later, for it may be this thread that was held up.
fn write_until(stream: &UnixStream, bytes: &[u8], end: Instant) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let patience = end.saturating_duration_since(Instant::now());
        let sent = if patience.is_zero() {
            send_piece(stream, rest, SendFlags::DONTWAIT)
        } else {
            stream.set_write_timeout(Some(patience))?;
            send_piece(stream, rest, SendFlags::empty())
        };
        rest = &rest[sent?..];
    }
    Ok(())
}

/// Sends what follows an answer. A client may take its time for it, unless the socket `is_over`.
fn write_payload(stream: &UnixStream, bytes: &[u8], is_over: &AtomicBool) -> io::Result<()> {
    let mut rest = bytes;
    let mut end = Instant::now() + PAYLOAD_PATIENCE;
    stream.set_write_timeout(Some(PATIENCE))?;
    while !rest.is_empty() {
        if is_over.load(Ordering::Acquire) {
            return write_until(stream, rest, Instant::now() + PATIENCE);
        }
        match send_piece(stream, rest, SendFlags::empty()) {
            Ok(count) => {
                rest = &rest[count..];
                end = Instant::now() + PAYLOAD_PATIENCE;
            }
            Err(Errno::AGAIN) if Instant::now() < end => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Sends some of `bytes`, and returns how many.
fn send_piece(stream: &UnixStream, bytes: &[u8], flags: SendFlags) -> rustix::io::Result<usize> {
    let piece = &bytes[..bytes.len().min(PIECE)];
    rustix::io::retry_on_intr(|| send(stream, piece, flags | SendFlags::NOSIGNAL))
}

#[cfg(test)]
mod tests {
    use super::super::test_common::control;
    use super::*;
    use std::thread;

    const BYTES: usize = 8 << 20;

    /// Whether `send` gives up a client that takes a little now and then, however long that would take.
    fn gives_up(send: impl Fn(&UnixStream) -> io::Result<()>) -> bool {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let slow = thread::spawn(move || {
            let mut buffer = vec![0; 16 << 10];
            let mut taken = 0;
            loop {
                match (&theirs).read(&mut buffer).unwrap() {
                    0 => return taken,
                    count => taken += count,
                }
                thread::sleep(Duration::from_millis(10));
            }
        });
        let sent = send(&ours);
        drop(ours);
        sent.is_err() && slow.join().unwrap() < BYTES
    }

    #[test]
    fn an_answer_is_taken_soon() {
        let line = "x".repeat(BYTES);
        assert!(gives_up(|stream| write(stream, &line)));
    }

    #[test]
    fn what_there_is_room_for_is_sent_even_late() {
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        let late = Instant::now();
        write_until(&ours, b"answer", late).unwrap();
        let mut answer = [0; 6];
        theirs.read_exact(&mut answer).unwrap();
        assert_eq!(&answer, b"answer");
        let line = vec![0; BYTES];
        assert!(write_until(&ours, &line, late).is_err());
    }

    #[test]
    fn who_reads_slowly_does_not_hold_up_the_end() {
        let payload = vec![0; BYTES];
        let is_over = AtomicBool::new(true);
        assert!(gives_up(|stream| write_payload(stream, &payload, &is_over)));
    }

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
