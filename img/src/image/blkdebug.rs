//! Files that fail when they are told to, for tests of what a disk does then: `blkdebug`.
//!
//! Rules have QEMU's form. An event puts the rules about it in force, and those that inject errors stay so
//! until another one does; then requests to the file fail. The events that there are:
//!
//! | event | happens before |
//! | --- | --- |
//! | `read_aio`, `write_aio` | data is read or written |
//! | `l2_load` | a table, or a part of one, is read while the disk is open |
//! | `flush_to_disk` | a sync |

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::io::Errno;
use tandem_block::{Storage, VolatileSlice};

use crate::io::system_text;
use crate::size;

/// Rules that are read from a list or a configuration file.
type Sections = BTreeMap<String, BTreeMap<String, String>>;

/// Options of `blkdebug` that have no effect here: requests may have any alignment and length.
const LIMITS: [&str; 5] = [
    "max-transfer",
    "opt-write-zero",
    "max-write-zero",
    "opt-discard",
    "max-discard",
];

const EVENTS: [(&str, Event); 4] = [
    ("read_aio", Event::ReadData),
    ("write_aio", Event::WriteData),
    ("l2_load", Event::ReadTable),
    ("flush_to_disk", Event::Sync),
];

const REQUESTS: [(&str, Request); 5] = [
    ("read", Request::Read),
    ("write", Request::Write),
    ("write-zeroes", Request::Zero),
    ("discard", Request::Discard),
    ("flush", Request::Sync),
];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Event {
    ReadData,
    WriteData,
    ReadTable,
    Sync,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Request {
    Read,
    Write,
    Zero,
    Discard,
    Sync,
}

/// When a file fails.
#[derive(Clone, Debug, Default)]
pub struct Rules {
    errors: Vec<Injection>,
    states: Vec<Change>,
}

/// An error that is injected.
#[derive(Clone, Debug)]
struct Injection {
    event: Event,
    /// Counts in any if it is 0.
    state: u64,
    errno: i32,
    once: bool,
    /// Of the sector that a request must touch.
    offset: Option<u64>,
    /// Of any kind if it is `None`.
    request: Option<Request>,
}

/// Another state.
#[derive(Clone, Debug)]
struct Change {
    event: Event,
    state: u64,
    new_state: u64,
}

impl Rules {
    /// The rules that `options` hold, and those of the file that they name; nothing if there are none.
    ///
    /// # Errors
    /// The message about the first that is wrong.
    pub fn new<'a>(
        options: impl Iterator<Item = (&'a str, &'a str)>,
    ) -> Result<Option<Self>, String> {
        let mut sections = Sections::new();
        let mut limits = BTreeMap::new();
        for (name, value) in options {
            match name.split('.').collect::<Vec<_>>()[..] {
                ["config"] => read_config(value, &mut sections)?,
                ["align"] => drop(limits.insert(name, value)),
                [limit] if LIMITS.contains(&limit) => drop(limits.insert(name, value)),
                [kind @ ("inject-error" | "set-state"), at, key] => {
                    let section = sections.entry(format!("{kind} {at}")).or_default();
                    section.insert(key.to_owned(), value.to_owned());
                }
                _ => {
                    return Err(format!(
                        "Block protocol 'blkdebug' doesn't support the option '{name}'"
                    ));
                }
            }
        }
        check_limits(&limits)?;
        let mut rules = Self::default();
        for (name, section) in &sections {
            rules.add(name, section)?;
        }
        Ok((!sections.is_empty()).then_some(rules))
    }

    fn add(&mut self, name: &str, section: &BTreeMap<String, String>) -> Result<(), String> {
        let get = |key: &str| section.get(key).map(String::as_str);
        let number = |key: &str| match get(key).map(str::parse::<u64>) {
            None => Ok(None),
            Some(Ok(number)) => Ok(Some(number)),
            Some(Err(_)) => Err(format!("Parameter '{key}' expects a number")),
        };
        let event = get("event").ok_or("Missing event name for rule")?;
        let event = find(&EVENTS, event)
            .ok_or_else(|| format!("Event '{event}' of blkdebug is not supported"))?;
        let state = number("state")?.unwrap_or(0);
        let injects = name.starts_with("inject-error");
        let known: &[_] = match injects {
            true => &[
                "event",
                "state",
                "errno",
                "once",
                "sector",
                "iotype",
                "immediately",
            ],
            false => &["event", "state", "new_state"],
        };
        if let Some(key) = section.keys().find(|key| !known.contains(&key.as_str())) {
            return Err(format!("Invalid parameter '{key}'"));
        }
        if !injects {
            self.states.push(Change {
                event,
                state,
                new_state: number("new_state")?.unwrap_or(0),
            });
            return Ok(());
        }
        let sector = number("sector")?;
        let errno = number("errno")?.map_or(Some(Errno::IO.raw_os_error()), |errno| {
            i32::try_from(errno).ok()
        });
        self.errors.push(Injection {
            event,
            state,
            errno: errno.ok_or("Parameter 'errno' is too large")?,
            once: match get("once") {
                None | Some("off") => false,
                Some("on") => true,
                Some(_) => return Err("Parameter 'once' expects 'on' or 'off'".to_owned()),
            },
            offset: sector.map(|sector| sector.saturating_mul(512)),
            request: match get("iotype") {
                None => None,
                Some(name) => Some(
                    find(&REQUESTS, name)
                        .ok_or_else(|| format!("Request '{name}' of blkdebug is not supported"))?,
                ),
            },
        });
        Ok(())
    }
}

