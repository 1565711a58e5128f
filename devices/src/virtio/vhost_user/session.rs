//! What one front end has told: its features, memory and rings.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, IntoRawFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{
    Error, GpuBackend, Result, VhostUserBackendReqHandlerMut, VhostUserProtocolFeatures,
    VhostUserVirtioFeatures,
};
use virtio_queue::{Queue, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};
use vmm_sys_util::eventfd::EventFd;

use super::calls::Calls;
use super::memory::{MAX_REGIONS, MemoryTable};
use crate::GuestMemory;
use crate::virtio::queue_setup::QueueSetup;
use crate::virtio::{
    Activation, FEATURE_EVENT_IDX, FEATURE_RING_RESET, FEATURE_VERSION_1, Interrupt, VirtioDevice,
};

/// Descriptors that a ring may have.
const MAX_RING_SIZE: u16 = 1024;

/// Bytes of configuration space that a front end may ask for.
const MAX_CONFIG_SIZE: u32 = 256;

const PROTOCOL_FEATURES: u64 = VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();

/// The state of a connection, or of none.
pub(super) struct Session {
    device: Box<dyn VirtioDevice>,
    calls: Arc<Calls>,
    /// What the front end has accepted.
    features: u64,
    table: MemoryTable,
    mem: Option<GuestMemory>,
    rings: Vec<Ring>,
}

/// A ring as the front end has set it up.
struct Ring {
    size: u32,
    /// Addresses in the front end's process, of descriptor table, available ring and used ring.
    addresses: Option<[u64; 3]>,
    /// Index in the available ring that comes next, while the ring is not served.
    base: u16,
    kick: Option<EventFd>,
    is_enabled: bool,
    is_served: bool,
}

impl Ring {
    fn new() -> Self {
        Self {
            size: 0,
            addresses: None,
            base: 0,
            kick: None,
            is_enabled: false,
            is_served: false,
        }
    }
}

impl Session {
    pub(super) fn new(device: Box<dyn VirtioDevice>) -> Self {
        let queues = device.queue_max_sizes().len();
        Self {
            device,
            calls: Arc::new(Calls::new(queues)),
            features: 0,
            table: MemoryTable::default(),
            mem: None,
            rings: (0..queues).map(|_| Ring::new()).collect(),
        }
    }

    /// Forgets the front end. On return no thread accesses its memory.
    pub(super) fn end(&mut self) {
        self.calls.keep_going(|| self.device.reset());
        self.calls.clear();
        self.features = 0;
        self.table = MemoryTable::default();
        self.mem = None;
        self.rings.fill_with(Ring::new);
    }

    /// What the front end may accept. There is no message by which it could reset a single ring.
    fn offered(&self) -> u64 {
        self.device.features() & !FEATURE_RING_RESET | PROTOCOL_FEATURES
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let index = usize::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.rings.get_mut(index).ok_or(Error::InvalidParam)
    }

    /// A ring that may be set up: it is not being served.
    fn stopped_ring(&mut self, index: u32) -> Result<&mut Ring> {
        let ring = self.ring(index)?;
        if ring.is_served {
            return Err(Error::InvalidOperation("the ring has been started"));
        }
        Ok(ring)
    }

    /// Serves the ring if all has been told that is needed.
    fn start(&mut self, index: u16) -> Result<()> {
        let has_features = self.features & FEATURE_VERSION_1 != 0;
        let ring = self.ring(index.into())?;
        let is_ready = has_features && ring.is_enabled && !ring.is_served;
        let (Some(addresses), Some(kick), true) = (ring.addresses, &ring.kick, is_ready) else {
            return Ok(());
        };
        let doorbell = kick.try_clone().map_err(Error::ReqHandlerError)?;
        let (size, base) = (ring.size, ring.base);
        let Some(mem) = self.mem.clone() else {
            return Ok(());
        };
        let queue = self.build_queue(&mem, size, addresses, base)?;
        if !self.rings.iter().any(|ring| ring.is_served) {
            self.activate(mem)?;
        }
        self.device
            .start_queue(index, queue, doorbell)
            .map_err(Error::ReqHandlerError)?;
        self.ring(index.into())?.is_served = true;
        Ok(())
    }

