//! `tandem-img info`

mod users;

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use clap::Command;
use serde::Serialize;
use serde_json::{Map, Value, json};
use tandem_block::qcow2::{
    self, BitmapInfo, DataFileLayout, Follow, Info, OpenOptions, backing_path, find_backing,
};
use tandem_block::{FileOptions, ImageFormat, Locking, Stamp};

use crate::commands::snapshot;
use crate::common_options::{
    follow, follow_option, force_share_option, format_option, image_opts_option, locking,
    object_option, output_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag};
use crate::image::{Image, could_not_open, local_path, printable};
use crate::output::{self, Output};
use crate::size;
use users::Users;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "info",
        "Tells what the header of an image says; its data file is not opened",
        "tandem-img info [-f FMT | --image-opts] [--output human|json] [-b] [-U] [--users] FILENAME",
    )
    .args([
        format_option("the image"),
        output_option(),
        force_share_option(),
        flag("backing-chain", Some('b'), "Tell of all images below, too"),
        flag(
            "users",
            None,
            "Tell which processes have the image open, whether or not they write to it",
        ),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "Examples:\n  \
         tandem-img info disk.qcow2\n  \
         tandem-img info --output=json disk.qcow2\n  \
         tandem-img info --backing-chain overlay.qcow2\n  \
         tandem-img info --users base.qcow2\n  \
         tandem-img info -f raw disk.raw",
    )
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let output = Output::from_args(args)?;
    let follow = follow(args)?;
    args.refuse_objects()?;
    let image = Image::from_args(args)?;
    let mut reports = Reports::new(output);
    let mut below = reports.add(args, &image)?;
    let mut seen = vec![(image.metadata.dev(), image.metadata.ino())];
    while let Some(Below {
        above,
        name,
        format,
    }) = below.take_if(|_| args.has("backing-chain"))
    {
        let name = OsStr::from_bytes(&name);
        let failed = |path: &OsStr, reason: &str| {
            let shown = printable(path);
            args.name.error(&could_not_open(OsStr::new(&shown), reason))
        };
        let path = backing_path(&above, name.as_bytes()).map_err(|reason| failed(name, &reason))?;
        let path = path.into_os_string();
        let image = find_backing(&above, name.as_bytes(), follow)
            .map_err(|e| e.reason())
            .and_then(|_| {
                let format = format.ok_or(NO_FORMAT)??;
                Image::look_at(&path, Path::new(&path).into(), Some(format))
            })
            .map_err(|reason| failed(&path, &reason))?;
        let id = (image.metadata.dev(), image.metadata.ino());
        if seen.contains(&id) {
            let name = printable(&path);
            let text = format!("Backing file '{name}' creates an infinite loop.");
            return Err(args.name.error(&text));
        }
        seen.push(id);
        below = reports.add(args, &image)?;
    }
    reports.print(args.has("backing-chain"));
    Ok(())
}

/// Formats of backing files are never guessed.
const NO_FORMAT: &str = "the image above it does not tell its format; `rebase -u -F FMT` writes it \
                         into that image";

/// What the header of an image says of its backing file.
struct Below {
    /// The path of the image.
    above: PathBuf,
    name: Vec<u8>,
    /// If that is one that there is.
    format: Option<Result<ImageFormat, String>>,
}

/// What is printed: something for each image.
enum Reports {
    Human(Vec<String>),
    Json(Vec<Value>),
}

impl Reports {
    fn new(output: Output) -> Self {
        match output {
            Output::Human => Self::Human(Vec::new()),
            Output::Json => Self::Json(Vec::new()),
        }
    }

    /// Adds what there is to say of `image`; returns its backing file.
    fn add(&mut self, args: &Parsed, image: &Image<'_>) -> Result<Option<Below>, Failure> {
        let opened = |reason: &str| args.name.error(&could_not_open(image.name, reason));
        let shows_users = args.has("users");
        let files = FileOptions {
            locking: match shows_users {
                true => Locking::ForceShare,
                false => locking(args),
            },
            ..FileOptions::default()
        };
        let options = image.options(true, Follow::Nothing, files);
        let locking = options.map_err(|e| opened(&e.reason()))?.files.locking;
        let info = match image.format {
            ImageFormat::Raw => None,
            ImageFormat::Qcow2 => {
                let info = Info::read_with(&image.path, locking);
                Some(info.map_err(|e| opened(&e.reason()))?)
            }
        };
        let refused = image.described.refuse_backing(image.format);
        refused.map_err(|reason| opened(&reason))?;
        let report = Report {
            image,
            info: info.as_ref(),
            base_difference: base_difference(image, info.as_ref(), follow(args)?),
            users: shows_users.then(|| Users::of(&image.metadata)),
        };
        match self {
            Self::Human(texts) => texts.push(report.human()),
            Self::Json(values) => values.push(report.json()),
        }
        let Some(Info {
            backing_file: Some(name),
            backing_format,
            ..
        }) = info
        else {
            return Ok(None);
        };
        let format = backing_format.map(|name| -> Result<_, String> {
            let unknown = || format!("Unknown driver '{}'", String::from_utf8_lossy(&name));
            ImageFormat::from_header(&name).ok_or_else(unknown)
        });
        Ok(Some(Below {
            above: image.path.to_path_buf(),
            name,
            format,
        }))
    }

