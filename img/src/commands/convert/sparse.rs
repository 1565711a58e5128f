//! Telling data from zeros that need not be written.

/// What a buffer begins with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// So many bytes to be written.
    Data(usize),
    /// So many zeros.
    Zero(usize),
}

/// How zeros are looked for.
#[derive(Clone, Copy, Debug)]
pub struct Detection {
    /// Zeros between data are written if they are fewer than these bytes.
    min: usize,
    /// What is written ends at multiples of this on the disk: the largest power of two in `min`.
    alignment: usize,
}

impl Detection {
    /// For zeros of at least `min` bytes, which are not 0.
    pub fn new(min: u64) -> Self {
        let min = usize::try_from(min).unwrap_or(usize::MAX).max(512);
        Self {
            min,
            alignment: 1 << min.ilog2(),
        }
    }

    /// Whether as much is found in parts that end at multiples of `step` as in the whole.
    pub fn divides(self, step: u64) -> bool {
        self.min == self.alignment && step.is_multiple_of(self.alignment as u64)
    }

    /// What `bytes`, which are not empty and lie at `offset` of the disk, begin with.
    pub fn first(self, bytes: &[u8], offset: u64) -> Part {
        let (is_zero, mut end) = self.alike(bytes, offset);
        if is_zero {
            return Part::Zero(end);
        }
        let mut at = end;
        while at < bytes.len() {
            let (is_zero, len) = self.alike(&bytes[at..], offset + at as u64);
            if is_zero && len >= self.min.min(bytes.len()) {
                break;
            }
            at += len;
            if !is_zero {
                end = at;
            }
        }
        Part::Data(end)
    }

    /// How many bytes, in whole blocks of the disk, are zero as the first one is, or hold data as the
    /// first one does.
    fn alike(self, bytes: &[u8], offset: u64) -> (bool, usize) {
        let to_boundary = self.alignment - (offset % self.alignment as u64) as usize;
        let mut end = to_boundary.min(bytes.len());
        let is_zero = is_zero(&bytes[..end]);
        while end < bytes.len() {
            let next = (end + self.alignment).min(bytes.len());
            if self::is_zero(&bytes[end..next]) != is_zero {
                break;
            }
            end = next;
        }
        (is_zero, end)
    }
}

/// Whether all of `bytes` are zero.
pub fn is_zero(bytes: &[u8]) -> bool {
    let (words, rest) = bytes.as_chunks::<64>();
    let any = |chunk: &[u8; 64]| chunk.iter().fold(0, |any, byte| any | byte) != 0;
    !words.iter().any(any) && rest.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a disk that is data where `map` has `x`, a letter for each 512 bytes, is divided into.
    fn parts(min: u64, offset: u64, map: &str) -> String {
        let mut bytes: Vec<u8> = Vec::new();
        for letter in map.bytes() {
            let mut sector = [0; 512];
            sector[511] = u8::from(letter == b'x');
            bytes.extend(sector);
        }
        let detection = Detection::new(min);
        let (mut at, mut text) = (0, Vec::new());
        while at < bytes.len() {
            let (letter, len) = match detection.first(&bytes[at..], offset + at as u64) {
                Part::Data(len) => ('x', len),
                Part::Zero(len) => ('-', len),
            };
            text.push(format!("{letter}{}", len / 512));
            at += len;
        }
        text.join(" ")
    }

    #[test]
    fn finds_zeros() {
        for (min, offset, map, expected) in [
            (512, 0, "x-x--x", "x1 -1 x1 -2 x1"),
            (1024, 0, "x---x-x-------", "x2 -2 x4 -6"),
            // A block that is data in part is data, and so it ends at a boundary.
            (1024, 512, "-x---x-", "-1 x2 -2 x2"),
            (4096, 0, "--------x-------", "-8 x8"),
            (4096, 0, "x---------------xxxxxxxx-----", "x8 -8 x8 -5"),
            // Zeros between data count only if there are enough; those at either end do.
            (1536, 0, "x---xx-x--", "x8 -2"),
            (1536, 0, "x-----x---", "x2 -4 x2 -2"),
        ] {
            assert_eq!(parts(min, offset, map), expected, "{min} {offset} {map}");
        }
    }

    #[test]
    fn parts_that_find_as_much_as_the_whole() {
        for (min, divides) in [
            (1, true),
            (4096, true),
            (1536, false),
            (65536, true),
            (131072, false),
        ] {
            assert_eq!(Detection::new(min).divides(65536), divides, "{min}");
        }
    }

    #[test]
    fn sees_every_byte() {
        for len in [0, 1, 63, 64, 65, 200] {
            let mut bytes = vec![0; len];
            assert!(is_zero(&bytes));
            for i in 0..len {
                bytes[i] = 1;
                assert!(!is_zero(&bytes), "{i} of {len}");
                bytes[i] = 0;
            }
        }
    }
}
