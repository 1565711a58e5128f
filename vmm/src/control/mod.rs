//! Operating a VM while it runs: what its owner can ask for, by [`Control`] or over a
//! [socket](ControlSocket).

mod backup;
mod bitmaps;
mod client;
mod error;
#[cfg(fuzzing)]
pub mod fuzzing;
mod growth;
mod images;
mod jobs;
mod protocol;
mod socket;
#[cfg(any(test, fuzzing))]
mod without_vm;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock, RwLockReadGuard};
use std::time::{Duration, Instant};

use rustix::fs::{FileType, SeekFrom, fstat, seek};
use rustix::io::Errno;
use serde::{Serialize, Serializer};
use tandem_devices::virtio::block::{Handle, Stats};

use crate::disk::{self, Image};
use crate::exit::{Exit, ExitReason};
use crate::gate::Gate;
use crate::sandbox::Role;

pub use backup::BackupInfo;
pub use error::ControlError;
pub(crate) use growth::GrowthWatch;
pub use images::CommitBase;
pub use jobs::JobInfo;
pub use protocol::COMMANDS;
pub use socket::ControlSocket;

/// The means to operate a VM, from any thread, before it runs, while it runs and when it has ended.
/// Cloning is cheap: clones operate the same VM. As long as there is one, the files of the disks stay
/// open, and locked.
///
/// ```no_run
/// # let vmm = tandem_vmm::Vmm::build(&tandem_vmm::Config::new("/boot/vmlinuz"))?;
/// let control = vmm.control();
/// let vm = std::thread::spawn(move || vmm.run());
/// control.pause()?;
/// control.flush_all()?;
/// // The files of all disks can be copied now.
/// control.resume()?;
/// control.shut_down();
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone)]
pub struct Control(Arc<Shared>);

struct Shared {
    machine: MachineInfo,
    disks: Vec<Operated>,
    exit: Arc<Exit>,
    gate: Arc<Gate>,
    /// Read by operations under way; the end of the VM waits for them.
    under_way: RwLock<()>,
    /// Held by whoever pauses or resumes.
    pausing: Mutex<()>,
    is_paused: AtomicBool,
    jobs: jobs::Jobs,
    backups: Mutex<Vec<backup::Running>>,
    /// Room for what follows answers, that no client needs now.
    payloads: Mutex<Vec<Vec<u8>>>,
}

/// A disk to operate.
pub(crate) struct Operated {
    pub image: Image,
    pub handle: Handle,
    /// Held by whoever changes its size.
    resizing: Mutex<()>,
}

/// What a VM consists of.
#[derive(Clone, Debug)]
pub(crate) struct MachineInfo {
    pub cpus: u8,
    pub memory: u64,
    pub started: Instant,
    /// Whether its threads are confined.
    pub seccomp: bool,
}

/// What a VM is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum VmState {
    /// It runs, or is about to.
    Running,
    /// It has been paused.
    Paused,
    /// It has ended, or is about to.
    Ended,
}

/// A VM as a whole.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct Status {
    /// What it is doing.
    pub state: VmState,
    /// Number of CPUs.
    pub cpus: u8,
    /// RAM in bytes.
    pub memory: u64,
    /// Number of disks.
    pub disks: usize,
    /// Milliseconds since the VM was built.
    pub uptime_ms: u64,
}

/// A disk.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct DiskInfo {
    /// Its place in [`Config::disks`](crate::Config::disks).
    pub index: usize,
    /// What Linux guests call it: `vda`, `vdb`…
    pub name: String,
    /// The image.
    #[serde(serialize_with = "lossy")]
    pub path: PathBuf,
    /// Format of the image: `qcow2` or `raw`.
    pub format: &'static str,
    /// Where the guest's data is: `raw` (the image is the data), `internal` (in the qcow2 image),
    /// `external`, `external-raw` or `packed` (in its data file).
    pub kind: &'static str,
    /// The external data file.
    #[serde(serialize_with = "lossy_option")]
    pub data_file: Option<PathBuf>,
    /// Size of the guest's disk in bytes.
    pub size: u64,
    /// Whether the guest cannot write.
    pub read_only: bool,
    /// Whether completed writes may need a flush to be durable.
    pub write_cache: bool,
    /// Number of queues.
    pub queues: u16,
}

impl Control {
    pub(crate) fn new(
        machine: MachineInfo,
        disks: Vec<Operated>,
        exit: Arc<Exit>,
        gate: Arc<Gate>,
    ) -> Self {
        Self(Arc::new(Shared {
            machine,
            disks,
            exit,
            gate,
            under_way: RwLock::default(),
            pausing: Mutex::default(),
            is_paused: AtomicBool::new(false),
            jobs: jobs::Jobs::default(),
            backups: Mutex::default(),
            payloads: Mutex::default(),
        }))
    }

    /// What the VM is doing. This and the other questions never wait.
    pub fn state(&self) -> VmState {
        if self.0.exit.has_ended() {
            VmState::Ended
        } else if self.0.is_paused.load(Ordering::Acquire) {
            VmState::Paused
        } else {
            VmState::Running
        }
    }

