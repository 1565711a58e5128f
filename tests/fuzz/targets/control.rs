//! Clients that say anything over the control socket, while a guest writes.
#![no_main]

use std::collections::BTreeMap;
use std::mem::take;
use std::path::{Path, PathBuf};
use std::sync::{Arc, LazyLock};
use std::thread;
use std::time::Duration;

use libfuzzer_sys::fuzz_target;
use serde_json::{Value, json};
use tandem_block::qcow2::{CheckOptions, Info, OpenOptions, Qcow2, check};
use tandem_block::{Disk, Raw, VolatileSlice};
use tandem_fuzz::feedback;
use tandem_fuzz::input::Input;
use tandem_fuzz::limit::limited;
use tandem_fuzz::machine::{Client, KINDS, Kind, PLACE, machine};
use tandem_fuzz::requests::{Known, lines, long_line};
use tandem_vmm::control::{Control, fuzzing};

/// Most things that happen.
const STEPS: usize = 24;
const CLIENTS: usize = 3;
/// Disks are not followed beyond so many bytes.
const MODEL: u64 = 2 << 20;
/// All kinds of errors that a request may be answered with.
const ERRORS: [&str; 13] = [
    "bad-request",
    "unknown-command",
    "bad-argument",
    "no-such-disk",
    "no-such-job",
    "no-such-backup",
    "busy",
    "would-shrink",
    "needs-size",
    "backup",
    "disk",
    "host",
    "ended",
];

/// A machine, and what must hold of it.
struct World {
    control: Control,
    clients: Vec<Client>,
    disks: Vec<Arc<dyn Disk>>,
    /// What each disk holds, unless that is not known.
    contents: Vec<Option<Vec<u8>>>,
    /// Backups under way, with what the disk held at their instant.
    backups: BTreeMap<String, Option<Vec<u8>>>,
    /// Other sides of forks.
    forks: Vec<(PathBuf, Option<Vec<u8>>)>,
    /// Something may have been written to what is below another image.
    has_committed: bool,
}

fn read(disk: &dyn Disk) -> Option<Vec<u8>> {
    if disk.size() > MODEL {
        return None;
    }
    let mut bytes = vec![0; disk.size() as usize];
    disk.read_at(&[VolatileSlice::from(&mut bytes[..])], 0)
        .expect("a disk can be read");
    Some(bytes)
}

fn assert_same(found: &[u8], wanted: &[u8], what: &str) {
    assert_eq!(found.len(), wanted.len(), "{what}");
    if let Some(at) = (0..found.len()).find(|&at| found[at] != wanted[at]) {
        let (found, wanted) = (found[at], wanted[at]);
        panic!("{what}: {found} in place of {wanted} at {at}");
    }
}

impl World {
    fn new(kinds: [&Kind; 2]) -> Self {
        let control = machine(kinds);
        let disks = fuzzing::disks(&control);
        Self {
            clients: (0..CLIENTS).map(|_| Client::connect(&control)).collect(),
            contents: disks.iter().map(|disk| read(&**disk)).collect(),
            disks,
            control,
            backups: BTreeMap::new(),
            forks: Vec::new(),
            has_committed: false,
        }
    }

    fn step(&mut self, input: &mut Input<'_>) {
        match input.byte() {
            0..64 => self.write(input),
            64..216 => self.talk(input),
            216..232 => self.talk_at_once(input),
            232..240 => {
                let client = input.below(CLIENTS);
                let line = long_line(input);
                self.clients[client].send(&line);
                self.take_answers(client, &line);
            }
            240..248 => self.say_half(input),
            248..252 => self.leave(input),
            _ => thread::sleep(Duration::from_micros(input.byte().into())),
        }
    }

    /// The guest changes a disk.
    fn write(&mut self, input: &mut Input<'_>) {
        let index = input.below(4) / 3;
        let disk = &self.disks[index];
        let size = disk.size();
        let len = (u64::from(input.byte()) + 1) << 9;
        let offset = (u64::from(input.u16()) << 9) % size.max(1);
        let len = len.min(size - offset);
        let byte = input.byte();
        let mut bytes = vec![byte; len as usize];
        match byte {
            0..16 => disk.write_zeroes(offset, len, byte & 1 == 0),
            16..24 => disk.discard(offset, len),
            _ => disk.write_at(&[VolatileSlice::from(&mut bytes[..])], offset),
        }
        .expect("a guest can write");
        if byte < 24 {
            // A discard may leave what there was.
            let bufs = [VolatileSlice::from(&mut bytes[..])];
            disk.read_at(&bufs, offset).expect("a guest can read");
            assert!(byte >= 16 || bytes.iter().all(|byte| *byte == 0));
        }
        if let Some(content) = &mut self.contents[index] {
            content[offset as usize..][..len as usize].copy_from_slice(&bytes);
        }
    }

