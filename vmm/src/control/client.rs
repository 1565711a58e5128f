//! One client of the control socket.

use std::io::{self, BufRead, BufReader, Read};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{SendFlags, send, sockopt};
use rustix::process::geteuid;

use super::Control;
use super::protocol::{self, MAX_LINE, RequestError};

/// How long a client may take to make room for an answer, before it is given up.
const PATIENCE: Duration = Duration::from_secs(1);

/// Serves a client until it has gone, cannot be understood any more, or takes no answers.
pub(super) fn serve(control: &Control, stream: &UnixStream) -> io::Result<()> {
    if !is_permitted(stream)? {
        return write(stream, &RequestError::NotPermitted.answer(None));
    }
    let mut reader = BufReader::new(stream);
    let mut line = Vec::new();
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
            write(stream, &protocol::answer(control, text))?;
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
