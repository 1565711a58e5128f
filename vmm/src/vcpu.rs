//! The CPUs: the state in which they start, and the loop that runs them.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::sync::{Arc, RwLock};
use std::thread::JoinHandle;

use kvm_bindings::{
    CpuId, KVM_INTERNAL_ERROR_EMULATION, KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES,
    KVM_SYSTEM_EVENT_RESET, KVM_SYSTEM_EVENT_SHUTDOWN, Msrs, kvm_msr_entry, kvm_regs, kvm_segment,
    kvm_sregs,
};
use kvm_ioctls::{VcpuExit, VcpuFd, VmFd};
use tandem_devices::GuestMemory;
use tandem_devices::bus::Bus;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};
use vmm_sys_util::signal;

use crate::error::{Error, HostContext, KvmContext, Result};
use crate::exit::{Exit, ExitReason};
use crate::gate::{Gate, KICK_INTERVAL};
use crate::layout;
use crate::sandbox::{self, Role};

/// State in which the boot processor starts. The other CPUs wait for it to start them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// 64-bit long mode, the first 4 GiB mapped one to one.
    Long {
        /// First instruction.
        rip: u64,
        /// Argument.
        rsi: u64,
    },
    /// 32-bit protected mode without paging.
    Protected {
        /// First instruction.
        rip: u64,
        /// Argument.
        rbx: u64,
    },
}

/// Selectors that the Linux boot protocol prescribes.
const CODE_SELECTOR: u16 = 0x10;
const DATA_SELECTOR: u16 = 0x18;
const TASK_SELECTOR: u16 = 0x20;

/// Descriptors of [`layout::GDT`]; the task's takes two entries in long mode.
const CODE_64: u64 = 0x00af_9b00_0000_ffff;
const CODE_32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TASK: u64 = 0x0000_8b00_0000_0067;
const GDT_ENTRIES: usize = 6;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;

const PAGE: u64 = 0x1000;
const LARGE_PAGE: u64 = 2 << 20;
const PTE_TABLE: u64 = 0x03;
const PTE_LARGE: u64 = 0x83;
/// Page directories, each of which maps 1 GiB.
const DIRECTORIES: u64 = 4;
const _: () = assert!(layout::PAGE_TABLES + (2 + DIRECTORIES) * PAGE <= layout::CMDLINE);

const MSR_MISC_ENABLE: u32 = 0x1a0;
const MISC_ENABLE_FAST_STRINGS: u64 = 1;
const MSR_MTRR_DEF_TYPE: u32 = 0x2ff;
const MTRR_ENABLE_WRITE_BACK: u64 = 1 << 11 | 6;

/// In the flags of an emulation failure: KVM tells the instruction.
const INSTRUCTION_KNOWN: u64 = KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES as u64;

/// Writes the GDT and the page tables of the boot processor.
pub fn write_tables(mem: &GuestMemory) -> std::result::Result<(), GuestMemoryError> {
    // The code descriptor in memory is the 64-bit one: a 32-bit entry loads its own table.
    let gdt: [u64; GDT_ENTRIES] = [0, 0, CODE_64, DATA, TASK, 0];
    for (index, descriptor) in (0..).zip(gdt) {
        mem.write_obj(descriptor, GuestAddress(layout::GDT + index * 8))?;
    }

    let pointers = layout::PAGE_TABLES + PAGE;
    let directories = pointers + PAGE;
    mem.write_obj(pointers | PTE_TABLE, GuestAddress(layout::PAGE_TABLES))?;
    for index in 0..DIRECTORIES {
        let directory = directories + index * PAGE;
        mem.write_obj(directory | PTE_TABLE, GuestAddress(pointers + index * 8))?;
    }
    for index in 0..DIRECTORIES * 512 {
        let entry = (index * LARGE_PAGE) | PTE_LARGE;
        mem.write_obj(entry, GuestAddress(directories + index * 8))?;
    }
    Ok(())
}

/// A CPU that does not run yet.
pub struct Vcpu {
    index: u8,
    fd: VcpuFd,
    /// Has not run for a while since it last entered the guest.
    was_paused: bool,
}

