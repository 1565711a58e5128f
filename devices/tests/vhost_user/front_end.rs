//! A back end in a thread of its own, and a front end that follows the rules.

use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tandem_block::Disk;
use tandem_devices::GuestMemory;
use tandem_devices::virtio::block::{Block, Handle, Options};
use tandem_devices::virtio::vhost_user::{Backend, Error, StopHandle};
use tandem_devices::virtio::{FEATURE_INDIRECT_DESC, FEATURE_VERSION_1};
use vhost::vhost_user::message::{VhostUserHeaderFlag, VhostUserProtocolFeatures};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::{FileOffset, GuestAddress, GuestMemoryBackend as _};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::common::REGION;
use crate::common::disk::MemoryDisk;
use crate::common::gate::Gate;
use crate::driver::Driver;

/// Feature bits of block devices (virtio 1.3, section 5.2.3).
pub const FEATURE_FLUSH: u64 = 1 << 9;
/// `VHOST_USER_F_PROTOCOL_FEATURES`.
pub const FEATURE_PROTOCOL: u64 = 1 << 30;
pub const SECTORS: u8 = 200;
/// The first sector that has to be waited for.
pub const COLD: u64 = 100;
pub const QUEUE_SIZE: u16 = 64;
/// Longer than anything takes: what waits so long has failed.
const PATIENCE: Duration = Duration::from_secs(60);

/// A back end that serves one front end after another.
pub struct Service {
    pub disk: Arc<Gate<MemoryDisk>>,
    pub handle: Handle,
    pub stop: StopHandle,
    socket: PathBuf,
    ended: Receiver<Result<(), Error>>,
    thread: Option<JoinHandle<()>>,
    _directory: tempfile::TempDir,
}

impl Service {
    pub fn new(queues: u16) -> Self {
        let disk = Arc::new(Gate::new(MemoryDisk::new(SECTORS), 512 * COLD));
        let mut options = Options::default();
        options.queues = queues;
        options.queue_size = 128;
        let block = Block::new(disk.clone() as Arc<dyn Disk>, options);
        let handle = block.handle();
        let mut backend = Backend::new(Box::new(block)).unwrap();
        let stop = backend.stop_handle();
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("socket");
        let listener = UnixListener::bind(&socket).unwrap();
        let (sender, ended) = mpsc::channel();
        let thread = thread::spawn(move || {
            let result = backend.serve(&listener, |result| sender.send(result).unwrap());
            result.unwrap();
        });
        Self {
            disk,
            handle,
            stop,
            socket,
            ended,
            thread: Some(thread),
            _directory: directory,
        }
    }

    pub fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).unwrap()
    }

    /// Waits for the end of a front end, and tells how it came.
    pub fn wait_for_end(&self) -> Result<(), Error> {
        self.ended.recv_timeout(PATIENCE).unwrap()
    }

    /// Whether a front end has come to its end that has not been waited for.
    pub fn has_ended(&self) -> bool {
        self.ended.try_recv().is_ok()
    }

    /// Waits until the back end has been stopped.
    pub fn join(&mut self) {
        self.thread.take().unwrap().join().unwrap();
    }

    /// A front end that comes now is served.
    pub fn assert_serves(&self) {
        let mut front = FrontEnd::new(self, 1);
        front.start(0, 0);
        front.assert_reads(0, 7);
        drop(front);
        self.wait_for_end().unwrap();
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        self.disk.open();
        self.stop.stop();
        if let Some(thread) = self.thread.take() {
            let result = thread.join();
            assert!(
                result.is_ok() || thread::panicking(),
                "the back end panicked"
            );
        }
    }
}

/// A front end that has negotiated and shared its memory.
pub struct FrontEnd {
    pub link: Frontend,
    pub mem: GuestMemory,
    pub drivers: Vec<Driver>,
    pub kicks: Vec<EventFd>,
    pub calls: Vec<EventFd>,
}

/// Two regions that touch each other in guest memory, in two files.
pub fn shared_memory() -> GuestMemory {
    let region = |start| {
        let file = tempfile::tempfile().unwrap();
        file.set_len(REGION).unwrap();
        let file = FileOffset::new(file, 0);
        (GuestAddress(start), REGION as usize, Some(file))
    };
    GuestMemory::from_ranges_with_files([region(0), region(REGION)]).unwrap()
}

/// The memory table.
pub fn regions(mem: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    mem.iter()
        .map(|region| VhostUserMemoryRegionInfo::from_guest_region(region).unwrap())
        .collect()
}