    /// The VM as a whole.
    pub fn status(&self) -> Status {
        let machine = &self.0.machine;
        Status {
            state: self.state(),
            cpus: machine.cpus,
            memory: machine.memory,
            disks: self.0.disks.len(),
            uptime_ms: millis(machine.started.elapsed()),
        }
    }

    /// The disks, in the order of [`Config::disks`](crate::Config::disks).
    pub fn disks(&self) -> Vec<DiskInfo> {
        let disks = self.0.disks.iter().enumerate();
        disks.map(|(index, disk)| disk.info(index)).collect()
    }

    /// What the disk number `index` has done, and what has gone wrong on it: otherwise only the
    /// guest is told.
    ///
    /// # Errors
    /// [`ControlError::NoSuchDisk`].
    pub fn stats(&self, index: usize) -> Result<Arc<Stats>, ControlError> {
        self.disk(index).map(|disk| disk.handle.stats())
    }

    /// Makes durable what the guest has written to disk number `index`.
    ///
    /// # Errors
    /// [`ControlError::NoSuchDisk`], [`ControlError::Ended`], or [`ControlError::Disk`]: from then on
    /// it is not known what is durable.
    pub fn flush(&self, index: usize) -> Result<(), ControlError> {
        let _operation = self.begin()?;
        let disk = self.disk(index)?;
        disk.handle.flush().map_err(|error| disk.error(error))
    }

    /// Makes durable what the guest has written to any disk.
    ///
    /// # Errors
    /// As [`flush`](Self::flush), of the first disk that fails; the others are flushed as well.
    pub fn flush_all(&self) -> Result<(), ControlError> {
        let _operation = self.begin()?;
        let flush = |disk: &Operated| disk.handle.flush().map_err(|error| disk.error(error));
        // All of them, before the first error is looked for.
        let outcomes: Vec<_> = self.0.disks.iter().map(flush).collect();
        outcomes.into_iter().collect()
    }

    /// Changes the size of disk number `index` to `size` bytes, and tells the guest. Without a size,
    /// the disk takes over the one that its block device has now, or the file of a raw disk. Returns
    /// the new size.
    ///
    /// A disk becomes smaller only if `shrink` says so: what lies behind the new end is lost.
    ///
    /// # Errors
    /// [`ControlError::NoSuchDisk`], [`ControlError::Ended`], [`ControlError::WouldShrink`];
    /// [`ControlError::NeedsSize`] for a disk without a size that it could take over;
    /// [`ControlError::Disk`]: what a disk cannot have leaves it as it is.
    pub fn resize(
        &self,
        index: usize,
        size: Option<u64>,
        shrink: bool,
    ) -> Result<u64, ControlError> {
        let _operation = self.begin()?;
        let operated = self.disk(index)?;
        // Nobody else is to make it larger between the look at its size and the change.
        let _resizing = lock(&operated.resizing);
        let disk = operated.handle.disk();
        let present = disk.size();
        let (size, is_less) = match size {
            Some(size) => (size, size < present),
            None => {
                let size = operated.size_below()?;
                // The last sector of a disk may lie in its file in part.
                (size, size.next_multiple_of(512) < present)
            }
        };
        if is_less && !shrink {
            return Err(ControlError::WouldShrink { size, present });
        }
        let resized = operated.handle.resize(size);
        resized.map_err(|error| operated.error(error))?;
        Ok(disk.size())
    }

    /// Stops the guest. On return no CPU is in it, all requests that its disks had taken are
    /// completed, and no disk changes unless it is asked to by [`flush`](Self::flush) or
    /// [`resize`](Self::resize). What the guest has asked for and was not taken waits. A VM that is
    /// paused stays so.
    ///
    /// The guest's clocks go on: time jumps for it when it is resumed. Where KVM can, it tells the
    /// guest, which then does not take that for a CPU that hung.
    ///
    /// # Errors
    /// [`ControlError::Ended`].
    pub fn pause(&self) -> Result<(), ControlError> {
        let _operation = self.begin()?;
        let _pausing = lock(&self.0.pausing);
        self.0.gate.close();
        for disk in &self.0.disks {
            disk.handle.pause();
        }
        self.0.is_paused.store(true, Ordering::Release);
        self.check_end()
    }

    /// Lets the guest go on. A VM that is not paused goes on anyway.
    ///
    /// # Errors
    /// [`ControlError::Ended`]; [`ControlError::Host`] if a disk is not served any more until the
    /// guest resets it, since a thread could not be started: the guest goes on.
    pub fn resume(&self) -> Result<(), ControlError> {
        let _operation = self.begin()?;
        let _pausing = lock(&self.0.pausing);
        let outcomes = self.0.disks.iter().map(|disk| disk.handle.resume());
        // All of them, before the first error is looked for.
        let outcomes: Vec<_> = outcomes.collect();
        self.0.is_paused.store(false, Ordering::Release);
        self.0.gate.open();
        let outcome: std::io::Result<()> = outcomes.into_iter().collect();
        outcome.map_err(|source| ControlError::Host {
            action: "serve a disk again",
            source,
        })
    }

