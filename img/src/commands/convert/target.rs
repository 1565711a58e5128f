//! Where a copy goes: a new image, or one that is there.

use std::borrow::Cow;
use std::ffi::OsStr;
use std::path::Path;

use tandem_block::qcow2::{Follow, OpenOptions, backing_path};
use tandem_block::{CacheMode, Disk, FileOptions, ImageFormat, NewImage};

use super::request::Request;
use crate::commands::create;
use crate::common_options::{cache, follow, new_format};
use crate::failure::Failure;
use crate::getopt::Parsed;
use crate::image::opened::Opened;
use crate::image::{Image, could_not_open, local_path};
use crate::options::Options;
use crate::output;

/// The target of a copy.
pub struct Target {
    /// The disk.
    pub opened: Opened,
    /// The image, if it is new.
    new: Option<NewImage>,
    /// Whether the disk reads as zero.
    pub is_zero: bool,
    /// Size of the backing file of a new image.
    pub backing_size: Option<u64>,
}

/// What a new image is to be.
pub struct Plan<'a> {
    name: &'a OsStr,
    path: &'a Path,
    format: ImageFormat,
    options: Options,
}

impl<'a> Plan<'a> {
    /// A new image called `name` for a copy of `size` bytes, as `args` say. Nothing is created.
    pub fn new(
        args: &Parsed,
        request: &Request,
        name: &'a OsStr,
        size: u64,
    ) -> Result<Self, Failure> {
        let error = |reason: &str| args.name.error(reason);
        let format = new_format(args, "output-format").map_err(|reason| error(&reason))?;
        let path = local_path(name).map_err(|reason| error(&reason))?;
        let options = create::copy_options(args, format, &request.options, size);
        Ok(Self {
            name,
            path,
            format,
            options: options.map_err(|reason| error(&reason))?,
        })
    }

    /// Whether it has a backing file.
    pub fn has_backing(&self) -> bool {
        self.options.text("backing_file").is_some()
    }

    /// Whether it tells the format of the backing file.
    pub fn has_backing_format(&self) -> bool {
        self.options.text("backing_fmt").is_some()
    }

    /// Refuses what cannot have compressed clusters.
    pub fn check_compressible(&self) -> Result<(), &'static str> {
        if self.format == ImageFormat::Raw {
            return Err("Compression not supported for this file format");
        }
        if !matches!(self.options.text("preallocation"), None | Some("off")) {
            return Err("Compression and preallocation not supported at the same time");
        }
        if self.options.text("data_file").is_some() {
            return Err("Compression is not supported for images with an external data file");
        }
        Ok(())
    }

    /// Whether it can have bitmaps, which raw disks and qcow2 images of version 2 cannot.
    pub fn can_have_bitmaps(&self) -> bool {
        let is_old = self.options.text("compat").and_then(create::version) == Some(2);
        self.format == ImageFormat::Qcow2 && !is_old
    }

    /// Its format.
    pub fn format(&self) -> ImageFormat {
        self.format
    }

    /// Makes it, without a name. The copy ends by giving it its name, so that needs no syncs, unless
    /// `-t` asks for them.
    pub fn make(self, args: &Parsed) -> Result<Target, Failure> {
        let opened = |reason: &str| args.name.error(&could_not_open(self.name, reason));
        let cache = match args.value("cache") {
            Some(_) => cache(args, "cache")?,
            None => CacheMode::Unsafe,
        };
        if let Some(format) = self.options.text("backing_fmt")
            && ImageFormat::from_header(format.as_bytes()).is_none()
        {
            let reason = format!("Parameter 'backing-fmt' does not accept value '{format}'");
            return Err(self.failed(args, &reason));
        }
        let backing = self.backing(follow(args)?);
        let backing = backing.map_err(|reason| {
            let reason = format!("Could not open backing file: {reason}");
            opened(&reason)
        })?;
        let mut warn = |text| {
            output::complain_line(&args.name.text(&format!("warning: {text}")));
        };
        let (options, on) = (&self.options, backing.as_deref());
        let mut new = create::begin(self.format, self.path, options, on, &mut warn)
            .map_err(|reason| self.failed(args, &reason))?;
        let backing_size = backing.as_ref().map(|backing| backing.size());
        let disk = match self.format {
            ImageFormat::Raw => new.open_raw(cache).map(|raw| Opened::Raw(Box::new(raw))),
            ImageFormat::Qcow2 => {
                let options = OpenOptions {
                    files: FileOptions {
                        cache,
                        ..FileOptions::default()
                    },
                    ..OpenOptions::default()
                };
                let disk = new.open_qcow2(&options, backing.map(Into::into));
                disk.map(|disk| Opened::Qcow2(Box::new(disk)))
            }
        };
        Ok(Target {
            opened: disk.map_err(|e| opened(&e.reason()))?,
            is_zero: new.reads_zero() && backing_size.is_none(),
            new: Some(new),
            backing_size,
        })
    }

    fn failed(&self, args: &Parsed, reason: &str) -> Failure {
        let (name, format) = (self.name.display(), self.format.name());
        args.name.error(&format!(
            "{name}: error while converting {format}: {reason}"
        ))
    }

    fn backing(&self, follow: Follow) -> Result<Option<Box<dyn Disk>>, String> {
        let Some(name) = self.options.text("backing_file") else {
            return Ok(None);
        };
        let path = backing_path(self.path, name.as_bytes())?;
        // Which has been seen to be one of the two.
        let format = match self.options.text("backing_fmt") {
            Some("qcow2") => ImageFormat::Qcow2,
            _ => ImageFormat::Raw,
        };
        let image = Image::look_at(path.as_os_str(), Cow::Borrowed(&path), Some(format))?;
        let options = OpenOptions {
            read_only: true,
            follow,
            ..OpenOptions::default()
        };
        let backing = Opened::open(&image, &options).map_err(|e| e.reason())?;
        Ok(Some(backing.into_disk()))
    }
}

impl Target {
    /// The image `name`, which is there.
    pub fn existing(args: &Parsed, name: &OsStr) -> Result<Self, Failure> {
        let opened = |reason: &str| args.name.error(&could_not_open(name, reason));
        let is_list = args.has("target-image-opts");
        let raw = (!is_list).then_some(OsStr::new("raw"));
        let format = args.value("output-format").or(raw);
        let image = Image::from_name(args, name, format, is_list)?;
        let files = FileOptions {
            cache: cache(args, "cache")?,
            ..FileOptions::default()
        };
        let options = image.options(false, follow(args)?, files);
        let disk = options.and_then(|options| Opened::open(&image, &options));
        let disk = disk.map_err(|e| opened(&e.reason()))?;
        Ok(Self {
            opened: disk,
            new: None,
            is_zero: args.has("target-is-zero"),
            backing_size: None,
        })
    }

    /// Whether it can have bitmaps.
    pub fn can_have_bitmaps(&self) -> bool {
        let Opened::Qcow2(disk) = &self.opened else {
            return false;
        };
        // An error will come up when they are written.
        disk.bitmaps().map_or(true, |bitmaps| bitmaps.is_some())
    }

    /// The disk, and the new image, which is committed once that is closed.
    pub fn into_parts(self) -> (Opened, Option<NewImage>) {
        (self.opened, self.new)
    }
}
