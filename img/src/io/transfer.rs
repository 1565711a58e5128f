//! Commands that move data: `read`, `write`, `discard` and their kin.
//!
//! Those that QEMU carries out asynchronously are done when they return, which is an order that it
//! could have chosen, and what they have to say comes later. They succeed whatever becomes of the
//! request.

use std::fs::File;
use std::io::Read;
use std::time::Instant;

use rustix::io::Errno;

use super::arguments::Arguments;
use super::failed::Failed;
use super::fault::{Fault, system_text};
use super::numbers::{MAX_REQUEST, parse_pattern, parse_size};
use super::open_image::{OpenImage, Zeroes};
use super::report::{Style, dump};
use super::session::Session;
use crate::output;

/// Data starts this far behind the start of its memory if it is not to be aligned.
const MISALIGNMENT: usize = 16;
/// What is written, unless something else is asked for.
const PATTERN: u8 = 0xcd;
/// What memory holds before it is read into.
const UNREAD: u8 = 0xab;

/// What a request is about.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum Area {
    #[default]
    Disk,
    VmState,
}

/// Where a request goes, and how long its buffers are.
struct Place {
    offset: u64,
    pieces: Vec<usize>,
    len: u64,
}

/// What is done with data that was read.
#[derive(Default)]
struct Wanted {
    style: Style,
    dump: bool,
    pattern: Option<u8>,
    /// Where the pattern begins in what was read, and how long it is.
    skip: u64,
    pattern_len: Option<u64>,
}

/// Memory of a request.
struct Buffer {
    memory: Vec<u8>,
    start: usize,
}

impl Buffer {
    /// `len` times `byte`.
    fn filled(session: &Session, byte: u8, len: u64) -> Result<Self, Fault> {
        let start = if session.misalign { MISALIGNMENT } else { 0 };
        let whole = usize::try_from(len).map_err(|_| Errno::NOMEM)? + start;
        let mut memory = Vec::new();
        memory.try_reserve_exact(whole).map_err(|_| Errno::NOMEM)?;
        memory.resize(whole, byte);
        Ok(Self { memory, start })
    }

    fn data(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..]
    }
}

impl Place {
    /// Reads an offset and one length, which `limit` has a message for if it is too large.
    fn single(operands: &[&str], limit: Option<&str>) -> Result<Self, Failed> {
        let [offset, len] = operands else {
            return Err(Failed::usage());
        };
        let (offset, text) = (parse_size(offset)?, len);
        let len = parse_size(text)?;
        if let Some(without) = limit.filter(|_| len > MAX_REQUEST) {
            let reason = format!("length cannot exceed {MAX_REQUEST}{without}, given {text}");
            return Err(Failed::output(&reason));
        }
        let pieces = vec![usize::try_from(len).unwrap_or(usize::MAX)];
        Ok(Self {
            offset,
            pieces,
            len,
        })
    }

    /// Reads an offset and any number of lengths.
    fn vectored(operands: &[&str]) -> Result<Self, Failed> {
        let (offset, lengths) = match operands {
            [offset, lengths @ ..] if !lengths.is_empty() => (parse_size(offset)?, lengths),
            _ => return Err(Failed::usage()),
        };
        let (mut pieces, mut sum) = (Vec::new(), 0);
        for text in lengths {
            let len = parse_size(text)?;
            if len > MAX_REQUEST {
                let reason = format!("Argument '{text}' exceeds maximum size {MAX_REQUEST}");
                return Err(Failed::output(&reason));
            }
            sum += len;
            if sum > MAX_REQUEST {
                return Err(Failed::output(&format!(
                    "The total number of bytes exceed the maximum size {MAX_REQUEST}"
                )));
            }
            pieces.push(len as usize);
        }
        Ok(Self {
            offset,
            pieces,
            len: sum,
        })
    }

    /// Fails unless all is in whole sectors.
    fn check_sectors(&self) -> Result<(), Failed> {
        for (what, value) in [("offset", self.offset), ("count", self.len)] {
            if !value.is_multiple_of(512) {
                let reason = format!("{value} is not a sector-aligned value for '{what}'");
                return Err(Failed::output(&reason));
            }
        }
        Ok(())
    }
}

