//! Front ends that lie: each loses its connection, and the next one is served.

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixStream;

use tandem_devices::virtio::FEATURE_VERSION_1;
use tandem_devices::virtio::vhost_user::Error;
use vhost::VhostBackend;
use vhost::vhost_user::VhostUserFrontend;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use crate::front_end::{FEATURE_PROTOCOL, FrontEnd, Service};
use crate::machine::within_deadline;

/// Numbers of messages (the vhost-user protocol, "Front-end message types").
pub mod code {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const RESET_DEVICE: u32 = 34;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    /// One more than the last that the crate knows.
    pub const END: u32 = 46;
}

/// The protocol's version, in the flags of a message.
pub const VERSION: u32 = 1;

/// A message.
pub fn message(code: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
    let header = [code, flags, size].map(u32::to_le_bytes);
    [header.as_flattened(), body].concat()
}

/// Words that make up a body.
pub fn words(words: &[u64]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

/// Two numbers of 32 bits, as rings have them told.
pub fn state(index: u32, number: u32) -> Vec<u8> {
    [index, number].map(u32::to_le_bytes).concat()
}

pub fn send(connection: &UnixStream, bytes: &[u8], fds: &[RawFd]) {
    // It may have been given up already.
    let _ = connection.send_with_fds(&[bytes], fds);
}

/// Sends a message as it should be.
fn tell(connection: &UnixStream, code: u32, body: &[u8], fds: &[RawFd]) {
    send(
        connection,
        &message(code, VERSION, body.len() as u32, body),
        fds,
    );
}

/// A memory table of one region.
fn region(guest: u64, len: u64, user: u64, offset: u64) -> Vec<u8> {
    words(&[1, guest, len, user, offset])
}

fn memory_file(len: u64) -> File {
    let file = tempfile::tempfile().unwrap();
    file.set_len(len).unwrap();
    file
}

/// Where the front end has its memory, and how much.
pub const USER: u64 = 0x7000_0000;
pub const LEN: u64 = 0x1_0000;

/// A connection that has told all but its rings.
fn negotiated(service: &Service, memory: &File) -> UnixStream {
    let connection = service.connect();
    let features = FEATURE_VERSION_1 | FEATURE_PROTOCOL;
    tell(&connection, code::SET_OWNER, &[], &[]);
    tell(&connection, code::SET_FEATURES, &words(&[features]), &[]);
    let table = region(0, LEN, USER, 0);
    tell(
        &connection,
        code::SET_MEM_TABLE,
        &table,
        &[memory.as_raw_fd()],
    );
    connection
}

fn assert_given_up(service: &Service, what: &str) {
    let ended = service.wait_for_end();
    assert!(
        matches!(ended, Err(Error::Protocol(_))),
        "{what}: {ended:?}"
    );
}

#[test]
fn messages_that_are_not_whole() {
    within_deadline(|| {
        let service = Service::new(1);
        let whole = message(code::SET_FEATURES, VERSION, 8, &words(&[FEATURE_VERSION_1]));
        for len in 1..whole.len() {
            let mut connection = service.connect();
            connection.write_all(&whole[..len]).unwrap();
            connection.shutdown(Shutdown::Write).unwrap();
            assert_given_up(&service, &format!("{len} bytes"));
        }
        service.assert_serves();
    });
}

#[test]
fn messages_that_are_none() {
    within_deadline(|| {
        let service = Service::new(1);
        let version_2 = message(code::SET_OWNER, 2, 0, &[]);
        let reply = message(code::SET_OWNER, VERSION | 4, 0, &[]);
        for (what, bytes) in [
            ("an unknown code", message(code::END, VERSION, 0, &[])),
            ("code 0", message(0, VERSION, 0, &[])),
            ("version 2", version_2),
            ("a reply", reply),
            (
                "4 GiB",
                message(code::SET_FEATURES, VERSION, u32::MAX, &[0; 8]),
            ),
            (
                "too large",
                message(code::SET_FEATURES, VERSION, 0x2000, &[0; 0x2000]),
            ),
            (
                "too long",
                message(code::SET_FEATURES, VERSION, 16, &[0; 16]),
            ),
            (
                "too short",
                message(code::SET_VRING_ADDR, VERSION, 8, &[0; 8]),
            ),
            (
                "a huge table",
                message(code::SET_MEM_TABLE, VERSION, 8, &words(&[u64::MAX])),
            ),
            (
                "an early change",
                message(code::SET_CONFIG, VERSION, 13, &[0; 13]),
            ),
        ] {
            let connection = service.connect();
            send(&connection, &bytes, &[]);
            assert_given_up(&service, what);
        }
        service.assert_serves();
    });
}

#[test]
fn memory_that_is_none() {
    within_deadline(|| {
        let service = Service::new(1);
        let (pipe, _writer) = std::io::pipe().unwrap();
        let null = File::options()
            .read(true)
            .write(true)
            .open("/dev/null")
            .unwrap();
        let directory = File::open("/").unwrap();
        let read_only = tempfile::NamedTempFile::new().unwrap();
        read_only.as_file().set_len(LEN).unwrap();
        let read_only = File::open(read_only.path()).unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let short = memory_file(LEN - 1);
        let good = memory_file(LEN);
        let whole = region(0, LEN, USER, 0);
        let fd = |file: &dyn AsRawFd| vec![file.as_raw_fd()];
        for (what, table, fds) in [
            ("a pipe", &whole, fd(&pipe)),
            ("/dev/null", &whole, fd(&null)),
            ("a directory", &whole, fd(&directory)),
            ("not to be written", &whole, fd(&read_only)),
            ("an eventfd", &whole, fd(&event)),
            ("too short", &whole, fd(&short)),
            ("no file", &whole, Vec::new()),
            ("two files", &whole, [fd(&good), fd(&good)].concat()),
            ("behind the file", &region(0, LEN, USER, 0x1000), fd(&good)),
            ("an odd offset", &region(0, 0x1000, USER, 0x10), fd(&good)),
            ("no byte", &region(0, 0, USER, 0), fd(&good)),
            ("a huge region", &region(0, u64::MAX, USER, 0), fd(&good)),
            (
                "around the end",
                &region(u64::MAX - 0xfff, LEN, USER, 0),
                fd(&good),
            ),
        ] {
            let connection = service.connect();
            tell(&connection, code::SET_MEM_TABLE, table, &fds);
            assert_given_up(&service, what);
        }
        let connection = service.connect();
        let twice = words(&[2, 0, LEN, USER, 0, LEN / 2, LEN, 2 * USER, 0]);
        let both = [good.as_raw_fd(), good.as_raw_fd()];
        tell(&connection, code::SET_MEM_TABLE, &twice, &both);
        assert_given_up(&service, "regions that overlap");
        service.assert_serves();
    });
}

#[test]
fn rings_that_cannot_be() {
    within_deadline(|| {
        let service = Service::new(2);
        let memory = memory_file(LEN);
        let address = |index: u64, table: u64, used: u64, available: u64| {
            words(&[index, table, used, available, 0])
        };
        let good = address(0, USER, USER + 0x1000, USER + 0x2000);
        let outside = [
            address(0, USER + LEN, USER + 0x1000, USER + 0x2000),
            address(0, USER, USER - 0x1000, USER + 0x2000),
            address(0, USER, USER + 0x1000, 0),
            address(0, USER + LEN - 16, USER + 0x1000, USER + 0x2000),
            address(0, USER, USER + LEN - 8, USER + 0x2000),
            address(0, USER + 8, USER + 0x1000, USER + 0x2000),
        ];
        let kick = EventFd::new(EFD_NONBLOCK).unwrap();
        let start = |address: &[u8]| {
            let connection = negotiated(&service, &memory);
            tell(&connection, code::SET_VRING_NUM, &state(0, 64), &[]);
            tell(&connection, code::SET_VRING_BASE, &state(0, 0), &[]);
            tell(&connection, code::SET_VRING_ADDR, address, &[]);
            tell(
                &connection,
                code::SET_VRING_KICK,
                &words(&[0]),
                &[kick.as_raw_fd()],
            );
            tell(&connection, code::SET_VRING_ENABLE, &state(0, 1), &[]);
            connection
        };
        for (n, address) in outside.iter().enumerate() {
            let _connection = start(address);
            assert_given_up(&service, &format!("address {n}"));
        }
        for (what, code, body) in [
            ("a third ring", code::SET_VRING_NUM, state(2, 64)),
            ("no size", code::SET_VRING_NUM, state(0, 0)),
            ("an odd size", code::SET_VRING_NUM, state(1, 63)),
            ("a large size", code::SET_VRING_NUM, state(1, 2048)),
            (
                "a size while it is served",
                code::SET_VRING_NUM,
                state(0, 32),
            ),
            (
                "a base while it is served",
                code::SET_VRING_BASE,
                state(0, 7),
            ),
            ("a large base", code::SET_VRING_BASE, state(1, 1 << 16)),
            (
                "the base of a third ring",
                code::GET_VRING_BASE,
                state(2, 0),
            ),
            (
                "the base of the last ring",
                code::GET_VRING_BASE,
                state(u32::MAX, 0),
            ),
            ("enabled by 2", code::SET_VRING_ENABLE, state(0, 2)),
            (
                "a log",
                code::SET_VRING_ADDR,
                address(1 << 32, USER, USER + 0x1000, USER + 0x2000),
            ),
        ] {
            let connection = start(&good);
            tell(&connection, code, &body, &[]);
            assert_given_up(&service, what);
        }
        service.assert_serves();
    });
}

/// The flag belongs to the open file, which the front end has, too: it can have a signal wait that did not
/// when the eventfd was sent.
#[test]
fn an_interrupt_that_comes_to_block() {
    type Way = fn(&Service, &mut FrontEnd);
    let ways: [Way; 4] = [
        |service, front| {
            front.disconnect();
            service.wait_for_end().unwrap();
        },
        |_, front| assert_eq!(front.link.get_vring_base(0).unwrap(), 1),
        |_, front| front.link.reset_device().unwrap(),
        |_, front| {
            let other = EventFd::new(EFD_NONBLOCK).unwrap();
            front.link.set_vring_call(0, &other).unwrap();
            front.assert_reads(0, 3);
        },
    ];
    within_deadline(move || {
        for way in ways {
            let service = Service::new(1);
            let mut front = FrontEnd::new(&service, 1);
            front.start(0, 0);
            let call = front.calls[0].try_clone().unwrap();
            // SAFETY: the descriptor is open, and the call takes no pointer.
            let result = unsafe { libc::fcntl(call.as_raw_fd(), libc::F_SETFL, libc::O_RDWR) };
            assert_eq!(result, 0);
            call.write(u64::MAX - 1).unwrap();
            front.assert_reads(0, 2);
            // The device's thread waits now, or will.
            way(&service, &mut front);
            drop(front);
        }
    });
}

#[test]
fn events_that_are_none() {
    within_deadline(|| {
        let service = Service::new(1);
        let (pipe, _writer) = std::io::pipe().unwrap();
        let null = File::open("/dev/null").unwrap();
        let file = memory_file(1);
        let (socket, _peer) = UnixStream::pair().unwrap();
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let files: [(&str, OwnedFd); 4] = [
            ("a pipe", pipe.into()),
            ("/dev/null", null.into()),
            ("a file", file.into()),
            ("a socket", socket.into()),
        ];
        for code in [
            code::SET_VRING_KICK,
            code::SET_VRING_CALL,
            code::SET_VRING_ERR,
        ] {
            for (what, file) in &files {
                let connection = service.connect();
                tell(&connection, code, &words(&[0]), &[file.as_raw_fd()]);
                assert_given_up(&service, what);
            }
            let one = event.as_raw_fd();
            for (what, word, fds) in [
                ("no file", 0, &[][..]),
                ("a file that is not told", 0x100, &[one]),
                ("two files", 0, &[one, one]),
                ("another ring", 1, &[one]),
            ] {
                let connection = service.connect();
                tell(&connection, code, &words(&[word]), fds);
                assert_given_up(&service, what);
            }
        }
        let connection = service.connect();
        tell(&connection, code::SET_VRING_KICK, &words(&[0x100]), &[]);
        assert_given_up(&service, "a ring without a kick");
        service.assert_serves();
    });
}
