//! A machine that is operated while it runs, by its control socket.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::Duration;

use common::driver::{self, DISK};
use common::{COM1, Code, Ended, Guest, await_text, have_kvm, run, send_signal, wait};
use serde_json::{Value, json};
use tandem_vmm::control::VmState;
use tandem_vmm::{Config, ControlError, ExitReason, SerialConfig, Vmm};

/// A `tandem` that runs, with a raw disk of 4 KiB and a control socket.
struct Machine {
    guest: Guest,
    /// `None` when it has been waited for.
    child: Option<Child>,
}

/// A test that fails does not leave it running.
impl Drop for Machine {
    fn drop(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill().and_then(|()| child.wait());
        }
    }
}

impl Machine {
    fn start(code: &Code, arguments: &[&str]) -> Self {
        let guest = Guest::new(code);
        let disk = guest.path("disk");
        fs::write(&disk, [0; 4096]).unwrap();
        let mut command = guest.command();
        command.arg("--control").arg(guest.path("socket"));
        let disk = format!("{},format=raw", disk.display());
        command.arg("--disk").arg(disk).args(arguments);
        Self::spawn(guest, command)
    }

    fn spawn(guest: Guest, mut command: Command) -> Self {
        let child = Some(command.spawn().unwrap());
        Self { guest, child }
    }

    fn child(&mut self) -> &mut Child {
        self.child.as_mut().unwrap()
    }

    fn await_text(&mut self, text: &str) {
        await_text(self.child().stdout.as_mut().unwrap(), text);
    }

    fn wait(&mut self) -> Ended {
        wait(self.child.take().unwrap())
    }

    fn ask(&self, request: &Value) -> Value {
        let mut stream = UnixStream::connect(self.guest.path("socket")).unwrap();
        stream.write_all(format!("{request}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// `tandem control` in the guest's directory, with the socket behind the options.
    fn control_command(&self, arguments: &[&str]) -> Ended {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        let options = arguments.iter().take_while(|a| a.starts_with('-')).count();
        command.current_dir(&self.guest.dir).arg("control");
        command.args(&arguments[..options]).arg("socket");
        command.args(&arguments[options..]);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        run(command)
    }

    /// What `tandem control` prints.
    fn control(&self, arguments: &[&str]) -> Value {
        let ended = self.control_command(arguments);
        ended.assert_quiet(0);
        serde_json::from_str(&ended.stdout).unwrap()
    }

    /// Has the VM carry out `command`, which leaves it in `state`.
    fn change(&self, command: &str, state: &str) {
        let answer = self.ask(&json!({"command": command}));
        assert_eq!(answer, json!({"ok": {"state": state}}), "{command}");
    }
}

/// Prints one x after the other.
fn print_for_ever() -> Code {
    // again: out dx, al; jmp again
    Code::default().out(COM1, b'x').raw(&[0xee, 0xeb, 0xfd])
}

#[test]
fn a_guest_that_is_paused_does_nothing() {
    if !have_kvm() {
        return;
    }
    let mut machine = Machine::start(&print_for_ever(), &["--cpus=3"]);
    machine.await_text("x");
    let mut stdout = machine.child().stdout.take().unwrap();
    let output = stdout.as_fd().try_clone_to_owned().unwrap();
    let printed = Arc::new(AtomicU64::new(0));
    let counter = printed.clone();
    thread::spawn(move || {
        let mut bytes = [0; 4096];
        while let Ok(count @ 1..) = stdout.read(&mut bytes) {
            counter.fetch_add(count as u64, Ordering::SeqCst);
        }
    });
    let printed = || printed.load(Ordering::SeqCst);
    for _ in 0..3 {
        machine.change("pause", "paused");
        machine.change("pause", "paused");
        // What was printed before may still be in the pipe, or on its way to the counter.
        while rustix::io::ioctl_fionread(&output).unwrap() > 0 {
            thread::yield_now();
        }
        thread::sleep(Duration::from_millis(10));
        let before = printed();
        thread::sleep(Duration::from_millis(50));
        assert_eq!(printed(), before);
        let status = machine.ask(&json!({"command": "status"}));
        assert_eq!(status["ok"]["state"], "paused");
        assert_eq!(status["ok"]["cpus"], 3);
        machine.change("resume", "running");
        machine.change("resume", "running");
        while printed() == before {
            thread::yield_now();
        }
    }
    machine.change("shutdown", "ended");
    machine.wait().assert_quiet(0);
    assert!(!machine.guest.path("socket").exists());
}

#[test]
fn a_guest_whose_output_nobody_reads_can_be_paused() {
    if !have_kvm() {
        return;
    }
    let mut machine = Machine::start(&print_for_ever(), &[]);
    machine.await_text("x");
    // More than a pipe holds.
    thread::sleep(Duration::from_millis(500));
    machine.change("pause", "paused");
    machine.change("resume", "running");
    machine.change("pause", "paused");
    machine.change("shutdown", "ended");
    machine.wait().assert_quiet(0);
}

#[test]
fn signals_end_a_machine_that_is_paused() {
    if !have_kvm() {
        return;
    }
    let sleep = Code::default().print("ready").sleep();
    let mut machine = Machine::start(&sleep, &["--cpus=2"]);
    machine.await_text("ready");
    machine.change("pause", "paused");
    send_signal(machine.child(), libc::SIGTERM);
    machine.wait().assert_killed(libc::SIGTERM);
    assert!(!machine.guest.path("socket").exists());
}

#[test]
fn input_waits_until_the_guest_goes_on() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(&Code::default().print("ready").echo_until(b'q').power_off());
    let mut command = guest.command();
    command.arg("--control").arg(guest.path("socket"));
    command.stdin(Stdio::piped());
    let mut machine = Machine::spawn(guest, command);
    machine.await_text("ready");
    machine.change("pause", "paused");
    let mut stdin = machine.child().stdin.take().unwrap();
    stdin.write_all(b"abcq").unwrap();
    // By the time of the answer it may have ended.
    assert!(machine.ask(&json!({"command": "resume"}))["ok"].is_object());
    let ended = machine.wait();
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "abcq");
}

#[test]
fn a_disk_that_grows_interrupts_its_driver_which_finds_the_size() {
    if !have_kvm() {
        return;
    }
    // again: mov eax, [rbx + InterruptStatus]; test al, 2; jz again
    let changed = Code::default().raw(&[0x8b, 0x43, 0x60, 0xa8, 2, 0x74, 0xf9]);
    let code = driver::start(&Code::default())
        .print("ready")
        .raw(&changed.0);
    // The number of sectors.
    let code = driver::print_byte(code, DISK + 0x100).power_off();
    let mut machine = Machine::start(&code, &[]);
    machine.await_text("ready");
    let size = 512 * u64::from(b'A');
    let resize = json!({"id": 7, "command": "resize", "disk": "vda", "size": size});
    let answer = machine.ask(&resize);
    assert_eq!(answer, json!({"id": 7, "ok": {"size": size}}));
    let ended = machine.wait();
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "A");
    assert_eq!(
        fs::metadata(machine.guest.path("disk")).unwrap().len(),
        size
    );
}