    /// Ends the VM, paused or not: has [`Vmm::run`](crate::Vmm::run) close the disks and return
    /// [`ExitReason::Stopped`].
    pub fn shut_down(&self) {
        self.0.exit.end(Ok(ExitReason::Stopped));
    }

    /// Waits for the operations that are under way, and ends those that take time. The VM has ended, so
    /// no others begin.
    pub(crate) fn finish(&self) {
        self.0.jobs.cancel_all();
        drop(
            self.0
                .under_way
                .write()
                .unwrap_or_else(PoisonError::into_inner),
        );
    }

    /// `role`, if the threads of the VM are to be confined.
    pub(crate) fn confined(&self, role: Role) -> Option<Role> {
        self.0.machine.seccomp.then_some(role)
    }

    pub(crate) fn operated(&self) -> &[Operated] {
        &self.0.disks
    }

    /// Begins an operation; what is returned is to be held until its end.
    fn begin(&self) -> Result<RwLockReadGuard<'_, ()>, ControlError> {
        let shared = &self.0;
        let operation = shared.under_way.read();
        let operation = operation.unwrap_or_else(PoisonError::into_inner);
        self.check_end()?;
        Ok(operation)
    }

    fn check_end(&self) -> Result<(), ControlError> {
        if self.0.exit.has_ended() {
            return Err(ControlError::Ended);
        }
        Ok(())
    }

    fn disk(&self, index: usize) -> Result<&Operated, ControlError> {
        let disk = self.0.disks.get(index);
        disk.ok_or_else(|| ControlError::NoSuchDisk(index.to_string()))
    }
}

impl Operated {
    pub(crate) fn new(image: Image, handle: Handle) -> Self {
        Self {
            image,
            handle,
            resizing: Mutex::default(),
        }
    }

    /// The size of the file or device that the disk has its own from.
    fn size_below(&self) -> Result<u64, ControlError> {
        match self.host_size()? {
            Some((size, kind)) if kind == FileType::BlockDevice || self.is_raw() => Ok(size),
            _ => Err(ControlError::NeedsSize),
        }
    }

    fn is_raw(&self) -> bool {
        !self.image.disk.with_image(|image| image.is_qcow2())
    }

    /// The size of the block device that the disk has its own from.
    fn device_size(&self) -> Option<u64> {
        let (size, kind) = self.host_size().ok().flatten()?;
        (kind == FileType::BlockDevice).then_some(size)
    }

    /// Size and type of the file in which the disk's bytes have the offsets that they have on the
    /// disk, if there is one.
    fn host_size(&self) -> Result<Option<(u64, FileType)>, ControlError> {
        let host = |source: Errno| ControlError::Host {
            action: "get the size of a disk's file",
            source: source.into(),
        };
        self.image.disk.with_image(|image| {
            let file = match disk::describe(image).kind {
                "raw" | "external" | "external-raw" => image.host_file(),
                _ => None,
            };
            let Some(file) = file else { return Ok(None) };
            let kind = FileType::from_raw_mode(fstat(file).map_err(host)?.st_mode);
            // Nobody reads or writes where the file stands.
            let size = seek(file, SeekFrom::End(0)).map_err(host)?;
            Ok(Some((size, kind)))
        })
    }

    fn info(&self, index: usize) -> DiskInfo {
        let disk = self.handle.disk();
        let limits = disk.limits();
        let image = self.image.describe();
        DiskInfo {
            index,
            name: device_name(index),
            path: image.path,
            format: image.format.name(),
            kind: image.kind,
            data_file: image.data_file,
            size: disk.size(),
            read_only: limits.read_only,
            write_cache: limits.write_cache,
            queues: self.handle.queues(),
        }
    }

    fn error(&self, source: tandem_block::Error) -> ControlError {
        ControlError::Disk {
            path: self.image.path(),
            source,
        }
    }
}

/// What Linux calls the disk number `index`, of which there are fewer than letters.
pub(crate) fn device_name(index: usize) -> String {
    let letter = ('a'..='z').nth(index).unwrap_or('?');
    format!("vd{letter}")
}

/// A panic elsewhere leaves nothing half-changed under these locks.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(crate) fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

/// JSON has no bytes; a path that is no text is shown as well as possible.
pub(crate) fn lossy<S: Serializer>(path: &Path, to: S) -> Result<S::Ok, S::Error> {
    path.to_string_lossy().serialize(to)
}

fn lossy_option<S: Serializer>(path: &Option<PathBuf>, to: S) -> Result<S::Ok, S::Error> {
    let path = path.as_ref().map(|path| path.to_string_lossy());
    path.serialize(to)
}

#[cfg(test)]
pub(crate) mod test_common;
#[cfg(test)]
mod tests;