    fn lines(&self, may_resize: bool, input: &mut Input<'_>) -> Vec<u8> {
        let known = Known {
            directory: &PLACE.directory(),
            backups: self.backups.keys().map(|name| &**name).collect(),
            may_resize,
        };
        (0..1 + input.below(3))
            .flat_map(|_| lines(&known, input))
            .collect()
    }

    /// A client sends some lines, and takes the answers.
    fn talk(&mut self, input: &mut Input<'_>) {
        let (client, lines) = (input.below(CLIENTS), self.lines(true, input));
        self.clients[client].send(&lines);
        self.take_answers(client, &lines);
    }

    /// Two do so at the same time.
    fn talk_at_once(&mut self, input: &mut Input<'_>) {
        let lines = [(), ()].map(|()| self.lines(false, input));
        for (client, lines) in lines.iter().enumerate() {
            self.clients[client].send(lines);
        }
        for (client, lines) in lines.iter().enumerate() {
            self.take_answers(client, lines);
        }
    }

    /// A client ends in the middle of a line, which is taken for a whole one.
    fn say_half(&mut self, input: &mut Input<'_>) {
        let (client, mut lines) = (input.below(CLIENTS), self.lines(true, input));
        lines.truncate(usize::from(input.u16()) % lines.len());
        self.clients[client].send(&lines);
        self.clients[client].end_requests();
        self.take_answers(client, &lines);
        assert!(
            self.clients[client].answer().is_none(),
            "more than was asked"
        );
        self.clients[client] = Client::connect(&self.control);
    }

    /// A client has gone before it is answered.
    fn leave(&mut self, input: &mut Input<'_>) {
        let client = input.below(CLIENTS);
        // Nobody would learn what has been begun, or how large a disk is.
        for request in [r#"{"command":"metrics"}"#, r#"{"command":"flush"}"#] {
            self.clients[client].send(request.as_bytes());
            self.clients[client].send(b"\n");
        }
        self.clients[client] = Client::connect(&self.control);
    }

    /// Takes as many answers as `lines` ask for.
    fn take_answers(&mut self, client: usize, lines: &[u8]) {
        let requests = lines.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
        for request in requests.filter(|request| !request.is_empty()) {
            let Some((answer, payload)) = self.clients[client].answer() else {
                panic!("no answer to {}", String::from_utf8_lossy(request));
            };
            let is_last = self.look(request, &answer, &payload);
            if is_last {
                assert!(self.clients[client].answer().is_none(), "it goes on");
                self.clients[client] = Client::connect(&self.control);
                return;
            }
        }
    }

    /// Looks at an answer. Returns whether it is the last one of a connection.
    fn look(&mut self, request: &[u8], answer: &Value, payload: &[u8]) -> bool {
        let keys = answer.as_object().expect("an answer is an object");
        let parsed: Value = serde_json::from_slice(request).unwrap_or_default();
        if let Some(error) = keys.get("error") {
            let kind = error["kind"].as_str().expect("an error has a kind");
            let number = ERRORS.iter().position(|known| *known == kind);
            feedback::note(&[1, number.expect("a known error")]);
            assert!(error["message"].is_string() && keys.get("ok").is_none());
            return error["message"].as_str() == Some("the request has more than 65536 bytes");
        }
        assert_eq!(keys.get("id"), parsed.get("id"), "{answer}");
        let ok = keys.get("ok").expect("an answer is an error or not");
        let command = parsed["command"].as_str().unwrap_or_default();
        feedback::note(&[2, command.len(), payload.len().min(1)]);
        match command {
            "backup-begin" => {
                let content = self.contents[index(&ok["disk"])].clone();
                let name = ok["backup"].as_str().expect("a name").to_owned();
                self.backups.insert(name, content);
            }
            "backup-read" => self.compare(&parsed["backup"], ok, payload),
            "backup-end" => drop(self.backups.remove(parsed["backup"].as_str().unwrap_or(""))),
            "resize" => self.resize(index(&parsed["disk"]), &parsed["size"], &ok["size"]),
            "fork" => {
                let content = self.contents[index(&parsed["disk"])].clone();
                let path = parsed["fork"].as_str().expect("a path");
                self.forks.push((path.into(), content));
            }
            "commit" => self.has_committed = true,
            _ => {}
        }
        false
    }

    /// Compares a part of a backup with what the disk held.
    fn compare(&self, name: &Value, answer: &Value, payload: &[u8]) {
        let content = self.backups.get(name.as_str().unwrap_or_default());
        let Some(Some(content)) = content else { return };
        let mut rest = payload;
        for extent in answer["extents"].as_array().expect("a list") {
            let number = |n: usize| extent[n].as_u64().expect("a number") as usize;
            let wanted = &content[number(0)..][..number(1)];
            if extent[2] == "zero" {
                assert!(wanted.iter().all(|byte| *byte == 0), "{extent}");
                continue;
            }
            let (found, others) = rest.split_at(number(1));
            assert_same(found, wanted, "a backup");
            rest = others;
        }
        assert!(rest.is_empty(), "bytes of no extent");
    }

