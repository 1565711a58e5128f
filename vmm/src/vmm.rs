//! The virtual machine as a whole: built from a [`Config`], run to its end.

use std::io::{self, Write};
use std::panic::resume_unwind;
use std::sync::{Arc, RwLock};
use std::thread;
use std::time::Instant;

use event_manager::{EventManager, EventOps, EventSet, Events, MutEventSubscriber, SubscriberOps};
use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::{Cap, Kvm, VmFd};
use tandem_devices::GuestMemory;
use tandem_devices::bus::{Bus, BusDevice};
use tandem_devices::pci::ConfigAddress;
use tandem_devices::power::{AcpiPower, Keyboard, PowerEvent, PowerHandler};
use tandem_devices::serial::SerialPort;
use vmm_sys_util::eventfd::EventFd;

use crate::boot;
use crate::config::{Config, SerialConfig};
use crate::console::{self, Input};
use crate::control::{Control, GrowthWatch, MachineInfo};
use crate::cpuid;
use crate::disk::{self, Attached};
use crate::error::{Error, HostContext, KvmContext, Result};
use crate::exit::{Exit, ExitReason, StatusLine};
use crate::gate::Gate;
use crate::interrupts;
use crate::kvm_access;
use crate::layout;
use crate::memory;
use crate::sandbox::{self, Role};
use crate::signals::Signals;
use crate::vcpu::{self, Entry, Machine, Vcpu};

/// A virtual machine that is ready to run.
pub struct Vmm {
    vcpus: Vec<Vcpu>,
    disks: Vec<Attached>,
    input: Option<InputPort>,
    signals: Option<(Signals, OnUsr1)>,
    control: Control,
    _vm: VmFd,
    /// After the CPUs and the VM, which must be closed before their memory goes.
    machine: Arc<Machine>,
}

/// A serial port, and the event that tells of room for input.
type InputPort = (Arc<SerialPort>, EventFd);

/// What SIGUSR1 has done.
type OnUsr1 = Box<dyn FnMut() + Send>;

impl Vmm {
    /// Builds the machine: opens its files, loads its kernel, makes its CPUs and devices.
    pub fn build(config: &Config) -> Result<Self> {
        config.validate()?;
        let images = config.disks.iter().map(disk::open);
        let images = images.collect::<Result<Vec<_>>>()?;
        let places: Vec<_> = (0..images.len()).map(disk::place).collect();
        let mem = memory::create(config.memory)?;
        // KVM waits for other processors most of the time, which the kernel and the initrd are read in.
        // That is on the thread that is new: statistics of a VM bear the number of the one that made it.
        let (entry, made) = thread::scope(|scope| {
            let read = || boot::prepare(&mem, config, &places);
            let reading = thread::Builder::new().spawn_scoped(scope, read);
            // SAFETY: three things keep KVM's VM alive: `vm`, CPUs that do not run yet, and CPUs on
            // threads. Until `build` returns, they are locals declared after `mem`, and so dropped before
            // it. Then `mem` belongs to the `Machine`. The `Vmm` holds that in its last member, behind
            // the CPUs and `vm`; each CPU's thread holds it by an `Arc` of its own, which it drops after
            // its CPU (see `Vcpu::start`). So whichever of them ends last, however it ends, and even if a
            // panic in `run` leaves threads behind, the memory goes after the VM.
            let made = unsafe { make_vm(config, &mem) };
            let entry = reading.map(|reading| reading.join().unwrap_or_else(|e| resume_unwind(e)));
            (entry, made)
        });
        let entry = entry.host("start a thread")??;
        let (kvm, vm) = made?;

        let exit = Arc::new(Exit::new()?);
        let gate = Arc::new(Gate::new(exit.clone()));
        let mut mmio = Bus::new();
        let mut disks = Vec::new();
        for (disk, place) in config.disks.iter().zip(images).zip(places) {
            let cpus = config.cpus;
            disks.push(Attached::new(&vm, &mem, &mut mmio, place, disk, cpus)?);
        }
        let (ports, input) = build_ports(&vm, config, &exit)?;
        let vcpus = build_vcpus(&kvm, &vm, &mem, config.cpus, entry)?;
        let info = MachineInfo {
            cpus: config.cpus,
            memory: config.memory,
            started: Instant::now(),
            seccomp: config.seccomp,
        };
        let operated = disks.iter().map(Attached::operated).collect();
        Ok(Self {
            vcpus,
            disks,
            input,
            signals: None,
            control: Control::new(info, operated, exit.clone(), gate.clone()),
            _vm: vm,
            machine: Arc::new(Machine {
                ports,
                mmio,
                exit,
                gate,
                setup: RwLock::default(),
                seccomp: config.seccomp,
                _mem: mem,
            }),
        })
    }

