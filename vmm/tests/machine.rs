//! The whole machine on the host's KVM, with guests of a few instructions.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::io::Write;
use std::process::Stdio;

use common::driver;
use common::{
    COM1, Code, Guest, KEYBOARD_COMMAND, POWER, RESET, await_text, elf, have_kvm, run, send_signal,
    wait,
};

#[test]
fn power_off_ends_with_status_0() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(
        &Code::default()
            .print("hello\r\n")
            .power_off()
            .print("never"),
    );
    let ended = run(guest.command());
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "hello\r\n");
}

#[test]
fn pvh_entry() {
    if !have_kvm() {
        return;
    }
    // inc eax encodes as 0x40, which is a prefix in 64-bit mode: 0x40 0x90 there is a nop.
    // xor eax, eax; inc eax; nop; test al, al; jnz over the ud2
    let code = Code::default().raw(&[0x31, 0xc0, 0x40, 0x90, 0x84, 0xc0, 0x75, 2, 0x0f, 0x0b]);
    let code = code.print("32 bits").power_off();
    let ended = run(Guest::from_file(&elf(&code, true)).command());
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "32 bits");
    // The same code enters in 64-bit mode without the note, and then breaks.
    run(Guest::new(&code).command()).assert_says(1, "triple fault on CPU 0");
}

#[test]
fn both_ways_to_restart_end_with_status_0() {
    if !have_kvm() {
        return;
    }
    for (port, value) in [(POWER, RESET), (KEYBOARD_COMMAND, 0xfe)] {
        let code = Code::default().print("bye").out(port, value).print("never");
        let ended = run(Guest::new(&code).command());
        ended.assert_quiet(0);
        assert_eq!(ended.stdout, "bye");
    }
}

#[test]
fn triple_fault_is_an_error() {
    if !have_kvm() {
        return;
    }
    // ud2, without a table of handlers
    let guest = Guest::new(&Code::default().print("x").raw(&[0x0f, 0x0b]));
    let ended = run(guest.command());
    ended.assert_says(1, "triple fault on CPU 0");
    assert_eq!(ended.stdout, "x");
}

#[test]
fn nothing_answers_elsewhere() {
    if !have_kvm() {
        return;
    }
    // mov edx, 0xcf8; in al, dx; mov dx, COM1; out dx, al: an absent device reads 0xff.
    let code = Code::default()
        .out(0xcf8, 0)
        .raw(&[
            0x66, 0xba, 0xf8, 0x0c, 0xec, 0x66, 0xba, 0xf8, 0x03, 0xfe, 0xc0, 0x04, b'A', 0xee,
        ])
        .power_off();
    let ended = run(Guest::new(&code).command());
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "A");
}

#[test]
fn console_in_a_pipe() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(&Code::default().echo_until(b'q').power_off());
    // Much more than the receiver's FIFO holds.
    let text = "0123456789abcdef".repeat(64) + "q";
    let mut command = guest.command();
    command.stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(text.as_bytes()).unwrap();
    let ended = wait(child);
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, text);
}

#[test]
fn console_from_a_file_and_to_a_file() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(&Code::default().echo_until(b'q').power_off());
    let input = guest.path("input");
    let text = "fedcba9876543210".repeat(64) + "q";
    std::fs::write(&input, &text).unwrap();
    let mut command = guest.command();
    command.stdin(std::fs::File::open(&input).unwrap());
    let ended = run(command);
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, text);

    let guest = Guest::new(&Code::default().print("to a file").power_off());
    let log = guest.path("log");
    let mut command = guest.command();
    command
        .arg("--serial")
        .arg(format!("file={}", log.display()));
    let ended = run(command);
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "");
    assert_eq!(std::fs::read(&log).unwrap(), b"to a file");

    let mut command = guest.command();
    command.args(["--serial", "none"]);
    let ended = run(command);
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "");
}

#[test]
fn closed_output_does_not_end_the_guest() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(&Code::default().echo_until(b'q').power_off());
    let mut command = guest.command();
    command.stdin(Stdio::piped());
    let mut child = command.spawn().unwrap();
    drop(child.stdout.take());
    child.stdin.take().unwrap().write_all(b"lost, q").unwrap();
    wait(child).assert_quiet(0);
}

