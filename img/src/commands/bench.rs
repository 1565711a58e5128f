//! `tandem-img bench`

use std::ffi::OsStr;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Barrier, Mutex, PoisonError};
use std::time::Instant;

use clap::Command;
use tandem_block::{CacheMode, Disk, Error, FileOptions, VolatileSlice};

use crate::common_options::{
    cache_option, follow, follow_option, force_share_option, format_option, image_opts_option,
    locking,
};
use crate::failure::Failure;
use crate::getopt::{self, Parsed, flag, value};
use crate::image::{Image, could_not_open};
use crate::output;
use crate::size;

/// Most threads, and so most requests at a time.
const MAX_THREADS: u64 = 256;
/// Most bytes of all buffers.
const MAX_BUFFERS: u64 = 2 << 30;
/// Alignment of buffers, so that they can go past the page cache as they are.
const ALIGNMENT: usize = 4096;

/// Definition of the subcommand.
pub fn command() -> Command {
    getopt::command(
        "bench",
        "Measures how long requests to a disk take",
        "tandem-img bench [-f FMT] [-t MODE] [-c COUNT] [-d DEPTH] [-o OFFSET] [-s SIZE] [-S STEP] \
         [-U] [-w [--pattern BYTE] [--flush-interval COUNT [--no-drain]]] FILENAME",
    )
    .args([
        flag("quiet", Some('q'), "Accepted; the result is printed all the same"),
        format_option("the image"),
        cache_option("cache", 't', "the image"),
        value("count", Some('c'), "COUNT", "Number of requests (default: 75000)"),
        value(
            "depth",
            Some('d'),
            "DEPTH",
            "Requests at a time, each in a thread of its own (default: 64; 256 at most run at a \
             time)",
        ),
        value("offset", Some('o'), "OFFSET", "Offset of the first request (default: 0)"),
        value("buffer-size", Some('s'), "SIZE", "Bytes of a request (default: 4k)"),
        value(
            "step-size",
            Some('S'),
            "STEP",
            "Bytes from the start of one request to that of the next (default: as -s)",
        ),
        value(
            "aio",
            Some('i'),
            "AIO",
            "Accepted is threads: requests are system calls of threads, and nothing else",
        ),
        flag(
            "native",
            Some('n'),
            "Native AIO if possible, which it is not here: threads, with -t none or directsync",
        ),
        flag("write", Some('w'), "Write, which overwrites what the disk holds (default: read)"),
        value("pattern", None, "BYTE", "Write this byte (default: 0)"),
        value(
            "flush-interval",
            None,
            "COUNT",
            "Flush after so many writes, and wait for the ones before",
        ),
        flag("no-drain", None, "Do not stop requests while a flush is going on"),
        force_share_option(),
        follow_option(),
        image_opts_option(),
    ])
    .after_help(
        "Behind the end of the disk, offsets go on from its beginning; a request that reaches beyond \
         the end fails, and ends the run.\n\n\
         Examples:\n  \
         tandem-img bench -c 10000 -d 8 disk.qcow2\n  \
         tandem-img bench -t none -s 1M -c 1000 -d 4 disk.qcow2\n  \
         tandem-img bench -w --pattern 0xa5 --flush-interval 64 scratch.qcow2",
    )
}

/// What is to be measured.
struct Plan {
    count: u64,
    depth: u64,
    offset: u64,
    size: u64,
    step: u64,
    write: bool,
    pattern: u8,
    flush_interval: u64,
    drain: bool,
    cache: CacheMode,
    native: bool,
}