    /// Has a signal out of `signals` end the VM, but for SIGUSR1, which has `on_usr1` called on the
    /// thread that runs the VM.
    pub fn handle_signals(&mut self, signals: Signals, on_usr1: impl FnMut() + Send + 'static) {
        self.signals = Some((signals, Box::new(on_usr1)));
    }

    /// The means to operate the VM, from any thread.
    pub fn control(&self) -> Control {
        self.control.clone()
    }

    /// Runs the guest to its end, on this thread and one for each CPU and disk. On return the guest
    /// has stopped, and its disks are flushed and closed.
    ///
    /// A console on standard input puts a terminal there into raw mode meanwhile.
    pub fn run(mut self) -> Result<ExitReason> {
        let outcome = self.run_until_end();
        // In case that it could not even begin.
        self.control.shut_down();
        self.control.finish();
        for disk in &self.disks {
            disk.stop();
        }
        let failures = self.disks.iter().filter_map(|disk| disk.close().err());
        let failures: Vec<_> = failures.collect();
        if failures.is_empty() {
            return outcome;
        }
        let flush = Error::Flush(failures);
        Err(match outcome {
            Ok(_) => flush,
            Err(error) => Error::Both(Box::new(error), Box::new(flush)),
        })
    }

    /// Runs the CPUs until one of them, a device, the console or a signal ends the VM.
    fn run_until_end(&mut self) -> Result<ExitReason> {
        let machine = self.machine.clone();
        let exit = machine.exit.clone();
        if machine.seccomp {
            // Before a terminal is in raw mode.
            sandbox::install_handler();
        }
        let _growth = GrowthWatch::start(&self.control)?;
        // The terminal is restored when this goes out of scope.
        let mut events = EventManager::<Box<dyn MutEventSubscriber>>::new()
            .map_err(io::Error::other)
            .host("set up the event loop")?;
        events.add_subscriber(Box::new(Watch(exit.clone())));
        if let Some((signals, on_usr1)) = self.signals.take() {
            events.add_subscriber(Box::new(SignalWatch {
                signals,
                on_usr1,
                exit: exit.clone(),
            }));
        }
        if let Some((port, ready)) = self.input.take() {
            events.add_subscriber(Box::new(Input::new(port, ready, exit.clone())?));
        }

        vcpu::install_kick_handler()?;
        let mut running = Vec::new();
        // Nobody can have panicked under it.
        let setup = machine.setup.write();
        for vcpu in self.vcpus.drain(..) {
            match vcpu.start(machine.clone()) {
                Ok(vcpu) => running.push(vcpu),
                Err(error) => exit.end(Err(error)),
            }
        }
        // After the CPUs' threads have been started, which would have to do with as little otherwise.
        if machine.seccomp
            && let Err(error) = sandbox::enter(Role::Main)
        {
            exit.end(Err(error));
        }
        drop(setup);
        while !exit.has_ended() {
            if let Err(e) = events.run().map_err(io::Error::other) {
                exit.end(Err(e).host("wait for events"));
            }
        }
        machine.gate.wake();
        running.into_iter().for_each(vcpu::Running::stop);
        exit.take().unwrap_or(Ok(ExitReason::Stopped))
    }
}

/// A virtual machine without CPUs and devices, whose memory is `mem`.
///
/// # Safety
/// As [`memory::attach`].
unsafe fn make_vm(config: &Config, mem: &GuestMemory) -> Result<(Kvm, VmFd)> {
    let kvm = open_kvm(config)?;
    let vm = kvm.create_vm().context("make a virtual machine")?;
    vm.set_tss_address(layout::KVM_TSS)
        .context("reserve guest memory for itself")?;
    interrupts::create_controllers(&vm)?;
    // SAFETY: our caller says it.
    unsafe { memory::attach(&vm, mem)? };
    Ok((kvm, vm))
}

/// Opens KVM and checks that it can do what every VM here needs.
fn open_kvm(config: &Config) -> Result<Kvm> {
    let kvm = Kvm::new().map_err(|errno| match errno.errno() {
        libc::ENOENT | libc::ENODEV | libc::ENXIO => Error::NoKvm,
        libc::EACCES | libc::EPERM => Error::KvmPermission(kvm_access::advice()),
        _ => Error::Kvm {
            action: "be opened at /dev/kvm",
            source: errno.into(),
        },
    })?;
    let version = kvm.get_api_version();
    if version != KVM_API_VERSION as i32 {
        return Err(Error::KvmUnfit(format!("has API version {version}")));
    }
    let needed = [
        (Cap::Irqchip, "interrupt controllers"),
        (Cap::Irqfd, "interrupts by eventfd"),
        (Cap::IrqRouting, "interrupt routing"),
        (Cap::Ioeventfd, "doorbells by eventfd"),
        (Cap::UserMemory, "memory slots"),
        (Cap::SetTssAddr, "a place for its task state"),
    ];
    for (cap, name) in needed {
        if !kvm.check_extension(cap) {
            return Err(Error::KvmUnfit(format!("does not offer {name}")));
        }
    }
    let max = kvm.get_max_vcpus();
    if usize::from(config.cpus) > max {
        return Err(Error::KvmUnfit(format!("runs at most {max} CPUs in a VM")));
    }
    Ok(kvm)
}

