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

/// KiB of a process by the lines `key` (such as `Rss:`) of its `/proc/ID/smaps`: of the `guest` KiB that are its
/// guest's memory, in mappings that lie next to each other, and of all others. Of several such, it is those with
/// the most: others are addresses that are set aside.
pub fn memory(maps: &str, guest: u64, key: &str) -> Result<(u64, u64)> {
    let mut mappings: Vec<(u64, u64, u64)> = Vec::new();
    for line in maps.lines() {
        let first = line.split(' ').next().unwrap_or_default();
        let range = first.split_once('-').and_then(|(start, end)| {
            let address = |text| u64::from_str_radix(text, 16).ok();
            Some((address(start)?, address(end)?))
        });
        let amount = line.strip_prefix(key).map(|rest| rest.trim());
        let amount = amount.and_then(|rest| rest.strip_suffix(" kB")?.parse::<u64>().ok());
        match (range, amount, mappings.last_mut()) {
            (Some((start, end)), ..) => mappings.push((start, end, 0)),
            (_, Some(amount), Some(last)) => last.2 = amount,
            _ => {}
        }
    }
    let total: u64 = mappings.iter().map(|mapping| mapping.2).sum();
    let mut most = None;
    for at in 0..mappings.len() {
        let (start, mut end, mut amount) = (mappings[at].0, mappings[at].0, 0);
        for mapping in &mappings[at..] {
            if mapping.0 != end || end - start > guest << 10 {
                break;
            }
            (end, amount) = (mapping.1, amount + mapping.2);
            if end - start == guest << 10 {
                most = most.max(Some(amount));
            }
        }
    }
    let text = "which mappings are the guest's memory?";
    let most = most.ok_or_else(|| Error::new(format!("{text} None have {guest} KiB")))?;
    Ok((most, total - most))
}

/// Passes output on to this process's own, at once.
pub fn echo(piece: &[u8]) {
    let mut out = std::io::stdout().lock();
    // Nobody may be reading any more; the run's result does not depend on it.
    let _ = out.write_all(piece).and_then(|()| out.flush());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_of_a_guest_in_two_mappings() {
        let maps = "0000-1000 rw-p 0 00:00 0 [heap]\nSize: 4 kB\nRss: 4 kB\nVmFlags: rd\n\
                    2000-4000 rw-p 0 00:00 0\nSize: 8 kB\nRss: 5 kB\n\
                    4000-5000 rw-p 0 00:00 0\nSize: 4 kB\nRss: 3 kB\n\
                    6000-7000 rw-p 0 00:00 0\nSize: 4 kB\nRss: 2 kB\n\
                    a000-d000 ---p 0 00:00 0\nSize: 12 kB\nRss: 0 kB\n";
        assert_eq!(memory(maps, 12, "Rss:").unwrap(), (8, 6));
        assert_eq!(memory(maps, 4, "Rss:").unwrap(), (4, 10));
        assert!(memory(maps, 20, "Rss:").is_err());
    }
}
