//! `tandem-img map`

mod plot;

use clap::Command;
use tandem_block::{
    Disk, ExtentKind, FileOptions, ImageFormat, Locking, extent_in_chain, sparse_extent_in_chain,
};

use crate::common_options::{
    follow, follow_option, force_share_option, format_option, image_opts_option, locking,
    object_option, output_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, value};
use crate::image::{Image, could_not_open, printable};
use crate::output::{self, Output};
use crate::size;
use plot::Plot;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "map",
        "Shows where each part of a disk is stored",
        "tandem-img map [-f FMT | --image-opts] [--output human|json | --plot FILE.svg] \
         [-s OFFSET] [-l LENGTH] [-U] FILENAME",
    )
    .args([
        format_option("the image"),
        output_option(),
        plot::option(),
        value("start-offset", Some('s'), "OFFSET", "Where to begin"),
        value("max-length", Some('l'), "LENGTH", "How much to show"),
        force_share_option(),
        follow_option(),
        image_opts_option(),
        object_option(),
    ])
    .after_help(
        "The text for people shows where there is data; JSON shows everything. The picture shows \
         what is unallocated, zero, data, compressed, or in images below, and where data that is \
         not at its own offset lies in its file.\n\n\
         Examples:\n  \
         tandem-img map disk.qcow2\n  \
         tandem-img map --plot disk.svg disk.qcow2\n  \
         tandem-img map --plot - disk.qcow2\n  \
         tandem-img map --output=json -s 1G -l 64M disk.qcow2",
    )
}

/// A part of the disk that is stored in one way.
#[derive(Clone, Copy, Debug)]
pub struct Part {
    /// Offset in the disk.
    pub start: u64,
    /// Length in bytes.
    pub length: u64,
    /// Images above the one that has it.
    pub depth: usize,
    /// What is stored.
    pub kind: ExtentKind,
    /// Whether it is data in a hole of the file, which reads as zero.
    pub is_hole: bool,
    /// Where, in the file that holds the data.
    pub offset: Option<u64>,
}

impl Part {
    /// Whether `next`, which follows this one, is stored behind it in the same way.
    fn continues_with(&self, next: &Self) -> bool {
        (self.kind, self.is_hole, self.depth) == (next.kind, next.is_hole, next.depth)
            && self.offset.map(|offset| offset + self.length) == next.offset
    }

    fn human(&self, file: &str) -> String {
        let (start, length) = (self.start, self.length);
        let offset = self.offset.unwrap_or_default();
        let hex = |number: u64| match number {
            0 => "0".to_owned(),
            number => format!("{number:#x}"),
        };
        let columns = [start, length, offset].map(hex);
        format!(
            "{:<16}{:<16}{:<16}{file}\n",
            columns[0], columns[1], columns[2]
        )
    }

    fn json(&self) -> String {
        let (start, length, depth) = (self.start, self.length, self.depth);
        let present = self.kind != ExtentKind::Unallocated;
        let compressed = self.kind == ExtentKind::Compressed;
        let data = compressed || self.kind == ExtentKind::Data;
        let zero = !data || self.is_hole;
        let offset = match self.offset {
            Some(offset) => format!(", \"offset\": {offset}"),
            None => String::new(),
        };
        format!(
            "{{ \"start\": {start}, \"length\": {length}, \"depth\": {depth}, \"present\": {present}, \
             \"zero\": {zero}, \"data\": {data}, \"compressed\": {compressed}{offset}}}"
        )
    }
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let output = Output::from_args(args)?;
    let number = |id: &str, what: &str| match args.value(id) {
        None => Ok(None),
        Some(text) => size::parse_named(what, &text.to_string_lossy())
            .map(Some)
            .map_err(|text| args.name.error(&text)),
    };
    let start = number("start-offset", "start offset")?.unwrap_or(0);
    let length = number("max-length", "max length")?;
    args.refuse_objects()?;
    let [name] = &args.operands[..] else {
        return Err(args.name.usage("Expecting one image file name"));
    };
    let image = Image::from_operand(args, name, "format")?;
    let fail = |e: tandem_block::Error| args.name.error(&could_not_open(image.name, &e.reason()));
    let follow = follow(args)?;
    let files = FileOptions {
        // As in QEMU, the map of a raw disk is not worth keeping writers off.
        locking: match image.format {
            ImageFormat::Raw => Locking::ForceShare,
            ImageFormat::Qcow2 => locking(args),
        },
        ..FileOptions::default()
    };
    let disk = image.open(true, follow, files).map_err(fail)?;
    let end = match length {
        Some(length) => start.saturating_add(length).min(disk.size()),
        None => disk.size(),
    };
    if let Some(target) = args.value("plot") {
        if args.has("output") {
            let text = "--plot and --output cannot be used at the same time";
            return Err(args.name.error(text));
        }
        let title = format!(
            "{} ({}, {})",
            printable(image.path.as_os_str()),
            image.format.name(),
            size::human(disk.size())
        );
        let mut plot = Plot::new(title, start.min(end), end);
        for part in Parts::new(&*disk, start, end) {
            plot.add(&part.map_err(|e| args.name.error(&e.reason()))?);
        }
        return plot.write(target).map_err(|text| args.name.error(&text));
    }
    let files = image.data_names().map_err(fail)?;
    let mut listing = Listing::new(output, files);
    for part in Parts::new(&*disk, start, end) {
        let part = part.map_err(|e| args.name.error(&e.reason()))?;
        if part.kind == ExtentKind::Compressed && output == Output::Human {
            listing.print_last();
            let reason = "File contains external, encrypted or compressed clusters.";
            return Err(args.name.error(reason));
        }
        listing.add(part);
    }
    listing.end(start);
    Ok(())
}

