//! The client library behind libblkio, the crate `virtio-driver`, connected to `tandem serve`.

use std::os::fd::AsRawFd;
use std::path::Path;

use virtio_driver::{
    VhostUser, VirtioBlkFeatureFlags, VirtioBlkQueue, VirtioBlkTransport, VirtioFeatureFlags,
};
use vm_memory::{FileOffset, MmapRegion};

/// A client: its queues, and memory for each of their requests.
pub struct Connection<R: Clone> {
    pub transport: Box<VirtioBlkTransport>,
    pub queues: Vec<VirtioBlkQueue<'static, R>>,
    pub memory: MmapRegion<()>,
    /// Places in memory, by number, that no request of a queue has.
    pub free: Vec<Vec<usize>>,
}

impl<R: Clone> Connection<R> {
    /// One of `queues` queues, with memory for `depth` requests of `place` bytes on each; `None` while
    /// nobody listens.
    pub fn open(
        socket: &Path,
        features: VirtioFeatureFlags,
        block: VirtioBlkFeatureFlags,
        queues: usize,
        depth: usize,
        place: usize,
    ) -> Option<Self> {
        let features =
            features | VirtioFeatureFlags::VERSION_1 | VirtioFeatureFlags::RING_EVENT_IDX;
        let features = features.bits() | (block | VirtioBlkFeatureFlags::MQ).bits();
        let link = VhostUser::new(socket.to_str().unwrap(), features).ok()?;
        let mut transport: Box<VirtioBlkTransport> = Box::new(link);
        let count = queues;
        let mut queues = VirtioBlkQueue::setup_queues(&mut *transport, count, 128).unwrap();
        let wants_interrupts = |queue: &mut VirtioBlkQueue<_>| queue.set_used_notif_enabled(true);
        queues.iter_mut().for_each(wants_interrupts);
        let file = tempfile::tempfile().unwrap();
        let len = count * depth * place;
        file.set_len(len as u64).unwrap();
        let fd = file.as_raw_fd();
        let memory = MmapRegion::from_file(FileOffset::new(file, 0), len).unwrap();
        let address = memory.as_ptr() as usize;
        transport.map_mem_region(address, len, fd, 0).unwrap();
        let places = |queue| (queue * depth..(queue + 1) * depth).collect();
        Some(Self {
            transport,
            queues,
            memory,
            free: (0..count).map(places).collect(),
        })
    }
}
