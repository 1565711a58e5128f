//! The system calls of each role.
//!
//! Order matters little: Linux remembers which calls a filter allows whatever their arguments are, and
//! does not run it for them. Those of requests are among them.

use libc::*;
use seccompiler::SeccompCmpArgLen::{Dword, Qword};
use seccompiler::SeccompCmpOp::{Eq, MaskedEq};
use seccompiler::{BackendError, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompRule};

use super::Role;
use super::filters::Rules;

/// Memory, time, locks, signals of its own and the end: what every thread needs, most of it by way of
/// the C library.
const EVERY: &[c_long] = &[
    SYS_read,
    SYS_write,
    SYS_readv,
    SYS_writev,
    SYS_close,
    SYS_futex,
    SYS_poll,
    SYS_ppoll,
    SYS_munmap,
    SYS_mremap,
    SYS_madvise,
    SYS_brk,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_gettimeofday,
    SYS_time,
    SYS_nanosleep,
    SYS_sched_yield,
    SYS_sched_getaffinity,
    SYS_getcpu,
    SYS_getrandom,
    SYS_getpid,
    SYS_gettid,
    SYS_rt_sigaction,
    SYS_rt_sigprocmask,
    SYS_rt_sigreturn,
    SYS_sigaltstack,
    SYS_restart_syscall,
    SYS_set_robust_list,
    SYS_rseq,
    SYS_exit,
    SYS_exit_group,
];

/// Disks that are open.
const DISKS: &[c_long] = &[
    SYS_pread64,
    SYS_pwrite64,
    SYS_preadv,
    SYS_pwritev,
    SYS_preadv2,
    SYS_pwritev2,
    SYS_fdatasync,
    SYS_fsync,
    SYS_fallocate,
    SYS_ftruncate,
    SYS_lseek,
    SYS_fstat,
    SYS_newfstatat,
    SYS_statx,
    SYS_fstatfs,
    SYS_fadvise64,
    SYS_copy_file_range,
];

/// Event loops.
const EVENTS: &[c_long] = &[
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_wait,
    SYS_epoll_pwait,
    SYS_eventfd2,
    SYS_timerfd_create,
    SYS_timerfd_settime,
    SYS_pipe2,
];

/// Clients of a socket that is there.
const CLIENTS: &[c_long] = &[
    SYS_accept4,
    SYS_recvfrom,
    SYS_recvmsg,
    SYS_sendto,
    SYS_sendmsg,
    SYS_getsockopt,
    SYS_setsockopt,
    SYS_shutdown,
    SYS_geteuid,
];

/// Files that requests of the control socket name. Which ones is for Landlock to say.
const FILES: &[c_long] = &[
    SYS_openat,
    SYS_openat2,
    SYS_getcwd,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_stat,
    SYS_lstat,
    SYS_readlink,
    SYS_readlinkat,
    SYS_linkat,
    SYS_rename,
    SYS_renameat,
    SYS_renameat2,
    SYS_unlink,
    SYS_unlinkat,
    SYS_utimensat,
    SYS_fchmod,
    SYS_fchown,
    SYS_flock,
];

/// What is not there (`ENOSYS`) where a role has no use for it, since libraries try it and go on without.
/// The flags of `clone3` are in memory, where no filter can look; the C library falls back to `clone`.
/// And the standard library looks for files when it reports a panic.
pub(super) const REFUSED: &[c_long] = &[
    SYS_clone3,
    SYS_open,
    SYS_openat,
    SYS_openat2,
    SYS_access,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_stat,
    SYS_lstat,
    SYS_readlink,
    SYS_readlinkat,
    SYS_getcwd,
];

/// Requests of KVM for a CPU that runs: `KVM_RUN`, `KVM_KVMCLOCK_CTRL`, `KVM_GET_REGS`.
const CPU_REQUESTS: &[u64] = &[0xae80, 0xaead, 0x8090_ae81];
/// Modes of a terminal, which any thread restores that the process crashes on.
const TERMINAL_REQUESTS: &[u64] = &[TCGETS, TCSETS, TCGETS2, TCSETS2];
/// Whether a socket blocks.
const SOCKET_REQUESTS: &[u64] = &[FIONBIO];
/// Attributes of files to create, and the sector size of a block device.
const FILE_REQUESTS: &[u64] = &[
    FS_IOC_GETFLAGS,
    FS_IOC_SETFLAGS,
    FS_IOC_FSGETXATTR,
    FS_IOC_FSSETXATTR,
    BLKPBSZGET,
];
const FS_IOC_FSGETXATTR: u64 = 0x801c_581f;
const FS_IOC_FSSETXATTR: u64 = 0x401c_5820;
const BLKPBSZGET: u64 = 0x127b;

