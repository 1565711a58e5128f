//! Walking over a list of buffers in pieces.

use std::cell::Cell;

use vm_memory::VolatileSlice;

/// A list of buffers, consumed from the front.
pub(crate) struct Buffers<'a, 'b> {
    bufs: &'b [VolatileSlice<'a>],
    /// Bytes of the first buffer that are consumed.
    consumed: usize,
}

/// Segments that one piece can have without being split.
const SEGMENTS: usize = 32;

impl<'a, 'b> Buffers<'a, 'b> {
    pub fn new(bufs: &'b [VolatileSlice<'a>]) -> Self {
        Self { bufs, consumed: 0 }
    }

    /// Consumes `len` bytes, which must be there, and passes them to `visit` with their distance
    /// from the first of them: in one call unless they are spread over more than [`SEGMENTS`]
    /// buffers, of which some are cut.
    pub fn take<E>(
        &mut self,
        len: u64,
        mut visit: impl FnMut(&[VolatileSlice<'a>], u64) -> Result<(), E>,
    ) -> Result<(), E> {
        if let Some(count) = self.whole(len) {
            let (piece, rest) = self.bufs.split_at(count);
            self.bufs = rest;
            return visit(piece, 0);
        }
        let mut done = 0;
        while done < len {
            let mut piece = [empty(); SEGMENTS];
            let mut count = 0;
            let start = done;
            while count < SEGMENTS && done < len {
                let Some(part) = self.next(len - done) else {
                    return Ok(());
                };
                done += part.len() as u64;
                piece[count] = part;
                count += 1;
            }
            visit(&piece[..count], start)?;
        }
        Ok(())
    }

    /// How many buffers, none of which is consumed in part, have `len` bytes together.
    #[inline]
    fn whole(&self, len: u64) -> Option<usize> {
        let mut left = len;
        for (index, buf) in self.bufs.iter().enumerate() {
            left = left.checked_sub(buf.len() as u64)?;
            if left == 0 && len > 0 {
                return (self.consumed == 0).then_some(index + 1);
            }
        }
        None
    }

    /// The next run of at most `max` bytes in one buffer.
    fn next(&mut self, max: u64) -> Option<VolatileSlice<'a>> {
        loop {
            let first = self.bufs.first()?;
            let left = first.len() - self.consumed;
            let n = usize::try_from(max).map_or(left, |max| left.min(max));
            // The range lies within the buffer by construction.
            let part = first.subslice(self.consumed, n).ok()?;
            self.consumed += n;
            if self.consumed == first.len() {
                self.bufs = &self.bufs[1..];
                self.consumed = 0;
            }
            if n > 0 {
                return Some(part);
            }
        }
    }
}

fn empty<'a>() -> VolatileSlice<'a> {
    VolatileSlice::from(&mut [][..])
}

/// Most bytes that a thread keeps for the next [`with_scratch`].
const MAX_SCRATCH: usize = 256 << 10;

/// Calls `work` with `len` bytes of memory that hold anything, and are its own meanwhile.
///
/// Fresh memory costs its clearing, which is more than all that a small request does besides.
pub(crate) fn with_scratch<R>(len: usize, work: impl FnOnce(&mut [u8]) -> R) -> R {
    thread_local! {
        static SCRATCH: Cell<Vec<u8>> = const { Cell::new(Vec::new()) };
    }
    // A thread that is ending has none.
    let mut scratch = SCRATCH.try_with(Cell::take).unwrap_or_default();
    if scratch.len() < len {
        scratch = vec![0; len];
    }
    let result = work(&mut scratch[..len]);
    if scratch.len() <= MAX_SCRATCH {
        let _ = SCRATCH.try_with(|kept| kept.set(scratch));
    }
    result
}

/// Sets every byte of `bufs` to zero.
pub(crate) fn fill_zero(bufs: &[VolatileSlice<'_>]) {
    const ZEROS: [u8; 4096] = [0; 4096];
    for buf in bufs {
        let mut at = 0;
        while at < buf.len() {
            let n = (buf.len() - at).min(ZEROS.len());
            if let Ok(part) = buf.subslice(at, n) {
                part.copy_from(&ZEROS[..n]);
            }
            at += n;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scratch_memory_is_kept_within_its_limit() {
        let first = |len| {
            with_scratch(len, |bytes| {
                (bytes.len(), std::mem::replace(&mut bytes[0], 7))
            })
        };
        assert_eq!(first(100), (100, 0));
        assert_eq!(first(50), (50, 7), "the same memory");
        assert_eq!(first(200), (200, 0));
        assert_eq!(first(MAX_SCRATCH + 1), (MAX_SCRATCH + 1, 0));
        assert_eq!(first(200), (200, 0), "what is too large is given back");
        with_scratch(100, |outer| {
            outer[0] = 1;
            assert_eq!(first(100), (100, 0));
            assert_eq!(outer[0], 1, "a use within another has its own");
        });
    }

    #[test]
    fn takes_pieces_across_buffers() {
        let mut memory: Vec<Vec<u8>> = (0..100).map(|i| vec![i; usize::from(i) % 5]).collect();
        let whole = memory.concat();
        let bufs: Vec<_> = memory
            .iter_mut()
            .map(|m| VolatileSlice::from(&mut m[..]))
            .collect();
        let mut cursor = Buffers::new(&bufs);
        let mut seen = Vec::new();
        for len in [1, 0, 7, 150, 42] {
            let before = seen.len();
            cursor
                .take(len, |piece, at| {
                    assert_eq!(seen.len() - before, at as usize);
                    for part in piece {
                        let mut bytes = vec![0; part.len()];
                        part.copy_to(&mut bytes);
                        seen.extend(bytes);
                    }
                    Ok::<_, ()>(())
                })
                .unwrap();
        }
        assert_eq!(seen, whole);
        fill_zero(&bufs);
        assert!(memory.concat().iter().all(|b| *b == 0));
    }
}
