//! `tandem serve`: its socket, its end, and what it says of front ends.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "what fails here fails the test"
)]

#[allow(dead_code, reason = "each test program uses a part of it")]
mod common;

use std::fs;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::os::unix::process::ExitStatusExt;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use common::{heed_signals, run, send_signal, wait};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(60);

/// A raw disk and a place for a socket.
struct Place {
    directory: TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("raw"), [0; 4096]).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `tandem serve` with files in the directory, and no `umask`.
    fn command(&self, socket: &str, disk: &str) -> Command {
        heed_signals();
        let mut command = Command::new("sh");
        command
            .args([
                "-c",
                r#"umask 0; exec "$0" serve --socket "$1" --disk "$2""#,
            ])
            .args([env!("CARGO_BIN_EXE_tandem"), socket, disk])
            .current_dir(&self.directory)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        command
    }

    fn serve(&self) -> Child {
        self.command("socket", "raw,format=raw").spawn().unwrap()
    }

    /// Connects to the socket as soon as somebody listens.
    fn connect(&self) -> UnixStream {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match UnixStream::connect(self.path("socket")) {
                Ok(connection) => return connection,
                Err(e)
                    if matches!(e.kind(), ErrorKind::NotFound | ErrorKind::ConnectionRefused) =>
                {
                    assert!(Instant::now() < deadline, "nobody listens");
                }
                Err(e) => panic!("{e}"),
            }
            thread::sleep(Duration::from_millis(5));
        }
    }
}

/// Asks for the features, and takes the answer.
fn ask(mut connection: &UnixStream) {
    connection.write_all(&message(1)).unwrap();
    connection.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut reply = [0; 20];
    connection.read_exact(&mut reply).unwrap();
    assert_eq!(reply[..4], [1, 0, 0, 0]);
}

/// A message without a body.
fn message(code: u8) -> [u8; 12] {
    [code, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]
}

#[test]
fn the_socket_is_its_users_alone_and_goes_at_the_end() {
    for signal in [libc::SIGTERM, libc::SIGINT] {
        let place = Place::new();
        let child = place.serve();
        let connection = place.connect();
        ask(&connection);
        let meta = fs::symlink_metadata(place.path("socket")).unwrap();
        assert!(meta.file_type().is_socket());
        assert_eq!(meta.permissions().mode() & 0o777, 0o600);
        // Also while a front end is being served.
        send_signal(&child, signal);
        wait(child).assert_killed(signal);
        assert!(!place.path("socket").exists());
        assert_eq!((&connection).read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn a_socket_that_is_in_use_is_left_alone() {
    let place = Place::new();
    fs::copy(place.path("raw"), place.path("other")).unwrap();
    let child = place.serve();
    drop(place.connect());
    let second = run(place.command("socket", "other,format=raw"));
    second.assert_says(
        1,
        "tandem: 'socket' is in use: another process listens on it",
    );
    ask(&place.connect());
    send_signal(&child, libc::SIGTERM);
    wait(child).assert_killed(libc::SIGTERM);
}

#[test]
fn a_stale_socket_is_replaced_and_other_files_are_not() {
    let place = Place::new();
    // One that is closed here could still be open in a child that another test is starting.
    let killed = place.serve();
    ask(&place.connect());
    send_signal(&killed, libc::SIGKILL);
    wait(killed).assert_killed(libc::SIGKILL);
    assert!(place.path("socket").exists());

    let child = place.serve();
    ask(&place.connect());
    send_signal(&child, libc::SIGTERM);
    wait(child).assert_killed(libc::SIGTERM);

    fs::write(place.path("socket"), "text").unwrap();
    let ended = run(place.command("socket", "raw,format=raw"));
    ended.assert_says(1, "tandem: 'socket' is there already, and is no socket");
    assert_eq!(fs::read(place.path("socket")).unwrap(), b"text");
}

/// A name that has come to mean another socket meanwhile.
#[test]
fn only_its_own_socket_is_removed() {
    let place = Place::new();
    let child = place.serve();
    ask(&place.connect());
    fs::remove_file(place.path("socket")).unwrap();
    let _other = UnixListener::bind(place.path("socket")).unwrap();
    send_signal(&child, libc::SIGTERM);
    wait(child).assert_killed(libc::SIGTERM);
    assert!(place.path("socket").exists());
}

#[test]
fn one_line_for_each_front_end_that_breaks_the_protocol() {
    let place = Place::new();
    let child = place.serve();
    for bytes in [message(99), [0xff; 12]] {
        place.connect().write_all(&bytes).unwrap();
    }
    // One that is just curious is no news.
    drop(place.connect());
    ask(&place.connect());
    send_signal(&child, libc::SIGTERM);
    let ended = wait(child);
    assert_eq!(ended.status.signal(), Some(libc::SIGTERM), "{ended:?}");
    let lines: Vec<_> = ended.stderr.lines().collect();
    assert_eq!(lines.len(), 2, "{ended:?}");
    for line in lines {
        assert!(
            line.starts_with("tandem: the front end broke the protocol: "),
            "{line}"
        );
    }
}

#[test]
fn what_cannot_be_served() {
    let place = Place::new();
    let long = "x".repeat(200);
    for (socket, disk, status, text) in [
        ("socket", "raw", 1, "format=raw"),
        ("socket", "none,format=raw", 1, "could not open"),
        (
            "none/socket",
            "raw,format=raw",
            1,
            "could not make a socket at 'none/socket'",
        ),
        (
            &long,
            "raw,format=raw",
            1,
            "could not make a socket at 'xxx",
        ),
    ] {
        run(place.command(socket, disk)).assert_says(status, text);
    }
    let ended = run(place.command("socket", "raw,queues=33"));
    assert_eq!(ended.status.code(), Some(2), "{ended:?}");
    assert!(!place.path("socket").exists());
}

#[test]
fn help_tells_everything_there_is() {
    let help = |argument: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_tandem"));
        command.args(["serve", argument]);
        String::from_utf8(command.output().unwrap().stdout).unwrap()
    };
    let long = help("--help");
    for text in [
        "data-file=PATH",
        "queues=N",
        "cloud-hypervisor",
        "crosvm",
        "Exit status",
    ] {
        assert!(long.contains(text), "{text}");
    }
    assert!(help("-h").contains("vhost-user-blk-pci"));
}
