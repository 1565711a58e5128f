//! Front ends that say anything over the vhost-user socket.
#![no_main]

use std::fs::File;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::{LazyLock, Mutex};

use libfuzzer_sys::fuzz_target;
use tandem_devices::virtio::FEATURE_VERSION_1;
use tandem_devices::virtio::vhost_user::Backend;
use tandem_fuzz::driver::{block, disk};
use tandem_fuzz::input::Input;
use tandem_fuzz::limit::limited;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

/// Where the front end has its memory, and how much.
const USER: u64 = 0x7000_0000;
const LEN: u64 = 0x1_0000;
const FEATURE_PROTOCOL: u64 = 1 << 30;
/// The protocol's version, in the flags of a message, and that a reply is wanted.
const VERSION: u32 = 1;
const NEED_REPLY: u32 = 8;
/// Most messages of a front end.
const MESSAGES: usize = 24;

/// Messages by number, with as many words and files as each has.
const SHAPES: [(u32, usize, usize); 24] = [
    (1, 0, 0),
    (2, 1, 0),
    (3, 0, 0),
    (4, 0, 0),
    (5, 5, 1),
    (5, 9, 2),
    (8, 1, 0),
    (9, 5, 0),
    (10, 1, 0),
    (11, 1, 0),
    (12, 1, 1),
    (13, 1, 1),
    (14, 1, 1),
    (15, 0, 0),
    (16, 1, 0),
    (17, 0, 0),
    (18, 1, 0),
    (24, 2, 0),
    (25, 2, 0),
    (34, 0, 0),
    (36, 0, 0),
    (37, 5, 1),
    (38, 5, 0),
    (39, 1, 0),
];

/// The files that a front end may send: memory, a doorbell, and others.
struct Files {
    backend: Backend,
    files: Vec<Box<dyn AsRawFd + Send>>,
}

static FILES: LazyLock<Mutex<Files>> = LazyLock::new(|| {
    let memory = tempfile::tempfile().unwrap();
    memory.set_len(LEN).unwrap();
    let rung = EventFd::new(EFD_NONBLOCK).unwrap();
    rung.write(1).unwrap();
    Mutex::new(Files {
        backend: Backend::new(Box::new(block(&disk()))).unwrap(),
        files: vec![
            Box::new(memory),
            Box::new(rung),
            Box::new(EventFd::new(0).unwrap()),
            Box::new(File::open("/dev/null").unwrap()),
            Box::new(tempfile::tempfile().unwrap()),
        ],
    })
});

fn message(code: u32, flags: u32, size: u32, body: &[u8]) -> Vec<u8> {
    let header = [code, flags, size].map(u32::to_le_bytes);
    [header.as_flattened(), body].concat()
}

fn word(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        0..64 => input.byte().into(),
        64..96 => u64::from(input.byte()) << 32 | u64::from(input.byte()),
        96..160 => USER + u64::from(input.byte()) * 0x100,
        160..192 => LEN,
        192..200 => FEATURE_VERSION_1 | FEATURE_PROTOCOL,
        _ => input.value(),
    }
}

struct Connection<'f> {
    socket: UnixStream,
    files: &'f [Box<dyn AsRawFd + Send>],
}

impl Connection<'_> {
    fn send(&self, bytes: &[u8], files: &[usize]) {
        let fds: Vec<RawFd> = files.iter().map(|&n| self.files[n].as_raw_fd()).collect();
        // It is never more than what the socket holds.
        let _ = self.socket.send_with_fds(&[bytes], &fds);
    }

    fn tell(&self, code: u32, words: &[u64], files: &[usize]) {
        let body: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        self.send(&message(code, VERSION, body.len() as u32, &body), files);
    }

    /// As a front end begins that has a ring served.
    fn begin(&self) {
        self.tell(2, &[FEATURE_VERSION_1 | FEATURE_PROTOCOL], &[]);
        // MQ, REPLY_ACK, CONFIG, RESET_DEVICE and CONFIGURE_MEM_SLOTS.
        self.tell(16, &[1 | 1 << 3 | 1 << 9 | 1 << 13 | 1 << 15], &[]);
        self.tell(5, &[1, 0, LEN, USER, 0], &[0]);
        self.tell(8, &[16 << 32], &[]);
        self.tell(9, &[0, USER, USER + 0x1000, USER + 0x2000, 0], &[]);
        self.tell(12, &[0], &[1]);
        self.tell(13, &[0], &[2]);
        self.tell(18, &[1 << 32], &[]);
    }

    fn say(&self, input: &mut Input<'_>) {
        if input.byte() >= 240 {
            let len = input.below(64);
            return self.send(input.bytes(len), &[]);
        }
        let (mut code, words, files) = input.choose(&SHAPES);
        let mut body: Vec<u8> = (0..words).flat_map(|_| word(input).to_le_bytes()).collect();
        let meant = match code {
            12 => 1,
            13 | 14 => 2,
            _ => 0,
        };
        let mut files = vec![meant; files];
        let mut flags = VERSION | if input.bool() { NEED_REPLY } else { 0 };
        let mut size = body.len() as u32;
        match input.byte() {
            240..244 => code = input.byte().into(),
            244..247 => size = input.value() as u32,
            247..250 => flags = input.u32(),
            250..252 => files.push(input.below(self.files.len())),
            252..254 => body.extend(input.bytes(16)),
            254 => drop(files.pop()),
            255 => files.fill(input.below(self.files.len())),
            _ => {}
        }
        self.send(&message(code, flags, size, &body), &files);
    }
}

fn run(input: &mut Input<'_>) {
    let mut state = FILES.lock().unwrap();
    let Files { backend, files } = &mut *state;
    let (front, back) = UnixStream::pair().unwrap();
    let front = Connection {
        socket: front,
        files,
    };
    if input.bool() {
        front.begin();
    }
    for _ in 0..MESSAGES {
        if input.is_empty() {
            break;
        }
        front.say(input);
    }
    front.socket.shutdown(Shutdown::Write).unwrap();
    // In whatever way it ends: the process lives.
    let _ = backend.serve_connection(back);
}

fuzz_target!(|bytes: &[u8]| {
    limited(|| run(&mut Input::new(bytes)));
});
