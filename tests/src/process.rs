//! Running other programs.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc::{RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use crate::error::{Context, Error, Result};

/// A command with nothing on its standard input.
pub fn command(program: impl AsRef<OsStr>) -> Command {
    let mut command = Command::new(program);
    command.stdin(Stdio::null());
    command
}

/// Runs a command that must succeed; its output is in the error if it does not.
pub fn run(command: &mut Command) -> Result<()> {
    stdout(command).map(drop)
}

/// Runs a command that must succeed, and returns its standard output.
pub fn stdout(command: &mut Command) -> Result<Vec<u8>> {
    let output = command.output().context(shown(command))?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let said = [output.stdout, output.stderr].concat();
    Err(Error::new(format!(
        "{} ended with {}:\n{}",
        shown(command),
        output.status,
        String::from_utf8_lossy(&said).trim_end()
    )))
}

/// The command line, for messages.
pub fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words
        .map(OsStr::to_string_lossy)
        .collect::<Vec<_>>()
        .join(" ")
}

/// How a watched process ended.
pub struct Ended {
    /// Its exit status; `None` when it was killed because its time was up.
    pub status: Option<ExitStatus>,
    /// What it printed, standard output and standard error in one.
    pub output: String,
}

/// Runs `command` for `limit` at most, and hands each piece of its output (both streams) to
/// `watch` with a handle to the process, which may act on it.
pub fn watch(
    command: &mut Command,
    limit: Duration,
    mut watch: impl FnMut(&[u8], &mut Child),
) -> Result<Ended> {
    let what = shown(command);
    let deadline = Instant::now() + limit;
    let mut child = command
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .context(&what)?;
    let (sender, pieces) = channel::<Vec<u8>>();
    let streams: [Option<Box<dyn Read + Send>>; 2] = [
        child.stdout.take().map(|stream| Box::new(stream) as _),
        child.stderr.take().map(|stream| Box::new(stream) as _),
    ];
    for mut stream in streams.into_iter().flatten() {
        let sender = sender.clone();
        thread::spawn(move || {
            let mut buffer = [0; 8192];
            while let Ok(length @ 1..) = stream.read(&mut buffer) {
                if sender.send(buffer[..length].into()).is_err() {
                    break;
                }
            }
        });
    }
    drop(sender);
    let mut output = Vec::new();
    let mut in_time = true;
    loop {
        match pieces.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(piece) => {
                output.extend_from_slice(&piece);
                watch(&piece, &mut child);
            }
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                in_time = false;
                child.kill().context(format!("ending {what}"))?;
                break;
            }
        }
    }
    let status = child.wait().context(&what)?;
    Ok(Ended {
        status: in_time.then_some(status),
        output: String::from_utf8_lossy(&output).into_owned(),
    })
}

/// KiB of a process by the lines `key` (such as `Rss:`) of its `/proc/ID/smaps`: of the one mapping of
/// `guest` KiB, which is its guest's memory, and of all others.
pub fn memory(maps: &str, guest: u64, key: &str) -> Result<(u64, u64)> {
    let value = |line: &str, key: &str| -> Option<u64> {
        let value = line.strip_prefix(key)?.trim().strip_suffix(" kB")?;
        value.parse().ok()
    };
    let sizes: Vec<_> = maps
        .lines()
        .filter_map(|line| value(line, "Size:"))
        .collect();
    if sizes.iter().filter(|size| **size == guest).count() != 1 {
        let largest = sizes.iter().max();
        return Err(Error::new(format!(
            "which mapping is the guest's memory? the largest has {largest:?} KiB"
        )));
    }
    let amounts = maps.lines().filter_map(|line| value(line, key));
    let (mut of_guest, mut others) = (0, 0);
    for (size, amount) in sizes.into_iter().zip(amounts) {
        *(if size == guest {
            &mut of_guest
        } else {
            &mut others
        }) += amount;
    }
    Ok((of_guest, others))
}

/// Passes output on to this process's own, at once.
pub fn echo(piece: &[u8]) {
    let mut out = std::io::stdout().lock();
    // Nobody may be reading any more; the run's result does not depend on it.
    let _ = out.write_all(piece).and_then(|()| out.flush());
}
