//! `backup` of a disk that a monitor runs: here, a thread that speaks its language, and writes to the disk
//! whenever it is asked for something.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tandem_block::qcow2::{BitmapAction, OpenOptions, Qcow2};
use tandem_block::{Backup, BackupKind, BackupOptions, Disk, LiveDisk, VolatileSlice};

use crate::run::{Place, Run, words};

const SIZE: u64 = 8 << 20;

/// Who runs the disk `disk`, in its place.
struct Monitor {
    place: Place,
    disk: Arc<LiveDisk>,
    backups: Arc<Mutex<Vec<Backup>>>,
    /// What the clients have asked for.
    asked: Arc<Mutex<Vec<Value>>>,
}

fn write(disk: &LiveDisk, offset: u64, len: usize, byte: u8) {
    let mut bytes = vec![byte; len];
    disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset)
        .unwrap();
}

impl Monitor {
    fn start() -> Self {
        let place = Place::tandem();
        place.make("create -q -f qcow2 disk 8M");
        let disk = Qcow2::open(&place.path("disk"), &OpenOptions::default()).unwrap();
        let disk = Arc::new(LiveDisk::new(disk));
        let add = BitmapAction::Add {
            name: b"b".to_vec(),
            granularity: None,
            enabled: true,
        };
        disk.change_bitmaps(&[add]).unwrap();
        for i in 0..SIZE >> 16 {
            write(&disk, i << 16, 1 << 16, i as u8);
        }
        let monitor = Self {
            place,
            disk,
            backups: Arc::default(),
            asked: Arc::default(),
        };
        let listener = UnixListener::bind(monitor.place.path("socket")).unwrap();
        let serving = (
            monitor.disk.clone(),
            monitor.backups.clone(),
            monitor.asked.clone(),
        );
        thread::spawn(move || {
            for stream in listener.incoming() {
                let (disk, backups, asked) = &serving;
                serve(&stream.unwrap(), disk, backups, asked);
            }
        });
        monitor
    }

    fn content(&self) -> Vec<u8> {
        let mut bytes = vec![0; SIZE as usize];
        self.disk
            .read_at(&[VolatileSlice::from(&mut bytes[..])], 0)
            .unwrap();
        bytes
    }

    fn dirty(&self) -> u64 {
        self.disk.bitmaps().unwrap()[0].dirty.unwrap()
    }

    fn run(&self, line: &str) -> Run {
        self.place.run(&words(line))
    }

    fn quietly(&self, line: &str) {
        let run = self.run(line);
        let said = (run.status, &*run.stdout, &*run.stderr);
        assert_eq!(said, (Some(0), "", ""), "{line}");
    }

    /// Whether the last of the requests was `command`.
    fn ends_with(&self, command: &str) -> bool {
        let asked = self.asked.lock().unwrap();
        asked
            .last()
            .is_some_and(|request| request["command"] == command)
    }
}

/// Answers the requests of one client.
fn serve(
    stream: &UnixStream,
    disk: &Arc<LiveDisk>,
    backups: &Mutex<Vec<Backup>>,
    asked: &Mutex<Vec<Value>>,
) {
    for line in BufReader::new(stream).lines().map_while(Result::ok) {
        let request: Value = serde_json::from_str(&line).unwrap();
        asked.lock().unwrap().push(request.clone());
        let mut payload = Vec::new();
        let answer = match carry_out(&request, disk, &mut backups.lock().unwrap(), &mut payload) {
            Ok(value) => json!({"ok": value}),
            Err(error) => json!({"error": {"kind": "backup", "message": error.to_string()}}),
        };
        let answer = format!("{answer}\n");
        let mut stream = stream;
        if stream
            .write_all(answer.as_bytes())
            .and_then(|()| stream.write_all(&payload))
            .is_err()
        {
            return;
        }
        // The guest goes on.
        let round = asked.lock().unwrap().len() as u64;
        write(disk, round * 2_000_000 % (SIZE - 4096), 4096, round as u8);
        write(disk, SIZE - 4096, 4096, round as u8);
    }
}