/// `read`
pub fn read(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let mut wanted = Wanted::default();
    let (mut vm_state, mut registered, mut has_range) = (false, false, false);
    let (flags, operands) = given.parse("bCl:pP:qrs:v");
    for flag in flags {
        match flag? {
            ('b', _) => vm_state = true,
            ('r', _) => registered = true,
            ('l', len) => {
                wanted.pattern_len = Some(parse_size(len)?);
                has_range = true;
            }
            ('s', offset) => {
                wanted.skip = parse_size(offset)?;
                has_range = true;
            }
            (letter, value) => wanted.flag(letter, value)?,
        }
    }
    let place = Place::single(&operands, Some(""))?;
    if has_range && wanted.pattern.is_none() {
        return Err(Failed::usage());
    }
    let len = match wanted.pattern_len {
        Some(len) => Some(len),
        None => place.len.checked_sub(wanted.skip),
    };
    let end = len.and_then(|len| wanted.skip.checked_add(len));
    if end.is_none_or(|end| end > place.len) {
        let reason = "pattern verification range exceeds end of read data";
        return Err(Failed::output(reason));
    }
    if vm_state {
        place.check_sectors()?;
        if registered {
            let reason = "I/O buffer registration is not supported when reading from vmstate";
            return Err(Failed::output(reason));
        }
    }
    let area = if vm_state { Area::VmState } else { Area::Disk };
    wanted.read(session, &place, area, "read", &mut output::print)
}

/// `readv`
pub fn readv(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let mut wanted = Wanted::default();
    let (flags, operands) = given.parse("CP:qrv");
    for flag in flags {
        let (letter, value) = flag?;
        wanted.flag(letter, value)?;
    }
    let place = Place::vectored(&operands)?;
    wanted.read(session, &place, Area::Disk, "readv", &mut output::print)
}

/// `aio_read`
pub fn aio_read(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let mut wanted = Wanted::default();
    let (flags, operands) = given.parse("CiP:qrv");
    for flag in flags {
        match flag? {
            ('i', _) => {
                output::print("injecting invalid read request\n");
                return Ok(());
            }
            (letter, value) => wanted.flag(letter, value)?,
        }
    }
    let place = Place::vectored(&operands)?;
    session.later(|session, say| wanted.read(session, &place, Area::Disk, "readv", say));
    Ok(())
}

impl Wanted {
    /// Takes a flag that all reading commands have.
    fn flag(&mut self, letter: char, value: &str) -> Result<(), Failed> {
        match letter {
            'C' => self.style.for_programs = true,
            'P' => self.pattern = Some(parse_pattern(value)?),
            'q' => self.style.quiet = true,
            'v' => self.dump = true,
            // `p` and `r` have nothing to change.
            _ => {}
        }
        Ok(())
    }

    /// Reads from `place`; in messages that is called `what`.
    fn read(
        &self,
        session: &Session,
        place: &Place,
        area: Area,
        what: &str,
        say: &mut dyn FnMut(&str),
    ) -> Result<(), Failed> {
        let opened = session.opened()?;
        let failed = |fault: Fault| fault.failed(what);
        if area == Area::Disk {
            opened
                .check_range(place.offset, place.len)
                .map_err(failed)?;
        }
        let mut buffer = Buffer::filled(session, UNREAD, place.len).map_err(failed)?;
        let started = Instant::now();
        let done = match area {
            Area::Disk => opened.read(buffer.data(), &place.pieces, place.offset),
            Area::VmState => opened.read_vm_state(buffer.data(), place.offset),
        };
        done.map_err(failed)?;
        let time = started.elapsed();
        let data = buffer.data();
        let wrong = self.verify(data, place.offset);
        say(wrong.as_deref().unwrap_or_default());
        if self.dump && !self.style.quiet {
            dump(data, place.offset, say);
        }
        say(&self.style.report("read", place.offset, place.len, time));
        match wrong {
            Some(_) => Err(Failed::said()),
            None => Ok(()),
        }
    }

