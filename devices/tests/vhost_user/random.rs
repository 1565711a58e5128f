//! Front ends that say anything.

use std::fs::File;
use std::os::fd::AsRawFd;

use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use tandem_devices::virtio::FEATURE_VERSION_1;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::front_end::{FEATURE_PROTOCOL, Service};
use crate::hostile::{LEN, USER, VERSION, code, message, send, words};
use crate::machine::within_deadline;

/// What is sent at once: bytes, and places in the list of files.
type Sent = (Vec<u8>, Vec<usize>);

/// Kinds of file that a front end may send.
const FILES: usize = 6;
const MEMORY: usize = 0;
const KICK: usize = 1;
const CALL: usize = 2;

fn files() -> [Box<dyn AsRawFd>; FILES] {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(LEN).unwrap();
    let (pipe, _) = std::io::pipe().unwrap();
    [
        Box::new(memory),
        Box::new(EventFd::new(EFD_NONBLOCK).unwrap()),
        Box::new(EventFd::new(0).unwrap()),
        Box::new(pipe),
        Box::new(File::open("/dev/null").unwrap()),
        Box::new(tempfile::tempfile().unwrap()),
    ]
}

/// Numbers that mean something in one message or another.
fn word() -> impl Strategy<Value = u64> {
    prop_oneof![
        4 => 0..4u64,
        2 => Just(1 << 32),
        2 => Just(64 << 32),
        2 => Just(64 << 32 | 1),
        3 => (0..LEN / 0x1000).prop_map(|page| USER + page * 0x1000),
        1 => Just(LEN),
        1 => Just(FEATURE_VERSION_1 | FEATURE_PROTOCOL),
        1 => Just(0xffff),
        1 => any::<u64>(),
    ]
}

/// A message that could be meant: it has the length and the number of files that it should have.
fn plausible() -> impl Strategy<Value = Sent> {
    let shapes = vec![
        (code::SET_FEATURES, 1, 0),
        (code::SET_PROTOCOL_FEATURES, 1, 0),
        (code::GET_FEATURES, 0, 0),
        (code::GET_PROTOCOL_FEATURES, 0, 0),
        (code::SET_OWNER, 0, 0),
        (code::RESET_OWNER, 0, 0),
        (code::RESET_DEVICE, 0, 0),
        (code::SET_MEM_TABLE, 5, 1),
        (code::SET_MEM_TABLE, 9, 2),
        (code::SET_VRING_NUM, 1, 0),
        (code::SET_VRING_ADDR, 5, 0),
        (code::SET_VRING_BASE, 1, 0),
        (code::GET_VRING_BASE, 1, 0),
        (code::SET_VRING_KICK, 1, 1),
        (code::SET_VRING_CALL, 1, 1),
        (code::SET_VRING_ERR, 1, 1),
        (code::SET_VRING_ENABLE, 1, 0),
        (code::GET_CONFIG, 2, 0),
        (code::SET_CONFIG, 2, 0),
        (code::ADD_MEM_REG, 5, 1),
        (code::REM_MEM_REG, 5, 0),
    ];
    let shape = prop::sample::select(shapes);
    shape.prop_flat_map(|(code, len, files)| {
        let body = prop::collection::vec(word(), len..=len);
        // The kind that is meant, mostly.
        let meant = if code == code::SET_VRING_KICK {
            KICK
        } else {
            CALL
        };
        let meant = if len == 1 { meant } else { MEMORY };
        let file = prop_oneof![3 => Just(meant), 1 => 0..FILES];
        let files = prop::collection::vec(file, files..=files);
        let flags = prop_oneof![Just(VERSION), Just(VERSION | NEED_REPLY)];
        (flags, body, files).prop_map(move |(flags, body, files)| {
            let body = words(&body);
            (message(code, flags, body.len() as u32, &body), files)
        })
    })
}

/// In the flags of a message.
const NEED_REPLY: u32 = 8;

/// Anything with the shape of a message.
fn any_message() -> impl Strategy<Value = Sent> {
    let body = prop::collection::vec(any::<u8>(), 0..80);
    let files = prop::collection::vec(0..FILES, 0..4);
    let size = prop_oneof![0..100u32, Just(0x1000), Just(0x1001), Just(u32::MAX)];
    let parts = (0..code::END, 0..16u32, body, size, files);
    parts.prop_map(|(code, flags, body, size, files)| (message(code, flags, size, &body), files))
}

/// How a front end begins that has a ring served.
fn beginning() -> Vec<Sent> {
    let sent = |code, body: &[u64], files: &[usize]| {
        let body = words(body);
        let bytes = message(code, VERSION, body.len() as u32, &body);
        (bytes, files.to_vec())
    };
    let addresses = [0, USER, USER + 0x1000, USER + 0x2000, 0];
    vec![
        sent(
            code::SET_FEATURES,
            &[FEATURE_VERSION_1 | FEATURE_PROTOCOL],
            &[],
        ),
        // MQ, REPLY_ACK, CONFIG, RESET_DEVICE and CONFIGURE_MEM_SLOTS.
        sent(
            code::SET_PROTOCOL_FEATURES,
            &[1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15],
            &[],
        ),
        sent(code::SET_MEM_TABLE, &[1, 0, LEN, USER, 0], &[MEMORY]),
        sent(code::SET_VRING_NUM, &[64 << 32], &[]),
        sent(code::SET_VRING_ADDR, &addresses, &[]),
        sent(code::SET_VRING_KICK, &[0], &[KICK]),
        sent(code::SET_VRING_CALL, &[0], &[CALL]),
        sent(code::SET_VRING_ENABLE, &[1 << 32], &[]),
    ]
}

/// Whatever a front end sends, the next one is served.
fn check<S: Strategy<Value = Vec<Sent>>>(
    cases: u32,
    strategy: impl FnOnce() -> S + Send + 'static,
) {
    within_deadline(move || {
        let service = Service::new(2);
        let files = files();
        let config = ProptestConfig {
            cases,
            failure_persistence: None,
            ..Default::default()
        };
        let outcome = TestRunner::new(config).run(&strategy(), |sent| {
            let connection = service.connect();
            for (bytes, places) in &sent {
                let fds: Vec<_> = places.iter().map(|&n| files[n].as_raw_fd()).collect();
                send(&connection, bytes, &fds);
            }
            drop(connection);
            // In whatever way: the process lives.
            let _ = service.wait_for_end();
            Ok(())
        });
        outcome.unwrap();
        service.assert_serves();
    });
}

#[test]
fn any_bytes() {
    check(100, || {
        let bytes = prop::collection::vec(any::<u8>(), 1..64);
        bytes.prop_map(|bytes| vec![(bytes, Vec::new())])
    });
}

#[test]
fn any_messages() {
    check(200, || prop::collection::vec(any_message(), 1..6));
}

#[test]
fn plausible_messages_in_any_order() {
    check(200, || prop::collection::vec(plausible(), 1..16));
}

#[test]
fn plausible_messages_while_a_ring_is_served() {
    check(200, || {
        let more = prop::collection::vec(plausible(), 1..12);
        more.prop_map(|more| [beginning(), more].concat())
    });
}
