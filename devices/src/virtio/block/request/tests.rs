//! One test for each way in which a request can be good or bad.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use tandem_block::Disk;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::test_common::disk::MemoryDisk;
use crate::test_common::ring::{Desc, Ring, readable, writable};
use crate::test_common::{REGION, guest_memory};
use crate::virtio::block::slot::Slot;
use crate::virtio::block::target::{Gather, Target};
use crate::virtio::queue::ActiveQueue;

const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x3_0000;
/// What memory holds before the device writes to it.
const UNTOUCHED: u8 = 0xee;
const SECTORS: u8 = 16;
/// What the driver accepts.
const ALL: u64 =
    features::FLUSH | features::CONFIG_WCE | features::DISCARD | features::WRITE_ZEROES;

struct Bench {
    mem: GuestMemory,
    disk: Arc<MemoryDisk>,
    target: Target,
    writeback: Arc<AtomicBool>,
}

/// What the driver finds: used length, status byte, and the typed reason.
type Answer = (u32, u8, Option<RequestError>);

impl Bench {
    fn new() -> Self {
        Self::with(MemoryDisk::new(SECTORS), ALL)
    }

    fn with(disk: MemoryDisk, features: u64) -> Self {
        let mem = guest_memory();
        let fill = vec![UNTOUCHED; (2 * REGION - DATA) as usize];
        mem.write_slice(&fill, GuestAddress(DATA)).unwrap();
        let disk = Arc::new(disk);
        let serial = Some("serial".parse().unwrap());
        let writeback = Arc::new(AtomicBool::new(true));
        let target = Target::new(
            Arc::clone(&disk) as Arc<dyn Disk>,
            serial,
            Arc::clone(&writeback),
            features,
        );
        Self {
            mem,
            disk,
            target,
            writeback,
        }
    }

    fn header(&self, kind: u32, sector: u64) {
        self.mem.write_obj(kind, GuestAddress(HEADER)).unwrap();
        self.mem
            .write_obj(sector, GuestAddress(HEADER + 8))
            .unwrap();
    }

    fn serve(&self, descs: &[Desc]) -> Answer {
        self.mem.write_obj(UNTOUCHED, GuestAddress(STATUS)).unwrap();
        let mut ring = Ring::new(&self.mem, 0, 256);
        ring.offer_chain(descs);
        let now = Instant::now();
        let mut slot = Slot::new(now);
        let mut queue = ActiveQueue::new(&self.mem, ring.queue(false));
        assert_eq!(queue.available(), Ok(1));
        assert_eq!(queue.take(&mut slot.buffers).unwrap(), Some(0));
        slot.parse(0, &self.target.rules, now);
        let mut gather = Gather::new();
        if !self.target.try_now(&mut slot, &mut gather) {
            self.target.carry_out(&mut slot, &mut gather);
        }
        let used_len = slot.answer();
        (used_len, self.byte(STATUS), slot.result.err())
    }

    /// A request as Linux lays it out.
    fn request(&self, kind: u32, sector: u64, data: Option<Desc>) -> Answer {
        self.header(kind, sector);
        let header = readable(HEADER, 16);
        let status = writable(STATUS, 1);
        match data {
            Some(data) => self.serve(&[header, data, status]),
            None => self.serve(&[header, status]),
        }
    }

    fn byte(&self, addr: u64) -> u8 {
        self.mem.read_obj(GuestAddress(addr)).unwrap()
    }

    fn bytes(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.mem.read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }
}

#[track_caller]
fn assert_ok(answer: &Answer, used_len: u32) {
    assert!(
        matches!(answer, (len, 0, None) if *len == used_len),
        "{answer:?}"
    );
}

/// The answer has this used length, this status byte and this reason.
macro_rules! assert_refused {
    ($answer:expr, $used_len:expr, $status:expr, $error:pat) => {
        let answer = $answer;
        assert!(
            matches!(&answer, ($used_len, status, Some($error)) if *status == $status as u8),
            "{answer:?}"
        );
    };
}

#[test]
fn reads() {
    let bench = Bench::new();
    let answer = bench.request(VIRTIO_BLK_T_IN, 3, Some(writable(DATA, 1024)));
    assert_ok(&answer, 1025);
    assert_eq!(bench.bytes(DATA, 1024), [[3; 512], [4; 512]].concat());
    assert_eq!(bench.byte(DATA + 1024), UNTOUCHED);
}