impl Plan {
    /// Reads the options of `args`, in the order in which they are there.
    fn from_args(args: &Parsed) -> Result<Self, Failure> {
        const MAX: u64 = i32::MAX as u64;
        let mut plan = Self {
            count: 75000,
            depth: 64,
            offset: 0,
            size: 4096,
            step: 0,
            write: args.has("write"),
            pattern: 0,
            flush_interval: 0,
            drain: !args.has("no-drain"),
            cache: CacheMode::default(),
            native: args.has("native"),
        };
        let fail = |reason: String| args.name.error(&reason);
        for (id, value) in args.all() {
            let text = value.to_string_lossy();
            let count =
                |what: &str, min, max| size::parse_count(what, &text, min, max).map_err(fail);
            let bytes =
                |what: &str, min, max| size::parse_between(what, &text, min, max).map_err(fail);
            match id {
                "count" => plan.count = count("request count", 1, MAX)?,
                "depth" => plan.depth = count("queue depth", 1, MAX)?,
                "offset" => plan.offset = bytes("offset", 0, i64::MAX as u64)?,
                "buffer-size" => plan.size = bytes("buffer size", 1, MAX)?,
                "step-size" => plan.step = bytes("step size", 0, MAX)?,
                "pattern" => plan.pattern = count("pattern byte", 0, 255)? as u8,
                "flush-interval" => plan.flush_interval = count("flush interval", 0, MAX)?,
                "aio" => check_aio(args, value)?,
                "cache" => {
                    plan.cache = CacheMode::from_name(&text)
                        .ok_or_else(|| fail("Invalid cache mode".to_owned()))?;
                }
                _ => {}
            }
        }
        if plan.step == 0 {
            plan.step = plan.size;
        }
        Ok(plan)
    }

    /// What contradicts itself, or is too much.
    fn check(&self) -> Result<(), &'static str> {
        if !self.write && self.flush_interval > 0 {
            return Err("--flush-interval is only available in write tests");
        }
        if self.flush_interval > 0 && self.flush_interval < self.depth {
            return Err("Flush interval can't be smaller than depth");
        }
        if self.threads() * self.size > MAX_BUFFERS {
            return Err("The buffers of all requests would take more than 2 GiB");
        }
        Ok(())
    }

    fn threads(&self) -> u64 {
        self.depth.min(self.count).min(MAX_THREADS)
    }

    /// The lines that come first.
    fn announcement(&self) -> String {
        let kind = if self.write { "write" } else { "read" };
        let mut text = format!(
            "Sending {} {kind} requests, {} bytes each, {} in parallel (starting at offset {}, step \
             size {})\n",
            self.count, self.size, self.depth, self.offset, self.step
        );
        if self.flush_interval > 0 {
            text += &format!("Sending flush every {} requests\n", self.flush_interval);
        }
        text
    }
}

/// Refuses what requests are not made by.
fn check_aio(args: &Parsed, aio: &OsStr) -> Result<(), Failure> {
    let name = aio.to_string_lossy();
    let text = match &*name {
        "threads" => return Ok(()),
        "native" | "io_uring" => format!("aio option '{name}' is not supported, only 'threads' is"),
        _ => format!("Invalid aio option: {name}"),
    };
    Err(args.name.error(&text))
}

/// Runs the subcommand.
pub fn run(args: &Parsed) -> Result<(), Failure> {
    let plan = Plan::from_args(args)?;
    let [file] = &args.operands[..] else {
        return Err(args.name.usage("Expecting one image file name"));
    };
    plan.check().map_err(|reason| args.name.error(reason))?;
    let opened = |reason: &str| args.name.error(&could_not_open(file, reason));
    let image = Image::from_operand(args, file, "format")?;
    if plan.write && args.has("force-share") {
        return Err(opened(
            "force-share=on can only be used with read-only images",
        ));
    }
    if plan.native && !plan.cache.is_direct() {
        return Err(opened(
            "aio=native was specified, but it requires cache.direct=on, which was not specified.",
        ));
    }
    if plan.write {
        image.warn_of_guess();
    }
    let files = FileOptions {
        cache: plan.cache,
        locking: locking(args),
    };
    let disk = image
        .open(!plan.write, follow(args)?, files)
        .map_err(|e| opened(&e.reason()))?;
    output::print_now(&plan.announcement());
    let start = Instant::now();
    let run = Run::new(&plan, &*disk);
    run.all().map_err(|reason| args.name.error(&reason))?;
    let seconds = start.elapsed().as_secs_f64();
    output::print(&format!("Run completed in {seconds:.3} seconds.\n"));
    let closed = disk.close();
    closed.map_err(|e| {
        args.name.error(&format!(
            "Could not close '{}': {}",
            file.display(),
            e.reason()
        ))
    })
}