impl Vcpu {
    /// Makes CPU number `index` of `vm`.
    pub fn new(vm: &VmFd, index: u8, cpuid: &CpuId) -> Result<Self> {
        let fd = vm.create_vcpu(u64::from(index)).context("make a CPU")?;
        fd.set_cpuid2(cpuid).context("set the features of a CPU")?;
        let entry = |index, data| kvm_msr_entry {
            index,
            data,
            ..Default::default()
        };
        let msrs = [
            entry(MSR_MISC_ENABLE, MISC_ENABLE_FAST_STRINGS),
            entry(MSR_MTRR_DEF_TYPE, MTRR_ENABLE_WRITE_BACK),
        ];
        let msrs = Msrs::from_entries(&msrs)
            .map_err(|e| Error::KvmUnfit(format!("takes no model-specific registers: {e:?}")))?;
        let count = fd
            .set_msrs(&msrs)
            .context("set model-specific registers of a CPU")?;
        if count != msrs.as_slice().len() {
            return Err(Error::KvmUnfit(format!(
                "refuses model-specific register {:#x}",
                msrs.as_slice()[count].index
            )));
        }
        Ok(Self {
            index,
            fd,
            was_paused: false,
        })
    }

    /// Makes this the boot processor, to start at `entry`.
    pub fn set_entry(&self, entry: Entry) -> Result<()> {
        let mut sregs = self.fd.get_sregs().context("read the registers of a CPU")?;
        let mut regs = kvm_regs {
            rflags: 2,
            ..Default::default()
        };
        match entry {
            Entry::Long { rip, rsi } => {
                set_segments(&mut sregs, CODE_64);
                sregs.cr3 = layout::PAGE_TABLES;
                sregs.cr4 = CR4_PAE;
                sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
                sregs.efer = EFER_LME | EFER_LMA;
                (regs.rip, regs.rsi, regs.rsp) = (rip, rsi, layout::BOOT_STACK);
            }
            Entry::Protected { rip, rbx } => {
                set_segments(&mut sregs, CODE_32);
                sregs.cr0 = CR0_PE | CR0_ET;
                (regs.rip, regs.rbx) = (rip, rbx);
            }
        }
        self.fd
            .set_sregs(&sregs)
            .context("set the control registers of a CPU")?;
        self.fd
            .set_regs(&regs)
            .context("set the registers of a CPU")
    }

    /// Starts running the CPU on a thread of its own, until `machine.exit` ends.
    pub fn start(self, machine: Arc<Machine>) -> Result<Running> {
        let index = self.index;
        let role = machine.seccomp.then_some(Role::Cpu);
        let body = move || {
            // Dropped in reverse order: the CPU must be closed before its memory can go.
            let machine = machine;
            let mut cpu = self;
            // Says so if the thread ends in a panic.
            let _guard = PanicGuard(&machine.exit, index);
            // A panic elsewhere does not keep it from looking at the end.
            drop(machine.setup.read());
            machine.gate.inside(|| {
                while !machine.exit.has_ended() {
                    if let Err(error) = cpu.step(&machine) {
                        machine.exit.end(Err(error));
                    }
                }
            });
        };
        sandbox::spawn(format!("vcpu{index}"), role, body).map(Running)
    }

