//! What a command line asks for.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use tandem_block::{BackupId, ImageFormat};

use crate::failure::Failure;
use crate::getopt::Parsed;
use crate::size;

/// What a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A qcow2 image.
    Qcow2,
    /// A raw disk.
    Raw,
    /// A stream.
    Stream,
}

impl Kind {
    fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" => Some(Self::Raw),
            "stream" => Some(Self::Stream),
            _ => None,
        }
    }
}

/// What a command line asks for.
pub struct Request<'a> {
    /// All of it.
    pub args: &'a Parsed,
    /// What is made.
    pub kind: Kind,
    /// The backup before.
    pub backing: Option<&'a OsStr>,
    /// The format of that, if it is an image.
    pub backing_format: Option<ImageFormat>,
    /// The bitmap that tells what is copied.
    pub since: Option<&'a [u8]>,
    /// The bitmap that is begun.
    pub track: Option<&'a [u8]>,
    /// Whether the bitmap of `since` stays as it is.
    pub keep: bool,
    /// Where the scratch file is made.
    pub scratch: Option<&'a Path>,
    /// Most bytes of that.
    pub scratch_size: Option<u64>,
    /// The monitor that runs the disk.
    pub control: Option<&'a Path>,
    /// The backup that is read on, from an offset.
    pub resume: Option<(BackupId, u64)>,
    /// Whether the target is there.
    pub exists: bool,
    /// Bytes per second; 0 without a limit.
    pub rate: u64,
}

impl<'a> Request<'a> {
    /// Reads `args`.
    pub fn from_args(args: &'a Parsed) -> Result<Self, Failure> {
        let request = Self::parse(args).map_err(|reason| args.name.error(&reason))?;
        let checked = request.check();
        checked.map_err(|reason| args.name.error(reason))?;
        Ok(request)
    }

    fn parse(args: &'a Parsed) -> Result<Self, String> {
        let text = |id: &str| args.value(id).map(OsStr::to_string_lossy);
        let number = |id: &str, what: &str| match text(id) {
            Some(value) => size::parse_named(what, &value).map(Some),
            None => Ok(None),
        };
        let kind = text("output-format").unwrap_or("qcow2".into());
        let kind = Kind::from_name(&kind)
            .ok_or_else(|| format!("-O expects 'qcow2', 'raw' or 'stream', not '{kind}'"))?;
        let backing_format = match text("backing-format") {
            None => None,
            Some(name) => Some(
                ImageFormat::from_header(name.as_bytes())
                    .ok_or_else(|| format!("Unknown backing file format '{name}'"))?,
            ),
        };
        let from = number("from", "offset")?;
        let resume = match text("resume") {
            None if from.is_some() => return Err("--from is for --resume".to_owned()),
            None => None,
            Some(id) => {
                let id = id.parse().map_err(|e: tandem_block::Error| e.to_string())?;
                let from = from.ok_or("--resume needs --from: where the stream was cut off")?;
                Some((id, from))
            }
        };
        Ok(Self {
            args,
            kind,
            backing: args.value("backing"),
            backing_format,
            since: args.value("since").map(OsStr::as_bytes),
            track: args.value("track").map(OsStr::as_bytes),
            keep: args.has("keep"),
            scratch: args.value("scratch").map(Path::new),
            scratch_size: number("scratch-size", "scratch size")?,
            control: args.value("control").map(Path::new),
            resume,
            exists: args.has("no-create"),
            rate: number("rate-limit", "rate limit")?.unwrap_or(0),
        })
    }

    fn check(&self) -> Result<(), &'static str> {
        let has_backing_format = self.backing_format.is_some();
        let wrong = [
            (
                self.since.is_some() && self.track.is_some(),
                "--since and --track exclude each other: the bitmap of --since goes on anyway",
            ),
            (
                self.keep && self.since.is_none(),
                "--keep is for the bitmap of --since",
            ),
            (
                self.exists && self.kind != Kind::Raw,
                "-n is for a raw disk that holds the backup before",
            ),
            (
                self.kind == Kind::Raw && self.since.is_some() && !self.exists,
                "a raw disk is never an increment alone: with -n, one that holds the backup before is \
                 brought up to date",
            ),
            (
                self.kind == Kind::Raw && self.backing.is_some(),
                "a raw disk has no backing file",
            ),
            (
                self.kind == Kind::Qcow2 && self.backing.is_some() && !has_backing_format,
                "Use of backing file requires explicit backing format",
            ),
            (
                has_backing_format && (self.backing.is_none() || self.kind != Kind::Qcow2),
                "-F is for the backing file of a qcow2 image",
            ),
            (
                self.kind == Kind::Stream && self.backing.is_some() && self.since.is_none(),
                "only an increment goes on from another stream",
            ),
            (
                self.resume.is_some() && (self.control.is_none() || self.kind != Kind::Stream),
                "--resume is for streams of a running disk: --control and -O stream",
            ),
            (
                self.control.is_none() && (self.scratch.is_some() || self.scratch_size.is_some()),
                "only the backup of a running disk needs a scratch file",
            ),
            (
                self.control.is_some() && self.args.has("format"),
                "-f is for an image, and a running disk has its format",
            ),
        ];
        match wrong.into_iter().find(|(is_wrong, _)| *is_wrong) {
            Some((_, reason)) => Err(reason),
            None => Ok(()),
        }
    }
}