/// A run of requests.
struct Run<'a> {
    plan: &'a Plan,
    disk: &'a dyn Disk,
    disk_size: u64,
    /// Number of the next request.
    next: AtomicU64,
    /// Where threads wait for each other.
    barrier: Barrier,
    /// Something has failed, and no request is begun any more.
    stopped: AtomicBool,
    /// What [`stopped`](Self::stopped) was when all threads had waited for each other.
    ended: AtomicBool,
    /// What the first request or flush that failed says.
    failure: Mutex<Option<String>>,
}

impl<'a> Run<'a> {
    fn new(plan: &'a Plan, disk: &'a dyn Disk) -> Self {
        Self {
            plan,
            disk,
            disk_size: disk.size(),
            next: AtomicU64::new(0),
            barrier: Barrier::new(plan.threads() as usize),
            stopped: AtomicBool::new(false),
            ended: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    fn all(self) -> Result<(), String> {
        std::thread::scope(|scope| {
            for _ in 1..self.plan.threads() {
                scope.spawn(|| self.thread());
            }
            self.thread();
        });
        let failure = self.failure.into_inner();
        let failure = failure.unwrap_or_else(PoisonError::into_inner);
        failure.map_or(Ok(()), Err)
    }

    fn thread(&self) {
        let len = self.plan.size as usize;
        let mut memory = Vec::new();
        let mut buffer = &mut [][..];
        if memory.try_reserve_exact(len + ALIGNMENT).is_ok() {
            memory.resize(len + ALIGNMENT, self.plan.pattern);
            let skip = memory.as_ptr().align_offset(ALIGNMENT).min(ALIGNMENT);
            buffer = &mut memory[skip..skip + len];
        } else {
            self.fail("Failed to allocate memory for requests".to_owned());
        }
        let (count, interval) = (self.plan.count, self.plan.flush_interval);
        if interval == 0 || !self.plan.drain {
            return self.requests(buffer, count);
        }
        let mut end = 0;
        while end < count && !self.ended.load(Ordering::Relaxed) {
            end = (end + interval).min(count);
            self.requests(buffer, end);
            if self.barrier.wait().is_leader() {
                self.flush();
                let stopped = self.stopped.load(Ordering::Relaxed);
                self.ended.store(stopped, Ordering::Relaxed);
            }
            self.barrier.wait();
        }
    }

    /// Makes one request after another, until the one before the number `end` has been taken.
    fn requests(&self, buffer: &mut [u8], end: u64) {
        while !self.stopped.load(Ordering::Relaxed) {
            let order = Ordering::Relaxed;
            let taken = self
                .next
                .fetch_update(order, order, |next| (next < end).then_some(next + 1));
            let Ok(index) = taken else {
                return;
            };
            if let Err(reason) = self.request(buffer, index) {
                return self.fail(format!("Failed request: {reason}"));
            }
            let interval = self.plan.flush_interval;
            if interval > 0 && !self.plan.drain && (index + 1).is_multiple_of(interval) {
                self.flush();
            }
        }
    }

    fn request(&self, buffer: &mut [u8], index: u64) -> Result<(), String> {
        let offset = self.offset(index);
        let slices = [VolatileSlice::from(buffer)];
        let done = if self.plan.write {
            self.disk.write_at(&slices, offset)
        } else {
            self.disk.read_at(&slices, offset)
        };
        done.map_err(|error| match error {
            Error::OutOfRange { .. } => "Input/output error".to_owned(),
            other => other.cause(),
        })
    }

    /// Where a request begins: the first one where the user says, others inside the disk.
    fn offset(&self, index: u64) -> u64 {
        let (start, step) = (u128::from(self.plan.offset), u128::from(self.plan.step));
        let offset = start + u128::from(index) * step;
        match (index, self.disk_size) {
            (0, _) => self.plan.offset,
            (_, 0) => 0,
            (_, size) => (offset % u128::from(size)) as u64,
        }
    }

    fn flush(&self) {
        if let Err(error) = self.disk.flush() {
            self.fail(format!("Failed flush request: {}", error.cause()));
        }
    }

    fn fail(&self, reason: String) {
        let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
        failure.get_or_insert(reason);
        self.stopped.store(true, Ordering::Relaxed);
    }
}
