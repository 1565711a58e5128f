//! What `tandem` says when it cannot run what it is asked to.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::fs::Permissions;
use std::io::Write;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};

use common::{Code, Ended, Guest, run, tandem_run};

/// Runs `tandem run` with a good kernel and `arguments`, in which `@` stands for a directory that
/// holds the file `raw`.
fn run_with(arguments: &[&str]) -> Ended {
    let guest = Guest::new(&Code::default().power_off());
    std::fs::write(guest.path("raw"), [0; 4096]).unwrap();
    let directory = guest.dir.path().display().to_string();
    let mut command = tandem_run(&guest.kernel);
    command.args(arguments.iter().map(|a| a.replace('@', &directory)));
    run(command)
}

#[test]
fn wrong_arguments_end_with_status_2() {
    for (arguments, text) in [
        (
            &["--memory=512"] as &[_],
            "write a whole number and K, M, G or T",
        ),
        (&["--cpus=0"], "1..=32"),
        (&["--cpus=33"], "1..=32"),
        (
            &["--disk=a,aio=native"],
            "known are readonly, format, cache, locking, data-file, follow, backing-format, \
             overlay, overlay-data-file, overlay-dir, l2-cache-size, serial, queues, threads, poll, iops, iops-burst, bw and bw-burst",
        ),
        (
            &["--disk=a,cache=no"],
            "'no' is not writeback, none, writethrough, directsync or unsafe",
        ),
        (
            &["--disk=a,format=raw,data-file=b"],
            "a raw disk has no such thing",
        ),
        (&["--disk=a,serial=123456789012345678901"], "1 to 20"),
        (
            &["--disk=a,queues=64"],
            "disk key queues: '64' is not a whole number from 1 to 32",
        ),
        (
            &["--disk=a,iops=0"],
            "disk key iops: '0' is not a whole number from 1 to",
        ),
        (
            &["--disk=a,bw=100"],
            "disk key bw: '100' is not a size from 1K to 8192T with a unit, as in 100M",
        ),
        (
            &["--disk=a,overlay=temp,readonly=on"],
            "disk keys readonly=on and overlay exclude each other",
        ),
        (
            &["--disk=a,iops-burst=10"],
            "disk key iops-burst has no meaning without iops",
        ),
        (&["--metrics=fd=x"], "'fd=x' is neither a file nor fd=N"),
        (
            &["--metrics-interval=1"],
            "required arguments were not provided",
        ),
        (
            &["--metrics=m", "--metrics-interval=86401"],
            "86401 is not in 0..=86400",
        ),
        (&["--serial=tty"], "stdio, none or file=PATH"),
        (&["--bogus"], "unexpected argument"),
    ] {
        let ended = run_with(arguments);
        assert_eq!(ended.status.code(), Some(2), "{ended:?}");
        assert!(ended.stderr.contains(text), "{ended:?}");
    }
}

#[test]
fn impossible_machines_end_with_status_2() {
    for (arguments, text) in [
        (&["--memory=1M"] as &[_], "at least 2 MiB"),
        (&["--memory=4097K"], "multiple of 4 KiB"),
        (&["--cmdline", &"x".repeat(2048)], "the kernel takes 2047"),
        (&["--disk=@/raw,format=raw"; 20], "20 disks"),
    ] {
        run_with(arguments).assert_says(2, text);
    }
}

#[test]
fn what_cannot_be_run_ends_with_status_1() {
    for (arguments, text) in [
        (&["--disk=@/raw"] as &[_], "/raw,format=raw"),
        (
            &["--disk=@/raw,format=raw", "--disk=@/raw,format=raw"],
            "/raw': failed to get \"write\" lock; is another process using it?",
        ),
        (
            &["--disk=@/raw,format=raw,locking=force-share"],
            "force-share=on can only be used with read-only images",
        ),
        (&["--disk=@/none"], "could not open"),
        (&["--disk=@/none,format=raw"], "could not open"),
        (&["--initrd=@/none"], "/none'"),
        (&["--memory=8388608T"], "could not map"),
        (
            &["--metrics=@/raw"],
            "/raw': it holds something else than metrics",
        ),
        (&["--metrics=@/none/m"], "could not write metrics to '"),
        (
            &["--metrics=fd=999"],
            "could not write metrics to fd=999: Bad file descriptor",
        ),
    ] {
        run_with(arguments).assert_says(1, text);
    }
    let guest = Guest::from_file(b"#!/bin/sh\n");
    run(guest.command()).assert_says(1, "neither an ELF file (vmlinux) nor a bzImage");
    run(tandem_run(guest.dir.path())).assert_says(1, "not a regular file");
}

