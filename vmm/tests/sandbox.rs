//! What the sandbox forbids and allows, to its library's users and in the program.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "what fails here fails the test"
)]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;

use common::{Code, Guest, await_text, have_kvm, run, send_signal, tandem_run, wait};
use serde_json::{Value, json};
use tandem_vmm::sandbox::{Enforced, FileRules, Role, confine_files, enter, is_refusal};

const ROLES: [Role; 5] = [
    Role::Main,
    Role::Cpu,
    Role::Control,
    Role::Watch,
    Role::Server,
];

/// What a process of its own does in a role, for it may end there.
const CASE: &str = "TANDEM_TEST_SANDBOX_CASE";

type Act = fn();

/// Acts that no role allows, and the numbers of their system calls.
const FORBIDDEN: [(&str, Act, libc::c_long); 10] = [
    (
        "exec",
        || drop(Command::new("true").exec()),
        libc::SYS_execve,
    ),
    ("fork", || call(libc::SYS_fork, [0, 0, 0]), libc::SYS_fork),
    (
        "clone",
        || call(libc::SYS_clone, [17, 0, 0]),
        libc::SYS_clone,
    ),
    (
        "socket",
        || drop(TcpListener::bind("127.0.0.1:0")),
        libc::SYS_socket,
    ),
    (
        "ptrace",
        || call(libc::SYS_ptrace, [0, 0, 0]),
        libc::SYS_ptrace,
    ),
    (
        "io_uring",
        || call(libc::SYS_io_uring_setup, [1, 0, 0]),
        libc::SYS_io_uring_setup,
    ),
    (
        "mprotect",
        || call(libc::SYS_mprotect, [0, 4096, 4]),
        libc::SYS_mprotect,
    ),
    (
        "signal",
        || call(libc::SYS_tgkill, [1, 1, 0]),
        libc::SYS_tgkill,
    ),
    (
        "type",
        || call(libc::SYS_ioctl, [0, libc::TIOCSTI as usize, 0]),
        libc::SYS_ioctl,
    ),
    (
        "owner",
        || call(libc::SYS_fcntl, [0, libc::F_SETOWN as usize, 1]),
        libc::SYS_fcntl,
    ),
];

fn call(number: libc::c_long, [first, second, third]: [usize; 3]) {
    // SAFETY: none of these calls touches memory of this process, with these arguments.
    unsafe { libc::syscall(number, first, second, third) };
}

/// Carries out a case: this process has been started for it.
#[test]
#[ignore = "the other tests start it, in processes of their own"]
fn case() {
    let case = std::env::var(CASE).unwrap();
    let (role, act) = case.split_once(' ').unwrap();
    let role = *ROLES.iter().find(|r| format!("{r:?}") == role).unwrap();
    let name = format!("{role:?}");
    let body = move || {
        let log = tempfile::tempfile().unwrap();
        enter(role).unwrap();
        match FORBIDDEN.iter().find(|(name, ..)| *name == act) {
            Some((_, act, _)) => act(),
            None if act == "unlink" => drop(fs::remove_file("/nowhere/file")),
            None => allowed(role, log),
        }
    };
    thread::scope(|scope| {
        let thread = thread::Builder::new().name(name);
        thread.spawn_scoped(scope, body).unwrap().join().unwrap();
    });
}

/// What every role may do, or finds refused and lives on.
fn allowed(role: Role, mut log: File) {
    log.write_all(b"text").unwrap();
    drop(vec![1u8; 64 << 20]);
    // Of a name that leads up, more is asked for.
    let found = [
        File::open("/proc/self/maps").map(drop),
        fs::canonicalize("/proc/..").map(drop),
    ];
    let expected = match role {
        Role::Control => None,
        _ => Some(ErrorKind::Unsupported),
    };
    for found in found {
        assert_eq!(found.map_err(|e| e.kind()).err(), expected);
    }
    // With a backtrace, for which files are looked for.
    assert!(std::panic::catch_unwind(|| panic!("on purpose")).is_err());
    if matches!(role, Role::Cpu | Role::Control | Role::Server) {
        thread::spawn(|| ()).join().unwrap();
    }
    // SAFETY: the thread is this one; the signal is none.
    assert_eq!(unsafe { libc::pthread_kill(libc::pthread_self(), 0) }, 0);
}

