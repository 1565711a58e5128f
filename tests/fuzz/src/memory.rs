//! Files in memory.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use tandem_block::Storage;
use vm_memory::VolatileSlice;

/// Most bytes of a file.
const ROOM: u64 = 1 << 20;

/// A file in memory. Clones are the same file.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    has_failed: Arc<AtomicBool>,
}

impl Memory {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Arc::new(Mutex::new(bytes)),
            ..Self::default()
        }
    }

    pub fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.bytes.lock().unwrap()
    }

    /// Whether something did not fit.
    pub fn has_failed(&self) -> bool {
        self.has_failed.load(Ordering::Relaxed)
    }

    /// The bytes, with room for `len` at `offset`.
    fn grown(&self, offset: u64, len: u64) -> io::Result<MutexGuard<'_, Vec<u8>>> {
        let Some(end) = offset.checked_add(len).filter(|end| *end <= ROOM) else {
            self.has_failed.store(true, Ordering::Relaxed);
            return Err(io::ErrorKind::StorageFull.into());
        };
        let end = end as usize;
        let mut bytes = self.bytes();
        if end > bytes.len() {
            bytes.resize(end, 0);
        }
        Ok(bytes)
    }

    fn get(bytes: &[u8], offset: u64, each: impl FnOnce(&[u8])) {
        let start = usize::try_from(offset).unwrap_or(usize::MAX);
        each(bytes.get(start..).unwrap_or_default());
    }
}

impl Storage for Memory {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        let bytes = self.bytes();
        for buf in bufs {
            Self::get(&bytes, offset, |stored| {
                buf.copy_from(stored);
                if stored.len() < buf.len() {
                    let rest = buf.offset(stored.len()).unwrap();
                    rest.copy_from(&vec![0u8; rest.len()]);
                }
            });
            offset = offset.saturating_add(buf.len() as u64);
        }
        Ok(())
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        for buf in bufs {
            let len = buf.len();
            let mut bytes = self.grown(offset, len as u64)?;
            buf.copy_to(&mut bytes[offset as usize..][..len]);
            offset += len as u64;
        }
        Ok(())
    }

    fn try_read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        self.read_at(bufs, offset).map(|()| true)
    }

    fn try_write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<bool> {
        self.write_at(bufs, offset).map(|()| true)
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        Self::get(&self.bytes(), offset, |stored| {
            let n = stored.len().min(buf.len());
            buf[..n].copy_from_slice(&stored[..n]);
            buf[n..].fill(0);
        });
        Ok(())
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.grown(offset, buf.len() as u64)?;
        bytes[offset as usize..][..buf.len()].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        let mut bytes = self.bytes();
        let size = bytes.len() as u64;
        let end = offset.checked_add(len).ok_or(io::ErrorKind::InvalidInput)?;
        let range = offset.min(size) as usize..end.min(size) as usize;
        bytes[range].fill(0);
        Ok(())
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let mut next = None;
        Self::get(&self.bytes(), offset, |stored| {
            next = stored.iter().position(|byte| *byte != 0);
        });
        Ok(next.map(|n| offset + n as u64))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.grown(0, len)?.truncate(len as usize);
        Ok(())
    }
}