    fn build_queue(
        &self,
        mem: &GuestMemory,
        size: u32,
        addresses: [u64; 3],
        base: u16,
    ) -> Result<Queue> {
        let guest = addresses.map(|address| self.table.guest_address(address));
        let [Some(desc_table), Some(avail_ring), Some(used_ring)] = guest else {
            return Err(Error::InvalidParam);
        };
        let setup = QueueSetup {
            max_size: MAX_RING_SIZE,
            size,
            desc_table,
            avail_ring,
            used_ring,
            ready: true,
            is_reset: false,
        };
        let event_idx = self.features & FEATURE_EVENT_IDX != 0;
        let queue = setup.build(mem, event_idx);
        let mut queue = queue.map_err(|e| Error::ReqHandlerError(std::io::Error::other(e)))?;
        queue.set_next_used(used_index(mem, used_ring).ok_or(Error::InvalidParam)?);
        queue.set_next_avail(base);
        Ok(queue)
    }

    fn activate(&mut self, mem: GuestMemory) -> Result<()> {
        let activation = Activation {
            mem,
            features: self.features & !PROTOCOL_FEATURES,
            interrupt: Arc::clone(&self.calls) as Arc<dyn Interrupt>,
        };
        self.device
            .activate(activation)
            .map_err(Error::ReqHandlerError)
    }

    /// Stops serving a ring: on return its requests have been completed.
    fn stop(&mut self, index: u16) -> Result<()> {
        if self.ring(index.into())?.is_served {
            let base = self.calls.keep_going(|| self.device.stop_queue(index));
            // One that has failed goes on behind what has been answered.
            let base = base.or_else(|| self.answered(index));
            let ring = self.ring(index.into())?;
            ring.is_served = false;
            ring.base = base.unwrap_or(ring.base);
        }
        Ok(())
    }

    /// How many requests of a ring have been answered, as its used ring tells.
    fn answered(&self, index: u16) -> Option<u16> {
        let [_, _, used_ring] = self.rings.get(usize::from(index))?.addresses?;
        used_index(self.mem.as_ref()?, self.table.guest_address(used_ring)?)
    }

    /// Lets `change` alter what all rings depend on, with none of them served meanwhile.
    fn with_rings_stopped(&mut self, change: impl FnOnce(&mut Self) -> Result<()>) -> Result<()> {
        let indices = 0..self.rings.len() as u16;
        for index in indices.clone() {
            self.stop(index)?;
        }
        change(self)?;
        indices.into_iter().try_for_each(|index| self.start(index))
    }

    /// Changes a ring, which is not served meanwhile.
    fn change_ring(&mut self, index: u32, change: impl FnOnce(&mut Ring)) -> Result<()> {
        let place = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.stop(place)?;
        change(self.ring(index)?);
        self.start(place)
    }

    fn set_table(&mut self, table: MemoryTable) -> Result<()> {
        self.with_rings_stopped(|session| {
            session.mem = table.guest_memory()?;
            session.table = table;
            Ok(())
        })
    }
}

/// The index in a used ring, which the device goes on from.
fn used_index(mem: &GuestMemory, used_ring: u64) -> Option<u16> {
    let place = GuestAddress(used_ring).checked_add(2)?;
    mem.load(place, Ordering::Acquire).ok().map(u16::from_le)
}

