//! `tandem-img dd`

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::Command;
use tandem_block::qcow2::{CreateOptions, OpenOptions};
use tandem_block::{
    CacheMode, Disk, ExtentKind, FileOptions, ImageFormat, NewImage, Preallocation, VolatileSlice,
    extent_in_chain,
};

use crate::commands::create;
use crate::common_options::{
    follow, follow_option, force_share_option, format_option, image_opts_option, locking,
    object_option,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, value};
use crate::image::{Image, could_not_open, local_path};
use crate::output;
use crate::size;

/// Bytes that are copied at once, whatever the size of a block.
const PIECE: u64 = 2 << 20;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "dd",
        "Copies a part of a disk into a new image",
        "tandem-img dd [-f FMT] [-O FMT] [-U] [bs=SIZE] [count=BLOCKS] [skip=BLOCKS] if=INPUT \
         of=OUTPUT",
    )
    .args([
        object_option(),
        format_option("INPUT"),
        value(
            "output-format",
            Some('O'),
            "FMT",
            "Format of OUTPUT: raw (default) or qcow2",
        ),
        force_share_option(),
        follow_option(),
        image_opts_option(),
    ])
    .after_help(
        "Operands:\n  \
         bs=SIZE       Size of a block (default: 512), with a suffix if you like\n  \
         count=BLOCKS  The copy ends behind so many blocks of the input (default: all)\n  \
         skip=BLOCKS   Where the copy begins in the input\n  \
         if=INPUT      The image that is read\n  \
         of=OUTPUT     The new image\n\n\
         What is skipped counts for count: bs=1M skip=1 count=3 copies 2 MiB, as in qemu-img.\n\
         OUTPUT takes its name, and the place of a file that exists, once it is complete. What is \
         known to be zero is not written.\n\n\
         Examples:\n  \
         tandem-img dd -f qcow2 -O raw bs=1M count=1 if=disk.qcow2 of=start.raw\n  \
         tandem-img dd -f raw -O qcow2 bs=512 skip=2048 if=disk.raw of=partition.qcow2",
    )
}

/// What the operands say.
struct Operands {
    block_size: u64,
    count: Option<u64>,
    skip: u64,
    input: Option<OsString>,
    output: Option<OsString>,
}

impl Operands {
    fn parse(operands: &[OsString]) -> Result<Self, String> {
        let mut found = Self {
            block_size: 512,
            count: None,
            skip: 0,
            input: None,
            output: None,
        };
        const MAX: u64 = i64::MAX as u64;
        for operand in operands {
            let bytes = operand.as_bytes();
            let equals = bytes.iter().position(|byte| *byte == b'=');
            let (name, rest) = bytes.split_at(equals.unwrap_or(bytes.len()));
            let value = OsString::from_vec(rest.get(1..).unwrap_or_default().to_vec());
            let text = value.to_string_lossy();
            match name {
                b"bs" if equals.is_some() => {
                    let max = i32::MAX as u64;
                    found.block_size = size::parse_between("bs", &text, 1, max)?;
                }
                b"count" if equals.is_some() => {
                    found.count = Some(size::parse_count("count", &text, 0, MAX)?);
                }
                b"skip" if equals.is_some() => {
                    found.skip = size::parse_count("skip", &text, 0, MAX)?;
                }
                b"if" if equals.is_some() => found.input = Some(value),
                b"of" if equals.is_some() => found.output = Some(value),
                _ => {
                    let name = String::from_utf8_lossy(name);
                    return Err(format!("unrecognized operand {name}"));
                }
            }
        }
        Ok(found)
    }