#[test]
fn writes() {
    let bench = Bench::new();
    let answer = bench.request(VIRTIO_BLK_T_OUT, 15, Some(readable(DATA, 512)));
    assert_ok(&answer, 1);
    let content = bench.disk.content();
    assert_eq!(content[14 * 512..15 * 512], [14; 512]);
    assert_eq!(content[15 * 512..], [UNTOUCHED; 512]);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 0);
}

#[test]
fn flushes() {
    let bench = Bench::new();
    assert_ok(&bench.request(VIRTIO_BLK_T_FLUSH, 0, None), 1);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 1);
}

#[test]
fn writes_through_for_a_driver_that_declined_to_flush() {
    let bench = Bench::with(MemoryDisk::new(SECTORS), 0);
    let answer = bench.request(VIRTIO_BLK_T_OUT, 0, Some(readable(DATA, 512)));
    assert_ok(&answer, 1);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 1);
    assert_refused!(
        bench.request(VIRTIO_BLK_T_FLUSH, 0, None),
        1,
        Status::Unsupp,
        RequestError::UnknownType(VIRTIO_BLK_T_FLUSH)
    );
}

#[test]
fn identifies_itself_padded_with_nul() {
    let bench = Bench::new();
    let answer = bench.request(VIRTIO_BLK_T_GET_ID, 0, Some(writable(DATA, 20)));
    assert_ok(&answer, 21);
    assert_eq!(
        &bench.bytes(DATA, 20),
        b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0"
    );
}

#[test]
fn id_leaves_the_rest_of_a_long_buffer_alone() {
    let bench = Bench::new();
    let answer = bench.request(VIRTIO_BLK_T_GET_ID, 0, Some(writable(DATA, 32)));
    assert_ok(&answer, 20);
    assert_eq!(bench.bytes(DATA + 20, 12), [UNTOUCHED; 12]);
}

#[test]
fn short_id_buffer() {
    let bench = Bench::new();
    assert_refused!(
        bench.request(VIRTIO_BLK_T_GET_ID, 0, Some(writable(DATA, 19))),
        0,
        Status::IoErr,
        RequestError::ShortIdBuffer(19)
    );
    assert_eq!(bench.bytes(DATA, 19), [UNTOUCHED; 19]);
}

#[test]
fn data_in_the_wrong_direction() {
    let bench = Bench::new();
    for (kind, data) in [
        (VIRTIO_BLK_T_IN, readable(DATA, 512)),
        (VIRTIO_BLK_T_OUT, writable(DATA, 512)),
        (VIRTIO_BLK_T_FLUSH, readable(DATA, 512)),
        (VIRTIO_BLK_T_FLUSH, writable(DATA, 512)),
        (VIRTIO_BLK_T_GET_ID, readable(DATA, 20)),
    ] {
        let answer = bench.request(kind, 0, Some(data));
        let is_refused = matches!(answer, (_, 1, Some(RequestError::WrongDirection)));
        assert!(is_refused, "{kind}: {answer:?}");
    }
    assert_eq!(bench.bytes(DATA, 512), [UNTOUCHED; 512]);
    assert_eq!(bench.disk.content(), MemoryDisk::new(SECTORS).content());
}

#[test]
fn header_shorter_than_16_bytes() {
    let bench = Bench::new();
    bench.header(VIRTIO_BLK_T_FLUSH, 0);
    let answer = bench.serve(&[readable(HEADER, 15), writable(STATUS, 1)]);
    assert_refused!(answer, 1, Status::IoErr, RequestError::ShortHeader);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 0);
}

#[test]
fn no_writable_byte() {
    let bench = Bench::new();
    bench.header(VIRTIO_BLK_T_OUT, 0);
    assert_refused!(
        bench.serve(&[readable(HEADER, 16), readable(DATA, 512)]),
        0,
        UNTOUCHED,
        RequestError::NoStatusByte
    );
    assert_eq!(bench.disk.writes.load(Ordering::SeqCst), 0);
}

