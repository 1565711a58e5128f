//! The scratch file: what a backup has still to read, and the disk has no more.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use crate::new_file::create_temporary;
use crate::sync::{Mutex, lock};
use crate::{Error, Result};

/// A file without a name, of a bounded size.
///
/// It has one slot for each granule in it, whose space is used again once the granule is given up.
pub(super) struct Scratch {
    file: File,
    dir: PathBuf,
    granule_bits: u32,
    max_slots: u64,
    slots: Mutex<Slots>,
}

#[derive(Default)]
struct Slots {
    /// The slot of each granule.
    of: BTreeMap<u64, u64>,
    free: Vec<u64>,
    /// How many there are, free or not.
    made: u64,
    /// Those that are being written.
    pending: u64,
}

impl Scratch {
    /// Makes the file in `dir`, for up to `size` bytes in granules of `1 << granule_bits`.
    pub fn new(dir: &Path, size: u64, granule_bits: u32) -> Result<Self> {
        let file =
            create_temporary(dir).map_err(|e| Error::io(dir, "make a scratch file in", e))?;
        Ok(Self {
            file,
            dir: dir.to_owned(),
            granule_bits,
            max_slots: size >> granule_bits,
            slots: Mutex::default(),
        })
    }

    /// Keeps `bytes`, the content of the granules from `granule` on. Nobody else keeps one of them
    /// meanwhile.
    pub fn keep(&self, granule: u64, bytes: &[u8]) -> Result<()> {
        for (granule, bytes) in (granule..).zip(bytes.chunks(1 << self.granule_bits)) {
            let slot = self.take()?;
            let written = self.file.write_all_at(bytes, slot << self.granule_bits);
            let mut slots = lock(&self.slots);
            slots.pending -= 1;
            match written {
                Ok(()) => drop(slots.of.insert(granule, slot)),
                Err(error) => {
                    slots.free.push(slot);
                    return Err(self.error("write to a scratch file in", error));
                }
            }
        }
        Ok(())
    }

    fn take(&self) -> Result<u64> {
        let mut slots = lock(&self.slots);
        let slot = match slots.free.pop() {
            Some(slot) => slot,
            None if slots.made < self.max_slots => {
                slots.made += 1;
                slots.made - 1
            }
            None => {
                let (dir, size) = (self.dir.display(), self.size());
                return Err(Error::Backup(format!(
                    "the scratch file in '{dir}' is full: more than its {size} bytes have changed \
                     that the reader of the backup has not taken yet"
                )));
            }
        };
        slots.pending += 1;
        Ok(slot)
    }

    /// Fills `buffer` with what lies `offset` bytes into `granule`. Returns whether it is kept; if not,
    /// the granule reads as zero.
    pub fn read(&self, granule: u64, offset: u64, buffer: &mut [u8]) -> Result<bool> {
        let Some(slot) = lock(&self.slots).of.get(&granule).copied() else {
            return Ok(false);
        };
        let at = (slot << self.granule_bits) + offset;
        let read = self.file.read_exact_at(buffer, at);
        read.map_err(|e| self.error("read a scratch file in", e))?;
        Ok(true)
    }

    /// Whether `granule` is kept.
    pub fn has(&self, granule: u64) -> bool {
        lock(&self.slots).of.contains_key(&granule)
    }

    /// Gives up the granules below `end`.
    pub fn release_below(&self, end: u64) {
        let mut slots = lock(&self.slots);
        let kept = slots.of.split_off(&end);
        let released = std::mem::replace(&mut slots.of, kept);
        slots.free.extend(released.into_values());
    }

    /// Gives the space back to the system; nothing is read any more.
    pub fn give_up(&self) {
        // It goes with the file at the latest.
        let _ = self.file.set_len(0);
    }

    /// The most bytes that there may be.
    pub fn size(&self) -> u64 {
        self.max_slots << self.granule_bits
    }

    /// Bytes that are kept, and the most that ever were.
    pub fn used(&self) -> (u64, u64) {
        let slots = lock(&self.slots);
        let used = slots.of.len() as u64 + slots.pending;
        (used << self.granule_bits, slots.made << self.granule_bits)
    }

    fn error(&self, action: &'static str, source: io::Error) -> Error {
        Error::io(&self.dir, action, source)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_used_again_and_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let scratch = Scratch::new(dir.path(), 4 * 4096 + 4095, 12).unwrap();
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
        scratch.keep(7, &[7; 2 * 4096]).unwrap();
        scratch.keep(3, &[3; 4096]).unwrap();
        scratch.keep(100, &[9; 512]).unwrap();
        let full = scratch.keep(5, &[5; 4096]).unwrap_err().to_string();
        assert!(
            full.contains("is full: more than its 16384 bytes"),
            "{full}"
        );
        let mut buffer = [0; 512];
        let mut byte = |granule| {
            let kept = scratch.read(granule, 0, &mut buffer).unwrap();
            kept.then_some(buffer[0])
        };
        assert_eq!([3, 7, 8, 100].map(&mut byte), [3, 7, 7, 9].map(Some));
        assert_eq!(byte(5), None);
        assert_eq!(scratch.used(), (4 * 4096, 4 * 4096));
        scratch.release_below(8);
        assert_eq!(scratch.used(), (2 * 4096, 4 * 4096));
        scratch.keep(200, &[2; 2 * 4096]).unwrap();
        assert_eq!(scratch.used(), (4 * 4096, 4 * 4096));
        assert!(!scratch.has(7) && scratch.has(8) && scratch.has(201));
    }
}