fn find<T: Copy>(table: &[(&str, T)], name: &str) -> Option<T> {
    let found = table.iter().find(|(known, _)| *known == name);
    found.map(|(_, value)| *value)
}

/// Refuses limits that no driver could keep.
fn check_limits(limits: &BTreeMap<&str, &str>) -> Result<(), String> {
    let get = |name: &str| match limits.get(name) {
        None => Ok(0),
        Some(text) => size::parse(text).map_err(|wrong| wrong.message(name, text)),
    };
    let too_large = |value: u64| value >= i32::MAX as u64;
    let align = get("align")?;
    if align != 0 && (too_large(align) || !align.is_power_of_two()) {
        return Err(format!("Cannot meet constraints with align {align}"));
    }
    let align = align.max(1);
    for name in LIMITS {
        let value = get(name)?;
        let unit = match name {
            "max-write-zero" => align.max(get("opt-write-zero")?),
            "max-discard" => align.max(get("opt-discard")?),
            _ => align,
        };
        if value != 0 && (too_large(value) || !value.is_multiple_of(unit)) {
            return Err(format!("Cannot meet constraints with {name} {value}"));
        }
    }
    Ok(())
}

/// Reads the sections of the file `name`: `[inject-error]`, and below it lines `key = "value"`.
fn read_config(name: &str, sections: &mut Sections) -> Result<(), String> {
    let text = std::fs::read_to_string(name).map_err(|e| {
        let reason = system_text(Errno::from_io_error(&e).unwrap_or(Errno::IO));
        format!("Could not read blkdebug config file: {reason}")
    })?;
    let mut current = None;
    for (i, line) in text.lines().enumerate() {
        let wrong = || format!("{name}:{}: parse error", i + 1);
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        if let Some(kind) = line
            .strip_prefix('[')
            .and_then(|rest| rest.strip_suffix(']'))
        {
            if kind != "inject-error" && kind != "set-state" {
                return Err(wrong());
            }
            current = Some(format!("{kind} line {i}"));
            continue;
        }
        let (key, value) = line.split_once('=').ok_or_else(wrong)?;
        let value = value
            .trim()
            .strip_prefix('"')
            .and_then(|rest| rest.strip_suffix('"'));
        let section = current.clone().ok_or_else(wrong)?;
        let section = sections.entry(section).or_default();
        section.insert(key.trim().to_owned(), value.ok_or_else(wrong)?.to_owned());
    }
    Ok(())
}

