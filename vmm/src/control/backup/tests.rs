use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;

use super::*;
use crate::control::ControlSocket;
use crate::control::test_common::{SIZE, control};
use tandem_block::{Disk, VolatileSlice};

/// A client of the socket.
struct Client(BufReader<UnixStream>);

impl Client {
    fn new(path: &std::path::Path) -> Self {
        Self(BufReader::new(UnixStream::connect(path).unwrap()))
    }

    fn ask(&mut self, request: &Value) -> Value {
        writeln!(self.0.get_mut(), "{request}").unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        serde_json::from_str(&line).unwrap()
    }

    /// The kind and the message of the error.
    fn refused(&mut self, request: &Value) -> (String, String) {
        let answer = self.ask(request);
        let text = |key: &str| answer["error"][key].as_str().unwrap().to_owned();
        (text("kind"), text("message"))
    }

    /// Reads a part of a backup over `content`, and returns where it goes on.
    fn read(&mut self, request: &Value, content: &mut [u8]) -> u64 {
        let answer = self.ask(request);
        let part = &answer["ok"];
        let number = |value: &Value| value.as_u64().unwrap() as usize;
        let mut left = number(&part["bytes"]);
        for extent in part["extents"].as_array().unwrap() {
            let place = &mut content[number(&extent[0])..][..number(&extent[1])];
            if extent[2] == "zero" {
                place.fill(0);
            } else {
                self.0.read_exact(place).unwrap();
                left -= place.len();
            }
        }
        assert_eq!(left, 0);
        part["next"].as_u64().unwrap()
    }
}

fn write(control: &Control, index: usize, offset: u64, byte: u8) {
    let mut bytes = vec![byte; 4096];
    let disk = &control.0.disks[index].image.disk;
    disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
        .unwrap();
}

/// Whoever loses the connection goes on with another one.
#[test]
fn a_backup_is_read_over_the_socket() {
    let (control, dir) = control();
    let path = dir.path().join("socket");
    let _socket = ControlSocket::bind(&path)
        .and_then(|socket| socket.serve(control.clone()))
        .unwrap();
    for (index, disk) in ["vda", "vdb"].into_iter().enumerate() {
        write(&control, index, 0, 1);
        write(&control, index, SIZE - 4096, 2);
        let mut client = Client::new(&path);
        let begin = json!({"command": "backup-begin", "disk": disk, "scratch_size": "512K"});
        let begun = client.ask(&begin)["ok"].clone();
        let id = begun["backup"].as_str().unwrap().to_owned();
        assert_eq!(begun["size"], SIZE);
        assert_eq!(
            (&begun["wanted"], &begun["granularity"]),
            (&json!(SIZE), &json!(65536))
        );
        assert_eq!(
            (&begun["disk"], &begun["base"]),
            (&json!(disk), &Value::Null)
        );
        assert_eq!(begun["scratch_size"], 512 << 10);
        write(&control, index, 0, 8);
        write(&control, index, SIZE - 4096, 9);
        let mut content = vec![0xee; SIZE as usize];
        let read = |from: u64, max: u64| json!({"command": "backup-read", "backup": id, "from": from, "max": max});
        let (kind, message) = client.refused(&read(0, 0));
        assert_eq!(
            (&*kind, &*message),
            ("bad-argument", "max: there is nothing in 0 bytes")
        );
        let some = json!({"command": "backup-read", "backup": id, "from": 0, "max": "1K"});
        assert_eq!(client.read(&some, &mut content), 1024);
        drop(client);
        content[500..].fill(0xee);
        let mut client = Client::new(&path);
        assert_eq!(client.read(&read(500, 4 << 30), &mut content), SIZE);
        let mut expected = vec![0; SIZE as usize];
        expected[..4096].fill(1);
        expected[SIZE as usize - 4096..].fill(2);
        assert!(content == expected);
        // What has been released is not there any more.
        let kept = json!({"command": "backup-read", "backup": id, "from": SIZE, "release": 900});
        assert_eq!(client.read(&kept, &mut content), SIZE);
        let (kind, message) = client.refused(&read(899, 1));
        assert_eq!(kind, "backup");
        assert!(
            message.contains("offset 899 is not one of 900"),
            "{message}"
        );
        let list = client.ask(&json!({"command": "backups"}))["ok"].clone();
        let [listed] = &list["backups"].as_array().unwrap()[..] else {
            panic!("{list}");
        };
        assert_eq!(
            (&listed["state"], &listed["error"]),
            (&json!("running"), &Value::Null)
        );
        assert_eq!(listed["scratch_peak"], 2 * 65536);
        let end = json!({"command": "backup-end", "backup": id});
        assert_eq!(client.ask(&end), json!({"ok": {}}));
        assert_eq!(client.refused(&end).0, "no-such-backup");
        assert!(control.backups().is_empty());
    }
}

