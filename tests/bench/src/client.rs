//! A client of vhost-user-blk on one queue: the library behind libblkio, and memory that it shares
//! with the server.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use virtio_driver::{VhostUser, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags};
use vm_memory::{FileOffset, MmapRegion};

use crate::clock;
use crate::work::piece;

pub const BLOCK: usize = 4096;
/// Most requests in flight: each has three descriptors.
pub const DEPTH: usize = 64;
/// Descriptors in the queue, as QEMU's servers have it.
const QUEUE_SIZE: u16 = 256;

/// A process that serves a disk.
pub struct Server {
    process: Child,
    socket: PathBuf,
}

impl Server {
    /// Starts `command`, which is to listen on `socket`.
    pub fn start(mut command: Command, socket: PathBuf) -> Self {
        command.stdin(Stdio::null()).stdout(Stdio::null());
        let process = command.spawn().unwrap();
        let mut server = Self { process, socket };
        let deadline = Instant::now() + Duration::from_secs(60);
        while !server.socket.exists() {
            assert!(server.process.try_wait().unwrap().is_none(), "{command:?}");
            assert!(Instant::now() < deadline, "{command:?} makes no socket");
            std::thread::sleep(Duration::from_millis(5));
        }
        server
    }

    pub fn pid(&self) -> u32 {
        self.process.id()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // SAFETY: the process is our child, and has not been waited for.
        unsafe { libc::kill(self.process.id() as libc::pid_t, libc::SIGTERM) };
        let _ = self.process.wait();
    }
}

/// What a turn has taken for each of its requests.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    /// Processor time of the server, in nanoseconds.
    pub processor: f64,
    /// Time that has gone by, in nanoseconds.
    pub wall: f64,
    /// Times that the client was called.
    pub interrupts: f64,
    /// Times that it called the server.
    pub doorbells: f64,
}

/// Memory as a virtual machine shares it, for all requests in flight.
pub fn memory() -> MmapRegion<()> {
    // SAFETY: the name is a string of C, and no other memory is passed.
    let fd = unsafe { libc::memfd_create(c"blocks".as_ptr(), libc::MFD_CLOEXEC) };
    assert!(fd >= 0, "memory");
    // SAFETY: the descriptor is new, and nobody else's.
    let file = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let length = DEPTH * BLOCK;
    file.set_len(length as u64).unwrap();
    MmapRegion::from_file(FileOffset::new(file, 0), length).unwrap()
}

/// A front end.
pub struct Client {
    transport: Box<VirtioBlkTransport>,
    queue: VirtioBlkQueue<'static, usize>,
    memory: MmapRegion<()>,
    server: Server,
    interrupts: u64,
    doorbells: u64,
}

impl Client {
    pub fn connect(server: Server) -> Self {
        let features = VirtioFeatureFlags::VERSION_1
            | VirtioFeatureFlags::RING_EVENT_IDX
            | VirtioFeatureFlags::RING_INDIRECT_DESC;
        let socket = server.socket.to_str().unwrap();
        let link = VhostUser::new(socket, features.bits()).unwrap();
        let mut transport: Box<VirtioBlkTransport> = Box::new(link);
        let queues = VirtioBlkQueue::setup_queues(&mut *transport, 1, QUEUE_SIZE).unwrap();
        let mut queue = queues.into_iter().next().unwrap();
        queue.set_used_notif_enabled(true);
        let memory = memory();
        let address = memory.as_ptr() as usize;
        let fd = memory.file_offset().unwrap().file().as_raw_fd();
        let length = memory.size();
        transport.map_mem_region(address, length, fd, 0).unwrap();
        Self {
            transport,
            queue,
            memory,
            server,
            interrupts: 0,
            doorbells: 0,
        }
    }

    /// Reads the blocks of `offsets`, with so many requests in flight.
    pub fn read(&mut self, offsets: &[u64], depth: usize) -> Taken {
        let pid = self.server.pid();
        (self.interrupts, self.doorbells) = (0, 0);
        let before = (clock::of_process(pid), clock::wall());
        let mut offsets_left = offsets.iter();
        let mut free: Vec<usize> = (0..depth).collect();
        let mut completed = 0;
        while completed < offsets.len() {
            for (place, offset) in free.drain(..).zip(offsets_left.by_ref()) {
                self.submit(*offset, place);
            }
            self.ring();
            self.wait(&mut free);
            completed += free.len();
        }
        let count = offsets.len() as f64;
        Taken {
            wall: (clock::wall() - before.1) / count,
            processor: (clock::of_process(pid) - before.0) / count,
            interrupts: self.interrupts as f64 / count,
            doorbells: self.doorbells as f64 / count,
        }
    }

    /// As [`read`](Self::read), with a piece of `offsets` for each turn.
    pub fn turn(&mut self, offsets: &[u64], length: usize, turn: usize, depth: usize) -> Taken {
        self.read(piece(offsets, length, turn), depth)
    }

    pub fn submit(&mut self, offset: u64, place: usize) {
        assert!(place < DEPTH);
        // SAFETY: places lie in the memory, one behind another.
        let data = unsafe { self.memory.as_ptr().add(place * BLOCK) };
        // SAFETY: the place is in no other use until the request is complete.
        unsafe { self.queue.read_raw(offset, data, BLOCK, place) }.unwrap();
    }

    /// Calls the server, if it wants to be called.
    pub fn ring(&mut self) {
        if self.queue.avail_notif_needed() {
            self.doorbells += 1;
            self.transport.get_submission_notifier(0).notify().unwrap();
        }
    }

    /// Waits until something has been completed, and puts the places of that into `free`.
    pub fn wait(&mut self, free: &mut Vec<usize>) {
        loop {
            for completion in self.queue.completions() {
                assert_eq!(completion.ret, 0);
                free.push(completion.context);
            }
            if !free.is_empty() {
                return;
            }
            let event = self.transport.get_completion_fd(0);
            let mut poll = libc::pollfd {
                fd: event.as_raw_fd(),
                events: libc::POLLIN,
                revents: 0,
            };
            // SAFETY: one valid entry.
            let n = unsafe { libc::poll(&mut poll, 1, 60_000) };
            assert_eq!(n, 1, "no interrupt");
            self.interrupts += event.read().unwrap();
        }
    }

    pub fn pid(&self) -> u32 {
        self.server.pid()
    }
}

/// `tandem serve` with these keys of `--disk`.
pub fn tandem(program: &Path, image: &Path, keys: &str, sandbox: bool, socket: PathBuf) -> Client {
    let mut command = Command::new(program);
    command.arg("serve").arg("--socket").arg(&socket);
    command
        .arg("--disk")
        .arg(format!("{}{keys}", image.display()));
    if !sandbox {
        command.arg("--no-sandbox");
    }
    Client::connect(Server::start(command, socket))
}

/// QEMU's server of a qcow2 image, whose files it reads in the way `aio`.
pub fn qemu(image: &Path, aio: &str, socket: PathBuf) -> Client {
    let mut command = Command::new("qemu-storage-daemon");
    command
        .arg("--blockdev")
        .arg(format!(
            "driver=qcow2,node-name=disk,file.driver=file,file.aio={aio},file.filename={}",
            image.display()
        ))
        .arg("--export")
        .arg(format!(
            "type=vhost-user-blk,id=export,node-name=disk,writable=on,addr.type=unix,addr.path={}",
            socket.display()
        ));
    Client::connect(Server::start(command, socket))
}
