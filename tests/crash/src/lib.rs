//! The crash explorer: what a power failure can leave on disk, and whether it keeps the promises.
//!
//! A random workload runs on an image in recording storage, which logs every change and sync of
//! both files. Then for points in the log, states are built that the disks could be in if power
//! failed there: what was synced, and of the rest any subset, torn at sectors of 512 bytes, each
//! file on its own; all subsets where they are few. Each state is opened and judged:
//!
//! 1. what had been flushed is there; a sector written since is old or new; nothing else changed;
//! 2. `check` finds leaks at most;
//! 3. a raw data file whose mapping is complete has the same content as the disk;
//! 4. a bitmap has a bit for each change, or is marked as in use; each snapshot is what it was;
//! 5. the image can be written on, and all of this holds again;
//! 6. a sample: `qemu-img check` finds leaks at most, and `qemu-img` and `qemu-io` read the same.
//!
//! The same is done with operations on images that no guest uses: `operations`, `rewrites`, `commits`.
//! Disks in use that are forked, committed or put on other images are explored as files in a directory
//! ([`chains`]), where names and times are durable or not, too.
//!
//! Beside that there are files that fail ([`faults`], [`live_faults`]) and threads that meet on one disk
//! ([`stress`]).

pub mod bitmap;
pub mod chain_model;
pub mod chains;
pub mod commits;
pub mod directory;
pub mod explore;
pub mod faults;
pub mod judge;
pub mod linear;
pub mod live_faults;
pub mod model;
#[cfg(mutate)]
pub mod mutants;
pub mod operations;
pub mod power;
pub mod qemu;
pub mod queues;
pub mod random;
pub mod report;
pub mod rewrites;
pub mod scenarios;
pub mod setup;
pub mod shrink;
pub mod storage;
pub mod stress;
pub mod syscalls;
pub mod trace;
pub mod workload;