#[test]
fn signals_end_a_sleeping_and_a_spinning_guest() {
    if !have_kvm() {
        return;
    }
    let sleep = Code::default().print("ready").sleep();
    let spin = Code::default().print("ready").raw(&[0xeb, 0xfe]);
    for code in [sleep, spin] {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            let guest = Guest::new(&code);
            let mut child = guest.command().spawn().unwrap();
            await_text(child.stdout.as_mut().unwrap(), "ready");
            send_signal(&child, signal);
            wait(child).assert_killed(signal);
        }
    }
}

#[test]
fn a_signal_ends_a_guest_whose_output_nobody_reads() {
    if !have_kvm() {
        return;
    }
    // mov dx, COM1; mov al, 'x'; again: out dx, al; jmp again
    let code = Code::default().out(COM1, b'x').raw(&[0xee, 0xeb, 0xfd]);
    let guest = Guest::new(&code);
    let mut child = guest.command().spawn().unwrap();
    let mut stdout = child.stdout.take().unwrap();
    await_text(&mut stdout, "x");
    // More than a pipe holds.
    std::thread::sleep(std::time::Duration::from_secs(1));
    send_signal(&child, libc::SIGTERM);
    wait(child).assert_killed(libc::SIGTERM);
}

#[test]
fn disks_are_where_the_tables_say() {
    if !have_kvm() {
        return;
    }
    let mut code = Code::default();
    for base in [0xd000_0000u32, 0xd000_1000] {
        // mov eax, [rbx]; mov dx, COM1; four times: out dx, al; shr eax, 8
        code = code
            .mov_ebx(base)
            .raw(&[0x8b, 0x03, 0x66, 0xba, 0xf8, 0x03]);
        code = code.raw(&[0xee, 0xc1, 0xe8, 8].repeat(4));
    }
    let guest = Guest::new(&code.power_off());
    let mut command = guest.command();
    for name in ["a", "b,c"] {
        std::fs::write(guest.path(name), [0; 4096]).unwrap();
        let path = guest.path(name).display().to_string().replace(',', ",,");
        command.arg("--disk").arg(format!("{path},format=raw"));
    }
    let ended = run(command);
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "virtvirt");
}

/// A driver for the first disk that claims to have offered more requests than its queue holds.
fn break_ring() -> Code {
    // The index is the upper half.
    let claim = Code::default()
        .mov_ebx(driver::AVAILABLE)
        .store(0, 100 << 16);
    // again: mov eax, [rbx + Status]; test al, DEVICE_NEEDS_RESET; jz again
    driver::start(&claim).raw(&[0x8b, 0x43, 0x70, 0xa8, 0x40, 0x74, 0xf9])
}

#[test]
fn last_error_of_a_disk_is_told_at_the_end() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(&break_ring().print("broken").power_off());
    let mut command = guest.command();
    let (bad, good) = (guest.path("bad"), guest.path("good"));
    for path in [&bad, &good] {
        std::fs::write(path, [0; 4096]).unwrap();
        command
            .arg("--disk")
            .arg(format!("{},format=raw", path.display()));
    }
    let ended = run(command);
    ended.assert_says(
        0,
        &format!("tandem: disk '{}': last error: ", bad.display()),
    );
    assert_eq!(ended.stdout, "broken");
}

#[test]
fn there_is_room_for_all_queues_of_all_disks() {
    if !have_kvm() {
        return;
    }
    let guest = Guest::new(&Code::default().print("ready").power_off());
    // In a process that may have fewer files open than it asks for.
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "ulimit -S -n 1024; exec \"$0\" \"$@\""]);
    let mut command = guest.command();
    for index in 0..tandem_vmm::Config::MAX_DISKS {
        let path = guest.path(&index.to_string());
        std::fs::write(&path, [0; 4096]).unwrap();
        let disk = format!("{},format=raw,queues=32", path.display());
        command.arg("--disk").arg(disk);
    }
    shell.arg(command.get_program()).args(command.get_args());
    shell.stdin(Stdio::null());
    shell.stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = run(shell);
    ended.assert_quiet(0);
    assert_eq!(ended.stdout, "ready");
}