#[test]
fn bitmaps_and_failures() {
    let (control, dir) = control();
    let path = dir.path().join("socket");
    let _socket = ControlSocket::bind(&path)
        .and_then(|socket| socket.serve(control.clone()))
        .unwrap();
    let mut client = Client::new(&path);
    let mut content = vec![0; SIZE as usize];
    let begin = |more: Value| {
        let mut request = json!({"command": "backup-begin", "disk": "vdb"});
        request
            .as_object_mut()
            .unwrap()
            .extend(more.as_object().unwrap().clone());
        request
    };
    let id = |answer: &Value| answer["ok"]["backup"].as_str().unwrap().to_owned();
    let read = |id: &str| json!({"command": "backup-read", "backup": id, "from": 0, "max": SIZE});
    let full = client.ask(&begin(json!({"track": "b"})));
    let first = id(&full);
    client.read(&read(&first), &mut content);
    client.ask(&json!({"command": "backup-end", "backup": first}));
    write(&control, 1, 70_000, 5);
    // The first of these ends with nothing, and the second one has it all.
    for cancel in [true, false] {
        let increment = client.ask(&begin(json!({"since": "b"})));
        let ok = &increment["ok"];
        assert_eq!((&ok["base"], &ok["wanted"]), (&json!(first), &json!(65536)));
        assert_eq!(
            (&ok["incremental"], &ok["bitmap"]),
            (&json!(true), &json!("b"))
        );
        let id = id(&increment);
        content[65536..131_072].fill(0xee);
        client.read(&read(&id), &mut content);
        assert_eq!((content[69_999], content[70_000]), (0, 5));
        let end = json!({"command": "backup-end", "backup": id, "cancel": cancel});
        assert_eq!(client.ask(&end), json!({"ok": {}}));
    }
    let empty = client.ask(&begin(json!({"since": "b", "keep": true})));
    assert_eq!(empty["ok"]["wanted"], 0);
    let end = json!({"command": "backup-end", "backup": id(&empty)});
    let (kind, message) = client.refused(&end);
    assert_eq!(kind, "backup");
    assert!(message.contains("read up to offset 0 of"), "{message}");

    for (more, kind, text) in [
        (
            json!({"since": "b", "track": "c"}),
            "bad-argument",
            "exclude each other",
        ),
        (json!({"keep": true}), "bad-argument", "which is missing"),
        (
            json!({"scratch_size": true}),
            "bad-argument",
            "scratch_size: true is neither",
        ),
        (json!({"since": "x"}), "disk", "'x' not found"),
        (
            json!({"disk": "vda", "since": "b"}),
            "disk",
            "no place for bitmaps",
        ),
        (json!({"scratch_dir": "/nowhere"}), "disk", "/nowhere"),
        (json!({"speed": 1}), "bad-argument", "speed"),
    ] {
        let (found, message) = client.refused(&begin(more));
        assert!(
            found == kind && message.contains(text),
            "{found}: {message}"
        );
    }
    let wrong = json!({"command": "backup-end", "backup": "1"});
    assert_eq!(client.refused(&wrong).0, "bad-argument");

    // The guest changes more than there is room for.
    let small = client.ask(&begin(json!({"scratch_size": 0})));
    write(&control, 1, 70_000, 6);
    let (kind, message) = client.refused(&read(&id(&small)));
    assert_eq!(kind, "backup");
    assert!(message.contains("is full"), "{message}");
    let list = control.backups();
    assert_eq!((list.len(), list[1].state), (2, "failed"));
    control.shut_down();
    assert_eq!(client.refused(&read(&first)).0, "ended");
    control.0.disks[1].image.disk.close().unwrap();
    assert_eq!(control.backups()[0].state, "failed");
}
