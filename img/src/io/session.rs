//! What goes on between commands: which image is open, and how images are opened.

use std::mem;
use std::time::Duration;

use rustix::process::{Signal, getpid, kill_process};
use tandem_block::qcow2::Follow;

use super::arguments::Arguments;
use super::failed::Failed;
use super::numbers::{parse_integer, parse_size};
use super::open_image::OpenImage;
use super::request::{Request, pairs};
use crate::getopt::Name;
use crate::{image, output};

/// Largest number of a signal.
const SIGNALS: u64 = 65;

/// Bytes of text that are kept for later.
const PENDING: usize = 1 << 20;

/// A run of the program.
pub struct Session {
    /// For messages.
    pub name: Name,
    /// The image that is open.
    pub opened: Option<OpenImage>,
    /// Where names in images may lead.
    pub follow: Follow,
    /// Names of images are lists of options.
    pub image_opts: bool,
    /// Memory of requests is not aligned.
    pub misalign: bool,
    /// The program is to end.
    pub quit: bool,
    /// What commands have to say that nobody waits for.
    pub pending: String,
}

impl Session {
    /// A failure with a message on standard error, after the program's name.
    pub fn error(&self, text: &str) -> Failed {
        Failed::message(&self.name.text(text))
    }

    /// Does what nobody waits for: what it has to say is said when somebody does, or when it
    /// becomes too much to keep.
    pub fn later(&mut self, work: impl FnOnce(&Self, &mut dyn FnMut(&str)) -> Result<(), Failed>) {
        let mut pending = mem::take(&mut self.pending);
        let done = work(self, &mut |text| {
            pending += text;
            if pending.len() > PENDING {
                output::print(&mem::take(&mut pending));
            }
        });
        if let Err(failed) = done {
            pending += &failed.output;
            output::complain(&failed.message);
        }
        self.pending = pending;
    }

    /// Says what is pending.
    pub fn catch_up(&mut self) {
        output::print(&mem::take(&mut self.pending));
    }

    /// The image that is open.
    pub fn opened(&self) -> Result<&OpenImage, Failed> {
        self.opened
            .as_ref()
            .ok_or_else(|| Failed::message("no file open, try 'help open'"))
    }

    /// Opens an image, of which a list of options tells more.
    pub fn open(&mut self, mut request: Request, list: &[(String, String)]) -> Result<(), Failed> {
        if self.opened.is_some() {
            return Err(self.error("file open already, try 'help close'"));
        }
        let shares = |(key, value): &(String, String)| key != "force-share" || value == "on";
        if request.force_share && !list.iter().all(shares) {
            return Err(self.error("-U conflicts with image options"));
        }
        let named = match &request.name {
            Some(name) => format!(" device {}", image::printable(name)),
            None => String::new(),
        };
        let opened = request.set(list).and_then(|()| OpenImage::open(request));
        let opened = opened.map_err(|e| self.error(&format!("can't open{named}: {e}")))?;
        if let Some(info) = &opened.info {
            image::warn_of_stale_bitmaps(info, &self.name);
        }
        self.opened = Some(opened);
        Ok(())
    }

    /// Closes the image, if one is open. What was written is durable then.
    pub fn close(&mut self) -> Result<(), Failed> {
        self.catch_up();
        let Some(opened) = self.opened.take() else {
            return Ok(());
        };
        let closed = opened.close();
        closed.map_err(|e| self.error(&format!("closing the image: {e}")))
    }
}

/// `open`
pub fn open(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let mut request = Request::new(session.follow);
    let mut list = Vec::new();
    let (flags, mut operands) = given.parse("snCro:ki:t:d:U");
    for flag in flags {
        match flag? {
            ('o', _) if session.image_opts => {
                let text = "--image-opts and 'open -o' are mutually exclusive";
                return Err(Failed::output(text));
            }
            ('o', options) => list.extend(pairs(options, &session.name)),
            (letter, value) => request
                .flag(letter, value)
                .map_err(|text| session.error(&text))?,
        }
    }
    if let (true, [options]) = (session.image_opts, &operands[..]) {
        list.extend(pairs(options, &session.name));
        operands.clear();
    }
    request.name = match operands[..] {
        [] => None,
        [name] => Some(name.into()),
        _ => return Err(Failed::usage()),
    };
    session.open(request, &list)
}

