//! Why a virtual machine could not be built, or how it ended when it should not have.

use std::io;
use std::path::PathBuf;

use crate::config;
use crate::kernel::KernelError;

/// Result of this crate's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// What went wrong. Each message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The configuration makes no sense.
    #[error(transparent)]
    Config(#[from] config::Error),

    /// `/dev/kvm` is missing.
    #[error(
        "there is no /dev/kvm: enable virtualization in the firmware (or nested virtualization, in a \
         virtual machine) and load the module kvm_intel or kvm_amd"
    )]
    NoKvm,

    /// `/dev/kvm` may not be opened.
    #[error("/dev/kvm cannot be opened by this user: {0}")]
    KvmPermission(String),

    /// A KVM call failed.
    #[error("KVM could not {action}: {source}")]
    Kvm {
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },

    /// This KVM lacks what is needed.
    #[error("KVM on this host {0}")]
    KvmUnfit(String),

    /// Guest memory could not be mapped.
    #[error("could not map {} MiB for the guest: {source}", size >> 20)]
    Memory {
        /// Size in bytes.
        size: u64,
        /// Why.
        source: vm_memory::mmap::FromRangesError,
    },

    /// The kernel or the initrd could not be loaded.
    #[error(transparent)]
    Kernel(#[from] KernelError),

    /// A disk could not be opened.
    #[error(transparent)]
    Disk(#[from] tandem_block::Error),

    /// A disk that was attached as qcow2 is something else.
    #[error(
        "'{}' is not a qcow2 image; if it is a raw disk, say so: --disk {},format=raw",
        path.display(),
        path.display().to_string().replace(',', ",,")
    )]
    NotQcow2 {
        /// The file.
        path: PathBuf,
    },

    /// A file of a disk is in use, and it can be seen by whom.
    #[error("{error} It is: {users}")]
    DiskInUse {
        /// Which file, and what could not be had.
        error: tandem_block::Error,
        /// The processes.
        users: String,
    },

    /// The name of a socket to make belongs to a file of another kind.
    #[error("'{}' is there already, and is no socket", .0.display())]
    NotASocket(PathBuf),

    /// The name of a socket to make belongs to one that is in use.
    #[error("'{}' is in use: another process listens on it", .0.display())]
    SocketInUse(PathBuf),

    /// Front ends can no longer be waited for.
    #[cfg(feature = "vhost-user")]
    #[error(transparent)]
    FrontEnds(#[from] tandem_devices::virtio::vhost_user::Error),

    /// A file could not be used.
    #[error("could not {action} '{}': {source}", file.display())]
    File {
        /// The file.
        file: PathBuf,
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },

    /// Metrics cannot be written to a descriptor.
    #[error("could not write metrics to fd={descriptor}: {source}")]
    Metrics {
        /// The number of the descriptor.
        descriptor: i32,
        /// The system's answer.
        source: io::Error,
    },

    /// The guest's output cannot be written to a descriptor.
    #[error("could not send output to fd={descriptor}: {source}")]
    Output {
        /// The number of the descriptor.
        descriptor: i32,
        /// The system's answer.
        source: io::Error,
    },

    /// A part of the process that the VM needs could not be set up.
    #[error("could not {action}: {source}")]
    Host {
        /// What was being done.
        action: &'static str,
        /// The system's answer.
        source: io::Error,
    },

    /// The guest broke its own CPU.
    #[error(
        "the guest stopped with a triple fault on CPU {cpu}: an exception whose handling failed twice"
    )]
    TripleFault {
        /// Number of the CPU.
        cpu: u8,
    },

    /// KVM gave up.
    #[error("KVM stopped CPU {cpu}: {reason}")]
    Stopped {
        /// Number of the CPU.
        cpu: u8,
        /// In words, with what KVM tells about it.
        reason: String,
    },

    /// KVM runs an instruction in software, and does not know it.
    #[error(
        "KVM on this host cannot emulate an instruction of the guest (CPU {cpu} at {position}); \
         a KVM without hardware virtualization runs few guests"
    )]
    Emulation {
        /// Number of the CPU.
        cpu: u8,
        /// Its instruction pointer, and the bytes there if they are known.
        position: String,
    },

    /// A thread of the VM panicked, which is a bug in this program.
    #[error("internal error: the thread of CPU {cpu} panicked")]
    Panicked {
        /// Number of the CPU.
        cpu: u8,
    },

    /// Disks could not be flushed when the VM had ended. What the guest was told to be durable is.
    #[error("could not flush {}", list(.0))]
    Flush(Vec<(PathBuf, tandem_block::Error)>),

    /// The VM ended with an error, and closing its disks brought another one.
    #[error("{0}; {1}")]
    Both(Box<Error>, Box<Error>),
}

fn list(errors: &[(PathBuf, tandem_block::Error)]) -> String {
    let each = errors
        .iter()
        .map(|(path, error)| format!("disk '{}': {error}", path.display()));
    each.collect::<Vec<_>>().join("; ")
}

/// Names the KVM call that failed.
pub(crate) trait KvmContext<T> {
    /// Turns an error into [`Error::Kvm`] for `action`, a verb and its object.
    fn context(self, action: &'static str) -> Result<T>;
}

impl<T> KvmContext<T> for std::result::Result<T, kvm_ioctls::Error> {
    fn context(self, action: &'static str) -> Result<T> {
        self.map_err(|errno| Error::Kvm {
            action,
            source: errno.into(),
        })
    }
}

/// Names the host call that failed.
pub(crate) trait HostContext<T> {
    /// Turns an error into [`Error::Host`] for `action`, a verb and its object.
    fn host(self, action: &'static str) -> Result<T>;
}

impl<T, E: Into<io::Error>> HostContext<T> for std::result::Result<T, E> {
    fn host(self, action: &'static str) -> Result<T> {
        self.map_err(|e| Error::Host {
            action,
            source: e.into(),
        })
    }
}