/// The CPUs, the first of which is to start at `entry`.
fn build_vcpus(
    kvm: &Kvm,
    vm: &VmFd,
    mem: &GuestMemory,
    cpus: u8,
    entry: Entry,
) -> Result<Vec<Vcpu>> {
    let supported = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .context("tell the features of CPUs")?;
    let bits = cpuid::physical_address_bits(&supported);
    if memory::last(mem).checked_shr(bits).unwrap_or(0) != 0 {
        return Err(Error::KvmUnfit(format!(
            "has physical addresses of {bits} bits: that is too few for so much memory"
        )));
    }
    let deadline_timer = vm.check_extension(Cap::TscDeadlineTimer);
    let vcpus = (0..cpus)
        .map(|index| {
            let cpuid = cpuid::for_cpu(&supported, index, cpus, deadline_timer);
            Vcpu::new(vm, index, &cpuid)
        })
        .collect::<Result<Vec<_>>>()?;
    if let Some(boot_cpu) = vcpus.first() {
        boot_cpu.set_entry(entry)?;
    }
    Ok(vcpus)
}

/// Everything behind port I/O, and the console's input.
fn build_ports(vm: &VmFd, config: &Config, exit: &Arc<Exit>) -> Result<(Bus, Option<InputPort>)> {
    let power: PowerHandler = Arc::new({
        let exit = exit.clone();
        move |event| {
            exit.end(Ok(match event {
                PowerEvent::Off => ExitReason::PowerOff,
                PowerEvent::Reset => ExitReason::Reset,
            }));
        }
    });
    let console = console::open_console(&config.serial, exit)?;
    let (base, (serial, ready)) = serial_port(vm, layout::CONSOLE, console)?;
    let mut devices: Vec<(u16, u64, Arc<dyn BusDevice>)> = vec![
        (base, SerialPort::REGION_SIZE, serial.clone()),
        (
            layout::KEYBOARD_PORT,
            Keyboard::REGION_SIZE,
            Arc::new(Keyboard::new(power.clone())),
        ),
        (
            layout::POWER_PORT,
            AcpiPower::REGION_SIZE,
            Arc::new(AcpiPower::new(power)),
        ),
        (
            ConfigAddress::PORT,
            ConfigAddress::REGION_SIZE,
            Arc::new(ConfigAddress::default()),
        ),
    ];
    if let Some(output) = &config.output {
        let output = console::open_output(output, exit)?;
        let (base, (port, _)) = serial_port(vm, layout::OUTPUT, output)?;
        devices.push((base, SerialPort::REGION_SIZE, port));
    }
    if config.exit_port {
        let status = StatusLine::new(exit.clone());
        let (base, (port, _)) = serial_port(vm, layout::EXIT, Box::new(status))?;
        devices.push((base, SerialPort::REGION_SIZE, port));
    }
    let mut ports = Bus::new();
    for (base, len, device) in devices {
        ports
            .insert(u64::from(base), len, device)
            .map_err(io::Error::other)
            .host("place a device")?;
    }
    let has_input = config.serial == SerialConfig::Stdio;
    Ok((ports, has_input.then_some((serial, ready))))
}

/// One of the serial ports of a PC, and where its registers are.
fn serial_port(
    vm: &VmFd,
    number: usize,
    output: Box<dyn Write + Send>,
) -> Result<(u16, InputPort)> {
    let irq = interrupts::line(vm, layout::SERIAL_GSIS[number])?;
    let port = SerialPort::new(irq, output).host("make a serial port")?;
    Ok((layout::SERIAL_PORTS[number], port))
}

/// Wakes the event loop at the end of the VM.
struct Watch(Arc<Exit>);

impl MutEventSubscriber for Watch {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::new(&*self.0, EventSet::IN)) {
            self.0
                .end(Err(io::Error::other(e)).host("wait for the end of the VM"));
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {}
}

/// Ends the VM on a signal, or does what SIGUSR1 is for.
struct SignalWatch {
    signals: Signals,
    on_usr1: OnUsr1,
    exit: Arc<Exit>,
}

impl MutEventSubscriber for SignalWatch {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::new(&self.signals, EventSet::IN)) {
            self.exit
                .end(Err(io::Error::other(e)).host("wait for signals"));
        }
    }

    fn process(&mut self, _: Events, _: &mut EventOps) {
        match self.signals.next() {
            Some(libc::SIGUSR1) => (self.on_usr1)(),
            Some(number) => self.exit.end(Ok(ExitReason::Signal(number))),
            None => {}
        }
    }
}