/// A loop device over a file, both of which go with this.
struct LoopDevice {
    path: String,
    file: tempfile::NamedTempFile,
}

impl LoopDevice {
    /// `None` where there are no loop devices to be had, unless `TANDEM_REQUIRE_LOOP` is 1.
    fn new(size: u64) -> Option<Self> {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(size).unwrap();
        let mut losetup = Command::new("losetup");
        let output = losetup.args(["--find", "--show"]).arg(file.path()).output();
        let output = output.ok().filter(|output| output.status.success());
        let is_required = std::env::var_os("TANDEM_REQUIRE_LOOP").is_some_and(|v| v == "1");
        assert!(output.is_some() || !is_required, "no loop device");
        let path = String::from_utf8(output?.stdout).unwrap();
        Some(Self {
            path: path.trim().to_owned(),
            file,
        })
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("-d").arg(&self.path).status();
    }
}

#[test]
fn a_disk_grows_with_its_block_device() {
    let Some(device) = LoopDevice::new(4096).filter(|_| have_kvm()) else {
        println!("skipped: no loop device, or no KVM");
        return;
    };
    // again: mov eax, [rbx + InterruptStatus]; test al, 2; jz again
    let changed = Code::default().raw(&[0x8b, 0x43, 0x60, 0xa8, 2, 0x74, 0xf9]);
    let code = driver::start(&Code::default())
        .print("ready")
        .raw(&changed.0);
    // The number of sectors.
    let code = driver::print_byte(code, DISK + 0x100).power_off();
    let guest = Guest::new(&code);
    let mut command = guest.command();
    let disk = format!("{},format=raw", device.path);
    command.arg("--disk").arg(disk);
    let mut machine = Machine::spawn(guest, command);
    machine.await_text("ready");
    device
        .file
        .as_file()
        .set_len(512 * u64::from(b'A'))
        .unwrap();
    let losetup = Command::new("losetup").arg("-c").arg(&device.path).status();
    assert!(losetup.unwrap().success());
    let ended = machine.wait();
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "A");
}

