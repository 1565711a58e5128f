//! Tables of big-endian 64-bit entries on disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use super::geometry::ENTRY_SIZE;
use crate::Result;
use crate::file::ImageFile;

/// Tables are read in pieces of this many bytes: they can have 32 MiB.
const READ_CHUNK: usize = 1 << 20;

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