#[test]
fn status_descriptor_of_length_zero() {
    let bench = Bench::new();
    bench.header(VIRTIO_BLK_T_IN, 0);
    let answer = bench.serve(&[
        readable(HEADER, 16),
        writable(DATA, 512),
        writable(STATUS, 0),
    ]);
    // The last byte of the data is then the status, and the rest is not whole sectors.
    assert_refused!(answer, 0, UNTOUCHED, RequestError::PartialSector(511));
    assert_eq!(bench.byte(DATA + 511), Status::IoErr as u8);
}

#[test]
fn any_framing() {
    let bench = Bench::new();
    bench.header(VIRTIO_BLK_T_IN, 7);
    let mut descs: Vec<_> = (0..16).map(|i| readable(HEADER + i, 1)).collect();
    descs.extend([
        writable(DATA, 0),
        writable(DATA, 1),
        writable(DATA + 1, 500),
        // The rest of the data and the status.
        writable(STATUS - 11, 12),
    ]);
    assert_ok(&bench.serve(&descs), 513);
    assert_eq!(bench.bytes(DATA, 501), [7; 501]);
    assert_eq!(bench.bytes(STATUS - 11, 11), [7; 11]);

    // Header and data in one buffer.
    bench.header(VIRTIO_BLK_T_OUT, 1);
    bench
        .mem
        .write_slice(&[9; 512], GuestAddress(HEADER + 16))
        .unwrap();
    let answer = bench.serve(&[readable(HEADER, 528), writable(STATUS, 1)]);
    assert_ok(&answer, 1);
    assert_eq!(bench.disk.content()[512..1024], [9; 512]);
}

#[test]
fn zero_length_transfers() {
    let bench = Bench::new();
    assert_ok(&bench.request(VIRTIO_BLK_T_IN, 0, None), 1);
    assert_ok(&bench.request(VIRTIO_BLK_T_OUT, SECTORS.into(), None), 1);
}

#[test]
fn length_not_of_whole_sectors() {
    let bench = Bench::new();
    assert_refused!(
        bench.request(VIRTIO_BLK_T_IN, 0, Some(writable(DATA, 513))),
        0,
        Status::IoErr,
        RequestError::PartialSector(513)
    );
    let answer = bench.request(VIRTIO_BLK_T_OUT, 0, Some(readable(DATA, 511)));
    assert_refused!(answer, 1, Status::IoErr, RequestError::PartialSector(511));
    assert_eq!(bench.disk.writes.load(Ordering::SeqCst), 0);
}

#[test]
fn beyond_the_end() {
    let bench = Bench::new();
    for sector in [SECTORS as u64 - 1, SECTORS as u64, u64::MAX / 512] {
        assert_refused!(
            bench.request(VIRTIO_BLK_T_IN, sector, Some(writable(DATA, 1024))),
            0,
            Status::IoErr,
            RequestError::Disk(Error::OutOfRange { .. })
        );
    }
}

#[test]
fn sector_that_overflows_a_byte_offset() {
    let bench = Bench::new();
    for sector in [u64::MAX / 512 + 1, 1 << 63, u64::MAX] {
        assert_refused!(
            bench.request(VIRTIO_BLK_T_IN, sector, Some(writable(DATA, 512))),
            0,
            Status::IoErr,
            RequestError::SectorOverflow(_)
        );
    }
}

#[test]
fn buffer_that_spans_memory_regions() {
    let bench = Bench::new();
    let addr = REGION - 300;
    assert_ok(
        &bench.request(VIRTIO_BLK_T_IN, 5, Some(writable(addr, 512))),
        513,
    );
    assert_eq!(bench.bytes(addr, 512), [5; 512]);
    assert_ok(
        &bench.request(VIRTIO_BLK_T_OUT, 6, Some(readable(addr, 512))),
        1,
    );
    assert_eq!(bench.disk.content()[6 * 512..7 * 512], [5; 512]);
}

#[test]
fn buffer_outside_guest_memory() {
    let bench = Bench::new();
    for addr in [2 * REGION, 2 * REGION - 100, u64::MAX - 100] {
        assert_refused!(
            bench.request(VIRTIO_BLK_T_IN, 0, Some(writable(addr, 512))),
            0,
            Status::IoErr,
            RequestError::Unmapped
        );
    }
    // A header that is not there must not make the data count as header.
    bench.header(VIRTIO_BLK_T_FLUSH, 0);
    let answer = bench.serve(&[
        readable(2 * REGION, 16),
        readable(HEADER, 16),
        writable(STATUS, 1),
    ]);
    assert_refused!(answer, 0, Status::IoErr, RequestError::Unmapped);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 0);
}