    /// Prints it: one image, or the list of a chain.
    fn print(self, is_chain: bool) {
        match self {
            Self::Human(texts) => output::print(&texts.join("\n")),
            Self::Json(values) if is_chain => output::print_json(&values),
            Self::Json(values) => values.iter().for_each(output::print_json),
        }
    }
}

/// What has changed of the backing file whose stamp `image` keeps, as far as that can be told.
fn base_difference(image: &Image<'_>, info: Option<&Info>, follow: Follow) -> Option<String> {
    info?.base_stamp.as_ref()?;
    let options = OpenOptions {
        read_only: true,
        follow,
        files: FileOptions {
            locking: Locking::Off,
            ..FileOptions::default()
        },
        ..OpenOptions::default()
    };
    qcow2::base_difference(&image.path, &options).ok()?
}

/// What is known of an image; without [`Info`] it is raw.
struct Report<'a> {
    image: &'a Image<'a>,
    info: Option<&'a Info>,
    base_difference: Option<String>,
    /// If they are asked for.
    users: Option<Users>,
}

impl Report<'_> {
    /// Length of the file in whole sectors, as QEMU shows it.
    fn file_len(&self) -> u64 {
        self.image.len.next_multiple_of(512)
    }

    fn size(&self) -> u64 {
        self.info.map_or(self.file_len(), |info| info.size)
    }

    fn disk_usage(&self) -> u64 {
        self.image.metadata.blocks() * 512
    }

    fn format(&self) -> &'static str {
        if self.image.is_protocol {
            self.protocol()
        } else {
            self.image.format.name()
        }
    }

    fn protocol(&self) -> &'static str {
        if self.image.metadata.file_type().is_block_device() {
            "host_device"
        } else {
            "file"
        }
    }

    fn human(&self) -> String {
        let disk_usage = size::human(self.disk_usage());
        let mut text = format!(
            "image: {}\nfile format: {}\nvirtual size: {} ({} bytes)\ndisk size: {disk_usage}\n",
            printable(self.image.path.as_os_str()),
            self.format(),
            size::human(self.size()),
            self.size(),
        );
        if let Some(info) = self.info {
            text += &self.human_qcow2(info);
        }
        if let Some(users) = &self.users {
            text += &users.human();
        }
        if self.image.is_protocol {
            return text;
        }
        text + &format!(
            "Child node '/file':\n    filename: {}\n    protocol type: {}\n    \
             file length: {} ({} bytes)\n    disk size: {disk_usage}\n",
            printable(self.image.path.as_os_str()),
            self.protocol(),
            size::human(self.file_len()),
            self.file_len(),
        )
    }

    fn human_qcow2(&self, info: &Info) -> String {
        let mut text = format!("cluster_size: {}\n", info.cluster_size);
        if info.dirty {
            text += "cleanly shut down: no\n";
        }
        if let Some(name) = &info.backing_file {
            let name = OsStr::from_bytes(name);
            text += &format!("backing file: {}", printable(name));
            let full = self.full_backing_file(name);
            if full != name {
                text += &format!(" (actual path: {})", printable(&full));
            }
            text += "\n";
        }
        if let Some(format) = &info.backing_format {
            text += &format!(
                "backing file format: {}\n",
                printable(OsStr::from_bytes(format))
            );
        }
        if let Some(difference) = &self.base_difference {
            text += &format!("backing file has changed: {difference}\n");
        }
        text += &snapshot::list(&info.snapshots);
        text + &human_specific(info)
    }

    fn json(&self) -> Value {
        let usage = self.disk_usage();
        let file = json!({
            "children": [],
            "virtual-size": self.file_len(),
            "filename": self.image.path.to_string_lossy(),
            "format": self.protocol(),
            "actual-size": usage,
            "format-specific": { "type": "file", "data": {} },
            "dirty-flag": false,
        });
        if self.image.is_protocol {
            return file;
        }
        let child = json!({ "name": "file", "info": file });
        let mut report = Map::new();
        let mut add = |key: &str, value: Value| report.insert(key.to_owned(), value);
        let text = |bytes: &[u8]| Value::from(String::from_utf8_lossy(bytes));
        add("children", json!([child]));
        if let Some(format) = self.info.and_then(|info| info.backing_format.as_ref()) {
            add("backing-filename-format", text(format));
        }
        if let Some(info) = self.info.filter(|info| !info.snapshots.is_empty()) {
            let snapshots = info.snapshots.iter().map(snapshot::json);
            add("snapshots", snapshots.collect());
        }
        add("virtual-size", self.size().into());
        add("filename", self.image.path.to_string_lossy().into());
        if let Some(info) = self.info {
            add("cluster-size", info.cluster_size.into());
        }
        add("format", self.format().into());
        add("actual-size", usage.into());
        if let Some(info) = self.info {
            add(
                "format-specific",
                json!({ "type": "qcow2", "data": specific(info) }),
            );
        }
        if let Some(name) = self.info.and_then(|info| info.backing_file.as_ref()) {
            let full = self.full_backing_file(OsStr::from_bytes(name));
            add("full-backing-filename", text(full.as_bytes()));
            add("backing-filename", text(name));
        }
        if let Some(difference) = &self.base_difference {
            add("backing-file-changed", difference.as_str().into());
        }
        if let Some(users) = &self.users {
            add("users", users.json());
        }
        add(
            "dirty-flag",
            self.info.is_some_and(|info| info.dirty).into(),
        );
        Value::Object(report)
    }

    /// A relative name of a backing file is relative to the directory of the image.
    fn full_backing_file(&self, name: &OsStr) -> OsString {
        let directory = self.image.path.parent();
        match directory {
            Some(directory) if local_path(name).is_ok() => directory.join(name).into(),
            _ => name.to_owned(),
        }
    }
}

