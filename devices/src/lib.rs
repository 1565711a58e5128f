//! Device models for a small virtual machine: a virtio block device, a serial port, and power
//! control.
//!
//! The crate knows no hypervisor. What a virtual machine monitor connects to a device is guest
//! memory ([`GuestMemory`]), accesses of vCPUs to its registers ([`bus::BusDevice`]), and two kinds
//! of event file descriptors: an interrupt that the device signals, and doorbells that the guest
//! rings. With KVM these become an `irqfd` and `ioeventfd`s, and in steady state a request makes no
//! exit to user space.
//!
//! # How a request travels
//! ```text
//!   guest driver        fills buffers, puts a descriptor chain into the ring
//!        │                                                    ▲
//!        │ writes QueueNotify                                 │ interrupt
//!   ─────┼──────────────── guest / host ──────────────────────┼────────────
//!        ▼                                                    │
//!   doorbell (eventfd)                                   irq (eventfd)
//!        │ wakes                                              │ one decision for each batch
//!        ▼                                                    │
//!   ┌─ worker thread of the queue ────────────────────────────┴──────────┐
//!   │  ring      takes the chain, checks it                              │
//!   │  buffers   two streams of bytes: readable, writable; no copy       │
//!   │  request   header → type → access → direction → length; joins the  │
//!   │            one before if it continues it on the disk               │
//!   │  disk      Disk::try_read_at / try_write_at on the guest's memory  │
//!   │  status    into the last writable byte, then the used ring         │
//!   └────────┬────────────────────────────────────────────────▲──────────┘
//!            │ what would have to wait                        │ eventfd
//!   ┌────────▼─ threads of the disk ──────────────────────────┴──────────┐
//!   │  disk      Disk::read_at / write_at / flush / discard / ...        │
//!   └────────────────────────────────────────────────────────────────────┘
//! ```
//! [`virtio::mmio`] is the transport: registers, negotiation, reset; the cargo feature `vhost-user` adds
//! another one, to virtual machine monitors in other processes. [`virtio::block`] is the
//! device; it says what the guest gets for which malformed request.
//!
//! # What holds whatever a guest does
//! * Nothing it writes to registers, rings or buffers ends the process, hangs a thread, or makes
//!   memory grow without bound. What it writes is read once and checked before use.
//! * The device writes to the used ring and to writable buffers, and to no other guest memory.
//! * When a reset has been acknowledged, or [`VirtioMmio::shutdown`] has returned, no thread touches
//!   guest memory or the disk on behalf of the device.
//! * Nothing is logged. What went wrong is counted in [`virtio::block::Stats`].
//!
//! [`VirtioMmio::shutdown`]: virtio::mmio::VirtioMmio::shutdown
//!
//! # Features
//! `vhost-user`: the module `virtio::vhost_user`, and with it the crate `vhost`. It is off unless you turn it
//! on.
//!
//! # Example: a disk of your own
//! The folder `examples` of this crate has whole programs, with the driver's side: `own_vmm` gives an image
//! to a monitor, and `own_disk` a disk that is made up.
//!
//! Whatever implements [`Disk`](tandem_block::Disk) can be served. This one passes on to another
//! disk, and counts.
//!
//! ```
//! use std::sync::Arc;
//! use std::sync::atomic::{AtomicU64, Ordering};
//!
//! use tandem_block::{Disk, FileStorage, Limits, Raw, Result};
//! use tandem_devices::GuestMemory;
//! use tandem_devices::bus::BusDevice;
//! use tandem_devices::virtio::block::{Block, Options};
//! use tandem_devices::virtio::mmio::VirtioMmio;
//! use vm_memory::{GuestAddress, VolatileSlice};
//! use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};
//!
//! struct Metered<D> {
//!     inner: D,
//!     flushes: AtomicU64,
//! }
//!
//! impl<D: Disk> Disk for Metered<D> {
//!     fn size(&self) -> u64 {
//!         self.inner.size()
//!     }
//!     fn limits(&self) -> Limits {
//!         self.inner.limits()
//!     }
//!     fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
//!         self.inner.read_at(bufs, offset)
//!     }
//!     fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> Result<()> {
//!         self.inner.write_at(bufs, offset)
//!     }
//!     fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> Result<()> {
//!         self.inner.write_zeroes(offset, len, unmap)
//!     }
//!     fn discard(&self, offset: u64, len: u64) -> Result<()> {
//!         self.inner.discard(offset, len)
//!     }
//!     fn flush(&self) -> Result<()> {
//!         self.flushes.fetch_add(1, Ordering::Relaxed);
//!         self.inner.flush()
//!     }
//! }
//!
//! # fn main() -> std::result::Result<(), Box<dyn std::error::Error>> {
//! let file = tempfile::tempfile()?;
//! file.set_len(1 << 20)?;
//! let storage = Box::new(FileStorage::new(file)?);
//! let disk = Arc::new(Metered {
//!     inner: Raw::with_storage("scratch".as_ref(), storage, false)?,
//!     flushes: AtomicU64::new(0),
//! });
//!
//! let mut options = Options::default();
//! options.serial = Some("scratch".parse()?);
//! let block = Block::new(disk.clone(), options);
//! let handle = block.handle();
//! let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 64 << 20)])?;
//! let irq = EventFd::new(EFD_NONBLOCK)?;
//! let transport = VirtioMmio::new(Box::new(block), memory, irq.try_clone()?)?;
//! // With KVM: vm.register_irqfd(&irq, gsi), and for each of transport.doorbells():
//! // vm.register_ioevent(doorbell, &IoEventAddress::Mmio(base + QUEUE_NOTIFY), queue_index).
//!
//! // When a vCPU reads at offset 8 of the region:
//! let mut data = [0; 4];
//! transport.read(8, &mut data);
//! assert_eq!(u32::from_le_bytes(data), 2, "a block device");
//!
//! // At the end, when the vCPUs have stopped:
//! transport.shutdown();
//! assert_eq!(handle.stats().last_error(), None);
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]

pub mod bus;
pub mod pci;
pub mod power;
pub mod serial;
pub mod virtio;

/// Guest memory as all devices here see it. Cloning is cheap: clones share the memory.
pub type GuestMemory = vm_memory::GuestMemoryMmap<()>;

#[cfg(test)]
#[path = "../tests/common/mod.rs"]
mod test_common;
