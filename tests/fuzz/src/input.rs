//! The fuzzer's bytes as numbers and choices.

/// What is left of an input. Behind its end all is zero, so that every input means something.
pub struct Input<'a>(&'a [u8]);

/// Numbers at which something may change.
const TELLING: [u64; 24] = [
    0,
    1,
    2,
    7,
    8,
    0x1ff,
    0x200,
    0x201,
    0x400,
    0xffff,
    0x1_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x1_0000_0000,
    (1 << 56) - 512,
    1 << 56,
    1 << 62,
    1 << 63,
    1 << 63 | 1 << 62,
    1 << 63 | 0x200,
    i64::MAX as u64,
    u64::MAX - 0x1ff,
    u64::MAX,
];

impl<'a> Input<'a> {
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub fn byte(&mut self) -> u8 {
        self.number(1) as u8
    }

    pub fn u16(&mut self) -> u16 {
        self.number(2) as u16
    }

    pub fn u32(&mut self) -> u32 {
        self.number(4) as u32
    }

    pub fn u64(&mut self) -> u64 {
        self.number(8)
    }

    pub fn bool(&mut self) -> bool {
        self.byte() & 1 != 0
    }

    /// A number below `end`, which is not 0 and at most 256.
    pub fn below(&mut self, end: usize) -> usize {
        usize::from(self.byte()) % end
    }

    pub fn choose<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.below(choices.len())]
    }

    pub fn pick<'t, T>(&mut self, choices: &'t [T]) -> &'t T {
        &choices[self.below(choices.len())]
    }

    /// A number that is small, telling, or any.
    pub fn value(&mut self) -> u64 {
        match self.byte() {
            choice @ 0..128 => u64::from(choice),
            choice @ 128..192 => TELLING[usize::from(choice) % TELLING.len()],
            192..224 => u64::from(self.u16()),
            _ => self.u64(),
        }
    }

    /// Up to `len` bytes.
    pub fn bytes(&mut self, len: usize) -> &'a [u8] {
        let (now, later) = self.0.split_at(len.min(self.0.len()));
        self.0 = later;
        now
    }

    /// The number of `len` bytes, at most 8, little-endian.
    fn number(&mut self, len: usize) -> u64 {
        let mut word = [0; 8];
        let bytes = self.bytes(len);
        word[..bytes.len()].copy_from_slice(bytes);
        u64::from_le_bytes(word)
    }
}
