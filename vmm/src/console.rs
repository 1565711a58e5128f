//! The host's side of the serial ports: where the guest's output goes, and where its input comes from.

use std::fs::File;
use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use tandem_devices::serial::SerialPort;
use vmm_sys_util::eventfd::EventFd;

use crate::config::{OutputConfig, SerialConfig};
use crate::descriptor;
use crate::error::{Error, HostContext, Result};
use crate::exit::{Exit, ExitReason};
use crate::terminal::{EscapeKey, RawTerminal};

/// Opens what the console's output goes to.
pub(crate) fn open_console(
    config: &SerialConfig,
    exit: &Arc<Exit>,
) -> Result<Box<dyn Write + Send>> {
    let file = match config {
        SerialConfig::None => return Ok(Box::new(io::sink())),
        SerialConfig::Stdio => duplicate(io::stdout())?.into(),
        SerialConfig::File(path) => create(path)?,
    };
    let exit = exit.clone();
    Ok(Box::new(Output { file, exit }))
}

/// Opens what the second serial port's output goes to.
pub(crate) fn open_output(
    config: &OutputConfig,
    exit: &Arc<Exit>,
) -> Result<Box<dyn Write + Send>> {
    let file = match config {
        OutputConfig::Stdout => duplicate(io::stdout())?.into(),
        OutputConfig::File(path) => create(path)?,
        OutputConfig::Descriptor(number) => descriptor::duplicate_output(*number)?,
    };
    let exit = exit.clone();
    Ok(Box::new(Output { file, exit }))
}

fn create(path: &Path) -> Result<File> {
    File::create(path).map_err(|source| Error::File {
        file: path.to_owned(),
        action: "create",
        source,
    })
}

fn duplicate(fd: impl AsFd) -> Result<OwnedFd> {
    fd.as_fd()
        .try_clone_to_owned()
        .host("duplicate standard input or output")
}

/// How long output waits for room in a descriptor that it cannot block on.
const RETRY_INTERVAL: Duration = Duration::from_millis(1);

/// Output that waits for a reader who does not read, but not beyond the end of the VM.
struct Output {
    file: File,
    exit: Arc<Exit>,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        loop {
            match self.file.write(bytes) {
                // By the signal that stops a CPU; see `vcpu::Running::stop`.
                Err(e) if is_transient(&e) && self.exit.has_ended() => {
                    return Err(io::ErrorKind::BrokenPipe.into());
                }
                // Whoever shares the descriptor has made it non-blocking.
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => thread::sleep(RETRY_INTERVAL),
                Err(e) if is_transient(&e) => {}
                result => return result,
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Bytes that are kept when more is typed than the guest takes; what is typed beyond is lost.
const TYPED_AHEAD: usize = 4096;

/// Carries standard input to the guest.
///
/// From a pipe or a file only what the guest takes is read. A terminal is read all the time, so that
/// Ctrl-A X works whatever the guest does.
pub(crate) struct Input {
    port: Arc<SerialPort>,
    /// Signalled when the guest may take more.
    ready: EventFd,
    source: File,
    kind: Source,
    /// Whether the event loop watches `source`.
    watched: bool,
    /// Read, but not yet taken by the guest.
    pending: Vec<u8>,
    exit: Arc<Exit>,
    /// Holds the terminal in raw mode.
    _raw: Option<RawTerminal>,
}

enum Source {
    Terminal(EscapeKey),
    Pipe,
    /// A regular file, which cannot be watched, and which never blocks.
    File,
    /// At its end.
    Closed,
}

impl Input {
    /// Takes standard input; a terminal is in raw mode as long as this lives.
    pub(crate) fn new(port: Arc<SerialPort>, ready: EventFd, exit: Arc<Exit>) -> Result<Self> {
        let stdin = io::stdin();
        let (kind, raw) = if stdin.is_terminal() {
            let raw = RawTerminal::new(duplicate(&stdin)?).host("set up the terminal")?;
            (Source::Terminal(EscapeKey::default()), Some(raw))
        } else {
            (Source::Pipe, None)
        };
        Ok(Self {
            port,
            ready,
            source: duplicate(&stdin)?.into(),
            kind,
            watched: false,
            pending: Vec::new(),
            exit,
            _raw: raw,
        })
    }

    /// Gives the guest what it takes, and reads on as long as there is room.
    fn pump(&mut self, ops: &mut EventOps) {
        loop {
            let taken = self.port.send(&self.pending);
            self.pending.drain(..taken);
            let room = self.pending.is_empty() && self.port.input_room() > 0;
            match self.kind {
                Source::Terminal(_) => return self.watch(true, ops),
                Source::Pipe => return self.watch(room, ops),
                Source::File if room => self.read(ops),
                Source::File | Source::Closed => return,
            }
        }
    }

    fn watch(&mut self, wanted: bool, ops: &mut EventOps) {
        if wanted == self.watched {
            return;
        }
        let events = Events::new(&self.source, EventSet::IN);
        if !wanted {
            // Removing what was added cannot fail.
            let _ = ops.remove(events);
            self.watched = false;
        } else if ops.add(events).is_ok() {
            self.watched = true;
        } else {
            // epoll refuses regular files and some devices.
            self.kind = Source::File;
            self.pump(ops);
        }
    }

    /// Reads once.
    fn read(&mut self, ops: &mut EventOps) {
        let mut buf = [0; 256];
        match self.source.read(&mut buf) {
            Ok(count @ 1..) => self.take(&buf[..count]),
            Err(e) if is_transient(&e) => {}
            // The end, or a terminal that has gone: the guest runs on without input.
            Ok(0) | Err(_) => {
                self.watch(false, ops);
                self.kind = Source::Closed;
            }
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        match &mut self.kind {
            Source::Terminal(escape) => {
                if escape.filter(bytes, &mut self.pending) {
                    self.exit.end(Ok(ExitReason::Quit));
                }
                self.pending.truncate(TYPED_AHEAD);
            }
            _ => self.pending.extend_from_slice(bytes),
        }
    }
}

fn is_transient(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock
    )
}

impl MutEventSubscriber for Input {
    fn init(&mut self, ops: &mut EventOps) {
        if let Err(e) = ops.add(Events::new(&self.ready, EventSet::IN)) {
            let source = io::Error::other(e);
            let action = "wait for the serial port";
            self.exit.end(Err(Error::Host { action, source }));
        }
        self.pump(ops);
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.fd() == self.ready.as_raw_fd() {
            let _ = self.ready.read();
        } else {
            self.read(ops);
        }
        self.pump(ops);
    }
}