/// `reopen`
pub fn reopen(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let old = session.opened()?.request.clone();
    let mut new = old.clone();
    let (mut access, mut cache) = (None, false);
    let mut list = Vec::new();
    let (flags, operands) = given.parse("c:o:rw");
    for flag in flags {
        match flag? {
            ('c', mode) => {
                new.flag('t', mode).map_err(|text| session.error(&text))?;
                cache = true;
            }
            ('o', options) => list.extend(pairs(options, &session.name)),
            (_, _) if access.is_some() => {
                return Err(session.error("Only one -r/-w option may be given"));
            }
            (letter, _) => access = Some(letter == 'r'),
        }
    }
    if !operands.is_empty() {
        return Err(Failed::usage());
    }
    let has = |name: &str| list.iter().any(|(key, _)| key == name);
    if access.is_some() && has("read-only") {
        return Err(session.error("Cannot set both -r/-w and 'read-only'"));
    }
    if cache && (has("cache.direct") || has("cache.no-flush")) {
        return Err(session.error("Cannot set both -c and the cache options"));
    }
    let opened = session.opened()?;
    if let Some(key) = list.iter().find_map(|pair| changed(opened, pair)) {
        return Err(session.error(&format!("Cannot change the option '{key}'")));
    }
    if old.snapshot {
        return Err(session.error("A temporary snapshot cannot be reopened"));
    }
    new.set(&list).map_err(|text| session.error(&text))?;
    if new.node_read_only == Some(true) && !old.is_read_only() {
        // What writes to it does not know; -r is for that.
        let text = "Read-only block node cannot support read-write users";
        return Err(session.error(text));
    }
    new.read_only = new.node_read_only.or(access).unwrap_or(old.is_read_only());
    new.node_read_only = None;
    session.close()?;
    // Without the new way, the old one goes on.
    let reopened = OpenImage::open(new).or_else(|reason| {
        session.opened = Some(OpenImage::open(old).map_err(|e| session.error(&e))?);
        Err(session.error(&reason))
    });
    session.opened = Some(reopened?);
    Ok(())
}

/// The name of the option, without that of its node, if `pair` changes what cannot be changed while the
/// image is open.
fn changed<'a>(opened: &OpenImage, (key, value): &'a (String, String)) -> Option<&'a str> {
    let (node, name) = key.rsplit_once('.').unwrap_or(("", key));
    let nodes = ["file", "data-file", "backing"];
    let node_of_file = nodes.contains(&node.split('.').next().unwrap_or_default());
    if !node_of_file && name != "driver" && name != "node-name" {
        return None;
    }
    let list = &opened.request.list;
    let old = list.iter().rfind(|(old, _)| old == key);
    let same = match (old, key.as_str()) {
        (Some((_, old)), _) => old == value,
        (None, "driver") => value == opened.format(),
        (None, "file.driver" | "data-file.driver") => value == "file",
        (None, "backing.driver") => {
            let info = opened.info.as_ref();
            let format = info.and_then(|info| info.backing_format.as_deref());
            format == Some(value.as_bytes())
        }
        (None, _) => false,
    };
    (!same).then_some(name)
}

/// `close`
pub fn close(session: &mut Session, _: &Arguments<'_>) -> Result<(), Failed> {
    session.close()
}

/// `quit`
pub fn quit(session: &mut Session, _: &Arguments<'_>) -> Result<(), Failed> {
    session.quit = true;
    Ok(())
}

/// `sleep`
pub fn sleep(_: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let text = given.words.first().copied().unwrap_or_default();
    let time = parse_integer(text).and_then(|time| u64::try_from(time).ok());
    let time = time.ok_or_else(|| Failed::output(&format!("{text} is not a valid number")))?;
    std::thread::sleep(Duration::from_millis(time));
    Ok(())
}

/// `abort`
pub fn abort(_: &mut Session, _: &Arguments<'_>) -> Result<(), Failed> {
    std::process::abort()
}

/// `sigraise`
pub fn raise(session: &mut Session, given: &Arguments<'_>) -> Result<(), Failed> {
    let text = given.words.first().copied().unwrap_or_default();
    let number = parse_size(text)?;
    if number > SIGNALS {
        let text = format!("signal argument '{text}' is too large to be a valid signal");
        return Err(Failed::output(&text));
    }
    if number == 0 {
        return Ok(());
    }
    let signal = Signal::from_named_raw(number as i32)
        .ok_or_else(|| session.error(&format!("Signal {number} is not supported")))?;
    kill_process(getpid(), signal).map_err(|e| session.error(&e.to_string()))
}
