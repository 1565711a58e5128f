//! qcow2 disk images with external data files: a synchronous image engine.
//!
//! [`Disk`] is what a device model or a tool sees: a flat array of bytes with positioned reads and
//! writes. [`Raw`] and [`qcow2::Qcow2`] implement it. Below them stands [`Storage`]: a file (or
//! block device) with positioned, vectored, synchronous I/O. Errors are [`Error`].
//!
//! ```text
//!   device, tool            read_at(buffers, guest offset)
//!   ───────────── Disk ──────────────────────────────────────
//!   Raw │ Qcow2             guest offset → extents of a file
//!   ───────────── Storage ───────────────────────────────────
//!   FileStorage             preadv, pwritev, fallocate, fdatasync
//! ```
//!
//! Buffers are lists of [`vm_memory::VolatileSlice`], so that guest memory goes to the system call
//! as it is, without a copy.
#![deny(missing_docs)]

mod buffers;
mod disk;
mod error;
mod file;
mod new_file;
pub mod qcow2;
mod raw;
mod storage;
mod sync;

pub use disk::{Disk, Extent, ExtentKind, Limits, extent_in_chain};
pub use error::{Error, Result};
pub use new_file::Preallocation;
pub use raw::Raw;
pub use storage::{FileStorage, Storage};