/// The parts of a range of a disk, one after the other.
struct Parts<'a> {
    disk: &'a dyn Disk,
    at: u64,
    end: u64,
}

impl<'a> Parts<'a> {
    fn new(disk: &'a dyn Disk, start: u64, end: u64) -> Self {
        Self {
            disk,
            at: start,
            end,
        }
    }

    /// What begins at `start`.
    fn part(&self, start: u64) -> tandem_block::Result<Part> {
        let (depth, extent) = sparse_extent_in_chain(self.disk, start, self.end - start)?;
        // What the image says of a hole, which is not always that it is zero.
        let kind = match extent.kind {
            ExtentKind::Zero => extent_in_chain(self.disk, start, extent.len)?.1.kind,
            kind => kind,
        };
        Ok(Part {
            start,
            length: extent.len,
            depth,
            kind,
            is_hole: kind != extent.kind,
            offset: extent.offset,
        })
    }
}

impl Iterator for Parts<'_> {
    type Item = tandem_block::Result<Part>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.at >= self.end {
            return None;
        }
        let start = self.at;
        Some(self.part(start).inspect(|part| self.at += part.length))
    }
}

/// What is printed, as it becomes known.
struct Listing {
    output: Output,
    /// Where each image of the chain has its data.
    files: Vec<String>,
    last: Option<Part>,
    is_first: bool,
}

impl Listing {
    fn new(output: Output, files: Vec<String>) -> Self {
        output::print(match output {
            Output::Human => "Offset          Length          Mapped to       File\n",
            Output::Json => "[",
        });
        Self {
            output,
            files,
            last: None,
            is_first: true,
        }
    }

    fn add(&mut self, part: Part) {
        match &mut self.last {
            Some(last) if last.continues_with(&part) => last.length += part.length,
            _ => {
                self.print_last();
                self.last = Some(part);
            }
        }
    }

    fn print_last(&mut self) {
        let Some(part) = self.last.take() else {
            return;
        };
        match self.output {
            Output::Human if part.kind == ExtentKind::Data && !part.is_hole => {
                // Somebody may have changed the chain since it was opened.
                let file = self.files.get(part.depth).map_or("", String::as_str);
                output::print(&part.human(file));
            }
            Output::Human => {}
            Output::Json if self.is_first => output::print(&part.json()),
            Output::Json => output::print(&format!(",\n{}", part.json())),
        }
        self.is_first = false;
    }

    /// Ends the listing of what begins at `start`; QEMU has an entry for nothing, too.
    fn end(mut self, start: u64) {
        self.print_last();
        if self.output == Output::Human {
            return;
        }
        if self.is_first {
            output::print(&format!(
                "{{ \"start\": {start}, \"length\": 0, \"depth\": 0, \"present\": false, \
                 \"zero\": false, \"data\": false, \"compressed\": false}}"
            ));
        }
        output::print("]\n");
    }
}
