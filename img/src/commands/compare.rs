//! `tandem-img compare`

use std::ffi::OsStr;
use std::sync::{Mutex, PoisonError};

use clap::Command;
use tandem_block::{Disk, ExtentKind, FileOptions, VolatileSlice, extent_in_chain};

use crate::common_options::{
    cache, cache_option, follow, follow_option, force_share_option, format_option,
    image_opts_option, locking, object_option, progress_option, quiet_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::opened::Opened;
use crate::image::{Image, could_not_open};
use crate::output;
use crate::progress::Progress;
use crate::workers::{Workers, threads};

/// Exit status: the disks differ.
const DIFFERENT: u8 = 1;
/// Exit status: an image could not be opened.
const NOT_OPENED: u8 = 2;
/// Exit status: it could not be told what is stored.
const NO_STATUS: u8 = 3;
/// Exit status: an image could not be read.
const NOT_READ: u8 = 4;

/// Bytes that are compared at once.
const PIECE: u64 = 2 << 20;
/// Bytes that a difference is told in.
const SECTOR: usize = 512;
/// Most threads.
const MAX_THREADS: usize = 8;
/// Per cent between lines that tell how far it is.
const STEP: f32 = 2.0;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "compare",
        "Tells whether two disks have the same content",
        "tandem-img compare [-f FMT] [-F FMT] [-s] [-p] [-q] [-T MODE] [-U] FILENAME1 FILENAME2",
    )
    .args([
        format_option("the first image"),
        value(
            "second-format",
            Some('F'),
            "FMT",
            "Format of the second image",
        ),
        flag(
            "strict",
            Some('s'),
            "Sizes, and what is allocated, must be the same as well",
        ),
        progress_option(),
        quiet_option(),
        cache_option("source-cache", 'T', "both images"),
        force_share_option(),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "What one disk has more than the other must be zero. The exit status is 0 if they are the same, 1 \
         if they differ, and more if that could not be told.\n\n\
         Examples:\n  \
         tandem-img compare disk.qcow2 disk.raw\n  \
         tandem-img compare -s -f qcow2 -F qcow2 a.qcow2 b.qcow2",
    )
}

/// Why two disks are not the same.
enum Outcome {
    /// They differ, which this text tells.
    Different(String),
    /// Nobody knows whether they do.
    Failed(Failure),
}

/// The disks, and their names.
struct Comparison<'a> {
    args: &'a Parsed,
    names: [&'a OsStr; 2],
    disks: [Opened; 2],
    progress: Progress,
    /// Per cent of the work that is done, as inexact as `qemu-img` tells it.
    percent: Mutex<f32>,
}

/// How a part of a disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Status {
    is_zero: bool,
    is_compressed: bool,
    /// Whether it is known where.
    has_place: bool,
    /// Whether an image has it, and be it as zeros.
    is_allocated: bool,
    /// Whether the disk ends with it.
    is_last: bool,
}

/// How a disk goes on, up to an offset.
#[derive(Clone, Copy, Debug)]
struct Run {
    status: Status,
    end: u64,
}

/// A part of the disks that is stored in one way in each.
#[derive(Clone, Copy)]
struct Piece {
    offset: u64,
    len: u64,
    look: Look,
}

/// What must be looked at.
#[derive(Clone, Copy)]
enum Look {
    Neither,
    Both,
    /// Only this one, which must be zero.
    Only(usize),
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let [first, second] = &args.operands[..] else {
        return Err(args.name.usage("Expecting two image file names"));
    };
    args.refuse_objects()?;
    let disks = open(args, [first, second]).map_err(|failure| {
        Progress::end_unbegun(args);
        Failure {
            status: NOT_OPENED,
            ..failure
        }
    })?;
    let comparison = Comparison {
        args,
        names: [first, second],
        disks,
        progress: Progress::with_step(args, STEP),
        percent: Mutex::new(0.0),
    };
    match comparison.run() {
        Ok(()) => {
            comparison.print("Images are identical.");
            Ok(())
        }
        Err(Outcome::Different(text)) => {
            comparison.print(&text);
            Err(Failure {
                message: String::new(),
                status: DIFFERENT,
            })
        }
        Err(Outcome::Failed(failure)) => Err(failure),
    }
}

