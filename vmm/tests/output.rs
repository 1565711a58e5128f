//! The second serial port, the exit status, and the examples that use them.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "what fails here fails the test"
)]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;
#[path = "../examples/fifty.rs"]
#[allow(dead_code, reason = "the example is a program, too")]
mod fifty;

use std::fs::{self, File};
use std::process::{Command, Stdio};
use std::time::Duration;

use common::{Code, Ended, Guest, await_text, have_kvm, run, send_signal, wait};
use fifty::sandbox;
use tandem_vmm::ExitReason;

const COM2: u16 = 0x2f8;
const COM3: u16 = 0x3e8;

/// Writes `text` to a serial port.
fn write(code: Code, port: u16, text: &str) -> Code {
    text.bytes().fold(code, |code, byte| code.out(port, byte))
}

fn say(code: Code, text: &str) -> Code {
    write(code, COM2, text)
}

/// A guest that writes to each serial port, `status` to the third one, and powers off.
fn talker(status: u8) -> Guest {
    let code = say(Code::default().print("console"), "output\n");
    let code = write(code, COM3, &format!("{status}\r\n"));
    Guest::new(&code.power_off())
}

fn run_with(guest: &Guest, arguments: &[&str]) -> Ended {
    let mut command = guest.command();
    command.args(arguments);
    run(command)
}

#[test]
fn the_exit_status_is_the_guests() {
    if !have_kvm() {
        return;
    }
    for status in [0, 1, 2, 42, 125, 255] {
        let guest = talker(status);
        let ended = run_with(&guest, &["--serial=none", "--output=stdout", "--exit-port"]);
        ended.assert_quiet(status.into());
        assert_eq!(ended.stdout, "output\n");
    }
    let ended = run_with(&talker(7), &["--exit-port"]);
    ended.assert_quiet(7);
    assert_eq!(ended.stdout, "console");
}

#[test]
fn without_the_options_there_are_no_such_ports() {
    if !have_kvm() {
        return;
    }
    for arguments in [&[] as &[_], &["--exit-port=false"]] {
        let ended = run_with(&talker(7), arguments);
        ended.assert_quiet(0);
        assert_eq!(ended.stdout, "console");
    }
    // in al, dx; out dx, al: what is read of the line status, or of nothing, goes to the console.
    let status = Code::default().raw(&[0x66, 0xba, 0xfd, 0x02, 0xec, 0x66, 0xba, 0xf8, 0x03, 0xee]);
    let guest = Guest::new(&status.power_off());
    for (arguments, expected) in [
        (&["--serial", "@"] as &[&str], 0xff),
        (&["--serial", "@", "--output=stdout"], 0x60),
    ] {
        let log = guest.path("log");
        let file = format!("file={}", log.display());
        let arguments: Vec<_> = arguments.iter().map(|a| a.replace('@', &file)).collect();
        let arguments: Vec<_> = arguments.iter().map(String::as_str).collect();
        run_with(&guest, &arguments).assert_quiet(0);
        assert_eq!(fs::read(&log).unwrap(), [expected]);
    }
}

#[test]
fn what_is_not_the_guests_status_is_125() {
    if !have_kvm() {
        return;
    }
    let none = "the machine has ended without an exit status of the guest";
    let off = Guest::new(&Code::default().power_off());
    run_with(&off, &["--exit-port"]).assert_says(125, none);
    let fault = Guest::new(&Code::default().raw(&[0x0f, 0x0b]));
    run_with(&fault, &["--exit-port"]).assert_says(125, "triple fault on CPU 0");
    run_with(&off, &["--exit-port", "--disk=/none"]).assert_says(125, "/none");
    let long = "x".repeat(2048);
    run_with(&off, &["--exit-port", "--cmdline", &long]).assert_says(2, "the kernel takes 2047");
    let sleep = Guest::new(&Code::default().print("ready").sleep());
    let mut command = sleep.command();
    let mut child = command.arg("--exit-port").spawn().unwrap();
    await_text(child.stdout.as_mut().unwrap(), "ready");
    send_signal(&child, libc::SIGTERM);
    wait(child).assert_killed(libc::SIGTERM);
}

#[test]
fn output_goes_to_a_file_or_an_inherited_descriptor() {
    if !have_kvm() {
        return;
    }
    let guest = talker(0);
    let log = guest.path("log");
    let file = format!("--output=file={}", log.display());
    let ended = run_with(&guest, &[&file, "--exit-port"]);
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "console");
    assert_eq!(fs::read(&log).unwrap(), b"output\n");

    // The shell opens it, and leaves it open.
    let mut shell = Command::new("sh");
    let tandem = guest.command();
    shell.args(["-c", "exec 7>\"$0\"; exec \"$@\" --output=fd=7"]);
    shell.arg(guest.path("seven")).arg(tandem.get_program());
    shell.args(tandem.get_args());
    let output = shell.output().unwrap();
    assert!(output.status.success(), "{output:?}");
    assert_eq!(output.stdout, b"console");
    assert_eq!(fs::read(guest.path("seven")).unwrap(), b"output\n");
}