fn carry_out(
    request: &Value,
    disk: &Arc<LiveDisk>,
    backups: &mut Vec<Backup>,
    payload: &mut Vec<u8>,
) -> tandem_block::Result<Value> {
    let number = |name: &str| request[name].as_u64().unwrap();
    let name = |value: &Value| value.as_str().map(|name| name.as_bytes().to_vec());
    let find = |backups: &[Backup]| {
        let is_it = |backup: &Backup| request["backup"] == backup.id().to_string();
        backups.iter().position(is_it).unwrap()
    };
    match request["command"].as_str().unwrap() {
        "backup-begin" => {
            let kind = match name(&request["since"]) {
                None => BackupKind::Full {
                    track: name(&request["track"]),
                },
                Some(bitmap) => BackupKind::Since {
                    bitmap,
                    keep: request["keep"].as_bool().unwrap(),
                },
            };
            let options = BackupOptions {
                kind,
                scratch_size: request["scratch_size"].as_u64().unwrap_or(64 << 20),
                ..BackupOptions::default()
            };
            let backup = LiveDisk::begin_backup(disk, &options)?;
            let info = info(&backup);
            backups.push(backup);
            Ok(info)
        }
        "backups" => Ok(json!({"backups": Vec::from_iter(backups.iter().map(info))})),
        "backup-read" => {
            let backup = &backups[find(backups)];
            // An answer has what it has room for, whatever has been asked for.
            payload.resize(number("max").min(1 << 20) as usize, 0);
            backup.release(number("release"))?;
            let chunk = backup.read(number("from"), payload);
            payload.truncate(chunk.as_ref().map_or(0, |chunk| chunk.bytes));
            let chunk = chunk?;
            let kind = |is_zero| if is_zero { "zero" } else { "data" };
            let extents = chunk
                .extents
                .iter()
                .map(|e| json!([e.offset, e.len, kind(e.is_zero)]));
            let extents = Vec::from_iter(extents);
            Ok(json!({"next": chunk.next, "bytes": chunk.bytes, "extents": extents}))
        }
        "backup-end" => {
            let backup = backups.remove(find(backups));
            match request["cancel"] == true {
                true => backup.cancel()?,
                false => backup.finish()?,
            }
            Ok(json!({}))
        }
        other => panic!("{other}"),
    }
}

fn info(backup: &Backup) -> Value {
    json!({
        "backup": backup.id().to_string(),
        "base": backup.base().map(|id| id.to_string()),
        "incremental": matches!(backup.kind(), BackupKind::Since { .. }),
        "bitmap": "b",
        "size": backup.size(),
        "granularity": backup.granularity(),
    })
}

/// Full and increments, of a disk that is written all the time.
#[test]
fn backups_of_a_disk_in_use() {
    let monitor = Monitor::start();
    let mut streams = String::new();
    for i in 0..3 {
        write(&monitor.disk, 3 << 20, 100_000, 100 + i);
        let how = match i {
            0 => "--track b".to_owned(),
            _ => format!("--since b -b {}.qcow2 -F qcow2", i - 1),
        };
        // The first request is the instant.
        let expected = monitor.content();
        monitor.quietly(&format!("backup --control socket {how} vda {i}.qcow2"));
        assert!(monitor.ends_with("backup-end"));
        monitor.place.make(&format!("check -q {i}.qcow2"));
        monitor
            .place
            .make(&format!("convert -O raw {i}.qcow2 content"));
        assert!(
            fs::read(monitor.place.path("content")).unwrap() == expected,
            "{i}"
        );
    }
    for i in 0..3 {
        let how = if i == 0 { "--track b" } else { "--since b" };
        let expected = monitor.content();
        monitor.quietly(&format!(
            "backup --control socket {how} -O stream vda {i}.stream"
        ));
        streams += &format!(" {i}.stream");
        // The monitor knows which one each goes on from.
        monitor.quietly(&format!("restore {streams} restored"));
        assert!(
            fs::read(monitor.place.path("restored")).unwrap() == expected,
            "{i}"
        );
    }
    let before = monitor.dirty();
    let wrong = monitor.run("backup --control socket --since b -b 0.stream -O stream vda x");
    assert!(wrong.stderr.contains("goes on from"), "{}", wrong.stderr);
    let full = monitor.run("backup --control socket --since b --scratch-size 0 -O stream vda x");
    assert!(full.stderr.contains("is full"), "{}", full.stderr);
    assert!(monitor.ends_with("backup-end") && monitor.dirty() >= before);
    assert!(!monitor.place.path("x").exists() && monitor.backups.lock().unwrap().is_empty());
}

