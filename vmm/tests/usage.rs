//! What `tandem` says when it cannot run what it is asked to.
#![allow(clippy::unwrap_used, reason = "what fails here fails the test")]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::process::Command;

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
}