fn run_case(case: &str) -> Output {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "case", "--ignored", "--nocapture"]);
    command.env(CASE, case).env("RUST_BACKTRACE", "1");
    command.stdin(Stdio::null()).output().unwrap()
}

#[test]
fn what_no_role_needs_ends_the_process_in_a_line() {
    for role in ROLES {
        for (act, _, number) in FORBIDDEN {
            let output = run_case(&format!("{role:?} {act}"));
            let stderr = String::from_utf8_lossy(&output.stderr);
            let signal = output.status.signal();
            assert_eq!(signal, Some(libc::SIGSYS), "{role:?} {act}: {stderr}");
            let line = format!(
                "tandem: the sandbox forbids system call {number} (thread {role:?}), which ends \
                 the process; --no-sandbox turns it off\n"
            );
            assert!(stderr.ends_with(&line), "{role:?} {act}: {stderr}");
        }
    }
}

#[test]
fn what_a_role_needs_is_allowed_and_the_names_of_files_are_refused() {
    for role in ROLES {
        let output = run_case(&format!("{role:?} nothing"));
        assert!(output.status.success(), "{role:?}: {output:?}");
    }
    for (role, is_allowed) in ROLES.into_iter().zip([true, false, true, false, true]) {
        let output = run_case(&format!("{role:?} unlink"));
        assert_eq!(output.status.success(), is_allowed, "{role:?}: {output:?}");
    }
}

/// Confines this process, or says that it cannot be done here.
fn have_landlock(rules: &FileRules) -> bool {
    let enforced = confine_files(rules).unwrap();
    if enforced == Enforced::Nothing {
        let _ = writeln!(io::stderr(), "skipped: there is no Landlock");
    }
    enforced != Enforced::Nothing
}

#[test]
fn only_files_below_the_directories_that_are_named_can_be_used() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    for name in ["allowed", "sockets", "other"] {
        fs::create_dir(path(name)).unwrap();
        fs::write(path(name).join("file"), "text").unwrap();
    }
    let mut open = File::options();
    let mut open = open
        .read(true)
        .append(true)
        .open(path("other/file"))
        .unwrap();
    let mut rules = FileRules::default();
    rules.directories.push(path("allowed"));
    rules.socket = Some(path("sockets/socket"));
    // The rules are those of the thread.
    let body = || {
        if !have_landlock(&rules) {
            return;
        }
        let refused = |result: io::Result<()>| is_refusal(&result.unwrap_err());
        for directory in ["other", "sockets"] {
            let path = |name: &str| path(directory).join(name);
            assert!(refused(File::open(path("file")).map(drop)));
            assert!(refused(File::create(path("new")).map(drop)));
            assert!(refused(fs::rename(path("file"), path("new"))));
            assert!(refused(fs::hard_link(path("file"), path("new"))));
        }
        assert!(refused(fs::remove_file(path("other/file"))));
        assert!(refused(TcpListener::bind("127.0.0.1:0").map(drop)));
        fs::remove_file(path("sockets/file")).unwrap();
        // An image, which takes its name when it is complete.
        let options = tandem_block::qcow2::CreateOptions {
            size: 1 << 20,
            data_file: Some(path("allowed/data")),
            ..Default::default()
        };
        tandem_block::qcow2::create(&path("allowed/image"), &options).unwrap();
        fs::remove_file(path("allowed/file")).unwrap();
        let out = fs::rename(path("allowed/image"), path("other/image"));
        assert!(refused(out));
        // What was open before stays so.
        let mut text = String::new();
        open.read_to_string(&mut text).unwrap();
        open.write_all(b"more").unwrap();
        open.set_len(6).unwrap();
        assert_eq!(text, "text");
    };
    thread::scope(|scope| scope.spawn(body).join().unwrap());
    assert_eq!(fs::read_to_string(path("other/file")).unwrap(), "textmo");
    let other = io::Error::from_raw_os_error(libc::ENOSPC);
    assert!(!is_refusal(&other));
}