#[test]
fn requests_wait_while_the_machine_is_paused() {
    if !have_kvm() {
        return;
    }
    const READS: u8 = 8;
    let code = driver::offer(driver::start(&driver::prepare_read()), READS).print("ready");
    let code = driver::await_used(code, READS).print("done").power_off();
    let guest = Guest::new(&code);
    fs::write(guest.path("disk"), [0; 4096]).unwrap();
    let mut command = guest.command();
    let disk = format!("{},format=raw,iops=10", guest.path("disk").display());
    command.arg("--disk").arg(disk);
    command.arg("--control").arg(guest.path("socket"));
    let mut machine = Machine::spawn(guest, command);
    machine.await_text("ready");
    // The limit on the rate keeps most of the requests waiting.
    machine.change("pause", "paused");
    let reads = |machine: &Machine| {
        let metrics = machine.ask(&json!({"command": "metrics"}));
        metrics["ok"]["disks"][0]["total"]["reads"]
            .as_u64()
            .unwrap()
    };
    let before = reads(&machine);
    assert_eq!(machine.ask(&json!({"command": "flush"})), json!({"ok": {}}));
    thread::sleep(Duration::from_millis(250));
    assert_eq!(reads(&machine), before);
    machine.change("resume", "running");
    let ended = machine.wait();
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "done");
}

#[test]
fn a_program_that_embeds_it_has_the_same_means() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(&Code::default().power_off());
    let mut config = Config::new(&guest.kernel);
    config.memory = 8 << 20;
    config.serial = SerialConfig::None;
    let vmm = Vmm::build(&config).unwrap();
    let control = vmm.control();
    control.pause().unwrap();
    let (sender, ended) = std::sync::mpsc::channel();
    thread::spawn(move || sender.send(vmm.run()));
    let early = ended.recv_timeout(Duration::from_millis(100));
    assert!(early.is_err(), "{early:?}");
    assert_eq!(control.state(), VmState::Paused);
    control.resume().unwrap();
    assert_eq!(ended.recv().unwrap().unwrap(), ExitReason::PowerOff);
    assert_eq!(control.state(), VmState::Ended);
    assert!(matches!(control.pause(), Err(ControlError::Ended)));

    let sleep = Guest::new(&Code::default().sleep());
    config.kernel = sleep.kernel.clone();
    let vmm = Vmm::build(&config).unwrap();
    let control = vmm.control();
    let running = thread::spawn(move || vmm.run());
    control.shut_down();
    assert_eq!(running.join().unwrap().unwrap(), ExitReason::Stopped);
}

#[test]
fn the_guest_finds_as_many_queues_as_are_asked_for() {
    if !have_kvm() {
        return;
    }
    let read = driver::print_byte(Code::default(), DISK + 0x122);
    let code = driver::print_byte(read, DISK + 0x123).power_off();
    for (keys, cpus, queues) in [("", "3", 3), (",queues=5", "2", 5), (",queues=32", "1", 32)] {
        let guest = Guest::new(&code);
        fs::write(guest.path("disk"), [0; 4096]).unwrap();
        let mut command = guest.command();
        let disk = format!("{},format=raw{keys}", guest.path("disk").display());
        let ended = run({
            command.arg("--disk").arg(disk).args(["--cpus", cpus]);
            command
        });
        ended.assert_quiet(0);
        assert_eq!(ended.stdout.as_bytes(), [queues, 0]);
    }
}

#[test]
fn a_socket_in_use_is_refused() {
    if !have_kvm() {
        return;
    }
    let sleep = Code::default().print("ready").sleep();
    let mut machine = Machine::start(&sleep, &[]);
    machine.await_text("ready");
    let socket = machine.guest.path("socket");
    let mode = fs::symlink_metadata(&socket).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let mut second = machine.guest.command();
    second.arg("--control").arg(&socket);
    run(second).assert_says(1, "another process listens on it");

    // A machine that is killed leaves its socket, and the next one takes its place.
    machine.child().kill().unwrap();
    machine.wait();
    assert!(socket.exists());
    let next = Guest::new(&Code::default().power_off());
    let mut command = next.command();
    command.arg("--control").arg(&socket);
    run(command).assert_quiet(0);
    assert!(!socket.exists());
}

