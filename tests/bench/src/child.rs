//! Other processes: what they take, their system calls and their instructions.

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use crate::image::Kind;
use crate::one::Scenario;
use crate::target::Who;

/// Seconds that a process has taken.
#[derive(Clone, Copy, Debug)]
pub struct Taken {
    pub wall: f64,
    pub processor: f64,
}

/// Runs a command that must succeed.
#[expect(clippy::zombie_processes, reason = "wait4 waits for it")]
pub fn run(command: &mut Command) -> Taken {
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let start = Instant::now();
    let child = command.spawn().unwrap();
    let mut status = 0;
    // SAFETY: all-zero bytes are a valid `rusage`.
    let mut usage: libc::rusage = unsafe { std::mem::zeroed() };
    // SAFETY: both are valid for the kernel to write to; the child has not been waited for.
    let pid = unsafe { libc::wait4(child.id() as libc::pid_t, &mut status, 0, &mut usage) };
    let wall = start.elapsed().as_secs_f64();
    assert_eq!(pid, child.id() as libc::pid_t);
    assert_eq!(status, 0, "{command:?}");
    let seconds = |time: libc::timeval| time.tv_sec as f64 + time.tv_usec as f64 / 1e6;
    Taken {
        wall,
        processor: seconds(usage.ru_utime) + seconds(usage.ru_stime),
    }
}

/// This program, with a single piece of work.
pub fn one(scenario: Scenario, who: Who, kind: Kind, path: &Path, requests: usize) -> Vec<String> {
    let index = |found: Option<usize>| found.unwrap_or_default().to_string();
    let own = std::env::current_exe().unwrap();
    vec![
        own.display().to_string(),
        "one".into(),
        "--scenario".into(),
        scenario.name(),
        "--who".into(),
        index(Who::ALL.iter().position(|other| *other == who)),
        "--kind".into(),
        index(Kind::ALL.iter().position(|other| *other == kind)),
        "--requests".into(),
        requests.to_string(),
        "--path".into(),
        path.display().to_string(),
    ]
}

/// What a process has written.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Written {
    pub bytes: f64,
    pub writes: f64,
    pub syncs: f64,
}

/// Runs a command under `strace`. Of one that marks its work, only that counts.
pub fn written(arguments: &[String], dir: &Path) -> Written {
    let trace = dir.join("trace");
    let calls = "trace=chdir,pwrite64,pwritev,pwritev2,fdatasync,fsync,sync_file_range,fallocate";
    let mut strace = Command::new("strace");
    strace.args(["-f", "-qq", "-e", calls, "-e", "signal=none", "-o"]);
    run(strace.arg(&trace).args(arguments));
    count(&fs::read_to_string(trace).unwrap())
}

fn count(trace: &str) -> Written {
    let parts: Vec<_> = trace.split("chdir(\".\")").collect();
    let work = if parts.len() == 3 { parts[1] } else { trace };
    let mut written = Written::default();
    // A call that another thread interrupts has its name in a line and its result in another.
    let mut unfinished = HashMap::new();
    for line in work.lines() {
        let (thread, call) = line.trim_start().split_once(' ').unwrap_or_default();
        let call = call.trim_start();
        if call.contains("<unfinished") {
            unfinished.insert(thread, call);
            continue;
        }
        let begun = unfinished
            .remove(thread)
            .filter(|_| call.starts_with("<..."));
        let name = begun.unwrap_or(call).split('(').next().unwrap_or_default();
        let result = call.rsplit("= ").next().unwrap_or_default();
        let bytes = result.trim().parse::<f64>().unwrap_or(0.0);
        match name {
            "pwrite64" | "pwritev" | "pwritev2" => {
                written.writes += 1.0;
                written.bytes += bytes;
            }
            "fdatasync" | "fsync" | "sync_file_range" => written.syncs += 1.0,
            "fallocate" => written.writes += 1.0,
            _ => {}
        }
    }
    written
}

/// Instructions of the work of [`one`], under `valgrind`.
pub fn instructions(arguments: &[String], dir: &Path) -> f64 {
    let out = dir.join("callgrind");
    let mut valgrind = Command::new("valgrind");
    valgrind
        .args(["--tool=callgrind", "--quiet", "--collect-atstart=no"])
        .args(["--toggle-collect=*one*counted*", "--error-exitcode=0"])
        .arg(format!("--callgrind-out-file={}", out.display()))
        .args(arguments);
    run(&mut valgrind);
    let text = fs::read_to_string(out).unwrap();
    let totals = text.lines().find_map(|line| {
        let line = line
            .strip_prefix("totals:")
            .or_else(|| line.strip_prefix("summary:"));
        line?.trim().parse().ok()
    });
    totals.unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_between_the_marks_count() {
        let trace = "\
7 pwrite64(3, \"a\", 9, 0) = 9
7 chdir(\".\") = 0
7 pwritev(3, [{iov_base=\"a = \", iov_len=4096}], 1, 0) = 4096
8 fdatasync(3 <unfinished ...>
7 pwrite64(3, \"a\", 512, 0) = 512
8 <... fdatasync resumed>) = 0
7 chdir(\".\") = 0
7 fsync(3) = 0
";
        let expected = Written {
            bytes: 4608.0,
            writes: 2.0,
            syncs: 1.0,
        };
        assert_eq!(count(trace), expected);
        let whole = count(&trace.replace("chdir(\".\")", "getpid()"));
        assert_eq!((whole.writes, whole.syncs), (3.0, 2.0));
    }
}