#[test]
fn status_outside_guest_memory() {
    let bench = Bench::new();
    bench.header(VIRTIO_BLK_T_IN, 0);
    let answer = bench.serve(&[
        readable(HEADER, 16),
        writable(DATA, 512),
        writable(2 * REGION, 1),
    ]);
    assert_refused!(answer, 0, UNTOUCHED, RequestError::NoStatusByte);
    assert_eq!(bench.bytes(DATA, 512), [UNTOUCHED; 512]);
}

#[test]
fn write_to_a_read_only_disk() {
    let bench = Bench::with(MemoryDisk::read_only(SECTORS), ALL);
    let answer = bench.request(VIRTIO_BLK_T_OUT, 0, Some(readable(DATA, 512)));
    assert_refused!(answer, 1, Status::IoErr, RequestError::ReadOnly);
    assert_eq!(bench.disk.writes.load(Ordering::SeqCst), 0);
    assert_ok(&bench.request(VIRTIO_BLK_T_FLUSH, 0, None), 1);
    assert_ok(
        &bench.request(VIRTIO_BLK_T_GET_ID, 0, Some(writable(DATA, 20))),
        21,
    );
}

#[test]
fn unknown_or_not_offered_type() {
    let bench = Bench::new();
    // SCSI, secure erase, zone append, nonsense.
    for kind in [2, 14, 15, 0x8000_0000, u32::MAX] {
        assert_refused!(
            bench.request(kind, 0, Some(writable(DATA, 512))),
            0,
            Status::Unsupp,
            RequestError::UnknownType(_)
        );
    }
}

#[test]
fn read_only_is_checked_before_direction_and_length() {
    let bench = Bench::with(MemoryDisk::read_only(SECTORS), ALL);
    assert_refused!(
        bench.request(VIRTIO_BLK_T_OUT, u64::MAX, Some(writable(DATA, 13))),
        0,
        Status::IoErr,
        RequestError::ReadOnly
    );
}

#[test]
fn failing_disk() {
    let bench = Bench::new();
    bench.disk.is_failing.store(true, Ordering::SeqCst);
    assert_refused!(
        bench.request(VIRTIO_BLK_T_IN, 0, Some(writable(DATA, 512))),
        0,
        Status::IoErr,
        RequestError::Disk(Error::Io { .. })
    );
    let answer = bench.request(VIRTIO_BLK_T_FLUSH, 0, None);
    assert_refused!(
        answer,
        1,
        Status::IoErr,
        RequestError::Disk(Error::Io { .. })
    );
}

/// One `struct virtio_blk_discard_write_zeroes`.
fn segment(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    let (sectors, flags) = (sectors.to_le_bytes(), flags.to_le_bytes());
    [&sector.to_le_bytes()[..], &sectors, &flags].concat()
}

impl Bench {
    /// A request with a list of segments.
    fn segments(&self, kind: u32, segments: &[Vec<u8>]) -> Answer {
        let list = segments.concat();
        self.mem.write_slice(&list, GuestAddress(DATA)).unwrap();
        self.request(kind, 0, Some(readable(DATA, list.len() as u32)))
    }

    fn assert_unchanged(&self) {
        assert_eq!(self.disk.content(), MemoryDisk::new(SECTORS).content());
        assert_eq!(*self.disk.discards.lock().unwrap(), []);
    }
}

#[test]
fn writes_zeroes() {
    let bench = Bench::new();
    let list = [segment(1, 2, 0), segment(5, 0, 1), segment(15, 1, 1)];
    assert_ok(&bench.segments(VIRTIO_BLK_T_WRITE_ZEROES, &list), 1);
    let content = bench.disk.content();
    for (sector, bytes) in (0..SECTORS).zip(content.chunks(512)) {
        let expected = if [1, 2, 15].contains(&sector) {
            0
        } else {
            sector
        };
        assert_eq!(bytes, [expected; 512], "sector {sector}");
    }
}

#[test]
fn discards() {
    let bench = Bench::new();
    let list = [segment(1, 2, 0), segment(15, 1, 0)];
    assert_ok(&bench.segments(VIRTIO_BLK_T_DISCARD, &list), 1);
    assert_eq!(
        *bench.disk.discards.lock().unwrap(),
        [(512, 1024), (15 * 512, 512)]
    );
}

