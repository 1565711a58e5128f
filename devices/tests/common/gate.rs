//! A disk whose calls can be held and are written down.

use std::sync::{Condvar, Mutex, MutexGuard};

use tandem_block::{Disk, Limits, Result};
use vm_memory::VolatileSlice;

/// Passes on to another disk, on conditions.
pub struct Gate<D> {
    pub disk: D,
    state: Mutex<State>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct State {
    /// What lies here or behind has to be waited for.
    cold_from: u64,
    is_closed: bool,
    waiting: usize,
    calls: Vec<Call>,
}

/// A call that has been let through, with its range on the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Read(u64, u64),
    Write(u64, u64),
    Zero(u64, u64),
    Discard(u64, u64),
    Flush,
}

impl<D: Disk> Gate<D> {
    /// An open gate, with data that can be had at once below the offset `cold_from`.
    pub fn new(disk: D, cold_from: u64) -> Self {
        let state = State {
            cold_from,
            ..State::default()
        };
        Self {
            disk,
            state: Mutex::new(state),
            changed: Condvar::new(),
        }
    }

    /// From now on what has to be waited for waits for [`open`](Self::open).
    pub fn close(&self) {
        self.lock().is_closed = true;
    }

    pub fn open(&self) {
        self.lock().is_closed = false;
        self.changed.notify_all();
    }

    /// Returns when so many calls wait.
    pub fn wait_for_waiting(&self, count: usize) {
        let state = self.lock();
        let enough = self
            .changed
            .wait_while(state, |state| state.waiting < count);
        drop(enough.unwrap());
    }

    /// How many calls wait.
    pub fn waiting(&self) -> usize {
        self.lock().waiting
    }

    /// What has been let through since the last call.
    pub fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.lock().calls)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// Waits until the gate is open.
    fn pass(&self, call: Call) {
        let mut state = self.lock();
        if state.is_closed {
            state.waiting += 1;
            self.changed.notify_all();
            state = self
                .changed
                .wait_while(state, |state| state.is_closed)
                .unwrap();
            state.waiting -= 1;
        }
        state.calls.push(call);
    }

    /// Whether a call need not wait. It is written down then.
    fn pass_now(&self, call: Call, offset: u64, len: u64) -> bool {
        let mut state = self.lock();
        let is_hot = offset.saturating_add(len) <= state.cold_from;
        if is_hot {
            state.calls.push(call);
        }
        is_hot
    }
}

fn len(bufs: &[VolatileSlice<'_>]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

impl<D: Disk> Disk for Gate<D> {
    fn size(&self) -> u64 {
        self.disk.size()
    }

    fn limits(&self) -> Limits {
        self.disk.limits()
    }

    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        let is_hot = self.pass_now(Call::Read(offset, len(bufs)), offset, len(bufs));
        if is_hot {
            self.disk.read_at(bufs, offset)?;
        }
        Ok(is_hot)
    }

    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<bool> {
        let is_hot = self.pass_now(Call::Write(offset, len(bufs)), offset, len(bufs));
        if is_hot {
            self.disk.write_at(bufs, offset)?;
        }
        Ok(is_hot)
    }

    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.pass(Call::Read(offset, len(bufs)));
        self.disk.read_at(bufs, offset)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
        self.pass(Call::Write(offset, len(bufs)));
        self.disk.write_at(bufs, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
        self.pass(Call::Zero(offset, len));
        self.disk.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> Result<()> {
        self.pass(Call::Discard(offset, len));
        self.disk.discard(offset, len)
    }

    fn flush(&self) -> Result<()> {
        self.pass(Call::Flush);
        self.disk.flush()
    }

    fn resize(&self, size: u64) -> Result<()> {
        self.disk.resize(size)
    }
}
