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
//!   FileStorage             preadv, pwritev, fallocate, fdatasync; past the page cache, if asked
//! ```
//!
//! Files that are opened by name are locked against other programs, QEMU's among them ([`Locking`]),
//! and used by way of the caches that [`CacheMode`] tells.
//!
//! Buffers are lists of [`VolatileSlice`], so that guest memory goes to the system call as it is,
//! without a copy.
//!
//! ```
//! use tandem_block::qcow2::{CreateOptions, OpenOptions, Qcow2, create};
//! use tandem_block::{Disk, VolatileSlice};
//!
//! # let dir = tempfile::tempdir().unwrap();
//! # let path = dir.path().join("disk.qcow2");
//! let options = CreateOptions {
//!     size: 1 << 30,
//!     data_file: Some(path.with_extension("raw")),
//!     ..CreateOptions::default()
//! };
//! create(&path, &options)?;
//! let disk = Qcow2::open(&path, &OpenOptions::default())?;
//! let mut sector = [7; 512];
//! disk.write_at(&[VolatileSlice::from(&mut sector[..])], 4096)?;
//! disk.flush()?;
//! let mut back = [0; 512];
//! disk.read_at(&[VolatileSlice::from(&mut back[..])], 4096)?;
//! assert_eq!(back, sector);
//! # Ok::<(), tandem_block::Error>(())
//! ```
//!
//! # What to begin with
//! | to | there is |
//! | --- | --- |
//! | open a disk | [`Qcow2::open`](qcow2::Qcow2::open), [`Raw::open`]; [`Qcow2::with_storage`](qcow2::Qcow2::with_storage) for storage of your own |
//! | make one | [`qcow2::create`], [`Raw::create`]; [`NewImage`] for one that takes its name when it has its content |
//! | have many guests share one image | [`qcow2::Base`] and its overlays |
//! | change what a disk in use consists of | [`LiveDisk`]: forks, commits, rebases |
//! | copy a disk in use | [`Backup`], and [`backup_stream`] to keep it |
//! | check, repair, amend | [`qcow2::check`], [`qcow2::amend`] |
//!
//! The folder `examples` of this crate has a program for each of the first ones.
//!
//! # Threads
//! Every method of [`Disk`] and [`Storage`] takes `&self` and may be called by many threads at once. There
//! is no runtime: a call does its work on the thread that makes it, and returns when it is done.
//!
//! # Errors
//! [`Error`] can be matched, names what is wrong in words, and becomes a [`std::io::Error`] of a fitting kind.
//! Nothing is logged. No image, option or request leads to a panic.
//!
//! # Features
//! `zstd`: images whose clusters are compressed by Zstandard, for which a library in C is built. Without it
//! they are refused ([`Error::Unsupported`]). It is off unless you turn it on.
#![deny(missing_docs, clippy::missing_errors_doc)]

mod backup;
mod buffers;
mod cache_mode;
mod disk;
mod error;
mod file;
mod format;
mod granules;
mod hints;
mod hole;
mod live;
mod lock;
#[cfg(mutate)]
pub mod mutate;
mod names;
mod new_file;
mod new_image;
mod preallocation;
pub mod qcow2;
mod ranges;
mod raw;
mod stamp;
mod storage;
mod sync;
mod users;
mod writers;

pub use backup::stream as backup_stream;
pub use backup::{
    Backup, BackupId, BackupKind, BackupOptions, BackupState, BackupStatus, Chunk, ChunkExtent,
};
pub use cache_mode::CacheMode;
pub use disk::{Disk, Extent, ExtentKind, Limits, extent_in_chain, sparse_extent_in_chain};
pub use error::{Error, Result};
pub use file::FileOptions;
pub use format::ImageFormat;
pub use hints::FileHints;
pub use live::{
    CommitOptions, ForkOptions, ImageView, LiveBitmap, LiveDisk, LiveImage, LiveReport, Progress,
    RebaseOptions,
};
pub use lock::Locking;
pub use new_image::NewImage;
pub use preallocation::Preallocation;
pub use raw::Raw;
pub use stamp::{FileStamp, Modified, Stamp};
pub use storage::{FileStorage, Storage, Units};
pub use users::{FileUser, FileUsers};
pub use vm_memory::VolatileSlice;
