//! KVM's own count of the times that a guest had to stop for a device (the kernel's
//! Documentation/virt/kvm/api.rst, 4.133).

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::fd::{FromRawFd, RawFd};
use std::os::unix::fs::FileExt;

/// `_IO(KVMIO, 0xce)`.
const KVM_GET_STATS_FD: libc::c_ulong = 0xaece;

/// Sizes of `kvm_stats_header`, and of `kvm_stats_desc` without its name.
const HEADER: usize = 24;
const DESCRIPTOR: usize = 16;

/// The number of accesses to memory-mapped registers that a CPU could not do within KVM.
pub struct MmioExits {
    file: File,
    offset: u64,
}

impl MmioExits {
    /// The count of CPU number `index` of the only VM in this process, which does not run yet.
    pub fn of_cpu(index: usize) -> io::Result<Self> {
        let vcpu = find_descriptor(&format!("anon_inode:kvm-vcpu:{index}"))?;
        // SAFETY: the request takes no argument.
        let descriptor = unsafe { libc::ioctl(vcpu, KVM_GET_STATS_FD) };
        if descriptor < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the system has just made it for this call.
        let file = unsafe { File::from_raw_fd(descriptor) };
        let offset = find_statistic(&file, c"mmio_exits")?;
        Ok(Self { file, offset })
    }

    /// The count until now; also after the VM is gone.
    pub fn count(&self) -> io::Result<u64> {
        let mut value = [0; 8];
        self.file.read_exact_at(&mut value, self.offset)?;
        Ok(u64::from_le_bytes(value))
    }
}

/// The file descriptor of this process that stands for `target`.
fn find_descriptor(target: &str) -> io::Result<RawFd> {
    for entry in fs::read_dir("/proc/self/fd")? {
        let path = entry?.path();
        // The descriptor of the directory itself may be gone.
        if fs::read_link(&path).is_ok_and(|link| link.as_os_str() == target) {
            let number = path.file_name().and_then(|name| name.to_str());
            return number
                .and_then(|number| number.parse().ok())
                .ok_or_else(|| io::Error::other(format!("{path:?} is no number")));
        }
    }
    Err(io::Error::other(format!("no file {target} is open")))
}

/// Where in `file` the value of the statistic `name` is.
fn find_statistic(file: &File, name: &CStr) -> io::Result<u64> {
    let mut header = [0; HEADER];
    file.read_exact_at(&mut header, 0)?;
    let [_, name_size, count, _, descriptors, data] = words(&header);
    let size = DESCRIPTOR + name_size as usize;
    let mut table = vec![0; size * count as usize];
    file.read_exact_at(&mut table, descriptors.into())?;
    for descriptor in table.chunks_exact(size) {
        if CStr::from_bytes_until_nul(&descriptor[DESCRIPTOR..]) == Ok(name) {
            let [_, _, offset, _] = words(&descriptor[..DESCRIPTOR]);
            return Ok(u64::from(data) + u64::from(offset));
        }
    }
    Err(io::Error::other(format!("KVM does not count {name:?}")))
}

/// Little-endian words of 32 bits.
fn words<const N: usize>(bytes: &[u8]) -> [u32; N] {
    std::array::from_fn(|at| {
        let word = bytes[at * 4..][..4].try_into();
        u32::from_le_bytes(word.unwrap_or_default())
    })
}