/// The reader of the stream goes away, and comes back for the rest.
#[test]
fn a_stream_that_is_cut_off_goes_on() {
    let monitor = Monitor::start();
    let expected = monitor.content();
    let line = "backup --control socket --track b -O stream vda -";
    let mut child = monitor.place.command(&words(line));
    let mut child = child
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut part = vec![0; 3_300_000];
    child.stdout.take().unwrap().read_exact(&mut part).unwrap();
    fs::write(monitor.place.path("part"), part).unwrap();
    let mut said = String::new();
    child
        .stderr
        .take()
        .unwrap()
        .read_to_string(&mut said)
        .unwrap();
    assert_eq!(child.wait().unwrap().code(), Some(1));
    assert!(
        said.contains("error while writing the stream: Broken pipe"),
        "{said}"
    );
    let command = said.lines().find(|line| line.contains("--resume")).unwrap();
    let cut = monitor.run("restore part restored").stderr;
    let good = cut.split("good up to offset ").nth(1).unwrap();
    let good: u64 = good.split(' ').next().unwrap().parse().unwrap();
    assert_eq!(good, 3 << 20);
    let command = command.replace("OFFSET -", &format!("{good} rest"));
    let command = command.trim().strip_prefix("tandem-img ").unwrap();
    monitor.quietly(command);
    monitor.quietly("restore part rest restored");
    assert!(fs::read(monitor.place.path("restored")).unwrap() == expected);
    let wrong = monitor.run("restore rest restored").stderr;
    assert!(wrong.contains("one is missing before it"), "{wrong}");
    // Who does not want the rest says so.
    let gone = monitor.run(command);
    assert!(
        gone.stderr.contains("there is no backup"),
        "{}",
        gone.stderr
    );
    let kept = LiveDisk::begin_backup(&monitor.disk, &BackupOptions::default()).unwrap();
    let id = kept.id();
    monitor.backups.lock().unwrap().push(kept);
    monitor.quietly(&format!("backup --control socket --cancel {id}"));
    assert!(monitor.backups.lock().unwrap().is_empty());
}

/// A signal gives the backup up, and leaves nothing.
#[test]
fn a_backup_that_is_interrupted() {
    let monitor = Monitor::start();
    monitor.quietly("backup --control socket --track b vda full");
    write(&monitor.disk, 0, 1 << 20, 9);
    let names = || {
        let names = fs::read_dir(monitor.place.path("")).unwrap();
        names.count()
    };
    let before = names();
    for (signal, number) in [("INT", 2), ("TERM", 15)] {
        for kind in ["qcow2", "stream"] {
            let dirty = monitor.dirty();
            let line = format!("backup --control socket --since b -r 100k -O {kind} vda new");
            let mut child = Command::new("env")
                .args(["--default-signal", env!("CARGO_BIN_EXE_tandem-img")])
                .args(words(&line))
                .current_dir(monitor.place.path(""))
                .spawn()
                .unwrap();
            let start = Instant::now();
            while !monitor.ends_with("backup-read") {
                assert!(start.elapsed() < Duration::from_secs(20));
                thread::sleep(Duration::from_millis(2));
            }
            let id = child.id().to_string();
            let sent = Command::new("kill")
                .args([format!("-{signal}"), id])
                .status();
            assert!(sent.unwrap().success());
            let status = child.wait().unwrap();
            assert_eq!(
                std::os::unix::process::ExitStatusExt::signal(&status),
                Some(number)
            );
            assert!(monitor.ends_with("backup-end"));
            assert!(monitor.dirty() >= dirty);
            assert_eq!(names(), before);
        }
    }
}

/// Who does not read holds up the first signal, and not the second one.
#[test]
fn a_backup_that_is_interrupted_while_nobody_reads_it() {
    let monitor = Monitor::start();
    let line = "backup --control socket -O stream vda -";
    let mut command = Command::new("env");
    command.args(["--default-signal", env!("CARGO_BIN_EXE_tandem-img")]);
    command.args(words(line)).stdout(Stdio::piped());
    let mut child = command.current_dir(monitor.place.path("")).spawn().unwrap();
    let start = Instant::now();
    let wait = || {
        assert!(start.elapsed() < Duration::from_secs(20));
        thread::sleep(Duration::from_millis(2));
    };
    // The first part is being written then, and the second one waits.
    while monitor.asked.lock().unwrap().len() < 4 {
        wait();
    }
    let status = loop {
        let id = child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &id]).status();
        assert!(sent.unwrap().success());
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        wait();
    };
    assert_eq!(
        std::os::unix::process::ExitStatusExt::signal(&status),
        Some(15)
    );
}