#[test]
fn a_directory_that_is_none_is_an_error_that_names_it() {
    let mut rules = FileRules::default();
    rules.directories.push("/dev/null".into());
    let message = confine_files(&rules).unwrap_err().to_string();
    assert!(message.contains("'/dev/null'"), "{message}");
    if have_kvm() {
        let guest = Guest::new(&Code::default().print("never"));
        let mut command = guest.command();
        command.arg("--control").arg(guest.path("socket"));
        command.args(["--allow-dir", "/dev/null"]);
        run(command).assert_says(1, "could not leave open the directory '/dev/null'");
    }
}

/// What `/proc` tells of `field` for each thread of `child`.
fn of_each_thread(child: &Child, field: &str) -> Vec<String> {
    let threads = fs::read_dir(format!("/proc/{}/task", child.id())).unwrap();
    let value = |thread: io::Result<fs::DirEntry>| {
        let status = fs::read_to_string(thread.unwrap().path().join("status")).unwrap();
        let line = status.lines().find(|line| line.starts_with(field)).unwrap();
        line[field.len()..].trim_matches([':', '\t']).to_owned()
    };
    threads.map(value).collect()
}

fn core_limit(child: &Child) -> String {
    let limits = fs::read_to_string(format!("/proc/{}/limits", child.id())).unwrap();
    let line = limits.lines().find(|line| line.contains("core")).unwrap();
    line.split_whitespace().skip(4).take(2).collect()
}

/// Starts a guest that sleeps, with all kinds of threads.
fn start(guest: &Guest, arguments: &[&str]) -> Child {
    fs::write(guest.path("disk"), [0; 4096]).unwrap();
    fs::create_dir(guest.path("sockets")).unwrap();
    let mut command = tandem_run(&guest.kernel);
    command.current_dir(&guest.dir);
    command.args(["--memory=8M", "--cpus=2", "--disk=disk,format=raw"]);
    command.args(["--control=sockets/socket", "--metrics=metrics"]);
    let mut child = command.args(arguments).spawn().unwrap();
    await_text(child.stdout.as_mut().unwrap(), "ready");
    child
}

#[test]
fn every_thread_of_the_program_is_confined_unless_told_otherwise() {
    if !have_kvm() {
        return;
    }
    for (arguments, filters) in [(&[][..], "2"), (&["--no-sandbox"], "0")] {
        let guest = Guest::new(&Code::default().print("ready").sleep());
        let child = start(&guest, arguments);
        let seccomp = of_each_thread(&child, "Seccomp");
        assert!(seccomp.len() >= 5, "{seccomp:?}");
        assert!(seccomp.iter().all(|mode| mode == filters), "{seccomp:?}");
        let no_privileges = of_each_thread(&child, "NoNewPrivs");
        let expected = if filters == "2" { "1" } else { "0" };
        assert!(no_privileges.iter().all(|flag| flag == expected));
        assert_eq!(core_limit(&child) == "00", filters == "2");
        send_signal(&child, libc::SIGTERM);
        wait(child).assert_killed(libc::SIGTERM);
        assert!(!guest.path("sockets/socket").exists());
    }
}

/// The directory of the socket is exchanged for another one, where the socket has its name as well:
/// the program may not remove it there.
#[test]
fn the_program_keeps_to_its_files_unless_told_otherwise() {
    let probe = || confine_files(&FileRules::default()).unwrap() != Enforced::Nothing;
    if !have_kvm() || !thread::spawn(probe).join().unwrap() {
        return;
    }
    for (arguments, is_left) in [(&[][..], true), (&["--no-sandbox"], false)] {
        let guest = Guest::new(&Code::default().print("ready").sleep());
        let child = start(&guest, arguments);
        let (old, new) = (guest.path("sockets"), guest.path("moved"));
        fs::rename(&old, &new).unwrap();
        fs::create_dir(&old).unwrap();
        fs::hard_link(new.join("socket"), old.join("socket")).unwrap();
        send_signal(&child, libc::SIGTERM);
        wait(child).assert_killed(libc::SIGTERM);
        assert_eq!(old.join("socket").exists(), is_left);
    }
}

