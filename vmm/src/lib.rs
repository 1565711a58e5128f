//! A minimal KVM virtual machine monitor for x86-64 Linux guests.
//!
//! [`Config`] says what to run, [`Vmm::build`] makes it, [`Vmm::run`] runs it to its end and says why
//! it ended. The guest has RAM, CPUs, a serial console, virtio-mmio disks and ACPI tables to find
//! them by; nothing else.
//!
//! [`Server`] offers a disk to other virtual machine monitors instead (feature `vhost-user`).
//!
//! ```no_run
//! use tandem_vmm::{Config, DiskConfig, ExitReason, Vmm};
//!
//! let mut config = Config::new("/boot/vmlinuz");
//! config.initrd = Some("/boot/initrd.img".into());
//! config.disks.push(DiskConfig::new("root.qcow2"));
//! config.cmdline = "root=/dev/vda".to_owned();
//! let reason = Vmm::build(&config)?.run()?;
//! assert_eq!(reason, ExitReason::PowerOff);
//! # Ok::<(), tandem_vmm::Error>(())
//! ```
//!
//! [`Vmm::control`] gives the means to operate it meanwhile: [`Control`] pauses, flushes, resizes and
//! tells what the disks do. [`ControlSocket`] offers the same to other programs, and [`MetricsLog`]
//! writes metrics as the VM runs.
//!
//! [`sandbox`] confines all of that to what it needs, if it is told to.
//!
//! # Features
//! All are on unless you say otherwise: `program` (the program `tandem`), `sandbox`, `vhost-user`, and `zstd`
//! (images whose clusters are compressed by it).
//!
//! # Threads
//! The one that calls [`Vmm::run`] handles the console and signals; each CPU has one, and so
//! has each queue of a disk, besides those of the disk for requests that have to wait. A request goes
//! from the guest's doorbell to the queue's thread and back as an interrupt inside KVM.
#![deny(missing_docs)]

mod acpi;
mod boot;
pub mod config;
mod console;
pub mod control;
mod cpuid;
mod descriptor;
mod disk;
mod error;
mod exit;
mod gate;
mod interrupts;
mod kernel;
mod kvm_access;
mod layout;
mod memory;
pub mod metrics;
mod private_socket;
pub mod sandbox;
#[cfg(feature = "vhost-user")]
mod serve;
pub mod signals;
mod terminal;
mod vcpu;
mod vmm;

pub use config::{Config, DiskConfig, MetricsTarget, OutputConfig, SerialConfig};
pub use control::{Control, ControlError, ControlSocket};
pub use error::{Error, Result};
pub use exit::ExitReason;
pub use kernel::KernelError;
pub use metrics::{MetricsLog, MetricsOutput};
#[cfg(feature = "vhost-user")]
pub use serve::{Incident, Server};
pub use tandem_block::ImageFormat;
pub use tandem_devices::virtio::block::Stats as DiskStats;
pub use vmm::Vmm;