/// Flags, copies and locks of descriptors; not who is sent signals for them.
const DESCRIPTOR_REQUESTS: &[c_int] = &[
    F_GETFL,
    F_SETFL,
    F_GETFD,
    F_SETFD,
    F_DUPFD_CLOEXEC,
    F_OFD_GETLK,
    F_OFD_SETLK,
    F_OFD_SETLKW,
];

/// Names of threads, and of memory (by the C library).
const PROCESS_REQUESTS: &[c_int] = &[PR_SET_NAME, PR_GET_NAME, PR_SET_VMA];

/// What makes a thread, and what would be a process or lie in a namespace of its own.
const THREAD: c_int = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD;
const NAMESPACES: c_int = CLONE_NEWNS
    | CLONE_NEWCGROUP
    | CLONE_NEWUTS
    | CLONE_NEWIPC
    | CLONE_NEWUSER
    | CLONE_NEWPID
    | CLONE_NEWNET;

/// What `role` may do.
pub(super) fn allowed(role: Role) -> Result<Rules, BackendError> {
    let (groups, requests): (&[&[c_long]], &[&[u64]]) = match role {
        Role::Main => (&[DISKS, EVENTS, &[SYS_unlink, SYS_shutdown]], &[]),
        Role::Cpu => (&[DISKS, EVENTS], &[CPU_REQUESTS]),
        Role::Control => (
            &[DISKS, EVENTS, CLIENTS, FILES],
            &[SOCKET_REQUESTS, FILE_REQUESTS],
        ),
        Role::Watch => (&[DISKS], &[]),
        Role::Server => (
            // A front end's descriptors are told apart by their links.
            &[DISKS, EVENTS, CLIENTS, &[SYS_unlink, SYS_readlink]],
            &[SOCKET_REQUESTS],
        ),
    };
    let calls = groups.iter().copied().chain([EVERY]).flatten();
    let mut rules: Rules = calls.map(|call| (*call, vec![])).collect();
    let requests = requests.iter().copied().chain([TERMINAL_REQUESTS]);
    let requests: Vec<_> = requests.flatten().copied().collect();
    rules.insert(SYS_ioctl, one_of(1, &requests)?);
    if matches!(role, Role::Cpu | Role::Control | Role::Server) {
        let mask = (THREAD | NAMESPACES) as u64;
        rules.insert(SYS_clone, when(0, Qword, MaskedEq(mask), THREAD as u64)?);
    }
    let numbers = |list: &[c_int]| -> Vec<u64> { list.iter().map(|n| *n as u64).collect() };
    rules.insert(SYS_fcntl, one_of(1, &numbers(DESCRIPTOR_REQUESTS))?);
    rules.insert(SYS_prctl, one_of(0, &numbers(PROCESS_REQUESTS))?);
    // What guests write is never executed here.
    for call in [SYS_mmap, SYS_mprotect] {
        rules.insert(call, when(2, Dword, MaskedEq(PROT_EXEC as u64), 0)?);
    }
    // Limits are looked at, not changed.
    rules.insert(SYS_prlimit64, when(2, Qword, Eq, 0)?);
    // Signals go to threads of this process.
    rules.insert(SYS_tgkill, when(0, Dword, Eq, std::process::id().into())?);
    Ok(rules)
}

/// Argument number `index` is one of `values`.
fn one_of(index: u8, values: &[u64]) -> Result<Vec<SeccompRule>, BackendError> {
    let rules = values.iter().map(|value| when(index, Dword, Eq, *value));
    rules
        .collect::<Result<Vec<_>, _>>()
        .map(|rules| rules.concat())
}

/// Argument number `index` compares to `value` like this.
fn when(
    index: u8,
    len: SeccompCmpArgLen,
    op: SeccompCmpOp,
    value: u64,
) -> Result<Vec<SeccompRule>, BackendError> {
    let condition = SeccompCondition::new(index, len, op, value)?;
    Ok(vec![SeccompRule::new(vec![condition])?])
}
