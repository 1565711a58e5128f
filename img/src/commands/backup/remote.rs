//! A backup that a running monitor makes, over its control socket.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use serde_json::{Map, Value, json};
use tandem_block::{BackupId, ChunkExtent};

use super::request::Request;
use super::source::{Info, PIECE, Part, Source};

/// Most bytes of an answer's line.
const MAX_LINE: u64 = 4 << 20;

/// A connection to the control socket.
pub struct Control(BufReader<UnixStream>);

/// A backup of a disk that is in use.
pub struct Remote {
    control: Control,
    info: Info,
}

impl Control {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// Why there is nobody.
    pub fn connect(path: &Path) -> Result<Self, String> {
        let stream = UnixStream::connect(path);
        let stream =
            stream.map_err(|e| format!("Could not connect to '{}': {e}", path.display()))?;
        Ok(Self(BufReader::new(stream)))
    }

    /// Has the monitor do something, and returns what it answers.
    fn ask(&mut self, request: &Value) -> Result<Value, String> {
        let lost = |e: io::Error| format!("the control socket does not answer: {e}");
        let line = format!("{request}\n");
        self.0.get_mut().write_all(line.as_bytes()).map_err(lost)?;
        let mut line = Vec::new();
        let mut answer = (&mut self.0).take(MAX_LINE);
        answer.read_until(b'\n', &mut line).map_err(lost)?;
        if line.last() != Some(&b'\n') {
            return Err(lost(io::ErrorKind::UnexpectedEof.into()));
        }
        let answer: Map<String, Value> = serde_json::from_slice(&line).map_err(|_| NONSENSE)?;
        if let Some(error) = answer.get("error") {
            let message = error["message"].as_str().unwrap_or_default();
            return Err(message.to_owned());
        }
        Ok(answer.get("ok").ok_or(NONSENSE)?.clone())
    }

    /// Gives up the backup `id`.
    ///
    /// # Errors
    /// Those of the monitor.
    pub fn cancel(&mut self, id: BackupId) -> Result<(), String> {
        let request = json!({"command": "backup-end", "backup": id.to_string(), "cancel": true});
        self.ask(&request).map(drop)
    }

    /// Begins a backup of `disk`.
    ///
    /// # Errors
    /// Those of the monitor.
    pub fn begin(mut self, request: &Request<'_>, disk: &str) -> Result<Remote, String> {
        let text = |name: &[u8]| {
            let text = std::str::from_utf8(name).map(str::to_owned);
            text.map_err(|_| "The bitmap's name is not UTF-8".to_owned())
        };
        let mut begin = json!({"command": "backup-begin", "disk": disk});
        if let Some(since) = request.since {
            begin["since"] = text(since)?.into();
            begin["keep"] = request.keep.into();
        }
        if let Some(track) = request.track {
            begin["track"] = text(track)?.into();
        }
        if let Some(dir) = request.scratch {
            // The monitor may have another directory.
            let dir = std::path::absolute(dir).map_err(|e| e.to_string())?;
            let dir = dir
                .to_str()
                .ok_or("The scratch directory's name is not UTF-8")?;
            begin["scratch_dir"] = dir.into();
        }
        if let Some(size) = request.scratch_size {
            begin["scratch_size"] = size.into();
        }
        let info = info(&self.ask(&begin)?)?;
        Ok(Remote {
            control: self,
            info,
        })
    }

    /// The backup `id`, which has been begun.
    ///
    /// # Errors
    /// There is none.
    pub fn resume(mut self, id: BackupId) -> Result<Remote, String> {
        let list = self.ask(&json!({"command": "backups"}))?;
        let mut list = list["backups"].as_array().ok_or(NONSENSE)?.iter();
        let found = list.find(|backup| backup["backup"] == id.to_string());
        let info = info(found.ok_or_else(|| format!("there is no backup {id}"))?)?;
        Ok(Remote {
            control: self,
            info,
        })
    }
}