    /// The message that `data`, from `offset`, is not what it should be.
    fn verify(&self, data: &[u8], offset: u64) -> Option<String> {
        let pattern = self.pattern?;
        let data = &data[self.skip as usize..];
        let len = self.pattern_len.map_or(data.len(), |len| len as usize);
        if data[..len].iter().all(|byte| *byte == pattern) {
            return None;
        }
        let offset = offset + self.skip;
        Some(format!(
            "Pattern verification failed at offset {offset}, {len} bytes\n"
        ))
    }
}

/// What a writing command writes, and how.
#[derive(Default)]
struct Writing {
    style: Style,
    pattern: Option<u8>,
    /// Name of a file that has the data.
    source: Option<String>,
    zeroes: bool,
    how: Zeroes,
    compress: bool,
    force_access: bool,
    registered: bool,
    area: Area,
}

/// `write`
pub fn write(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let mut writing = Writing::default();
    let mut vm_state = false;
    let (flags, operands) = given.parse("bcCfnpP:qrs:uz");
    for flag in flags {
        match flag? {
            ('b', _) => vm_state = true,
            ('c', _) => writing.compress = true,
            ('n', _) => writing.how.no_fallback = true,
            ('s', name) => writing.source = Some(name.to_owned()),
            (letter, value) => writing.flag(letter, value)?,
        }
    }
    if operands.len() != 2 {
        return Err(Failed::usage());
    }
    writing.check_flags(vm_state)?;
    let limit = (!writing.how.no_fallback).then_some(" without -n");
    let place = Place::single(&operands, limit)?;
    if vm_state || writing.compress {
        place.check_sectors()?;
    }
    if writing.zeroes && writing.registered {
        return Err(cannot_register());
    }
    let source = match &writing.source {
        Some(name) => Some(read_source(name, place.len)?),
        None => None,
    };
    if vm_state {
        writing.area = Area::VmState;
    }
    writing.write(session, &place, source, "write", &mut output::print)
}

/// `writev`
pub fn writev(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let mut writing = Writing::default();
    let (flags, operands) = given.parse("CfP:qr");
    for flag in flags {
        let (letter, value) = flag?;
        writing.flag(letter, value)?;
    }
    let place = Place::vectored(&operands)?;
    writing.write(session, &place, None, "writev", &mut output::print)
}

/// `aio_write`
pub fn aio_write(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let mut writing = Writing::default();
    let (flags, operands) = given.parse("CfiP:qruz");
    for flag in flags {
        match flag? {
            ('i', _) => {
                output::print("injecting invalid write request\n");
                return Ok(());
            }
            (letter, value) => writing.flag(letter, value)?,
        }
    }
    if operands.len() < 2 {
        return Err(Failed::usage());
    }
    if writing.zeroes && operands.len() != 2 {
        let reason = "-z supports only a single length parameter";
        return Err(Failed::output(reason));
    }
    if writing.how.unmap && !writing.zeroes {
        return Err(Failed::output("-u requires -z to be specified"));
    }
    if writing.zeroes && writing.registered {
        return Err(cannot_register());
    }
    let place = if writing.zeroes {
        Place::single(&operands, None)?
    } else {
        Place::vectored(&operands)?
    };
    session.later(|session, say| writing.write(session, &place, None, "aio_write", say));
    Ok(())
}

fn cannot_register() -> Failed {
    Failed::output("cannot combine zero write with registered I/O buffer")
}

impl Writing {
    /// Takes a flag that several writing commands have.
    fn flag(&mut self, letter: char, value: &str) -> Result<(), Failed> {
        match letter {
            'C' => self.style.for_programs = true,
            'f' => self.force_access = true,
            'P' => self.pattern = Some(parse_pattern(value)?),
            'q' => self.style.quiet = true,
            'r' => self.registered = true,
            'u' => self.how.unmap = true,
            'z' => self.zeroes = true,
            // `p` has nothing to change.
            _ => {}
        }
        Ok(())
    }

    /// Fails if flags of `write` do not go together.
    fn check_flags(&self, vm_state: bool) -> Result<(), Failed> {
        let contents = [self.zeroes, self.pattern.is_some(), self.source.is_some()];
        let reason = if vm_state && self.zeroes {
            "-b and -z cannot be specified at the same time"
        } else if self.force_access && (vm_state || self.compress) {
            "-f and -b or -c cannot be specified at the same time"
        } else if self.how.no_fallback && !self.zeroes {
            "-n requires -z to be specified"
        } else if self.how.unmap && !self.zeroes {
            "-u requires -z to be specified"
        } else if contents.iter().filter(|given| **given).count() > 1 {
            "Only one of -z, -P, and -s can be specified at the same time"
        } else {
            return Ok(());
        };
        Err(Failed::output(reason))
    }

