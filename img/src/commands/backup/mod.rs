//! `tandem-img backup`

mod copy;
mod remote;
mod request;
mod source;
mod target;

use std::ffi::OsStr;

use clap::Command;

use crate::common_options::{follow_option, format_option, progress_option, quiet_option};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Image, could_not_open};
use crate::progress::Progress;
use crate::rate::Rate;
use copy::{Copy, Signals, Stop};
use remote::Control;
use request::Request;
use source::{Info, Local, Source};
use target::Target;

/// Definition of the subcommand.
pub fn command() -> Command {
    let what = [
        value(
            "control",
            None,
            "SOCKET",
            "Control socket of the `tandem run` whose DISK is copied (vda, vdb, ...)",
        ),
        format_option("IMAGE"),
        value(
            "since",
            None,
            "BITMAP",
            "Copy what BITMAP tells to have changed; it goes on from here",
        ),
        value(
            "track",
            None,
            "BITMAP",
            "Copy all, and let BITMAP tell from here on what has changed",
        ),
        flag("keep", None, "Leave the bitmap of --since as it is"),
        value(
            "scratch",
            None,
            "DIR",
            "Directory of the scratch file (default: that of the image)",
        ),
        value(
            "scratch-size",
            None,
            "SIZE",
            "Most bytes of the scratch file (default 1G)",
        ),
        follow_option(),
    ];
    let target = [
        value(
            "output-format",
            Some('O'),
            "FMT",
            "What is made: qcow2 (default), raw or stream",
        ),
        value(
            "backing",
            Some('b'),
            "FILENAME",
            "The backup before: backing file of a qcow2 image, or a stream",
        ),
        value(
            "backing-format",
            Some('F'),
            "FMT",
            "Format of the backing file",
        ),
        flag(
            "no-create",
            Some('n'),
            "Bring a raw disk up to date that holds the backup before",
        ),
        value(
            "resume",
            None,
            "ID",
            "Read on a backup whose stream was cut off",
        ),
        value(
            "from",
            None,
            "OFFSET",
            "Offset up to which that stream is good",
        ),
        value(
            "cancel",
            None,
            "ID",
            "Give up a backup that was to be read on",
        ),
        value(
            "rate-limit",
            Some('r'),
            "RATE",
            "Write no more than RATE bytes per second",
        ),
        progress_option(),
        quiet_option(),
    ];
    getopt::command(
        "backup",
        "Copies a disk as it is at one instant, in use or not, or what has changed in it",
        "tandem-img backup [-O qcow2|raw|stream] [--since BITMAP [--keep] | --track BITMAP] \
         [-b BACKING [-F FMT]] [-n] [-r RATE] [-p] [-q] \
         (--control SOCKET [--scratch DIR] [--scratch-size SIZE] DISK | [-f FMT] IMAGE) TARGET\n       \
         tandem-img backup --control SOCKET --resume ID --from OFFSET -O stream TARGET\n       \
         tandem-img backup --control SOCKET --cancel ID",
    )
    .args(what)
    .args(target)
    .after_help(
        "The guest goes on meanwhile: what it is about to change is copied to a scratch file first. \
         When that is full, the backup fails, and the guest does not notice. `tandem run` needs --allow-dir \
         with its directory.\n\
         TARGET takes its name, and the place of a file that is there, when it is complete and on disk; - \
         is standard output, for streams. If the backup does not succeed, the bitmap is as it was before.\n\
         A backing file is recorded, and not read. `tandem-img restore` reads streams.\n\n\
         Examples:\n  \
         tandem-img backup --control vm.sock --track b vda full.qcow2\n  \
         tandem-img backup --control vm.sock --since b -b full.qcow2 -F qcow2 vda monday.qcow2\n  \
         tandem-img backup --control vm.sock -O stream vda - | ssh host 'cat > vda.stream'\n  \
         tandem-img backup --track b disk.qcow2 full.qcow2\n  \
         tandem-img backup --since b -O raw -n disk.qcow2 copy.raw",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let request = Request::from_args(args)?;
    let error = |reason: String| args.name.error(&reason);
    if let Some(id) = args.value("cancel") {
        let id = id.to_string_lossy().parse();
        let id = id.map_err(|e: tandem_block::Error| error(e.to_string()))?;
        let (Some(control), []) = (request.control, &args.operands[..]) else {
            return Err(args
                .name
                .error("--cancel needs --control, and nothing else"));
        };
        let cancelled = Control::connect(control).and_then(|mut control| control.cancel(id));
        return cancelled.map_err(error);
    }
    let (disk, target) = match (&args.operands[..], request.resume) {
        ([target], Some(_)) => (OsStr::new(""), target),
        ([disk, target], None) => (disk.as_os_str(), target),
        (_, Some(_)) => return Err(args.name.usage("Expecting one target")),
        (_, None) => return Err(args.name.usage("Expecting a disk and a target")),
    };
    if args.has("progress") && target == "-" {
        let reason = "-p prints to standard output, where the stream goes";
        return Err(args.name.error(reason));
    }
    let signals = Signals::new();
    let progress = Progress::new(args);
    let source = begin(&request, disk)?;
    backup(&request, source, target, &signals, &progress)?;
    progress.set_percent(100.0);
    Ok(())
}

/// Begins the backup of `disk`, or finds the one that is read on.
fn begin(request: &Request<'_>, disk: &OsStr) -> Result<Box<dyn Source>, Failure> {
    let error = |reason: String| request.args.name.error(&reason);
    let Some(socket) = request.control else {
        let image = Image::from_operand(request.args, disk, "format")?;
        let source = Local::begin(request, &image);
        let source = source.map_err(|reason| error(could_not_open(disk, &reason)))?;
        return Ok(Box::new(source));
    };
    let source = Control::connect(socket).and_then(|control| match request.resume {
        Some((id, _)) => control.resume(id),
        None => control.begin(request, &disk.to_string_lossy()),
    });
    Ok(Box::new(source.map_err(error)?))
}

/// Copies `source` to the target called `name`.
fn backup(
    request: &Request<'_>,
    mut source: Box<dyn Source>,
    name: &OsStr,
    signals: &Signals,
    progress: &Progress,
) -> Result<(), Failure> {
    let error = |reason: &str| request.args.name.error(reason);
    let start = request.resume.map_or(0, |(_, from)| from);
    let info = source.info().clone();
    let mut target = match target::make(request, name, &info, start) {
        Ok(target) => target,
        Err(reason) => {
            if request.resume.is_none() {
                source.cancel();
            }
            return Err(error(&reason));
        }
    };
    let copy = Copy {
        start,
        rate: (request.rate > 0).then(|| Rate::new(request.rate)),
        progress,
        signals,
    };
    if let Err(stop) = copy.run(&mut *source, &mut *target) {
        return Err(stopped(request, source, target, &info, stop));
    }
    // From here on, nothing that the guest does can make the backup fail.
    let released = source.read(info.size, info.size, &mut Vec::new());
    if let Err(reason) = released {
        source.cancel();
        return Err(error(&reason));
    }
    if let Err(reason) = target.commit() {
        source.cancel();
        return Err(error(&format!(
            "Could not finish '{}': {reason}",
            name.display()
        )));
    }
    source.finish().map_err(|reason| {
        error(&format!(
            "'{}' is complete, but its bitmap does not go on from it: {reason}",
            name.display()
        ))
    })
}

/// Ends what has not come to its end.
fn stopped(
    request: &Request<'_>,
    source: Box<dyn Source>,
    target: Box<dyn Target>,
    info: &Info,
    stop: Stop,
) -> Failure {
    let error = |reason: &str| request.args.name.error(reason);
    match (stop, request.control) {
        (Stop::Target(reason), Some(socket)) if target.is_resumable() => {
            let mut failure = error(&format!("error while writing the stream: {reason}"));
            failure.message += &how_to_go_on(&socket.to_string_lossy(), info);
            failure
        }
        (Stop::Source(reason), _) => {
            source.cancel();
            error(&reason)
        }
        (Stop::Target(reason), _) => {
            source.cancel();
            error(&format!("error while writing: {reason}"))
        }
        (Stop::Signal(number), _) => {
            source.cancel();
            drop(target);
            // Which ends the program, unless the signal cannot be told from others.
            drop(signal_hook::low_level::emulate_default_handler(number));
            error("interrupted")
        }
    }
}

fn how_to_go_on(socket: &str, info: &Info) -> String {
    let id = info.id;
    format!(
        "The backup is kept. Go on from the offset up to which the stream is good, which tandem-img \
         restore tells,\nor give it up:\n  \
         tandem-img backup --control {socket} -O stream --resume {id} --from OFFSET -\n  \
         tandem-img backup --control {socket} --cancel {id}\n"
    )
}
