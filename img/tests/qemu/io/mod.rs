//! The same commands for `tandem-io` and for the `qemu-io` that is installed.
//!
//! A case is a line: arguments, and behind each `::` a command, which becomes a `-c`.

mod content;
mod layers;
mod mistakes;
mod opening;
mod talk;
mod zeroes;

use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::run::{Both, Place, Run};

const TANDEM: &str = env!("CARGO_BIN_EXE_tandem-io");
const QEMU: &str = "/usr/bin/qemu-io";

/// Runs `program` under the name `qemu-io` in `place`; `input` is its standard input.
fn run(place: &Place, program: &str, args: &[&str], input: &str) -> Run {
    let mut child = Command::new(program)
        .arg0("qemu-io")
        .args(args)
        .current_dir(place.path(""))
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|e| panic!("{program}: {e}"));
    // A program that does not read is not wrong.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    Run {
        status: output.status.code(),
        stdout: filtered(&String::from_utf8(output.stdout).unwrap()),
        stderr: String::from_utf8(output.stderr).unwrap(),
    }
}

/// Replaces what differs from run to run, as QEMU's own tests do.
fn filtered(text: &str) -> String {
    text.split_inclusive('\n')
        .map(|line| match line.split_once(" ops; ") {
            Some((start, end)) if end.ends_with(" ops/sec)\n") => format!("{start} ops; X\n"),
            _ => line.to_owned(),
        })
        .collect()
}

/// The words of a case.
fn args(case: &str) -> Vec<&str> {
    let mut parts = case.split("::").map(str::trim);
    let words = parts.next().unwrap().split_whitespace();
    let words = words.map(|word| if word == "''" { "" } else { word });
    let mut args: Vec<_> = parts.flat_map(|command| ["-c", command]).collect();
    args.extend(words);
    args
}

fn runs(both: &Both, args: &[&str], input: &str) -> [Run; 2] {
    both.each(|place| {
        let program = if place.is_qemus() { QEMU } else { TANDEM };
        run(place, program, args, input)
    })
}

/// Runs each case with both programs, which must agree in everything.
fn same(both: &Both, cases: &str) {
    for case in cases.lines().map(str::trim).filter(|case| !case.is_empty()) {
        let [expected, found] = runs(both, &args(case), "");
        assert_eq!(found, expected, "{case}");
    }
}

/// Fails unless the disks are equal, and the image of `tandem-io` has no errors.
fn same_disk(both: &Both, format: &str, name: &str) {
    both.each(|place| place.make(&format!("convert -f {format} -O raw {name} {name}.disk")));
    both.same_bytes(&format!("{name}.disk"));
    if format == "qcow2" {
        both.tandem.make(&format!("check -q {name}"));
    }
}
