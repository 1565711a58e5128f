//! `tandem-img snapshot`

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::time::{Duration, SystemTime};

use chrono::{DateTime, Local};
use clap::Command;
use serde_json::{Map, Value};
use tandem_block::qcow2::{Qcow2, SnapshotInfo, SnapshotName};
use tandem_block::{Error, FileOptions, ImageFormat};

use crate::common_options::{
    follow, follow_option, force_share_option, format_option, image_opts_option, locking,
    object_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Image, could_not_open, printable};
use crate::options::{Definition, Kind, Options};
use crate::output;
use crate::size;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "snapshot",
        "Lists, takes, applies and deletes the snapshots inside a qcow2 image",
        "tandem-img snapshot [-f FMT | --image-opts] [-l | -a|-c|-d SNAPSHOT] [-q] [-U] FILENAME",
    )
    .args([
        format_option("the image"),
        flag("list", Some('l'), "List all snapshots (default)"),
        value(
            "apply",
            Some('a'),
            "SNAPSHOT",
            "Make the disk what it was when SNAPSHOT, an ID or a name, was taken; what it \
             holds now is lost",
        ),
        value(
            "create",
            Some('c'),
            "SNAPSHOT",
            "Take a snapshot with this name",
        ),
        value(
            "delete",
            Some('d'),
            "SNAPSHOT",
            "Delete the first snapshot with this name",
        ),
        flag("quiet", Some('q'), "Print nothing but errors and the list"),
        force_share_option(),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "No other program may use the image while a snapshot is taken, applied or deleted.\n\
         An image with an external data file cannot have snapshots.\n\n\
         Examples:\n  \
         tandem-img snapshot -c before-upgrade disk.qcow2\n  \
         tandem-img snapshot -l disk.qcow2\n  \
         tandem-img snapshot -a before-upgrade disk.qcow2\n  \
         tandem-img snapshot -d before-upgrade disk.qcow2",
    )
}

