//! Storage in memory that records what happens to it.

use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use tandem_block::Storage;
use vm_memory::VolatileSlice;

use crate::random::Random;

/// Unit in which a write can be torn.
pub const SECTOR: usize = 512;

/// One of the files of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    Image,
    Data,
}

/// Something that happened to a file, or to the workload.
#[derive(Clone, Debug)]
pub enum Event {
    Change(Change),
    Sync {
        file: Which,
    },
    /// Operation number `op` was begun.
    Begun {
        op: usize,
    },
    /// Operation number `op` is complete.
    Done {
        op: usize,
    },
}

/// A change of a file.
#[derive(Clone, Debug)]
pub struct Change {
    pub file: Which,
    pub what: What,
}

/// How a file was changed.
#[derive(Clone, Debug)]
pub enum What {
    /// These bytes were written.
    Write { offset: u64, bytes: Vec<u8> },
    /// It was cut or extended.
    SetLen(u64),
}

impl What {
    /// Makes the change.
    pub fn apply(&self, content: &mut Vec<u8>) {
        match self {
            Self::Write { offset, bytes } => apply_write(content, *offset, bytes),
            Self::SetLen(len) => content.resize(*len as usize, 0),
        }
    }
}

/// What happened, in order.
pub type Log = Arc<Mutex<Vec<Event>>>;

/// A file in memory.
#[derive(Debug)]
pub struct Memory {
    which: Which,
    bytes: Arc<Mutex<Vec<u8>>>,
    log: Option<Log>,
    /// Transfers are made sector by sector, and let other threads go on between them, if this counts
    /// them.
    turn: Option<Arc<AtomicU64>>,
}

impl Memory {
    /// A file of `bytes` that records in `log`.
    pub fn recording(which: Which, bytes: Vec<u8>, log: &Log) -> Self {
        Self {
            which,
            bytes: Arc::new(Mutex::new(bytes)),
            log: Some(log.clone()),
            turn: None,
        }
    }

    /// A file over shared bytes.
    pub fn plain(which: Which, bytes: &Arc<Mutex<Vec<u8>>>) -> Self {
        Self {
            which,
            bytes: bytes.clone(),
            log: None,
            turn: None,
        }
    }

    /// The same file, transferred sector by sector, while others do the same.
    pub fn piecewise(self) -> Self {
        Self {
            turn: Some(Arc::default()),
            ..self
        }
    }

    /// The same file once more.
    pub fn again(&self) -> Self {
        Self {
            which: self.which,
            bytes: self.bytes.clone(),
            log: self.log.clone(),
            turn: self.turn.clone(),
        }
    }

    /// Where another thread may go on, now and then, or if a scheduler decides on that.
    fn step(&self) {
        if let Some(turn) = &self.turn
            && Random(turn.fetch_add(1, Ordering::Relaxed)).below(8) == 0
        {
            std::thread::yield_now();
        }
        #[cfg(shuttle)]
        if self.log.is_some() {
            shuttle::thread::yield_now();
        }
    }

    /// Bytes that are transferred at once.
    fn piece(&self) -> usize {
        match self.turn {
            Some(_) => SECTOR,
            None => usize::MAX,
        }
    }

    fn change(&self, what: What) {
        self.step();
        what.apply(&mut self.bytes.lock().unwrap());
        self.record(Event::Change(Change {
            file: self.which,
            what,
        }));
    }

    fn record(&self, event: Event) {
        if let Some(log) = &self.log {
            log.lock().unwrap().push(event);
        }
    }
}

/// Applies a write to the content of a file.
fn apply_write(content: &mut Vec<u8>, offset: u64, bytes: &[u8]) {
    let end = offset as usize + bytes.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset as usize..end].copy_from_slice(bytes);
}

impl Storage for Memory {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for buf in bufs {
            let mut bytes = vec![0; buf.len()];
            for piece in bytes.chunks_mut(self.piece()) {
                self.read_bytes_at(piece, at)?;
                at += piece.len() as u64;
            }
            buf.copy_from(&bytes);
        }
        Ok(())
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        let mut whole = Vec::new();
        for buf in bufs {
            let mut bytes = vec![0; buf.len()];
            buf.copy_to(&mut bytes);
            whole.extend(bytes);
        }
        let mut at = offset;
        for piece in whole.chunks(self.piece()) {
            self.write_bytes_at(piece, at)?;
            at += piece.len() as u64;
        }
        Ok(())
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.step();
        let content = self.bytes.lock().unwrap();
        let start = content.len().min(offset as usize);
        let n = buf.len().min(content.len() - start);
        buf[..n].copy_from_slice(&content[start..start + n]);
        buf[n..].fill(0);
        Ok(())
    }

    fn write_bytes_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.change(What::Write {
            offset,
            bytes: bytes.to_vec(),
        });
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        let len = len.min(self.size()?.saturating_sub(offset));
        self.write_bytes_at(&vec![0; len as usize], offset)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // In the image nobody may rely on zeros, nor on what was there. In a raw data file the guest
        // sees which it is, and the model expects zeros.
        match (self.which, (offset / SECTOR as u64) % 2) {
            (Which::Image, 1) => Ok(()),
            _ => self.write_zeroes(offset, len, true),
        }
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let content = self.bytes.lock().unwrap();
        let start = content.len().min(offset as usize);
        Ok(content[start..]
            .iter()
            .position(|b| *b != 0)
            .map(|i| offset + i as u64))
    }

    fn sync(&self) -> io::Result<()> {
        self.step();
        self.record(Event::Sync { file: self.which });
        self.step();
        Ok(())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(What::SetLen(len));
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes.lock().unwrap().len() as u64)
    }
}

/// What a sector with `stamp` holds; stamp 0 is a sector of zeros.
pub fn sector_bytes(stamp: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    bytes.as_chunks_mut().0.fill(stamp.to_le_bytes());
    bytes
}

/// The stamp of a sector; an error says what is wrong if it is not one whole sector.
pub fn stamp_of(bytes: &[u8]) -> Result<u64, String> {
    let words = bytes.as_chunks::<8>().0;
    if words.iter().any(|w| *w != words[0]) {
        return Err(format!(
            "is mixed: {:x?} {:x?}",
            words[0],
            words[words.len() - 1]
        ));
    }
    Ok(u64::from_le_bytes(words[0]))
}