/// A front end that has accepted `features`, with all of the protocol's own.
pub fn negotiate(service: &Service, queues: usize, features: u64) -> Frontend {
    let mut link = Frontend::from_stream(service.connect(), queues as u64);
    link.set_owner().unwrap();
    link.get_features().unwrap();
    link.set_features(features).unwrap();
    if features & FEATURE_PROTOCOL != 0 {
        let protocol = link.get_protocol_features().unwrap();
        assert!(protocol.contains(VhostUserProtocolFeatures::REPLY_ACK));
        link.set_protocol_features(protocol).unwrap();
        link.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
    }
    link
}

impl FrontEnd {
    pub fn new(service: &Service, queues: usize) -> Self {
        let features = FEATURE_VERSION_1 | FEATURE_INDIRECT_DESC | FEATURE_FLUSH;
        Self::with_features(service, queues, features | FEATURE_PROTOCOL)
    }

    pub fn with_features(service: &Service, queues: usize, features: u64) -> Self {
        let link = negotiate(service, queues, features);
        let mem = shared_memory();
        link.set_mem_table(&regions(&mem)).unwrap();
        let events = || (0..queues).map(|_| EventFd::new(EFD_NONBLOCK).unwrap());
        let drivers = (0..queues as u64).map(|n| {
            let len = Driver::memory_len(QUEUE_SIZE).next_multiple_of(0x1000);
            Driver::new(&mem, n * len, QUEUE_SIZE)
        });
        Self {
            link,
            drivers: drivers.collect(),
            kicks: events().collect(),
            calls: events().collect(),
            mem,
        }
    }

    /// Breaks the connection. The guest stays.
    pub fn disconnect(&mut self) {
        let (dead, _) = UnixStream::pair().unwrap();
        self.link = Frontend::from_stream(dead, 0);
    }

    /// Connects again, and shares the same memory.
    pub fn connect(&mut self, service: &Service) {
        let features = FEATURE_VERSION_1 | FEATURE_INDIRECT_DESC | FEATURE_PROTOCOL;
        self.link = negotiate(service, self.drivers.len(), features);
        self.link.set_mem_table(&regions(&self.mem)).unwrap();
    }

    /// Tells all about ring `index` but that it is enabled.
    pub fn set_up(&self, index: usize, base: u16) {
        let ring = &self.drivers[index].ring;
        let user = |addr| self.mem.get_host_address(GuestAddress(addr)).unwrap() as u64;
        let config = VringConfigData {
            queue_max_size: ring.size,
            queue_size: ring.size,
            flags: 0,
            desc_table_addr: user(ring.table),
            used_ring_addr: user(ring.used),
            avail_ring_addr: user(ring.avail),
            log_addr: None,
        };
        self.link.set_vring_num(index, ring.size).unwrap();
        self.link.set_vring_base(index, base).unwrap();
        self.link.set_vring_addr(index, &config).unwrap();
        self.link.set_vring_kick(index, &self.kicks[index]).unwrap();
        self.link.set_vring_call(index, &self.calls[index]).unwrap();
    }

    /// Has ring `index` served.
    pub fn start(&mut self, index: usize, base: u16) {
        self.set_up(index, base);
        self.link.set_vring_enable(index, true).unwrap();
    }

    /// Offers what lies in `places` to queue `index`, and kicks it.
    pub fn offer(&mut self, index: usize, places: &[u16]) {
        self.drivers[index].offer(places);
        self.kicks[index].write(1).unwrap();
    }

    /// Reads a sector through queue `index`.
    pub fn assert_reads(&mut self, index: usize, sector: u8) {
        self.drivers[index].put(0, crate::driver::IN, sector.into(), 512);
        self.offer(index, &[0]);
        let driver = &mut self.drivers[index];
        assert_eq!(driver.wait_for_used(1), [(0, 513)]);
        assert_eq!(
            (driver.status(0), driver.data(0, 512)),
            (0, vec![sector; 512])
        );
    }

    /// All of the guest's memory.
    pub fn memory(&self) -> Vec<u8> {
        let mut bytes = vec![0; 2 * REGION as usize];
        vm_memory::Bytes::read_slice(&self.mem, &mut bytes, GuestAddress(0)).unwrap();
        bytes
    }
}

/// Waits for a signal, and takes it.
pub fn wait_for(event: &EventFd) -> u64 {
    let deadline = std::time::Instant::now() + PATIENCE;
    loop {
        match event.read() {
            Ok(count) => return count,
            Err(_) => assert!(std::time::Instant::now() < deadline, "no signal"),
        }
        thread::yield_now();
    }
}

/// Lets requests that wait go on while `action` waits for them.
pub fn open_during<T: Send>(service: &Service, action: impl FnOnce() -> T + Send) -> T {
    thread::scope(|scope| {
        let action = scope.spawn(action);
        // One that does not wait would be over by then.
        thread::sleep(Duration::from_millis(20));
        let is_early = action.is_finished();
        service.disk.open();
        let result = action.join().unwrap();
        assert!(!is_early, "it does not wait");
        result
    })
}