    /// Runs the guest until it leaves for something that this process has to do, and does that.
    fn step(&mut self, machine: &Machine) -> Result<()> {
        if machine.gate.is_closed() {
            self.was_paused |= machine.gate.outside(|| ());
            return Ok(());
        }
        if std::mem::take(&mut self.was_paused) {
            // Spares the guest's watchdogs. It fails for a guest that does not use KVM's clock.
            let _ = self.fd.kvmclock_ctrl();
        }
        match self.fd.run() {
            Ok(VcpuExit::IoIn(port, data)) => machine.ports.read(u64::from(port), data),
            // The console may wait for its reader. No device behind a port touches a disk or the
            // guest's memory, so nobody need wait for that.
            Ok(VcpuExit::IoOut(port, data)) => {
                let write = || machine.ports.write(u64::from(port), data);
                self.was_paused |= machine.gate.outside(write);
            }
            Ok(VcpuExit::MmioRead(address, data)) => machine.mmio.read(address, data),
            Ok(VcpuExit::MmioWrite(address, data)) => machine.mmio.write(address, data),
            Ok(VcpuExit::Intr) => {}
            Ok(VcpuExit::Shutdown) => return Err(Error::TripleFault { cpu: self.index }),
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_SHUTDOWN, _)) => {
                machine.exit.end(Ok(ExitReason::PowerOff));
            }
            Ok(VcpuExit::SystemEvent(KVM_SYSTEM_EVENT_RESET, _)) => {
                machine.exit.end(Ok(ExitReason::Reset));
            }
            Ok(VcpuExit::InternalError) => return Err(self.internal_error()),
            Ok(VcpuExit::FailEntry(reason, _)) => {
                return Err(self.stopped(format!(
                    "the processor refused to enter the guest (hardware reason {reason:#x})"
                )));
            }
            Ok(other) => {
                let reason = format!("unexpected exit {other:?}");
                return Err(self.stopped(reason));
            }
            // A signal; a CPU that waits to be started reports EAGAIN once.
            Err(e) if matches!(e.errno(), libc::EINTR | libc::EAGAIN) => {}
            Err(e) => return Err(self.stopped(io::Error::from(e).to_string())),
        }
        Ok(())
    }

    fn stopped(&self, reason: String) -> Error {
        Error::Stopped {
            cpu: self.index,
            reason: format!("{reason} at {}", self.position()),
        }
    }

    /// Where the CPU stands, for an error message.
    fn position(&self) -> String {
        match self.fd.get_regs() {
            Ok(regs) => format!("RIP {:#x}", regs.rip),
            Err(e) => format!("an unknown place ({e})"),
        }
    }

    fn internal_error(&mut self) -> Error {
        let run = self.fd.get_kvm_run();
        // SAFETY: KVM fills this member of the union when the exit reason is
        // KVM_EXIT_INTERNAL_ERROR, which it was; any bytes are a valid value of it.
        let detail = unsafe { run.__bindgen_anon_1.emulation_failure };
        if detail.suberror != KVM_INTERNAL_ERROR_EMULATION {
            return self.stopped(format!("internal error {}", detail.suberror));
        }
        // SAFETY: KVM fills in the instruction where it says so, with `ndata` and `flags`; any bytes
        // are a valid value.
        let instruction = unsafe { detail.__bindgen_anon_1.__bindgen_anon_1 };
        let length = match detail.ndata > 0 && detail.flags & INSTRUCTION_KNOWN != 0 {
            true => usize::from(instruction.insn_size).min(instruction.insn_bytes.len()),
            false => 0,
        };
        let mut position = self.position();
        for (index, byte) in instruction.insn_bytes[..length].iter().enumerate() {
            position += if index == 0 { ": " } else { " " };
            position += &format!("{byte:02x}");
        }
        Error::Emulation {
            cpu: self.index,
            position,
        }
    }
}

/// Flat segments over all of memory, `code` being the descriptor of the code segment.
fn set_segments(sregs: &mut kvm_sregs, code: u64) {
    sregs.cs = segment(CODE_SELECTOR, code);
    let data = segment(DATA_SELECTOR, DATA);
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = segment(TASK_SELECTOR, TASK);
    sregs.gdt.base = layout::GDT;
    sregs.gdt.limit = (GDT_ENTRIES * 8 - 1) as u16;
    sregs.idt.base = 0;
    sregs.idt.limit = 0;
}

