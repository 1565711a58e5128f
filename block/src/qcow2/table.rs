//! Tables of big-endian 64-bit entries on disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::geometry::ENTRY_SIZE;
use crate::file::ImageFile;
use crate::{Error, Result, Storage};

/// Tables are read in pieces of this many bytes: they can have 32 MiB, and fresh memory costs as much as
/// reading it.
const READ_CHUNK: usize = 64 << 10;

/// Reads the table `name` of `count` entries at `offset`.
///
/// The caller has bounded `count`.
///
/// # Errors
/// [`Error::Invalid`](crate::Error::Invalid) for a table that begins past the end of the file.
pub(crate) fn read(
    file: &ImageFile,
    name: &'static str,
    offset: u64,
    count: usize,
) -> Result<Vec<u64>> {
    if count > 0 && offset >= file.size()? {
        let reason = "the table lies past the end of the file".to_owned();
        return Err(file.invalid(name, offset, reason));
    }
    let mut entries = Vec::with_capacity(count);
    let mut bytes = vec![0; READ_CHUNK.min(count * ENTRY_SIZE as usize)];
    let mut at = offset;
    while entries.len() < count {
        let left = (count - entries.len()) * ENTRY_SIZE as usize;
        let chunk = &mut bytes[..left.min(READ_CHUNK)];
        file.read_bytes_at(chunk, at)?;
        at += chunk.len() as u64;
        entries.extend(decode(chunk));
    }
    Ok(entries)
}

/// Calls `f` with the index of each entry that is not zero, of a table of `count` entries at
/// `offset`, and the entry.
///
/// Holes of the file are not read, nor is what lies past its end: a table takes no longer than what
/// there is of it.
pub(crate) fn for_each(
    image: &dyn Storage,
    path: &Path,
    offset: u64,
    count: u64,
    mut f: impl FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let size = image
        .size()
        .map_err(|e| Error::io(path, "get the size of", e))?;
    let count = count.min(size.saturating_sub(offset).div_ceil(ENTRY_SIZE));
    let mut bytes = Vec::new();
    let mut first = 0;
    while first < count {
        let at = offset + first * ENTRY_SIZE;
        let data = image
            .next_data(at)
            .map_err(|e| Error::io_at(path, "look for data in", at, e))?;
        let Some(data) = data else {
            break;
        };
        first = first.max(data.saturating_sub(offset) / ENTRY_SIZE);
        if first >= count {
            break;
        }
        let at = offset + first * ENTRY_SIZE;
        let entries = (count - first).min(READ_CHUNK as u64 / ENTRY_SIZE);
        bytes.resize((entries * ENTRY_SIZE) as usize, 0);
        image
            .read_bytes_at(&mut bytes, at)
            .map_err(|e| Error::io_at(path, "read", at, e))?;
        for (index, entry) in (first..)
            .zip(decode(&bytes))
            .filter(|(_, entry)| *entry != 0)
        {
            f(index, entry)?;
        }
        first += entries;
    }
    Ok(())
}

/// The entries in `bytes`.
pub(crate) fn decode(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes
        .as_chunks::<{ ENTRY_SIZE as usize }>()
        .0
        .iter()
        .map(|e| u64::from_be_bytes(*e))
}

/// The bytes of `entries` on disk.
pub(crate) fn encode(entries: impl IntoIterator<Item = u64>) -> Vec<u8> {
    entries.into_iter().flat_map(u64::to_be_bytes).collect()
}

/// Pieces in which [`TableWriter`] writes.
const PIECE: usize = 1 << 20;

/// Writes the entries of tables one after another, in large pieces.
pub(crate) struct TableWriter<'a> {
    file: &'a File,
    /// Where `piece` goes.
    offset: u64,
    piece: Vec<u8>,
}

impl<'a> TableWriter<'a> {
    /// The first entry goes to `offset` of `file`.
    pub fn new(file: &'a File, offset: u64) -> Self {
        Self {
            file,
            offset,
            piece: Vec::new(),
        }
    }

    /// Adds `entry`.
    pub fn push(&mut self, entry: &[u8]) -> io::Result<()> {
        self.piece.extend_from_slice(entry);
        if self.piece.len() >= PIECE {
            self.end()
        } else {
            Ok(())
        }
    }

    /// Writes what has been added.
    pub fn end(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.piece, self.offset)?;
        self.offset += self.piece.len() as u64;
        self.piece.clear();
        Ok(())
    }

    /// Fills up with zeros to `offset`, which ends a cluster.
    pub fn end_at(&mut self, offset: u64) -> io::Result<()> {
        self.piece.resize((offset - self.offset) as usize, 0);
        self.end()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::FileStorage;

    #[test]
    fn holes_and_what_lies_past_the_end_are_empty() {
        const AT: u64 = 512;
        let file = tempfile::NamedTempFile::new().unwrap();
        // In the first piece, the first of the next, behind a hole, and at the end, which cuts an entry.
        let last = (5 << 20) / ENTRY_SIZE;
        let entries = [
            (0, 7),
            (3, 8),
            (READ_CHUNK as u64 / ENTRY_SIZE, 6),
            ((3 << 20) / ENTRY_SIZE + 5, 9),
            (last, 1 << 56),
        ];
        for (index, entry) in entries {
            let bytes = u64::to_be_bytes(entry);
            let bytes = if index == last {
                &bytes[..1]
            } else {
                &bytes[..]
            };
            let at = AT + index * ENTRY_SIZE;
            file.as_file().write_all_at(bytes, at).unwrap();
        }
        let storage = FileStorage::open(file.path(), true).unwrap();
        let read = |count| {
            let mut found = Vec::new();
            let add = |index, entry| {
                found.push((index, entry));
                Ok(())
            };
            for_each(&storage, file.path(), AT, count, add).unwrap();
            found
        };
        assert_eq!(read(u64::MAX / ENTRY_SIZE / 2), entries);
        assert_eq!(read(last), entries[..4]);
        assert_eq!(read(4), entries[..2]);
        assert_eq!(read(3), entries[..1]);
        assert_eq!(read(0), []);
    }
}
