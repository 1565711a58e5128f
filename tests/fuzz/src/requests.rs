//! Requests to the control socket: valid ones mostly, with a mistake now and then.

use std::path::Path;

use serde_json::{Map, Value, json};

use crate::feedback;
use crate::input::Input;

/// What a client knows that it can ask for.
pub struct Known<'a> {
    /// Where the images are.
    pub directory: &'a Path,
    /// Names of backups that have been begun.
    pub backups: Vec<&'a str>,
    /// The command that changes what a disk reads may be among them.
    pub may_resize: bool,
}

const COMMANDS: [&str; 30] = [
    "backup-read",
    "backup-read",
    "backup-read",
    "backup-begin",
    "backup-begin",
    "backup-end",
    "backups",
    "bitmap-add",
    "bitmap-add",
    "bitmap-clear",
    "bitmap-disable",
    "bitmap-enable",
    "bitmap-merge",
    "bitmap-remove",
    "bitmap-transaction",
    "bitmaps",
    "commit",
    "commit",
    "disks",
    "flush",
    "fork",
    "fork",
    "job-cancel",
    "jobs",
    "metrics",
    "pause",
    "rebase",
    "resume",
    "status",
    "resize",
];
/// Those that change bitmaps.
const BITMAPS: std::ops::Range<usize> = 7..14;
/// Longest line that a client may send.
const MAX_LINE: usize = 64 << 10;

/// Lines of a client, each with its end.
pub fn lines(known: &Known<'_>, input: &mut Input<'_>) -> Vec<u8> {
    let mut request = request(known, input);
    if input.byte() >= 208 {
        spoil(&mut request, input);
    }
    let mut line = Value::Object(request).to_string().into_bytes();
    if input.byte() >= 224 {
        spoil_text(&mut line, input);
    }
    line.push(b'\n');
    line
}

/// The longest line that there may be, or one that is longer.
pub fn long_line(input: &mut Input<'_>) -> Vec<u8> {
    let len = MAX_LINE - 2 + input.below(5);
    let (first, next) = input.choose(&[
        (&b"{\"command\":\"status\"}"[..], b' '),
        (b"", b'['),
        (b"{\"command\":\"", b'x'),
        (b"", b'\0'),
    ]);
    let mut line = first.to_vec();
    line.resize(len, next);
    line.push(b'\n');
    line
}

fn request(known: &Known<'_>, input: &mut Input<'_>) -> Map<String, Value> {
    let commands = COMMANDS.len() - usize::from(!known.may_resize);
    let command = input.below(commands);
    feedback::note(&[command]);
    let command = COMMANDS[command];
    let mut arguments = arguments(command, known, input);
    if input.bool() {
        arguments["id"] = json!(input.byte());
    }
    arguments["command"] = command.into();
    match arguments {
        Value::Object(arguments) => arguments,
        _ => Map::new(),
    }
}

fn arguments(command: &str, known: &Known<'_>, input: &mut Input<'_>) -> Value {
    match command {
        "backup-begin" => backup(known, input),
        "backup-read" => {
            let (backup, from) = (backup_name(known, input), offset(input));
            let mut read = json!({"backup": backup, "from": from});
            optional(&mut read, "max", bytes, input);
            optional(&mut read, "release", |input| json!(offset(input)), input);
            read
        }
        "backup-end" => json!({"backup": backup_name(known, input), "cancel": input.bool()}),
        "bitmaps" => json!({"disk": disk(input)}),
        "bitmap-transaction" => {
            let actions = (0..input.below(5)).map(|_| {
                let command = COMMANDS[BITMAPS.start + input.below(BITMAPS.len())];
                let mut action = bitmap(command, input);
                action["command"] = command.into();
                action
            });
            let actions: Vec<_> = actions.collect();
            json!({"disk": disk(input), "actions": actions})
        }
        "commit" => {
            let mut commit = json!({"disk": disk(input), "pivot": input.bool()});
            let base = |input: &mut Input<'_>| match input.bool() {
                true => json!(input.below(3)),
                false => path(known, input),
            };
            optional(&mut commit, "base", base, input);
            optional(&mut commit, "max_last", bytes, input);
            commit
        }
        "flush" => {
            let mut flush = json!({});
            optional(&mut flush, "disk", disk, input);
            flush
        }
        "fork" => {
            let (overlay, fork) = (path(known, input), path(known, input));
            json!({"disk": disk(input), "overlay": overlay, "fork": fork})
        }
        "job-cancel" => json!({"job": input.below(6)}),
        "rebase" => rebase(known, input),
        "resize" => {
            let mut resize = json!({"disk": disk(input), "shrink": input.bool()});
            optional(&mut resize, "size", bytes, input);
            resize
        }
        _ if command.starts_with("bitmap-") => {
            let mut change = bitmap(command, input);
            change["disk"] = disk(input);
            change
        }
        _ => json!({}),
    }
}

