//! A qcow2 image in storage of your own, memory in this case: `cargo run --example own_storage`.
//!
//! What stands below the format is a [`Storage`]. It could as well be an object store, an encrypted file,
//! or a file that counts.

use std::io;
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
use tandem_block::{Disk, Storage, VolatileSlice};

/// A file in memory. Clones are the same file.
#[derive(Clone, Debug, Default)]
struct Memory(Arc<Mutex<Vec<u8>>>);

impl Memory {
    fn bytes(&self) -> MutexGuard<'_, Vec<u8>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Storage for Memory {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        for buf in bufs {
            let mut bytes = vec![0; buf.len()];
            self.read_bytes_at(&mut bytes, offset)?;
            buf.copy_from(&bytes);
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], mut offset: u64) -> io::Result<()> {
        for buf in bufs {
            let mut bytes = vec![0; buf.len()];
            buf.copy_to(&mut bytes);
            self.write_bytes_at(&bytes, offset)?;
            offset += bytes.len() as u64;
        }
        Ok(())
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = self.bytes();
        // Behind the end, there are zeros.
        let there = bytes.get(offset as usize..).unwrap_or_default();
        let len = there.len().min(buf.len());
        buf[..len].copy_from_slice(&there[..len]);
        buf[len..].fill(0);
        Ok(())
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut bytes = self.bytes();
        let end = (offset as usize).checked_add(buf.len());
        let end = end.ok_or(io::ErrorKind::FileTooLarge)?;
        let len = bytes.len().max(end);
        bytes.resize(len, 0);
        bytes[offset as usize..end].copy_from_slice(buf);
        Ok(())
    }

    fn write_zeroes(&self, offset: u64, len: u64, _unmap: bool) -> io::Result<()> {
        let mut bytes = self.bytes();
        let (file_len, start) = (bytes.len(), offset as usize);
        let end = start.saturating_add(len as usize).min(file_len);
        bytes[start.min(end)..end].fill(0);
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.size()?).then_some(offset))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn size(&self) -> io::Result<u64> {
        Ok(self.bytes().len() as u64)
    }
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    // An image that comes from somewhere: made here, and read into memory.
    let path = std::env::temp_dir().join(format!("own-storage-{}.qcow2", std::process::id()));
    let options = CreateOptions {
        size: 1 << 30,
        ..CreateOptions::default()
    };
    create(&path, &options)?;
    let image = Memory(Arc::new(Mutex::new(std::fs::read(&path)?)));
    std::fs::remove_file(&path)?;

    let name = Path::new("in memory");
    let open = || Qcow2::with_storage(name, Box::new(image.clone()), None, &OpenOptions::default());
    let disk = open()?;
    let mut text = *b"kept in memory";
    disk.write_at(&[VolatileSlice::from(&mut text[..])], 700 << 20)?;
    disk.close()?;

    let disk = open()?;
    let mut back = [0; 14];
    disk.read_at(&[VolatileSlice::from(&mut back[..])], 700 << 20)?;
    println!(
        "{}, in an image of {} KiB",
        String::from_utf8_lossy(&back),
        image.size()? >> 10
    );
    Ok(())
}
