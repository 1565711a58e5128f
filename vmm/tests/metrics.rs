//! What a machine tells of its disks.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "what fails here fails the test"
)]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::fs;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use common::driver;
use common::{Code, Ended, Guest, await_text, have_kvm, run, send_signal, wait};
use serde_json::{Value, json};

/// A guest that carries out `code`, and `tandem` with its disk.
fn guest(code: &Code) -> (Guest, Command) {
    let guest = Guest::new(code);
    fs::write(guest.path("disk"), [0; 4096]).unwrap();
    let mut command = guest.command();
    let disk = format!("{},format=raw,queues=2", guest.path("disk").display());
    command.arg("--disk").arg(disk);
    (guest, command)
}

/// Reads the first sector.
fn read() -> Code {
    let code = driver::offer(driver::start(&driver::prepare_read()), 1);
    driver::await_used(code, 1)
}

fn parse(line: &str) -> Value {
    serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"))
}

fn lines(text: &str) -> Vec<Value> {
    text.lines().map(parse).collect()
}

#[test]
fn a_file_gets_lines_at_intervals_and_one_at_the_end() {
    if !have_kvm() {
        return;
    }
    let (guest, mut command) = guest(&read().print("ready").echo_until(b'q').power_off());
    let path = guest.path("metrics");
    command.arg("--metrics").arg(&path);
    command.arg("--metrics-interval=1").stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    await_text(child.stdout.as_mut().unwrap(), "ready");
    while !fs::read_to_string(&path).unwrap().ends_with('\n') {
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    // The guest ends when its input says so.
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"q").unwrap();
    wait(child).assert_quiet(0);
    let lines = lines(&fs::read_to_string(&path).unwrap());
    assert!(lines.len() >= 2, "{lines:?}");
    assert_eq!(lines[0]["state"], "running");
    let last = lines.last().unwrap();
    assert_eq!(last["state"], "ended");
    assert_eq!(last["dropped_lines"], 0);
    let disk = &last["disks"][0];
    assert_eq!(disk["name"], "vda");
    assert_eq!(disk["path"], guest.path("disk").display().to_string());
    for (name, value) in [
        ("reads", 1),
        ("read_bytes", 512),
        ("writes", 0),
        ("failed", 0),
    ] {
        assert_eq!(disk["queues"][0][name], value, "{name}");
        assert_eq!(disk["queues"][1][name], 0, "{name}");
        assert_eq!(disk["total"][name], value, "{name}");
    }
    let latencies = disk["total"]["latency"].as_array().unwrap();
    assert_eq!(latencies.len(), 26);
    let sum: u64 = latencies.iter().filter_map(Value::as_u64).sum();
    assert_eq!(sum, 1);
    assert_eq!(disk["last_error"], Value::Null);
}

#[test]
fn sigusr1_has_a_line_printed_and_the_guest_goes_on() {
    if !have_kvm() {
        return;
    }
    let (_guest, mut command) = guest(&read().print("ready").echo_until(b'q').power_off());
    command.stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    await_text(child.stdout.as_mut().unwrap(), "ready");
    let mut stderr = BufReader::new(child.stderr.take().unwrap());
    for _ in 0..2 {
        send_signal(&child, libc::SIGUSR1);
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        assert_eq!(parse(&line)["disks"][0]["total"]["reads"], 1);
    }
    std::io::Write::write_all(child.stdin.as_mut().unwrap(), b"q").unwrap();
    assert_eq!(wait(child).status.code(), Some(0));
    let mut rest = String::new();
    stderr.read_line(&mut rest).unwrap();
    assert_eq!(rest, "", "without --metrics there is no line at the end");
}

/// Runs `command` with descriptor 7 leading where `redirection` says.
fn with_descriptor(command: &Command, redirection: &str) -> Ended {
    let mut shell = Command::new("sh");
    shell
        .arg("-c")
        .arg(format!("exec \"$0\" \"$@\" 7{redirection}"));
    shell.arg(command.get_program()).args(command.get_args());
    shell.stdin(Stdio::null());
    run({
        shell.stdout(Stdio::piped()).stderr(Stdio::piped());
        shell
    })
}

#[test]
fn a_descriptor_gets_the_last_line_if_it_can() {
    if !have_kvm() {
        return;
    }
    let (guest, mut command) = guest(&read().power_off());
    command.args(["--metrics=fd=7", "--metrics-interval=0"]);
    let path = guest.path("metrics");
    let ended = with_descriptor(&command, &format!(">'{}'", path.display()));
    ended.assert_quiet(0);
    let lines = lines(&fs::read_to_string(&path).unwrap());
    assert_eq!(lines.len(), 1);
    assert_eq!(lines[0]["disks"][0]["total"]["reads"], 1);

    with_descriptor(&command, ">/dev/full").assert_quiet(0);
    with_descriptor(&command, "</dev/null").assert_says(1, "fd=7: it is open for reading only");
    with_descriptor(&command, ">&-").assert_says(1, "fd=7: Bad file descriptor");
}

#[test]
fn what_goes_wrong_is_told() {
    if !have_kvm() {
        return;
    }
    // The available index is further ahead than the queue is long.
    let claim = Code::default()
        .mov_ebx(driver::AVAILABLE)
        .store(0, 100 << 16);
    // again: mov eax, [rbx + Status]; test al, DEVICE_NEEDS_RESET; jz again
    let code = driver::start(&claim).raw(&[0x8b, 0x43, 0x70, 0xa8, 0x40, 0x74, 0xf9]);
    let (guest, mut command) = guest(&code.power_off());
    let path = guest.path("metrics");
    command.arg("--metrics").arg(&path);
    let ended = run(command);
    let lines = lines(&fs::read_to_string(&path).unwrap());
    let disk = &lines.last().unwrap()["disks"][0];
    assert_eq!(disk["broken_rings"], json!(1));
    let error = disk["last_error"].as_str().unwrap();
    ended.assert_says(0, &format!("last error: {error}"));
}
