//! Backups as streams of bytes, for pipes and files.
//!
//! A stream begins with a header, which is followed by records in the order of the disk; the last one
//! says that it is whole. Other streams may follow, increments say, and a backup may be in several
//! streams: each of those behind the first begins where the one before has been cut off, or earlier.
//! Numbers are big-endian.
//!
//! | bytes | header |
//! | --- | --- |
//! | 0–7 | `TandemBk` |
//! | 8–11 | version: 1 |
//! | 12–15 | flags: bit 0 is set if what no record tells is as in the backup before (an increment); if not, it is zero. Other bits are 0 |
//! | 16–23 | size of the disk in bytes, a multiple of 512 |
//! | 24–31 | granularity: records begin and end at multiples of this power of two, but where the disk ends, or the stream was cut off |
//! | 32–47 | name of the backup, random |
//! | 48–63 | name of the backup that an increment goes on from; 0 if it is not known |
//! | 64–71 | start: what lies before this offset of the disk is in an earlier stream |
//! | 72–75 | length *n* of the name of the bitmap, at most 1023; 0 if there is none |
//! | 76– | *n* bytes of name, then 4 of the CRC-32 of all that comes before |
//!
//! | bytes | record |
//! | --- | --- |
//! | 0–3 | type: 1 data, 2 zeros, 3 end |
//! | 4–7 | CRC-32 of the data; 0 if there is none |
//! | 8–15 | offset in the disk; of the end, the size of the disk |
//! | 16–23 | length in bytes, of data at most 1 MiB; of the end, the number of records before it |
//! | 24–27 | CRC-32 of the 24 bytes before |
//! | 28– | the data |

use std::io::{self, Read, Write};

use flate2::Crc;

use super::{BackupId, ChunkExtent};
use crate::qcow2::MAX_BITMAP_NAME;

const MAGIC: &[u8; 8] = b"TandemBk";
const VERSION: u32 = 1;
const INCREMENTAL: u32 = 1;
/// Bytes of a header before the name of the bitmap.
const FIXED: usize = 76;
/// Most bytes of data in a record.
const MAX_DATA: usize = 1 << 20;
const RECORD: usize = 28;
const DATA: u32 = 1;
const ZEROS: u32 = 2;
const END: u32 = 3;

/// What a stream tells of its backup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is called.
    pub id: BackupId,
    /// Whether it has only what has changed since another one.
    pub is_incremental: bool,
    /// The one that it goes on from, if that is known.
    pub base: Option<BackupId>,
    /// Of the disk, in bytes.
    pub size: u64,
    /// In bytes.
    pub granularity: u64,
    /// What lies before this offset is in an earlier stream.
    pub start: u64,
    /// The bitmap that it goes by, or begins.
    pub bitmap: Vec<u8>,
}

/// Why a stream cannot be read any further.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum StreamError {
    /// It could not be read.
    #[error("could not read the stream: {0}")]
    Io(#[from] io::Error),

    /// It is something else.
    #[error("this is no stream of a backup")]
    NotAStream,

    /// A newer program has written it.
    #[error("the stream has version {0}; known is {VERSION}")]
    Version(u32),

    /// A field has a value that it cannot have.
    #[error(
        "the stream is damaged, and good up to offset {good} of the disk: {field} is {value:#x}"
    )]
    Invalid {
        /// What the field is.
        field: &'static str,
        /// What it says.
        value: u64,
        /// Up to where the stream is good.
        good: u64,
    },

    /// It does not go on to its end.
    #[error("the stream ends before it is whole; it is good up to offset {good} of the disk")]
    Truncated {
        /// Up to where the stream is good.
        good: u64,
    },
}

type Result<T> = std::result::Result<T, StreamError>;

/// Writes a stream.
pub struct StreamWriter<W> {
    to: W,
    size: u64,
    records: u64,
}