/// The images of a disk change while the machine is confined to its files.
#[test]
fn images_change_under_a_guest() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(&print_for_ever());
    let path = |name: &str| guest.path(name);
    fs::write(path("disk"), vec![7; 65536]).unwrap();
    let mut command = guest.command();
    command.arg("--control").arg(path("socket"));
    command
        .arg("--allow-dir")
        .arg(path("disk").parent().unwrap());
    let disk = format!("{},format=raw,cache=none", path("disk").display());
    command.arg("--disk").arg(disk);
    let mut machine = Machine::spawn(guest, command);
    machine.await_text("x");
    let path = |name: &str| machine.guest.path(name);
    for [overlay, other] in [["a", "b"], ["c", "d"]] {
        let arguments = [&format!("overlay={overlay}"), &format!("fork={other}")];
        let forked = machine.control(&["fork", "disk=vda", arguments[0], arguments[1]]);
        assert!(forked["stopped_us"].is_u64(), "{forked}");
        let disks = machine.control(&["disks"]);
        assert_eq!(disks["disks"][0]["path"], json!(path(overlay)));
    }
    for arguments in [
        &["--wait", "commit", "disk=vda", "pivot=false"][..],
        &["--wait", "commit", "disk=0", "pivot=true"],
        &["--wait", "rebase", "disk=vda", "backing="],
    ] {
        let job = machine.control(arguments);
        assert_eq!(job["state"], "done", "{job}");
    }
    let outside = std::env::temp_dir().join("tandem-test-of-an-image-that-is-not-allowed");
    let fork = json!({"command": "fork", "disk": "vda", "overlay": outside, "fork": path("e")});
    let refused = machine.ask(&fork)["error"]["message"].to_string();
    assert!(refused.contains("Permission denied"), "{refused}");
    machine.change("shutdown", "ended");
    machine.wait().assert_quiet(0);
}

#[test]
fn a_machine_is_operated_from_a_shell() {
    if !have_kvm() {
        return;
    }
    let mut machine = Machine::start(&print_for_ever(), &[]);
    machine.await_text("x");
    assert_eq!(machine.control(&["pause"]), json!({"state": "paused"}));
    let resize = ["resize", "disk=vda", "size=64K"];
    assert_eq!(machine.control(&resize), json!({"size": 65536}));
    let resize = ["resize", "disk=0", "size=8192", "shrink=true"];
    assert_eq!(machine.control(&resize), json!({"size": 8192}));
    for (arguments, status, says) in [
        (&["resize", "disk=vda", "size=4096"][..], 1, "shrink"),
        (&["resize", "disk=vdb", "size=1M"], 1, "vdb"),
        (&["--wait", "commit", "disk=vda"], 1, "a raw disk"),
        (
            &["backup-read", "backup=1", "from=0"],
            1,
            "tandem-img backup",
        ),
    ] {
        machine.control_command(arguments).assert_says(status, says);
    }
    let wrong = machine.control_command(&["resize", "disk"]);
    assert_eq!(wrong.status.code(), Some(2), "{wrong:?}");
    assert!(wrong.stderr.contains("ARGUMENT=VALUE"), "{wrong:?}");
    assert_eq!(machine.control(&["shutdown"]), json!({"state": "ended"}));
    machine.wait().assert_quiet(0);
    let gone = machine.control_command(&["status"]);
    gone.assert_says(1, "'socket': Could not connect: No such file");
}

/// An answer that is none is no success.
#[test]
fn the_socket_of_another_program_is_told_apart() {
    let dir = tempfile::tempdir().unwrap();
    let listener = UnixListener::bind(dir.path().join("socket")).unwrap();
    for answer in ["{\"return\": {}}", "{\"error\": \"no\"}", "[1]", "7"] {
        let ended = thread::scope(|scope| {
            scope.spawn(|| {
                let (mut stream, _) = listener.accept().unwrap();
                let mut request = String::new();
                BufReader::new(&stream).read_line(&mut request).unwrap();
                writeln!(stream, "{answer}").unwrap();
            });
            let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
            command
                .current_dir(&dir)
                .args(["control", "socket", "status"]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            run(command)
        });
        ended.assert_says(1, "this is not its socket");
    }
}
