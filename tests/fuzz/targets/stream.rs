//! Streams of backups, with checksums that are right, mostly.
#![no_main]

use flate2::Crc;
use libfuzzer_sys::fuzz_target;
use tandem_block::backup_stream::{Header, StreamReader, StreamWriter};
use tandem_fuzz::input::Input;
use tandem_fuzz::limit::limited;

/// Most records of a stream.
const RECORDS: u64 = 32;
const MAX_DATA: u64 = 1 << 20;

/// Appends the checksum of `bytes` from `start` on, or another one.
fn seal(bytes: &mut Vec<u8>, start: usize, input: &mut Input<'_>) {
    let mut crc = Crc::new();
    crc.update(&bytes[start..]);
    let wrong = u32::from(input.byte() == 255);
    bytes.extend((crc.sum() ^ wrong).to_be_bytes());
}

fn header(bytes: &mut Vec<u8>, input: &mut Input<'_>) {
    let start = bytes.len();
    let valid = input.byte() < 200;
    let mut number = |usual: u64| match valid || input.byte() < 128 {
        true => usual,
        false => input.value(),
    };
    bytes.extend(b"TandemBk");
    bytes.extend((number(1) as u32).to_be_bytes());
    bytes.extend((number(0) as u32).to_be_bytes());
    for usual in [1 << 20, 1 << 16, 1, 2, 0, 0, 0] {
        bytes.extend(number(usual).to_be_bytes());
    }
    let name_len = number(3);
    bytes.extend((name_len as u32).to_be_bytes());
    bytes.extend(vec![b'b'; name_len.min(1024) as usize]);
    seal(bytes, start, input);
}

fn record(bytes: &mut Vec<u8>, at: &mut u64, records: u64, input: &mut Input<'_>) {
    let kind = input.choose(&[1u32, 1, 2, 2, 3, 0]);
    let offset = match input.byte() {
        0..200 => *at,
        200..240 => *at + u64::from(input.u16()),
        _ => input.value(),
    };
    let len = match input.byte() {
        _ if kind == 3 => records,
        0..240 => u64::from(input.u16()),
        _ => input.value(),
    };
    let offset = if kind == 3 && input.bool() {
        1 << 20
    } else {
        offset
    };
    *at = offset.wrapping_add(len) % (1 << 32);
    let data = match kind {
        1 => vec![input.byte(); len.min(MAX_DATA) as usize],
        _ => Vec::new(),
    };
    let start = bytes.len();
    bytes.extend(kind.to_be_bytes());
    let mut sum = Vec::new();
    sum.extend(&data);
    seal(&mut sum, 0, input);
    bytes.extend(&sum[data.len()..]);
    bytes.extend(offset.to_be_bytes());
    bytes.extend(len.to_be_bytes());
    seal(bytes, start, input);
    bytes.extend(data);
}

/// What a stream tells.
#[derive(Debug, PartialEq)]
struct Told {
    header: Header,
    /// Offset, data, if there is any, and length.
    records: Vec<(u64, Vec<u8>, u64)>,
    is_whole: bool,
}

/// Reads a stream as far as possible; `None` if it has no header.
fn read(bytes: &[u8]) -> Option<Told> {
    let mut reader = StreamReader::new(bytes).ok()??;
    let (mut records, mut at, mut data) = (Vec::new(), reader.header().start, Vec::new());
    loop {
        match reader.next(&mut data) {
            Ok(Some(extent)) => {
                assert!(extent.offset >= at && extent.len > 0, "{extent:?}");
                at = extent.offset + extent.len;
                assert!(at <= reader.header().size && at == reader.good());
                assert!(extent.is_zero || extent.len == data.len() as u64);
                let content = if extent.is_zero {
                    Vec::new()
                } else {
                    data.clone()
                };
                records.push((extent.offset, content, extent.len));
            }
            end => {
                return Some(Told {
                    header: reader.header().clone(),
                    records,
                    is_whole: end.is_ok(),
                });
            }
        }
    }
}

fn run(input: &mut Input<'_>) {
    let mut bytes = Vec::new();
    let (mut at, mut records) = (0, 0);
    header(&mut bytes, input);
    while !input.is_empty() && records < RECORDS {
        record(&mut bytes, &mut at, records, input);
        records += 1;
    }
    if input.byte() > 200 {
        bytes.truncate(usize::from(input.u16()));
    }
    let Some(told) = read(&bytes) else { return };
    // What has been understood can be told again.
    let mut writer = StreamWriter::new(Vec::new(), &told.header).unwrap();
    for (offset, data, len) in &told.records {
        match data.is_empty() {
            true => writer.zeros(*offset, *len),
            false => writer.data(*offset, data),
        }
        .unwrap();
    }
    let again = read(&writer.finish().unwrap()).unwrap();
    let is_whole = true;
    assert_eq!(again, Told { is_whole, ..told });
}

fuzz_target!(|bytes: &[u8]| {
    limited(|| run(&mut Input::new(bytes)));
});