const NONSENSE: &str = "the answer of the control socket makes no sense";

/// What the monitor tells of a backup.
fn info(answer: &Value) -> Result<Info, String> {
    let number = |name: &str| answer[name].as_u64().ok_or(NONSENSE);
    let id = |value: &Value| value.as_str().and_then(|text| text.parse().ok());
    let info = Info {
        id: id(&answer["backup"]).ok_or(NONSENSE)?,
        base: id(&answer["base"]),
        is_incremental: answer["incremental"].as_bool().ok_or(NONSENSE)?,
        bitmap: answer["bitmap"].as_str().unwrap_or_default().into(),
        size: number("size")?,
        granularity: number("granularity")?,
    };
    match info.granularity.is_power_of_two() && i64::try_from(info.size).is_ok() {
        true => Ok(info),
        false => Err(NONSENSE.to_owned()),
    }
}

/// What the monitor tells of a part from offset `from` on, and how many bytes follow.
fn part(answer: &Value, from: u64, size: u64) -> Option<(Part, usize)> {
    let (mut end, mut data) = (from, 0);
    let mut extents = Vec::new();
    for extent in answer["extents"].as_array()? {
        let (offset, len) = (extent[0].as_u64()?, extent[1].as_u64()?);
        if offset < end || offset > size || len > size - offset {
            return None;
        }
        end = offset + len;
        let is_zero = match extent[2].as_str()? {
            "zero" => true,
            "data" => false,
            _ => return None,
        };
        data += if is_zero { 0 } else { len };
        extents.push(ChunkExtent {
            offset,
            len,
            is_zero,
        });
    }
    let (next, bytes) = (answer["next"].as_u64()?, answer["bytes"].as_u64()?);
    let goes_on = next > from || from == size;
    let is_right = (end..=size).contains(&next) && goes_on && bytes == data && data <= PIECE as u64;
    is_right.then_some((Part { extents, next }, data as usize))
}

impl Source for Remote {
    fn info(&self) -> &Info {
        &self.info
    }

    fn read(&mut self, from: u64, release: u64, buffer: &mut Vec<u8>) -> Result<Part, String> {
        let answer = self.control.ask(&json!({
            "command": "backup-read",
            "backup": self.info.id.to_string(),
            "from": from,
            "max": PIECE,
            "release": release,
        }))?;
        let (part, bytes) = part(&answer, from, self.info.size).ok_or(NONSENSE)?;
        buffer.resize(bytes, 0);
        let read = self.control.0.read_exact(buffer);
        read.map_err(|e| format!("the control socket does not answer: {e}"))?;
        Ok(part)
    }

    fn finish(mut self: Box<Self>) -> Result<(), String> {
        let id = self.info.id.to_string();
        let request = json!({"command": "backup-end", "backup": id});
        self.control.ask(&request).map(drop)
    }

    fn cancel(mut self: Box<Self>) {
        let id = self.info.id;
        // A monitor that has ended has given it up.
        let _ = self.control.cancel(id);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_that_make_no_sense() {
        let part = |answer: Value| part(&answer, 512, 4096).map(|(part, bytes)| (part.next, bytes));
        let data = json!([512, 512, "data"]);
        let good = json!({"next": 4096, "bytes": 512, "extents": [data, [2048, 512, "zero"]]});
        assert_eq!(part(good.clone()), Some((4096, 512)));
        for (key, value) in [
            ("next", json!(512)),
            ("next", json!(2048)),
            ("next", json!(4097)),
            ("bytes", json!(511)),
            ("extents", json!([data, data])),
            ("extents", json!([[0, 512, "data"]])),
            ("extents", json!([[512, u64::MAX, "data"]])),
            ("extents", json!([[u64::MAX, 1, "data"]])),
            ("extents", json!([[512, 512, "none"]])),
            ("extents", json!({})),
        ] {
            let mut bad = good.clone();
            bad[key] = value;
            assert_eq!(part(bad.clone()), None, "{bad}");
        }
    }
}