    /// The part that is copied of a disk of `size` bytes: where it begins, if it can, and ends.
    fn part(&self, size: u64) -> (Option<u64>, u64) {
        let count = self
            .count
            .and_then(|count| count.checked_mul(self.block_size));
        let end = count.map_or(size, |bytes| bytes.min(size));
        let start = self.skip.checked_mul(self.block_size);
        (start.filter(|start| *start <= end), end)
    }
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let fail = |text: &str| args.name.error(text);
    let operands = Operands::parse(&args.operands).map_err(|reason| fail(&reason))?;
    let (Some(input), Some(output)) = (&operands.input, &operands.output) else {
        return Err(fail("Must specify both input and output files"));
    };
    args.refuse_objects()?;
    let opened = |reason: &str| fail(&could_not_open(input, reason));
    let image = Image::from_operand(args, input, "format")?;
    let files = FileOptions {
        locking: locking(args),
        ..FileOptions::default()
    };
    let from = image.open(true, follow(args)?, files);
    let from = from.map_err(|e| opened(&e.reason()))?;
    let format = args.value("output-format").unwrap_or(OsStr::new("raw"));
    let format = ImageFormat::from_name(&format.to_string_lossy())
        .ok_or_else(|| fail("Unknown file format"))?;
    let path = local_path(output).map_err(|reason| fail(&reason))?;
    let (start, end) = operands.part(from.size());
    let len = start.map_or(0, |start| end - start);
    let created = |reason: String| {
        let output = output.display();
        fail(&format!(
            "{output}: error while creating output image: {reason}"
        ))
    };
    let mut new = match format {
        ImageFormat::Raw => NewImage::raw(path, len, Preallocation::Off),
        ImageFormat::Qcow2 => NewImage::qcow2(
            path,
            &CreateOptions {
                size: len.next_multiple_of(512),
                ..CreateOptions::default()
            },
        ),
    }
    .map_err(|e| created(create::reason(&e, format)))?;
    let Some(start) = start else {
        // As dd does: the new image is empty, and that is no failure.
        output::complain_line(&args.name.text(&format!(
            "{}: cannot skip to specified offset",
            input.display()
        )));
        return new
            .commit()
            .map_err(|e| created(create::reason(&e, format)));
    };
    let is_zero = new.reads_zero();
    let to: Box<dyn Disk> = match format {
        ImageFormat::Raw => Box::new(
            new.open_raw(CacheMode::default())
                .map_err(|e| created(e.reason()))?,
        ),
        ImageFormat::Qcow2 => {
            let disk = new.open_qcow2(&OpenOptions::default(), None);
            Box::new(disk.map_err(|e| created(e.reason()))?)
        }
    };
    let copy = Copy {
        from: &*from,
        to: &*to,
        start,
        end,
        is_zero,
    };
    copy.run().map_err(|reason| fail(&reason))?;
    drop(to);
    new.commit()
        .map_err(|e| created(create::reason(&e, format)))
}

/// A copy of a part of a disk to the beginning of another.
struct Copy<'a> {
    from: &'a dyn Disk,
    to: &'a dyn Disk,
    start: u64,
    end: u64,
    /// The other disk is all zeros.
    is_zero: bool,
}

impl Copy<'_> {
    fn run(&self) -> Result<(), String> {
        let read = |e: tandem_block::Error| {
            format!("error while reading from input image file: {}", e.cause())
        };
        let written = |e: tandem_block::Error| {
            format!("error while writing to output image file: {}", e.cause())
        };
        if !self.is_zero {
            let zeroed = self.to.write_zeroes(0, self.end - self.start, true);
            zeroed.map_err(written)?;
        }
        let mut buffer = vec![0; PIECE as usize];
        let mut at = self.start;
        while at < self.end {
            let (_, extent) = extent_in_chain(self.from, at, self.end - at).map_err(read)?;
            let end = at + extent.len;
            let is_data = matches!(extent.kind, ExtentKind::Data | ExtentKind::Compressed);
            while is_data && at < end {
                let piece = &mut buffer[..PIECE.min(end - at) as usize];
                let slices = [VolatileSlice::from(&mut *piece)];
                self.from.read_at(&slices, at).map_err(read)?;
                self.to
                    .write_at(&slices, at - self.start)
                    .map_err(written)?;
                at += piece.len() as u64;
            }
            at = end;
        }
        self.to.close().map_err(written)
    }
}