    fn resize(&mut self, disk: usize, asked: &Value, size: &Value) {
        let size = size.as_u64().expect("a size");
        self.contents[disk] = match self.contents[disk].take() {
            Some(mut content) if size <= MODEL => {
                // A raw disk may end within a sector, whose rest is zero.
                let asked = asked.as_u64().unwrap_or(size).min(size);
                content.truncate(asked as usize);
                content.resize(size as usize, 0);
                Some(content)
            }
            _ => read(&*self.disks[disk]),
        };
    }

    fn ask(&mut self, request: &Value) -> Value {
        self.clients[0].send(format!("{request}\n").as_bytes());
        self.clients[0].answer().expect("an answer").0
    }

    /// Ends everything. Returns where the images of the disks are.
    fn end_all(&mut self) -> Vec<PathBuf> {
        for backup in take(&mut self.backups).into_keys() {
            self.ask(&json!({"command": "backup-end", "backup": backup, "cancel": true}));
        }
        let left = self.ask(&json!({"command": "backups"}));
        assert_eq!(left["ok"]["backups"], json!([]), "{left}");
        for job in self.jobs() {
            let ended = self.ask(&json!({"command": "job-cancel", "job": job}));
            assert_eq!(ended["ok"], json!({}), "{ended}");
        }
        while !self.jobs().is_empty() {
            thread::sleep(Duration::from_micros(200));
        }
        for (disk, content) in self.disks.iter().zip(&self.contents) {
            if let Some((found, wanted)) = read(&**disk).zip(content.as_ref()) {
                assert_same(&found, wanted, "a disk");
            }
        }
        let disks = self.ask(&json!({"command": "disks"}));
        let disks = disks["ok"]["disks"].as_array().expect("a list").clone();
        let path = |disk: &Value| disk["path"].as_str().expect("a path").into();
        disks.iter().map(path).collect()
    }

    /// Numbers of the jobs that go on.
    fn jobs(&mut self) -> Vec<u64> {
        let jobs = self.ask(&json!({"command": "jobs"}));
        let jobs = jobs["ok"]["jobs"].as_array().expect("a list");
        let running = jobs.iter().filter(|job| job["state"] == "running");
        running.filter_map(|job| job["job"].as_u64()).collect()
    }
}

/// The number of a disk that an answer has accepted.
fn index(disk: &Value) -> usize {
    usize::from(*disk == "vdb" || *disk == 1)
}

/// Opens the image at `path` as it is found.
fn open(path: &Path) -> Box<dyn Disk> {
    if Info::read(path).is_err() {
        return Box::new(Raw::open(path, true).expect("a file can be opened"));
    }
    let options = OpenOptions {
        read_only: true,
        ..OpenOptions::default()
    };
    Box::new(Qcow2::open(path, &options).expect("an image can be opened"))
}

fn run(input: &mut Input<'_>) {
    let kinds = [input.pick(&KINDS[0]), input.pick(&KINDS[1])];
    let mut world = World::new(kinds);
    for _ in 0..STEPS {
        world.step(input);
        if input.is_empty() {
            break;
        }
    }
    let paths = world.end_all();
    for closed in fuzzing::end(&world.control) {
        closed.expect("a disk can be closed");
    }
    let (contents, forks) = (take(&mut world.contents), take(&mut world.forks));
    let has_committed = world.has_committed;
    // Nobody has the images open any more.
    drop(world);
    PLACE.assert_outside_is_as_it_was();
    for path in PLACE.files() {
        if Info::read(&path).is_ok() {
            let report = check(&path, &CheckOptions::default(), &mut |_| {});
            let report = report.expect("an image can be checked");
            let name = path.display();
            assert!(report.corruptions == 0, "'{name}': {report:?}");
            assert!(
                report.check_errors + report.leaks == 0,
                "'{name}': {report:?}"
            );
        }
    }
    let kept = kinds.iter().zip(paths).zip(contents);
    let kept = kept.filter(|((kind, _), _)| !kind.is_temporary);
    let kept = kept.map(|((_, path), content)| (path, content));
    let forks = forks.into_iter().filter(|_| !has_committed);
    for (path, content) in kept.chain(forks) {
        if let Some((found, wanted)) = read(&*open(&path)).zip(content) {
            assert_same(&found, &wanted, "an image");
        }
    }
}

fuzz_target!(
    init: {
        LazyLock::force(&KINDS);
        LazyLock::force(&PLACE);
    },
    |bytes: &[u8]| {
        limited(|| run(&mut Input::new(bytes)));
    }
);
