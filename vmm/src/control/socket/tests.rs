use super::*;
use crate::control::VmState;
use crate::control::test_common::control;
use serde_json::{Value, json};
use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use rustix::fs::FileType;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketType};

struct Fixture {
    path: PathBuf,
    socket: ControlSocket,
    control: Control,
    _dir: tempfile::TempDir,
}

fn fixture() -> Fixture {
    let (control, dir) = control();
    let path = dir.path().join("socket");
    Fixture {
        socket: ControlSocket::bind(&path)
            .unwrap()
            .serve(control.clone())
            .unwrap(),
        path,
        control,
        _dir: dir,
    }
}

fn read_answer(stream: &UnixStream) -> Value {
    let mut line = String::new();
    // One byte at a time, so that nothing of the next answer is taken.
    let mut reader = BufReader::with_capacity(1, stream);
    reader.read_line(&mut line).unwrap();
    serde_json::from_str(&line).unwrap_or_default()
}

fn ask(mut stream: &UnixStream, request: &str) -> Value {
    stream.write_all(format!("{request}\n").as_bytes()).unwrap();
    read_answer(stream)
}

const STATUS: &str = r#"{"command":"status"}"#;

#[test]
fn requests_are_answered_in_order_and_several_clients_at_once() {
    let f = fixture();
    let clients = [(); 4].map(|()| UnixStream::connect(&f.path).unwrap());
    for (id, mut client) in clients.iter().enumerate() {
        let request = json!({"id": id, "command": "disks"});
        // Also without a request on a line, and two at once.
        let text = format!("\n  \r\n{request}\r\n{STATUS}\n");
        client.write_all(text.as_bytes()).unwrap();
    }
    for (id, client) in clients.iter().enumerate() {
        assert_eq!(read_answer(client)["id"], id);
        assert_eq!(read_answer(client)["ok"]["state"], "running");
    }
    // The last line need not have an end.
    let mut client = &clients[0];
    client.write_all(br#"{"command":"pause"}"#).unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(read_answer(client)["ok"]["state"], "paused");
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(f.control.state(), VmState::Paused);
}

#[test]
fn only_its_user_may_use_it_and_it_is_removed_at_the_end() {
    let f = fixture();
    let mode = fs::symlink_metadata(&f.path).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let client = UnixStream::connect(&f.path).unwrap();
    ask(&client, STATUS);
    drop(f.socket);
    assert!(!f.path.exists());
    assert_eq!((&client).read(&mut [0]).unwrap(), 0);
}

#[test]
fn another_user_is_sent_away() {
    let f = fixture();
    if !rustix::process::geteuid().is_root() {
        // Nobody else can be had.
        return;
    }
    // Even if somebody has opened the way.
    let directory = f.path.parent().unwrap();
    for (path, mode) in [(directory, 0o755), (&f.path, 0o666)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let nobody = rustix::process::Uid::from_raw(65534);
    let other = || {
        // This thread alone, which ends soon.
        rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
        let client = UnixStream::connect(&f.path).unwrap();
        let answer = read_answer(&client);
        assert_eq!((&client).read(&mut [0]).unwrap(), 0);
        answer
    };
    let answer = thread::scope(|scope| scope.spawn(other).join().unwrap());
    assert_eq!(answer["error"]["kind"], "not-permitted");
}

/// Leaves the file of a socket at which nobody listens: not even a child that another test is starting,
/// which has all that is open here until it executes its program.
fn bind_without_listening(path: &Path) {
    let socket = rustix::net::socket(AddressFamily::UNIX, SocketType::STREAM, None).unwrap();
    rustix::net::bind(&socket, &SocketAddrUnix::new(path).unwrap()).unwrap();
}

#[test]
fn a_dead_socket_is_replaced_and_nothing_else() {
    let f = fixture();
    let error = |path: &Path| {
        let result = ControlSocket::bind(path);
        result.map(drop).unwrap_err().to_string()
    };
    let message = error(&f.path);
    assert!(message.contains("another process listens"), "{message}");
    assert!(message.contains(&f.path.display().to_string()), "{message}");
    ask(&UnixStream::connect(&f.path).unwrap(), STATUS);

    let dead = f.path.with_file_name("dead");
    bind_without_listening(&dead);
    let socket = ControlSocket::bind(&dead).unwrap();
    let socket = socket.serve(f.control.clone()).unwrap();
    ask(&UnixStream::connect(&dead).unwrap(), STATUS);
    drop(socket);
    assert!(!dead.exists());

    let file = f.path.with_file_name("file");
    fs::write(&file, "content").unwrap();
    assert!(error(&file).contains("no socket"));
    assert_eq!(fs::read(&file).unwrap(), b"content");
    let link = f.path.with_file_name("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    assert!(error(&link).contains("no socket"));
    assert!(link.symlink_metadata().is_ok());
    assert!(error(&f.path.with_file_name("no/socket")).contains("No such file"));
    error(&f.path.with_file_name("x".repeat(120)));

    // It is not waited for somebody who writes to it.
    let pipe = f.path.with_file_name("pipe");
    let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
    rustix::fs::mknodat(rustix::fs::CWD, &pipe, FileType::Fifo, mode, 0).unwrap();
    assert!(error(&pipe.join("socket")).contains("Not a directory"));
}

#[test]
fn the_file_of_somebody_else_is_not_removed() {
    let f = fixture();
    fs::rename(&f.path, f.path.with_extension("moved")).unwrap();
    fs::write(&f.path, "content").unwrap();
    drop(f.socket);
    assert_eq!(fs::read(&f.path).unwrap(), b"content");
}

#[test]
fn one_client_too_many_is_told() {
    let f = fixture();
    let clients = [(); MAX_CLIENTS].map(|()| UnixStream::connect(&f.path).unwrap());
    clients.iter().for_each(|client| drop(ask(client, STATUS)));
    let refused = UnixStream::connect(&f.path).unwrap();
    assert_eq!(read_answer(&refused)["error"]["kind"], "too-many-clients");
    assert_eq!((&refused).read(&mut [0]).unwrap(), 0);
    // When one has gone, there is room again: soon, for its thread has to end first.
    drop(clients);
    let is_served = || {
        let client = UnixStream::connect(&f.path).unwrap();
        let mut line = String::new();
        // A refused client may find its connection gone before it has asked.
        let _ = (&client).write_all(format!("{STATUS}\n").as_bytes());
        let _ = BufReader::new(&client).read_line(&mut line);
        line.contains("running")
    };
    while !is_served() {
        thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_line_without_end_is_refused() {
    let f = fixture();
    let client = UnixStream::connect(&f.path).unwrap();
    let longest = format!("{STATUS}{}", " ".repeat((64 << 10) - STATUS.len()));
    assert_eq!(ask(&client, &longest)["ok"]["state"], "running");
    let endless = vec![b'x'; (64 << 10) + 2];
    (&client).write_all(&endless).unwrap();
    assert_eq!(read_answer(&client)["error"]["kind"], "bad-request");
    assert_eq!((&client).read(&mut [0]).unwrap_or(0), 0);
    ask(&UnixStream::connect(&f.path).unwrap(), STATUS);
}

#[test]
fn who_does_not_read_holds_nobody_up() {
    let f = fixture();
    let mut deaf = UnixStream::connect(&f.path).unwrap();
    deaf.set_nonblocking(true).unwrap();
    // Until its answers fill the socket, and its requests as well.
    let requests = r#"{"command":"metrics"}"#.to_owned() + "\n";
    let requests = requests.repeat(100);
    while deaf.write(requests.as_bytes()).is_ok() {}
    let mut hanging = UnixStream::connect(&f.path).unwrap();
    hanging.write_all(b"{\"command\":").unwrap();
    let client = UnixStream::connect(&f.path).unwrap();
    assert_eq!(ask(&client, STATUS)["ok"]["state"], "running");
    // Nor does it hold up the end.
    drop(f.socket);
}