#[test]
fn help_tells_everything_there_is() {
    let help = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_tandem"))
            .args(arguments)
            .output()
            .unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let long = help(&["run", "--help"]);
    for text in [
        "data-file=PATH",
        "overlay=PATH|temp",
        "serial=ID",
        "queues=N",
        "threads=N",
        "iops=N",
        "iops-burst=N",
        "bw=SIZE",
        "bw-burst=SIZE",
        "poll=MICROSECONDS",
        "--metrics-interval",
        "SIGUSR1",
        "--control",
        "fork, commit, rebase",
        "--allow-dir",
        "--no-sandbox",
        "--output",
        "--exit-port",
        "--config",
        "--print-config",
        "SIGSYS",
        "cache=MODE",
        "locking=on|force-share|off",
        "Ctrl-A X",
        "Exit status",
        "Examples",
    ] {
        assert!(long.contains(text), "{text}");
    }
    assert!(long.contains(tandem_vmm::Config::DEFAULT_CMDLINE));
    let serve = help(&["serve", "--help"]);
    for text in ["--socket", "overlay=PATH|temp", "--no-sandbox", "SIGSYS"] {
        assert!(serve.contains(text), "{text}");
    }
    assert!(help(&["run", "-h"]).contains("Examples"));
    assert!(help(&["--help"]).contains("run"));
    for command in ["run", "serve", "control", "completions", "man"] {
        assert!(
            help(&[command, "--help"]).contains("Examples:"),
            "{command}"
        );
    }
    assert!(help(&["-h"]).contains("Examples:"));
}

/// The output of a shell that is given what `tandem` prints with `arguments`.
fn piped(arguments: &[&str], shell: &str) -> std::process::Output {
    let mut tandem = Command::new(env!("CARGO_BIN_EXE_tandem"));
    let mut tandem = tandem
        .args(arguments)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut shell = Command::new("sh")
        .args(["-c", shell])
        .stdin(tandem.stdout.take().unwrap())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    assert!(tandem.wait().unwrap().success());
    shell.wait().unwrap();
    shell.wait_with_output().unwrap()
}

#[test]
fn completions_for_each_shell() {
    for (shell, check, words) in [
        ("bash", "bash -n", "--print-config"),
        ("zsh", "zsh -n", "--print-config"),
        ("fish", "fish -n", "print-config"),
    ] {
        let script = piped(&["completions", shell], "cat");
        assert!(
            String::from_utf8_lossy(&script.stdout).contains(words),
            "{shell}"
        );
        // The shell itself is not everywhere.
        let installed = Command::new("sh")
            .args(["-c", &format!("command -v {shell}")])
            .output();
        if installed.unwrap().status.success() {
            let checked = piped(&["completions", shell], &format!("{check} /dev/stdin"));
            assert!(
                checked.status.success() && checked.stderr.is_empty(),
                "{checked:?}"
            );
        }
    }
}

#[test]
fn manual_pages_have_no_faults() {
    for page in [
        &["man"] as &[_],
        &["man", "run"],
        &["man", "serve"],
        &["man", "control"],
        &["man", "man"],
    ] {
        let text = piped(page, "cat");
        let text = String::from_utf8(text.stdout).unwrap();
        for section in [".SH NAME", ".SH SYNOPSIS", ".SH EXAMPLES"] {
            assert!(text.contains(section), "{page:?}: {section}");
        }
        let installed = Command::new("sh").args(["-c", "command -v groff"]).output();
        if installed.unwrap().status.success() {
            let shown = piped(page, "groff -man -Tutf8 -ww -z -");
            assert!(
                shown.status.success() && shown.stderr.is_empty(),
                "{page:?}: {shown:?}"
            );
        }
    }
}