#[test]
fn segments_with_flags_that_they_cannot_have() {
    let bench = Bench::new();
    for (kind, flags) in [
        (VIRTIO_BLK_T_DISCARD, 1),
        (VIRTIO_BLK_T_DISCARD, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, 2),
        (VIRTIO_BLK_T_WRITE_ZEROES, 1 << 31 | 1),
    ] {
        // Also where another one is too long, or reaches beyond the end.
        let list = [segment(0, 1, 0), segment(u64::MAX, u32::MAX, flags)];
        let answer = bench.segments(kind, &list);
        assert_refused!(answer, 1, Status::Unsupp, RequestError::SegmentFlags(_));
    }
    bench.assert_unchanged();
}

#[test]
fn lists_that_are_not_of_1_to_32_segments() {
    let bench = Bench::new();
    let good = segment(0, 1, 0);
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        for list in [vec![], good[..15].to_vec(), good.repeat(33)] {
            let answer = bench.segments(kind, &[list]);
            assert_refused!(answer, 1, Status::IoErr, RequestError::SegmentList(_));
        }
        let answer = bench.request(kind, 0, Some(writable(DATA, 16)));
        assert_refused!(answer, 0, Status::IoErr, RequestError::WrongDirection);
    }
    bench.assert_unchanged();
    let answer = bench.segments(VIRTIO_BLK_T_DISCARD, &vec![good; 32]);
    assert_ok(&answer, 1);
}

#[test]
fn segments_that_are_too_long_or_beyond_the_end_have_no_effect() {
    let bench = Bench::new();
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let list = |bad: Vec<u8>| [segment(0, 1, 0), bad];
        let answer = bench.segments(kind, &list(segment(0, u32::MAX, 0)));
        assert_refused!(answer, 1, Status::IoErr, RequestError::SegmentTooLong(_));
        let answer = bench.segments(kind, &list(segment(1 << 55, 1, 0)));
        assert_refused!(answer, 1, Status::IoErr, RequestError::SectorOverflow(_));
        for (sector, sectors) in [(15, 2), (16, 1), (17, 0), ((1 << 55) - 1, 1 << 19)] {
            let answer = bench.segments(kind, &list(segment(sector, sectors, 0)));
            let is_refused = matches!(
                answer,
                (1, 1, Some(RequestError::Disk(Error::OutOfRange { .. })))
            );
            assert!(is_refused, "{sector} {sectors} {answer:?}");
        }
    }
    bench.assert_unchanged();
}

#[test]
fn segments_on_a_read_only_disk_or_not_negotiated() {
    let list = [segment(0, 1, 0)];
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let bench = Bench::with(MemoryDisk::read_only(SECTORS), ALL);
        let answer = bench.segments(kind, &list);
        assert_refused!(answer, 1, Status::IoErr, RequestError::ReadOnly);
        let bench = Bench::with(MemoryDisk::new(SECTORS), features::FLUSH);
        let answer = bench.segments(kind, &list);
        assert_refused!(answer, 1, Status::Unsupp, RequestError::UnknownType(_));
        bench.assert_unchanged();
    }
}

#[test]
fn writes_through_when_the_driver_chooses_so() {
    let bench = Bench::new();
    let flushes = || bench.disk.flushes.load(Ordering::SeqCst);
    let write = || bench.request(VIRTIO_BLK_T_OUT, 0, Some(readable(DATA, 512)));
    assert_ok(&write(), 1);
    assert_eq!(flushes(), 0);
    bench.writeback.store(false, Ordering::SeqCst);
    assert_ok(&write(), 1);
    assert_eq!(flushes(), 1);
    let zeroes = bench.segments(VIRTIO_BLK_T_WRITE_ZEROES, &[segment(0, 1, 0)]);
    assert_ok(&zeroes, 1);
    assert_eq!(flushes(), 2);
    // To a driver that cannot choose it makes no difference.
    let bench = Bench::with(MemoryDisk::new(SECTORS), features::FLUSH);
    bench.writeback.store(false, Ordering::SeqCst);
    let answer = bench.request(VIRTIO_BLK_T_OUT, 0, Some(readable(DATA, 512)));
    assert_ok(&answer, 1);
    assert_eq!(bench.disk.flushes.load(Ordering::SeqCst), 0);
}
