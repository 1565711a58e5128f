//! Refcounts of any width in the bytes of a refcount block (qcow2 specification, "Host cluster
//! reference counting").

/// Width of a refcount.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct RefcountWidth {
    /// Its bits as a power of two: 0 to 6.
    pub order: u32,
}

impl RefcountWidth {
    /// The largest refcount.
    pub fn max(self) -> u64 {
        u64::MAX >> (64 - (1u32 << self.order))
    }

    /// Refcounts in `bytes` bytes.
    pub fn count_in(self, bytes: u64) -> u64 {
        (bytes * 8) >> self.order
    }

    /// Refcounts in `1 << size_bits` bytes, as a power of two.
    pub fn count_bits(self, size_bits: u32) -> u32 {
        size_bits + 3 - self.order
    }

    /// Bytes that hold `count` refcounts.
    pub fn bytes_for(self, count: u64) -> u64 {
        (count << self.order).div_ceil(8)
    }

    /// Refcount `index` of `block`, which has it.
    #[inline]
    pub fn get(self, block: &[u8], index: usize) -> u64 {
        match self.order {
            ..3 => {
                let (byte, shift) = self.place(index);
                u64::from(block[byte] >> shift) & self.max()
            }
            3 => block[index].into(),
            4 => u16::from_be_bytes(bytes(block, index)).into(),
            5 => u32::from_be_bytes(bytes(block, index)).into(),
            _ => u64::from_be_bytes(bytes(block, index)),
        }
    }

    /// Sets refcount `index` of `block`, which has it, to `value`, which is not more than
    /// [`max`](Self::max).
    #[inline]
    pub fn set(self, block: &mut [u8], index: usize, value: u64) {
        match self.order {
            ..3 => {
                let (byte, shift) = self.place(index);
                block[byte] &= !((self.max() as u8) << shift);
                block[byte] |= (value as u8) << shift;
            }
            3 => block[index] = value as u8,
            4 => set_bytes(block, index, (value as u16).to_be_bytes()),
            5 => set_bytes(block, index, (value as u32).to_be_bytes()),
            _ => set_bytes(block, index, value.to_be_bytes()),
        }
    }

    /// Byte and bit of a refcount smaller than a byte: the first one is in the lowest bits.
    fn place(self, index: usize) -> (usize, u32) {
        let bit = (index as u64) << self.order;
        ((bit / 8) as usize, (bit % 8) as u32)
    }
}

/// Refcount `index` of those of `N` bytes each.
#[inline]
fn bytes<const N: usize>(block: &[u8], index: usize) -> [u8; N] {
    let mut bytes = [0; N];
    bytes.copy_from_slice(&block[index * N..(index + 1) * N]);
    bytes
}

#[inline]
fn set_bytes<const N: usize>(block: &mut [u8], index: usize, bytes: [u8; N]) {
    block[index * N..(index + 1) * N].copy_from_slice(&bytes);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_set_is_got_and_nothing_else_changes() {
        for order in 0..=6 {
            let width = RefcountWidth { order };
            let count = width.count_in(64) as usize;
            assert_eq!(width.bytes_for(count as u64), 64);
            for index in 0..count {
                let (mut zeros, mut ones) = ([0; 64], [0xff; 64]);
                width.set(&mut zeros, index, width.max());
                width.set(&mut ones, index, 0);
                for other in 0..count {
                    let value = if other == index { width.max() } else { 0 };
                    assert_eq!(width.get(&zeros, other), value);
                    assert_eq!(width.get(&ones, other), width.max() - value);
                }
            }
        }
    }

    #[test]
    fn layout_on_disk() {
        let mut block = [0; 8];
        RefcountWidth { order: 0 }.set(&mut block, 1, 1);
        RefcountWidth { order: 1 }.set(&mut block, 5, 2);
        RefcountWidth { order: 2 }.set(&mut block, 4, 0xa);
        RefcountWidth { order: 5 }.set(&mut block, 1, 0x0102_0304);
        assert_eq!(block, [0b10, 0b1000, 0xa, 0, 1, 2, 3, 4]);
    }
}