    /// Writes to `place`, from `source` if there is one; in messages that is called `what`.
    fn write(
        &self,
        session: &Session,
        place: &Place,
        source: Option<Vec<u8>>,
        what: &str,
        say: &mut dyn FnMut(&str),
    ) -> Result<(), Failed> {
        let opened = session.opened()?;
        let failed = |fault: Fault| fault.failed(what);
        if self.area == Area::Disk {
            opened
                .check_range(place.offset, place.len)
                .map_err(failed)?;
        }
        let len = if self.zeroes { 0 } else { place.len };
        let pattern = self.pattern.unwrap_or(PATTERN);
        let mut buffer = Buffer::filled(session, pattern, len).map_err(failed)?;
        if let Some(source) = source {
            let chunks = buffer.data().chunks_mut(source.len().max(1));
            chunks.for_each(|chunk| chunk.copy_from_slice(&source[..chunk.len()]));
        }
        let started = Instant::now();
        self.transfer(opened, place, buffer.data())
            .map_err(failed)?;
        if self.force_access {
            let flushed = opened.disk().flush();
            flushed.map_err(|e| failed(e.into()))?;
        }
        let time = started.elapsed();
        say(&self.style.report("wrote", place.offset, place.len, time));
        Ok(())
    }

    fn transfer(&self, opened: &OpenImage, place: &Place, data: &mut [u8]) -> Result<(), Fault> {
        if self.area == Area::VmState {
            opened.write_vm_state(data, place.offset)
        } else if self.zeroes {
            opened.write_zeroes(place.offset, place.len, self.how)
        } else if self.compress {
            opened.write_compressed(data, place.offset)
        } else {
            opened.write(data, &place.pieces, place.offset)
        }
    }
}

/// What the file `name` begins with, up to `len` bytes.
fn read_source(name: &str, len: u64) -> Result<Vec<u8>, Failed> {
    let failed = |e: std::io::Error| {
        let errno = Errno::from_io_error(&e).unwrap_or(Errno::IO);
        Failed::message(&format!("{name}: {}", system_text(errno)))
    };
    let mut data = Vec::new();
    let read = File::open(name).and_then(|file| file.take(len).read_to_end(&mut data));
    read.map_err(failed)?;
    if data.is_empty() {
        return Err(Failed::message(&format!("{name}: file is empty")));
    }
    Ok(data)
}

/// `discard`
pub fn discard(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let (style, operands) = discard_arguments(given)?;
    let place = Place::single(&operands, Some(""))?;
    output::print(&discard_at(session, &place, style, ["discard", "discard"])?);
    Ok(())
}

/// `aio_discard`
pub fn aio_discard(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let (style, operands) = discard_arguments(given)?;
    let place = Place::single(&operands, None)?;
    session.later(|session, say| {
        say(&discard_at(
            session,
            &place,
            style,
            ["aio_discard", "discarded "],
        )?);
        Ok(())
    });
    Ok(())
}

fn discard_arguments<'a>(given: &Arguments<'a>) -> Result<(Style, Vec<&'a str>), Failed> {
    let mut style = Style::default();
    let (flags, operands) = given.parse("Cq");
    for flag in flags {
        match flag? {
            ('C', _) => style.for_programs = true,
            _ => style.quiet = true,
        }
    }
    Ok((style, operands))
}

/// Discards a range and returns the report. In messages that is called `what`, and once it is done
/// `done`.
fn discard_at(
    session: &Session,
    place: &Place,
    style: Style,
    [what, done]: [&str; 2],
) -> Result<String, Failed> {
    let opened = session.opened()?;
    let started = Instant::now();
    opened
        .discard(place.offset, place.len)
        .map_err(|fault| fault.failed(what))?;
    Ok(style.report(done, place.offset, place.len, started.elapsed()))
}