impl<W: Write> StreamWriter<W> {
    /// Begins a stream.
    ///
    /// # Errors
    /// Those of `to`; [`io::ErrorKind::InvalidInput`] for a name that is too long.
    pub fn new(mut to: W, header: &Header) -> io::Result<Self> {
        if header.bitmap.len() > MAX_BITMAP_NAME {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let mut bytes = MAGIC.to_vec();
        bytes.extend(VERSION.to_be_bytes());
        bytes.extend(u32::from(header.is_incremental).to_be_bytes());
        bytes.extend(header.size.to_be_bytes());
        bytes.extend(header.granularity.to_be_bytes());
        bytes.extend(header.id.to_bytes());
        bytes.extend(header.base.map_or([0; 16], BackupId::to_bytes));
        bytes.extend(header.start.to_be_bytes());
        bytes.extend((header.bitmap.len() as u32).to_be_bytes());
        bytes.extend(&header.bitmap);
        bytes.extend(crc(&bytes).to_be_bytes());
        to.write_all(&bytes)?;
        Ok(Self {
            to,
            size: header.size,
            records: 0,
        })
    }

    /// Writes that `data` lies at `offset`, behind all that has been written.
    ///
    /// # Errors
    /// Those of the file or pipe below.
    pub fn data(&mut self, offset: u64, data: &[u8]) -> io::Result<()> {
        for (at, piece) in (offset..).step_by(MAX_DATA).zip(data.chunks(MAX_DATA)) {
            self.record(DATA, crc(piece), at, piece.len() as u64)?;
            self.to.write_all(piece)?;
        }
        Ok(())
    }

    /// Writes that the `len` bytes at `offset`, behind all that has been written, are zero.
    ///
    /// # Errors
    /// Those of the file or pipe below.
    pub fn zeros(&mut self, offset: u64, len: u64) -> io::Result<()> {
        match len {
            0 => Ok(()),
            _ => self.record(ZEROS, 0, offset, len),
        }
    }

    /// Writes that the stream is whole.
    ///
    /// # Errors
    /// Those of the file or pipe below.
    pub fn finish(mut self) -> io::Result<W> {
        self.record(END, 0, self.size, self.records)?;
        self.to.flush()?;
        Ok(self.to)
    }

    fn record(&mut self, kind: u32, checksum: u32, offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = Vec::with_capacity(RECORD);
        bytes.extend(kind.to_be_bytes());
        bytes.extend(checksum.to_be_bytes());
        bytes.extend(offset.to_be_bytes());
        bytes.extend(len.to_be_bytes());
        bytes.extend(crc(&bytes).to_be_bytes());
        self.records += 1;
        self.to.write_all(&bytes)
    }
}

/// Reads a stream. Nothing of a record is told before all of it has been checked.
pub struct StreamReader<R> {
    from: R,
    header: Header,
    records: u64,
    good: u64,
}

impl<R: Read> StreamReader<R> {
    /// Reads the header of a stream; `None` if `from` ends here.
    ///
    /// # Errors
    /// [`StreamError`]
    pub fn new(mut from: R) -> Result<Option<Self>> {
        let mut bytes = vec![0; FIXED];
        match fill(&mut from, &mut bytes)? {
            0 => return Ok(None),
            FIXED => {}
            n if MAGIC.starts_with(&bytes[..n.min(8)]) => {
                return Err(StreamError::Truncated { good: 0 });
            }
            _ => return Err(StreamError::NotAStream),
        }
        let mut fields = Fields(&bytes);
        if fields.bytes() != *MAGIC {
            return Err(StreamError::NotAStream);
        }
        let version = fields.u32();
        if version != VERSION {
            return Err(StreamError::Version(version));
        }
        let flags = fields.u32();
        let (size, granularity) = (fields.u64(), fields.u64());
        let (id, base): ([u8; 16], [u8; 16]) = (fields.bytes(), fields.bytes());
        let (start, name_len) = (fields.u64(), fields.u32() as usize);
        if name_len > MAX_BITMAP_NAME {
            return Err(invalid("the length of the bitmap's name", name_len as u64));
        }
        bytes.resize(FIXED + name_len + 4, 0);
        if fill(&mut from, &mut bytes[FIXED..])? < name_len + 4 {
            return Err(StreamError::Truncated { good: 0 });
        }
        let (all, sum) = bytes.split_at(FIXED + name_len);
        let sum = Fields(sum).u32();
        let wrong = if crc(all) != sum {
            Some(("the checksum of the header", u64::from(sum)))
        } else if flags & !INCREMENTAL != 0 {
            Some(("the field of flags", u64::from(flags)))
        } else if i64::try_from(size).is_err() || !size.is_multiple_of(512) {
            Some(("the size of the disk", size))
        } else if !granularity.is_power_of_two() {
            Some(("the granularity", granularity))
        } else if start > size {
            Some(("the start", start))
        } else {
            None
        };
        if let Some((field, value)) = wrong {
            return Err(invalid(field, value));
        }
        let header = Header {
            id: id.into(),
            is_incremental: flags & INCREMENTAL != 0,
            base: (base != [0; 16]).then(|| base.into()),
            size,
            granularity,
            start,
            bitmap: all[FIXED..].to_vec(),
        };
        Ok(Some(Self {
            from,
            records: 0,
            good: start,
            header,
        }))
    }

    /// What it tells of its backup.
    pub fn header(&self) -> &Header {
        &self.header
    }