/// A file that fails as rules say.
#[derive(Debug)]
pub struct Faulty {
    file: Box<dyn Storage>,
    state: Arc<Mutex<State>>,
}

/// Puts the rules of a [`Faulty`] file in force.
pub struct Start(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    rules: Rules,
    /// The disk is open.
    started: bool,
    number: u64,
    /// In force.
    active: Vec<Injection>,
}

impl Start {
    /// The disk is open.
    pub fn start(&self) {
        locked(&self.0).started = true;
    }
}

/// Each change of a state is one assignment, and a panic leaves none half made.
fn locked(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Faulty {
    /// `file`, which fails as `rules` say from a start on.
    pub fn new(file: Box<dyn Storage>, rules: Rules) -> (Self, Start) {
        let state = Arc::new(Mutex::new(State {
            rules,
            started: false,
            number: 1,
            active: Vec::new(),
        }));
        let start = Start(Arc::clone(&state));
        (Self { file, state }, start)
    }

    fn happens(&self, event: Event) {
        let state = &mut *locked(&self.state);
        if !state.started {
            return;
        }
        let number = state.number;
        let counts = |e: Event, of: u64| e == event && (of == 0 || of == number);
        let errors = state.rules.errors.iter();
        let new: Vec<_> = errors
            .filter(|rule| counts(rule.event, rule.state))
            .cloned()
            .collect();
        if !new.is_empty() {
            state.active = new;
        }
        let states = state.rules.states.iter();
        for rule in states.filter(|rule| counts(rule.event, rule.state)) {
            state.number = rule.new_state;
        }
    }

    fn check(&self, request: Request, offset: u64, len: u64) -> io::Result<()> {
        let state = &mut *locked(&self.state);
        let hit = |rule: &Injection| {
            rule.request.is_none_or(|of| of == request)
                && rule
                    .offset
                    .is_none_or(|at| at >= offset && at - offset < len)
        };
        let Some(at) = state.active.iter().position(hit) else {
            return Ok(());
        };
        let rule = state.active[at].clone();
        if rule.once {
            state.active.remove(at);
            let same = |e: &Injection| e.event == rule.event && e.once && e.state == rule.state;
            state.rules.errors.retain(|e| !same(e));
        }
        Err(io::Error::from_raw_os_error(rule.errno))
    }
}

fn len(bufs: &[VolatileSlice<'_>]) -> u64 {
    bufs.iter().map(|buf| buf.len() as u64).sum()
}

impl Storage for Faulty {
    fn read_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.happens(Event::ReadData);
        self.check(Request::Read, offset, len(bufs))?;
        self.file.read_at(bufs, offset)
    }

    fn write_at(&self, bufs: &[VolatileSlice<'_>], offset: u64) -> io::Result<()> {
        self.happens(Event::WriteData);
        self.check(Request::Write, offset, len(bufs))?;
        self.file.write_at(bufs, offset)
    }

    fn read_bytes_at(&self, buf: &mut [u8], offset: u64) -> io::Result<()> {
        self.happens(Event::ReadTable);
        self.check(Request::Read, offset, buf.len() as u64)?;
        self.file.read_bytes_at(buf, offset)
    }

    fn write_bytes_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        self.check(Request::Write, offset, buf.len() as u64)?;
        self.file.write_bytes_at(buf, offset)
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.check(Request::Zero, offset, len)?;
        self.file.write_zeroes(offset, len, unmap)
    }

    fn discard(&self, offset: u64, len: u64) -> io::Result<()> {
        self.check(Request::Discard, offset, len)?;
        self.file.discard(offset, len)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        self.file.next_data(offset)
    }

    fn next_hole(&self, offset: u64) -> io::Result<u64> {
        self.file.next_hole(offset)
    }

    fn sync(&self) -> io::Result<()> {
        self.happens(Event::Sync);
        self.check(Request::Sync, 0, 0)?;
        self.file.sync()
    }

    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        self.file.set_len(len)
    }

    fn capacity(&self) -> io::Result<Option<u64>> {
        self.file.capacity()
    }
}
