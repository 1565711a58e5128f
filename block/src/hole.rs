//! What is known of the holes of a file, so that it is not asked again each time.

use std::ops::Range;

use crate::Result;
use crate::file::ImageFile;
use crate::sync::{Mutex, lock};

/// A range of a file in which there is no data, but for what its user has made of it since and knows of.
#[derive(Debug, Default)]
pub(crate) struct KnownHole(Mutex<Range<u64>>);

impl KnownHole {
    /// Whether `range` of `file` lies in it; if not, the file is asked.
    pub fn covers(&self, file: &ImageFile, range: Range<u64>) -> Result<bool> {
        let mut hole = lock(&self.0);
        if !(hole.start <= range.start && range.end <= hole.end) {
            let data = file.next_data(range.start)?;
            // Where the two meet, what lies between them is its user's.
            let is_joined = (hole.start..=hole.end).contains(&data) && range.start <= hole.end;
            let end = if is_joined { hole.end } else { data };
            if end < range.end {
                // What is known of the rest of the file is worth more.
                return Ok(false);
            }
            *hole = range.start..end;
        }
        Ok(true)
    }

    /// Data has come into it that nobody knows of.
    pub fn forget(&self) {
        *lock(&self.0) = 0..0;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{CacheMode, FileStorage};
    use std::path::Path;

    /// What is found to be no hole does not make the rest of the file unknown.
    #[test]
    fn a_hole_stays_known() {
        let storage = FileStorage::new(tempfile::tempfile().unwrap()).unwrap();
        let file = ImageFile::new(Box::new(storage), Path::new("data"), CacheMode::default());
        file.set_len(64 << 20).unwrap();
        file.write_bytes_at(&[1; 4096], 0).unwrap();
        let hole = KnownHole::default();
        let reads_zero = |mib: u64| hole.covers(&file, mib << 20..(mib + 1) << 20).unwrap();
        assert!(reads_zero(32));
        assert!(reads_zero(8), "the hole grows");
        // As a write does that is about to be mapped.
        file.write_bytes_at(&[1; 4096], 16 << 20).unwrap();
        assert!(!reads_zero(0));
        assert!(reads_zero(16), "not looked for again");
        hole.forget();
        assert!(!reads_zero(16));
        assert!(reads_zero(17));
    }
}