    /// Up to which offset of the disk everything has been read.
    pub fn good(&self) -> u64 {
        self.good
    }

    /// Reads the next record, whose data is put into `data`; `None` at the end.
    ///
    /// # Errors
    /// [`StreamError`]
    pub fn next(&mut self, data: &mut Vec<u8>) -> Result<Option<ChunkExtent>> {
        let mut bytes = [0; RECORD];
        self.fill(&mut bytes)?;
        let mut fields = Fields(&bytes);
        let (kind, checksum) = (fields.u32(), fields.u32());
        let (offset, len, sum) = (fields.u64(), fields.u64(), fields.u32());
        if crc(&bytes[..RECORD - 4]) != sum {
            return Err(self.invalid("the checksum of a record", sum.into()));
        }
        let size = self.header.size;
        match kind {
            END if offset != size => return Err(self.invalid("the offset of the end", offset)),
            END if len != self.records => {
                return Err(self.invalid("the number of records", len));
            }
            END => {
                self.good = size;
                return Ok(None);
            }
            DATA | ZEROS => {}
            _ => return Err(self.invalid("the type of a record", kind.into())),
        }
        // Neither can be more than 63 bits where this is right.
        if offset < self.good || offset > size {
            return Err(self.invalid("the offset of a record", offset));
        }
        if len == 0 || len > size - offset || (kind == DATA && len > MAX_DATA as u64) {
            return Err(self.invalid("the length of a record", len));
        }
        data.clear();
        if kind == DATA {
            data.resize(len as usize, 0);
            self.fill(data)?;
        }
        if crc(data) != checksum {
            return Err(self.invalid("the checksum of data", checksum.into()));
        }
        self.records += 1;
        self.good = offset + len;
        Ok(Some(ChunkExtent {
            offset,
            len,
            is_zero: kind == ZEROS,
        }))
    }

    fn fill(&mut self, bytes: &mut [u8]) -> Result<()> {
        match fill(&mut self.from, bytes)? == bytes.len() {
            true => Ok(()),
            false => Err(StreamError::Truncated { good: self.good }),
        }
    }

    fn invalid(&self, field: &'static str, value: u64) -> StreamError {
        StreamError::Invalid {
            field,
            value,
            good: self.good,
        }
    }
}

/// Of a header.
fn invalid(field: &'static str, value: u64) -> StreamError {
    StreamError::Invalid {
        field,
        value,
        good: 0,
    }
}

/// Fills `bytes` as far as there is something. How far that was.
fn fill(from: &mut impl Read, bytes: &mut [u8]) -> io::Result<usize> {
    let mut done = 0;
    while done < bytes.len() {
        match from.read(&mut bytes[done..]) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

fn crc(bytes: &[u8]) -> u32 {
    let mut crc = Crc::new();
    crc.update(bytes);
    crc.sum()
}

/// Numbers, one behind the other, of which there are enough.
struct Fields<'a>(&'a [u8]);

impl Fields<'_> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut taken = [0; N];
        let (first, rest) = self.0.split_at(N);
        taken.copy_from_slice(first);
        self.0 = rest;
        taken
    }

    fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes())
    }

    fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn header() -> Header {
        Header {
            id: [7; 16].into(),
            is_incremental: true,
            base: Some([8; 16].into()),
            size: 8 << 20,
            granularity: 65536,
            start: 65536,
            bitmap: b"monday".to_vec(),
        }
    }

    /// A stream of three records.
    fn stream() -> Vec<u8> {
        let mut writer = StreamWriter::new(Vec::new(), &header()).unwrap();
        writer.data(65536, &[1; 1000]).unwrap();
        writer.zeros(1 << 20, 1 << 20).unwrap();
        writer.zeros(1 << 20, 0).unwrap();
        writer.data(3 << 20, &vec![2; MAX_DATA + 512]).unwrap();
        writer.finish().unwrap()
    }

    /// Records of a stream, the length of their data, and the error that ends it.
    fn read(mut bytes: &[u8]) -> (Vec<(u64, u64, usize)>, Option<StreamError>) {
        let mut found = Vec::new();
        let mut reader = match StreamReader::new(&mut bytes) {
            Ok(Some(reader)) => reader,
            Ok(None) => return (found, None),
            Err(error) => return (found, Some(error)),
        };
        let mut data = Vec::new();
        loop {
            match reader.next(&mut data) {
                Ok(Some(extent)) => found.push((extent.offset, extent.len, data.len())),
                Ok(None) => return (found, None),
                Err(error) => return (found, Some(error)),
            }
        }
    }

    #[test]
    fn what_is_written_is_read() {
        let bytes = [stream(), stream()].concat();
        let mut rest = &bytes[..];
        for _ in 0..2 {
            let mut reader = StreamReader::new(&mut rest).unwrap().unwrap();
            assert_eq!(*reader.header(), header());
            let mut data = Vec::new();
            assert_eq!(reader.good(), 65536);
            while reader.next(&mut data).unwrap().is_some() {}
            assert_eq!(reader.good(), 8 << 20);
        }
        assert!(StreamReader::new(rest).unwrap().is_none());
        let max = MAX_DATA as u64;
        let expected = [
            (65536, 1000, 1000),
            (1 << 20, 1 << 20, 0),
            (3 << 20, max, MAX_DATA),
            ((3 << 20) + max, 512, 512),
        ];
        assert_eq!(read(&stream()).0, expected);
    }

    #[test]
    fn a_stream_that_is_cut_off_says_how_far_it_is_good() {
        let bytes = stream();
        for len in (1..200).chain(bytes.len() - 600..bytes.len()) {
            let (found, error) = read(&bytes[..len]);
            let end = found.last().map_or(0, |(offset, len, _)| offset + len);
            match error {
                Some(StreamError::Truncated { good }) => {
                    assert!(good == end || (found.is_empty() && good <= 65536));
                }
                other => panic!("{len}: {other:?}"),
            }
        }
        assert!(read(&[]).1.is_none());
        assert!(matches!(read(b"QFI\xfb").1, Some(StreamError::NotAStream)));
        assert!(matches!(read(&[0; 512]).1, Some(StreamError::NotAStream)));
    }

    /// Whatever byte is another one, no record is told that was not written.
    #[test]
    fn every_byte_is_checked() {
        let bytes = stream();
        let expected = read(&bytes).0;
        let last = bytes.len() - RECORD - 600;
        for at in (0..FIXED + 10 + RECORD + 1100).chain(last..bytes.len()) {
            let mut bytes = bytes.clone();
            bytes[at] ^= 0x10;
            let (found, error) = read(&bytes);
            assert!(error.is_some(), "byte {at}");
            assert!(expected.starts_with(&found), "byte {at}");
        }
    }

    /// A header with correct checksums, whatever it says.
    fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
        bytes.extend(crc(&bytes).to_be_bytes());
        bytes
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let good = stream();
        let text = |at: usize, bytes: &[u8]| {
            let mut header = good[..FIXED + 6].to_vec();
            header[at..at + bytes.len()].copy_from_slice(bytes);
            read(&sealed(header)).1.unwrap().to_string()
        };
        assert_eq!(
            text(8, &[0, 0, 0, 9]),
            "the stream has version 9; known is 1"
        );
        for (at, bytes, expected) in [
            (12, &[0, 0, 0, 2][..], "the field of flags is 0x2"),
            (16, &[0x80], "the size of the disk is 0x8000000000800000"),
            (23, &[1], "the size of the disk is 0x800001"),
            (31, &[3], "the granularity is 0x10003"),
            (64, &[1], "the start is 0x100000000010000"),
            (72, &[1], "the length of the bitmap's name is 0x1000006"),
        ] {
            assert!(text(at, bytes).ends_with(expected), "{}", text(at, bytes));
        }
        let record = |kind: u32, offset: u64, len: u64| {
            let mut bytes = kind.to_be_bytes().to_vec();
            bytes.extend([0; 4]);
            bytes.extend(offset.to_be_bytes());
            bytes.extend(len.to_be_bytes());
            let stream = [&good[..FIXED + 10], &sealed(bytes)].concat();
            read(&stream).1.unwrap().to_string()
        };
        for (kind, offset, len, expected) in [
            (4, 65536, 512, "the type of a record is 0x4"),
            (2, 0, 512, "the offset of a record is 0x0"),
            (
                2,
                u64::MAX,
                512,
                "the offset of a record is 0xffffffffffffffff",
            ),
            (2, 65536, 0, "the length of a record is 0x0"),
            (
                2,
                65536,
                u64::MAX,
                "the length of a record is 0xffffffffffffffff",
            ),
            (1, 65536, 2 << 20, "the length of a record is 0x200000"),
            (3, 0, 0, "the offset of the end is 0x0"),
            (3, 8 << 20, 1, "the number of records is 0x1"),
        ] {
            let found = record(kind, offset, len);
            assert!(found.ends_with(expected), "{found}");
            assert!(found.contains("good up to offset 65536"), "{found}");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]
        #[test]
        fn anything_can_follow_a_header(bytes in proptest::collection::vec(any::<u8>(), 0..100)) {
            let stream = [&stream()[..FIXED + 10], &bytes].concat();
            prop_assert!(read(&stream).0.is_empty());
        }
    }
}
