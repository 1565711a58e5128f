//! A client of the control socket of `tandem run`, and a reader of its metrics.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::error::{Context, Error, Result};

/// A running VM, by its socket.
pub struct Control {
    socket: PathBuf,
}

impl Control {
    /// The VM that was started with `--control socket`.
    pub fn new(socket: &Path) -> Self {
        Control {
            socket: socket.into(),
        }
    }

    /// A connection of a client that has not said anything.
    pub fn connect(&self) -> Result<UnixStream> {
        let socket = &self.socket;
        UnixStream::connect(socket).context(format!("connecting to {socket:?}"))
    }

    /// Sends a request and returns what it is answered.
    pub fn ask(&self, request: &Value) -> Result<Value> {
        let mut stream = self.connect()?;
        writeln!(stream, "{request}").context(format!("sending {request}"))?;
        let mut line = String::new();
        let read = BufReader::new(stream).read_line(&mut line);
        read.context(format!("reading the answer to {request}"))?;
        let answer: Value = serde_json::from_str(&line).context(format!("reading {line:?}"))?;
        match answer.get("ok") {
            Some(result) => Ok(result.clone()),
            None => Err(Error::new(format!("{request} is answered {answer}"))),
        }
    }

    /// Sends a command without arguments.
    pub fn command(&self, command: &str) -> Result<Value> {
        self.ask(&json!({"command": command}))
    }

    /// The counters of all queues of the disk number `index` together.
    pub fn counters(&self, index: usize) -> Result<Value> {
        Ok(self.command("metrics")?["disks"][index]["total"].clone())
    }
}

/// The last line of the file `path` that was given to `--metrics`.
pub fn last_metrics(path: &Path) -> Result<Value> {
    let lines = fs::read_to_string(path).context(format!("reading {path:?}"))?;
    let line = lines.lines().last().unwrap_or_default();
    serde_json::from_str(line).context(format!("reading {line:?}"))
}