fn open(args: &Parsed, names: [&OsStr; 2]) -> Result<[Opened; 2], Failure> {
    let files = FileOptions {
        cache: cache(args, "source-cache")?,
        locking: locking(args),
    };
    let follow = follow(args)?;
    let open = |name: &OsStr, format: &str| {
        let image = Image::from_operand(args, name, format)?;
        let options = image.options(true, follow, files);
        options
            .and_then(|options| Opened::open(&image, &options))
            .map_err(|e| args.name.error(&could_not_open(name, &e.reason())))
    };
    Ok([open(names[0], "format")?, open(names[1], "second-format")?])
}

impl Comparison<'_> {
    fn run(&self) -> Result<(), Outcome> {
        let sizes = [0, 1].map(|side: usize| self.disks[side].disk().size());
        let is_strict = self.args.has("strict");
        if is_strict && sizes[0] != sizes[1] {
            let text = "Strict mode: Image size mismatch!".to_owned();
            return Err(Outcome::Different(text));
        }
        let common = sizes[0].min(sizes[1]);
        let total = sizes[0].max(sizes[1]);
        let [mut first, mut second] = [0, 1].map(|side| Runs::new(self, side));
        let mut at = 0;
        self.compare(total, || {
            if at >= common {
                return Ok(None);
            }
            let runs = [first.at(at)?, second.at(at)?];
            let piece = common_piece(at, runs, is_strict)?;
            at += piece.len;
            Ok(Some(piece))
        })?;
        if sizes[0] == sizes[1] {
            return Ok(());
        }
        self.print("Warning: Image size mismatch!");
        let longer = usize::from(sizes[1] > sizes[0]);
        let mut runs = Runs::new(self, longer);
        at = common;
        self.compare(total, || {
            if at >= total {
                return Ok(None);
            }
            let Run { status, end } = runs.at(at)?;
            let look = match status.is_allocated && !status.is_zero {
                true => Look::Only(longer),
                false => Look::Neither,
            };
            let piece = Piece::new(at, end - at, look);
            at += piece.len;
            Ok(Some(piece))
        })
    }

    /// Compares what `next` tells, a part of `total` bytes.
    fn compare(
        &self,
        total: u64,
        next: impl FnMut() -> Result<Option<Piece>, Outcome> + Send,
    ) -> Result<(), Outcome> {
        let workers = Workers {
            threads: threads(MAX_THREADS),
            buffer: 2 * PIECE as usize,
            in_order: true,
        };
        workers.run(next, |piece, buffer, turn| {
            let looked = self.look(piece, buffer);
            // A difference, too, waits for its turn: the progress up to there is told before.
            if turn.wait() {
                looked?;
                self.advance(piece.len, total);
            }
            Ok(())
        })
    }

    /// How the disk `side` stores what lies at `offset`.
    fn run_at(&self, side: usize, offset: u64) -> Result<Run, Outcome> {
        let top = self.disks[side].disk();
        let len = top.size() - offset;
        let (depth, extent) = extent_in_chain(top, offset, len).map_err(|_| {
            let name = self.names[side].display();
            let text = format!("Sector allocation test failed for {name}");
            self.failed(&text, NO_STATUS)
        })?;
        let mut disk = Some(top);
        for _ in 0..depth {
            disk = disk.and_then(Disk::backing);
        }
        // What lies behind the end of a backing file is zero in the image above.
        let is_behind = || disk.and_then(Disk::backing).is_some();
        let status = Status {
            is_zero: matches!(extent.kind, ExtentKind::Zero | ExtentKind::Unallocated),
            is_compressed: extent.kind == ExtentKind::Compressed,
            has_place: extent.offset.is_some(),
            is_allocated: extent.kind != ExtentKind::Unallocated || is_behind(),
            is_last: extent.len == len,
        };
        let end = offset + extent.len;
        Ok(Run { status, end })
    }

    /// Compares the content of `piece`.
    fn look(&self, piece: Piece, buffer: &mut [u8]) -> Result<(), Outcome> {
        let (first, second) = buffer.split_at_mut(PIECE as usize);
        let len = piece.len as usize;
        let mismatch = |at: usize| {
            let offset = piece.offset + at as u64;
            Outcome::Different(format!("Content mismatch at offset {offset}!"))
        };
        match piece.look {
            Look::Neither => Ok(()),
            Look::Only(side) => {
                self.read(side, &mut first[..len], piece.offset)?;
                let found = first[..len].iter().position(|byte| *byte != 0);
                found.map_or(Ok(()), |at| Err(mismatch(at)))
            }
            Look::Both => {
                let (first, second) = (&mut first[..len], &mut second[..len]);
                self.read(0, first, piece.offset)?;
                self.read(1, second, piece.offset)?;
                if first == second {
                    return Ok(());
                }
                let mut sectors = first.chunks(SECTOR).zip(second.chunks(SECTOR));
                let sector = sectors.position(|(first, second)| first != second);
                Err(mismatch(sector.unwrap_or_default() * SECTOR))
            }
        }
    }

    fn read(&self, side: usize, buffer: &mut [u8], offset: u64) -> Result<(), Outcome> {
        let disk = self.disks[side].disk();
        let read = disk.read_at(&[VolatileSlice::from(buffer)], offset);
        read.map_err(|error| {
            let (name, cause) = (self.names[side].display(), error.cause());
            let text = format!("Error while reading offset {offset} of {name}: {cause}");
            self.failed(&text, NOT_READ)
        })
    }

    fn failed(&self, text: &str, status: u8) -> Outcome {
        Outcome::Failed(Failure {
            status,
            ..self.args.name.error(text)
        })
    }

    /// `len` more bytes of `total` have been found to be the same.
    fn advance(&self, len: u64, total: u64) {
        let mut percent = self.percent.lock().unwrap_or_else(PoisonError::into_inner);
        *percent = (*percent + len as f32 / total as f32 * 100.0).min(100.0);
        self.progress.set_percent(*percent);
    }

    fn print(&self, line: &str) {
        if !self.args.has("quiet") {
            self.progress
                .suspend(|| output::print(&format!("{line}\n")));
        }
    }
}

