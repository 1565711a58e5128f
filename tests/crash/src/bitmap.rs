//! Bitmaps as they are on disk, read as the specification describes them.

/// A bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub name: Vec<u8>,
    pub granularity: u64,
    /// It follows changes.
    pub auto: bool,
    /// `None` if it is marked as in use, and says nothing.
    pub bits: Option<Vec<u8>>,
}

impl Stored {
    /// Whether there is a bit for the byte at `offset` of the disk.
    pub fn has(&self, offset: u64) -> Option<bool> {
        let bit = (offset / self.granularity) as usize;
        let byte = self.bits.as_ref()?.get(bit / 8).copied().unwrap_or(0);
        Some(byte >> (bit % 8) & 1 != 0)
    }
}

fn number(image: &[u8], at: usize, len: usize) -> usize {
    let bytes = &image[at..at + len];
    bytes.iter().fold(0, |n, byte| n << 8 | usize::from(*byte))
}

/// The bitmaps of `image`; none if they are not valid.
pub fn stored(image: &[u8]) -> Vec<Stored> {
    let has_bitmaps = number(image, 4, 4) == 3 && number(image, 88, 8) & 1 != 0;
    let Some((mut at, size)) = has_bitmaps.then(|| directory(image)).flatten() else {
        return Vec::new();
    };
    let (mut found, end) = (Vec::new(), at + size);
    while at < end {
        let (extra, name_len) = (number(image, at + 20, 4), number(image, at + 18, 2));
        let name = at + 24 + extra;
        let flags = number(image, at + 12, 4);
        found.push(Stored {
            name: image[name..name + name_len].to_vec(),
            granularity: 1 << image[at + 17],
            auto: flags & 2 != 0,
            bits: (flags & 1 == 0).then(|| bits(image, at)),
        });
        at = (name + name_len).next_multiple_of(8);
    }
    found
}

/// Offset and size of the directory, which the header extension tells.
fn directory(image: &[u8]) -> Option<(usize, usize)> {
    const BITMAPS: usize = 0x2385_2875;
    let mut at = number(image, 100, 4);
    loop {
        match number(image, at, 4) {
            0 => return None,
            BITMAPS => return Some((number(image, at + 24, 8), number(image, at + 16, 8))),
            _ => at += 8 + number(image, at + 4, 4).next_multiple_of(8),
        }
    }
}

/// The bits of the bitmap whose entry is at `at`.
fn bits(image: &[u8], at: usize) -> Vec<u8> {
    let cluster_size = 1 << number(image, 20, 4);
    let (table, entries) = (number(image, at, 8), number(image, at + 8, 4));
    let mut bits = Vec::new();
    for entry in 0..entries {
        match number(image, table + entry * 8, 8) {
            all @ (0 | 1) => bits.resize(bits.len() + cluster_size, (all * 0xff) as u8),
            offset => {
                let end = image.len().min(offset + cluster_size);
                bits.extend(&image[offset.min(end)..end]);
                bits.resize((entry + 1) * cluster_size, 0);
            }
        }
    }
    bits
}