/// Adds an argument that need not be there.
fn optional(
    arguments: &mut Value,
    name: &str,
    value: impl FnOnce(&mut Input<'_>) -> Value,
    input: &mut Input<'_>,
) {
    if input.bool() {
        arguments[name] = value(input);
    }
}

fn backup(known: &Known<'_>, input: &mut Input<'_>) -> Value {
    let mut begin = json!({"disk": disk(input)});
    match input.byte() % 4 {
        0 => begin["track"] = name(input),
        1 => {
            begin["since"] = name(input);
            begin["keep"] = input.bool().into();
        }
        _ => {}
    }
    if input.byte() >= 224 {
        begin["scratch_dir"] = path(known, input);
    }
    optional(&mut begin, "scratch_size", bytes, input);
    begin
}

fn rebase(known: &Known<'_>, input: &mut Input<'_>) -> Value {
    let mut rebase = json!({"disk": disk(input)});
    if input.bool() {
        rebase["backing"] = "".into();
    } else {
        rebase["backing"] = path(known, input);
        rebase["format"] = input.choose(&["qcow2", "qcow2", "raw", "vmdk"]).into();
    }
    optional(&mut rebase, "max_last", bytes, input);
    rebase
}

fn bitmap(command: &str, input: &mut Input<'_>) -> Value {
    match command {
        "bitmap-add" => {
            let mut add = json!({"name": name(input), "disabled": input.byte() >= 192});
            optional(&mut add, "granularity", bytes, input);
            add
        }
        "bitmap-merge" => {
            let sources: Vec<_> = (0..input.below(4)).map(|_| name(input)).collect();
            json!({"target": name(input), "sources": sources})
        }
        _ => json!({"name": name(input)}),
    }
}

fn disk(input: &mut Input<'_>) -> Value {
    match input.byte() {
        0..120 => json!("vda"),
        120..160 => json!(0),
        160..220 => json!("vdb"),
        220..240 => json!(1),
        240..250 => json!("vdz"),
        _ => json!(input.u64()),
    }
}

fn name(input: &mut Input<'_>) -> Value {
    match input.byte() {
        choice @ 0..240 => ["a", "b", "c", "d"][usize::from(choice) % 4].into(),
        240..248 => "".into(),
        _ => "n".repeat(1000 + input.below(40)).into(),
    }
}

/// A name of a file, which may be outside the directory, or none.
fn path(known: &Known<'_>, input: &mut Input<'_>) -> Value {
    const NAMES: [&str; 20] = [
        "o1",
        "o2",
        "o3",
        "o4",
        "a",
        "b",
        "a.base",
        "b.base",
        "a.mid",
        "a.data",
        "sub",
        "sub/o",
        "../outside/o",
        "out/o",
        "out",
        "loop",
        "pipe",
        "none/o",
        "../outside/secret",
        "",
    ];
    let name = match input.byte() {
        choice @ 0..96 => NAMES[usize::from(choice) % 4],
        choice @ 96..240 => NAMES[usize::from(choice) % NAMES.len()],
        240..248 => return json!("/dev/zero"),
        _ => return json!(String::from_utf8_lossy(input.bytes(8))),
    };
    if input.byte() >= 224 {
        return name.into();
    }
    json!(known.directory.join(name).to_string_lossy())
}

fn backup_name(known: &Known<'_>, input: &mut Input<'_>) -> Value {
    match (&known.backups[..], input.byte()) {
        (backups, choice @ 0..240) if !backups.is_empty() => {
            backups[usize::from(choice) % backups.len()].into()
        }
        _ => format!("{:032x}", input.byte()).into(),
    }
}

fn offset(input: &mut Input<'_>) -> u64 {
    match input.byte() {
        0..224 => u64::from(input.byte() % 16) << 16,
        _ => input.value(),
    }
}

/// How many bytes there are to be.
fn bytes(input: &mut Input<'_>) -> Value {
    match input.byte() {
        0..160 => json!(u64::from(input.byte()) << 12),
        160..192 => json!(format!("{}K", input.byte())),
        192..208 => input
            .choose(&["1M", "0", "8E", "99999T", "-1", "4k", "1.5K", " "])
            .into(),
        _ => json!(input.value()),
    }
}

/// Makes a mistake in the arguments.
fn spoil(request: &mut Map<String, Value>, input: &mut Input<'_>) {
    let keys: Vec<String> = request.keys().cloned().collect();
    let key = input.pick(&keys).clone();
    match input.byte() % 4 {
        0 => drop(request.shift_remove(&key)),
        1 => drop(request.insert("other".to_owned(), json!(1))),
        _ => drop(request.insert(key, odd(input))),
    }
}

/// A value that few arguments have.
fn odd(input: &mut Input<'_>) -> Value {
    match input.byte() % 10 {
        0 => Value::Null,
        1 => json!(true),
        2 => json!(-1),
        3 => json!(1.5e300),
        4 => json!(u64::MAX),
        5 => json!([]),
        6 => json!({"a": [{}]}),
        7 => json!("\u{0}\n\"\\\u{1f600}"),
        8 => (0..100).fold(Value::Null, |inner, _| json!([inner])),
        _ => json!("x".repeat(1 << input.below(16))),
    }
}

/// Makes a mistake in the text.
fn spoil_text(line: &mut Vec<u8>, input: &mut Input<'_>) {
    let at = usize::from(input.u16()) % line.len();
    match input.byte() % 5 {
        0 => line.truncate(at),
        1 => line[at] = input.byte(),
        2 => line.insert(at, input.choose(b"\n\r \0{}[]\",\\\xff")),
        3 => *line = input.bytes(32).to_vec(),
        // An argument twice.
        _ => {
            let again = line[1..].to_vec();
            line.pop();
            line.push(b',');
            line.extend(again);
        }
    }
}