/// The format's own properties, for people.
pub fn human_specific(info: &Info) -> String {
    let mut text = "Format specific information:\n".to_owned();
    for (key, value) in specific(info) {
        text += &property(&key.replace('-', " "), &value, 1);
    }
    text
}

/// The format's own properties in QEMU's order.
fn specific(info: &Info) -> Map<String, Value> {
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct Specific<'a> {
        compat: &'static str,
        compression_type: &'static str,
        #[serde(skip_serializing_if = "Option::is_none")]
        lazy_refcounts: Option<bool>,
        #[serde(skip_serializing_if = "Vec::is_empty")]
        bitmaps: Vec<Value>,
        refcount_bits: u32,
        #[serde(skip_serializing_if = "Option::is_none")]
        data_file: Option<std::borrow::Cow<'a, str>>,
        #[serde(skip_serializing_if = "Option::is_none")]
        data_file_raw: Option<bool>,
        #[serde(skip_serializing_if = "Option::is_none")]
        data_file_layout: Option<&'static str>,
        #[serde(skip_serializing_if = "Option::is_none")]
        base_stamp: Option<Value>,
        #[serde(skip_serializing_if = "Option::is_none")]
        corrupt: Option<bool>,
        #[serde(skip_serializing_if = "Option::is_none")]
        extended_l2: Option<bool>,
    }
    let v3 = info.version >= 3;
    let specific = Specific {
        compat: if v3 { "1.1" } else { "0.10" },
        compression_type: if info.zstd { "zstd" } else { "zlib" },
        lazy_refcounts: v3.then_some(info.lazy_refcounts),
        bitmaps: info.bitmaps.iter().map(bitmap).collect(),
        refcount_bits: info.refcount_bits,
        data_file: info
            .data_file
            .as_ref()
            .map(|name| String::from_utf8_lossy(name)),
        data_file_raw: info.has_data_file.then_some(info.data_file_raw),
        data_file_layout: match info.data_file_layout {
            Some(layout @ DataFileLayout::Packed) => Some(layout.name()),
            _ => None,
        },
        base_stamp: info.base_stamp.as_ref().map(stamp),
        corrupt: v3.then_some(info.corrupt),
        extended_l2: v3.then_some(info.extended_l2),
    };
    match serde_json::to_value(specific) {
        Ok(Value::Object(map)) => map,
        _ => Map::new(),
    }
}

fn stamp(stamp: &Stamp) -> Value {
    let files = stamp.files.iter().map(|file| {
        let modified = file.modified.map(|at| at.to_string());
        json!({ "length": file.len, "modified": modified })
    });
    json!({ "virtual-size": stamp.size, "files": files.collect::<Vec<_>>() })
}

fn bitmap(bitmap: &BitmapInfo) -> Value {
    let flags = [(bitmap.in_use, "in-use"), (bitmap.auto, "auto")];
    let flags = flags.iter().filter(|(is_set, _)| *is_set);
    json!({
        "flags": flags.map(|(_, name)| *name).collect::<Vec<_>>(),
        "name": String::from_utf8_lossy(&bitmap.name),
        "granularity": bitmap.granularity,
    })
}

/// A property and its value, indented by so many levels, as QEMU shows it.
fn property(key: &str, value: &Value, level: usize) -> String {
    let indent = "    ".repeat(level);
    let nested = |text: String| format!("{indent}{key}:\n{text}");
    match value {
        Value::Array(items) => nested(
            items
                .iter()
                .enumerate()
                .map(|(i, item)| property(&format!("[{i}]"), item, level + 1))
                .collect(),
        ),
        Value::Object(map) => nested(
            map.iter()
                .map(|(key, value)| property(&key.replace('-', " "), value, level + 1))
                .collect(),
        ),
        Value::String(text) => format!("{indent}{key}: {}\n", printable(OsStr::new(text))),
        other => format!("{indent}{key}: {other}\n"),
    }
}