/// What is to be done.
#[derive(Clone, Copy)]
enum Action<'a> {
    List,
    Apply(&'a OsStr),
    Create(&'a OsStr),
    Delete(&'a OsStr),
}

impl<'a> Action<'a> {
    fn from_args(args: &'a Parsed) -> Result<Self, Failure> {
        let lists = (0..args.count("list")).map(|_| Self::List);
        let applies = args.values("apply").map(Self::Apply);
        let creates = args.values("create").map(Self::Create);
        let deletes = args.values("delete").map(Self::Delete);
        let mut given = lists.chain(applies).chain(creates).chain(deletes);
        let action = given.next().unwrap_or(Self::List);
        match given.next() {
            None => Ok(action),
            Some(_) => Err(args.name.usage("Cannot mix '-l', '-a', '-c', '-d'")),
        }
    }
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let action = Action::from_args(args)?;
    args.refuse_objects()?;
    let image = Image::from_args(args)?;
    let opened = |reason: &str| args.name.error(&could_not_open(image.name, reason));
    let files = FileOptions {
        locking: locking(args),
        ..FileOptions::default()
    };
    let read_only = matches!(action, Action::List);
    let options = image.options(read_only, follow(args)?, files);
    let options = options.map_err(|e| opened(&e.reason()))?;
    if !read_only {
        image.warn_of_guess();
    }
    if image.format == ImageFormat::Raw {
        return on_raw(args, action);
    }
    let disk = Qcow2::open(&image.path, &options).map_err(|e| opened(&e.reason()))?;
    let (doing, name, done) = match action {
        Action::List => {
            let snapshots = disk.snapshots().map_err(|e| opened(&e.reason()))?;
            output::print(&list(&snapshots));
            return Ok(());
        }
        Action::Apply(name) => ("apply", name, disk.apply_snapshot(name.as_bytes())),
        Action::Create(name) => ("create", name, disk.create_snapshot(name.as_bytes())),
        Action::Delete(name) => ("delete", name, disk.delete_snapshot(name.as_bytes())),
    };
    done.map_err(|error| {
        let reason = match (action, &error) {
            (Action::Apply(_), Error::NoSnapshot { .. }) => {
                "Failed to load snapshot: No such file or directory".to_owned()
            }
            _ => error.reason(),
        };
        failed(args, doing, name, &reason)
    })
}

/// A raw image has no snapshots.
fn on_raw(args: &Parsed, action: Action<'_>) -> Result<(), Failure> {
    match action {
        Action::List => Ok(()),
        Action::Apply(name) => {
            let reason = "Block driver does not support snapshots";
            Err(failed(args, "apply", name, reason))
        }
        Action::Create(name) => Err(failed(args, "create", name, "Operation not supported")),
        Action::Delete(name) => Err(failed(args, "delete", name, "snapshot not found")),
    }
}

fn failed(args: &Parsed, doing: &str, name: &OsStr, reason: &str) -> Failure {
    let name = printable(name);
    args.name
        .error(&format!("Could not {doing} snapshot '{name}': {reason}"))
}

/// What the parameters of `-l` of other subcommands are called.
const PARAMETERS: &[Definition] = &[
    Definition {
        name: "snapshot.id",
        kind: Kind::Text,
        default: None,
        help: "ID of the snapshot",
    },
    Definition {
        name: "snapshot.name",
        kind: Kind::Text,
        default: None,
        help: "Name of the snapshot",
    },
];

/// The snapshot that `value` means: an ID or a name, or `snapshot.id=ID,snapshot.name=NAME`.
pub fn selected(args: &Parsed, value: &OsStr) -> Result<SnapshotName, Failure> {
    let Some(list) = value.to_str().filter(|text| text.starts_with("snapshot.")) else {
        return Ok(SnapshotName::IdOrName(value.as_bytes().to_owned()));
    };
    let mut options = Options::new(PARAMETERS);
    options.parse(list).map_err(|reason| {
        let mut failure = args.name.error(&reason);
        let text = format!("Failed in parsing snapshot param '{list}'");
        failure.message += &args.name.error(&text).message;
        failure
    })?;
    let text = |name: &str| options.text(name).map(|text| text.as_bytes().to_owned());
    Ok(SnapshotName::Exact {
        id: text("snapshot.id"),
        name: text("snapshot.name"),
    })
}

/// The list for people; nothing if there are none.
pub fn list(snapshots: &[SnapshotInfo]) -> String {
    if snapshots.is_empty() {
        return String::new();
    }
    let mut text = "Snapshot list:\n".to_owned();
    let titles = ["ID", "TAG", "VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"];
    text += &line(titles.map(str::to_owned));
    for snapshot in snapshots {
        text += &line([
            printable(OsStr::from_bytes(&snapshot.id)),
            printable(OsStr::from_bytes(&snapshot.name)),
            size::human(snapshot.vm_state_size),
            date(snapshot.date),
            clock(snapshot.vm_clock),
            // A signed number, to QEMU.
            snapshot
                .icount
                .map_or("--".to_owned(), |icount| icount.cast_signed().to_string()),
        ]);
    }
    text
}

fn line([id, tag, vm_size, date, clock, icount]: [String; 6]) -> String {
    format!("{id:<7} {tag:<16} {vm_size:>8} {date:>19} {clock:>15} {icount:>10}\n")
}

/// Local time.
fn date(since_1970: Duration) -> String {
    let time: DateTime<Local> = (SystemTime::UNIX_EPOCH + since_1970).into();
    time.format("%Y-%m-%d %H:%M:%S").to_string()
}

fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        time.subsec_millis()
    )
}

/// A snapshot for programs.
pub fn json(snapshot: &SnapshotInfo) -> Value {
    let text = |bytes: &[u8]| Value::from(String::from_utf8_lossy(bytes));
    let mut map = Map::new();
    let mut add = |key: &str, value: Value| map.insert(key.to_owned(), value);
    if let Some(icount) = snapshot.icount {
        add("icount", icount.cast_signed().into());
    }
    add("vm-clock-nsec", snapshot.vm_clock.subsec_nanos().into());
    add("name", text(&snapshot.name));
    add("date-sec", snapshot.date.as_secs().into());
    add("date-nsec", snapshot.date.subsec_nanos().into());
    add("vm-clock-sec", snapshot.vm_clock.as_secs().into());
    add("id", text(&snapshot.id));
    add("vm-state-size", snapshot.vm_state_size.into());
    Value::Object(map)
}
