//! Requests that are held up.

use std::io;
use std::sync::{Arc, Condvar, Mutex};
use std::thread;
use std::time::Duration;

use tandem_block::Storage;
use vm_memory::VolatileSlice;

/// A gate for the next transfer of guest data.
#[derive(Debug, Default)]
pub struct Gate {
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    #[default]
    Open,
    /// The next transfer will be held.
    Armed,
    /// A transfer is being held.
    Holding,
}

impl Gate {
    fn set(&self, state: State) {
        *self.state.lock().unwrap() = state;
        self.changed.notify_all();
    }

    fn wait_for(&self, wanted: State) {
        let state = self.state.lock().unwrap();
        drop(self.changed.wait_while(state, |s| *s != wanted).unwrap());
    }

    /// Opens unless somebody else does so within `patience`; whether that was necessary.
    fn open_after(&self, patience: Duration) -> bool {
        let state = self.state.lock().unwrap();
        let waited = self
            .changed
            .wait_timeout_while(state, patience, |s| *s == State::Holding);
        let expired = waited.unwrap().1.timed_out();
        if expired {
            self.set(State::Open);
        }
        expired
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        if *state == State::Armed {
            *state = State::Holding;
            self.changed.notify_all();
            drop(self.changed.wait_while(state, |s| *s != State::Open));
        }
    }
}

/// A file with a gate before transfers of guest data.
#[derive(Debug)]
pub struct Gated<S> {
    file: S,
    gate: Arc<Gate>,
}

impl<S> Gated<S> {
    pub fn new(file: S, gate: &Arc<Gate>) -> Self {
        Self {
            file,
            gate: gate.clone(),
        }
    }
}

impl<S: Storage> Storage for Gated<S> {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.gate.pass();
        self.file.read_at(bufs, offset)
    }
    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.gate.pass();
        self.file.write_at(bufs, offset)
    }
    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        self.read_at(bufs, offset).map(|()| true)
    }
    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        self.write_at(bufs, offset).map(|()| true)
    }
    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_bytes_at(buf, offset)
    }
    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_bytes_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.gate.pass();
        self.file.write_zeroes(offset, len, unmap)
    }
    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.file.discard(offset, len)
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }
    fn sync(&self) -> io::Result<()> {
        self.file.sync()
    }
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }
}

/// How long `meanwhile` may take: it waits for the held request by mistake, then.
const PATIENCE: Duration = Duration::from_secs(60);

/// Runs `request` on a thread of its own, and `meanwhile` while it waits between finding its
/// cluster and the transfer; returns what the request did.
pub fn during<R: Send>(
    gate: &Gate,
    request: impl FnOnce() -> R + Send,
    meanwhile: impl FnOnce(),
) -> R {
    thread::scope(|scope| {
        gate.set(State::Armed);
        let request = scope.spawn(request);
        gate.wait_for(State::Holding);
        let watchdog = scope.spawn(|| gate.open_after(PATIENCE));
        meanwhile();
        gate.set(State::Open);
        assert!(!watchdog.join().unwrap(), "waited for the held request");
        request.join().unwrap()
    })
}