#[test]
fn options_in_a_file() {
    let guest = Guest::new(&Code::default().power_off());
    let file = guest.path("machine.toml");
    let tandem = |arguments: &[&str]| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        let output = command.arg("run").args(arguments).output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (
            output.status.code(),
            text(output.stdout),
            text(output.stderr),
        )
    };
    let kernel = guest.kernel.to_str().unwrap();
    let printed = tandem(&[
        "--kernel",
        kernel,
        "--memory=8M",
        "--disk=/none,cache=none",
        "--print-config",
    ]);
    let expected = format!(
        "kernel = \"{kernel}\"\nmemory = \"8M\"\n\n[[disk]]\npath = \"/none\"\ncache = \"none\"\n"
    );
    assert_eq!(printed, (Some(0), expected.clone(), String::new()));
    std::fs::write(&file, &expected).unwrap();
    let config = format!("--config={}", file.display());
    assert_eq!(tandem(&[&config, "--print-config"]).1, expected);
    let (status, _, message) = tandem(&[&config]);
    assert!(
        status == Some(1) && message.contains("'/none'"),
        "{message}"
    );
    // What is on the command line counts.
    let (status, _, message) = tandem(&[&config, "--disk=/other"]);
    assert!(
        status == Some(1) && message.contains("'/other'"),
        "{message}"
    );
    let (status, _, message) = tandem(&["--print-config", "--kernel=k", "--memory=1M"]);
    assert!(
        status == Some(2) && message.contains("at least 2 MiB"),
        "{message}"
    );

    std::fs::write(&file, "cpus = 2\n\nmemroy = '1G'\n").unwrap();
    let (status, _, message) = tandem(&[&config]);
    let start = format!(
        "tandem: '{}', line 3: unknown key 'memroy'; known are ",
        file.display()
    );
    assert!(
        status == Some(2) && message.starts_with(&start),
        "{message}"
    );
    std::fs::write(&file, "cpus = 2\n").unwrap();
    let (status, _, message) = tandem(&[&config]);
    assert!(
        status == Some(2) && message.contains("--kernel <FILE>"),
        "{message}"
    );
    let (status, _, message) = tandem(&["--config=/none", "--kernel=k"]);
    assert!(
        status == Some(2) && message.starts_with("tandem: could not read '/none': "),
        "{message}"
    );
}

/// Fails with `text` unless the system does not let a test do what `command` needs, which is said then.
fn refused(command: &mut Command, text: &str) {
    match command.output() {
        Ok(output) if output.stderr.starts_with(b"tandem: ") => {
            assert_eq!(output.status.code(), Some(1));
            let message = String::from_utf8(output.stderr).unwrap();
            assert!(message.contains(text), "{message}");
        }
        other => {
            // Not by `eprintln!`, whose output is kept back when a test passes.
            let _ = writeln!(std::io::stderr(), "skipped: {other:?}");
        }
    }
}

#[test]
fn a_kvm_that_is_missing_or_forbidden() {
    let guest = Guest::new(&Code::default().power_off());
    let tandem = guest.command();
    let mut hidden = Command::new("unshare");
    hidden.args([
        "-m",
        "sh",
        "-c",
        "mount -t tmpfs none /dev || exit 9; exec \"$@\"",
        "sh",
    ]);
    hidden.arg(tandem.get_program()).args(tandem.get_args());
    refused(&mut hidden, "there is no /dev/kvm: enable virtualization");

    let everybody = std::fs::metadata("/dev/kvm").map(|device| device.mode() & 0o006 == 0o006);
    if everybody.unwrap_or(true) || !rustix::process::geteuid().is_root() {
        return;
    }
    std::fs::set_permissions(guest.dir.path(), Permissions::from_mode(0o755)).unwrap();
    let nobody = 65534;
    let text = "/dev/kvm cannot be opened by this user: it is for root";
    refused(guest.command().uid(nobody).gid(nobody), text);
}

#[test]
fn an_image_in_use_is_told_with_its_user() {
    let guest = Guest::new(&Code::default().power_off());
    let (disk, socket) = (guest.path("raw"), guest.path("socket"));
    std::fs::write(&disk, [0; 4096]).unwrap();
    let disk = format!("--disk={},format=raw", disk.display());
    let serve = |socket: &Path| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        command.args(["serve", "--socket"]).arg(socket).arg(&disk);
        command
            .stderr(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap()
    };
    let mut user = serve(&socket);
    while !socket.exists() {
        assert!(user.try_wait().unwrap().is_none());
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    let text = format!(
        "is another process using it? It is: process {} (tandem)",
        user.id()
    );
    let mut second = guest.command();
    second.arg(&disk);
    run(second).assert_says(1, &text);
    common::wait(serve(&guest.path("other"))).assert_says(1, &text);
    user.kill().unwrap();
    user.wait().unwrap();
}