#[test]
fn outputs_that_are_refused() {
    let guest = talker(0);
    // Without what whoever runs the tests may have open there. A disk would be opened under this number.
    fs::write(guest.path("raw"), [0; 512]).unwrap();
    let tandem = guest.command();
    let mut shell = Command::new("sh");
    shell.args([
        "-c",
        "exec 5>&-; exec \"$0\" \"$@\" --output=fd=5 --serial=none",
    ]);
    shell.arg(tandem.get_program()).args(tandem.get_args());
    shell.arg(format!("--disk={},format=raw", guest.path("raw").display()));
    shell.stdin(Stdio::null()).stdout(Stdio::piped());
    shell.stderr(Stdio::piped());
    run(shell).assert_says(1, "could not send output to fd=5: Bad file descriptor");
    let input = File::open(guest.path("raw")).unwrap();
    let mut command = guest.command();
    command.stdin(input).arg("--output=fd=0");
    run(command).assert_says(
        1,
        "could not send output to fd=0: it is open for reading only",
    );
    run_with(&guest, &["--output=stdout"]).assert_says(2, "with --serial none");
    assert_eq!(fs::read(guest.path("raw")).unwrap(), [0; 512]);
    if have_kvm() {
        let none = run_with(&guest, &["--output=file=/none/x"]);
        none.assert_says(1, "could not create '/none/x'");
    }
}

/// What the examples have in common with a guest that is no Linux.
fn setting(guest: &Guest) -> sandbox::Setting {
    let base = guest.path("base");
    fs::write(&base, [7; 4096]).unwrap();
    sandbox::Setting {
        kernel: guest.kernel.clone(),
        initrd: None,
        base,
        scratch: None,
        limit: Duration::from_secs(60),
    }
}

#[test]
fn a_sandbox_has_output_and_a_status() {
    if !have_kvm() {
        return;
    }
    let guest = talker(42);
    let outcome = sandbox::Guest::build(&setting(&guest), "true").unwrap();
    let outcome = outcome.run().unwrap();
    assert_eq!(
        (&*outcome.output, outcome.status),
        (&b"output\n"[..], Ok(42))
    );

    let guest = Guest::new(&say(Code::default(), "x").power_off());
    let outcome = sandbox::Guest::build(&setting(&guest), "true").unwrap();
    let outcome = outcome.run().unwrap();
    assert_eq!(
        (&*outcome.output, outcome.status),
        (&b"x"[..], Err(ExitReason::PowerOff))
    );
    let names = fs::read_dir(guest.dir.path()).unwrap();
    assert_eq!(names.count(), 2, "the kernel and the base");
    assert_eq!(fs::read(guest.path("base")).unwrap(), [7; 4096]);
}

#[test]
fn a_sandbox_ends_when_its_time_is_up() {
    if !have_kvm() {
        return;
    }
    // One sleeps, and one writes without an end: again: out dx, al; jmp again
    let sleep = say(Code::default(), "z").sleep();
    let flood = Code::default().out(COM2, b'z').raw(&[0xee, 0xeb, 0xfd]);
    for code in [sleep, flood] {
        let guest = Guest::new(&code);
        let mut setting = setting(&guest);
        setting.limit = Duration::from_millis(500);
        let outcome = sandbox::Guest::build(&setting, "true").unwrap();
        let outcome = outcome.run().unwrap();
        assert_eq!(outcome.status, Err(ExitReason::Stopped));
        assert!(outcome.output.len() as u64 <= sandbox::MAX_OUTPUT);
    }
}

#[test]
fn fifty_guests_at_once() {
    if !have_kvm() {
        return;
    }
    let guest = talker(0);
    let setting = setting(&guest);
    let outcomes = fifty::run_all(&setting, "true", fifty::GUESTS).unwrap();
    assert_eq!(outcomes.len(), fifty::GUESTS);
    for outcome in outcomes {
        assert_eq!(
            (&*outcome.output, outcome.status),
            (&b"output\n"[..], Ok(0))
        );
    }
    let peak = fifty::peak_memory().unwrap();
    println!("at most {peak} MiB of memory");
    assert!(peak < fifty::GUESTS as u64 * 8, "{peak} MiB");
}