/// A segment as the processor holds it, from its descriptor, whose base is 0.
fn segment(selector: u16, descriptor: u64) -> kvm_segment {
    let bits = |shift: u32, width: u32| (descriptor >> shift & ((1 << width) - 1)) as u8;
    let limit = (descriptor & 0xffff | descriptor >> 32 & 0xf_0000) as u32;
    let granularity = bits(55, 1);
    kvm_segment {
        base: 0,
        limit: if granularity == 1 {
            limit << 12 | 0xfff
        } else {
            limit
        },
        selector,
        type_: bits(40, 4),
        s: bits(44, 1),
        dpl: bits(45, 2),
        present: bits(47, 1),
        avl: bits(52, 1),
        l: bits(53, 1),
        db: bits(54, 1),
        g: granularity,
        ..Default::default()
    }
}

/// What CPUs share: the devices that they see, and what stops and ends them.
pub struct Machine {
    /// Port I/O.
    pub ports: Bus,
    /// Memory-mapped I/O.
    pub mmio: Bus,
    /// The end.
    pub exit: Arc<Exit>,
    /// The way into the guest.
    pub gate: Arc<Gate>,
    /// Locked for writing until CPUs may enter the guest.
    pub setup: RwLock<()>,
    /// Whether the threads of CPUs are confined.
    pub seccomp: bool,
    /// The guest's RAM, which is here to stay mapped as long as any CPU.
    pub _mem: GuestMemory,
}

struct PanicGuard<'a>(&'a Exit, u8);

impl Drop for PanicGuard<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.end(Err(Error::Panicked { cpu: self.1 }));
        }
    }
}

/// A CPU that runs.
pub struct Running(JoinHandle<()>);

/// Prepares the process for [`Running::stop`] and [`Gate::close`]: the signal that interrupts CPUs does
/// nothing else.
pub fn install_kick_handler() -> Result<()> {
    extern "C" fn ignore(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    signal::register_signal_handler(signal::SIGRTMIN(), ignore)
        .host("install the signal handler that stops CPUs")
}

impl Running {
    /// Waits for the CPU's thread to end, which it does when it looks at [`Machine::exit`].
    ///
    /// A signal brings it there from inside the guest, or out of a system call of a device. One that
    /// arrives just before either of them has no effect; so it is repeated.
    pub fn stop(self) {
        while !self.0.is_finished() {
            // SAFETY: the thread has not been joined, so its id is valid; the signal has a handler.
            unsafe { libc::pthread_kill(self.0.as_pthread_t(), signal::SIGRTMIN()) };
            std::thread::sleep(KICK_INTERVAL);
        }
        // A panic has been reported by its guard.
        let _ = self.0.join();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn segments_from_descriptors() {
        let code = segment(0x10, CODE_64);
        assert_eq!((code.base, code.limit), (0, 0xffff_ffff));
        assert_eq!((code.type_, code.s, code.dpl, code.present), (0xb, 1, 0, 1));
        assert_eq!((code.l, code.db, code.g), (1, 0, 1));
        let code = segment(0x10, CODE_32);
        assert_eq!((code.l, code.db, code.g), (0, 1, 1));
        let data = segment(0x18, DATA);
        assert_eq!((data.type_, data.s, data.limit), (3, 1, 0xffff_ffff));
        let task = segment(0x20, TASK);
        assert_eq!((task.type_, task.s, task.limit), (0xb, 0, 0x67));
    }

    #[test]
    fn first_four_gigabytes_are_mapped_one_to_one() {
        let mem = crate::memory::create(2 << 20).unwrap();
        write_tables(&mem).unwrap();
        let entry = |table: u64, index: u64| -> u64 {
            mem.read_obj(GuestAddress((table & !0xfff) + index * 8))
                .unwrap()
        };
        for address in [
            0,
            0x7000,
            0x20_0000,
            0x3fff_f000,
            0xd000_0050,
            0xffff_ffff_u64,
        ] {
            let pointers = entry(layout::PAGE_TABLES, address >> 39 & 511);
            let directory = entry(pointers, address >> 30 & 511);
            let page = entry(directory, address >> 21 & 511);
            assert_eq!(
                (pointers & 0xfff, directory & 0xfff, page & 0xfff),
                (3, 3, 0x83)
            );
            assert_eq!((page & !0xfff) | address & 0x1f_ffff, address);
        }
    }
}
