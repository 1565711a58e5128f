//! Files in memory for tests of the engine.

pub mod gated;
pub mod structures;

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, check_storage, create};
use tandem_block::{Disk, Result, Storage};
use vm_memory::VolatileSlice;

/// A file in memory, or a device that nobody but [`extend`](Self::extend) makes longer, that counts what is done to it. Clones are the
/// same file.
#[derive(Clone, Debug, Default)]
pub struct Memory {
    bytes: Arc<Mutex<Vec<u8>>>,
    is_device: bool,
    calls: Arc<Calls>,
}

#[derive(Debug, Default)]
struct Calls {
    /// Of data.
    reads: AtomicUsize,
    writes: AtomicUsize,
    /// Of metadata.
    metadata_reads: AtomicUsize,
    metadata_writes: AtomicUsize,
    syncs: AtomicUsize,
    /// Of any kind.
    all: AtomicUsize,
    /// There have been changes since the last sync.
    is_unsynced: AtomicBool,
}

impl Memory {
    pub fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Arc::new(Mutex::new(bytes)),
            ..Self::default()
        }
    }

    /// A device whose bytes are all `0xdd`.
    pub fn device(size: u64) -> Self {
        Self {
            is_device: true,
            ..Self::new(vec![0xdd; size as usize])
        }
    }

    pub fn len(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    pub fn content(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    /// Makes it `len` bytes long.
    pub fn extend(&self, len: u64) {
        self.bytes.lock().unwrap().resize(len as usize, 0);
    }

    /// Overwrites the first bytes.
    pub fn overwrite(&self, bytes: &[u8]) {
        self.bytes.lock().unwrap()[..bytes.len()].copy_from_slice(bytes);
    }

    /// Overwrites the big-endian word at `offset`.
    pub fn put_word(&self, offset: u64, value: u64) {
        self.bytes.lock().unwrap()[offset as usize..][..8].copy_from_slice(&value.to_be_bytes());
    }

    /// Overwrites the bytes at `offset`.
    pub fn put_bytes(&self, offset: u64, bytes: &[u8]) {
        self.bytes.lock().unwrap()[offset as usize..][..bytes.len()].copy_from_slice(bytes);
    }

    /// The big-endian word at `offset`.
    pub fn word(&self, offset: u64) -> u64 {
        let bytes = self.bytes.lock().unwrap();
        u64::from_be_bytes(bytes[offset as usize..][..8].try_into().unwrap())
    }

    /// How many reads of data there have been.
    pub fn reads(&self) -> usize {
        self.calls.reads.load(Ordering::Relaxed)
    }

    /// How many writes of data there have been.
    pub fn writes(&self) -> usize {
        self.calls.writes.load(Ordering::Relaxed)
    }

    /// How many reads of metadata there have been.
    pub fn metadata_reads(&self) -> usize {
        self.calls.metadata_reads.load(Ordering::Relaxed)
    }

    /// How many writes of metadata there have been.
    pub fn metadata_writes(&self) -> usize {
        self.calls.metadata_writes.load(Ordering::Relaxed)
    }

    /// How often it has been synced.
    pub fn syncs(&self) -> usize {
        self.calls.syncs.load(Ordering::Relaxed)
    }

    /// Whether a power failure now could lose something.
    pub fn is_unsynced(&self) -> bool {
        self.calls.is_unsynced.load(Ordering::Relaxed)
    }

    /// How many calls there have been that look at or change what is in the file, or sync it.
    pub fn calls(&self) -> usize {
        self.calls.all.load(Ordering::Relaxed)
    }

    fn count(&self, kind: &AtomicUsize) {
        kind.fetch_add(1, Ordering::Relaxed);
        self.calls.all.fetch_add(1, Ordering::Relaxed);
    }

    fn get(&self, buf: &mut [u8], offset: u64) {
        let bytes = self.bytes.lock().unwrap();
        let stored = bytes.get(offset as usize..).unwrap_or_default();
        let n = stored.len().min(buf.len());
        buf[..n].copy_from_slice(&stored[..n]);
        buf[n..].fill(0);
    }

    fn put(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.bytes.lock().unwrap();
        let end = offset as usize + buf.len();
        if self.is_device && end > bytes.len() {
            return Err(io::ErrorKind::StorageFull.into());
        }
        if end > bytes.len() {
            bytes.resize(end, 0);
        }
        self.calls.is_unsynced.store(true, Ordering::Relaxed);
        bytes[offset as usize..end].copy_from_slice(buf);
        Ok(())
    }
}

impl Storage for Memory {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        self.count(&self.calls.reads);
        for buf in bufs {
            let mut bytes = vec![0; buf.len()];
            self.get(&mut bytes, offset);
            buf.copy_from(&bytes);
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        self.count(&self.calls.writes);
        for buf in bufs {
            let mut bytes = vec![0; buf.len()];
            buf.copy_to(&mut bytes);
            self.put(&bytes, offset)?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.count(&self.calls.metadata_reads);
        self.get(buf, offset);
        Ok(())
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.count(&self.calls.metadata_writes);
        self.put(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        self.calls.all.fetch_add(1, Ordering::Relaxed);
        let len = len.min(self.len().saturating_sub(offset));
        self.put(&vec![0; len as usize], offset)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        // Whether that is durable is all the same: the content may stay as well.
        let was_unsynced = self.is_unsynced();
        let done = self.write_zeroes(offset, len, true);
        let flag = &self.calls.is_unsynced;
        flag.store(was_unsynced, Ordering::Relaxed);
        done
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.len()).then_some(offset))
    }

    fn sync(&self) -> io::Result<()> {
        self.count(&self.calls.syncs);
        self.calls.is_unsynced.store(false, Ordering::Relaxed);
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.len())
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        if !self.is_device {
            self.bytes.lock().unwrap().resize(len as usize, 0);
        }
        Ok(())
    }

    fn capacity(&self) -> io::Result<Option<u64>> {
        Ok(self.is_device.then(|| self.len()))
    }
}

/// The image file of a new image.
pub fn new_image(options: &CreateOptions) -> Memory {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("image");
    let options = CreateOptions {
        data_file: options.data_file.as_ref().map(|name| dir.path().join(name)),
        ..options.clone()
    };
    create(&path, &options).unwrap();
    Memory::new(std::fs::read(path).unwrap())
}

pub fn open(image: &Memory, data: Option<&Memory>) -> Result<Qcow2> {
    open_with(image, data, &OpenOptions::default())
}

pub fn open_with(image: &Memory, data: Option<&Memory>, options: &OpenOptions) -> Result<Qcow2> {
    let data = data.map(|data| Box::new(data.clone()) as Box<dyn Storage>);
    Qcow2::with_storage(Path::new("image"), Box::new(image.clone()), data, options)
}

/// Asserts that a check finds nothing, leaks included.
pub fn assert_clean(image: &Memory) {
    check_storage(
        Path::new("image"),
        image,
        None,
        tandem_block::qcow2::Repair::Nothing,
        &mut |finding| panic!("{}", finding.text),
    )
    .unwrap();
}

pub fn write(disk: &dyn Disk, offset: u64, len: u64, byte: u8) -> Result<()> {
    let mut bytes = vec![byte; len as usize];
    disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
}

pub fn read(disk: &dyn Disk, offset: u64, len: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; len as usize];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], offset)
        .unwrap();
    bytes
}