/// What no front end needs that has accepted the features offered.
fn unsupported<T>() -> Result<T> {
    Err(Error::InvalidOperation("not supported"))
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.end();
        Ok(())
    }

    fn reset_device(&mut self) -> Result<()> {
        for index in 0..self.rings.len() as u16 {
            self.stop(index)?;
        }
        self.device.reset();
        for ring in &mut self.rings {
            ring.kick = None;
            ring.is_enabled = false;
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered() != 0 || features & FEATURE_VERSION_1 == 0 {
            return Err(Error::FeatureMismatch);
        }
        self.with_rings_stopped(|session| {
            session.features = features;
            session.device.set_features(features & !PROTOCOL_FEATURES);
            // Without the feature nobody can enable a ring, so all are.
            if features & PROTOCOL_FEATURES == 0 {
                session
                    .rings
                    .iter_mut()
                    .for_each(|ring| ring.is_enabled = true);
            }
            Ok(())
        })
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        self.set_table(MemoryTable::new(regions, files)?)?;
        Ok(None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy_listening: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let mut table = self.table.clone();
        table.add(region, file)?;
        self.set_table(table)?;
        Ok(None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let mut table = self.table.clone();
        table.remove(region)?;
        self.set_table(table)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        if !num.is_power_of_two() || num > MAX_RING_SIZE.into() {
            return Err(Error::InvalidParam);
        }
        self.stopped_ring(index)?.size = num;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        if flags.contains(VhostUserVringAddrFlags::VHOST_VRING_F_LOG) {
            return unsupported();
        }
        self.change_ring(index, |ring| {
            ring.addresses = Some([descriptor, available, used]);
        })
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| Error::InvalidParam)?;
        self.stopped_ring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        let place = u16::try_from(index).map_err(|_| Error::InvalidParam)?;
        self.stop(place)?;
        let ring = self.ring(index)?;
        // It starts again with the next one.
        ring.kick = None;
        Ok(VhostUserVringState::new(index, ring.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, file: Option<File>) -> Result<()> {
        // Without one, the ring would have to be looked at all the time.
        let kick = event(file.ok_or(Error::IncorrectFds)?)?;
        self.change_ring(index.into(), |ring| ring.kick = Some(kick))
    }

    fn set_vring_call(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let call = file.map(event).transpose()?;
        if !self.calls.set_used(index.into(), call) {
            return Err(Error::InvalidParam);
        }
        if self.ring(index.into())?.is_served {
            // What has been signalled since the message was sent went to where nobody may look any
            // more. One interrupt too many does no harm.
            let calls = &self.calls;
            calls.keep_going(|| calls.signal_queue(index.into()));
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, file: Option<File>) -> Result<()> {
        let broken = file.map(event).transpose()?;
        if !self.calls.set_broken(index.into(), broken) {
            return Err(Error::InvalidParam);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        if features & !self.get_protocol_features()?.bits() != 0 {
            return Err(Error::FeatureMismatch);
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change_ring(index, |ring| ring.is_enabled = enable)
    }

    fn get_config(
        &mut self,
        offset: u32,
        size: u32,
        _flags: VhostUserConfigFlags,
    ) -> Result<Vec<u8>> {
        if size > MAX_CONFIG_SIZE {
            return Err(Error::InvalidParam);
        }
        let mut data = vec![0; size as usize];
        self.device.read_config(offset.into(), &mut data);
        Ok(data)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(offset.into(), data);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu_backend: GpuBackend) -> Result<()> {
        unsupported()
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        unsupported()
    }

    fn get_inflight_fd(&mut self, _: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        unsupported()
    }

    fn set_inflight_fd(&mut self, _: &VhostUserInflight, _file: File) -> Result<()> {
        unsupported()
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        unsupported()
    }

    fn check_device_state(&mut self) -> Result<()> {
        unsupported()
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        unsupported()
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        unsupported()
    }
}

/// The eventfd that a front end has sent. Of no other kind of file is it known that what is done with
/// it here does not block.
pub(super) fn event(file: File) -> Result<EventFd> {
    let link = format!("/proc/self/fd/{}", file.as_raw_fd());
    let kind = std::fs::read_link(link).map_err(Error::ReqHandlerError)?;
    if kind.as_os_str() != "anon_inode:[eventfd]" {
        return Err(Error::IncorrectFds);
    }
    // SAFETY: the descriptor is open, an eventfd, and owned by nobody else.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}
