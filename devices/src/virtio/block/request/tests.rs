//! One test for each way in which a request can be good or bad.

use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::GuestMemory;
use crate::test_common::disk::MemoryDisk;
use crate::test_common::ring::{Desc, Ring, readable, writable};
use crate::test_common::{REGION, guest_memory};
use crate::virtio::queue::ActiveQueue;

const HEADER: u64 = 0x1_0000;
const DATA: u64 = 0x2_0000;
const STATUS: u64 = 0x3_0000;
/// What memory holds before the device writes to it.
const UNTOUCHED: u8 = 0xee;
const SECTORS: u8 = 16;

struct Bench {
    mem: GuestMemory,
    disk: Arc<MemoryDisk>,
    target: Target,
}

/// What the driver finds: used length, status byte, and the typed reason.
type Answer = (u32, u8, Option<RequestError>);

impl Bench {
    fn new() -> Self {
        Self::with(MemoryDisk::new(SECTORS), FEATURE_FLUSH)
    }

    fn with(disk: MemoryDisk, features: u64) -> Self {
        let mem = guest_memory();
        let fill = vec![UNTOUCHED; (2 * REGION - DATA) as usize];
        mem.write_slice(&fill, GuestAddress(DATA)).unwrap();
        let disk = Arc::new(disk);
        let serial = Some("serial".parse().unwrap());
        let target = Target::new(Arc::clone(&disk) as Arc<dyn Disk>, serial, features);
        Self { mem, disk, target }
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
        let mut buffers = Buffers::new();
        let mut queue = ActiveQueue::new(&self.mem, ring.queue(false));
        assert_eq!(queue.take(&mut buffers).unwrap(), Some(0));
        let outcome = self.target.serve(&mut buffers);
        (outcome.used_len, self.byte(STATUS), outcome.error)
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
    let bench = Bench::with(MemoryDisk::read_only(SECTORS), FEATURE_FLUSH);
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
    // SCSI, discard, write zeroes, secure erase, zone append, nonsense.
    for kind in [2, 11, 13, 14, 15, 0x8000_0000, u32::MAX] {
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
    let bench = Bench::with(MemoryDisk::read_only(SECTORS), FEATURE_FLUSH);
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
