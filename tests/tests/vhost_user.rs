//! A disk served to the client library of libblkio, the crate `virtio-driver`, with many requests in
//! flight.

#[path = "common/vhost_client.rs"]
mod vhost_client;

use std::collections::HashSet;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::process::Command;
use std::thread;

use tandem_vmm::{DiskConfig, ExitReason, Server};
use vhost_client::Connection;
use virtio_driver::{VirtioBlkFeatureFlags, VirtioFeatureFlags};

const BLOCK: usize = 4096;
/// Blocks of the disk.
const BLOCKS: usize = 2048;
const QUEUES: usize = 4;
/// Requests in flight on each queue.
const DEPTH: usize = 32;
const REQUESTS: usize = 6000;

/// Runs a tool of QEMU, which must succeed, in `directory`.
fn qemu_img(directory: &Path, arguments: &str) {
    let mut command = Command::new("qemu-img");
    command.current_dir(directory).args(arguments.split(' '));
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments}: {output:?}");
}

fn xorshift(state: &mut u64) -> usize {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    (*state >> 16) as usize
}

/// A request under way, in the place that it has in memory.
#[derive(Clone, Copy)]
struct Request {
    place: usize,
    block: usize,
    /// What a read must find.
    expected: Option<u8>,
}

/// The client, and what it knows of the disk.
struct Client {
    connection: Connection<Request>,
    /// Blocks that requests are under way for.
    busy: HashSet<usize>,
    /// What each block is filled with.
    content: Vec<u8>,
    state: u64,
}

impl Client {
    fn connect(socket: &Path) -> Self {
        let block = VirtioBlkFeatureFlags::FLUSH | VirtioBlkFeatureFlags::WRITE_ZEROES;
        let indirect = VirtioFeatureFlags::RING_INDIRECT_DESC;
        let connection = Connection::open(socket, indirect, block, QUEUES, DEPTH, BLOCK).unwrap();
        let config = connection.transport.get_config().unwrap();
        assert_eq!(u64::from(config.capacity), (BLOCKS * BLOCK / 512) as u64);
        Self {
            connection,
            busy: HashSet::new(),
            content: vec![0; BLOCKS],
            state: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// Submits a request to `queue` for a block that no other is under way for.
    fn submit(&mut self, queue: usize) {
        let Some(place) = self.connection.free[queue].pop() else {
            return;
        };
        let block = loop {
            let block = xorshift(&mut self.state) % BLOCKS;
            if self.busy.insert(block) {
                break block;
            }
        };
        let (offset, len) = ((block * BLOCK) as u64, BLOCK as u64);
        // SAFETY: places lie in the memory, one behind another.
        let data = unsafe { self.connection.memory.as_ptr().add(place * BLOCK) };
        let mut request = Request {
            place,
            block,
            expected: None,
        };
        let fill = (xorshift(&mut self.state) % 255) as u8 + 1;
        let kind = xorshift(&mut self.state) % 16;
        let target = &mut self.connection.queues[queue];
        match kind {
            0 => target.flush(request),
            1 => {
                self.content[block] = 0;
                target.write_zeroes(offset, len, fill.is_multiple_of(2), request)
            }
            2..8 => {
                self.content[block] = fill;
                // SAFETY: the place is in no other use until the request is complete.
                unsafe { data.write_bytes(fill, BLOCK) };
                // SAFETY: as before.
                unsafe { target.write_raw(offset, data, BLOCK, request) }
            }
            _ => {
                request.expected = Some(self.content[block]);
                // SAFETY: as before.
                unsafe { target.read_raw(offset, data, BLOCK, request) }
            }
        }
        .unwrap();
    }

    /// Takes what has been completed, and returns how much that was.
    fn complete(&mut self, queue: usize) -> usize {
        let completed: Vec<_> = self.connection.queues[queue].completions().collect();
        for completion in &completed {
            assert_eq!(completion.ret, 0);
            let Request {
                place,
                block,
                expected,
            } = completion.context;
            if let Some(fill) = expected {
                // SAFETY: the place lies in the memory, and its request is complete.
                let data = unsafe {
                    std::slice::from_raw_parts(
                        self.connection.memory.as_ptr().add(place * BLOCK),
                        BLOCK,
                    )
                };
                assert!(data.iter().all(|byte| *byte == fill), "block {block}");
            }
            self.busy.remove(&block);
            self.connection.free[queue].push(place);
        }
        completed.len()
    }

    /// Waits for an interrupt of any queue.
    fn wait(&self) {
        let events: Vec<_> = (0..QUEUES)
            .map(|n| self.connection.transport.get_completion_fd(n))
            .collect();
        let mut fds: Vec<_> = events
            .iter()
            .map(|event| libc::pollfd {
                fd: event.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            })
            .collect();
        // SAFETY: a valid array of as many entries.
        let n = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as u64, 60_000) };
        assert!(n > 0, "no interrupt");
        for (event, _) in events.iter().zip(fds).filter(|(_, fd)| fd.revents != 0) {
            event.read().unwrap();
        }
    }

    fn run(&mut self) {
        let (mut submitted, mut completed) = (0, 0);
        while completed < REQUESTS {
            for queue in 0..QUEUES {
                while submitted < REQUESTS && !self.connection.free[queue].is_empty() {
                    self.submit(queue);
                    submitted += 1;
                }
                self.connection
                    .transport
                    .get_submission_notifier(queue)
                    .notify()
                    .unwrap();
            }
            let before = completed;
            completed += (0..QUEUES).map(|queue| self.complete(queue)).sum::<usize>();
            if completed == before {
                self.wait();
            }
        }
        self.connection.queues[0]
            .flush(Request {
                place: 0,
                block: 0,
                expected: None,
            })
            .unwrap();
        self.connection
            .transport
            .get_submission_notifier(0)
            .notify()
            .unwrap();
        while self.connection.queues[0].completions().next().is_none() {
            self.wait();
        }
    }

    fn disk(&self) -> Vec<u8> {
        self.content
            .iter()
            .flat_map(|&fill| [fill; BLOCK])
            .collect()
    }
}

/// What a client writes, it reads back, and QEMU finds in the image.
fn serve(options: &str, raw_data_file: Option<&str>) {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let size = BLOCKS * BLOCK;
    qemu_img(
        directory.path(),
        &format!("create -q -f qcow2 {options}disk.qcow2 {size}"),
    );
    let server = Server::open(&path("socket"), &DiskConfig::new(path("disk.qcow2"))).unwrap();
    let stop = server.stop_handle();
    let serving = thread::spawn(move || server.run(None, |incident| panic!("{incident}")));

    let mut client = Client::connect(&path("socket"));
    client.run();
    let expected = client.disk();
    drop(client);
    stop.stop();
    let outcome = serving.join().unwrap().unwrap();
    assert_eq!(outcome, ExitReason::Stopped);
    assert!(!path("socket").exists());

    qemu_img(directory.path(), "check -q disk.qcow2");
    qemu_img(directory.path(), "convert -O raw disk.qcow2 converted");
    assert!(
        std::fs::read(path("converted")).unwrap() == expected,
        "the disk as QEMU reads it"
    );
    if let Some(name) = raw_data_file {
        assert!(
            std::fs::read(path(name)).unwrap() == expected,
            "the raw data file"
        );
    }
}

#[test]
fn internal() {
    serve("", None);
}

#[test]
fn external_raw() {
    serve(
        "-o data_file=disk.data,data_file_raw=on ",
        Some("disk.data"),
    );
}