/// What the socket of a guest answers to `request`.
fn ask(guest: &Guest, request: &Value) -> Value {
    let mut stream = UnixStream::connect(guest.path("sockets/socket")).unwrap();
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap()
}

/// How the last job that the socket of a guest was asked for has ended.
fn await_job(guest: &Guest) -> Value {
    loop {
        let answer = ask(guest, &json!({"command": "jobs"}));
        let job = answer["ok"]["jobs"]
            .as_array()
            .unwrap()
            .last()
            .unwrap()
            .clone();
        if job["state"] != "running" {
            return job;
        }
        thread::yield_now();
    }
}

#[test]
fn requests_name_files_below_the_directories_that_are_allowed() {
    let probe = || confine_files(&FileRules::default()).unwrap() != Enforced::Nothing;
    if !have_kvm() || !thread::spawn(probe).join().unwrap() {
        return;
    }
    for is_allowed in [false, true] {
        let guest = Guest::new(&Code::default().print("ready").sleep());
        let options = tandem_block::qcow2::CreateOptions {
            size: 1 << 20,
            ..Default::default()
        };
        tandem_block::qcow2::create(&guest.path("image"), &options).unwrap();
        tandem_block::qcow2::create(&guest.path("base"), &options).unwrap();
        fs::create_dir(guest.path("sub")).unwrap();
        let kept = "--disk=base,overlay=sub/kept,follow=anywhere";
        let arguments = ["--disk=image", kept, "--allow-dir=sub", "--allow-dir=."];
        let child = start(&guest, &arguments[..3 + usize::from(is_allowed)]);
        let (overlay, other) = (guest.path("overlay"), guest.path("fork"));
        let fork = json!({"command": "fork", "disk": 1, "overlay": overlay, "fork": other});
        let forked = ask(&guest, &fork);
        let message = forked["error"]["message"].as_str();
        let is_explained = message.is_some_and(|message| message.ends_with("of --allow-dir"));
        assert_eq!(forked["ok"].is_object(), is_allowed, "{forked}");
        assert_eq!(is_explained, !is_allowed, "{forked}");
        // A commit opens the base anew, which is not where the overlay is.
        let commit = json!({"command": "commit", "disk": 2});
        assert!(ask(&guest, &commit)["ok"]["job"].is_u64());
        let job = await_job(&guest);
        assert_eq!(job["state"] == "done", is_allowed, "{job}");
        let message = job["error"].as_str();
        let is_explained = message.is_some_and(|message| message.ends_with("of --allow-dir"));
        assert_eq!(is_explained, !is_allowed, "{job}");
        if is_allowed {
            ask(
                &guest,
                &json!({"command": "commit", "disk": 1, "pivot": true}),
            );
            let job = await_job(&guest);
            assert_eq!(job["state"], "done", "{job}");
        }
        send_signal(&child, libc::SIGTERM);
        wait(child).assert_killed(libc::SIGTERM);
        assert_eq!((overlay.exists(), other.exists()), (is_allowed, is_allowed));
    }
}

#[test]
fn a_server_is_confined_unless_told_otherwise() {
    for (arguments, filters) in [(&[][..], "2"), (&["--no-sandbox"], "0")] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("disk"), [0; 4096]).unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        command.current_dir(&dir).args(["serve", "--socket=socket"]);
        command.arg("--disk=disk,format=raw").args(arguments);
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().unwrap();
        // It waits for clients when the thread that waits for signals is there.
        while of_each_thread(&child, "Seccomp").len() < 2 {
            thread::yield_now();
        }
        let seccomp = of_each_thread(&child, "Seccomp");
        assert!(seccomp.iter().all(|mode| mode == filters), "{seccomp:?}");
        send_signal(&child, libc::SIGTERM);
        wait(child).assert_killed(libc::SIGTERM);
        assert!(!Path::new(&dir.path().join("socket")).exists());
    }
}