/// A piece of what both disks have at `offset`, where they go on as `runs`.
fn common_piece(offset: u64, runs: [Run; 2], is_strict: bool) -> Result<Piece, Outcome> {
    let [first, second] = runs.map(|run| run.status);
    if is_strict && first != second {
        return Err(Outcome::Different(format!(
            "Strict mode: Offset {offset} block status mismatch!"
        )));
    }
    let look = match (first.is_allocated, second.is_allocated) {
        _ if first.is_zero && second.is_zero => Look::Neither,
        (false, false) => Look::Neither,
        (true, true) => Look::Both,
        (true, false) => Look::Only(0),
        (false, true) => Look::Only(1),
    };
    Ok(Piece::new(
        offset,
        runs[0].end.min(runs[1].end) - offset,
        look,
    ))
}

/// How a disk is stored, looked at from one end to the other.
struct Runs<'a> {
    comparison: &'a Comparison<'a>,
    side: usize,
    last: Option<Run>,
}

impl<'a> Runs<'a> {
    fn new(comparison: &'a Comparison<'a>, side: usize) -> Self {
        Self {
            comparison,
            side,
            last: None,
        }
    }

    /// How the disk goes on from `offset` on, which is not less than the time before.
    fn at(&mut self, offset: u64) -> Result<Run, Outcome> {
        let run = match self.last.filter(|run| offset < run.end) {
            Some(run) => run,
            None => self.comparison.run_at(self.side, offset)?,
        };
        self.last = Some(run);
        Ok(run)
    }
}

impl Piece {
    /// Up to `len` bytes at `offset`, no more than are looked at in one go.
    fn new(offset: u64, len: u64, look: Look) -> Self {
        let len = match look {
            Look::Neither => len,
            Look::Both | Look::Only(_) => len.min(PIECE),
        };
        Self { offset, len, look }
    }
}
